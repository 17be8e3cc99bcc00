"""YAML is read strictly, and each fault is told with its file, its line and its remedy."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import documents
from pgvigil.errors import Problem

REMEDY = "mind the indent, and put text with special characters in quotes"
NO_VALUE = (
    "a key between braces has no value; write a blank after its colon, and put text with a comma "
    "in quotes"
)
MIND = "mind its path, owner and mode"


def faults(text: str, schema: str = "config") -> list[str]:
    document, problems = documents.parse(text, "f.yml")
    checked = documents.check(document, schema)[0] if document else []
    return [str(problem) for problem in (*problems, *checked)]


def test_a_missing_file_is_told() -> None:
    path = Path("/nowhere/pgvigil.yml")
    told = [Problem(str(path), None, f"cannot be read: No such file or directory; {MIND}")]
    assert documents.read(path) == (None, told)


def test_a_directory_for_a_file_is_told(tmp_path: Path) -> None:
    told = [Problem(str(tmp_path), None, "is a directory; name a file")]
    assert documents.read(tmp_path) == (None, told)


def test_a_file_for_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "pgvigil.yml"
    told = [Problem(str(path), None, f"cannot be read: Not a directory; {MIND}")]
    assert documents.read(path) == (None, told)


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    path, why = tmp_path / "pgvigil.yml", "Permission denied"
    path.touch(mode=0o000)
    if os.geteuid() == 0:  # root may read every file, but not this one
        path, why = Path("/proc/self/mem"), "Input/output error"
    told = [Problem(str(path), None, f"cannot be read: {why}; {MIND}")]
    assert documents.read(path) == (None, told)


def test_a_file_in_another_encoding_is_told(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_bytes("listen: böse".encode("latin-1"))
    told = [Problem(str(path), None, "is not UTF-8 text (invalid start byte); save it as UTF-8")]
    assert documents.read(path) == (None, told)


def test_a_place_stands_for_the_path_where_one_is_given(tmp_path: Path) -> None:
    _, problems = documents.read(tmp_path, "catalogue/own.yml")
    assert str(problems[0]) == "catalogue/own.yml: is a directory; name a file"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: b: c", "f.yml:1: is not YAML: mapping values are not allowed in this context"),
        ("a: 1\n\tb: 2", "f.yml:2: is not YAML: found a tab character that violates indentation"),
        ("a:\n  - 1\n b: 2", "f.yml:3: is not YAML: did not find expected key"),
        ("a: [1\n", "f.yml:2: is not YAML: did not find expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "f.yml:2: is not YAML: but found another document"),
        ("a: !strange 1", "f.yml:1: is not YAML: found a value of no known kind"),
        ("a: *nobody", "f.yml:1: is not YAML: found undefined alias"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(text: str, told: str) -> None:
    assert faults(text) == [f"{told}; {REMEDY}"]


def test_a_control_character_is_told_with_its_line() -> None:
    assert faults("ä: 1\nb: \x07") == ["f.yml:2: holds a control character; remove it"]


def test_an_alias_to_itself_is_told() -> None:
    told = ["f.yml:1: holds itself, by an alias, or is too large"]
    assert faults("a: &a [*a]") == told


def test_a_key_that_stands_twice_is_told_with_both_lines() -> None:
    told = ["f.yml:3: the key 'listen' stands twice; the first is in line 1; remove one"]
    assert faults('listen: ":1"\ncatalogue: []\nlisten: ":2"') == told


def test_a_key_that_is_no_text_is_told() -> None:
    assert faults("? [a, b]\n: c") == ["f.yml:1: a key must be plain text"]


def test_a_key_without_a_value_between_braces_is_told_without_its_name() -> None:
    assert faults("{catalogue, listen:secret}") == [f"f.yml:1: {NO_VALUE}"] * 2


def test_an_empty_file_is_told() -> None:
    assert faults("") == ["f.yml:1: the file must be a mapping (key: value), not nothing"]


def test_a_wrong_type_is_told_with_what_belongs_there() -> None:
    text = "targets:\n  a:\n    dsn: 5\n    pooler: 1\n    labels: [x]\ncatalogue: own.yml"
    assert faults(text) == [
        "f.yml:6: catalogue must be a list, not text "
        "(files or folders with queries of your own, relative to this file)",
        "f.yml:3: targets.a.dsn must be text, not a number "
        "(a connection string or URI as libpq takes it); put it in quotes",
        "f.yml:5: targets.a.labels must be a mapping (key: value), not a list "
        "(constant labels on every series of this target)",
        "f.yml:4: targets.a.pooler must be true or false, not a number (true when a transaction "
        "pooler such as PgBouncer stands between; detected when absent)",
    ]


def test_an_unknown_key_is_told_with_the_one_that_was_meant() -> None:
    told = (
        "(known here: allow_hosts, auth_modules, catalogue, discovery, listen, max_hosts, targets)"
    )
    assert faults('lsiten: ":1"\nzzz: 1') == [
        f"f.yml:1: unknown key 'lsiten'; did you mean 'listen'? {told}",
        f"f.yml:2: unknown key 'zzz' {told}",
    ]


@pytest.mark.parametrize(
    "written",
    ["012345", "0x1F", "1_000", "1:30", "+5", "2026-99-99", "!!int five", "!!bool 2", "0o7", "00"],
)
def test_a_number_in_another_spelling_stays_the_text_it_was(written: str) -> None:
    document, problems = documents.parse(f"a: {written}", "f.yml")
    assert document
    assert (document.data, problems) == ({"a": written.split()[-1]}, [])


@pytest.mark.parametrize(("written", "value"), [("5432", 5432), ("0", 0), ("-1", -1), ("on", True)])
def test_plain_numbers_and_truths_stay_what_they_are(written: str, value: object) -> None:
    document, _ = documents.parse(f"on: {written}", "f.yml")
    assert document
    assert repr(document.data) == repr({"on": value})


def test_the_sound_data_lack_what_is_broken_and_nothing_else() -> None:
    document, _ = documents.parse(
        "listen: 5\ntargets: {a: {dsn: x, pooler: 1, odd: 1}, b: {dsn: y}, 'c c': {dsn: z}}", "f"
    )
    assert document
    problems, sound = documents.check(document, "config")
    assert len(problems) == 4
    assert sound == {"targets": {"a": {"dsn": "x"}, "b": {"dsn": "y"}}}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1),
        st.integers() | st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"])),
        min_size=1,
    )
)
def test_the_line_of_each_value_is_known(data: dict[str, int | str]) -> None:
    quoted = {key.replace("'", "''"): str(value).replace("'", "''") for key, value in data.items()}
    text = "".join(f"'{key}':\n\n  '{value}'\n" for key, value in quoted.items())
    document, problems = documents.parse(text, "f.yml")
    assert document
    assert problems == []
    assert document.data == {key: str(value) for key, value in data.items()}
    assert [document.lines[(key,)] for key in data] == [1 + 3 * n for n in range(len(data))]


@given(st.text(st.characters(codec="utf-8")))
def test_no_text_at_all_makes_reading_fail(text: str) -> None:
    document, problems = documents.parse(text, "f.yml")
    assert document or problems
    if document:
        documents.check(document, "config")
        documents.check(document, "catalogue")
