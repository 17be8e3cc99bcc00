"""Rows and states become text that Prometheus reads, whatever the rows hold."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import __version__, about, render
from pgvigil.catalogue import Query
from pgvigil.collect import Collector, Scrape
from pgvigil.errors import Down, QueryFailed
from pgvigil.fleet import Fleet
from pgvigil.lane import Tally
from pgvigil.plan import Facts, Loss, Plan, Reason, Refusal, Statement
from pgvigil.render import Family, Layout, Sheet, headers
from pgvigil.target import Target
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families as text_families

from lab.results import BOOL, FLOAT8, INT8, NUMERIC, TEXT, Column, rows, statement


def written(families: Iterable[Family], *, openmetrics: bool = False) -> str:
    return b"".join(c for f in families for c in f.write(openmetrics=openmetrics)).decode()


def text_of(sheet: Sheet) -> str:
    return written(sheet.families)


def test_rows_become_families_one_after_the_other() -> None:
    sheet = Layout(statement("pg_size_bytes", "pg_reads_total", labels=["datname"]), {}).sheet()
    sheet.add(
        rows(
            Column("pg_reads_total", INT8, [b"1", b"9223372036854775807"]),
            Column("datname", TEXT, [b"app", b"postgres"]),
            Column("pg_size_bytes", NUMERIC, [b"0.5", b"-3"]),
        )
    )
    assert text_of(sheet) == (
        "# HELP pg_size_bytes What it is.\n"
        "# TYPE pg_size_bytes gauge\n"
        'pg_size_bytes{datname="app"} 0.5\n'
        'pg_size_bytes{datname="postgres"} -3\n'
        "# HELP pg_reads_total What it is.\n"
        "# TYPE pg_reads_total counter\n"
        'pg_reads_total{datname="app"} 1\n'
        'pg_reads_total{datname="postgres"} 9223372036854775807\n'
    )
    assert (sheet.rows, sheet.dropped) == (2, Counter())


def test_a_label_is_cut_where_it_grows_too_long_and_never_within_a_character() -> None:
    sheet = Layout(statement("pg_a", labels=["x"]), {}).sheet()
    value = b"y" * 1023 + "\N{EURO SIGN}".encode() + b"z" * 2000
    sheet.add(rows(Column("x", TEXT, [value, b"short"]), Column("pg_a", INT8, [b"1", b"2"])))
    (first, second) = [line for line in text_of(sheet).splitlines() if line[0] != "#"]
    assert first == 'pg_a{x="' + "y" * 1023 + '"} 1'
    assert second == 'pg_a{x="short"} 2'


def test_openmetrics_names_a_counters_family_without_total() -> None:
    sheet = Layout(statement("pg_reads_total", "pg_size_bytes"), {}).sheet()
    sheet.add(rows(Column("pg_reads_total", INT8, [b"1"]), Column("pg_size_bytes", INT8, [b"2"])))
    assert written(sheet.families, openmetrics=True) == (
        "# HELP pg_reads What it is.\n"
        "# TYPE pg_reads counter\n"
        "pg_reads_total 1\n"
        "# HELP pg_size_bytes What it is.\n"
        "# TYPE pg_size_bytes gauge\n"
        "pg_size_bytes 2\n"
    )


def test_help_is_escaped_as_each_format_wants_it() -> None:
    family = Family(headers("pg_a", "gauge", 'Say "a\\b"\nand c.'), [b"\npg_a 1"])
    end = "\n# TYPE pg_a gauge\npg_a 1\n"
    assert written([family]) == '# HELP pg_a Say "a\\\\b"\\nand c.' + end
    assert written([family], openmetrics=True) == '# HELP pg_a Say \\"a\\\\b\\"\\nand c.' + end


def test_a_family_without_samples_is_not_written() -> None:
    sheet = Layout(statement("pg_a", "pg_b"), {}).sheet()
    sheet.add(rows(Column("pg_a", INT8, [None]), Column("pg_b", INT8, [b"1"])))
    assert text_of(sheet) == "# HELP pg_b What it is.\n# TYPE pg_b gauge\npg_b 1\n"


def test_a_result_without_rows_gives_nothing() -> None:
    sheet = Layout(statement("pg_a"), {}).sheet()
    sheet.add(rows(Column("pg_a", INT8, [])))
    assert (text_of(sheet), sheet.rows, sheet.dropped) == ("", 0, Counter())


def test_labels_are_escaped_and_null_is_empty() -> None:
    sheet = Layout(statement("pg_a", labels=["x"]), {}).sheet()
    values = [b'a"b', b"a\\b", b"a\nb", b"a%sb", "ä漢".encode(), b"a\xffb", None, b"{},= #"]
    sheet.add(rows(Column("x", TEXT, values), Column("pg_a", INT8, [b"1"] * len(values))))
    assert text_of(sheet).splitlines()[2:] == [
        r'pg_a{x="a\"b"} 1',
        r'pg_a{x="a\\b"} 1',
        r'pg_a{x="a\nb"} 1',
        'pg_a{x="a%sb"} 1',
        'pg_a{x="ä漢"} 1',
        'pg_a{x="a\ufffdb"} 1',
        'pg_a{x=""} 1',
        'pg_a{x="{},= #"} 1',
    ]


def test_constant_labels_stand_first_and_give_way_to_columns() -> None:
    constant = {"team": 'a "b" %s\n', "datname": "constant"}
    sheet = Layout(statement("pg_a", labels=["datname"]), constant).sheet()
    sheet.add(rows(Column("datname", TEXT, [b"app"]), Column("pg_a", INT8, [b"1"])))
    assert text_of(sheet).splitlines()[2:] == [r'pg_a{team="a \"b\" %s\n",datname="app"} 1']
    sheet = Layout(statement("pg_a"), constant).sheet()
    sheet.add(rows(Column("pg_a", INT8, [b"1"])))
    lines = text_of(sheet).splitlines()[2:]
    assert lines == [r'pg_a{team="a \"b\" %s\n",datname="constant"} 1']


@pytest.mark.parametrize(
    ("oid", "value", "spelled"),
    [
        (BOOL, b"t", "1"),
        (BOOL, b"f", "0"),
        (INT8, b"-9223372036854775808", "-9223372036854775808"),
        (FLOAT8, b"1e-300", "1e-300"),
        (FLOAT8, b"NaN", "NaN"),
        (FLOAT8, b"Infinity", "+Inf"),
        (NUMERIC, b"-Infinity", "-Inf"),
        (NUMERIC, b"1234567890123456789012345678901234567890", "1234567890" * 4),
        (NUMERIC, b"1" + b"0" * 300, "1e+300"),
        (NUMERIC, b"1" + b"0" * 400, "+Inf"),
        (NUMERIC, b"-1" + b"0" * 400, "-Inf"),
        (TEXT, b"42", "42"),
        (TEXT, b" 4.20 ", "4.2"),
        (TEXT, b"inf", "+Inf"),
        (TEXT, b"nan", "NaN"),
    ],
)
def test_a_value_is_spelled_as_prometheus_spells_it(oid: int, value: bytes, spelled: str) -> None:
    sheet = Layout(statement("pg_a"), {}).sheet()
    sheet.add(rows(Column("pg_a", oid, [value])))
    (line,) = text_of(sheet).splitlines()[2:]
    assert line == f"pg_a {spelled}"


@pytest.mark.parametrize("value", [b"16 kB", b"", b"0/16B3748", b"on", b"\xff"])
def test_a_value_that_is_no_number_is_left_out_and_counted(value: bytes) -> None:
    sheet = Layout(statement("pg_a", labels=["x"]), {}).sheet()
    sheet.add(rows(Column("x", TEXT, [b"1", b"2"]), Column("pg_a", TEXT, [value, b"7"])))
    assert text_of(sheet).splitlines()[2:] == ['pg_a{x="2"} 7']
    assert sheet.dropped == {"not_a_number": 1}


@pytest.mark.parametrize("value", [b"-1", b"NaN", b"-Infinity"])
def test_a_counter_that_cannot_be_one_is_left_out_and_counted(value: bytes) -> None:
    sheet = Layout(statement("pg_a_total", "pg_a", labels=["x"]), {}).sheet()
    values = [value, b"1e-05", None, b"-0"]
    sheet.add(
        rows(
            Column("x", TEXT, [b"1", b"2", b"3", b"4"]),
            Column("pg_a_total", FLOAT8, values),
            Column("pg_a", FLOAT8, values),
        )
    )
    gauge = value.replace(b"Infinity", b"Inf").decode()
    assert [line for line in text_of(sheet).splitlines() if line[0] != "#"] == [
        'pg_a_total{x="2"} 1e-05',
        'pg_a_total{x="4"} -0',
        f'pg_a{{x="1"}} {gauge}',
        'pg_a{x="2"} 1e-05',
        'pg_a{x="4"} -0',
    ]
    assert sheet.dropped == {"not_a_count": 1}


def test_of_duplicates_the_first_stays_and_the_others_are_counted() -> None:
    sheet = Layout(statement("pg_a", "pg_b", labels=["x"]), {}).sheet()
    for values in ([b"1", b"2", b"3"], [b"4"]):
        labels = [b"same", b"same", b"other"][: len(values)]
        sheet.add(
            rows(
                Column("x", TEXT, labels),
                Column("pg_a", INT8, values),
                Column("pg_b", INT8, values),
            )
        )
    assert [line for line in text_of(sheet).splitlines() if line[0] != "#"] == [
        'pg_a{x="same"} 1',
        'pg_a{x="other"} 3',
        'pg_b{x="same"} 1',
        'pg_b{x="other"} 3',
    ]
    assert sheet.dropped == {"duplicate": 4}


def test_a_second_row_without_labels_is_a_duplicate() -> None:
    sheet = Layout(statement("pg_a"), {}).sheet()
    sheet.add(rows(Column("pg_a", INT8, [b"1", b"2"])))
    assert text_of(sheet).splitlines()[2:] == ["pg_a 1"]
    assert sheet.dropped == {"duplicate": 1}


def test_rows_above_max_series_are_left_out_and_counted() -> None:
    sheet = Layout(statement("pg_a", "pg_b", labels=["x"], max_series=5), {}).sheet()
    for names in ([b"1"], [b"2", b"3"], [b"4"]):
        values = [b"7"] * len(names)
        sheet.add(
            rows(
                Column("x", TEXT, names), Column("pg_a", INT8, values), Column("pg_b", INT8, values)
            )
        )
    assert [line for line in text_of(sheet).splitlines() if line[0] != "#"] == [
        'pg_a{x="1"} 7',
        'pg_a{x="2"} 7',
        'pg_b{x="1"} 7',
        'pg_b{x="2"} 7',
    ]
    assert (sheet.rows, sheet.dropped) == (2, {"max_series": 4})


def test_a_declared_column_that_is_missing_fails_the_query_with_both_lists() -> None:
    sheet = Layout(statement("pg_a", "pg_b", labels=["x"]), {}).sheet()
    with pytest.raises(QueryFailed) as failed:
        sheet.add(rows(Column("pg_a", INT8, [b"1"]), Column("other", INT8, [b"1"])))
    assert str(failed.value) == (
        "wrong_columns: declared but not in the result: x, pg_b; it has pg_a, other"
    )


def test_columns_that_change_their_type_or_place_between_runs_are_found_anew() -> None:
    layout = Layout(statement("pg_a", labels=["x"]), {})
    label = Column("x", TEXT, [b"7"])
    for value, text in (
        (Column("pg_a", INT8, [b"1"]), "1"),
        (Column("pg_a", TEXT, [b"1.50"]), "1.5"),
        (Column("pg_a", BOOL, [b"t"]), "1"),
    ):
        for columns in ((label, value), (value, label)):
            sheet = layout.sheet()
            sheet.add(rows(*columns))
            assert text_of(sheet).splitlines()[2:] == [f'pg_a{{x="7"}} {text}']


LABEL = (
    st.none()
    | st.binary(max_size=6)
    | st.text('"\\\n\r{}=, #aä%\u2028', max_size=4).map(str.encode)
)
INTEGER = st.integers(-(2**63), 2**63 - 1).map(lambda number: b"%d" % number)
FLOATING = st.floats().map(
    lambda number: {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(
        str(number), repr(number)
    ).encode()
)
DECIMAL = st.decimals(allow_nan=False, allow_infinity=False, places=5).map(
    lambda number: f"{number:f}".encode()
) | (st.integers(10**39, 10**40) | st.integers(10**299, 10**400)).map(lambda number: b"%d" % number)
SPELLINGS = {
    BOOL: st.sampled_from([b"t", b"f"]),
    INT8: INTEGER,
    FLOAT8: FLOATING,
    NUMERIC: DECIMAL | st.sampled_from([b"NaN", b"Infinity", b"-Infinity"]),
    TEXT: INTEGER | FLOATING | st.binary(max_size=5) | st.sampled_from([b"16 kB", b"", b"t"]),
}


class Row(NamedTuple):
    """One row of a result: two labels and two values."""

    x: bytes | None
    y: bytes | None
    gauge: bytes | None
    counter: bytes | None


@st.composite
def results(draw: st.DrawFn) -> tuple[int, int, list[list[Row]]]:
    """The types of two value columns, and the rows of each part of a result."""
    gauge, count = draw(st.sampled_from(list(SPELLINGS))), draw(st.sampled_from(list(SPELLINGS)))
    row = st.builds(Row, LABEL, LABEL, st.none() | SPELLINGS[gauge], st.none() | SPELLINGS[count])
    return gauge, count, draw(st.lists(st.lists(row, max_size=8), max_size=3))


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def number(value: bytes | None, oid: int) -> float | None:
    """The number a value stands for; None for NULL; raises ValueError for what is none."""
    if value is None:
        return None
    return float(value == b"t") if oid == BOOL else float(value)


def expected(parts: list[list[Row]], gauge: int, count: int) -> tuple[Samples, Counter[str]]:
    """The samples that some rows hold, and what is left out of them: the rules written anew."""
    samples: Samples = {}
    dropped: Counter[str] = Counter()
    seen = set()
    every = [row for part in parts for row in part]
    dropped["max_series"] = 2 * len(every[5:])
    for row in every[:5]:
        x, y = ((label or b"").decode(errors="replace") for label in (row.x, row.y))
        if (x, y) in seen:
            dropped["duplicate"] += 2
            continue
        seen.add((x, y))
        labels = (("c", "1"), ("x", x), ("y", y))
        for name, value, oid in (("pg_g", row.gauge, gauge), ("pg_c_total", row.counter, count)):
            try:
                of = number(value, oid)
            except ValueError:
                dropped["not_a_number"] += 1
                continue
            if of is not None and name == "pg_c_total" and not of >= 0:
                dropped["not_a_count"] += 1
            elif of is not None:
                samples[name, labels] = of
    return samples, +dropped


def parsed(page: str, *, openmetrics: bool) -> list[Any]:
    """The families that prometheus_client's own parsers find in a page."""
    parse: Any = openmetrics_families if openmetrics else text_families
    return list(parse(page))


