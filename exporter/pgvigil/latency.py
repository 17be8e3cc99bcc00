"""Turn the counters of pg_stat_statements into histograms of executor time, with sure bounds."""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import erf, exp, inf, lgamma, log, sqrt
from typing import NamedTuple

_EPSILON = 2.0**-52
"""The distance from 1 to the next float8: what the server's own arithmetic loses."""
_SLACK = 1e-6
"""Of a call: so much may rounding take from or add to a bound before it counts as a whole one."""
_BOUNDED, _TAILED = 4.0, 8.0
"""How far the largest call may lie above where two modes would have the upper one: up to the first
the calls are bounded or have two modes, from the second on there is a long thin tail."""
_FLOOR = 0.98
"""Where the log-normal begins, as a share of the smallest call."""
_STEPS = 60


class Entry(NamedTuple):
    """An entry of pg_stat_statements as one read has it; times in milliseconds, as there."""

    calls: int
    total: float
    smallest: float
    largest: float
    mean: float
    deviation: float
    since: bytes = b""
    """When it was made, where the server tells (extension 1.11 of PostgreSQL 17); else empty."""
    extremes_since: bytes = b""
    """When smallest and largest were reset, likewise."""


NONE = Entry(0, 0.0, inf, -inf, 0.0, 0.0)
"""What an entry was before its first call."""


