"""The table of releases in the rules knows our servers, and when they are no longer mended."""

import re
from datetime import UTC, datetime

from lab import rules
from lab.postgres import MAJORS

END = "major:postgresql_end_of_life:timestamp_seconds"
NEWEST = "major:postgresql_newest_release:version_num"


def table(name: str) -> dict[int, int]:
    """The numbers of one column of the table, by major version."""
    return {
        int(rule.labels["major"]): int(number[1])
        for rule in rules.load()
        if rule.name == name and (number := re.fullmatch(r"vector\((\d+)\)", rule.expression))
    }


def test_the_table_has_each_major_that_we_work_with() -> None:
    assert tuple(table(END)) == MAJORS
    assert {major: number // 10000 for major, number in table(NEWEST).items()} == {
        major: major for major in MAJORS
    }


def test_support_ends_on_a_thursday_in_november_five_years_after_the_first_release() -> None:
    for major, seconds in table(END).items():
        day = datetime.fromtimestamp(seconds, UTC)
        assert (day.year, day.month, day.isoweekday()) == (major + 2012, 11, 4)
        assert 8 <= day.day <= 14
