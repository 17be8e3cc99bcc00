"""The rules of the chart are those of rules/, less what was switched off."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import rules
from lab.helm import rendered

AREAS = sorted(file.stem for file in rules.RULES.glob("*.yml"))
TARGETS = {"orders": {"connection": {"host": "db1"}}}

Groups = list[dict[str, Any]]


def made(**chosen: Any) -> dict[str, Groups]:
    """The groups of each area."""
    manifests = rendered(
        values={
            "targets": TARGETS,
            "assumeCRDs": True,
            "prometheusRule": {"enabled": True, **chosen},
        }
    )
    return {
        of["metadata"]["name"].removeprefix("watch-pgvigil-"): of["spec"]["groups"]
        for of in manifests
        if of["kind"] == "PrometheusRule"
    }


def file(area: str) -> Groups:
    found: Groups = yaml.safe_load((rules.RULES / f"{area}.yml").read_text())["groups"]
    return found


def alerts(groups: Groups) -> list[dict[str, Any]]:
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_each_area_is_an_object_with_all_that_its_file_says() -> None:
    found = made()
    assert sorted(found) == AREAS
    for area in AREAS:
        assert found[area] == file(area)
    assert "{{ $labels.instance }}" in str(found["activity"])


def test_promtool_takes_the_rules_of_the_chart(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    for area, groups in made(alertLabels={"team": "databases"}).items():
        (tmp_path / f"{area}.yml").write_text(yaml.safe_dump({"groups": groups}))
    paths = sorted(tmp_path.glob("*.yml"))
    done = subprocess.run([program, "check", "rules", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_that_is_switched_off_is_gone_in_all_its_severities() -> None:
    found = made(disabledAlerts=["ConnectionsNearLimit", "DatabaseDown"])
    gone = [
        rule for area in AREAS for rule in alerts(file(area)) if rule not in alerts(found[area])
    ]
    assert {rule["alert"] for rule in gone} == {"ConnectionsNearLimit", "DatabaseDown"}
    assert len([rule for rule in gone if rule["alert"] == "ConnectionsNearLimit"]) == 2
    for area in AREAS:
        records = [[rule for rule in of["rules"] if "record" in rule] for of in file(area)]
        assert records == [[rule for rule in of["rules"] if "record" in rule] for of in found[area]]


def test_an_area_that_is_switched_off_is_gone() -> None:
    assert sorted(made(disabledAreas=["patroni", "haproxy"])) == [
        area for area in AREAS if area not in ("patroni", "haproxy")
    ]


def test_labels_are_added_to_alerts_and_change_none_of_ours() -> None:
    given = {"team": "databases", "severity": "none"}
    for area, groups in made(alertLabels=given).items():
        for rule, own in zip(alerts(groups), alerts(file(area)), strict=True):
            assert rule == {**own, "labels": {**given, **own["labels"]}}
        for group in groups:
            assert all(
                "team" not in of.get("labels", {}) for of in group["rules"] if "record" in of
            )


def test_links_lead_to_where_the_values_say() -> None:
    chosen = {"grafanaUrl": "https://grafana/", "runbookUrl": "https://wiki/runbooks/"}
    for area, groups in made(**chosen).items():
        for rule, own in zip(alerts(groups), alerts(file(area)), strict=True):
            notes, before = rule["annotations"], own["annotations"]
            page = before["runbook_url"].rpartition("/")[2]
            assert notes["runbook_url"] == f"https://wiki/runbooks/{page}"
            if "dashboard_url" in before:
                assert notes["dashboard_url"] == f"https://grafana{before['dashboard_url']}"
            others = notes.keys() - {"runbook_url", "dashboard_url"}
            assert {key: notes[key] for key in others} == {key: before[key] for key in others}
