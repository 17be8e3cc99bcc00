"""Compute metrics from the rows of one run and those before, where a row alone tells too little."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

from pgvigil import ranking
from pgvigil.errors import QueryFailed
from pgvigil.latency import Entry, Histogram, Statements
from pgvigil.plan import TOP_ROWS, Statement
from pgvigil.render import Layout, Sheet, label_values, number, shown_values, template
from pgvigil.session import Rows

OTHER = b"other"
"""The databases for which `max_series` leaves no room are one."""

_CONTROLS = 10_000
"""How many statements are known as transaction control at most."""

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

    The first label is that of the query; a limit adds another.
    """

    columns: Sequence[str]
    """What a row must have."""
    lists: str
    """The label that names a limit."""

    def __init__(
        self, statement: Statement, constant: Mapping[str, str], limits: Sequence[float]
    ) -> None:
        super().__init__(statement, constant)
        self.limits = sorted({*statement.query.limits, *limits})
        self.metrics = statement.metrics
        self.with_limit = template(constant, (*self.shape.labels, self.lists))
        spelled = [number(limit) for limit in self.limits]
        self.spelled = [(text if "." in text else f"{text}.0").encode() for text in spelled]
        """The limits as OpenMetrics spells them."""

    def sheet(self) -> "ComputedSheet":
        """A sheet for one run."""
        return ComputedSheet(self)

    def begin(self) -> None:
        """A run begins."""

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
        missing = [name for name in self._computed.columns if name not in names]
        if missing:
            raise QueryFailed("wrong_columns", f"not in the result: {', '.join(missing)}")
        places = [names.index(name) for name in self._computed.columns]
        value, take = rows.get_value, self._computed.take
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
                form = computed.with_limit if len(labels) > 1 else computed.template
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
    """The executor time of each database's statements, from pg_stat_statements(false)."""

    columns = (
        *("key", "queryid", "datname", "calls", "total", "smallest", "largest"),
        *("mean", "deviation", "since", "extremes_since", "started", "reset_time", "control"),
    )
    lists = "le"

    def __init__(
        self, statement: Statement, constant: Mapping[str, str], limits: Sequence[float]
    ) -> None:
        super().__init__(statement, constant, limits)
        self.statements = Statements(limit * 1000 for limit in self.limits)
        self.control: set[bytes] = set()
        """The queryids of BEGIN, COMMIT and their like, as far as sessions have shown them."""
        each = 3 * len(self.limits) + len(self.metrics) + 2
        self.room = max(1, statement.query.max_series // each - 1)
        """Databases that have a histogram of their own."""
        self.names: dict[bytes, str] = {}
        self.present: set[str] = set()
        self._begun = False
        self._control: bytes | None = None

    def begin(self) -> None:
        """A run begins; its first row tells of which server."""
        self._begun = False
        self.present = set()

    def take(self, row: Sequence[bytes | None]) -> None:
        """Take one entry, or a database that has none."""
        key, queryid, database, calls, total, smallest, largest, mean, deviation, *more = row
        since, extremes_since, started, reset, control = more
        if not self._begun:
            self._begun = True
            self.statements.begin(_text(started), _text(reset))
            self._learn(control)
        where = self._named(database)
        self.present.add(where)
        if key is None or queryid in self.control:
            return
        try:
            entry = Entry(
                int(calls or 0),
                float(total or 0),
                float(smallest or 0),
                float(largest or 0),
                float(mean or 0),
                float(deviation or 0),
                _text(since),
                _text(extremes_since),
            )
        except ValueError:
            raise QueryFailed("not_a_number", "an entry is not made of numbers") from None
        self.statements.take(key, where, entry)

    def end(self, *, whole: bool) -> None:
        """All entries were taken; what belongs to a database that is gone goes."""
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
        if column == "estimate":
            for limit, count in zip(self.spelled, histogram.buckets, strict=True):
                yield "_bucket", (name, limit), count
            yield "_bucket", (name, b"+Inf"), histogram.calls
            yield "_sum", (name,), histogram.total / 1000
            yield "_count", (name,), histogram.calls
        elif column in ("lower", "upper"):
            for limit, bound in zip(self.spelled, getattr(histogram, column), strict=True):
                yield "", (name, limit), bound
        else:
            yield "", (name,), getattr(histogram, column)

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

    def _learn(self, control: bytes | None) -> None:
        if control and control != self._control and len(self.control) < _CONTROLS:
            self._control = control
            self.control.update(control.strip(b"{}").split(b","))


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


KINDS: Mapping[str, type[Computed]] = {
    "executor_time": ExecutorTime,
    "running_statements": RunningStatements,
}
"""By what a query computes."""


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
