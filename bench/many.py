"""Measures one exporter with 500 targets on real servers, and with more on a light stand-in."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import yaml

from bench import exporters, standin
from bench.askers import Asked, Askers, Job
from bench.exporters import Exporter
from bench.processes import memory, processor_seconds, processor_seconds_of_tree
from bench.report import Report, Table, Target, Value
from bench.run import Run
from bench.servers import dsn

_REAL, _LIGHT = 500, (1000, 2000)
_CADENCE_SECONDS = 15.0
_WARM_UP = 2
"""Cycles that do not count, after a scrape of each target, one by one, that connects."""
_CYCLES = 4
_PEOPLE = 3
"""Who load the page for people once in each cycle."""
_TWICE = 10
"""Each target of so many is scraped by a second Prometheus at the same moment."""
_ALONE_SECONDS = 20
"""For which a single target is scraped each second, the background's first round within it."""
_FIRST, _SECOND = "Prometheus", "a second Prometheus"
_COLUMNS = (
    "targets",
    "on",
    "first ms",
    "scrapes",
    "CPU ms per scrape",
    "% of a core",
    "p50 late ms",
    "p99 late ms",
    "p99 asked late ms",
    "missed",
    "MB with 1",
    "MB with all",
    "MB per target",
    "servers' % of a core",
)


@dataclass(frozen=True)
class _Case:
    """Some targets, and what was found with them."""

    name: str
    targets: int
    first: float
    """Processor seconds of the exporter for the first scrape of a target."""
    answers: Sequence[Asked]
    processor: float
    servers: float
    """Processor seconds of the exporter, and of those it asks."""
    seconds: float
    alone: int
    resident: int
    """Bytes, with one target and with all."""

    @property
    def scrapes(self) -> list[Asked]:
        """The answers to those who scrape targets."""
        return [asked for asked in self.answers if asked.kind in (_FIRST, _SECOND)]

    @property
    def missed(self) -> list[Asked]:
        """The answers that did not come in time, or not from an exporter that reached its target.

        Of other pages as well.
        """
        return [asked for asked in self.answers if asked.fault]

    @property
    def share(self) -> float:
        """The exporter's part of one core."""
        return self.processor / self.seconds

    @property
    def late(self) -> float:
        """Seconds after they were due until 99 of 100 scrapes were answered."""
        return quantiles([asked.late for asked in self.scrapes], n=100)[98]

    @property
    def per_target(self) -> float:
        """Megabytes that one more target takes."""
        return (self.resident - self.alone) / (self.targets - 1) / 1e6

    def row(self) -> tuple[Value, ...]:
        """What the table shows."""
        scrapes = self.scrapes
        return (
            self.targets,
            self.name,
            self.first * 1000,
            len(scrapes),
            self.processor / len(scrapes) * 1000,
            self.share * 100,
            median(asked.late for asked in scrapes) * 1000,
            self.late * 1000,
            quantiles([asked.overslept for asked in scrapes], n=100)[98] * 1000,
            len(self.missed),
            self.alone / 1e6,
            self.resident / 1e6,
            self.per_target,
            self.servers / self.seconds * 100,
        )

    def pages(self) -> Iterator[tuple[Value, ...]]:
        """A row for each other kind of page."""
        for kind in dict.fromkeys(asked.kind for asked in self.answers):
            mine = [asked for asked in self.answers if asked.kind == kind]
            yield (
                self.targets,
                kind,
                len(mine),
                median(asked.late for asked in mine) * 1000,
                max(asked.late for asked in mine) * 1000,
                max(asked.size for asked in mine) / 1e6,
            )

    def bounds(self, share: float) -> list[Target]:
        """What is asked for."""
        who = f"{self.targets:,} targets on {self.name}"
        return [
            Target(f"{who}: the exporter's CPU", share, self.share * 100, unit=" % of a core"),
            Target(f"{who}: p99 of an answer's lateness", 100, self.late * 1000, unit=" ms"),
            Target(f"{who}: memory", 0.25, self.per_target, unit=" MB per target"),
            Target(f"{who}: answers missed", 0, len(self.missed)),
        ]


