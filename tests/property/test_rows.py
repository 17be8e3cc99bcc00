"""Whatever rows hold, the whole page is read by Prometheus, and each lost sample is counted."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from pgvigil import about, ranking, render
from pgvigil.catalogue import Top
from pgvigil.collect import Collector, Scrape
from pgvigil.fleet import Fleet
from pgvigil.plan import Statement
from pgvigil.render import Sheet
from pgvigil.source import Rows
from pgvigil.target import Target

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server
from lab.results import BOOL, FLOAT8, INT8, NUMERIC, TEXT, Column, rows, statement

Start = Callable[..., Server]

SCALE = int(os.environ.get("PGVIGIL_PROPERTY_SCALE", "1"))
"""How many times as many examples are tried as in an ordinary run."""

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""For tests with a server, where the search for a smaller example takes minutes."""

ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
LONG = st.builds(
    lambda unit, count: (unit * count)[:10_000],
    st.sampled_from([b"x", "\N{EURO SIGN}".encode(), b'"', b"\\", b"\n", b"\xff", b'\\"\n']),
    st.integers(300, 10_000),
)
LABEL = st.none() | (
    st.binary(max_size=6)
    | st.text('"\\\n\r{}=, #aä%\u2028\x85', max_size=4).map(str.encode)
    | st.sampled_from(
        [b"", b"a", b"other", b"x" * 1024, b"x" * 1025, b"\xff", b"\xfe", b"\xc3", b"\xa9"]
    )
    | LONG
).map(lambda value: value.replace(b"\0", b""))  # no server sends one
INTEGER = st.integers(-(2**63), 2**63 - 1).map(lambda number: b"%d" % number)
ENDLESS = {"inf": b"Infinity", "-inf": b"-Infinity", "nan": b"NaN"}
FLOATING = st.floats().map(lambda number: ENDLESS.get(str(number), repr(number).encode()))
DECIMAL = (
    st.decimals(allow_nan=False, allow_infinity=False, places=5).map(
        lambda number: f"{number:f}".encode()
    )
    | st.integers(10**299, 10**400).map(lambda number: b"%d" % number)
    | st.sampled_from(list(ENDLESS.values()))
)
VALUES: Mapping[int, st.SearchStrategy[bytes]] = {
    BOOL: st.sampled_from([b"t", b"f"]),
    INT8: INTEGER,
    FLOAT8: FLOATING,
    NUMERIC: DECIMAL,
    TEXT: INTEGER
    | FLOATING
    | st.sampled_from([b"16 kB", b"", b"t", b"1_0", b"0/16B3748", b"\xff"]),
}


Row = tuple[Sequence[bytes | None], Sequence[bytes | None]]
"""Labels and values."""


class Result(NamedTuple):
    """What a server answers to one statement, in parts as they come."""

    statement: Statement
    types: Sequence[int]
    """OIDs of the metrics' columns."""
    parts: Sequence[Sequence[Row]]

    @property
    def rows(self) -> list[Row]:
        return [row for part in self.parts for row in part]

    def answer(self, part: Sequence[Row]) -> Rows:
        names = [metric.column for metric in self.statement.metrics]
        return rows(
            *(
                Column(name, TEXT, [labels[at] for labels, _ in part])
                for at, name in enumerate(self.statement.query.labels)
            ),
            *(
                Column(name, self.types[at], [values[at] for _, values in part])
                for at, name in enumerate(names)
            ),
        )


@st.composite
def results(draw: st.DrawFn, number: int) -> Result:
    """The answer to the statement of this number, of which each has metrics of its own."""
    names = draw(
        st.lists(st.sampled_from(["g", "h", "c_total", "d_total"]), min_size=1, unique=True)
    )
    metrics = [f"pg_s{number}_{name}" for name in names]
    labels = ["x", "y"][: draw(st.integers(0, 2))]
    top = None
    if bool(labels) and draw(st.booleans()):
        within = draw(st.sampled_from([(), tuple(labels[1:])]))
        by = draw(st.lists(st.sampled_from(metrics), min_size=1, unique=True))
        top = Top(draw(st.integers(1, 3)), by, 3600.0, within, draw(st.booleans()))
    types = [draw(st.sampled_from(list(VALUES))) for _ in metrics]
    row = st.tuples(
        st.tuples(*(LABEL for _ in labels)), st.tuples(*(st.none() | VALUES[t] for t in types))
    )
    parts = draw(st.lists(st.lists(row, max_size=8), max_size=3))
    other: dict[str, Any] = {
        name: draw(st.sampled_from(["", "sum", "max", "min"]))
        for name in metrics
        if top and not name.endswith("_total")
    }
    most = draw(st.integers(1, 40))
    of = statement(*metrics, labels=labels, max_series=most, top=top, text=draw(ANY_TEXT), **other)
    return Result(of, types, parts)