def samples_in(page: str, names: Sequence[str], *, openmetrics: bool) -> Samples:
    found: Samples = {}
    for family in parsed(page, openmetrics=openmetrics):
        for sample in family.samples:
            if sample.name in names:
                key = sample.name, tuple(sorted(sample.labels.items()))
                assert key not in found
                found[key] = float(sample.value)
    return found


def same(found: Samples, wanted: Samples) -> bool:
    return found.keys() == wanted.keys() and all(
        found[key] == value or (math.isnan(found[key]) and math.isnan(value))
        for key, value in wanted.items()
    )


@given(results())
def test_whatever_rows_hold_the_page_parses_and_holds_the_same(
    given_rows: tuple[int, int, list[list[Row]]],
) -> None:
    gauge, count, parts = given_rows
    layout = Layout(statement("pg_g", "pg_c_total", labels=["x", "y"], max_series=10), {"c": "1"})
    sheet = layout.sheet()
    for part in parts:
        sheet.add(
            rows(
                Column("x", TEXT, [row.x for row in part]),
                Column("y", TEXT, [row.y for row in part]),
                Column("pg_g", gauge, [row.gauge for row in part]),
                Column("pg_c_total", count, [row.counter for row in part]),
            )
        )
    samples, dropped = expected(parts, gauge, count)
    names = ("pg_g", "pg_c_total")
    for openmetrics in (False, True):
        page = b"".join(render.write(sheet.families, openmetrics=openmetrics)).decode()
        assert same(samples_in(page, names, openmetrics=openmetrics), samples)
    assert sheet.dropped == dropped