@dataclass(slots=True)
class Histogram:
    """How many calls took at most so long, added up over entries and reads.

    Each list has a place for each limit and a last one for no limit. The calls that are sure are
    kept at the first place they are in; `buckets`, `lower` and `upper` add those up.
    """

    limits: Sequence[float]
    """In milliseconds, rising."""
    calls: int = 0
    total: float = 0.0
    """Milliseconds."""
    undecided: int = 0
    """Calls of entries of which a limit could not tell how many took longer."""
    unresolved: int = 0
    """Gains whose variance was below the server's own rounding."""
    recreated: int = 0
    """Entries that were another one at the read before: reset, or thrown out and made again."""
    evicted: int = 0
    """Entries that were there at the read before and are gone."""
    sure: list[int] = field(default_factory=list)
    guessed: list[float] = field(default_factory=list)
    least: list[int] = field(default_factory=list)
    most: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        places = len(self.limits) + 1
        self.sure = [0] * places
        self.guessed, self.least, self.most = [0.0] * places, [0] * places, [0] * places

    @property
    def buckets(self) -> list[float]:
        """For each limit, how many calls took at most so long, as estimated; rising."""
        return [a + b for a, b in zip(self._summed(), self.guessed[:-1], strict=True)]

    @property
    def lower(self) -> list[int]:
        """At least how many."""
        return [a + b for a, b in zip(self._summed(), self.least[:-1], strict=True)]

    @property
    def upper(self) -> list[int]:
        """At most how many."""
        return [a + b for a, b in zip(self._summed(), self.most[:-1], strict=True)]

    def _summed(self) -> list[int]:
        sums, total = [], 0
        for count in self.sure[:-1]:
            total += count
            sums.append(total)
        return sums

    def add(self, before: Entry, now: Entry) -> bool | None:
        """Add the calls that an entry has gained since it was `before`.

        True when their variance is known, False when it drowns in the server's rounding, and None,
        with nothing added, when no calls can have made this of that: the entry is another one.
        """
        calls0, total0, _, _, mean0, deviation0, _, _ = before
        calls1, total1, _, _, _, deviation1, _, _ = now
        calls, total = calls1 - calls0, total1 - total0
        mean = max(total / calls, 0.0)
        near = _EPSILON * total1 * (1 + calls / 2) / calls  # how far the mean may be from there
        if calls == 1:
            self.calls += 1
            self.total += total
            place = bisect_left(self.limits, mean - near)
            end = bisect_left(self.limits, mean + near)
            self.sure[end] += 1
            for between in range(place, end):  # a limit as near as that cannot tell
                self.most[between] += 1
                self.guessed[between] += mean <= self.limits[between]
            return True
        # Chan's formula for merging two sets, run backwards: PostgreSQL keeps centred moments.
        shift = mean - mean0
        old = calls0 * deviation0 * deviation0
        new = calls1 * deviation1 * deviation1
        square = new - old - shift * shift * calls0 * calls / calls1
        blur = _EPSILON * (4 + calls / 2) * (old + new) + calls * near * (2 * abs(shift) + near)
        if square < -blur:
            return None
        self.calls += calls
        self.total += total
        known = square > blur
        self._spread(before, now, calls, mean, near, max(square, 0.0), blur)
        return known

    def put(self, low: float, high: float, calls: int) -> None:
        """Add calls of which somebody has counted that they took over `low` and at most `high`."""
        self.calls += calls
        end = bisect_left(self.limits, high)
        self.sure[end] += calls
        between = range(bisect_right(self.limits, low), end)
        for place in between:
            self.most[place] += calls
            self.guessed[place] += calls * (self.limits[place] - low) / (high - low)
        if between:
            self.undecided += calls

    def _spread(  # noqa: C901  (one pass over the limits; calls would cost as much again)
        self,
        before: Entry,
        now: Entry,
        calls: int,
        mean: float,
        near: float,
        square: float,
        blur: float,
    ) -> None:
        """Put calls of this mean, known to `near`, and sum of squares, to `blur`, into buckets."""
        variance = square / calls
        widest = (square + blur) / calls
        narrowest = (square - blur) / calls if square > blur else 0.0
        # No value lies further from the mean of so many (Samuelson), nor beyond the extremes.
        reach = sqrt(widest * (calls - 1)) + near
        low, high = mean - reach, mean + reach
        _, _, smallest0, largest0, _, _, _, extremes_since0 = before
        _, _, smallest, largest, _, _, _, extremes_since = now
        if extremes_since == extremes_since0 or before is NONE:
            if smallest < smallest0 or smallest > low:
                low = smallest
            if largest > largest0 or largest < high:
                high = largest
        if low < 0.0:
            low = 0.0
        if low > high:  # by rounding alone: all are the same
            low = high = mean
        elif mean < low:
            mean = low
        elif mean > high:
            mean = high
        limits = self.limits
        place, end = bisect_left(limits, low), bisect_left(limits, high)
        self.sure[end] += calls
        if place >= end:
            return
        # The points that, with low or high, make two values of just this mean and variance.
        with_high = mean - widest / (high - mean) if high - mean > 1e-12 * mean else mean
        with_low = mean + widest / (mean - low) if mean - low > 1e-12 * mean else mean
        fit = None
        least = most = 0
        guessed = 0.0
        decided = True
        while place < end:
            limit = limits[place]
            if widest == 0.0:
                fewest = highest = calls if limit >= mean else 0
            else:
                # The sharpest bounds there are on the share beyond a limit and the share up to it.
                tail = widest / (widest + (limit - mean) * (limit - mean))
                if limit <= with_high:
                    fewest, highest = 0, int(calls * tail + _SLACK)
                elif limit >= with_low:
                    fewest, highest = calls - int(calls * tail + _SLACK), calls
                else:
                    beyond = within = 1.0
                    if limit > low:
                        beyond -= (narrowest + (mean - limit) * (mean - high)) / (
                            (limit - low) * (high - low)
                        )
                    within -= (narrowest + (mean - low) * (mean - limit)) / (
                        (high - low) * (high - limit)
                    )
                    # Markov holds whatever rounding does to the others.
                    if limit > mean:
                        if (markov := (mean - low) / (limit - low)) < beyond:
                            beyond = markov
                    elif limit < mean and (markov := (high - mean) / (high - limit)) < within:
                        within = markov
                    fewest = 0 if beyond >= 1.0 else calls - int(calls * beyond + _SLACK)
                    highest = calls if within >= 1.0 else int(calls * within + _SLACK)
            # Both rise with the limit, and neither is beyond the other, whatever rounding says.
            if fewest < least:
                fewest = least
            if highest < most:
                highest = most
            if highest < fewest:
                highest = fewest
            least, most = fewest, highest
            if fewest == highest:
                guessed = float(fewest)
            else:
                decided = False
                if variance <= 1e-18 * mean * mean:
                    share = float(calls * (limit >= mean))
                else:
                    if fit is None:
                        fit = _fitted(now, mean, variance, low, high, with_low)
                    share = calls * _share(fit, limit)
                if share < fewest:
                    share = fewest
                elif share > highest:
                    share = highest
                if share > guessed:
                    guessed = share
            self.guessed[place] += guessed
            self.least[place] += fewest
            self.most[place] += highest
            place += 1
        if not decided:
            self.undecided += calls


class _Fit(NamedTuple):
    """A distribution with a mean, a variance, a floor and a largest value."""

    beta: float
    """How much of a beta is in it; the rest is a log-normal above a floor."""
    floor: float
    middle: float
    slope: float
    low: float = 0.0
    width: float = 0.0
    a: float = 0.0
    b: float = 0.0
    scale: float = 0.0
    """-ln B(a, b)."""


def _fitted(
    now: Entry, mean: float, variance: float, low: float, high: float, with_low: float
) -> _Fit:
    smallest = now.smallest
    floor = _FLOOR * (mean if smallest > mean else smallest)
    above = mean - floor
    spread = log(1.0 + variance / (above * above))
    middle, slope = log(above) - spread / 2, 1.0 / sqrt(2 * spread)
    largest = now.largest
    if largest < _TAILED * with_low and high > low:
        width = high - low
        centre = (mean - low) / width
        weight = centre * (1 - centre) * width * width / variance - 1
        if 0 < centre < 1 and 1e-6 < weight < 1e5:
            beta = 1.0
            if largest > _BOUNDED * with_low:
                beta = log(_TAILED * with_low / largest) / log(_TAILED / _BOUNDED)
            a, b = centre * weight, (1 - centre) * weight
            scale = lgamma(weight) - lgamma(a) - lgamma(b)
            return _Fit(beta, floor, middle, slope, low, width, a, b, scale)
    return _Fit(0.0, floor, middle, slope)