CONSTANT = st.dictionaries(
    st.sampled_from(["team", "x", "query", "reason", "state", "datname", "target", "le"]),
    ANY_TEXT,
    max_size=3,
)
"""Labels of a target that an operator may have chosen, some of them as the page's own."""


def scraped(constant: Mapping[str, str], given_results: Sequence[Result]) -> tuple[Collector, Any]:
    """A target that has just been asked and has answered this, three times."""
    target = Target("main", {"host": "db1"}, labels=constant)
    queries = [result.statement.query for result in given_results]
    collector = Collector(
        target, queries, lambda of, more: ranking.layout(of, {**constant, **more})
    )
    scrape = Scrape()
    scrape.answered()
    for number, result in enumerate(given_results):
        layout = ranking.layout(result.statement, constant)
        for _ in range(3 if result.statement.query.top else 1):
            sheet = layout.sheet()
            for part in result.parts:
                sheet.add(result.answer(part))
            sheet.finish()
        scrape.sheets[f"area.q{number}"] = sheet
    return collector, scrape


def body(pages: Iterable[render.Family], *, openmetrics: bool) -> str:
    return b"".join(render.write(pages, openmetrics=openmetrics)).decode()


def read(text: str, *, openmetrics: bool) -> Page:
    return Page(text, render.OPENMETRICS if openmetrics else render.TEXT)


def as_shown(label: bytes | None) -> str:
    """A label's value as a page has it: no NULL, UTF-8, at most 1,024 bytes."""
    return (label or b"").decode(errors="replace").encode()[:1024].decode(errors="ignore")


def check_counts(result: Result, sheet: Sheet, page: Page) -> None:
    """All samples of a result are on the page, or counted by a reason why not."""
    names = [metric.name for metric in result.statement.metrics]
    series = [dict(labels) for name in names for labels in page.series(name)]
    written = len(series)
    shown = [of[label] for of in series for label in result.statement.query.labels if label in of]
    assert all(len(value.encode()) <= 1024 for value in shown)
    room = result.statement.max_rows
    assert written == sheet.series <= room * len(names)
    if result.statement.query.top:
        keys = {tuple(map(as_shown, labels)) for labels, _ in result.rows}
        if len(keys) > room:
            return  # most of them are in the rows named other
    values = [value for _, of_row in result.rows for value in of_row]
    left_out = sum(sheet.dropped.values())
    # A row that is left out as a whole takes its NULLs along.
    assert written + left_out <= len(values) <= written + left_out + values.count(None)
    dropped = {"duplicate", "max_series"} & sheet.dropped.keys()
    if not dropped:
        assert len(values) == written + left_out + values.count(None)


def one(
    labels: Sequence[bytes],
    *names: str,
    top: Top | None = None,
    values: Sequence[bytes] = (b"1", b"2", b"3", b"4"),
    within: bool = False,
) -> tuple[dict[str, str], tuple[Result, ...]]:
    """An answer with a row for each label, of which three may stand on the page."""
    names = names or ("pg_s0_g",)
    of = statement(
        *names, labels=["x", "y"] if within else ["x"], max_series=3 * len(names), top=top
    )
    found = [
        ((b"z", label) if within else (label,), [value] * len(names))
        for label, value in zip(labels, values, strict=False)
    ]
    return {}, (Result(of, [FLOAT8] * len(names), [found]),)


FIRST = Top(1, ("pg_s0_g",), 3600.0, ())
MOST = replace(FIRST, by=("pg_s0_c_total",))
WITHIN = replace(MOST, within=("y",))


