"""Any file at all is a sound catalogue, or is refused with the file and the line of each fault."""

import contextlib
import copy
import json
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pgvigil import about, catalogue, documents, ranking, reference, render
from pgvigil.catalogue import Query
from pgvigil.collect import Collector, Scrape
from pgvigil.errors import Refused
from pgvigil.plan import Extension, Facts, Statement, make_plan, wanted
from pgvigil.target import Target

from lab.exporter import Page
from lab.results import INT8, TEXT, Column, rows

SCALE = int(os.environ.get("PGVIGIL_PROPERTY_SCALE", "1"))
"""How many times as many examples are tried as in an ordinary run."""

SOUND = """\
plain:
  why: Somebody wants to know.
  on: primary
  needs: {extension: {pg_stat_statements: "1.8"}, privilege: [pg_monitor]}
  timeout: 250ms
  max_series: 20
  labels: [x, y]
  sql:
    - {until: 14, text: "select x, y, {columns} from {pg_stat_statements}.old"}
    - {since: 14, needs: {setting: {wal_level: logical}}, text: "select x, y, {columns} from a.b"}
  metrics:
    own_size_bytes: {column: size, type: gauge, help: How large it is., since: 13, until: 18}
    own_reads_total: {column: reads, value: reads / 2, type: counter, help: "How \\"often\\"."}
ranked:
  why: Of many rows some stand on their own.
  every: 5m
  scope: database
  opt_in: true
  priority: 7
  max_series: 30
  labels: [z]
  top: {rows: 2, by: [weight, calls], hold: 1h, within: [], gains: true}
  sql: select z, {columns} from a.c
  metrics:
    own_weight: {column: weight, type: gauge, help: &help What it is., other: max}
    own_calls_total:
      column: calls
      type: counter
      help: *help
      needs: {function: ["pg_catalog.pg_ls_waldir()"]}
"""