def _share(fit: _Fit, limit: float) -> float:
    """The share of calls up to a limit that lies between lowest and highest, to four digits."""
    beta, floor, middle, slope, low, width, a, b, scale = fit
    share = 0.0
    if beta < 1.0 and limit > floor:
        share = 0.5 * (1 + erf((log(limit - floor) - middle) * slope))
    if beta == 0.0:
        return share
    at = (limit - low) / width
    if not 0.0 < at < 1.0:
        return share + beta * (float(at >= 1.0) - share)
    # The regularised incomplete beta function, by Lentz' continued fraction on the side where it
    # converges.
    other = at > (a + 1.0) / (a + b + 2.0)
    if other:
        a, b, at = b, a, 1.0 - at
    d = 1.0 / (1.0 - (a + b) * at / (a + 1.0) or 1e-300)
    c, value, along = 1.0, d, a
    for step in range(1, _STEPS):
        along += 2.0
        part = step * (b - step) * at / ((along - 1.0) * along)
        d = 1.0 / (1.0 + part * d or 1e-300)
        c = 1.0 + part / c or 1e-300
        value *= c * d
        part = -(a + step) * (a + b + step) * at / (along * (along + 1.0))
        d = 1.0 / (1.0 + part * d or 1e-300)
        c = 1.0 + part / c or 1e-300
        value *= (turn := c * d)
        if 0.9999 < turn < 1.0001:
            break
    within = exp(scale + a * log(at) + b * log(1.0 - at)) * value / a
    return share + beta * ((1.0 - within if other else within) - share)


class Statements:
    """The entries of one server as last read, and the histograms of what they have gained.

    docs/latency.md tells how far to trust them.

    What was counted before the first read is history and no gain. A read is `begin`, `take` for
    each entry and `end`; of one that breaks off, what was taken stays right.
    """

    def __init__(self, limits: Iterable[float]) -> None:
        """`limits` in milliseconds."""
        self.limits = tuple(sorted(set(limits)))
        self.histograms: dict[str, Histogram] = {}
        """By whatever `take` was told."""
        self._entries: dict[Hashable, Entry] = {}
        self._next: dict[Hashable, Entry] = {}
        self._places: dict[Hashable, str] = {}
        """Where the gain of each belongs to."""
        self._whole = False
        """Whether the last read had every entry, so that one not in it was not there."""
        self._started = self._reset = b""

    def begin(self, started: bytes, reset: bytes) -> None:
        """A read begins, of a server that was started, and whose entries were reset, then."""
        if self._next:  # the last read broke off: what it had is newer
            self._entries |= self._next
            self._whole = False
        self._next = {}
        if started != self._started:
            # Another server behind the same name, or entries lost in a crash: nothing to compare.
            self._entries, self._whole = {}, False
        elif reset != self._reset:
            self._entries = {}  # what is there now was counted since
        self._started, self._reset = started, reset

    def take(self, key: Hashable, where: str, now: Entry) -> None:
        """Take one entry, whose gain belongs to the histogram `where`."""
        before = self._entries.get(key)
        self._next[key] = now
        if before is None:
            self._places[key] = where
            if not self._whole:
                return
            before = NONE
        elif now[:2] == before[:2] and now.since == before.since:
            return
        histogram = self.histograms.get(where)
        if histogram is None:
            histogram = self.histograms[where] = Histogram(self.limits)
        if before is not NONE and _replaced(before, now):
            histogram.recreated += 1
            before = NONE
        if now.calls <= before.calls:
            return
        known = histogram.add(before, now)
        if known is None:
            histogram.recreated += 1
            known = histogram.add(NONE, now)
        if not known:
            histogram.unresolved += 1

    def ignore(self, key: Hashable) -> None:
        """Take no notice of an entry any more."""
        self._entries.pop(key, None)

    def end(self, *, whole: bool) -> None:
        """The read is over; `whole` tells whether every entry was in it."""
        if whole:
            for key in self._entries.keys() - self._next.keys():
                if histogram := self.histograms.get(self._places[key]):
                    histogram.evicted += 1
            if len(self._places) > len(self._next):
                self._places = {key: self._places[key] for key in self._next}
        self._entries = self._next if whole else self._entries | self._next
        self._next = {}
        self._whole = whole


def _replaced(before: Entry, now: Entry) -> bool:
    """Whether an entry is another one than before, as far as that can be seen."""
    if now.since:
        return now.since != before.since
    return (
        now.calls < before.calls
        or now.total < before.total
        or now.smallest > before.smallest
        or now.largest < before.largest
    )
