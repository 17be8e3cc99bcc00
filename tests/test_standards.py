"""The file of standards becomes standards, or every fault in it is told at once."""

from pathlib import Path

import pytest
from pgvigil.errors import Refused
from pgvigil.standards import Standard, load

GOOD = """\
# The first one.
STO-1:
  title: Growth is planned for
  objective: >
    full in more
    than 7 days
  evidence: [history, metric]
  response: [ticket]
  metrics: [pg_size_bytes, pg_free_bytes]
OPS-1:
  title: Every alert has a runbook
  objective: 100 %
  evidence: [test]
  response: []
  metrics: []
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "standards.yml"
    path.write_text(text)
    return path


def faults(folder: Path, text: str) -> list[str]:
    path = written(folder, text)
    with pytest.raises(Refused) as refused:
        load(path)
    return [str(problem).removeprefix(f"{path}:") for problem in refused.value.problems]


def test_standards_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    growth = Standard(
        id="STO-1",
        title="Growth is planned for",
        objective="full in more than 7 days",
        evidence=("history", "metric"),
        response=("ticket",),
        metrics=("pg_size_bytes", "pg_free_bytes"),
        place=str(path),
        line=2,
    )
    first, second = load(path)
    assert first == growth
    assert (second.id, second.response, second.metrics, second.line) == ("OPS-1", (), (), 10)


def test_ours_are_read_when_no_file_is_named() -> None:
    assert {standard.place for standard in load()} == {"standards.yml"}


def test_all_faults_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    text = GOOD.replace("response: [ticket]", "reponse: [ticket]")
    text = text.replace("[test]", "[tests]").replace("pg_free_bytes", "pg_size_bytes")
    told = faults(tmp_path, text)
    assert "8: unknown key 'reponse'; did you mean 'response'?" in "\n".join(told)
    assert any(line.startswith("2: STO-1 lacks the key 'response' (page: ") for line in told)
    assert "9: STO-1.metrics names the same thing twice; remove one" in told
    assert "13: OPS-1.evidence.0 must be one of metric, history, record, test" in told
    assert len(told) == 4


@pytest.mark.parametrize("name", ["sto-1", "STO1", "STORAGE-1", "STO-01", "STO-100"])
def test_an_id_of_another_form_is_refused(tmp_path: Path, name: str) -> None:
    (told,) = faults(tmp_path, GOOD.replace("STO-1:", f"{name}:"))
    assert told.startswith(f"2: {name!r} is not a legal name here (a standard's id: ")


def test_a_standard_that_stands_twice_is_refused(tmp_path: Path) -> None:
    told = faults(tmp_path, GOOD.replace("OPS-1", "STO-1"))
    assert told == ["10: the key 'STO-1' stands twice; the first is in line 2; remove one"]


@pytest.mark.parametrize("text", ["", "a", "[]", "{}"])
def test_a_file_without_standards_is_refused(tmp_path: Path, text: str) -> None:
    assert len(faults(tmp_path, text)) == 1


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        load(tmp_path / "none.yml")
