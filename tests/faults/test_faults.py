"""Alerts arrive and go with a real fault; `make faults` plays all of them."""

import contextlib
import os
import re
from collections.abc import Iterator

import pytest

from lab import alertmanager, prometheus
from tests.faults import alerts
from tests.faults.fault import Alert, Fault, play
from tests.faults.matrix import FAULTS
from tests.faults.stage import ROOT, Stage

SHORT = (
    "a query does not end",
    "somebody pauses replay and forgets it",
    "a setting waits for a restart",
)
"""Those of different ways: by a session, by the standby, and found without an alert."""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    if prometheus.installed() is None or alertmanager.installed() is None:
        reason = "Prometheus and Alertmanager are not both installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Stage(18) as stage:
        stage.settle()
        yield stage


@pytest.mark.parametrize("name", SHORT)
def test_it_is_told_that(stage: Stage, name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    result = play(fault, stage)
    assert result.broken == []
    assert result.told.keys() == set(fault.expected)


def test_an_alert_that_does_not_come_is_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "patience", 3)
    nothing = Fault("nothing", _nothing, (Alert("LongQuery", "ticket"),))
    assert play(nothing, stage).broken == ["never came: `LongQuery`, ticket; what came: nothing"]


@contextlib.contextmanager
def _nothing(_: Stage) -> Iterator[None]:
    yield


def test_each_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))


def test_each_alert_has_a_fault_or_a_reason_to_have_none() -> None:
    unproven = alerts.shipped() - alerts.proven() - alerts.BY_SERIES.keys()
    assert sorted({name for name, _ in unproven}) == sorted(alerts.STILL_TO_COME)


def test_an_alert_that_a_fault_fires_needs_no_series() -> None:
    assert alerts.BY_SERIES.keys() & alerts.proven() == set()
    assert alerts.BY_SERIES.keys() <= alerts.shipped()


def test_what_a_fault_names_is_among_the_rules() -> None:
    shipped, findings = alerts.shipped(), alerts.findings()
    names = {name for name, _ in shipped}
    for fault in FAULTS:
        assert {(alert.name, alert.severity) for alert in fault.alerts} <= shipped
        assert set(fault.findings) <= findings
        assert {*fault.also, *fault.lingers} <= names | findings


def test_a_runbook_names_a_fault_that_fires_its_alert() -> None:
    sections = {
        match[1]: " ".join(match[2].split())
        for page in (ROOT / "docs" / "runbooks").glob("*.md")
        for match in re.finditer(r"^## (\w+)\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    }
    faults: dict[str, list[str]] = {}
    for fault in FAULTS:
        for alert in fault.alerts:
            faults.setdefault(alert.name, []).append(fault.name)
    silent = [name for name in faults if not any(f'"{f}"' in sections[name] for f in faults[name])]
    assert silent == []
