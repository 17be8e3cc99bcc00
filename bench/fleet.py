"""Measures what one of many targets costs an exporter that scrapes them all steadily."""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import yaml

from bench import exporters
from bench.exporters import Client, Exporter
from bench.processes import memory, processor_seconds
from bench.report import Report, Table, Target, ratio
from bench.run import Run
from bench.servers import ROLE, dsn
from lab.postgres import Server

_TARGETS = 200
_PEER_TARGETS = 20
"""Fewer for the peer: its connections and queries at 200 would fill this machine."""
_CADENCE_SECONDS = 5.0
_CLIENTS = 8
_COLUMNS = (
    "exporter",
    "targets",
    "scrapes",
    "CPU ms per scrape",
    "% of a core",
    "p50 ms",
    "p99 ms",
    "p99 late ms",
    "MB idle",
    "MB now",
    "kB per target",
)


@dataclass
class _Steady:
    """What some cycles over all targets came to."""

    latency: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    """Seconds between when a scrape was due and when a client was free to ask."""
    failures: list[str] = field(default_factory=list)
    processor: float = 0.0
    seconds: float = 0.0


def measure(run: Run) -> Report:
    """Scrape 200 targets every 5 s, each over its own connection to one server under load."""
    server = run.servers.busy
    table = Table(f"a fleet, each target every {_CADENCE_SECONDS:g} s", _COLUMNS)
    cycles = 2 if run.quick else 5
    costs: list[float] = []
    with _load(server), tempfile.TemporaryDirectory() as folder:
        with _ours(server, Path(folder)) as (exporter, paths):
            costs.append(_row(table, exporter, paths, cycles))
        if run.peer:
            with _theirs(run, server, Path(folder)) as (exporter, paths):
                costs.append(_row(table, exporter, paths, 2))
    claim = "exporter CPU per target-scrape beside postgres_exporter's /probe"
    return Report(
        "fleet",
        [
            "All targets are one server under some load; pgvigil holds a connection to each, "
            "postgres_exporter opens new ones for each probe. Default catalogues."
        ],
        [table],
        [Target(claim, 0.5, ratio(costs[0], costs[1]) if run.peer else None)],
    )


def _row(table: Table, exporter: Exporter, paths: Sequence[str], cycles: int) -> float:
    idle = memory(exporter.pid).resident
    _scrape_steadily(exporter, paths, 1)  # connects, prepares
    steady = _scrape_steadily(exporter, paths, cycles)
    if steady.failures:
        failures = f"{len(steady.failures)} scrapes failed, such as {steady.failures[0]}"
        raise RuntimeError(f"{exporter.name}: {failures}")
    now = memory(exporter.pid).resident
    cost = steady.processor / len(steady.latency) * 1000
    table.rows.append(
        (
            exporter.name,
            len(paths),
            len(steady.latency),
            cost,
            steady.processor / steady.seconds * 100,
            median(steady.latency) * 1000,
            quantiles(steady.latency, n=100)[98] * 1000,
            quantiles(steady.late, n=100)[98] * 1000,
            idle / 1e6,
            now / 1e6,
            (now - idle) / len(paths) / 1000,
        )
    )
    return cost


def _scrape_steadily(exporter: Exporter, paths: Sequence[str], cycles: int) -> _Steady:
    """Scrape each path once in every cycle, at its own moment, as Prometheus spreads them."""
    found, lock = _Steady(), threading.Lock()
    pause = _CADENCE_SECONDS / len(paths)
    begun = time.perf_counter()
    used = processor_seconds(exporter.pid)
    jobs = iter([(begun + n * pause, path) for n, path in enumerate(list(paths) * cycles)])

    def work() -> None:
        client = Client(exporter.port)
        while True:
            with lock:
                due, path = next(jobs, (0.0, ""))
            if not path:
                break
            time.sleep(max(0.0, due - time.perf_counter()))
            late = time.perf_counter() - due
            page = client.ask(path)
            with lock:
                found.latency.append(page.seconds)
                found.late.append(late)
                if page.status != 200 or b"\npg_up 1" not in page.body:
                    found.failures.append(f"{page.status} {page.body[:200]!r}")
        client.close()

    workers = [threading.Thread(target=work) for _ in range(_CLIENTS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found.processor = processor_seconds(exporter.pid) - used
    found.seconds = time.perf_counter() - begun
    return found


@contextlib.contextmanager
def _ours(server: Server, folder: Path) -> Iterator[tuple[Exporter, list[str]]]:
    names = [f"target-{number:03}" for number in range(_TARGETS)]
    path = folder / "pgvigil.yml"
    path.write_text(yaml.safe_dump({"targets": {name: {"dsn": dsn(server)} for name in names}}))
    with exporters.pgvigil(None, f"--config={path}") as exporter:
        yield exporter, [f"/probe?target={name}" for name in names]


@contextlib.contextmanager
def _theirs(run: Run, server: Server, folder: Path) -> Iterator[tuple[Exporter, list[str]]]:
    assert run.peer
    path = folder / "postgres_exporter.yml"
    login = {"username": ROLE, "password": "unused"}
    module = {"type": "userpass", "userpass": login, "options": {"sslmode": "disable"}}
    path.write_text(yaml.safe_dump({"auth_modules": {"bench": module}}))
    with exporters.postgres_exporter(run.peer, dsn(server), f"--config.file={path}") as exporter:
        probe = f"/probe?auth_module=bench&target=127.0.0.1:{server.port}/postgres"
        yield exporter, [f"{probe}&number={number}" for number in range(_PEER_TARGETS)]


@contextlib.contextmanager
def _load(server: Server) -> Iterator[None]:
    command = [sys.executable, "-m", "bench.load", f"--dsn={dsn(server)}"]
    root = Path(__file__).resolve().parents[1]  # where -m finds the bench
    with subprocess.Popen(command, cwd=root) as process:
        try:
            yield
        finally:
            process.terminate()
