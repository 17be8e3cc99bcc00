"""Compute metrics from the rows of one run and those before, where a row alone tells too little."""

import re
import time
from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import inf

from pgvigil import ranking
from pgvigil.errors import QueryFailed
from pgvigil.latency import Entry, Histogram, Statements
from pgvigil.plan import TOP_ROWS, Statement
from pgvigil.render import (
    Layout,
    Sheet,
    bucket_limit,
    label_values,
    number,
    shown_values,
    template,
)
from pgvigil.source import Rows

OTHER = b"other"
"""The databases for which `max_series` leaves no room are one."""

_CONTROLS = 10_000
"""How many statements are known as transaction control at most."""

_BUCKETS = {"estimate": "buckets", "lower": "lower", "upper": "upper"}
"""What a histogram of executor time counts, by the word of the catalogue."""

_Samples = Iterable[tuple[str, tuple[bytes, ...], float]]
"""Of one metric: what its name goes on with, the values of its labels, and the value."""


def layout(statement: Statement, constant: Mapping[str, str], limits: Sequence[float]) -> Layout:
    """How a statement's rows become samples.

    `constant` labels stand on every sample; `limits`, in seconds, are those of the operator's own.
    """
    kind = KINDS.get(statement.query.computes)
    return kind(statement, constant, limits) if kind else ranking.layout(statement, constant)


class Computed(Layout):
    """What is known from the runs before, and how it is written down.

    The first label, if any, is that of the query; a limit adds another.
    """

    columns: Sequence[str]
    """What a row must have."""
    server: Sequence[str] = ()
    """What a row must have besides, of which that of the first counts: it is of the server."""
    lists: str
    """The label that names a limit."""

    def __init__(
        self, statement: Statement, constant: Mapping[str, str], limits: Sequence[float]
    ) -> None:
        super().__init__(statement, constant)
        self.limits = sorted({*statement.query.limits, *limits})
        self.metrics = statement.metrics
        self.with_limit = template(constant, (*self.shape.labels, self.lists))
        self.spelled = [bucket_limit(limit).encode() for limit in self.limits]
        """The limits as OpenMetrics spells them."""
        self.own = len(self.shape.labels)
        """Labels of the query."""

    def sheet(self) -> "ComputedSheet":
        """A sheet for one run."""
        return ComputedSheet(self)

    def wanted(self, _names: Collection[str]) -> tuple[Sequence[str], Sequence[str]]:
        """`columns` and `server`, for a result that has columns of these names."""
        return self.columns, self.server

    def begin(self) -> None:
        """A run begins."""

    def learn(self, row: Sequence[bytes | None]) -> None:
        """The first row has come: its values in the order of `server`."""

    def take(self, row: Sequence[bytes | None]) -> None:
        """Take one row: its values in the order of `columns`."""
        raise NotImplementedError

    def end(self, *, whole: bool) -> None:
        """All rows were taken; `whole` tells whether the server cut none."""

    def samples(self, column: str) -> _Samples:
        """The samples of the metric that is computed under this name."""
        raise NotImplementedError


class ComputedSheet(Sheet):
    """One run of a statement from whose rows something is computed; it writes at the end."""

    def __init__(self, layout: Computed) -> None:
        super().__init__(layout)
        self._computed = layout
        layout.begin()

    def add(self, rows: Rows) -> None:
        """Take some rows; raises QueryFailed when a column is missing or holds what it cannot."""
        names = [(rows.fname(column) or b"").decode() for column in range(rows.nfields)]
        columns, server = self._computed.wanted(names)
        missing = [name for name in (*columns, *server) if name not in names]
        if missing:
            raise QueryFailed("wrong_columns", f"not in the result: {', '.join(missing)}")
        value, take = rows.get_value, self._computed.take
        if rows.ntuples and not self.rows:
            self._computed.learn([value(0, names.index(name)) for name in server])
        places = [names.index(name) for name in columns]
        for row in range(rows.ntuples):
            take([value(row, place) for place in places])
        self.rows += rows.ntuples

    def finish(self) -> None:
        """Compute, and write."""
        computed = self._computed
        computed.end(whole=self.rows < TOP_ROWS)
        if self.rows >= TOP_ROWS:
            self.drop("max_series")
        for family, metric in zip(self.families, computed.metrics, strict=True):
            chunk: list[bytes] = []
            for suffix, labels, value in computed.samples(metric.column):
                form = computed.with_limit if len(labels) > computed.own else computed.template
                chunk += (
                    f"\n{metric.name}{suffix}".encode(),
                    form % tuple(label_values([*labels])),
                )
                chunk.append(number(value).encode())
                self.series += 1
            if chunk:
                family.chunks.append(b"".join(chunk))
        super().finish()


