"""Every standard is proved by metrics that exist, or says what else proves it."""

from itertools import groupby

import pytest
from pgvigil import catalogue, standards
from pgvigil.own import OWN
from pgvigil.standards import Standard

STANDARDS = standards.load()
COUNTS = {
    "AVL": 7,
    "REP": 6,
    "BAK": 7,
    "QRY": 8,
    "THR": 1,
    "RES": 8,
    "STO": 4,
    "MNT": 5,
    "INT": 3,
    "IDX": 2,
    "SCH": 3,
    "SEC": 6,
    "OPS": 3,
}
"""How many standards there are of each kind; their numbers run from 1 without a gap."""

KNOWN = {metric.name for query in catalogue.load() for metric in query.metrics} | {
    own.name for own in OWN.values()
}


def test_every_standard_stands_once_in_the_order_of_its_kind() -> None:
    kinds = [kind for kind, _ in groupby(STANDARDS, key=lambda standard: standard.id[:3])]
    assert kinds == list(COUNTS)
    wanted = [f"{kind}-{number}" for kind in COUNTS for number in range(1, COUNTS[kind] + 1)]
    assert [standard.id for standard in STANDARDS] == wanted


@pytest.mark.parametrize("standard", STANDARDS, ids=lambda standard: standard.id)
def test_every_metric_that_proves_a_standard_exists(standard: Standard) -> None:
    assert [name for name in standard.metrics if name not in KNOWN] == []


@pytest.mark.parametrize("standard", STANDARDS, ids=lambda standard: standard.id)
def test_a_standard_has_metrics_where_they_can_prove_it(standard: Standard) -> None:
    provable = bool({"metric", "history", "record"} & set(standard.evidence))
    assert bool(standard.metrics) == provable


@pytest.mark.parametrize("standard", STANDARDS, ids=lambda standard: standard.id)
def test_something_follows_when_a_standard_is_not_kept(standard: Standard) -> None:
    # What a test of ours proves fails the build; the rest reaches somebody.
    assert bool(standard.response) == (set(standard.evidence) != {"test"})


@pytest.mark.parametrize("standard", STANDARDS, ids=lambda standard: standard.id)
def test_numbers_are_for_what_follows(standard: Standard) -> None:
    severities = {severity for numbers in standard.objectives.values() for severity in numbers}
    assert severities <= set(standard.response)


def test_no_two_standards_say_the_same() -> None:
    titles = [standard.title for standard in STANDARDS]
    assert len(titles) == len(set(titles))