def measure(run: Run) -> Report:
    """Scrape 500, 1,000 and 2,000 targets every 15 s, while people look and others ask as well."""
    cycles = 1 if run.quick else _CYCLES
    servers = run.servers.four
    real = _measure(
        "real servers",
        _REAL,
        [dsn(server) for server in servers],
        cycles,
        lambda: sum(processor_seconds_of_tree(server.pid) for server in servers),
    )
    with standin.running(run.servers.plain.port) as light:
        stand_ins = [
            _measure(
                "a stand-in",
                count,
                [dsn(run.servers.plain, port=light.port)],
                cycles,
                lambda: processor_seconds(light.pid),
            )
            for count in _LIGHT
        ]
    cases = [real, *stand_ins]
    faults = [f"{case.name}: {asked.path} {asked.fault}" for case in cases for asked in case.missed]
    return Report(
        "many",
        [
            f"Each target every {_CADENCE_SECONDS:g} s at its own moment, over kept connections; "
            f"each of {_TWICE} by two Prometheuses at once, {_PEOPLE} people on the page for "
            "people, the exporter's own page and its service discovery once a cycle; "
            f"{cycles} cycles after {_WARM_UP} that do not count. Late is an answer from when it "
            "was due until its last byte has come. The stand-in answers with what one real server "
            "said once, and works for nobody.",
            *faults[:3],
        ],
        [
            Table("many targets", _COLUMNS, [case.row() for case in cases]),
            Table(
                "who asked",
                ("targets", "who", "answers", "p50 late ms", "longest ms", "largest MB"),
                [row for case in cases for row in case.pages()],
            ),
        ],
        [*real.bounds(40), *stand_ins[0].bounds(15), *stand_ins[1].bounds(30)],
    )


def _measure(
    name: str, count: int, dsns: Sequence[str], cycles: int, work: Callable[[], float]
) -> _Case:
    """Run one exporter with one target, then one with all; `work` tells what those asked used."""
    with _exporter({"alone": dsns[0]}) as exporter:
        for _ in range(_ALONE_SECONDS):
            exporter.scrape("/probe?target=alone")
            time.sleep(1)
        alone = memory(exporter.pid).resident
    targets = {f"target-{n:04}": dsns[n % len(dsns)] for n in range(count)}
    with _exporter(targets) as exporter, Askers(exporter.port) as askers:
        used = processor_seconds(exporter.pid)
        for target in targets:
            exporter.scrape(f"/probe?target={target}")
        first = (processor_seconds(exporter.pid) - used) / count
        askers.ask(_jobs([*targets], _WARM_UP)).result()
        begun, used, worked = time.perf_counter(), processor_seconds(exporter.pid), work()
        answers = askers.ask(_jobs([*targets], cycles)).result()
        return _Case(
            name,
            count,
            first,
            answers,
            processor_seconds(exporter.pid) - used,
            work() - worked,
            time.perf_counter() - begun,
            alone,
            memory(exporter.pid).resident,
        )


def _jobs(names: Sequence[str], cycles: int) -> list[Job]:
    """Everything that is asked for in some cycles."""
    pause = _CADENCE_SECONDS / len(names)
    jobs: list[Job] = []
    for cycle in range(cycles):
        begun = cycle * _CADENCE_SECONDS
        for number, name in enumerate(names):
            due, path = begun + number * pause, f"/probe?target={name}"
            jobs.append(Job(due, path, _FIRST))
            if number % _TWICE == 0:
                jobs.append(Job(due, path, _SECOND))
        for number in range(_PEOPLE):
            due = begun + (number + 0.5) * _CADENCE_SECONDS / _PEOPLE
            jobs.append(Job(due, "/", "somebody at /"))
        jobs.append(Job(begun + 1, "/metrics", "Prometheus at /metrics"))
        jobs.append(Job(begun + 2, "/sd", "Prometheus at /sd"))
    return jobs


@contextlib.contextmanager
def _exporter(targets: Mapping[str, str]) -> Iterator[Exporter]:
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "pgvigil.yml")
        path.write_text(yaml.safe_dump({"targets": {n: {"dsn": d} for n, d in targets.items()}}))
        yield stack.enter_context(exporters.pgvigil(None, f"--config={path}"))
