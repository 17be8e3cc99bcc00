"""Of many rows some stand on their own, and the rest add up without ever lying about a rate."""

from collections.abc import Mapping
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import ranking, render
from pgvigil.catalogue import Top
from pgvigil.errors import QueryFailed
from pgvigil.plan import Statement
from pgvigil.ranking import RankedSheet, Ranking
from pgvigil.render import Layout

from lab.results import INT8, TEXT, Column, rows, statement

TOP = Top(rows=2, by=("size", "reads_total"), hold=3600.0, within=())


def tables(**changes: object) -> Statement:
    """A statement over tables of which at most five rows stand on the page, other included."""
    given: dict[str, object] = {"labels": ["nsp", "rel"], "max_series": 10, "top": TOP}
    return statement("size", "reads_total", size="sum", **(given | changes))  # type: ignore[arg-type]


def run(layout: Ranking, found: Mapping[str, tuple[int, int]]) -> RankedSheet:
    """One run that finds these tables with these sizes and reads."""
    sheet = layout.sheet()
    values = list(found.values())
    sheet.add(
        rows(
            Column("nsp", TEXT, [b"public"] * len(found)),
            Column("rel", TEXT, [name.encode() for name in found]),
            Column("size", INT8, [str(size).encode() for size, _ in values]),
            Column("reads_total", INT8, [str(reads).encode() for _, reads in values]),
        )
    )
    sheet.finish()
    return sheet


