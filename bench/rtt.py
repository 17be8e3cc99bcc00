"""Measures how much a scrape suffers from the distance to the server."""

import time
from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

import psycopg

from bench import exporters
from bench.exporters import OURS, PEER, Exporter
from bench.report import Report, Table, Target, ratio
from bench.rounds import interleaved
from bench.run import Run
from bench.servers import dsn
from lab.delay_proxy import delayed
from lab.postgres import Server

_DISTANCES = (0.0, 0.010, 0.050)
"""Seconds of round-trip time."""
_SAMPLES = 21


class _Line(NamedTuple):
    """What a line of one length made of each kind of scrape, in seconds."""

    trip: float
    """What the smallest question took."""
    scrapes: dict[str, float]
    """The median scrape by exporter."""
    changed: float
    connected: float


def measure(run: Run) -> Report:
    """Scrape both exporters over lines of several round-trip times."""
    lines = {distance: _over(run, distance) for distance in _DISTANCES}
    here = lines[0.0]
    scrapes = Table(
        "latency by round-trip time",
        ("line ms", "measured ms", "exporter", "median ms", "in trips", "trips", "ours / theirs"),
    )
    dearer = Table(
        "pgvigil's dearer scrapes", ("line ms", "scrape", "median ms", "in trips", "trips")
    )
    for distance, line in lines.items():
        name = f"{distance * 1000:g}"
        ours, theirs = line.scrapes[OURS], line.scrapes.get(PEER)
        for exporter, seconds in line.scrapes.items():
            trips = _trips(seconds, here.scrapes[exporter], line) if distance else (None, None)
            beside = ratio(ours, theirs) if exporter == OURS else None
            scrapes.rows.append((name, line.trip * 1000, exporter, seconds * 1000, *trips, beside))
        for kind, seconds, direct in (
            ("facts changed", line.changed, here.changed),
            ("the first, connects", line.connected, here.connected),
        ):
            trips = _trips(seconds, direct, line) if distance else (None, None)
            dearer.rows.append((name, kind, seconds * 1000, *trips))
    far = lines[_DISTANCES[-1]]
    farthest = f"{_DISTANCES[-1] * 1000:g} ms"
    return Report(
        "rtt",
        [
            "'measured' is the median of `select 1` over the same line. 'in trips' is the whole "
            "latency in these, 'trips' what is left of it without the same scrape's latency at no "
            "distance, that is how often it waited for the line. The line does not delay TCP's "
            "handshake."
        ],
        [scrapes, dearer],
        [
            Target(f"latency in round trips at {farthest}", 1.5, far.scrapes[OURS] / far.trip),
            Target(
                f"round trips at {farthest} when facts changed",
                2.5,
                (far.changed - here.changed) / far.trip,
            ),
            Target(
                f"postgres_exporter's latency in ours at {farthest}",
                15,
                ratio(far.scrapes.get(PEER), far.scrapes[OURS]),
                at_least=True,
            ),
            Target(
                "latency beside postgres_exporter at no distance",
                1.0,
                ratio(here.scrapes[OURS], here.scrapes.get(PEER)),
            ),
        ],
    )


def _over(run: Run, distance: float) -> _Line:
    server = run.servers.plain
    with ExitStack() as stack:
        port = server.port
        if distance:
            port = stack.enter_context(delayed("127.0.0.1", server.port, distance))
        line = dsn(server, port=port)
        trip = _round_trip(line)
        running = stack.enter_context(run.both(line))
        # The peer needs a second and more for a scrape at 50 ms.
        rounds, burst = (run.times(6), 2) if distance else (run.times(9), 10)
        found = interleaved(running, server, rounds, burst)
        return _Line(
            trip,
            {name: measured.milliseconds / 1000 for name, measured in found.items()},
            _after_changes(running[0], server, run.times(12)),
            _after_connects(line, run.times(6)),
        )


def _trips(seconds: float, direct: float, line: _Line) -> tuple[float, float]:
    return seconds / line.trip, (seconds - direct) / line.trip


def _round_trip(line: str) -> float:
    """Seconds that the smallest question takes over a kept connection."""
    taken = []
    with psycopg.connect(line, autocommit=True) as connection:
        for _ in range(_SAMPLES):
            begun = time.perf_counter()
            connection.execute("select 1")
            taken.append(time.perf_counter() - begun)
    return median(taken)


def _after_changes(exporter: Exporter, server: Server, times: int) -> float:
    """The median scrape that finds other extensions than the one before."""
    taken = []
    for number in range(times):
        # Every server has this extension, and no query of a catalogue needs it.
        server.execute("create extension plpgsql" if number % 2 else "drop extension plpgsql")
        taken.append(exporter.scrape().seconds)
        exporter.scrape()
    server.execute("create extension if not exists plpgsql")
    return median(taken)


def _after_connects(line: str, times: int) -> float:
    """The median first scrape of an exporter that has just started."""
    taken = []
    for _ in range(times):
        with exporters.pgvigil(line) as exporter:
            taken.append(exporter.scrape().seconds)
    return median(taken)