class ExecutorTime(Computed):
    """The executor time of each database's statements.

    It is told by pg_stat_statements(false), or by the time buckets of pg_stat_monitor, which have
    counted calls by how long they took.
    """

    columns = (
        *("key", "datname", "calls", "total", "smallest", "largest"),
        *("mean", "deviation", "since", "extremes_since"),
    )
    server = ("started", "reset_time", "control")
    monitored = ("datname", "bucket", "counts", "total")
    """Of the other source: when a bucket began, and its calls by the place of their edges."""
    monitor = ("edges",)
    lists = "le"

    def __init__(
        self, statement: Statement, constant: Mapping[str, str], limits: Sequence[float]
    ) -> None:
        super().__init__(statement, constant, limits)
        self.control: set[bytes] = set()
        """The queryids of BEGIN, COMMIT and their like, as far as sessions have shown them."""
        self.missed = 0
        """Reads that did not come in time, so that a later one told of more than one interval."""
        self.names: dict[bytes, str] = {}
        self.present: set[str] = set()
        self._every = statement.query.every
        self._begun: float | None = None
        self._room = statement.query.max_series
        self._monitored = False
        self._edges: bytes | None = None
        self._between: list[tuple[float, float]] = []
        """From and to, in milliseconds, of what is counted together."""
        self._counted: float | None = None
        """When the last bucket began that was counted, by the server's clock."""
        self._newest = 0.0
        self._over: list[tuple[str, list[int], float]] = []
        """Of each bucket that this run has found to be over: where, its calls, milliseconds."""
        self._divide(self.limits)

    def _divide(self, limits: Sequence[float]) -> None:
        """Count by these limits from now on."""
        self.spelled = [bucket_limit(limit).encode() for limit in limits]
        self.statements = Statements(limit * 1000 for limit in limits)
        # A histogram is a series for each limit and three besides, where others are one.
        each = len(_BUCKETS) * (len(limits) + 2) + len(self.metrics)
        self.room = max(1, self._room // each - 1)
        """Databases that have a histogram of their own."""

    def wanted(self, names: Collection[str]) -> tuple[Sequence[str], Sequence[str]]:
        """The columns of the source that a result is from."""
        self._monitored = "edges" in names
        if self._monitored:
            return self.monitored, self.monitor
        return self.columns, self.server

    def begin(self) -> None:
        """A run begins; its first row tells of which server."""
        self.present = set()

    def learn(self, row: Sequence[bytes | None]) -> None:
        """The first row has come: when the server was started and reset, and what is no query."""
        now = time.monotonic()
        if self._begun is not None and self._every:
            self.missed += max(0, round((now - self._begun) / self._every) - 1)
        self._begun = now
        if self._monitored:
            edges = row[0] or b""
            if edges != self._edges:
                self._edges = edges
                self._between = [
                    (float(low), inf if high == b"..." else float(high))
                    for low, high in re.findall(rb"([0-9.]+) - (\.\.\.|[0-9.]+)", edges)
                ]
                own = {round(high / 1000, 9) for _, high in self._between if high < inf}
                self._divide(sorted({*self.limits, *own}))
            self._newest, self._over = self._counted or 0.0, []
            return
        started, reset, control = row
        self.statements.begin(started or b"", reset or b"")
        if control and len(self.control) < _CONTROLS:
            self.control.update(control.strip(b"{}").split(b","))

    def take(self, row: Sequence[bytes | None]) -> None:
        """Take one entry or bucket, or a database that has none."""
        if self._monitored:
            self._take_bucket(*row)
            return
        key, database, calls, total, smallest, largest, mean, deviation, since, extremes = row
        where = self._named(database)
        self.present.add(where)
        if key is None:
            return
        if self.control and key.rpartition(b" ")[2] in self.control:
            self.statements.ignore(key)
            return
        try:
            entry = Entry(
                int(calls or 0),
                float(total or 0),
                float(smallest or 0),
                float(largest or 0),
                float(mean or 0),
                float(deviation or 0),
                since or b"",
                extremes or b"",
            )
        except ValueError:
            raise QueryFailed("not_a_number", "an entry is not made of numbers") from None
        self.statements.take(key, where, entry)

    def _take_bucket(
        self, database: bytes | None, began: bytes | None, counts: bytes | None, total: bytes | None
    ) -> None:
        where = self._named(database)
        self.present.add(where)
        if began is None or not counts:
            return
        try:
            bucket, calls = float(began), [int(n) for n in counts.strip(b"{}").split(b",")]
            milliseconds = float(total or 0)
        except ValueError:
            raise QueryFailed("not_a_number", "a bucket is not made of numbers") from None
        if len(calls) > len(self._between):
            raise QueryFailed("wrong_columns", "a bucket has more places than there are edges")
        self._newest = max(self._newest, bucket)
        if self._counted is None or bucket <= self._counted:
            return  # history, or known
        self._over.append((where, calls, milliseconds))

    def _count(self) -> None:
        """Count the buckets that are over; at the run's end, as what breaks off is read anew."""
        histograms = self.statements.histograms
        for where, calls, milliseconds in self._over:
            histogram = histograms.setdefault(where, Histogram(self.statements.limits))
            for (low, high), count in zip(self._between, calls, strict=False):
                histogram.put(low, high, count)
            histogram.total += milliseconds
        self._counted, self._over = self._newest, []

    def end(self, *, whole: bool) -> None:
        """All entries were taken; what belongs to a database that is gone goes."""
        if self._monitored:
            self._count()
        else:
            self.statements.end(whole=whole)
        histograms = self.statements.histograms
        for name in self.present:
            histograms.setdefault(name, Histogram(self.statements.limits))
        if whole:
            for name in histograms.keys() - self.present - {OTHER.decode()}:
                del histograms[name]
                self.names = {raw: where for raw, where in self.names.items() if where != name}

    def samples(self, column: str) -> _Samples:
        """The samples of one metric over all databases."""
        for name, histogram in sorted(self.statements.histograms.items()):
            yield from self._of(column, name.encode(), histogram)

    def _of(self, column: str, name: bytes, histogram: Histogram) -> _Samples:
        if column in _BUCKETS:
            for limit, count in zip(
                self.spelled, getattr(histogram, _BUCKETS[column]), strict=True
            ):
                # OpenMetrics knows no parts of a call.
                yield "_bucket", (name, limit), round(count)
            yield "_bucket", (name, b"+Inf"), histogram.calls
            yield "_sum", (name,), histogram.total / 1000
            yield "_count", (name,), histogram.calls
        else:
            yield "", (name,), self.missed if column == "missed" else getattr(histogram, column)

    def _named(self, database: bytes | None) -> str:
        """Where a database's calls are counted: on its own while there is room, and then for good.

        A database that was dropped has no name.
        """
        raw = database or b""
        if raw not in self.names:
            known = len(set(self.names.values()))
            shown = shown_values([raw])[0] if raw and known < self.room else OTHER
            self.names[raw] = shown.decode()
        return self.names[raw]


class RunningStatements(Computed):
    """How many statements run for longer than each limit, from pg_stat_activity."""

    columns = ("key", "datname", "age")
    lists = "over"

    def __init__(
        self, statement: Statement, constant: Mapping[str, str], limits: Sequence[float]
    ) -> None:
        super().__init__(statement, constant, limits)
        self.counted: dict[Hashable, int] = {}
        """By statement that runs, how many limits it was seen beyond."""
        self.seen: dict[bytes, list[int]] = {}
        """By database, for each limit how many statements were seen beyond it, ever."""
        self._now: dict[bytes, list[int]] = {}
        self._running: dict[Hashable, int] = {}

    def begin(self) -> None:
        """A run begins."""
        self._now, self._running = {}, {}

    def take(self, row: Sequence[bytes | None]) -> None:
        """Take one statement that runs, or a database where none does."""
        key, database, age = row
        name = shown_values([database])[0]
        now = self._now.setdefault(name, [0] * len(self.limits))
        seen = self.seen.setdefault(name, [0] * len(self.limits))
        if key is None:
            return
        try:
            seconds = float(age or 0)
        except ValueError:
            raise QueryFailed("not_a_number", "an age is not a number") from None
        beyond = sum(limit < seconds for limit in self.limits)
        before = self.counted.get(key, 0)
        for place in range(beyond):
            now[place] += 1
            seen[place] += place >= before
        self.counted[key] = self._running[key] = max(beyond, before)

    def end(self, *, whole: bool) -> None:
        """All were taken; who was not among them runs no more."""
        if not whole:
            return
        self.counted = self._running
        self.seen = {name: counts for name, counts in self.seen.items() if name in self._now}

    def samples(self, column: str) -> _Samples:
        """The samples of one metric over all databases."""
        for name, counts in sorted((self._now if column == "now" else self.seen).items()):
            for limit, count in zip(self.spelled, counts, strict=True):
                yield "", (name, limit), count


class LoggedStatements(Computed):
    """How long the statements took that the server's log tells of."""

    columns = ("took", "skipped")
    lists = "le"

    def __init__(
        self, statement: Statement, constant: Mapping[str, str], limits: Sequence[float]
    ) -> None:
        super().__init__(statement, constant, limits)
        self.counts = [0] * (len(self.limits) + 1)
        """At the first limit they keep."""
        self.total = 0.0
        self.skipped = 0
        self.logging = False

    def take(self, row: Sequence[bytes | None]) -> None:
        """Take the durations since the last read; none where there is no log to read."""
        took, skipped = row
        self.logging = took is not None
        try:
            durations = [float(text) / 1000 for text in (took or b"").split(b",") if text]
            self.skipped += int(skipped or 0)
        except ValueError:
            raise QueryFailed("not_a_number", "a duration is not a number") from None
        for seconds in durations:
            self.counts[bisect_left(self.limits, seconds)] += 1
        self.total += sum(durations)

    def end(self, *, whole: bool) -> None:
        """There is but one row."""

    def samples(self, column: str) -> _Samples:
        """The samples of one metric."""
        if not self.logging:
            return
        if column == "skipped":
            yield "", (), self.skipped
            return
        *within, calls = accumulate(self.counts)
        for limit, count in zip(self.spelled, within, strict=True):
            yield "_bucket", (limit,), count
        yield "_bucket", (b"+Inf",), calls
        yield "_sum", (), self.total
        yield "_count", (), calls


KINDS: Mapping[str, type[Computed]] = {
    "executor_time": ExecutorTime,
    "running_statements": RunningStatements,
    "logged_statements": LoggedStatements,
}
"""By what a query computes."""
