"""The rules are ones that Prometheus takes, say what their tests expect, and name what there is."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pgvigil import catalogue, standards

from lab import rules
from lab.rules import RULES

FILES = rules.files()
TESTS = sorted((RULES / "tests").glob("*.yml"))
PAGES = Path(__file__).parent / "live" / "pages"
"""What others than us expose, as read from them; tests/live compares it with the real thing."""

NAME = r"(?<![\w\":])(?:\w+:)?(?:pg|patroni|haproxy)_[\w:]+"

DECLARED = {"cluster_scope:patroni_members:declared"}
"""What docs/patroni.md has users record."""


def promtool(*words: str) -> str:
    """What promtool complains of; nothing when it is content."""
    program = shutil.which("promtool")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=300)
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


def test_prometheus_takes_the_rules() -> None:
    assert FILES
    assert promtool("check", "rules", *map(str, FILES)) == ""


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.stem)
def test_the_rules_say_what_their_tests_expect(test: Path) -> None:
    assert promtool("test", "rules", str(test)) == ""


def test_promtool_sees_a_rule_that_says_something_else(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    wrong = (RULES / "queries.yml").read_text().replace("_upper_seconds", "_lower_seconds")
    (tmp_path / "queries.yml").write_text(wrong)
    test = shutil.copy(RULES / "tests" / "queries_test.yml", tmp_path / "tests")
    assert "FAILED" in promtool("test", "rules", str(test))


def test_each_file_of_rules_has_tests_and_no_test_is_of_another() -> None:
    assert all(rules.tests(file.stem) for file in FILES)
    assert sorted({test for file in FILES for test in rules.tests(file.stem)}) == TESTS


@pytest.mark.parametrize("area", sorted({page.stem.partition("-")[0] for page in PAGES.iterdir()}))
def test_rules_for_others_name_what_they_show(area: str) -> None:
    known = DECLARED | {rule.name for rule in of_area(area) if rule.kind == "record"}
    for page in PAGES.glob(f"{area}-*.txt"):
        known |= {line.split()[0] for line in page.read_text().splitlines()}
    for query in catalogue.load():
        known |= {metric.name for metric in query.metrics}
    named = {name for rule in of_area(area) for name in re.findall(NAME, rule.expression)}
    assert named
    assert named <= known


def test_prometheus_takes_the_configurations_that_we_show() -> None:
    shown = sorted((RULES.parent / "prometheus").glob("*.yml"))
    assert shown
    assert [promtool("check", "config", str(file)) for file in shown] == [""] * len(shown)


def test_what_users_declare_is_shown_to_them() -> None:
    page = (RULES.parent / "docs" / "patroni.md").read_text()
    assert [name for name in DECLARED if f"record: {name}" not in page] == []


def test_the_limits_that_rules_ask_for_are_edges_of_the_histogram() -> None:
    wanted = {of.value for of in standards.objectives() if of.name == standards.LATENCY}
    (query,) = (query for query in catalogue.load() if query.name == "queries.statement_latency")
    assert wanted
    assert wanted <= set(query.limits)


def of_area(area: str) -> list[rules.Rule]:
    return [rule for rule in rules.load() if rule.area == area]