FACTS = tuple(
    facts
    for major in (13, 14, 16, 17, 18, 99)
    for standby in (False, True)
    for facts in (
        Facts(major * 10_000 + 1, standby, user="bare", database="db"),
        Facts(
            major * 10_000 + 1,
            standby,
            user="pgvigil",
            superuser=True,
            database="db",
            extensions={"pg_stat_statements": Extension("1.11", '"odd schema"')},
            privileges=frozenset({"pg_monitor", "pg_read_all_stats"}),
            functions=frozenset({"pg_catalog.pg_ls_waldir()"}),
            settings={"wal_level": "logical"},
        ),
    )
)
"""Servers of several versions and roles, which have all that SOUND needs, or nothing of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("catalogue")


def load(path: Path) -> tuple[Query, ...]:
    """What a file holds, without ours, which take half a second each time."""
    with patch.object(catalogue, "_shipped", lambda: iter(())):
        return catalogue.load([path])


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "own.yml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, loaded: Callable[[Path], tuple[Query, ...]] = load) -> Refused | None:
    """None for a sound file, of which everything works; or why it is refused."""
    try:
        queries = loaded(path)
    except Refused as refused:
        check_refusal(refused, path)
        return refused
    check_queries(queries)
    return None


def check_refusal(refused: Refused, path: Path) -> None:
    """Each problem is told once, with its place, on one line that no terminal obeys."""
    problems = refused.problems
    assert problems
    assert len(set(problems)) == len(problems) <= 1000
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    for problem in problems:
        assert problem.place == str(path)
        # A file that cannot be read, or is no text, has no lines.
        assert problem.line is None or problem.line >= 1
        told = str(problem)
        assert told.isprintable()
        assert len(problem.text) < 2000 + 2 * size


def check_queries(queries: tuple[Query, ...]) -> None:
    """They can be planned for any server, written into the reference, and their rows read."""
    assert queries
    reference.page(queries, {})
    wanted(queries)
    assert {type(query.max_series) for query in queries} == {int}
    collector = Collector(Target("main"), (), ranking.layout)
    for facts in FACTS:
        plan = make_plan(queries, facts)
        ours = list(about.families(collector, Scrape()))
        pages = [*ours, *(family for of in plan.statements for family in answered(of))]
        for openmetrics in (False, True):
            body = b"".join(render.write(pages, openmetrics=openmetrics, process=False)).decode()
            kind = render.OPENMETRICS if openmetrics else render.TEXT
            samples = Page(body, kind).samples
            own = sum(chunk.count(b"\n") for family in ours for chunk in family.chunks)
            assert len(samples) == own + sum(len(of.metrics) for of in plan.statements)


def answered(of: Statement) -> list[render.Family]:
    """The families of a statement whose answer is one row."""
    names = [*of.query.labels, *{metric.column for metric in of.metrics}]
    names += [name for name in (of.query.top.by if of.query.top else ()) if name not in names]
    sheet = ranking.layout(of, {"team": "a"}).sheet()
    values = dict.fromkeys(of.query.labels, b"v")
    sheet.add(
        rows(*(Column(n, TEXT if n in values else INT8, [values.get(n, b"1")]) for n in names))
    )
    sheet.finish()
    return sheet.families


def test_a_sound_catalogue_is_sound(folder: Path) -> None:
    assert refusal(written(folder, SOUND)) is None
    assert len(load(written(folder, SOUND))) == 2
    running = [len(make_plan(load(written(folder, SOUND)), facts).statements) for facts in FACTS]
    assert running == [1, 2, 1, 1] * len(FACTS[::4])


def test_a_clash_with_what_ships_is_refused(folder: Path) -> None:
    """With ours loaded beside it as well, which the other tests leave out for their time."""
    path = written(folder, SOUND.replace("own_weight", "pg_up").replace("own_size", "pg_database"))
    refused = refusal(path, lambda path: catalogue.load([path]))
    assert refused is not None


BYTES = st.binary(max_size=200)
PIECES = st.lists(
    st.sampled_from(
        [
            *("a", "b: ", "\n", "\n  ", "- ", ": ", "? ", "[", "]", "{", "}", ",", "&a ", "*a"),
            *("!", "!!str ", "!!set ", "!!omap ", "!!binary ", "!!python/object:os.system ", "!!"),
            *("|", ">", "'", '"', "#", "%", "@", "`", "---\n", "...\n", "<<: ", "~", "\t", "\0"),
            *("\ufeff", "\r\n", "\x85", "\u2028", "\x1b[2J", "0x1F", "1e9", ".inf", "2026-01-01"),
            *("why: x\n", "sql: select 1\n", "metrics:\n", "max_series: 5\n", "%YAML 1.1\n"),
        ]
    ),
    max_size=40,
).map("".join)


@settings(max_examples=150 * SCALE, deadline=None)
@given(BYTES | st.text(st.characters(codec="utf-8")).map(str.encode) | PIECES.map(str.encode))
@example(b"a: " + b"[" * 100_000)
@example(b"- " * 100_000)
@example(b"{a: " * 5000)
@example(b"a: &a [*a]")
@example(b"? &a [*a]\n: 1")
@example(b"a: !!int ''")
@example(b"a: 0x" + b"F" * 5000)
@example(b"a: " + b"1" * 5000)
@example(b"a: 1" + b":1" * 500_000)
@example(b'"a\\nEVIL": {}')
@example(b'a: {metrics: {"x\\e[2J\\nEVIL": {}}}')
@example(b"x" * 1_000_000 + b": 1")
@example(b"a: " + b"x" * 1_000_000)
@example(b"a: {" + b", ".join(b"k%d: 1" % number for number in range(20_000)) + b"}")
@example(b"a: {labels: [" + b"1, a, {b: c}, " * 10_000 + b"]}")
@example(b"a: {labels: [" + b", ".join(b"{a: %d}" % n for n in range(10_000)) + b"]}")
@example(b"a: {" + b"b: 1, " * 100_000 + b"}")
@example(b"")
@example(b"---\n---\n")
@example(b"\xef\xbb\xbf")
def test_whatever_bytes_a_file_holds_it_is_refused_with_a_place(
    folder: Path, content: bytes
) -> None:
    assert refusal(written(folder, content))


class Text(str):
    """A text that may be very long, and is not shown so."""

    def __repr__(self) -> str:
        return repr(str(self) if len(self) < 200 else f"{self[:40]}... ({len(self)} characters)")


class Raw(Text):
    """A scalar as it stands in a file, without quotes."""


class Pairs(list[tuple[str, Any]]):
    """A mapping, which may hold a key twice."""


def as_tree(value: Any) -> Any:
    """Data with its mappings as Pairs."""
    if isinstance(value, dict):
        return Pairs((key, as_tree(of)) for key, of in value.items())
    return [as_tree(of) for of in value] if isinstance(value, list) else value


def in_yaml(value: Any) -> str:
    """A tree as text: JSON, which is YAML, but for what is raw."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{in_yaml(key)}: {in_yaml(of)}" for key, of in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_yaml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def places(tree: Any) -> Iterator[tuple[Any, int]]:
    """Each list of a tree with each position in it."""
    if isinstance(tree, list):
        for position, item in enumerate(tree):
            yield tree, position
            yield from places(item[1] if isinstance(tree, Pairs) else item)


