"""Which alerts there are, and what proves those that no fault of the matrix does."""

import yaml

from tests.faults.matrix import FAULTS
from tests.faults.stage import ROOT, RULES

Name = tuple[str, str]
"""An alert's name and its severity."""

BY_TESTS = {
    "haproxy": ROOT / "tests" / "live" / "test_haproxy.py",
    "patroni": ROOT / "tests" / "live" / "test_patroni.py",
}
"""Areas whose alerts real components fire in tests of their own."""

BY_SERIES: dict[Name, str] = {}
"""Alerts that cannot be provoked in minutes, and why; `rules/tests` fires them from series."""


def shipped() -> set[Name]:
    """All alerts of the rules."""
    return {name for file in RULES.glob("*.yml") for name in _of(file.stem)}


def proven() -> set[Name]:
    """Those that a real fault fires, of the matrix or of tests of their own."""
    found = {(alert.name, alert.severity) for fault in FAULTS for alert in fault.alerts}
    for area, test in BY_TESTS.items():
        text = test.read_text()
        found |= {name for name in _of(area) if f'"{name[0]}"' in text}
    return found


def _of(area: str) -> set[Name]:
    groups = yaml.safe_load((RULES / f"{area}.yml").read_text())["groups"]
    return {
        (rule["alert"], rule["labels"]["severity"])
        for group in groups
        for rule in group["rules"]
        if "alert" in rule
    }