def collector_of(
    labels: Mapping[str, str] | None = None, name: str = "main", queries: Sequence[Query] = ()
) -> Collector:
    return Collector(Target(name, {"host": "db1"}, labels=labels or {}), queries, Layout)


DOWN_PAGE = """\
# HELP pg_up Whether the server answered in this scrape.
# TYPE pg_up gauge
pg_up{team="a"} 0
# HELP pg_down_reason Why the server did not answer: 1 for the reason that holds, 0 for the others.
# TYPE pg_down_reason gauge
pg_down_reason{team="a",reason="host_unknown"} 0
pg_down_reason{team="a",reason="connection_refused"} 1
pg_down_reason{team="a",reason="host_unreachable"} 0
pg_down_reason{team="a",reason="timeout"} 0
pg_down_reason{team="a",reason="tls"} 0
pg_down_reason{team="a",reason="password_file"} 0
pg_down_reason{team="a",reason="password_command"} 0
pg_down_reason{team="a",reason="invalid_password"} 0
pg_down_reason{team="a",reason="invalid_authorization_specification"} 0
pg_down_reason{team="a",reason="invalid_catalog_name"} 0
pg_down_reason{team="a",reason="insufficient_privilege"} 0
pg_down_reason{team="a",reason="too_many_connections"} 0
pg_down_reason{team="a",reason="cannot_connect_now"} 0
pg_down_reason{team="a",reason="admin_shutdown"} 0
pg_down_reason{team="a",reason="connection_lost"} 0
pg_down_reason{team="a",reason="wrong_kind"} 0
pg_down_reason{team="a",reason="other"} 0
# HELP pgvigil_scrape_duration_seconds How long the last scrape of the target took, \
connecting included.
# TYPE pgvigil_scrape_duration_seconds gauge
pgvigil_scrape_duration_seconds{team="a"} 0.25
# HELP pgvigil_scrapes_total Scrapes of the target, shared ones counted once.
# TYPE pgvigil_scrapes_total counter
pgvigil_scrapes_total{team="a"} 3
# HELP pgvigil_scrapes_joined_total Requests that were answered by a scrape of the target that ran \
already.
# TYPE pgvigil_scrapes_joined_total counter
pgvigil_scrapes_joined_total{team="a"} 0
# HELP pgvigil_scrape_overruns_total Scrapes that their deadline cut short.
# TYPE pgvigil_scrape_overruns_total counter
pgvigil_scrape_overruns_total{team="a"} 0
# HELP pgvigil_scrapes_abandoned_total Scrapes that hung past their deadline and were given up, \
which is a fault of the exporter.
# TYPE pgvigil_scrapes_abandoned_total counter
pgvigil_scrapes_abandoned_total{team="a"} 0
# HELP pgvigil_background_delays_total Times that work in the background waited up to 30 seconds \
for scrapes, as the exporter could not keep up: it needs more CPU, or fewer targets.
# TYPE pgvigil_background_delays_total counter
pgvigil_background_delays_total{team="a"} 0
# HELP pgvigil_connections Connections to the target that are open now.
# TYPE pgvigil_connections gauge
pgvigil_connections{team="a"} 0
# HELP pgvigil_connects_total Connections to the target that were made.
# TYPE pgvigil_connects_total counter
pgvigil_connects_total{team="a"} 0
# HELP pgvigil_connect_duration_seconds What the last connection cost: name look-up, TLS, \
authentication and all.
# TYPE pgvigil_connect_duration_seconds gauge
pgvigil_connect_duration_seconds{team="a"} 0
# HELP pgvigil_superuser Whether the exporter is connected as a superuser, which it need not be.
# TYPE pgvigil_superuser gauge
pgvigil_superuser{team="a"} 0
# HELP pgvigil_maintenance Whether the target is worked on now, by the windows of the configuration.
# TYPE pgvigil_maintenance gauge
pgvigil_maintenance{team="a"} 0
"""


