"""Shows where the exporter's memory goes, how much a big page needs, and that it does not grow."""

import os
import subprocess
import sys

from bench import exporters
from bench.exporters import OURS, PEER
from bench.processes import memory
from bench.report import Report, Table, Target, ratio
from bench.run import EVERY_TABLE, Run
from bench.servers import dsn

# In the order in which each builds on the one before.
_MODULES = (
    "asyncio",
    "ssl",
    "psycopg",
    "yaml",
    "jsonschema",
    "structlog",
    "prometheus_client",
    "prometheus_client.openmetrics.exposition",
    "h2.connection",
    "hypercorn.config",
    "hypercorn.asyncio",
    "isal.isal_zlib",
    "pgvigil.cli",
)
_SCRIPT = """
import importlib, re, sys

def show(step):
    text = open("/proc/self/status").read()
    print(step, *(re.search(key + r":\\s+(\\d+)", text)[1] for key in ("VmRSS", "RssAnon")))

show("python")
for name in sys.argv[1:]:
    importlib.import_module(name)
    show(name)
from pgvigil import apart, catalogue
queries = apart.run(catalogue.load)  # as the command does
show("catalogue")
"""


def measure(run: Run) -> Report:
    """Measure the idle exporter, its peak at a big page beside the peer's, and its growth."""
    report = Report("memory")
    _idle(run, report)
    _peak(run, report)
    _growth(run, report)
    report.notes.append(
        "Resident memory as the kernel counts it, shared libraries included; 'private' is what no "
        "other process shares. Steps are in order: a module shows what those before it did not "
        "bring along."
    )
    return report


def _idle(run: Run, report: Report) -> None:
    steps = _steps()
    with exporters.pgvigil(dsn(run.servers.plain)) as exporter:
        steps.append(("started", *_megabytes(exporter.pid)))
        exporter.scrape()
        idle, private = _megabytes(exporter.pid)
        steps.append(("after one scrape", idle, private))
    table = Table(
        "resident memory step by step, MB", ("step", "resident", "more", "private", "more")
    )
    before = (0.0, 0.0)
    for name, resident, own in steps:
        table.rows.append((name, resident, resident - before[0], own, own - before[1]))
        before = resident, own
    report.tables.append(table)
    report.targets.append(Target("idle memory after one scrape", 50, idle, unit=" MB"))


def _steps() -> list[tuple[str, float, float]]:
    """What each import adds in a fresh interpreter; modules pgvigil does not load are left out."""
    loaded = _python("import sys, pgvigil.cli; print(*sys.modules)").split()
    modules = [name for name in _MODULES if name in loaded]
    lines = _python(_SCRIPT, *modules).splitlines()
    found = (line.split() for line in lines)
    return [(name, int(rss) * 1024 / 1e6, int(own) * 1024 / 1e6) for name, rss, own in found]


def _python(script: str, *words: str) -> str:
    command = [sys.executable, "-c", script, *words]
    environment = {**os.environ, "PGDATABASE": "postgres"}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def _peak(run: Run, report: Report) -> None:
    with run.both(dsn(run.servers.wide, "wide"), EVERY_TABLE) as running:
        for _ in range(run.times(6)):
            for exporter in running:
                page = exporter.scrape()
        found = {exporter.name: memory(exporter.pid) for exporter in running}
    table = Table(f"memory at {page.series:,} series, MB", ("exporter", "now", "peak"))
    for name, used in found.items():
        table.rows.append((name, used.resident / 1e6, used.peak / 1e6))
    report.tables.append(table)
    theirs = found[PEER].peak if PEER in found else None
    claim = "peak memory at as many series beside postgres_exporter"
    report.targets.append(Target(claim, 0.6, ratio(found[OURS].peak, theirs)))


def _growth(run: Run, report: Report) -> None:
    early, late = (50, 200) if run.quick else (200, 1000)
    seen: list[tuple[int, float]] = []
    with exporters.pgvigil(dsn(run.servers.plain)) as exporter:
        for number in range(1, late + 1):
            exporter.scrape()
            if number % early == 0:
                seen.append((number, _megabytes(exporter.pid)[0]))
    table = Table("memory after so many scrapes, MB", ("scrapes", "resident", "more"))
    table.rows += [(number, resident, resident - seen[0][1]) for number, resident in seen]
    report.tables.append(table)
    claim = f"growth between scrape {early} and {late:,}"
    report.targets.append(Target(claim, 0.5, seen[-1][1] - seen[0][1], unit=" MB"))


def _megabytes(pid: int) -> tuple[float, float]:
    used = memory(pid)
    return used.resident / 1e6, used.private / 1e6
