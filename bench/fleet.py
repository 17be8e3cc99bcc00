"""Measures what one of many targets costs an exporter that scrapes them all steadily."""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import yaml

from bench import exporters
from bench.exporters import Client, Exporter
from bench.peer import Peer
from bench.processes import memory, processor_seconds
from bench.report import Report, Table, Target, Value
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

    @property
    def cost(self) -> float:
        """The exporter's processor seconds per scrape."""
        return self.processor / len(self.latency)


def measure(run: Run) -> Report:
    """Scrape 200 targets every 5 s, each over its own connections to one server under load."""
    server = run.servers.busy
    cycles = 1 if run.quick else 3
    fleets: list[_Fleet] = []
    with ExitStack() as stack:
        stack.enter_context(under_load(server))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleets.append(stack.enter_context(_ours(server, folder)))
        if run.peer:
            fleets.append(stack.enter_context(_theirs(run.peer, server, folder)))
        for fleet in fleets:
            fleet.cycle()  # connects and prepares
            fleet.steady = _Steady()
        for _ in range(cycles):
            for fleet in fleets:
                fleet.cycle()
        table = Table(
            f"a fleet, each target every {_CADENCE_SECONDS:g} s",
            _COLUMNS,
            [fleet.row() for fleet in fleets],
        )
    # What a driver with nothing around it was measured at; the exporter has yet to come there.
    claim = "exporter CPU per target-scrape of 200, a bound to beat later"
    return Report(
        "fleet",
        [
            "All targets are one server under some load; pgvigil holds two connections to each, "
            "postgres_exporter opens new ones for each probe. Default catalogues, by turns."
        ],
        [table],
        [Target(claim, 2.1, fleets[0].steady.cost * 1000, unit=" ms")],
    )


class _Fleet:
    """An exporter with the pages of its targets."""

    def __init__(self, exporter: Exporter, paths: Sequence[str]) -> None:
        self.steady = _Steady()
        self._exporter = exporter
        self._paths = paths
        self._idle = memory(exporter.pid).resident

    def cycle(self) -> None:
        """Scrape each target once, at its own moment, as Prometheus spreads them."""
        _scrape_steadily(self._exporter, self._paths, self.steady)
        if self.steady.failures:
            failures = f"{len(self.steady.failures)} scrapes failed: {self.steady.failures[0]}"
            raise RuntimeError(f"{self._exporter.name}: {failures}")

    def row(self) -> tuple[Value, ...]:
        """What the table shows."""
        steady, now = self.steady, memory(self._exporter.pid).resident
        return (
            self._exporter.name,
            len(self._paths),
            len(steady.latency),
            steady.cost * 1000,
            steady.processor / steady.seconds * 100,
            median(steady.latency) * 1000,
            quantiles(steady.latency, n=100)[98] * 1000,
            quantiles(steady.late, n=100)[98] * 1000,
            self._idle / 1e6,
            now / 1e6,
            (now - self._idle) / len(self._paths) / 1000,
        )


def _scrape_steadily(exporter: Exporter, paths: Sequence[str], found: _Steady) -> None:
    lock = threading.Lock()
    pause = _CADENCE_SECONDS / len(paths)
    begun = time.perf_counter()
    used = processor_seconds(exporter.pid)
    jobs = iter([(begun + n * pause, path) for n, path in enumerate(paths)])

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
    found.processor += processor_seconds(exporter.pid) - used
    found.seconds += time.perf_counter() - begun


@contextlib.contextmanager
def _ours(server: Server, folder: Path) -> Iterator[_Fleet]:
    names = [f"target-{number:03}" for number in range(_TARGETS)]
    path = folder / "pgvigil.yml"
    path.write_text(yaml.safe_dump({"targets": {name: {"dsn": dsn(server)} for name in names}}))
    with exporters.pgvigil(None, f"--config={path}") as exporter:
        yield _Fleet(exporter, [f"/probe?target={name}" for name in names])


@contextlib.contextmanager
def _theirs(peer: Peer, server: Server, folder: Path) -> Iterator[_Fleet]:
    path = folder / "postgres_exporter.yml"
    login = {"username": ROLE, "password": "unused"}
    module = {"type": "userpass", "userpass": login, "options": {"sslmode": "disable"}}
    path.write_text(yaml.safe_dump({"auth_modules": {"bench": module}}))
    with exporters.postgres_exporter(peer, dsn(server), f"--config.file={path}") as exporter:
        probe = f"/probe?auth_module=bench&target=127.0.0.1:{server.port}/postgres"
        yield _Fleet(exporter, [f"{probe}&number={n}" for n in range(_PEER_TARGETS)])


@contextlib.contextmanager
def under_load(server: Server) -> Iterator[None]:
    """Keep a server as busy as a small application would."""
    command = [sys.executable, "-m", "bench.load", f"--dsn={dsn(server)}"]
    root = Path(__file__).resolve().parents[1]  # where -m finds the bench
    with subprocess.Popen(command, cwd=root) as process:
        try:
            yield
        finally:
            process.terminate()
