"""Whatever is configured settles or is refused with a place, and no password is ever shown."""

import contextlib
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pgvigil import catalogue, cli, config, logs
from pgvigil.config import Settings, Told
from pgvigil.errors import Refused

SCALE = int(os.environ.get("PGVIGIL_PROPERTY_SCALE", "1"))
"""How many times as many examples are tried as in an ordinary run."""

CANARY = "kanarienvogel"
"""Stands where a password may; nothing that is shown may hold it."""

SOUND = """\
listen: "127.0.0.1:9187"
catalogue: [own.yml, more/]
targets:
  main:
    connection: {host: db1, port: 5432, user: pgvigil, password: kanarienvogel, sslmode: require}
    labels: {team: payments, "tier": "1"}
    enable: [host, queries.texts]
    disable: [schema]
    include_databases: ["app_.*"]
    exclude_databases: ["(old|new)"]
    max_databases: 7
    max_series: 5000
  other:
    dsn: postgresql://pgvigil:kanarienvogel@db2:5433,db3/app?sslmode=verify-full
    pooler: true
  apart:
    dsn: "host=db4 password='kanarienvogel' dbname=app"
"""

OURS = re.compile(r"PG[A-Z]|DATA_SOURCE_|PGVIGIL_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configuration")


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The process' own environment, in which libpq looks as well, with these variables of ours."""
    others = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    with patch.dict(os.environ, {**others, **variables}, clear=True):
        yield


def shown(found: Settings) -> str:
    """All that anybody gets to see of what was settled."""
    addresses = [target.address for target in found.targets]
    names = [target.name for target in found.targets]
    return f"{found!r} {found} {addresses} {names} {found.targets}"


def settled(told: Told, variables: Mapping[str, str], *, canary: bool = True) -> Settings | None:
    """What settles, or None where it is refused; either way all is in order with it."""
    with environment(variables):
        try:
            found = config.settle(told, os.environ)
        except Refused as refused:
            check_refusal(refused, canary=canary)
            return None
        if canary:
            assert CANARY not in shown(found)
        for target in found.targets:
            with contextlib.suppress(OSError):
                values = target.parameters()
                assert all(isinstance(value, str) for value in values.values())
                assert not any("\0" in value for value in values.values())
            assert target.address.isprintable()
            assert re.fullmatch(r"[A-Za-z0-9_.:-]+", target.name)
        assert len({target.name for target in found.targets}) == len(found.targets) > 0
        assert pickle.loads(pickle.dumps(found)) == found  # it comes out of another process
        host = found.listen.host
        assert re.fullmatch("[!-~]*", host), "a socket takes it or says why not"
    return found


def check_refusal(refused: Refused, *, canary: bool = True) -> None:
    assert refused.problems
    assert len(refused.problems) <= 1000
    for problem in refused.problems:
        assert problem.place
        assert problem.line is None or problem.line >= 1
        assert str(problem).isprintable()
    if canary:
        assert CANARY not in f"{refused} {refused!r} {refused.problems!r}"


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "pgvigil.yml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SIGNS = st.text(st.sampled_from("@:/?#[]%&=, '\"\\\t\n;{}!*$|<>-.äß漢0aZ"), max_size=6)
SLIPS = st.sampled_from(
    [
        *("@", ":", "/", "?", "#", "[", "]", "%", "%zz", "%40", "&", "=", ",", " ", "'", '"', "\\"),
        *("\n", "\t", "host=", "password=", "postgresql://", "://", "dbname=", "x y"),
        *(
            "\0",
            "\ufeff",
            "\x1b[2J",
            "\u2028",
            "\r\n",
            "{",
            "}",
            "- ",
            ": ",
            "&a ",
            "*a",
            "!!x ",
            "|",
        ),
        *(
            "---\n",
            "<<: ",
            "~",
            "0x1F",
            "1e9",
            "2026-01-01",
            "no",
            "5.0",
            "{a: ",
            "[" * 60,
            "x" * 5000,
        ),
    ]
)


def with_slips(text: str, slips: Sequence[tuple[int, int, str]]) -> str:
    """A text with some characters replaced, though never within the canary."""
    for at, length, piece in slips:
        start = at % (len(text) + 1)
        stop = min(len(text), start + length)
        parts = text[:start], piece, text[stop:]
        changed = "".join(parts)
        if changed.count(CANARY) == text.count(CANARY):
            text = changed
    return text