NAMES = st.sampled_from(
    [
        *(
            "",
            " ",
            "a",
            "a\n",
            "\n",
            "\0",
            "\x1b[31m",
            "ä",
            "\U0001d54f",
            "__name__",
            "le",
            "<<",
            "=",
            "~",
        ),
        *("own_size_bytes", "own_size", "own_reads", "own_reads_created", "own_calls_total"),
        *("own_weight\n", "pg_up_total", "pg_up", "pg_down_reason", "pgvigil_x", "process_x"),
        *("x", "y", "z", "x\n", "weight", "size", "calls", "datname", "other", "password:secret"),
        *("why", "sql", "on", "needs", "top", "labels", "metrics", "max_series", "since", "value"),
        *("help", "type", "column", "every", "timeout", "text", "until", "x" * 100_000),
    ]
).map(Text)
"""Keys and names, of which some are right somewhere."""
TEXTS = NAMES | st.sampled_from(
    [
        *("1s", "1s\n", "0s", "999999s", "9999999s", "1" * 400 + "s", "٣s", "5m", "1h\n", "250ms"),
        *("gauge", "counter", "counter\n", "sum", "any", "primary", "server", "database"),
        *("1.8", "1.8\n", "9" * 5000, "1..8", "pg_catalog.f()", "pg_catalog.f()\n", "pg_monitor\n"),
        *(
            "select",
            "select 1;",
            "select ';'",
            "x select",
            "(" * 5000 + "select",
            "--\nselect x, y",
        ),
        *(
            "/* " * 20_000,
            "/**/ " * 20_000,
            "'" * 20_001,
            "select x, y, z, {columns}",
            "values (1)",
        ),
        *(
            "{columns}",
            "{pg_stat_statements}",
            "{nothing}",
            "%s",
            "%",
            "{",
            "select x as y, {columns}",
        ),
        *("a\u0085b", "a\u2028b", "\ufeff", "\\", '"', "a\0b", "\t", "x" * 1_000_000),
    ]
).map(Text)
RAWS = st.sampled_from(
    [
        *(
            "0x1F",
            "012",
            "0o7",
            "1_000",
            "1e3",
            "5.0",
            "20.0",
            ".nan",
            ".inf",
            "-.inf",
            "-1",
            "0",
            "+5",
        ),
        *(
            "99999999999999999999",
            "1:30",
            "yes",
            "no",
            "on",
            "off",
            "null",
            "~",
            "2026-01-01",
            "<<",
        ),
        *(
            "2026-99-99",
            "0001-01-01 00:00:00 +23:59",
            "!!binary aGk=",
            "!!set {a, b}",
            "!!omap [a: 1]",
        ),
        *("!!python/name:os.system", "!!python/object/apply:os.abort []", "!strange x", "*nobody"),
        *(
            "!!int ''",
            "!!float ''",
            "!!bool 2",
            "!!null x",
            "!!seq x",
            "!!map x",
            "!!set x",
            "&a 1",
        ),
        *(
            "&b [*b]",
            "&c {a: *c}",
            "[" * 60 + "]" * 60,
            "{a: " * 60 + "}" * 60,
            "!!timestamp x",
            "''",
        ),
    ]
).map(Raw)
VALUES = (
    TEXTS
    | RAWS
    | st.integers(-2, 101)
    | st.floats()
    | st.booleans()
    | st.sampled_from([2**63, -(2**70), 10**400, 1_000_000])
    | st.lists(TEXTS | RAWS | st.integers(0, 20), max_size=3)
    | st.dictionaries(NAMES, TEXTS | RAWS | st.integers(0, 20), max_size=3).map(as_tree)
)


class Change(NamedTuple):
    """What is done at a place of a tree."""

    how: str
    place: int
    name: str
    value: Any


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(
            ["drop", "double", "rename", "replace", "replace", "add", "wrap", "exchange"]
        ),
        st.integers(0, 10_000),
        NAMES,
        VALUES,
    ),
    max_size=3,
)