def samples(sheet: RankedSheet, name: str) -> dict[str, float]:
    """The values of a metric by the label rel."""
    text = b"".join(c for f in sheet.families for c in f.write(openmetrics=False)).decode()
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return {line.split('rel="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def ranked(of: Statement) -> Ranking:
    layout = ranking.layout(of, {})
    assert isinstance(layout, Ranking)
    return layout


MANY = {f"t{i}": (i, 100) for i in range(10)}


def test_a_statement_without_top_has_no_ranking() -> None:
    assert type(ranking.layout(statement("pg_a"), {})) is Layout


def test_as_long_as_all_rows_have_room_all_stand_on_their_own() -> None:
    sheet = run(ranked(tables()), {"a": (1, 2), "b": (3, 0)})
    assert samples(sheet, "size") == {"a": 1, "b": 3}
    assert samples(sheet, "reads_total") == {"a": 2, "b": 0}
    assert sheet.series == 4


def test_each_order_brings_in_its_first_and_the_rest_is_one_row() -> None:
    found = {**MANY, "t0": (0, 500)}
    sheet = run(ranked(tables()), found)
    sizes = samples(sheet, "size")
    assert sizes == {"t9": 9, "t8": 8, "t0": 0, "t1": 1, "other": 2 + 3 + 4 + 5 + 6 + 7}
    assert sum(samples(sheet, "reads_total").values()) == sum(reads for _, reads in found.values())


@given(
    st.lists(
        st.dictionaries(st.sampled_from(sorted(MANY)), st.integers(0, 1000), max_size=4),
        min_size=2,
        max_size=8,
    ),
    st.sampled_from([0.0, 2.0, 1e6]),
)
def test_what_all_series_gain_is_what_all_rows_have_gained(
    rounds: list[dict[str, int]], hold: float
) -> None:
    """As Prometheus counts: from one sample of a series to its next, and never below zero."""
    layout = ranked(tables(top=Top(2, ("reads_total", "size"), hold, ())))
    now = {name: list(value) for name, value in MANY.items()}
    before = samples(run(layout, MANY), "reads_total")
    for moment, gains in enumerate(rounds):
        for name, gain in gains.items():
            now[name][1] += gain
        with patch("pgvigil.ranking.time.monotonic", return_value=1e6 + moment):
            sheet = run(layout, {name: (size, reads) for name, (size, reads) in now.items()})
        after = samples(sheet, "reads_total")
        increase = sum(after[name] - before[name] for name in after.keys() & before.keys())
        assert increase == sum(gains.values())
        assert after["other"] >= before["other"]
        before = after


@given(
    st.lists(
        st.dictionaries(st.sampled_from(sorted(MANY)), st.integers(-300, 1000), max_size=4),
        min_size=2,
        max_size=8,
    ),
    st.booleans(),
)
def test_where_counters_may_fall_only_what_they_gain_counts(
    rounds: list[dict[str, int]], few: bool
) -> None:
    top = Top(2, ("reads_total", "size"), 2.0, (), gains=True)
    layout = ranked(tables(top=top, max_series=100 if few else 10))
    now = {name: [size, 1000] for name, (size, _) in MANY.items()}

    def found() -> dict[str, tuple[int, int]]:
        return {name: (size, reads) for name, (size, reads) in now.items()}

    before = samples(run(layout, found()), "reads_total")
    assert set(before.values()) == {0}, "what was before the exporter started is history"
    for moment, gains in enumerate(rounds):
        for name, gain in gains.items():
            now[name][1] = max(0, now[name][1] + gain)
        with patch("pgvigil.ranking.time.monotonic", return_value=1e6 + moment):
            after = samples(run(layout, found()), "reads_total")
        increase = sum(after[name] - before[name] for name in after.keys() & before.keys())
        assert increase == sum(gain for gain in gains.values() if gain > 0)
        before = after


def test_a_row_that_came_in_stays_for_its_hold_and_then_leaves() -> None:
    layout = ranked(tables(top=Top(1, ("reads_total",), 3600.0, ())))
    with patch("pgvigil.ranking.time.monotonic") as clock:
        clock.return_value = 1.0
        run(layout, MANY)
        clock.return_value = 100.0
        busy = {**MANY, "t5": (5, 200)}
        assert "t5" in samples(run(layout, busy), "size")
        clock.return_value = 3600.0
        assert "t5" in samples(run(layout, busy), "size")
        clock.return_value = 3701.0
        gone = samples(run(layout, busy), "size")
        assert "t5" not in gone
        assert sum(gone.values()) == sum(size for size, _ in busy.values())


def test_when_more_rows_came_in_than_there_is_room_the_last_ones_stay() -> None:
    layout = ranked(tables(top=Top(2, ("reads_total",), 3600.0, ())))
    now = {name: list(value) for name, value in MANY.items()}
    run(layout, MANY)
    for moment, pair in enumerate((("t1", "t2"), ("t3", "t4"), ("t5", "t6"))):
        for name in pair:
            now[name][1] += 10
        with patch("pgvigil.ranking.time.monotonic", return_value=1e6 + moment):
            sheet = run(layout, {name: (size, reads) for name, (size, reads) in now.items()})
    names = set(samples(sheet, "size"))
    assert {"t3", "t4", "t5", "t6", "other"} == names


def test_a_counter_that_starts_again_adds_what_it_has_counted_since() -> None:
    layout = ranked(tables(top=Top(2, ("size",), 3600.0, ())))
    before = samples(run(layout, MANY), "reads_total")["other"]
    after = samples(run(layout, {**MANY, "t0": (0, 30)}), "reads_total")["other"]
    assert after == before + 30


def test_a_row_that_is_new_has_gained_all_it_has() -> None:
    layout = ranked(tables(top=Top(2, ("size",), 3600.0, ())))
    before = samples(run(layout, MANY), "reads_total")["other"]
    after = samples(run(layout, {**MANY, "new": (0, 7)}), "reads_total")["other"]
    assert after == before + 7


def test_rows_that_vanish_take_nothing_from_other() -> None:
    layout = ranked(tables(top=Top(2, ("size",), 3600.0, ())))
    before = samples(run(layout, MANY), "reads_total")["other"]
    fewer = {name: value for name, value in MANY.items() if name not in ("t0", "t1")}
    assert samples(run(layout, fewer), "reads_total")["other"] == before


def test_labels_within_keep_a_row_other_each() -> None:
    layout = ranked(tables(top=Top(1, ("size",), 3600.0, ("nsp",)), max_series=8))
    sheet = layout.sheet()
    sheet.add(
        rows(
            Column("nsp", TEXT, [b"a", b"a", b"a", b"b", b"b"]),
            Column("rel", TEXT, [b"r1", b"r2", b"r3", b"r4", b"r5"]),
            Column("size", INT8, [b"1", b"2", b"9", b"4", b"5"]),
            Column("reads_total", INT8, [b"1", b"1", b"1", b"1", b"1"]),
        )
    )
    sheet.finish()
    text = b"".join(c for f in sheet.families for c in f.write(openmetrics=False)).decode()
    lines = [line for line in text.splitlines() if line.startswith("size{")]
    assert lines == [
        'size{nsp="a",rel="r3"} 9',
        'size{nsp="a",rel="other"} 3',
        'size{nsp="b",rel="other"} 9',
    ]


def test_an_order_may_be_by_a_column_that_is_no_metric() -> None:
    layout = ranked(tables(top=Top(1, ("weight",), 3600.0, ()), max_series=4))
    sheet = layout.sheet()
    sheet.add(
        rows(
            Column("nsp", TEXT, [b"a"] * 4),
            Column("rel", TEXT, [b"r1", b"r2", b"r3", b"r4"]),
            Column("weight", INT8, [b"1", b"8", b"3", b"2"]),
            Column("size", INT8, [b"1", b"1", b"1", b"1"]),
            Column("reads_total", INT8, [None, b"1", b"1", b"1"]),
        )
    )
    sheet.finish()
    assert samples(sheet, "size") == {"r2": 1, "other": 3}


def test_a_missing_order_is_a_fault_of_the_query() -> None:
    layout = ranked(tables(top=Top(1, ("weight",), 3600.0, ())))
    with pytest.raises(QueryFailed, match="weight"):
        run(layout, MANY)


def test_gauges_say_what_they_are_on_other_and_are_absent_else() -> None:
    of = statement(
        *("most", "least", "silent"),
        labels=["rel"],
        max_series=6,
        top=Top(1, ("silent",), 3600.0, ()),
        most="max",
        least="min",
    )
    sheet = ranked(of).sheet()
    columns = [Column(n, INT8, [b"9", b"1", None, b"5"]) for n in ("most", "least")]
    names = Column("rel", TEXT, [b"a", b"b", b"c", b"d"])
    sheet.add(rows(names, *columns, Column("silent", INT8, [b"9", b"1", b"1", b"1"])))
    sheet.finish()
    assert samples(sheet, "most") == {"a": 9, "other": 5}
    assert samples(sheet, "least") == {"a": 9, "other": 1}
    assert samples(sheet, "silent") == {"a": 9}


def test_a_row_that_comes_twice_counts_once() -> None:
    sheet = ranked(tables()).sheet()
    sheet.add(
        rows(
            Column("nsp", TEXT, [b"a", b"a"]),
            Column("rel", TEXT, [b"r", b"r"]),
            Column("size", INT8, [b"1", b"2"]),
            Column("reads_total", INT8, [b"1", b"2"]),
        )
    )
    sheet.finish()
    assert samples(sheet, "size") == {"r": 1}
    assert sheet.dropped == {"duplicate": 2}


def test_series_are_counted_as_they_are_written() -> None:
    sheet = run(ranked(tables()), MANY)
    page = b"".join(render.write(sheet.families, openmetrics=False, process=False))
    assert sheet.series == sum(not line.startswith(b"#") for line in page.splitlines())