@settings(max_examples=100 * SCALE, deadline=None)
@given(CONSTANT, st.tuples(results(0), results(1)))
@example(*one([b"\xc3", b"\xa9"]))
@example(*one([b"\xff" * 500]))
@example(*one([b"\xff", b"\xfe", b"a", b"b"], top=FIRST))
@example(*one([b"x" * 1024, b"x" * 1025], top=FIRST))
@example(*one([b"a", b"b", b"c", b"other"], "pg_s0_c_total", top=MOST))
@example(*one([b"a", b"a"], "pg_s0_g", "pg_s0_h", top=FIRST))
@example(*one([b"a", b"b"], top=FIRST, values=[b"NaN", b"1"]))
@example(*one([b"a", b"b", b"c", b"d"], "pg_s0_c_total", top=WITHIN, within=True))
def test_whatever_rows_hold_the_whole_page_parses_and_the_sum_is_right(
    constant: Mapping[str, str], given_results: Sequence[Result]
) -> None:
    collector, scrape = scraped(constant, given_results)
    families = [*about.families(collector, scrape), *about.ourselves(Fleet())]
    for openmetrics in (False, True):
        page = read(body(families, openmetrics=openmetrics), openmetrics=openmetrics)
        assert page.value("pg_up") == 1
        for number, result in enumerate(given_results):
            check_counts(result, scrape.sheets[f"area.q{number}"], page)


@settings(max_examples=20 * SCALE, deadline=None)
@given(st.lists(CONSTANT, min_size=2, max_size=3))
@example([{"target": "main"}, {}])
def test_whatever_labels_targets_have_the_page_of_them_all_parses(
    constants: Sequence[Mapping[str, str]],
) -> None:
    collectors = [
        Collector(Target(f"t{number}", labels=labels), (), ranking.layout)
        for number, labels in enumerate(constants)
    ]
    families = [*about.ourselves(Fleet()), *about.overview(collectors)]
    for openmetrics in (False, True):
        page = read(body(families, openmetrics=openmetrics), openmetrics=openmetrics)
        for collector in collectors:
            assert page.value("pgvigil_scrapes_total", target=collector.target.name) == 0


def promtool(pages: Sequence[str]) -> str:
    """What promtool says of pages that it cannot read, all at once; nothing when it reads them."""
    program = shutil.which("promtool")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    # Names of its own for each page: a family may stand only once.
    apart = (
        re.sub(r"^(# (?:HELP|TYPE) )?(?=[a-zA-Z])", rf"\g<1>page{number}_", page, flags=re.M)
        for number, page in enumerate(pages)
    )
    done = subprocess.run(
        [program, "check", "metrics"],
        input="".join(apart).encode(),
        capture_output=True,
        timeout=120,
    )
    # With 3 it dislikes a name or a HELP, which is for the catalogue's author to decide.
    return "" if done.returncode in (0, 3) else (done.stdout + done.stderr).decode()


def test_promtool_refuses_a_page_that_cannot_be_read() -> None:
    good = '# TYPE pg_a gauge\npg_a{x="\\n"} 1\n'
    assert promtool([good, good]) == ""
    assert "line 4" in promtool([good, good.replace('"}', "}")])


def test_promtool_reads_the_page_whatever_rows_hold() -> None:
    pages: list[str] = []

    @settings(max_examples=60 * SCALE, deadline=None)
    @given(CONSTANT, st.tuples(results(0), results(1)))
    @example(*one([b"\xc3", b"\xa9"]))
    @example({"team": "\0\r"}, ())
    def collect(constant: Mapping[str, str], given_results: Sequence[Result]) -> None:
        pages.append(body(about.families(*scraped(constant, given_results)), openmetrics=False))

    collect()
    assert promtool(pages) == ""