def test_the_page_of_a_server_that_is_down_says_why() -> None:
    collector = collector_of({"team": "a"})
    collector.scrapes = 3
    scrape = Scrape(down=Down.CONNECTION_REFUSED, detail="refused", seconds=0.25)
    assert written(about.families(collector, scrape)) == DOWN_PAGE


def scraped() -> tuple[Collector, Scrape]:
    """A target whose last scrape went well but for one query, and refused another."""
    good, bad, quiet, before = (
        replace(statement("pg_a", labels=["x"]).query, name=f"area.{name}")
        for name in ("good", "bad", "quiet", "before")
    )
    collector = collector_of({"team": "a"}, queries=(good, bad, quiet, before))
    sheet = Layout(statement("pg_a", labels=["x"]), collector.target.labels).sheet()
    sheet.add(rows(Column("x", TEXT, [b"1"]), Column("pg_a", INT8, [b"7"])))
    refused = statement("pg_b").query
    collector.facts = Facts(160004, in_recovery=False, superuser=True)
    collector.plan = Plan(
        tuple(Statement(query, "select", ()) for query in (good, bad)),
        (Refusal(refused, Reason.VERSION, "nothing for PostgreSQL 16"),),
        (Loss(statement("pg_c").metrics[0], good, Reason.EXTENSION, "it is too old"),),
    )
    missing = QueryFailed("undefined_table", "no such table", "42P01")
    collector.ledger.settle(quiet, "", sheet, missing, 0.1)
    collector.ledger.tallies = {
        # It ran while the server had another role.
        "area.before": Tally(1.0, {"": 1}),
        "area.good": Tally(0.5, {"": 1}, dropped=Counter(duplicate=2)),
        "area.bad": Tally(
            1e-7, failing=frozenset({""}), failures=Counter(lock_not_available=1, other=2)
        ),
    }
    return collector, Scrape(up=True, down=None, sheets={"area.good": sheet})


