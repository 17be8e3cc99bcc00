"""Shows what many tables, and many databases, cost the server: each scrape and the background."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

from pgvigil import catalogue
from pgvigil.plan import concerning

from bench import exporters
from bench.processes import memory, processor_seconds_of_tree
from bench.report import Report, Table, Target
from bench.run import Run
from bench.servers import ROLE, dsn
from lab.catalogue import asking
from lab.cluster import Role
from lab.hostile import many_tables
from lab.postgres import Server, Setting

TABLES = 10_000
DATABASES = 300
_LIMIT = 1000.0
"""Milliseconds that a query in the background may take."""
_SHOWN = 12
_PATIENCE = 300.0
_MONITOR = Role(ROLE, "")


class _Case(NamedTuple):
    name: str
    server: Server
    database: str
    visited: int
    """Databases that the background goes round."""


def measure(run: Run) -> Report:
    """Ask everything of 10,000 tables, scrape them, and go round 300 databases."""
    report = Report("big")
    with _server(run.servers.major) as wide, _server(run.servers.major) as crowded:
        many_tables(wide, TABLES)
        for number in range(DATABASES - len(crowded.execute("select from pg_database"))):
            crowded.execute(f"create database db_{number} template template0")
        _each_query(run, report, wide)
        cases = (
            _Case("1 database", run.servers.plain, "postgres", 1),
            _Case(f"{TABLES:,} tables", wide, "many", 2),
            _Case(f"{DATABASES} databases", crowded, "postgres", DATABASES - 2),
        )
        table = Table(
            "an exporter at work",
            ("case", "first round s", "its server CPU s", "scrape ms", "series", "MB peak"),
        )
        table.rows += [(case.name, *_at_work(run, case)) for case in cases]
    report.tables.append(table)
    report.notes.append(
        "The first round ends when each query has run in each database; the background rests "
        "between its visits, so most of it is waiting. Latency is the median scrape's after that."
    )
    return report


def _each_query(run: Run, report: Report, server: Server) -> None:
    """The time of each query, as the exporter's own session sees it."""
    every = {query.name: query.every for query in concerning(catalogue.load(), "postgresql")}
    times: dict[str, list[float]] = {}
    rows: dict[str, int] = {}
    with asking(server, dbname="many", role=_MONITOR) as asker:
        asker.ask()  # plans, and fills the session's caches
        for _ in range(run.times(6)):
            for name, outcome in asker.ask().items():
                if outcome.failure:
                    raise RuntimeError(f"{name}: {outcome.failure.detail}")
                times.setdefault(name, []).append(outcome.seconds * 1000)
                rows[name] = len(outcome.rows)
    taken = {name: median(of) for name, of in times.items()}
    slow = sorted((name for name in taken if every[name]), key=lambda name: -taken[name])
    table = Table(
        f"the slowest in the background, {TABLES:,} tables with 2 indexes each",
        ("query", "ms", "every s", "rows", "of one core"),
    )
    for name in slow[:_SHOWN]:
        share = taken[name] / 1000 / every[name]
        table.rows.append((name, taken[name], every[name], float(rows[name]), f"{share:.3%}"))
    total = sum(taken[name] / 1000 / every[name] for name in slow)
    fresh = sum(took for name, took in taken.items() if not every[name])
    report.tables.append(table)
    report.notes.append(
        f"The whole background takes {total:.2%} of one core of the server in this database, "
        f"the statements of one scrape {fresh:.1f} ms."
    )
    claim = f"ms of the slowest query in the background, {TABLES:,} tables"
    report.targets.append(Target(claim, _LIMIT, taken[slow[0]]))


def _at_work(run: Run, case: _Case) -> tuple[float, ...]:
    """What the first round takes, and a scrape after it."""
    before = processor_seconds_of_tree(case.server.pid)
    begun = time.monotonic()
    with exporters.pgvigil(dsn(case.server, case.database)) as exporter:
        while _missing(page := exporter.scrape().body, case.visited):
            if time.monotonic() - begun > _PATIENCE:
                raise RuntimeError(f"{case.name}: the first round does not end\n{page.decode()}")
            time.sleep(0.5)
        round_seconds = time.monotonic() - begun
        server = processor_seconds_of_tree(case.server.pid) - before
        pages = [exporter.scrape() for _ in range(run.times(30))]
        return (
            round_seconds,
            server,
            median(page.seconds for page in pages) * 1000,
            pages[-1].series,
            memory(exporter.pid).peak / 1e6,
        )


def _missing(page: bytes, databases: int) -> bool:
    """Whether a query has not run yet, or a database was not visited yet."""
    text = page.decode()
    told = set(re.findall(r'^pgvigil_query_(?:success|skipped)\{[^}]*query="([^"]+)"', text, re.M))
    ages = re.findall(r"^pgvigil_database_visit_age_seconds\{", text, re.M)
    left_out = re.findall(r'^pgvigil_databases\{state="left_out"\} (\d+)', text, re.M)
    missing = {query.name for query in concerning(catalogue.load(), "postgresql")} - told
    return bool(missing) or len(ages) + sum(map(int, left_out)) < databases


@contextmanager
def _server(major: int) -> Iterator[Server]:
    settings: dict[str, Setting] = {"autovacuum": False, "max_wal_size": "4GB"}
    with Server(major, hba=("host all all 127.0.0.1/32 trust",), settings=settings) as server:
        server.execute(f"create role {ROLE} login in role pg_monitor")
        yield server