def changed(changes: Sequence[Change]) -> str:
    """SOUND with these changes."""
    document, _ = documents.parse(SOUND, "sound")
    assert document
    tree = as_tree(document.data)
    for how, place, name, value in changes:
        every = list(places(tree))
        if not every:
            break
        inside, at = every[place % len(every)]
        other, there = every[(place // len(every)) % len(every)]
        key, old = inside[at] if isinstance(inside, Pairs) else ("", inside[at])

        def put(new: Any, inside: Any = inside, at: int = at, key: str = key) -> None:
            inside[at] = (key, new) if isinstance(inside, Pairs) else new

        match how:
            case "drop":
                del inside[at]
            case "double":
                inside.append(copy.deepcopy(inside[at]))
            case "rename" if isinstance(inside, Pairs):
                inside[at] = (name, old)
            case "add" if isinstance(inside, Pairs):
                inside.append((name, value))
            case "wrap":
                put([copy.deepcopy(old)])
            case "exchange":
                # A copy: no tree may hold itself here.
                put(copy.deepcopy(other[there][1] if isinstance(other, Pairs) else other[there]))
            case _:
                put(value)
    return in_yaml(tree)


def change(how: str, *way: str | int, name: str = "", value: Any = None) -> list[Change]:
    """One change at the place to which these keys lead."""
    document, _ = documents.parse(SOUND, "sound")
    assert document
    tree = as_tree(document.data)
    here = tree
    for step in way:
        inside = here
        at = step if isinstance(step, int) else [key for key, _ in inside].index(step)
        here = inside[at][1] if isinstance(inside, Pairs) else inside[at]
    every = list(places(tree))
    place = next(n for n, (of, number) in enumerate(every) if of is inside and number == at)
    return [Change(how, place, name, value)]


@settings(max_examples=250 * SCALE, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CHANGES)
@example([])
@example(change("replace", "plain", "max_series", value=20.0))
@example(change("replace", "plain", "timeout", value="1s\n"))
@example(change("replace", "ranked", "every", value="1" * 400 + "s"))
@example(change("replace", "plain", "needs", "extension", "pg_stat_statements", value="9" * 5000))
@example(change("rename", "plain", "metrics", "own_size_bytes", name="own_weight\n"))
@example(change("rename", "plain", "metrics", "own_reads_total", name="pg_up_total"))
@example(change("rename", "plain", "metrics", "own_size_bytes", name="own_reads_created"))
@example(change("replace", "plain", "labels", 0, value="x\n"))
@example(change("replace", "ranked", "sql", value="/* " * 200_000))
@example(change("replace", "ranked", "sql", value="/**/ " * 20_000))
@example(change("double", "plain", "sql", 0))
def test_a_sound_catalogue_with_changes_is_sound_or_refused_with_a_place(
    folder: Path, changes: Sequence[Change]
) -> None:
    text = changed(changes)
    refused = refusal(written(folder, text))
    assert changes or refused is None
    if refused:
        assert all(problem.line for problem in refused.problems)


@settings(max_examples=150 * SCALE, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SOUND)), st.integers(0, 40), PIECES), max_size=3),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "\ufeff", "---\n", "%YAML 1.2\n---\n", "# \x85\n"]),
)
@example([], "\r\n", "\ufeff")
def test_a_sound_catalogue_with_slips_is_sound_or_refused_with_a_place(
    folder: Path, slips: Sequence[tuple[int, int, str]], line_end: str, start: str
) -> None:
    text = SOUND
    for at, length, piece in slips:
        text = text[:at] + piece + text[at + length :]
    refused = refusal(written(folder, (start + text).replace("\n", line_end)))
    if refused:
        assert all(problem.line for problem in refused.problems)


def bomb(levels: int, width: int, first: str) -> str:
    """A catalogue whose labels are aliases to aliases, in the number of width ** levels."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels + 1)]
    return "\n".join([*lines, f"plain: {{labels: *a{levels}}}"])


@pytest.mark.parametrize(
    "text",
    [
        bomb(9, 9, "[x]"),
        bomb(40, 2, "x"),
        bomb(1, 20_000, "x" * 1_000_000),
        bomb(3, 30, "{" + "a: 1, " * 30 + "b: 2}"),
        "a: &a\n  b: &b\n    c: [*a, *b, *a]\n",
    ],
    ids=["wide", "deep", "long", "keys", "itself"],
)
def test_aliases_to_aliases_are_refused_before_they_fill_the_memory(
    folder: Path, text: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = refusal(written(folder, text))
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


FILE_NAMES = st.binary(min_size=1, max_size=12).map(lambda name: name.replace(b"/", b"")) | (
    st.sampled_from([b"a.b", b"a b", b"a\nb", b"\xff", b"-", b"x" * 250, b"x" * 5000, b"\x1b[2J"])
)


@settings(max_examples=100 * SCALE, deadline=None)
@given(FILE_NAMES, st.sampled_from([b"", b".yml", b".yaml"]))
@example(b"\xff", b".yml")
@example(b"a.b", b".yml")
@example(b"x" * 5000, b".yml")
@example(b"\0", b".yml")
def test_whatever_a_file_is_called_it_loads_or_is_refused_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, name: bytes, ending: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / os.fsdecode(name + ending)
    with contextlib.suppress(OSError, ValueError):
        path.write_text(SOUND)
    refused = refusal(path)
    legal = re.fullmatch(r"[A-Za-z0-9_-]+", path.stem) and os.path.isfile(path)
    assert (refused is None) == bool(legal)
    with contextlib.suppress(OSError, ValueError):
        path.unlink()
