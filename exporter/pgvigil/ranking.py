"""Choose which of many rows stand on their own, and add up the rest as rows named other."""

import heapq
import math
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from pgvigil.errors import QueryFailed
from pgvigil.plan import TOP_ROWS, Statement
from pgvigil.render import Layout, Sheet, label_block, number, shown_values, write_samples
from pgvigil.source import Rows

OTHER = b"other"

Key = tuple[bytes, ...]
"""The values of a row's labels."""


def layout(statement: Statement, constant: Mapping[str, str]) -> Layout:
    """How a statement's rows become samples; `constant` labels stand on every sample."""
    return Ranking(statement, constant) if statement.query.top else Layout(statement, constant)


class Ranking(Layout):
    """Which rows of a statement stand on their own, from one run to the next.

    A row that an order of `by` brings in stays for `hold` seconds, so that series do not come and
    go. What the counters of the others gain is added up: on the row other they never fall, though
    rows join and leave it.
    """

    def __init__(self, statement: Statement, constant: Mapping[str, str]) -> None:
        super().__init__(statement, constant)
        top = statement.query.top
        assert top
        self.top = top
        metrics = statement.metrics
        self.counts = [i for i, metric in enumerate(metrics) if metric.type == "counter"]
        columns = [metric.column for metric in metrics]
        # An order may be by a column that is no metric; it is read behind the others.
        known = [name for name in top.by if name in columns]
        self.extra = [name for name in top.by if name not in columns]
        self.orders = [columns.index(name) for name in known]
        self.orders += range(len(columns), len(columns) + len(self.extra))
        self.gauges = [(i, metric.other) for i, metric in enumerate(metrics) if metric.other]
        self.within = [i for i, name in enumerate(self.shape.labels) if name in top.within]
        count = len(self.shape.labels)
        self._last = max((i for i in range(count) if i not in self.within), default=0)
        self._single = None if self.within else (*[b""] * (count - 1), OTHER)
        self.earned: dict[Key, float] = {}
        """When a row last came in by itself, on the monotonic clock."""
        self.chosen: frozenset[Key] | None = None
        """The rows that stood on their own in the last run; None before the first, and as long
        as all have room."""
        self.before: dict[Key, array[float]] | None = None
        """The values of each row in the last run; None where they are not needed, or not yet."""
        self.totals: dict[Key, list[float]] = {}
        """With `gains`: the counters of the rows that stand on their own, as they are shown."""
        self.gained: dict[Key, list[float]] = {}
        """The counters of each row named other."""

    def sheet(self) -> "RankedSheet":
        """A sheet for one run."""
        return RankedSheet(self)

    def group(self, key: Key) -> Key:
        """The labels of the row named other to which a row belongs when it is not chosen."""
        if self._single:
            return self._single
        return tuple(
            OTHER if i == self._last else value if i in self.within else b""
            for i, value in enumerate(key)
        )