def test_the_page_of_a_server_that_is_up_tells_of_each_query() -> None:
    lines = written(about.families(*scraped())).splitlines()
    samples = [line for line in lines if not re.match(r"#|pg_down_reason.* 0$", line)]
    assert samples[:12] == [
        'pg_up{team="a"} 1',
        'pg_a{team="a",x="1"} 7',
        'pgvigil_query_success{team="a",query="area.good"} 1',
        'pgvigil_query_success{team="a",query="area.bad"} 0',
        'pgvigil_query_seconds_total{team="a",query="area.good"} 0.5',
        'pgvigil_query_seconds_total{team="a",query="area.bad"} 1e-07',
        'pgvigil_query_rows{team="a",query="area.good"} 1',
        'pgvigil_query_rows{team="a",query="area.bad"} 0',
        'pgvigil_query_series{team="a",query="area.good"} 1',
        'pgvigil_query_failures_total{team="a",query="area.bad",reason="lock_not_available"} 1',
        'pgvigil_query_failures_total{team="a",query="area.bad",reason="other"} 2',
        'pgvigil_query_dropped_samples_total{team="a",query="area.good",reason="duplicate"} 2',
    ]
    assert {
        'pgvigil_query_skipped{team="a",query="area.query",reason="version"} 1',
        'pgvigil_query_skipped{team="a",query="area.quiet",reason="undefined_table"} 1',
        'pgvigil_metric_skipped{team="a",metric="pg_c",reason="extension"} 1',
        'pgvigil_superuser{team="a"} 1',
    } <= set(samples)
    assert not [line for line in lines if line.startswith("pg_down_reason") and line[-1] == "1"]


