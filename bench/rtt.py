"""Measures how much a scrape suffers from the distance to the server."""

import time
from contextlib import ExitStack
from statistics import median

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


def measure(run: Run) -> Report:
    """Scrape both exporters over lines of several round-trip times."""
    report = Report("rtt")
    table = Table(
        "latency by round-trip time",
        ("line ms", "measured ms", "exporter", "median ms", "round trips", "ours / theirs"),
    )
    special = Table(
        "pgvigil's dearer scrapes",
        ("line ms", "scrape", "median ms", "round trips"),
    )
    server = run.servers.plain
    for distance in _DISTANCES:
        with ExitStack() as stack:
            port = server.port
            if distance:
                port = stack.enter_context(delayed("127.0.0.1", server.port, distance))
            line = dsn(server, port=port)
            trip = _round_trip(line)
            running = stack.enter_context(run.both(line))
            # The peer needs seconds for a scrape at 50 ms.
            rounds, burst = (run.times(9), 10) if not distance else (run.times(6), 2)
            found = interleaved(running, server, rounds, burst)
            ours, theirs = found[OURS].milliseconds, None
            if PEER in found:
                theirs = found[PEER].milliseconds
            for name, measured in found.items():
                table.rows.append(
                    (
                        f"{distance * 1000:g}",
                        trip * 1000,
                        name,
                        measured.milliseconds,
                        measured.milliseconds / (trip * 1000) if distance else None,
                        ratio(ours, theirs) if name == OURS else None,
                    )
                )
            if not distance:
                claim = "latency beside postgres_exporter without any distance"
                report.targets.append(Target(claim, 1.0, ratio(ours, theirs)))
                continue
            changed = _after_changes(running[0], server, run.times(9))
            connected = _after_connects(line, run.times(6))
            for name, seconds in (("facts changed", changed), ("first, connects", connected)):
                special.rows.append((f"{distance * 1000:g}", name, seconds * 1000, seconds / trip))
        if distance == _DISTANCES[-1]:
            report.targets += [
                Target(f"round trips at {distance * 1000:g} ms", 1.5, ours / 1000 / trip),
                Target(
                    f"round trips at {distance * 1000:g} ms when facts changed", 2.5, changed / trip
                ),
                Target(
                    f"postgres_exporter's latency in ours at {distance * 1000:g} ms",
                    15,
                    ratio(theirs, ours),
                    at_least=True,
                ),
            ]
    report.tables += [table, special]
    report.notes.append(
        "'measured' is the median of `select 1` over the same line; 'round trips' is the whole "
        "latency in these, work on both sides included. The line does not delay TCP's handshake."
    )
    return report


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
