"""Holds a figure of a page against what the superuser reads just before and just after it.

What should be seen stands in tables of words, a row for each situation; a cell holds

    -         no such series
    a number  just that
    some      0 or more, and what the superuser reads at the same moment
    under     less than 0, and what the superuser reads at the same moment
    below     0 or more, and no more than the superuser reads at the same moment
    grows     more than 0, what the superuser reads at the same moment, and more a moment later
    stands    what the superuser reads at the same moment, and the same a moment later
    last      what the superuser reads at the same moment, be it a figure of before or nothing
    any       0 or more, or nothing
    blind     0, although something is missing of which it cannot know
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, Self

Cells = Mapping[str, str]


class Look(NamedTuple):
    """A figure of a page, and between what the superuser has seen it."""

    value: float | None
    low: float = 0
    high: float = math.inf
    """Not a number, as `low`, where there was nothing to see."""

    @classmethod
    def between(
        cls, value: float | None, before: tuple[float, float], after: tuple[float, float]
    ) -> Self:
        """A figure that is how far the first of two numbers, which never fall, is ahead."""
        return cls(value, max(0, before[0] - after[1]), after[0] - before[1])

    @property
    def true(self) -> bool:
        """Whether there is a figure and it is what the superuser has seen, to 10 microseconds."""
        return self.value is not None and self.low - 1e-5 <= self.value <= self.high + 1e-5


def cells_of(table: str) -> dict[str, Cells]:
    """The rows of a table, each by column, by what the first column says."""
    (_, *columns), *rows = (re.split(r"  +", line) for line in table.strip().splitlines())
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


def fits(cell: str, first: Look, then: Look) -> bool:
    """Tell whether two looks, one after the other, are what a cell says."""
    both = first, then
    values = [look.value for look in both if look.value is not None]
    true = all(look.true for look in both)
    match cell:
        case "-":
            return not values
        case "any":
            return all(value >= 0 for value in values)
        case "below":
            return len(values) == 2 and all(
                0 <= v <= look.high for v, look in zip(values, both, strict=True)
            )
        case "some":
            return true and min(values) >= 0
        case "under":
            return true and max(values) < 0
        case "grows":
            return true and 0 < values[0] < values[1]
        case "stands":
            return true and values[0] == values[1]
        case "last":
            return all(look.true or (look.value is None and math.isnan(look.high)) for look in both)
        case "blind":
            return values == [0, 0] and 0 < first.low < then.low
        case _:
            return true and values == [float(cell), float(cell)]
