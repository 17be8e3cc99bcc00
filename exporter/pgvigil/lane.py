"""Book what became of each query of a target, and stand between each query and all the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import structlog

from pgvigil.catalogue import Query
from pgvigil.errors import CONFLICT, QueryFailed
from pgvigil.plan import Statement
from pgvigil.source import Answers, Ask, Rows

LIFETIME = 600.0
"""Seconds after which a connection is made anew: a backend's memory grows with its age, and so the
way to connect is tried now and then (postgres_exporter #694, #436)."""

QUIET = 3600.0
"""Seconds for which a query that cannot work here is not sent again, for the server log's sake."""

_CANNOT_WORK = ("0A", "3D", "3F", "42")
"""SQLSTATE classes that the next run would meet again: not supported, not there, not allowed."""

_log = structlog.get_logger()


class Sheet(Protocol):
    """What the rows of one run of one statement are written on."""

    rows: int
    series: int
    """The samples written so far."""
    dropped: dict[str, int]
    """The samples that were left out, by reason."""

    def add(self, rows: Rows) -> None:
        """Take some rows; raises QueryFailed when they are not what the catalogue declares."""

    def finish(self) -> None:
        """All rows were taken."""


class Layout(Protocol):
    """Gives the sheets for the runs of one statement."""

    def sheet(self) -> Sheet:
        """A sheet for one run."""


MakeLayout = Callable[[Statement, Mapping[str, str]], Layout]
"""Says how a statement's rows are written down, with which labels besides its own."""


@dataclass(slots=True)
class Tally:
    """What one query has done on one target since the program started."""

    seconds: float = 0.0
    rows: dict[str, int] = field(default_factory=dict)
    """Those of the last result, by database; the server's own is ``''``."""
    failing: frozenset[str] = frozenset()
    """The databases in which its last run gave no result."""
    failures: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether each last run of the query gave a result."""
        return bool(self.rows) and not self.failing


class Rest(NamedTuple):
    """A query that proved impossible somewhere."""

    until: float
    """A time of the monotonic clock."""
    failure: QueryFailed


class Ledger:
    """The books of one target."""

    def __init__(self, target: str) -> None:
        self.tallies: dict[str, Tally] = {}
        self._target = target
        self._resting: dict[tuple[str, str], Rest] = {}

    def resting(self) -> Mapping[tuple[str, str], Rest]:
        """Queries that proved impossible, by name and database, and rest."""
        now = time.monotonic()
        self._resting = {key: rest for key, rest in self._resting.items() if rest.until > now}
        return self._resting

    def failing(self, query: str, database: str) -> bool:
        """Whether the last run of a query in a database gave no result."""
        tally = self.tallies.get(query)
        return tally is not None and database in tally.failing

    def wake(self, database: str = "") -> None:
        """Try again what was impossible: something has changed."""
        for key in [key for key in self._resting if key[1] == database]:
            del self._resting[key]

    def forget(self, database: str) -> None:
        """A database is not there any more."""
        self.wake(database)
        for tally in self.tallies.values():
            tally.rows.pop(database, None)
            tally.failing -= {database}

    def settle(
        self, query: Query, database: str, sheet: Sheet, failure: QueryFailed | None, took: float
    ) -> None:
        """Book what one run of one query came to."""
        tally = self.tallies.setdefault(query.name, Tally())
        tally.seconds += took
        for reason, count in sheet.dropped.items():
            tally.dropped[reason] = tally.dropped.get(reason, 0) + count
        if failure is None:
            tally.rows[database] = sheet.rows
            if database in tally.failing:  # else each query of each target had an empty set
                tally.failing -= {database}
            return
        if database not in tally.failing or not tally.failures.get(failure.reason):
            _log.warning(
                "a query failed",
                target=self._target,
                query=query.name,
                **({"database": database} if database else {}),
                reason=failure.reason,
                detail=failure.detail,
            )
        tally.failures[failure.reason] = tally.failures.get(failure.reason, 0) + 1
        tally.failing |= {database}
        tally.rows.pop(database, None)
        if failure.sqlstate.startswith(_CANNOT_WORK) or failure.reason == "wrong_columns":
            self._resting[query.name, database] = Rest(time.monotonic() + QUIET, failure)


class Reception:
    """Takes the answers to the statements of one pipeline.

    `done` is called with each statement that gave a result; `alive` at each sign of the server.
    """

    def __init__(
        self,
        ledger: Ledger,
        database: str,
        work: Sequence[tuple[Statement, Sheet]],
        done: Callable[[Statement, Sheet], None],
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.asks = [Ask(statement.text, statement.query.timeout) for statement, _ in work]
        self._ledger = ledger
        self._database = database
        self._work = work
        self._done = done
        self._alive = alive
        self.cancelled: set[str] = set()
        """The queries that stood in the way of what a standby replays; they may not next time."""
        self._faults: dict[int, QueryFailed] = {}
        self._ended = 0

    @property
    def answers(self) -> Answers:
        """What to call with the answers."""
        # Kept here they would lead back here: all that was written would stay until the garbage
        # collector comes, which then takes a third of the processor for it.
        return Answers(self._rows, self._end)

    def _rows(self, position: int, rows: Rows) -> None:
        self._alive()
        if position not in self._faults:
            self._guarded(position, lambda: self._work[position][1].add(rows))

    def _end(self, position: int, failure: QueryFailed | None, seconds: float) -> None:
        self._alive()
        self._ended = position + 1
        statement, sheet = self._work[position]
        if failure is None and position not in self._faults:
            self._guarded(position, sheet.finish)
        failure = failure or self._faults.get(position)
        self._ledger.settle(statement.query, self._database, sheet, failure, seconds)
        if failure is None:
            self._done(statement, sheet)
        elif failure.sqlstate == CONFLICT:
            self.cancelled.add(statement.query.name)

    def _guarded(self, position: int, write: Callable[[], None]) -> None:
        try:
            write()
        except QueryFailed as failure:
            self._faults[position] = failure
        except Exception as error:  # noqa: BLE001  the wall: one query's oddity stays its own
            query = self._work[position][0].query.name
            _log.exception("a result could not be read", query=query)
            self._faults[position] = QueryFailed("unreadable", type(error).__name__)

    def give_up(self) -> None:
        """Book the statements that a deadline left unanswered."""
        for statement, sheet in self._work[self._ended :]:
            failure = QueryFailed("unanswered", "the deadline came first")
            self._ledger.settle(statement.query, self._database, sheet, failure, 0.0)
