"""Every alert says whom it wakes and why, is tried both ways, and leads to what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pgvigil import standards

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rules").glob("*.yml"))
ALERTS = [
    pytest.param(file.stem, rule, id=rule["alert"])
    for file in FILES
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]
SECTIONS = [
    "What it means",
    "What it does to users",
    "How to see it",
    "What to do now",
    "For good",
    "When to call for help",
    "How it was proven",
]
Rule = dict[str, Any]


@pytest.mark.parametrize(("area", "rule"), ALERTS)
def test_an_alert_says_whom_it_wakes_and_which_standard_it_keeps(area: str, rule: Rule) -> None:
    labels = rule["labels"]
    assert set(labels) == {"severity", "area", "standard", "alert_type"}
    assert labels["severity"] in ("page", "ticket")
    assert labels["alert_type"] in ("symptom", "cause")
    assert labels["area"] == area
    (standard,) = (known for known in standards.load() if known.id == labels["standard"])
    # A finding that rules can see as it arises is better told than found.
    assert labels["severity"] in {*standard.response, "ticket"}


@pytest.mark.parametrize(("area", "rule"), ALERTS)
def test_an_alert_is_explained_where_it_points_to(area: str, rule: Rule) -> None:
    name = rule["alert"]
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert "{{" not in annotations["summary"]
    assert "{{" in annotations["description"]
    assert annotations["runbook_url"] == f"docs/runbooks/{area}.md#{name.lower()}"
    section = runbook(area)[name]
    assert re.findall(r"^\*\*(.+?)\.\*\*", section, re.M) == SECTIONS


@pytest.mark.parametrize(("area", "rule"), ALERTS)
def test_an_alert_is_shown_to_fire_and_its_file_to_be_silent(area: str, rule: Rule) -> None:
    tests = (ROOT / "rules" / "tests" / f"{area}_test.yml").read_text()
    expected = re.findall(r"labels: '\{[^}]*alertname=\"(\w+)\"", tests)
    expected += re.findall(r'alertname="(\w+)"\}\)\n\s+eval_time: \w+\n\s+exp_samples', tests)
    assert rule["alert"] in expected
    assert re.search(r"eval_time: \w+\}$", tests, re.M)


@pytest.mark.parametrize(("area", "rule"), ALERTS)
def test_every_join_says_on_which_labels(area: str, rule: Rule) -> None:
    # A comparison with a number is no join.
    operators = re.findall(r"\b(and|or|unless)\b(?! on \()", rule["expr"])
    assert operators == []


@pytest.mark.parametrize("area", sorted({str(param.values[0]) for param in ALERTS}))
def test_a_runbook_has_no_section_without_an_alert(area: str) -> None:
    text = (ROOT / "rules" / f"{area}.yml").read_text()
    assert list(runbook(area)) == re.findall(r"- alert: (\w+)", text)


def runbook(area: str) -> dict[str, str]:
    """The text below each heading of the second level."""
    text = (ROOT / "docs" / "runbooks" / f"{area}.md").read_text()
    parts = re.split(r"^## (\w+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))