CATALOGUE = """\
plain:
  why: Somebody keeps whatever they like in a table.
  max_series: 56
  labels: [a, b]
  sql: select a, b, {columns} from odd.samples order by number
  metrics:
    odd_numeric: {column: as_numeric, type: gauge, help: Any numeric.}
    odd_double_total: {column: as_double, type: counter, help: Any double.}
    odd_integer_total: {column: as_integer, type: counter, help: Any integer.}
    odd_truth: {column: as_truth, type: gauge, help: Any truth.}
    odd_text: {column: as_text, type: gauge, help: Any text.}
    odd_interval: {column: as_interval, type: gauge, help: Any interval.}
    odd_bytes: {column: as_bytes, type: gauge, help: Any bytes.}
ranked:
  why: Of many rows some stand on their own.
  max_series: 8
  labels: [a, b]
  top: {rows: 2, by: [as_double]}
  sql: select a, b, {columns} from odd.samples order by number
  metrics:
    odd_ranked_double: {column: as_double, type: gauge, help: Any double., other: sum}
    odd_ranked_total: {column: as_integer, type: counter, help: Any integer.}
"""
METRICS = {
    "as_numeric": "odd_numeric",
    "as_double": "odd_double_total",
    "as_integer": "odd_integer_total",
    "as_truth": "odd_truth",
    "as_text": "odd_text",
    "as_interval": "odd_interval",
    "as_bytes": "odd_bytes",
}
TABLE = """\
create schema odd;
create table odd.samples (
  number int generated always as identity, a text, b text, as_numeric numeric, as_double float8,
  as_integer int8, as_truth bool, as_text text, as_interval interval, as_bytes bytea
);
grant usage on schema odd to pgvigil;
grant select on odd.samples to pgvigil;
"""
INSERT = """\
insert into odd.samples (a, b, as_numeric, as_double, as_integer, as_truth, as_text, as_interval,
  as_bytes)
values (convert_from(%s, %s), convert_from(%s, %s), %s::numeric, %s, %s, %s,
  convert_from(%s, %s), %s::interval, %s)
"""
ROOM = 8
"""Rows that the catalogue above has room for; the server sends one more."""


class OddRow(NamedTuple):
    """A row of the table above."""

    a: bytes | None
    b: bytes | None
    as_numeric: str | None
    as_double: float | None
    as_integer: int | None
    as_truth: bool | None
    as_text: bytes | None
    as_interval: str | None
    as_bytes: bytes | None

    def in_utf8(self) -> "OddRow":
        """The same as a database takes it whose encoding is UTF8."""
        a, b, text = (
            value and value.decode(errors="replace").encode()
            for value in (self.a, self.b, self.as_text)
        )
        return self._replace(a=a, b=b, as_text=text)

    def parameters(self, encoding: str) -> list[Any]:
        """What INSERT wants."""
        of = self._asdict()
        texts = {name: [of[name], encoding] for name in ("a", "b", "as_text")}
        return [part for name, value in of.items() for part in texts.get(name, [value])]


ODD_ROW = st.builds(
    OddRow,
    LABEL,
    LABEL,
    st.none() | DECIMAL.map(bytes.decode),
    st.none() | st.floats(),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.booleans(),
    st.none() | LABEL | INTEGER | FLOATING,
    st.none() | st.sampled_from(["1 day", "-infinity", "0", "1 year 2 hours"]),
    st.none() | st.binary(max_size=8),
)

Samples = dict[tuple[str, str, str], float]


def expected(found: Sequence[Sequence[bytes | None]]) -> tuple[Samples, Counter[str], int]:
    """The samples of the plain query over these rows, what is left out, and the NULLs."""
    samples: Samples = {}
    dropped: Counter[str] = Counter()
    nulls = 0
    seen: set[tuple[str, str]] = set()
    for a, b, *values in found[:ROOM]:
        labels = as_shown(a), as_shown(b)
        if labels in seen:
            dropped["duplicate"] += len(values)
            continue
        seen.add(labels)
        for column, value in zip(METRICS, values, strict=True):
            name = METRICS[column]
            if value is None:
                nulls += 1
                continue
            if column == "as_truth":
                value = str(int(value == b"true")).encode()
            try:
                number = float(value)
            except ValueError:
                dropped["not_a_number"] += 1
                continue
            if name.endswith("_total") and not number >= 0:
                dropped["not_a_count"] += 1
            else:
                samples[name, *labels] = number
    if len(found) > ROOM:
        dropped["max_series"] = len(METRICS)
    return samples, +dropped, nulls


def odd_samples(page: Page) -> Samples:
    return {
        (name, dict(labels)["a"], dict(labels)["b"]): float(value)
        for (name, labels), value in page.samples.items()
        if name in METRICS.values()
    }


def left_out(page: Page, query: str) -> Counter[str]:
    series = page.series("pgvigil_query_dropped_samples_total", query=query)
    return Counter({dict(labels)["reason"]: int(value) for labels, value in series.items()})


def same(found: Samples, wanted: Samples) -> bool:
    return found.keys() == wanted.keys() and all(
        found[key] == value or (math.isnan(found[key]) and math.isnan(value))
        for key, value in wanted.items()
    )


