"""Rules, standards, tests and runbooks name the same things, and only what there is."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from pgvigil import standards

from lab import rules, series
from lab.rules import ROOT, Objective, Rule
from lab.series import OTHERS, TARGET

COMING: Mapping[str, str] = {
    "availability": "AVL-1 AVL-2 AVL-3 AVL-7",
    "replication": "AVL-4 AVL-5 REP-1 REP-2 REP-3 REP-4 REP-5 REP-6",
    "backup": "AVL-6 BAK-1 BAK-2 BAK-3 BAK-4 BAK-5 BAK-6 BAK-7",
    "queries": "QRY-1 QRY-2 QRY-3 QRY-4",
    "activity": "QRY-5 QRY-6 QRY-7 QRY-8 RES-1 THR-1",
    "resources": "RES-3 RES-4 RES-5 RES-6 RES-7 RES-8",
    "pooler": "RES-2",
    "storage": "STO-1 STO-2 STO-3 STO-4",
    "maintenance": "MNT-1 MNT-2 MNT-3 MNT-4 MNT-5",
    "schema": "INT-3 IDX-1 IDX-2 SCH-1 SCH-2 SCH-3",
    "security": "SEC-1 SEC-2 SEC-3 SEC-4 SEC-5 SEC-6 INT-1 INT-2",
    "exporter": "OPS-3",
}
"""Areas whose rules may still be to come, with the standards that wait for them. A standard waits
only until its area has an alert or a finding; one that belongs elsewhere moves here."""

FLOORS: Mapping[str, str] = {
    "availability": "3 5",  # probes without an answer
    "replication": "67108864",  # bytes of WAL, below which no rate tells anything
    "backup": "",
    "queries": "100 0.1",  # calls in a window; executor seconds in a second
    # Connections of a limit; transactions and sessions in a window; transactions a second then.
    "activity": "5 300 100 10",
    "resources": "100 10 3",  # blocks a second; reads a second, or checkpoints; checkpoints
    "pooler": "5 100",  # connections of a pool or limit; transactions in five minutes
    "storage": "",
    "maintenance": "",
    "schema": "",
    "security": "100",  # tables that are listed one by one
    "exporter": "0.01 3",  # seconds in a second; scrapes
}
"""Numbers that stand in a comparison though no objective has them: floors of events or of size, and
states. Each with what it counts."""

DASHBOARDS = {
    *("fleet", "instance", "queries", "activity", "replication", "backup", "storage", "schema"),
    *("security", "pooler", "standards", "exporter", "patroni", "haproxy"),
}

PARTS = [
    "What it means",
    "What it does to users",
    "How to see it",
    "What to do now",
    "For good",
    "When to call for help",
    "How it was proven",
]
"""Of a section of a runbook, in this order, each `**Part.** Text`."""

ALL = rules.load()
OURS = [rule for rule in ALL if rule.area not in OTHERS]
ALERTS = [rule for rule in ALL if rule.kind == "alert"]
FINDINGS = [rule for rule in ALL if rule.kind == "finding"]
STANDARDS = {standard.id: standard for standard in standards.load()}
AREAS = [file.stem for file in rules.files()]

every_rule = pytest.mark.parametrize("rule", OURS, ids=str)
every_alert = pytest.mark.parametrize("rule", ALERTS, ids=str)


def read_by(rule: Rule) -> set[Objective]:
    """The objectives that a rule compares with, also by way of what others record."""
    found, met, names = set(rule.objectives()), set[str](), {s.name for s in rule.selectors()}
    while new := names - met:
        met |= new
        for other in OURS:
            if other.kind == "record" and other.name in new:
                found |= set(other.objectives())
                names |= {selector.name for selector in other.selectors()}
    return found


def waiting() -> set[str]:
    """The standards whose area has neither alerts nor findings yet."""
    begun = {rule.area for rule in (*ALERTS, *FINDINGS)}
    return {id_ for area, ids in COMING.items() if area not in begun for id_ in ids.split()}


@every_rule
def test_a_rule_reads_series_and_labels_that_exist(rule: Rule) -> None:
    known = series.labels()
    selectors = list(rule.selectors())
    assert [s.name for s in selectors if s.name not in known] == []
    faults = [
        f"{selector.name} has no label {label}"
        for selector in selectors
        for label, _, _ in selector.matchers
        if label not in known[selector.name]
    ]
    read = TARGET.union(rule.replaced(), *(known[selector.name] for selector in selectors))
    faults += [f"nothing here has the label {label}" for label in {*rule.grouped()} - read]
    assert faults == []


@every_rule
def test_numbers_come_from_the_standards(rule: Rule) -> None:
    floors = FLOORS.get(rule.area, "").split()
    assert [number for number in rule.compared() if number not in floors] == []
    known = {Objective(*of[:3]) for of in standards.objectives()}
    assert set(rule.objectives()) - known == set()


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_every_join_says_on_which_labels(rule: Rule) -> None:
    assert list(rule.unmatched()) == []


@every_alert
def test_an_alert_has_the_labels_that_routes_and_reports_need(rule: Rule) -> None:
    assert set(rule.labels) == {"severity", "area", "standard", "alert_type"}
    assert rule.labels["severity"] in ("page", "ticket", "none")
    assert rule.labels["alert_type"] in ("symptom", "cause")
    assert rule.labels["area"] == rule.area
    assert rule.labels["standard"] in STANDARDS
    if rule.area not in OTHERS and rule.labels["severity"] != "none":
        assert rule.labels["severity"] in STANDARDS[rule.labels["standard"]].response


@every_alert
def test_an_alert_is_explained(rule: Rule) -> None:
    told = rule.annotations
    assert set(told) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert "{{" not in told["summary"]
    assert "{{" in told["description"]
    page = f"https://github.com/pgvigil/pgvigil/blob/main/docs/runbooks/{rule.area}.md"
    assert told["runbook_url"] == f"{page}#{rule.name.lower()}"
    shown = re.fullmatch(
        r"/d/pgvigil-(\w+)\?var-(\w+)=\{\{ \$labels\.(\w+) \}\}", told["dashboard_url"]
    )
    assert shown
    assert shown[1] in DASHBOARDS
    variables = ("cluster",) if rule.area in OTHERS else ("instance", "system_identifier")
    assert shown[2] == shown[3]
    assert shown[2] in variables


@every_alert
def test_an_alert_tells_the_numbers_it_compares_with(rule: Rule) -> None:
    told, read = set(rule.told_objectives()), read_by(rule)
    assert told <= read
    assert bool(told) == bool(read)
    standard = rule.labels["standard"], rule.labels["severity"]
    assert {(of.standard, of.severity) for of in read} <= {standard}


@every_alert
def test_an_alert_waits_for_a_second_scrape_or_looks_back_over_several(rule: Rule) -> None:
    looks_back = "[" in rule.expression or any(":" in s.name for s in rule.selectors())
    assert rule.wait or looks_back
    assert rule.wait in ("", "0m") or re.fullmatch(r"[1-9]\d*[mhd]", rule.wait)


@every_alert
def test_an_alert_is_shown_to_fire_and_to_be_silent(rule: Rule) -> None:
    # Where a test names no severity, it must be the only one.
    single = [other.name for other in ALERTS].count(rule.name) == 1
    shown = {(rule.name, rule.labels["severity"])} | ({(rule.name, "")} if single else set())
    assert shown & rules.fired(rule.area)
    assert {rule.name, "*"} & rules.silent(rule.area)


@every_alert
def test_an_alert_has_a_section_that_says_what_to_do(rule: Rule) -> None:
    section = dict(rules.sections(rule.area))[rule.name]
    assert re.findall(r"^\*\*(.+?)\.\*\*", section, re.M) == PARTS


@pytest.mark.parametrize("area", AREAS)
def test_a_runbook_has_the_sections_of_its_alerts_and_no_other(area: str) -> None:
    names = [heading for heading, _ in rules.sections(area)]
    assert sorted(names) == sorted({rule.name for rule in ALERTS if rule.area == area})


def test_no_two_areas_have_an_alert_of_the_same_name() -> None:
    places = {(rule.name, rule.area) for rule in ALERTS}
    assert len(places) == len({name for name, _ in places})
    ids = [(rule.name, rule.labels["severity"]) for rule in ALERTS]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("rule", FINDINGS, ids=str)
def test_a_finding_names_its_standard_and_is_shown(rule: Rule) -> None:
    assert set(rule.labels) == {"standard", "finding", "area"}
    assert rule.labels["area"] == rule.area
    assert "finding" in STANDARDS[rule.labels["standard"]].response
    assert rule.name in rules.found(rule.area)
    assert {(of.standard, of.severity) for of in read_by(rule)} <= {
        (rule.labels["standard"], "finding")
    }


@pytest.mark.parametrize("standard", STANDARDS.values(), ids=lambda standard: standard.id)
def test_a_standard_names_the_rules_that_keep_it(standard: standards.Standard) -> None:
    for kept, named in ((ALERTS, standard.alerts), (FINDINGS, standard.findings)):
        assert {r.name for r in kept if r.labels["standard"] == standard.id} == set(named)
    if standard.id not in waiting():
        severities = {r.labels["severity"] for r in ALERTS if r.name in standard.alerts}
        severities |= {"finding"} if standard.findings else set()
        assert {"page", "ticket", "finding"} & set(standard.response) <= severities


def test_an_alert_keeps_one_standard() -> None:
    named = [name for standard in STANDARDS.values() for name in standard.alerts]
    assert len(named) == len(set(named))


def test_each_number_of_a_standard_is_one_that_a_rule_compares_with() -> None:
    read = {of for rule in OURS for of in rule.objectives()}
    idle = {Objective(*of[:3]) for of in standards.objectives()} - read
    assert {of for of in idle if of.standard not in waiting()} == set()


def test_what_waits_for_its_rules_is_a_standard_that_stands_once() -> None:
    ids = [id_ for of_area in COMING.values() for id_ in of_area.split()]
    assert len(ids) == len(set(ids))
    assert set(STANDARDS) - set(ids) == {"OPS-1", "OPS-2"}  # a test, and a report


@pytest.mark.parametrize("file", rules.files(), ids=lambda file: file.stem)
def test_groups_are_called_after_their_area(file: Path) -> None:
    names = re.findall(r"^  - name: (.+)$", file.read_text(), re.M)
    assert names
    assert all(re.fullmatch(rf"pgvigil-{file.stem}(-\w+)?", name) for name in names)


WRONG = {
    "a > 5": ("compared", ["5"]),
    "5 < a": ("compared", ["5"]),
    "a > bool 0.8": ("compared", ["0.8"]),
    "a == 1 or on (b) c < 0": ("compared", []),
    "increase(a[5m]) > on (b) c": ("compared", []),
    "a / b": ("unmatched", ["a / b"]),
    "sum by (c) (a{d='x'}) and sum(b)": ("unmatched", ["d"]),
    "time() - a > on (b) c": ("unmatched", []),
    "a * -1 - on (b) (14.4 * (1 - c))": ("unmatched", []),
    "a unless b": ("unmatched", ["a unless b"]),
}


@pytest.mark.parametrize("expression", WRONG)
def test_what_an_expression_lacks_is_seen(expression: str) -> None:
    method, expected = WRONG[expression]
    rule = rules.make("queries", {"record": "a:b:c", "expr": expression})
    found = list(getattr(rule, method)())
    assert len(found) == len(expected)
    assert all(part in whole for part, whole in zip(expected, found, strict=True))


def test_selectors_and_labels_are_read_as_prometheus_does() -> None:
    expression = """
      # a comment, with(a_word)
      sum by (datname) (rate(pg_a_total{datname!="x", kind=~"b|c"}[5m] offset 1d)) / on (datname)
      group_left () pg_b:rate5m unless on () {__name__="pg_c"} > 0
    """
    rule = rules.make("queries", {"record": "a:b:c", "expr": expression})
    read = [(selector.name, selector.matchers) for selector in rule.selectors()]
    assert read == [
        ("pg_a_total", (("datname", "!=", "x"), ("kind", "=~", "b|c"))),
        ("pg_b:rate5m", ()),
        ("", (("__name__", "=", "pg_c"),)),
    ]
    assert list(rule.grouped()) == ["datname", "datname"]


def test_the_dashboards_that_exist_are_among_those_that_alerts_point_to() -> None:
    assert {file.stem for file in (ROOT / "grafana").glob("*.json")} <= DASHBOARDS


CONDITIONS = re.findall(
    r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs" / "conditions.md").read_text(), re.M
)
"""What others alert on, by number, and what tells of it here."""


def test_each_condition_that_others_have_is_covered_or_said_to_be_noise() -> None:
    assert [int(number) for number, _ in CONDITIONS] == list(range(1, 110))
    told = [text for _, text in CONDITIONS]
    noise = [text for text in told if text.startswith("noise")]
    unknown = [text for text in told if text.startswith("unknown")]
    covered = [text for text in told if text not in noise + unknown]
    assert all("`" in text for text in covered)
    said = (ROOT / "docs" / "conditions.md").read_text()
    assert f"{len(covered)} of them are covered, {len(noise)} are noise" in said
    assert len(covered) >= 100
    assert len(unknown) == 1


@pytest.mark.parametrize(("number", "text"), CONDITIONS, ids=[number for number, _ in CONDITIONS])
def test_a_condition_names_alerts_and_findings_that_there_are(number: str, text: str) -> None:
    names = {rule.name for rule in [*ALERTS, *FINDINGS]}
    assert set(re.findall(r"`(\w+)`", text)) <= names