def slips(most: int) -> st.SearchStrategy[list[tuple[int, int, str]]]:
    """Places, how many characters are lost there, and what comes in."""
    # Few: without the word before it a password is no password.
    lost = st.integers(0, 4)
    return st.lists(st.tuples(st.integers(0, 2000), lost, SLIPS | SIGNS), max_size=most)


@settings(max_examples=150 * SCALE, deadline=None)
@given(st.binary(max_size=200) | st.text(st.characters(codec="utf-8")).map(str.encode))
@example(b"targets: {a: " + b"[" * 100_000)
@example(b"targets: {a: {connection: {port: 0x" + b"F" * 5000 + b"}}}")
@example(b"targets: {a: &a {connection: *a}}")
@example(b"listen: ' :80'\nlisten: x")
def test_whatever_bytes_a_file_holds_they_are_refused_with_a_place(
    folder: Path, content: bytes
) -> None:
    settled(Told(config=written(folder, content)), {})


@settings(max_examples=250 * SCALE, deadline=None)
@given(slips(3), st.sampled_from(["\n", "\r\n"]))
@example([], "\n")
def test_a_sound_file_with_slips_settles_or_is_refused_with_a_place(
    folder: Path, slips: Sequence[tuple[int, int, str]], line_end: str
) -> None:
    text = with_slips(SOUND, slips).replace("\n", line_end)
    found = settled(Told(config=written(folder, text)), {}, canary=len(slips) < 2)
    assert found or slips


VALUES = st.sampled_from(
    [
        *("x", '""', '" "', '"a\\n"', '"\\0"', '"a\\0b"', '"\\e[2J"', "5", "5.0", "-1", "1e9", "~"),
        *(
            "[]",
            "{}",
            "[x]",
            "[x, x]",
            "{a: b}",
            "yes",
            "2026-01-01",
            "!!set {a}",
            "0x" + "F" * 5000,
        ),
        *('"(a"', '["(a"]', '["a{99999999999999999999}"]', '["' + "(" * 2000 + '"]', '["[[a]"]'),
        *('":9187\\n"', '"ä:80"', '"a\\0:80"', '":99999"', '":٣"', '"[::1]:80"', '"[::::]:80"'),
        *('["a\\0b"]', f'["{"x" * 5000}"]', '["/proc/self/mem"]', '"a\\0b"', "/proc/self/mem", "."),
        *('{"team\\n": x}', "{__x: y}", '{"le": "\\0"}', "{host: 'a\\0'}", "{port: 5432.0}"),
        '{host: "postgresql://u:kanarienvogel@db1/x"}',
        '{dbname: "postgresql://u:kanarienvogel@db1/x"}',
        '"host=postgresql://u:kanarienvogel@db1"',
        '"postgresql://u@db1/postgresql://u:kanarienvogel@db1/x"',
        '"password=kanarienvogel host=a\\0b"',
        '"postgresql://u:kanarienvogel\\0@db1/x"',
    ]
)
KEYS = st.sampled_from(
    [
        *("listen", "catalogue", "targets", "password:kanarienvogel", '"a\\nb"', '"targets\\n"'),
    ]
)
TARGET_KEYS = st.sampled_from(
    [
        *("dsn", "connection", "password_file", "labels", "pooler", "enable", "disable", "<<"),
        *("include_databases", "exclude_databases", "max_databases", "max_series", '"x\\ny"'),
        *("password:kanarienvogel", "password=kanarienvogel"),
    ]
)


