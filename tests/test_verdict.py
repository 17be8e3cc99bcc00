"""The page for people holds numbers against objectives just as the alerts do."""

import re
import time
from collections.abc import Iterator, Sequence

import pytest
from pgvigil import catalogue, landing, standards, verdict
from pgvigil.collect import Collector, Scrape
from pgvigil.expected import completed
from pgvigil.lane import Sheet as LaneSheet
from pgvigil.plan import Facts
from pgvigil.render import Family, Layout, Sheet, headers
from pgvigil.standards import Objective
from pgvigil.target import Target
from pgvigil.verdict import MEASURES, Measure

from lab import rules
from lab.rules import Rule

every = pytest.mark.parametrize("measure", MEASURES, ids=lambda of: f"{of.alert}-{of.objective}")


def told(*lines: str, own: Sequence[Objective] = (), in_recovery: bool = False) -> list[str]:
    """What a scrape with these samples makes of a target, in words."""
    target = Target("one", objectives=completed((*own,)))
    collector = Collector(target, catalogue.load(), Layout)
    collector.facts = Facts(180000, in_recovery=in_recovery, user="u", superuser=False)
    verdict.note(collector, scrape(*lines))
    found = verdict.judge(collector)
    broken = [f"{of.measure.standard} {of.severity} {of.value:g} {of.where}" for of in found.broken]
    return [*map(str.strip, broken), *sorted(f"{kept} kept" for kept in found.kept)]


def scrape(*lines: str) -> Scrape:
    """One that brought these samples."""
    sheets: dict[str, LaneSheet] = {}
    for line in lines:
        name = re.split(r"[ {]", line)[0]
        (query,) = (q.name for q in catalogue.load() for m in q.metrics if m.name == name)
        sheet = sheets.setdefault(query, Sheet.__new__(Sheet))
        assert isinstance(sheet, Sheet)
        family = Family(headers(name, "gauge", "It."), [f"\n{line}".encode()])
        sheet.families = [*getattr(sheet, "families", ()), family]
    return Scrape(up=True, down=None, sheets=sheets)


def read(rule: Rule) -> Iterator[str]:
    """The series that a rule reads, also by way of what is recorded."""
    for selector in rule.selectors():
        yield selector.name
        for other in rules.load():
            if other.kind == "record" and other.name == selector.name:
                yield from read(other)


@every
def test_a_number_is_held_against_what_its_alert_is_held_against(measure: Measure) -> None:
    severities = standards.ours()[measure.standard].objectives[measure.objective]
    for severity in severities.keys() & {"page", "ticket"}:
        found = [
            rule
            for rule in rules.load()
            if (rule.name, rule.labels.get("severity")) == (measure.alert, severity)
            and {measure.metric, measure.per} - {""} <= set(read(rule))
        ]
        sign = "<" if measure.below else ">"
        compared = (
            rf"{sign} on \(instance, job\) group_left \(\) "
            rf'pgvigil_objective{{standard="{measure.standard}", '
            rf'objective="{measure.objective}", severity="{severity}"}}'
        )
        assert [rule for rule in found if re.search(compared, rule.expression)], severity
        runbook = f"{landing.RUNBOOKS}/{measure.area}.md#{measure.alert.lower()}"
        assert {rule.annotations["runbook_url"] for rule in found} == {runbook}


@every
def test_what_is_judged_is_a_gauge_with_these_labels(measure: Measure) -> None:
    known = {metric.name: (metric, query) for query in catalogue.load() for metric in query.metrics}
    for name in filter(None, (measure.metric, measure.per)):
        metric, query = known[name]
        assert metric.type == "gauge"
        assert name == measure.per or set(measure.labels) <= set(query.labels)


def test_nothing_is_told_of_a_target_that_shows_nothing() -> None:
    assert told() == []
    assert told('pg_settings_value{name="work_mem"} 4096') == []


def test_the_worst_of_several_decides() -> None:
    lines = (
        'pg_stat_activity_oldest_query_seconds{datname="a",kind="query"} 2',
        'pg_stat_activity_oldest_query_seconds{datname="b",kind="query"} 301',
        'pg_stat_activity_oldest_query_seconds{datname="c",kind="backup"} 9000',
    )
    assert told(*lines) == ["QRY-5 ticket 301 b"]
    assert told(*lines[::2]) == ["QRY-5 kept"]


def test_a_page_stands_before_a_ticket() -> None:
    assert told(
        'pg_stat_activity_oldest_query_seconds{datname="a",kind="query"} 500',
        "pg_locks_longest_wait_seconds 31",
        'pg_settings_value{name="fsync"} 0',
    ) == ["INT-2 page 0", "QRY-7 ticket 31", "QRY-5 ticket 500 a"]
    assert told("pg_locks_longest_wait_seconds 301") == ["QRY-7 page 301"]


def test_a_number_of_the_targets_own_takes_the_place_of_ours() -> None:
    line = "pg_locks_longest_wait_seconds 31"
    assert told(line, own=[Objective("QRY-7", "wait_seconds", "ticket", 60)]) == ["QRY-7 kept"]


def test_a_share_needs_what_it_is_a_share_of() -> None:
    assert told("pg_connections_used 81") == []
    assert told("pg_connections_used 81", "pg_connections_usable 0") == []
    both = "pg_connections_used 81", "pg_connections_usable 100"
    assert told(*both) == ["RES-1 ticket 0.81"]


def test_of_several_backups_the_newest_counts_and_only_on_a_primary() -> None:
    name, now = "pg_record_last_good_ended_timestamp_seconds", time.time()
    old = f'{name}{{kind="backup",place="a"}} {now - 100_000}'
    new = f'{name}{{kind="backup",place="b"}} {now - 50}'
    assert told(old, new) == ["BAK-2 kept"]
    (broken,) = told(old)
    assert broken.startswith("BAK-2 page 1000")
    assert told(old, in_recovery=True) == []


def test_a_name_with_a_quote_is_shown_as_it_is() -> None:
    line = r'pg_stat_activity_oldest_query_seconds{datname="a\"b\\c,} 1",kind="query"} 400'
    assert told(line) == [r'QRY-5 ticket 400 a"b\c,} 1']


def test_a_target_that_went_down_is_not_judged_by_what_was() -> None:
    collector = Collector(Target("one", objectives=completed(())), catalogue.load(), Layout)
    verdict.note(collector, scrape("pg_locks_longest_wait_seconds 40"))
    assert verdict.judge(collector).broken
    verdict.note(collector, Scrape())
    assert verdict.judge(collector) == (frozenset(), [])