class RankedSheet(Sheet):
    """The samples of one run of a statement whose rows are chosen from.

    Unlike its base it writes when all rows are there.
    """

    def __init__(self, ranking: Ranking) -> None:
        super().__init__(ranking)
        self._ranking = ranking
        self._values: dict[Key, array[float]] = {}
        self._gains: dict[Key, list[float]] = {}
        """What each row's counters have gained since the last run."""

    def add(self, rows: Rows) -> None:
        """Take some rows; raises QueryFailed when a declared column is not among theirs."""
        ranking = self._ranking
        labels, columns = ranking.shape.find(rows)
        names = [rows.fname(column) or b"" for column in range(rows.nfields)]
        extra = [name.encode() for name in ranking.extra]
        if missing := [name.decode() for name in extra if name not in names]:
            raise QueryFailed("wrong_columns", f"not in the result: {', '.join(missing)}")
        places = [place for place, _ in columns]
        places += [names.index(name) for name in extra]
        value = rows.get_value
        self.rows += rows.ntuples
        if self.rows >= TOP_ROWS:
            self.drop("max_series")  # what the server cut, nobody can count
        # As they are shown: what differs in what is cut or replaced would be one series.
        shown = [shown_values([value(row, at) for row in range(rows.ntuples)]) for at in labels]
        for row, key in enumerate(zip(*shown, strict=True)):
            if key in self._values:
                self.drop("duplicate", len(self.families))
                continue
            raw = [value(row, place) for place in places]
            numbers = array("d", map(_as_number, raw))
            if lost := sum(map(_lost, raw[: len(columns)], numbers)):
                self.drop("not_a_number", lost)
            self._values[key] = numbers
            if ranking.before is not None:
                self._gain(key, numbers, ranking.before.get(key))

    def _gain(self, key: Key, numbers: "array[float]", before: "array[float] | None") -> None:
        """Book what a row's counters have gained; a row that is new has gained all it has."""
        counts = self._ranking.counts
        if before is None:
            gains = [0.0 if math.isnan(numbers[i]) else numbers[i] for i in counts]
        else:
            after_fall = 0.0 if self._ranking.top.gains else 1.0
            gains = [
                # What is NULL now or was then compares as false.
                now - then if now > then else now * after_fall if now < then else 0.0
                for now, then in [(numbers[i], before[i]) for i in counts]
            ]
        if any(gains):
            self._gains[key] = gains

    def finish(self) -> None:
        """Choose, and write."""
        ranking, values = self._ranking, self._values
        room = ranking.shape.max_rows
        crowded = len(values) > room
        if crowded:
            groups = {ranking.group(key) for key in values}
            chosen = self._choose(max(0, room - len(groups)), groups)
            self._add_up(frozenset(chosen))
        else:
            # All stand on their own; should they grow too many, what they had is history.
            chosen, ranking.chosen, ranking.gained = list(values), None, {}
        if ranking.top.gains:
            none = [0.0] * len(ranking.counts)
            ranking.totals = {
                key: [
                    total + gain
                    for total, gain in zip(
                        ranking.totals[key], self._gains.get(key, none), strict=True
                    )
                ]
                if key in ranking.totals
                else none
                for key in chosen
            }
        self._write(chosen)
        ranking.before = values if crowded or ranking.top.gains else None
        self._values, self._gains = {}, {}
        super().finish()

    def _choose(self, room: int, groups: Set[Key]) -> list[Key]:
        """The rows that come in now, then those that came in of late, the last first.

        A row that is called as one of `groups` never does: it would stand twice.
        """
        ranking, now = self._ranking, time.monotonic()
        measures = self._measures()
        for measure in measures:
            top = heapq.nlargest(ranking.top.rows, measure, key=measure.__getitem__)
            ranking.earned |= dict.fromkeys(top, now)
        oldest = now - ranking.top.hold
        ranking.earned = {
            key: moment
            for key, moment in ranking.earned.items()
            if moment >= oldest and key in self._values and key not in groups
        }
        order = sorted(ranking.earned, key=lambda key: -ranking.earned[key])
        for key in order[room:]:
            del ranking.earned[key]
        return order[:room]

    def _measures(self) -> list[dict[Key, float]]:
        """For each order the rows that may come in by it, with what counts."""
        ranking = self._ranking
        measures: list[dict[Key, float]] = []
        for column in ranking.orders:
            if column in ranking.counts and ranking.before is not None:
                place = ranking.counts.index(column)
                measure = {key: gains[place] for key, gains in self._gains.items()}
            else:
                measure = {key: numbers[column] for key, numbers in self._values.items()}
            measures.append({key: value for key, value in measure.items() if value > 0})
        return measures

    def _add_up(self, chosen: frozenset[Key]) -> None:
        """Add to the rows named other what the rows in them have gained."""
        ranking, values = self._ranking, self._values
        gained = {}
        for group in dict.fromkeys(ranking.group(key) for key in values if key not in chosen):
            gained[group] = ranking.gained.get(group) or [0.0] * len(ranking.counts)
        gains: Iterable[tuple[Key, Sequence[float]]] = self._gains.items()
        stood = ranking.chosen or frozenset()
        if ranking.before is None and not ranking.top.gains:
            # The first time: what was before is history, which stands where its row does.
            gains = ((key, [numbers[i] for i in ranking.counts]) for key, numbers in values.items())
            stood = chosen
        for key, more in gains:
            if key in stood and key in chosen:
                continue  # what it gained stands on its own
            sums = gained.setdefault(ranking.group(key), [0.0] * len(ranking.counts))
            for place, gain in enumerate(more):
                if gain > 0:
                    sums[place] += gain
        ranking.gained, ranking.chosen = gained, chosen

    def _write(self, chosen: Sequence[Key]) -> None:
        ranking = self._ranking
        others = list(ranking.gained)
        if (room := ranking.shape.max_rows - len(chosen)) < len(others):
            # Each value of a label of `within` has one; the same stay in whatever order they come.
            others = sorted(others)[:room]
            self.drop("max_series", (len(ranking.gained) - room) * len(self.families))
        keys = [*chosen, *others]
        if not keys:
            return
        blocks = [label_block(ranking, key) for key in keys]
        gauges = self._others(frozenset(chosen)) if others else {}
        for place, (family, prefix) in enumerate(
            zip(self.families, ranking.shape.prefixes, strict=True)
        ):
            numbers = [self._values[key][place] for key in chosen]
            if place in ranking.counts:
                column = ranking.counts.index(place)
                if ranking.top.gains:
                    numbers = [
                        number if math.isnan(number) else ranking.totals[key][column]
                        for key, number in zip(chosen, numbers, strict=True)
                    ]
                numbers += [ranking.gained[group][column] for group in others]
            else:
                numbers += [gauges.get((group, place), math.nan) for group in others]
            spelled = [None if math.isnan(value) else number(value).encode() for value in numbers]
            if ranking.shape.counters[place]:
                spelled = self._counts(spelled)
            self.series += write_samples(family, prefix, blocks, spelled)

    def _others(self, chosen: frozenset[Key]) -> dict[tuple[Key, int], float]:
        """The gauges of the rows named other."""
        ranking = self._ranking
        groups: dict[Key, list[array[float]]] = {}
        for key, numbers in self._values.items():
            if key not in chosen:
                groups.setdefault(ranking.group(key), []).append(numbers)
        found: dict[tuple[Key, int], float] = {}
        for group, rows in groups.items():
            for place, how in ranking.gauges:
                column = [numbers[place] for numbers in rows]
                known = [value for value in column if value == value]
                if known:
                    found[group, place] = _TOGETHER[how](known)
        return found


def _as_number(raw: bytes | None) -> float:
    """A value as a number; NaN for NULL, and for what is none."""
    if raw is None:
        return math.nan
    try:
        return float(raw)
    except ValueError:
        return float(raw == b"t") if raw in (b"t", b"f") else math.nan


def _lost(raw: bytes | None, read: float) -> bool:
    """Whether a value was there, and is no number that could be compared or added."""
    return raw is not None and read != read


_TOGETHER: Mapping[str, Callable[[Iterable[float]], float]] = {"sum": sum, "max": max, "min": min}