class Database(NamedTuple):
    """A database with the table above, and a connection to it."""

    encoding: str
    connection: psycopg.Connection[Any]

    def fill(self, odd_rows: Iterable[OddRow]) -> list[Sequence[bytes | None]]:
        """Put these rows into the table; the columns of each as the server spells them."""
        if self.encoding == "UTF8":
            odd_rows = [row.in_utf8() for row in odd_rows]
        self.connection.execute("truncate odd.samples restart identity")
        self.connection.cursor().executemany(
            INSERT, [row.parameters(self.encoding) for row in odd_rows]
        )
        names = ", ".join(f"convert_to({n}::text, '{self.encoding}')" for n in ("a", "b", *METRICS))
        return self.connection.execute(
            f"select {names} from odd.samples order by number"
        ).fetchall()


ACCEPT = {True: "application/openmetrics-text;version=1.0.0", False: "text/plain"}


def scrape(exporter: Exporter, target: str, *, openmetrics: bool) -> Page:
    """A page as Prometheus asks for it, packed."""
    headers = {
        "Accept": ACCEPT[openmetrics],
        "Accept-Encoding": "gzip",
        "X-Prometheus-Scrape-Timeout-Seconds": "60",
    }
    response = exporter.get(f"/probe?target={target}", headers)
    assert response.status == 200
    assert response.headers["content-encoding"] == "gzip"
    return Page(gzip.decompress(response.body).decode(), response.headers["content-type"])


def test_whatever_a_real_table_holds_the_page_has_it_right(
    fresh_server: Start, tmp_path: Path
) -> None:
    server = fresh_server(17)
    server.execute("create database odd")
    server.execute("alter role pgvigil connection limit 6")  # two targets, each with three
    server.execute("create database raw encoding 'SQL_ASCII' template template0")
    (tmp_path / "odd.yml").write_text(CATALOGUE)
    targets = {
        name: {"dsn": server.conninfo(dbname=name, **PGVIGIL.login), "labels": {"team": 'a"\\\n'}}
        for name in ("odd", "raw")
    }
    configuration = {"catalogue": ["odd.yml"], "targets": targets}
    (tmp_path / "pgvigil.yml").write_text(json.dumps(configuration))
    databases: dict[str, Database] = {}
    for name, encoding in (("odd", "UTF8"), ("raw", "SQL_ASCII")):
        server.execute(TABLE, database=name)
        connection = psycopg.connect(server.conninfo(dbname=name), autocommit=True)
        databases[name] = Database(encoding, connection)
    pages: list[str] = []
    with Exporter("--config", str(tmp_path / "pgvigil.yml")) as exporter:
        before = {name: scrape(exporter, name, openmetrics=False) for name in databases}
        usual = {name: page.names for name, page in before.items()}

        @settings(max_examples=15 * SCALE, deadline=None, phases=NO_SHRINKING)
        @given(st.lists(ODD_ROW, max_size=ROOM + 2), st.sampled_from(sorted(databases)))
        @example([OddRow(b"\xc3", b"", *[None] * 7), OddRow(b"\xa9", b"", *[None] * 7)], "raw")
        @example(
            [OddRow(b"\xff" * 500, b'"\\\n' * 3000, "1", 1, 1, True, b"1", "1 s", b"1")], "raw"
        )
        def check(odd_rows: list[OddRow], name: str) -> None:
            found = databases[name].fill(odd_rows)
            samples, dropped, nulls = expected(found)
            for openmetrics in (True, False):
                page = scrape(exporter, name, openmetrics=openmetrics)
                lost = left_out(page, "odd.plain") - left_out(before[name], "odd.plain")
                before[name] = page
                assert page.value("pg_up") == 1
                assert usual[name] <= page.names
                assert not {q for q in page.failed() if q.startswith("odd.")}
                assert same(odd_samples(page), samples)
                assert lost == dropped
                ours = min(len(found), ROOM + 1) * len(METRICS)
                whole = len(samples) + dropped.total() + nulls
                assert whole == ours
                ranked = page.series("odd_ranked_double") | page.series("odd_ranked_total")
                assert len(ranked) <= ROOM
            pages.append(page.body)

        try:
            check()
        finally:
            for database in databases.values():
                database.connection.close()
    assert promtool(pages) == ""
    assert not [line for line in server.errors_in_log() if "odd" in line]