@settings(max_examples=250 * SCALE, deadline=None)
@given(
    st.dictionaries(KEYS, VALUES, max_size=2),
    st.dictionaries(
        st.sampled_from(["main", "a.b", '"a\\n"', '"a b"', "ä", "5", "x" * 200]),
        st.dictionaries(TARGET_KEYS, VALUES, max_size=3),
        max_size=2,
    ),
)
@example({"listen": '":9187\\n"'}, {})
@example({"listen": '"ä:80"'}, {})
@example({"listen": '"a\\0:80"'}, {})
@example({}, {"main": {"include_databases": '["a{99999999999999999999}"]'}})
@example({}, {"main": {"exclude_databases": '["' + "(" * 2000 + '"]'}})
@example({}, {"main": {"password_file": '"a\\0b"'}})
@example({}, {"main": {"connection": "{host: 'a\\0'}"}})
@example({}, {"main": {"connection": '{host: "a\\0b", user: u}'}})
@example({}, {"main": {"dsn": '"host=a\\0b"'}})
@example({}, {"main": {"max_series": "500.0"}})
@example({}, {"main": {"labels": '{"team\\n": x}'}})
@example({}, {"main": {"dsn": '"host=postgresql://u:kanarienvogel@db1"'}})
@example({}, {"main": {"connection": '{dbname: "postgresql://u:kanarienvogel@db1/x"}'}})
@example({}, {"main": {"dsn": "\"host='a\\nb'\""}})
def test_any_keys_and_values_settle_or_are_refused_with_a_place(
    folder: Path, top: Mapping[str, str], targets: Mapping[str, Mapping[str, str]]
) -> None:
    lines = [f"{key}: {value}" for key, value in top.items()]
    if targets and "targets" not in top:
        lines.append("targets:")
        for name, of in targets.items():
            lines.append(f"  {name}: {'' if of else '{}'}")
            lines += [f"    {key}: {value}" for key, value in of.items()]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of re
        found = settled(Told(config=written(folder, "\n".join(lines))), {})
    if found:
        for target in found.targets:
            assert type(target.max_series) is int
            assert all(re.fullmatch(r"[a-zA-Z_]\w*", name) for name in target.labels)
        with patch.object(catalogue, "_shipped", lambda: iter(())), contextlib.suppress(Refused):
            catalogue.load(found.catalogue)


DSNS = (
    f"postgresql://user:{CANARY}@db1:5432/app?sslmode=disable",
    f"postgres://user:{CANARY}@db1,db2:5433/app",
    f"host=db1 password='{CANARY}' user=u dbname=app",
    f"postgresql://db1/app?password={CANARY}&user=u",
    f"host=db1 password={CANARY}x, host=db2 password={CANARY}",
)
"""Connection strings with a password, of both forms and of several servers."""


@settings(max_examples=300 * SCALE, deadline=None)
@given(
    st.sampled_from(DSNS),
    slips(3),
    st.sampled_from(["--dsn", "PGVIGIL_DSN", "DATA_SOURCE_NAME"]),
)
@example(DSNS[3].replace("app?", ""), [], "PGVIGIL_DSN")
@example(f"host=password='{CANARY}'", [], "DATA_SOURCE_NAME")
@example(f"host=@assword='{CANARY}'", [], "DATA_SOURCE_NAME")
@example("host='a\nb'", [], "--dsn")
@example("host=postgresql://u:kanarienvogel@db1", [], "PGVIGIL_DSN")
@example(DSNS[0], [(len(DSNS[0]), 0, "/postgresql://u:kanarienvogel@db1")], "PGVIGIL_DSN")
def test_a_connection_string_with_slips_settles_or_is_refused_without_its_password(
    dsn: str, slips: Sequence[tuple[int, int, str]], place: str
) -> None:
    text = with_slips(dsn, slips)
    # Of one slip the password is safe; two may make it the host's name.
    canary = len(slips) < 2
    if place == "--dsn":
        settled(Told(dsn=text), {}, canary=canary)
    else:
        settled(Told(), {place: text.replace("\0", "")}, canary=canary)


VARIABLES = (
    *("PGVIGIL_LISTEN", "PGVIGIL_ENABLE", "PGVIGIL_DISABLE", "PGVIGIL_CONFIG"),
    *("DATA_SOURCE_URI", "DATA_SOURCE_USER", "DATA_SOURCE_URI_FILE", "DATA_SOURCE_USER_FILE"),
    *("DATA_SOURCE_PASS_FILE", "PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGDATABASE"),
    *("PGPASSFILE", "PGSERVICE", "PGSERVICEFILE", "PGSSLMODE", "PGOPTIONS", "PGAPPNAME"),
    *("PGCONNECT_TIMEOUT", "PGTARGETSESSIONATTRS", "PGCLIENTENCODING", "PGREQUIRESSL"),
)
SECRETS = ("PGPASSWORD", "DATA_SOURCE_PASS", "PGVIGIL_DSN", "DATA_SOURCE_NAME", "PGSSLPASSWORD")
RAW_VALUE = st.binary(max_size=12) | (ANY_TEXT | SIGNS | SLIPS).map(str.encode)
VALUE = RAW_VALUE.map(lambda value: os.fsdecode(value.replace(b"\0", b"")))


