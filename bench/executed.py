"""Reads from a server's log what it executed, and compares with it what an exporter made of it."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import NamedTuple

LOG_SETTINGS: Mapping[str, str | int | bool] = {
    # The log comes first and the counter right after it: who is loaded last ends a statement first.
    "shared_preload_libraries": "pg_stat_statements,auto_explain",
    "auto_explain.log_min_duration": 0,
    "auto_explain.log_analyze": False,
    "auto_explain.log_parameter_max_length": 0,
    "log_line_prefix": "%n [%p] %d %u %Q ",
}
"""With these a server logs each statement with the very time that pg_stat_statements adds up."""

_LINE = re.compile(
    rb"(\d+\.\d+) \[(\d+)\] (\S+) (\S+) (-?\d+) LOG:  duration: (\d+\.\d+) ms  plan:"
)
_CLOCK = 0.003
"""Seconds by which a moment of the log may be off: it has milliseconds."""
_PATIENCE = 1.0
"""A call logged so many seconds before a read is in the counters even when none came after it."""


class Call(NamedTuple):
    """A statement that ended."""

    at: float
    """When it was logged, in seconds since 1970."""
    backend: int
    database: str
    user: str
    queryid: int
    time: float
    """In the executor, in milliseconds."""


def calls(log: Path) -> Iterator[Call]:
    """All calls in a log, as they were logged."""
    with log.open("rb") as lines:
        for line in lines:
            if match := _LINE.match(line):
                at, backend, database, user, queryid, time = match.groups()
                yield Call(
                    float(at),
                    int(backend),
                    database.decode(),
                    user.decode(),
                    int(queryid),
                    float(time),
                )


class Read(NamedTuple):
    """One read of pg_stat_statements, seconds since 1970."""

    begun: float
    ended: float


@dataclass
class Window:
    """What was executed between two reads."""

    certain: list[Call] = field(default_factory=list)
    """What the later read has counted for sure, and the one before not."""
    doubtful: list[Call] = field(default_factory=list)
    """What either of the two reads may have counted, or the next one."""
    edge: set[int] = field(default_factory=set)
    """The places in `doubtful` of those that rather belong here."""

    @property
    def taken(self) -> list[Call]:
        """What was executed, each doubtful call by the moment it was logged."""
        return self.certain + [self.doubtful[place] for place in sorted(self.edge)]


def windows(executed: Iterable[Call], reads: Sequence[Read]) -> list[Window]:
    """What was executed between each read and the next; one less than reads.

    A backend logs a call before it counts it, and counts it before it logs another. So of each
    backend the last call before a read is in doubt, besides what was logged while the read ran.
    """
    ends = [read.ended + _CLOCK for read in reads]
    sure: list[list[Call]] = [[] for _ in reads]
    doubtful: list[list[Call]] = [[] for _ in reads]
    last: dict[tuple[int, int], Call] = {}
    for call in executed:
        place = bisect_left(ends, call.at)  # the first read that may have it
        if place == len(reads):
            continue
        if call.at >= reads[place].begun - _CLOCK:
            doubtful[place].append(call)
        elif call.at < reads[place].begun - _PATIENCE:
            sure[place].append(call)
        else:
            before = last.get((place, call.backend))
            if before is not None:
                sure[place].append(before)
            last[place, call.backend] = call
    for (place, _), call in last.items():
        doubtful[place].append(call)
    return [
        _window(sure[place], doubtful[place - 1], doubtful[place], reads[place - 1], reads[place])
        for place in range(1, len(reads))
    ]


def _window(
    sure: list[Call], first: Sequence[Call], second: Sequence[Call], before: Read, after: Read
) -> Window:
    # Who was logged before a read began was most likely counted by it.
    here = [call.at >= before.begun for call in first] + [call.at < after.begun for call in second]
    edge = {place for place, rather in enumerate(here) if rather}
    return Window(sure, [*first, *second], edge)


@dataclass(frozen=True)
class Told:
    """What an exporter told of one window: how many calls took at most so long, by limit."""

    limits: Sequence[float]
    """In milliseconds, rising."""
    calls: float
    estimate: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]

    def share_over(self, counts: Sequence[float], limit: float) -> float:
        """The share of calls over a limit, by one of the three."""
        return 1 - counts[self.limits.index(limit)] / self.calls


@dataclass(frozen=True)
class Verdict:
    """One window: shares of all calls, from 0 to 1."""

    at: float
    """When the window ended."""
    calls: int
    truth: float
    estimate: float
    least: float
    """So many are surely over the limit."""
    most: float
    naive: float
    """What the mean of each statement would say."""
    broken: int
    """Bounds of any limit that hold for no choice of the doubtful calls."""
    miscounted: int
    """How many calls the count is off, whatever the choice."""
    apart: int
    """How many buckets the estimate's 95th percentile lies from the true one."""
    naive_apart: int

    def right(self, share: float, allowed: float = 0.05) -> bool:
        """Whether a share leads to the true answer to "at most 5 % are over the limit"."""
        return (share <= allowed) == (self.truth <= allowed)


def judge(window: Window, told: Told, limit: float, at: float) -> Verdict | None:
    """Compare; None where nothing was executed, or nothing was told."""
    taken = window.taken
    if not taken or told.calls <= 0:
        return None
    times = sorted(call.time for call in taken)
    certain = sorted(call.time for call in window.certain)
    doubtful = sorted(call.time for call in window.doubtful)
    broken = 0
    for place, edge in enumerate(told.limits):
        # The log rounds to a thousandth of a millisecond.
        sure, more = bisect_right(certain, edge - 0.0006), bisect_right(doubtful, edge + 0.0006)
        near = bisect_right(certain, edge + 0.0006) - sure
        broken += told.upper[place] < sure
        broken += told.lower[place] > sure + near + more
    means = _means(taken)
    true_bucket = bisect_left(told.limits, quantile(times))
    return Verdict(
        at,
        len(times),
        _share_over(times, limit),
        told.share_over(told.estimate, limit),
        told.share_over(told.upper, limit),
        told.share_over(told.lower, limit),
        sum(count for mean, count in means if mean > limit) / len(times),
        broken,
        round(max(0, len(certain) - told.calls, told.calls - len(certain) - len(doubtful))),
        abs(_quantile_bucket(told) - true_bucket),
        abs(bisect_left(told.limits, _naive_quantile(means)) - true_bucket),
    )


def quantile(times: Sequence[float], share: float = 0.95) -> float:
    """A percentile of rising times: so large a share took at most so long."""
    return times[ceil(share * len(times)) - 1]


def _quantile_bucket(told: Told, share: float = 0.95) -> int:
    for place, count in enumerate(told.estimate):
        if count >= share * told.calls:
            return place
    return len(told.limits)


def _means(executed: Iterable[Call]) -> list[tuple[float, int]]:
    """The mean and the calls of each statement, by mean."""
    sums: dict[int, tuple[float, int]] = {}
    for call in executed:
        total, count = sums.get(call.queryid, (0.0, 0))
        sums[call.queryid] = total + call.time, count + 1
    return sorted((total / count, count) for total, count in sums.values())


def _naive_quantile(means: Sequence[tuple[float, int]], share: float = 0.95) -> float:
    wanted = share * sum(count for _, count in means)
    seen = 0
    for mean, count in means:
        seen += count
        if seen >= wanted:
            return mean
    raise ValueError("no statement")


def _share_over(times: Sequence[float], limit: float) -> float:
    return 1 - bisect_right(times, limit) / len(times)
