"""Measures what targets that went silent cost the others of a fleet."""

import contextlib
import multiprocessing
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

import yaml

from bench import exporters
from bench.exporters import Client, Exporter
from bench.fleet import under_load
from bench.processes import processor_seconds
from bench.report import Report, Table, Target, Value
from bench.run import Run
from bench.servers import dsn
from lab.line import Line

_HEALTHY, _MORTAL = 150, 50
_CADENCE_SECONDS = 5.0
_TIMEOUT_SECONDS = 5.0
"""Prometheus allows no more than the interval."""
_CLIENTS = 8
_CYCLES = 3
"""Cycles of one kind before the other's turn."""
_WRONG = 0.02
"""The share of pages that may say something else of a target than what we did to it: on a busy
machine one that has just come back may need another scrape."""
_COLUMNS = (
    "50 of 200 are",
    "scrapes of the others",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "CPU ms per scrape",
)


_REASON = re.compile(rb'^pg_down_reason\{reason="(\w+)"\} 1$', re.M)


@dataclass
class _Kind:
    """All cycles in which the mortal targets were well, or dead."""

    name: str
    latency: list[float] = field(default_factory=list)
    """Of the targets that are well all the time."""
    processor: float = 0.0
    """Seconds of the exporter, for all targets."""
    scrapes: int = 0
    """Of all targets."""

    @property
    def cost(self) -> float:
        """The exporter's milliseconds per scrape of whatever target."""
        return self.processor / self.scrapes * 1000

    def percentile(self, share: int) -> float:
        """Milliseconds."""
        return quantiles(self.latency, n=100)[share - 1] * 1000

    def row(self) -> tuple[Value, ...]:
        """What the table shows."""
        shares = [self.percentile(share) for share in (50, 90, 99)]
        return (self.name, len(self.latency), *shares, self.cost)


def measure(run: Run) -> Report:
    """Scrape 200 targets every 5 s while 50 of them die and come back, by turns."""
    server = run.servers.busy
    well, dead = _Kind("well"), _Kind("dead")
    rounds: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(under_load(server))
        # Half had connections that went silent, the others never answered: cut before they froze.
        silent = stack.enter_context(_line("127.0.0.1", server.port))
        absent = stack.enter_context(_line("127.0.0.1", server.port))
        ports = [server.port] * _HEALTHY
        ports += [silent.port if n % 2 else absent.port for n in range(_MORTAL)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "pgvigil.yml"
        targets = {f"t{n:03}": {"dsn": dsn(server, port=port)} for n, port in enumerate(ports)}
        path.write_text(yaml.safe_dump({"targets": targets}))
        exporter = stack.enter_context(exporters.pgvigil(None, f"--config={path}"))
        fleet = _Fleet(exporter, list(targets))
        for _ in range(run.times(6)):
            for line in (silent, absent):
                line.tell("thaw")
            fleet.run(1, None)  # connects anew
            mine = [_Kind("well"), _Kind("dead")]
            fleet.run(_CYCLES, mine[0])
            absent.tell("cut")
            for line in (silent, absent):
                line.tell("freeze")
            fleet.run(_CYCLES, mine[1], dead=True)
            for whole, part in zip((well, dead), mine, strict=True):
                whole.latency += part.latency
                whole.processor += part.processor
                whole.scrapes += part.scrapes
            rounds.append(mine[1].percentile(99) / mine[0].percentile(99))
        for line in (silent, absent):
            line.tell("thaw")
    table = Table(
        f"scrapes of {_HEALTHY} healthy targets, each every {_CADENCE_SECONDS:g} s",
        _COLUMNS,
        [well.row(), dead.row()],
    )
    return Report(
        "dead",
        [
            f"{_MORTAL} more targets lie behind lines that freeze, half with open connections, "
            "half after these were cut. Nobody waits for them longer than Prometheus would, "
            f"{_TIMEOUT_SECONDS:g} s. By turns, {_CYCLES} cycles each; p99 round by round: "
            + ", ".join(f"{ratio:.2f}" for ratio in rounds)
        ],
        [table],
        [
            Target(
                "p99 of the healthy with the dead, over that without",
                1.10,
                dead.percentile(99) / well.percentile(99),
            ),
            Target("the same, median of the rounds", 1.10, median(rounds)),
            # What a busy machine does to latency it does not do to this.
            Target(
                "the exporter's CPU with the dead, over that without", 1.10, dead.cost / well.cost
            ),
        ],
    )


class _Fleet:
    """An exporter and who asks it for its targets."""

    def __init__(self, exporter: Exporter, names: Sequence[str]) -> None:
        self._exporter = exporter
        self._names = names

    def run(self, cycles: int, kind: _Kind | None, *, dead: bool = False) -> None:
        """Scrape each target so often, at its own moments, and keep how long the healthy took."""
        begun = time.perf_counter()
        used = processor_seconds(self._exporter.pid)
        pause = _CADENCE_SECONDS / len(self._names)
        # In another order than they are numbered: the mortal ones stand between the others.
        order = sorted(range(len(self._names)), key=lambda n: n * 37 % len(self._names))
        jobs = [(begun + at * pause, n) for at, n in enumerate(order * cycles)]
        faults: list[str] = []
        latency: list[float] = []

        def work(mine: Iterator[tuple[float, int]], lock: threading.Lock) -> None:
            client = Client(self._exporter.port, _TIMEOUT_SECONDS)
            while True:
                with lock:
                    due, number = next(mine, (0.0, -1))
                if number < 0:
                    break
                time.sleep(max(0.0, due - time.perf_counter()))
                page = client.ask(f"/probe?target={self._names[number]}")
                if number < _HEALTHY:
                    latency.append(page.seconds)
                if page.status != 200 or (b"\npg_up 1" in page.body) == (
                    dead and number >= _HEALTHY
                ):
                    faults.append(
                        f"{self._names[number]} {page.status} {_REASON.findall(page.body)}"
                    )
            client.close()

        healthy = iter([job for job in jobs if job[1] < _HEALTHY])
        mortal = iter([job for job in jobs if job[1] >= _HEALTHY])
        locks = threading.Lock(), threading.Lock()
        workers = [threading.Thread(target=work, args=[healthy, locks[0]]) for _ in range(_CLIENTS)]
        # A dead target keeps its client waiting.
        workers += [threading.Thread(target=work, args=[mortal, locks[1]]) for _ in range(_MORTAL)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if kind is not None:
            kind.latency += latency
            # To the last answer, however late: else what is late would cost nothing.
            kind.processor += processor_seconds(self._exporter.pid) - used
            kind.scrapes += len(jobs)
            if len(faults) > _WRONG * len(jobs):
                raise RuntimeError(f"{len(faults)} of {len(jobs)} pages are wrong: {faults[0]}")


class _Remote:
    """A line in a process of its own, so that its work is nobody's here."""

    def __init__(self, port: int, pipe: Connection) -> None:
        self.port = port
        self._pipe = pipe

    def tell(self, word: str) -> None:
        """Have a method of the line called; it is done on return."""
        self._pipe.send(word)
        self._pipe.recv()


@contextlib.contextmanager
def _line(host: str, port: int) -> Iterator[_Remote]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_carry, args=(host, port, there))
    process.start()
    try:
        yield _Remote(here.recv(), here)
    finally:
        here.close()
        process.join()


def _carry(host: str, port: int, pipe: Connection) -> None:
    with Line(host, port) as line, contextlib.suppress(EOFError):
        pipe.send(line.port)
        while word := pipe.recv():
            {"freeze": line.freeze, "thaw": line.thaw, "cut": line.cut}[word]()
            pipe.send(word)