@settings(max_examples=300 * SCALE, deadline=None)
@given(
    st.dictionaries(st.sampled_from(VARIABLES), VALUE, max_size=4),
    st.dictionaries(st.sampled_from(SECRETS), VALUE.map(lambda v: f"{CANARY}{v}"), max_size=2),
)
@example({"PGHOST": "postgresql://u:kanarienvogel@db1/app"}, {})
@example({"PGDATABASE": "postgresql://u:kanarienvogel@db1/app"}, {})
@example({"PGHOST": "a\nb\x1b[2J"}, {})
@example({"PGVIGIL_LISTEN": "\udcff:80"}, {})
@example({"PGVIGIL_CONFIG": "x" * 5000}, {})
@example({"PGSERVICE": "nobody", "PGSERVICEFILE": "/nowhere"}, {"PGPASSWORD": "kanarienvogel"})
def test_any_environment_settles_or_is_refused_with_the_variable(
    variables: Mapping[str, str], secrets: Mapping[str, str]
) -> None:
    settled(Told(), {**variables, **secrets})


class Outcome(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    said: str


def run(words: Sequence[str], variables: Mapping[str, str]) -> Outcome:
    """`pgvigil` in this process, without our own catalogue, which takes half a second to read."""
    told = io.StringIO()
    with (
        environment(variables),
        patch.object(catalogue, "_shipped", lambda: iter(())),
        patch.object(logs, "to_stderr"),
        # What starts anew ends here, with what it comes to.
        patch.object(os, "execv", lambda _, again: sys.exit(cli.main(again[3:]))),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Outcome(code, told.getvalue())


OPTIONS = st.one_of(
    st.tuples(st.just("--dsn"), st.sampled_from(DSNS)),
    st.builds(lambda dsn, of: ("--dsn", with_slips(dsn, of)), st.sampled_from(DSNS), slips(1)),
    st.tuples(st.sampled_from(["--listen", "--enable", "--disable", "--config"]), VALUE),
    st.tuples(st.just("--catalogue"), VALUE),
    st.tuples(st.just("--log-level"), st.sampled_from(["debug", "loud", ""])),
)
JOINED = OPTIONS.flatmap(lambda pair: st.sampled_from([pair, (f"{pair[0]}={pair[1]}",)]))


@settings(max_examples=120 * SCALE, deadline=None)
@given(st.lists(JOINED, max_size=3), st.dictionaries(st.sampled_from(VARIABLES), VALUE, max_size=2))
@example([], {})
@example([("--dsn", "host='a\nb'")], {})
@example([("--catalogue", "x" * 5000)], {})
@example([("--catalogue", "\udcff.yml")], {})
@example([("--listen", "\udcff:80")], {})
@example([("--dsn", f"host='a\x1b[2J' password={CANARY}")], {})
def test_any_options_are_in_order_or_refused_with_exit_code_2(
    options: Sequence[Sequence[str]], variables: Mapping[str, str]
) -> None:
    words = [word.replace("\0", "") for option in options for word in option]  # as the kernel does
    code, said = run(["check", *words], variables)
    assert code in (0, 2)
    assert CANARY not in said
    assert all(line.isprintable() for line in said.split("\n"))
    if code == 0:
        assert "are in order" in said
    else:
        assert "to mend" in said or "usage: pgvigil" in said


@pytest.mark.parametrize(
    "words",
    [
        *(["check", dsn] for dsn in DSNS),
        *(["check", "--dns", dsn] for dsn in DSNS),
        *([f"--dsn={dsn}", "check"] for dsn in DSNS),
        [DSNS[0]],
        ["check", "--password", CANARY],
        ["check", f"--password={CANARY}"],
        ["check", "--log-level", DSNS[0]],
    ],
)
def test_a_command_line_that_is_not_understood_is_refused_without_its_password(
    words: Sequence[str],
) -> None:
    code, said = run(words, {})
    assert code == 2
    assert "not shown" in said
    assert CANARY not in said


def test_a_real_command_ends_with_2_and_shows_no_password(folder: Path) -> None:
    """As a process of its own, which starts anew because of the password on its command line."""
    variables = {k: v for k, v in os.environ.items() if not OURS.match(k)}
    dsn = f"host=db1 password={CANARY}"
    path = written(folder, f"targets: {{a: {{dsn: 'host=db1 {CANARY}'}}}}")
    for words, code in ((["--dsn", dsn], 0), (["--dsn", dsn, "--config", str(path)], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "pgvigil", "check", *words],
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code
        assert CANARY not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
