"""The rules are ones that Prometheus takes, say what their tests expect, and name what there is."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pgvigil import catalogue

RULES = Path(__file__).parents[1] / "rules"
FILES = sorted(RULES.glob("*.yml"))
TESTS = sorted((RULES / "tests").glob("*.yml"))
PAGES = Path(__file__).parent / "live" / "pages"
"""What others than us expose, as read from them; tests/live compares it with the real thing."""

NAME = r"(?<![\w\":])(?:\w+:)?(?:pg|pgvigil|patroni|haproxy)_[\w:]+"

DECLARED = {"cluster_scope:patroni_members:declared"}
"""What docs/patroni.md has users record."""


def promtool(*words: str) -> str:
    """What promtool complains of; nothing when it is content."""
    program = shutil.which("promtool")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120)
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


def test_prometheus_takes_the_rules() -> None:
    assert FILES
    assert promtool("check", "rules", *map(str, FILES)) == ""


def test_the_rules_say_what_their_tests_expect() -> None:
    assert promtool("test", "rules", *map(str, TESTS)) == ""


def test_promtool_sees_a_rule_that_says_something_else(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    wrong = (RULES / "queries.yml").read_text().replace('le: "0.1"', 'le: "1.0"')
    (tmp_path / "queries.yml").write_text(wrong)
    test = shutil.copy(RULES / "tests" / "queries_test.yml", tmp_path / "tests")
    assert "FAILED" in promtool("test", "rules", str(test))


def test_the_limit_is_the_same_as_a_label_and_as_a_number() -> None:
    (objective,) = [
        rule for rule in rules(RULES / "queries.yml") if rule["record"].endswith(":objective")
    ]
    assert objective["expr"] == f"vector({objective['labels']['le']})"


def test_each_file_of_rules_has_tests() -> None:
    assert [test.name for test in TESTS] == [f"{file.stem}_test.yml" for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_rules_name_metrics_that_are_collected_or_recorded(file: Path) -> None:
    known = DECLARED | {rule["record"] for rule in rules(file) if "record" in rule}
    for page in PAGES.glob(f"{file.stem}-*.txt"):
        known |= {line.split()[0] for line in page.read_text().splitlines()}
    for query in catalogue.load():
        for metric in query.metrics:
            names = ("_bucket", "_count", "_sum") if metric.type == "histogram" else ("",)
            known |= {metric.name + suffix for suffix in names}
    named = {name for rule in rules(file) for name in re.findall(NAME, rule["expr"])}
    assert named
    assert named <= known


def test_prometheus_takes_the_configurations_that_we_show() -> None:
    shown = sorted((RULES.parent / "prometheus").glob("*.yml"))
    assert shown
    assert [promtool("check", "config", str(file)) for file in shown] == [""] * len(shown)


def test_what_users_declare_is_shown_to_them() -> None:
    page = (RULES.parent / "docs" / "patroni.md").read_text()
    assert [name for name in DECLARED if f"record: {name}" not in page] == []


def test_the_limit_of_the_rules_is_an_edge_of_the_histogram() -> None:
    (objective,) = (
        rule["labels"]["le"]
        for rule in rules(RULES / "queries.yml")
        if rule["record"] == "pg_statement_executor:objective"
    )
    (query,) = (query for query in catalogue.load() if query.name == "queries.statement_latency")
    assert float(objective) in query.limits


def rules(file: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
