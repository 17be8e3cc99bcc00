"""Compares what one scrape costs the exporter, the server and whoever waits."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bench.exporters import OURS, PEER
from bench.report import Report, Table, Target, ratio
from bench.rounds import Measured, interleaved
from bench.run import EVERY_TABLE, SETTINGS, Run
from bench.servers import dsn
from lab.postgres import Server

_COLUMNS = (
    "case",
    "exporter",
    "median ms",
    "exporter CPU ms",
    "server CPU ms",
    "series",
    "CPU us/series",
    "kB sent",
    "kB page",
    "MB now",
    "MB peak",
)
_LIMITS = {"latency": 1.0, "exporter CPU": 0.5}
_LIMITS_BIG = {"latency": 1.0, "exporter CPU": 0.2, "peak memory": 1.0}
_RATIOS = ("case", "latency", "exporter CPU", "server CPU", "series", "CPU/series", "peak memory")


class _Case(NamedTuple):
    name: str
    server: Server
    database: str
    catalogue: Path | None
    rounds: int
    burst: int
    limits: Mapping[str, float]


def measure(run: Run) -> Report:
    """Scrape both exporters on a plain server, among 100 databases and on 5,000 tables."""
    report = Report("scrape")
    costs = Table("cost of one scrape", _COLUMNS)
    ratios = Table("pgvigil / postgres_exporter", _RATIOS)
    servers = run.servers
    cases = (
        # No claim: the pages differ in what they tell.
        _Case("1 database", servers.plain, "postgres", None, 9, 10, {}),
        _Case("1 database, as many series", servers.plain, "postgres", SETTINGS, 9, 10, _LIMITS),
        _Case("100 databases", servers.crowded, "postgres", None, 9, 5, _LIMITS),
        # No claim: by default the peer tells much of each table, and pgvigil does not.
        _Case("5,000 tables", servers.wide, "wide", None, 5, 2, {}),
        _Case("5,000 tables, as many series", servers.wide, "wide", EVERY_TABLE, 5, 2, _LIMITS_BIG),
    )
    for case in cases:
        with run.both(dsn(case.server, case.database), case.catalogue) as exporters:
            found = interleaved(exporters, case.server, run.times(case.rounds), case.burst)
        for name, measured in found.items():
            costs.rows.append((case.name, name, *_costs(measured)))
        ours, theirs = found[OURS], found.get(PEER)
        if theirs is None:
            continue
        ratios.rows.append((case.name, *_ratios(ours, theirs)))
        pairs = {
            "latency": (ours.milliseconds, theirs.milliseconds),
            "exporter CPU": (ours.exporter_milliseconds, theirs.exporter_milliseconds),
            "peak memory": (ours.memory.peak, theirs.memory.peak),
        }
        for what, limit in case.limits.items():
            claim = f"{what}, {case.name}, beside postgres_exporter"
            report.targets.append(Target(claim, limit, ratio(*pairs[what])))
    report.tables += [costs, ratios] if ratios.rows else [costs]
    report.notes += [
        "Default catalogues; 'as many series' gives pgvigil the peer's own statements on settings "
        "or on each table. Latency is the median scrape's, exporter CPU the median burst's, server "
        "CPU the mean over all processes of the server, ended ones as well.",
    ]
    return report


def _costs(measured: Measured) -> tuple[float, ...]:
    series = measured.page.series
    return (
        measured.milliseconds,
        measured.exporter_milliseconds,
        measured.server_milliseconds,
        series,
        measured.exporter_milliseconds * 1000 / series,
        len(measured.page.wire) / 1000,
        len(measured.page.body) / 1000,
        measured.memory.resident / 1e6,
        measured.memory.peak / 1e6,
    )


def _ratios(ours: Measured, theirs: Measured) -> tuple[float | None, ...]:
    pairs = (
        (ours.milliseconds, theirs.milliseconds),
        (ours.exporter_milliseconds, theirs.exporter_milliseconds),
        (ours.server_milliseconds, theirs.server_milliseconds),
        (ours.page.series, theirs.page.series),
        (
            ours.exporter_milliseconds / ours.page.series,
            theirs.exporter_milliseconds / theirs.page.series,
        ),
        (ours.memory.peak, theirs.memory.peak),
    )
    return tuple(ratio(*pair) for pair in pairs)
