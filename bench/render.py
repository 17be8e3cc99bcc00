"""Compares pgvigil's rendering with prometheus_client's, and watches the loop meanwhile."""

import gc
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from time import process_time
from typing import Any

import psycopg
from pgvigil import render
from pgvigil.catalogue import Metric, Needs, Query, Variant
from pgvigil.plan import Statement
from pgvigil.source import CHUNK, Rows
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from psycopg import pq

from bench.report import Report, Table, Target
from bench.run import EVERY_TABLE, Run
from bench.servers import dsn
from bench.stalls import longest_gaps

_ROWS = 12_500
_LABELS = ("datname", "kind", "note", "relname", "schemaname")
_VALUES = tuple(f"value_{number}" for number in range(8))
# Values as statistics have them: counters, ages with fractions, ratios and now and then nothing.
# One name in a hundred holds what must be escaped, one in a hundred is not ASCII.
_TEXT = f"""select
  'app' as datname,
  case when n % 2 = 0 then 'heap' else 'index' end as kind,
  case when n % 10 <> 0 then 'note ' || n % 7 end as note,
  case n % 100 when 0 then 'odd "name" \\ ' || n when 1 then 'größe_' || n
    else 'table_' || n end as relname,
  'schema_' || n % 20 as schemaname,
  n::int8 * 977 as value_0, n::int8 * n as value_1, n % 3 as value_2, n::int8 << 20 as value_3,
  n / 7.0::float8 as value_4, (n % 1000) / 1000.0::float8 as value_5,
  n::numeric / 3 as value_6, case when n % 20 <> 0 then n end as value_7
from generate_series(1, {_ROWS}) as n"""


def measure(run: Run) -> Report:
    """Render 100,000 samples in both ways by turns, then serve as many and time the loop."""
    report = Report("render")
    line = dsn(run.servers.plain)
    chunks, rows = _chunks(line), _values(line)
    ways: dict[str, Callable[[], bytes]] = {
        "pgvigil": lambda: _ours(chunks),
        "prometheus_client": lambda: generate_latest(_registry(rows)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    pages: dict[str, bytes] = {}
    for _ in range(1 + run.times(9)):
        for name, way in ways.items():
            gc.collect()
            begun = process_time()
            pages[name] = way()
            taken[name].append(process_time() - begun)
    samples = {name: _samples(page) for name, page in pages.items()}
    if samples["pgvigil"] != samples["prometheus_client"]:
        raise RuntimeError("the two ways do not give the same samples")
    count = len(samples["pgvigil"])
    table = Table(
        f"rendering of {count:,} samples, {len(_LABELS)} labels",
        ("way", "CPU ms", "ns per sample", "times pgvigil's"),
    )
    cost = {name: median(times[1:]) for name, times in taken.items()}
    for name, seconds in cost.items():
        table.rows.append((name, seconds * 1000, seconds / count * 1e9, seconds / cost["pgvigil"]))
    report.tables.append(table)
    report.notes.append(
        "Processor time in one process. pgvigil: Sheet.add over results that libpq has received, "
        "and writing the page; prometheus_client: GaugeMetricFamily.add_metric over rows that "
        "psycopg has fetched as Python values, and generate_latest. Both pages hold the same "
        "samples. Fetching is in neither."
    )
    report.targets.append(
        Target(
            "prometheus_client's time to render in ours",
            12,
            cost["prometheus_client"] / cost["pgvigil"],
            at_least=True,
        )
    )
    _watch_the_loop(run, report)
    return report


def _watch_the_loop(run: Run, report: Report) -> None:
    gaps = longest_gaps(dsn(run.servers.wide, "wide"), EVERY_TABLE, run.times(9))
    walls = [gap.wall * 1000 for gap in gaps.scrapes]
    processor = [gap.processor * 1000 for gap in gaps.scrapes]
    table = Table(
        f"longest gap between two turns of the loop, ms, {gaps.series:,} series with gzip",
        ("while", "by the clock", "worst", "of processor time", "worst"),
        [
            ("idle", None, gaps.idle.wall * 1000, None, gaps.idle.processor * 1000),
            ("a scrape", median(walls), max(walls), median(processor), max(processor)),
        ],
    )
    report.tables.append(table)
    report.notes.append(
        "A scrape's gap is the longest in it; the table shows the median scrape's and the worst. "
        "What the clock shows beyond processor time is other work on the machine."
    )
    claim = "longest gap of the loop in a scrape of so many series"
    report.targets.append(Target(claim, 20, median(walls), unit=" ms"))


def _samples(page: bytes) -> dict[bytes, float]:
    """Each sample's name and labels, with its value."""
    lines = (line for line in page.splitlines() if line and not line.startswith(b"#"))
    pairs = (line.rpartition(b" ") for line in lines)
    return {name: float(value) for name, _, value in pairs}


def _chunks(line: str) -> list[Rows]:
    """The rows as the exporter receives them: some at a time, as text."""
    connection = pq.PGconn.connect(line.encode())
    connection.exec_(b"set client_encoding = 'UTF8'")
    connection.send_query_params(_TEXT.encode(), None)
    connection.set_chunked_rows_mode(CHUNK)
    found: list[Rows] = []
    while result := connection.get_result():
        if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.TUPLES_CHUNK):
            raise RuntimeError(result.get_error_message())
        found.append(result)
    connection.finish()
    return found


def _values(line: str) -> list[tuple[Any, ...]]:
    """The rows as psycopg gives them to a program."""
    with psycopg.connect(line, autocommit=True) as connection:
        return connection.execute(_TEXT.encode()).fetchall()


def _statement() -> Statement:
    metrics = [
        Metric(f"bench_{name}", name, "gauge", "For measuring.", name, 10, 99) for name in _VALUES
    ]
    query = Query(
        name="bench.samples",
        why="",
        role="any",
        needs=Needs(),
        timeout=10,
        max_series=1_000_000,
        labels=_LABELS,
        variants=[Variant(10, 99, _TEXT)],
        metrics=metrics,
        place="",
        line=0,
    )
    return Statement(query, _TEXT, metrics)


def _ours(chunks: Iterable[Rows]) -> bytes:
    sheet = render.Layout(_statement(), {}).sheet()
    for chunk in chunks:
        sheet.add(chunk)
    return b"".join(piece for f in sheet.families for piece in f.write(openmetrics=False))


class _Families(Collector):
    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for position, name in enumerate(_VALUES, len(_LABELS)):
            family = GaugeMetricFamily(f"bench_{name}", "For measuring.", labels=_LABELS)
            for row in self._rows:
                if (value := row[position]) is not None:
                    family.add_metric([word or "" for word in row[: len(_LABELS)]], float(value))
            yield family

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())


def _registry(rows: list[tuple[Any, ...]]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Families(rows))
    return registry
