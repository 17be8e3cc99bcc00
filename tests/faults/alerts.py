"""Which alerts there are, and what proves those that no fault of the matrix does."""

from collections.abc import Collection, Mapping

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

_DAYS = "what it looks at are days, of which the lab has none"

BY_SERIES: Mapping[Name, str] = {
    ("ArchiveSegmentLost", "ticket"): "the lab has no WAL-G",
    ("AvailabilityBudgetBurn", "ticket"): _DAYS,
    ("BackupRecordGone", "ticket"): _DAYS,
    ("DataCorrupt", "page"): "it stays for a day after the last page that was found damaged",
    ("ExporterCostsTooMuch", "ticket"): "in the lab the exporter asks sixty times as often",
    ("MultixactWraparound", "page"): "it takes some thousand million multixacts",
    ("MultixactWraparound", "ticket"): "it takes more multixacts than minutes make",
    ("MultixactsRunOut", "ticket"): "it takes more multixacts than minutes make",
    ("NewSuperuser", "ticket"): _DAYS,
    ("RecoveryWindowShort", "ticket"): _DAYS,
    ("RestoreNeverVerified", "ticket"): _DAYS,
    ("StanzaWindowShort", "ticket"): _DAYS,
    ("TrafficCollapse", "ticket"): "it compares with the week before",
    ("TransactionIdWraparound", "page"): "it takes some thousand million transactions",
}
"""Alerts that cannot be provoked in minutes, and why; `rules/tests` fires them from series."""

STILL_TO_COME: Collection[str] = ()
"""Alerts that no fault fires yet, though one could; this list may only become shorter."""


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


def findings() -> set[str]:
    """All findings of the rules."""
    return {
        rule["labels"]["finding"]
        for file in RULES.glob("*.yml")
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if rule.get("record") == "pgvigil:finding"
    }


def _of(area: str) -> set[Name]:
    groups = yaml.safe_load((RULES / f"{area}.yml").read_text())["groups"]
    return {
        (rule["alert"], rule["labels"]["severity"])
        for group in groups
        for rule in group["rules"]
        if "alert" in rule and rule["labels"]["severity"] != "none"
    }
