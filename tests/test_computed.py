"""What is computed from many runs is written as histograms and counts, and stays bounded."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from pgvigil import catalogue, computed, render
from pgvigil.computed import Computed, ComputedSheet
from pgvigil.errors import QueryFailed
from pgvigil.plan import Extension, Facts, Statement, make_plan
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from lab.results import FLOAT8, INT8, TEXT, Column, rows

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

NAMES = (
    *("key", "datname", "calls", "total", "smallest", "largest"),
    *("mean", "deviation", "since", "extremes_since", "started", "reset_time", "control"),
)


def planned(name: str) -> Statement:
    """The statement of a query that ships, as the newest server gets it."""
    queries = [query for query in catalogue.load() if query.name == name]
    extensions = {"pg_stat_statements": Extension("1.12", "public")}
    facts = Facts(180000, False, extensions=extensions, privileges=frozenset(["pg_read_all_stats"]))
    (statement,) = make_plan(queries, facts).statements
    return statement


def laid_out(name: str, limits: Sequence[float] = (), *, max_series: int | None = None) -> Computed:
    statement = planned(name)
    if max_series:
        statement = replace(statement, query=replace(statement.query, max_series=max_series))
    layout = computed.layout(statement, {"team": "a"}, limits)
    assert isinstance(layout, Computed)
    return layout


Entry = tuple[str, str, int, float, float, float, float, float]


def entry(key: str, database: str, *times: float) -> Entry:
    """An entry of these calls, in milliseconds."""
    mean = sum(times) / len(times)
    deviation = (sum((time - mean) ** 2 for time in times) / len(times)) ** 0.5
    return key, database, len(times), sum(times), min(times), max(times), mean, deviation


def read(layout: Computed, *entries: Entry, control: str = "", started: str = "1") -> ComputedSheet:
    """One run that finds these entries, and the database `idle` without any."""
    columns: list[list[bytes | None]] = [[] for _ in NAMES]
    for key, database, *numbers in entries:
        line = [key, database, *map(repr, numbers), None, None, started, None, control or None]
        for column, value in zip(columns, line, strict=True):
            column.append(None if value is None else str(value).encode())
    none: list[str | None] = [None, "idle", *[None] * 8, started, None, control or None]
    for column, value in zip(columns, none, strict=True):
        column.append(None if value is None else value.encode())
    sheet = layout.sheet()
    sheet.add(rows(*(Column(n, TEXT, c) for n, c in zip(NAMES, columns, strict=True))))
    sheet.finish()
    return sheet


def samples(sheet: ComputedSheet) -> Samples:
    """The samples as a parser of OpenMetrics sees them."""
    body = b"".join(render.write(sheet.families, openmetrics=True, process=False)).decode()
    body = body if body.endswith("# EOF\n") else f"{body}# EOF\n"
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def labels(**values: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"team": "a", **values}.items()))


def test_a_statement_that_computes_nothing_is_laid_out_as_ever() -> None:
    assert not isinstance(computed.layout(planned("queries.statements"), {}, ()), Computed)


def test_a_database_has_a_histogram_from_its_first_read_on() -> None:
    layout = laid_out("queries.statement_latency")
    first = samples(read(layout, entry("1", "app", 5.0, 500.0)))
    name = "pg_statement_executor_seconds"
    assert first[f"{name}_count", labels(datname="app")] == 0
    assert first[f"{name}_bucket", labels(datname="idle", le="+Inf")] == 0
    second = samples(read(layout, entry("1", "app", 5.0, 500.0, 20.0)))
    assert second[f"{name}_count", labels(datname="app")] == 1
    assert second[f"{name}_sum", labels(datname="app")] == pytest.approx(0.02)
    buckets = {
        dict(key)["le"]: value
        for (metric, key), value in second.items()
        if metric == f"{name}_bucket" and ("datname", "app") in key
    }
    assert buckets["0.01"] == 0
    assert buckets["0.025"] == buckets["0.1"] == buckets["1.0"] == buckets["+Inf"] == 1
    for bound in ("lower", "upper"):
        key = f"pg_statement_executor_{bound}_seconds_bucket", labels(datname="app", le="0.025")
        assert second[key] == 1


def test_a_limit_of_the_operators_own_is_an_edge() -> None:
    layout = laid_out("queries.statement_latency", [0.08, 0.1])
    found = samples(read(layout, entry("1", "app", 5.0)))
    limits = [
        dict(key)["le"]
        for metric, key in found
        if metric == "pg_statement_executor_seconds_bucket" and ("datname", "app") in key
    ]
    assert limits == sorted(limits, key=lambda le: float(le))
    assert limits.count("0.08") == limits.count("0.1") == 1


def test_transaction_control_is_left_out_once_a_session_has_shown_it() -> None:
    layout = laid_out("queries.statement_latency")
    read(layout)
    read(layout, entry("7", "app", 0.001), entry("8", "app", 5.0))
    found = samples(
        read(layout, entry("7", "app", *[0.001] * 9), entry("8", "app", 5.0, 6.0), control="{7,9}")
    )
    assert found["pg_statement_executor_seconds_count", labels(datname="app")] == 3


def test_databases_without_room_of_their_own_are_one() -> None:
    layout = laid_out("queries.statement_latency", max_series=300)
    everything = [entry(str(n), f"db{n}", 5.0) for n in range(20)]
    read(layout, *everything)
    found = samples(read(layout, *(entry(str(n), f"db{n}", 5.0, 6.0) for n in range(20))))
    counts = {
        dict(key)["datname"]: value
        for (metric, key), value in found.items()
        if metric == "pg_statement_executor_seconds_count"
    }
    assert "other" in counts
    assert len(found) <= 300
    assert sum(counts.values()) == 20


def test_a_database_that_is_gone_leaves_nothing() -> None:
    layout = laid_out("queries.statement_latency")
    read(layout, entry("1", "app", 5.0))
    found = samples(read(layout))
    assert {dict(key)["datname"] for _, key in found} == {"idle"}


@pytest.mark.parametrize("value", ["many", ""])
def test_an_entry_that_is_no_numbers_fails_the_query_alone(value: str) -> None:
    layout = laid_out("queries.statement_latency")
    odd = list(entry("1", "app", 5.0))
    odd[3] = value or "x"
    with pytest.raises(QueryFailed):
        read(layout, tuple(odd))  # type: ignore[arg-type]


def test_a_result_without_a_column_fails_the_query_with_its_name() -> None:
    sheet = laid_out("queries.running_statements").sheet()
    with pytest.raises(QueryFailed, match="wrong_columns"):
        sheet.add(rows(Column("key", TEXT, [b"1"]), Column("datname", TEXT, [b"app"])))


def running(layout: Computed, **ages: float | None) -> Samples:
    """One look that finds statements of these ages in the database app; None for no statement."""
    sheet = layout.sheet()
    keys = [None if age is None else key.encode() for key, age in ages.items()]
    values = [None if age is None else repr(age).encode() for age in ages.values()]
    sheet.add(
        rows(
            Column("key", TEXT, keys),
            Column("datname", TEXT, [b"app"] * len(ages)),
            Column("age", FLOAT8, values),
        )
    )
    sheet.finish()
    return samples(sheet)


def test_a_statement_is_counted_once_at_each_limit_and_shown_while_it_runs() -> None:
    layout = laid_out("queries.running_statements")
    now, seen = "pg_stat_activity_running_statements", "pg_stat_activity_long_statements_total"
    at = labels(datname="app", over="1.0")
    beyond = labels(datname="app", over="10.0")

    found = running(layout, a=0.2, b=2.0)
    assert (found[now, at], found[seen, at], found[seen, beyond]) == (1, 1, 0)
    found = running(layout, a=5.2, b=7.0)
    assert (found[now, at], found[seen, at], found[seen, beyond]) == (2, 2, 0)
    found = running(layout, b=12.0)
    assert (found[now, at], found[seen, at], found[seen, beyond]) == (1, 2, 1)
    found = running(layout, none=None)
    assert (found[now, at], found[seen, at], found[seen, beyond]) == (0, 2, 1)


def test_a_look_that_breaks_off_counts_nothing_twice() -> None:
    layout = laid_out("queries.running_statements")
    sheet = layout.sheet()
    sheet.add(
        rows(
            Column("key", TEXT, [b"a"]),
            Column("datname", TEXT, [b"app"]),
            Column("age", INT8, [b"2"]),
        )
    )  # and no end
    found = running(layout, a=3.0)
    seen = "pg_stat_activity_long_statements_total"
    assert found[seen, labels(datname="app", over="1.0")] == 1


def test_reads_that_did_not_come_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    layout = laid_out("queries.statement_latency")
    found = {}
    for passed in (0.0, 14.0, 15.0, 46.0):
        clock[0] += passed
        found = samples(read(layout))
    name = "pg_statement_executor_missed_reads_total"
    assert found[name, labels(datname="idle")] == 2


EDGES = "{{0.000 - 1.000}, (1.000 - 80.000}, (80.000 - 120.000}, (120.000 - ...}}"


def read_buckets(
    layout: Computed, *buckets: tuple[str, float, str, float], edges: str = EDGES
) -> Samples:
    """One run on pg_stat_monitor: database, when the bucket began, its counts and milliseconds."""
    lines = [*buckets, ("idle", None, None, None)]
    columns = [
        [None if v is None else str(v).encode() for v in c] for c in zip(*lines, strict=True)
    ]
    columns += [[edges.encode()] * len(lines)]
    names = ("datname", "bucket", "counts", "total", "edges")
    sheet = layout.sheet()
    assert isinstance(sheet, ComputedSheet)
    sheet.add(rows(*(Column(n, TEXT, c) for n, c in zip(names, columns, strict=True))))
    sheet.finish()
    return samples(sheet)


def test_estimates_are_told_in_whole_calls() -> None:
    layout = laid_out("queries.statement_latency")
    assert isinstance(layout, computed.ExecutorTime)
    read(layout)
    read(layout)
    sheet = read(layout, entry("7", "app", *[1.0, 2.0, 3.0, 40.0, 200.0, 300.0, 2.5]))
    estimated = layout.statements.histograms["app"].buckets
    assert any(not count.is_integer() for count in estimated)
    samples(sheet)  # the parser takes no others


def test_buckets_that_are_over_are_counted_once_and_those_before_the_first_read_never() -> None:
    layout = laid_out("queries.statement_latency")
    name = "pg_statement_executor_seconds_count"
    old = ("app", 60.0, "{9,9,9,9}", 5000.0)
    new = ("app", 120.0, "{1,2,4,3}", 1000.0)
    assert read_buckets(layout, old)[name, labels(datname="app")] == 0
    for _ in range(2):
        found = read_buckets(layout, old, new)
        assert found[name, labels(datname="app")] == 10
        assert found["pg_statement_executor_seconds_sum", labels(datname="app")] == 1.0
    bucket, app = "pg_statement_executor_seconds_bucket", {"datname": "app"}
    exact = {"0.001": 1, "0.08": 3, "0.12": 7, "+Inf": 10}
    assert {le: found[bucket, labels(le=le, **app)] for le in exact} == exact
    # Between two edges the share is a guess, and its bounds are the edges'.
    at = labels(le="0.1", **app)
    assert found[bucket, at] == 3 + 4 * 20 // 40
    assert found["pg_statement_executor_lower_seconds_bucket", at] == 3
    assert found["pg_statement_executor_upper_seconds_bucket", at] == 7


def test_a_read_of_buckets_that_breaks_off_counts_nothing_twice() -> None:
    layout = laid_out("queries.statement_latency")
    read_buckets(layout, ("app", 60.0, "{9,9,9,9}", 5000.0))
    new = ("app", 120.0, "{1,2,4,3}", 1000.0)
    with pytest.raises(QueryFailed):
        read_buckets(layout, new, ("shop", 120.0, "{1,x}", 1.0))
    found = read_buckets(layout, new)
    assert found["pg_statement_executor_seconds_count", labels(datname="app")] == 10


def test_a_bucket_that_is_no_numbers_or_has_too_many_places_fails_the_query_alone() -> None:
    layout = laid_out("queries.statement_latency")
    with pytest.raises(QueryFailed, match="not made of numbers"):
        read_buckets(layout, ("app", 60.0, "{1,x}", 1.0))
    with pytest.raises(QueryFailed, match="more places than there are edges"):
        read_buckets(layout, ("app", 60.0, "{1,1,1,1,1}", 1.0))
