"""A real Alertmanager sends the alerts where the example says, and keeps silent where it says."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
import yaml

from lab import alertmanager, rules
from lab.alertmanager import Alertmanager

CONFIGURATION = rules.ROOT / "alertmanager" / "alertmanager.yml"
NAMES = {rule.name for rule in rules.load() if rule.kind == "alert"}
PATIENCE = 60.0
"""Seconds; who takes longer is broken."""

HERE = {"instance": "db1", "job": "pg"}


def of(name: str, severity: str, **labels: str) -> dict[str, str]:
    """The labels of an alert of ours as Prometheus sends it."""
    (rule,) = (r for r in rules.load() if (r.name, r.labels.get("severity")) == (name, severity))
    return {"alertname": name, **rule.labels, **labels}


CASES = {
    "maintenance silences what fires for the instance": (
        [of("Maintenance", "none", **HERE)],
        [of("DatabaseDown", "page", **HERE), of("QueryFailing", "ticket", **HERE, query="a.b")],
        [
            of("DatabaseDown", "page", instance="db2", job="pg"),
            of("ClusterDown", "page", system_identifier="7"),
        ],
    ),
    "a server that is down silences causes and what counts how often it is": (
        [of("DatabaseDown", "page", **HERE)],
        [
            of("QueryFailing", "ticket", **HERE, query="a.b"),
            of("AvailabilityBudgetBurn", "page", **HERE),
        ],
        [
            of("QueryFailing", "ticket", instance="db2", job="pg", query="a.b"),
            of("RoleUnexpected", "ticket", **HERE),
        ],
    ),
    "an exporter that is down does as well": (
        [of("ExporterDown", "page", **HERE)],
        [of("ScrapesAbandoned", "ticket", **HERE)],
        [of("ScrapesAbandoned", "ticket", instance="db2", job="pg")],
    ),
    "a page silences the ticket for the same thing": (
        [of("SlotFillsDisk", "page", **HERE, slot_name="a")],
        [of("SlotFillsDisk", "ticket", **HERE, slot_name="a")],
        [
            of("SlotFillsDisk", "ticket", **HERE, slot_name="b"),
            of("SlotFillsDisk", "ticket", instance="db2", job="pg", slot_name="a"),
            of("ReplicationLag", "ticket", **HERE),
        ],
    ),
}


@pytest.fixture
def running() -> Iterator[Alertmanager]:
    program = alertmanager.installed()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Alertmanager is not installed")
    with Alertmanager(program, CONFIGURATION) as started:
        yield started


def amtool(*words: str) -> str:
    found = shutil.which("amtool")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("amtool is not installed")
    done = subprocess.run([found, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_amtool_takes_the_example() -> None:
    assert "SUCCESS" in amtool("check-config", str(CONFIGURATION))


@pytest.mark.parametrize(
    ("severity", "receiver"), [("page", "pager"), ("ticket", "tickets"), ("none", "nobody")]
)
def test_each_severity_has_its_receiver(severity: str, receiver: str) -> None:
    file = f"--config.file={CONFIGURATION}"
    assert amtool("config", "routes", "test", file, f"severity={severity}") == receiver


@pytest.mark.parametrize("case", CASES)
def test_what_is_known_to_be_worse_silences_the_rest(running: Alertmanager, case: str) -> None:
    sources, silent, heard = CASES[case]
    running.fire([*sources, *silent, *heard])
    end = time.monotonic() + PATIENCE
    while (held := ordered(running.held_back())) != ordered(silent) and time.monotonic() < end:
        time.sleep(0.05)
    assert held == ordered(silent)
    assert ordered(running.alerts()) == ordered([*sources, *silent, *heard])


def ordered(alerts: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(alerts, key=lambda labels: sorted(labels.items()))


def test_the_example_names_alerts_that_exist() -> None:
    inhibitions = yaml.safe_load(CONFIGURATION.read_text())["inhibit_rules"]
    named = {
        name
        for rule in inhibitions
        for matcher in (*rule["source_matchers"], *rule["target_matchers"])
        if matcher.startswith("alertname")
        for name in matcher.partition('"')[2].strip('"').split("|")
    }
    assert named
    assert named <= NAMES
