"""Rules that are hurried are the same rules, sooner."""

import re
from pathlib import Path

import pytest
import yaml

from lab import hurry

ROOT = Path(__file__).parents[1]

RULES = """
groups:
  - name: example
    interval: 2m
    rules:
      - alert: Example
        expr: rate(a_total[5m]) > max_over_time(b[1h30m:5m] offset 1w) + c offset 2m30s > 300
        for: 10m
      - record: example
        expr: increase(a_total[1m])
      - alert: AtOnce
        expr: a == 1
        for: 0s
"""


def test_every_duration_of_a_rule_is_shorter_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(RULES)
    (tmp_path / "copy").mkdir()
    copy = hurry.hurried(tmp_path / "rules.yml", tmp_path / "copy")
    (group,) = yaml.safe_load(copy.read_text())["groups"]
    first, second, third = group["rules"]
    assert group["interval"] == "2000ms"
    assert first["expr"] == (
        "rate(a_total[5000ms]) > max_over_time(b[90000ms:5000ms] offset 10080000ms)"
        " + c offset 2500ms > 300"
    )
    assert first["for"] == "10000ms"
    assert second["expr"] == "increase(a_total[4000ms])"  # four scrapes at least
    assert third["for"] == "0ms"


@pytest.mark.parametrize("file", sorted((ROOT / "rules").glob("*.yml")), ids=lambda f: f.stem)
def test_no_rule_of_ours_keeps_a_duration_of_minutes(file: Path, tmp_path: Path) -> None:
    copy = hurry.hurried(file, tmp_path).read_text()
    long = r"\d(?!ms)[smhdwy]"
    assert (
        re.findall(rf"\[[^\]]*{long}[^\]]*\]|offset \d*{long}|(?:for|interval): \d*{long}", copy)
        == []
    )


def test_objectives_that_one_waits_for_are_shorter_and_others_stay() -> None:
    given = {
        "A": {"lag_seconds": {"ticket": 30.0, "page": 300.0}},
        "B": {"latency_seconds": {"page": 0.1}, "window_seconds": {"ticket": 604800.0}},
        "C": {"used_ratio": {"page": 300.0}},
    }
    assert hurry.objectives(given) == {"A": {"lag_seconds": {"ticket": 1.0, "page": 5.0}}}


def test_the_hurried_package_asks_the_same_more_often(tmp_path: Path) -> None:
    where = hurry.package(ROOT / "exporter" / "pgvigil", tmp_path)
    asked = 0
    for file in (ROOT / "exporter" / "pgvigil" / "catalogue").glob("*.yml"):
        ours = yaml.safe_load(file.read_text())
        hurried = yaml.safe_load((where / "pgvigil" / "catalogue" / file.name).read_text())
        for name, query in ours.items():
            if (every := query.pop("every", None)) is not None:
                seconds = int(every[:-1]) * {"s": 1, "m": 60, "h": 3600}[every[-1]] / hurry.FACTOR
                shorter = hurried[name].pop("every")
                assert shorter == f"{max(hurry.EVERY_FLOOR, seconds):.0f}s"
                asked += 1
        assert hurried == ours
    assert asked


def test_a_clock_may_run_faster_still(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(RULES)
    (tmp_path / "copy").mkdir()
    copy = hurry.hurried(tmp_path / "rules.yml", tmp_path / "copy", factor=7200)
    first, _, _ = yaml.safe_load(copy.read_text())["groups"][0]["rules"]
    assert "[4000ms:1000ms] offset 84000ms" in first["expr"]  # a week in a minute and a half
    assert first["for"] == "1000ms"