@pytest.mark.parametrize("openmetrics", [False, True])
def test_each_family_stands_once_and_together(openmetrics: bool) -> None:
    collector, scrape = scraped()
    collector.last = scrape
    for pages in (
        [*about.families(collector, scrape), *about.ourselves(Fleet())],
        [*about.ourselves(Fleet()), *about.overview([collector, collector_of(name="b")])],
    ):
        page = b"".join(render.write(pages, openmetrics=openmetrics)).decode()
        kinds = re.findall(r"^# TYPE (\S+)", page, re.M)
        assert len(kinds) == len(set(kinds)) > 10
        assert "\n\n" not in page
        family = ""
        for line in page.splitlines():
            if line.startswith("# TYPE "):
                family = line.split()[2]
            elif not line.startswith("#"):
                name = re.match(r"[a-z_]+", line)
                assert name
                assert re.fullmatch(f"{family}(_total|_info|_created)?", name[0])


def test_the_overview_tells_the_last_state_of_each_target() -> None:
    one, two = collector_of({"team": "a"}, name="one"), collector_of(name="two")
    one.last, one.scrapes = Scrape(up=True, down=None, seconds=0.5), 4
    lines = written(about.overview([one, two])).splitlines()
    assert lines[2:4] == [
        'pgvigil_target_up{target="one"} 1',
        'pgvigil_target_up{target="two"} 0',
    ]
    assert {
        'pgvigil_scrape_duration_seconds{team="a",target="one"} 0.5',
        'pgvigil_scrape_duration_seconds{target="two"} 0',
        'pgvigil_scrapes_total{team="a",target="one"} 4',
        'pgvigil_scrapes_total{target="two"} 0',
    } <= set(lines)


def test_the_page_tells_what_runs_here_and_ends_with_our_own_process() -> None:
    page = b"".join(render.write(about.ourselves(Fleet()), openmetrics=True)).decode()
    names = [family.name for family in parsed(page, openmetrics=True)]
    assert names[0] == "pgvigil_build_info"
    assert {"process_resident_memory_bytes", "process_open_fds"} <= set(names)
    assert f'pgvigil_build_info{{version="{__version__}",python="3.' in page
    assert page.endswith("\n# EOF\n")
