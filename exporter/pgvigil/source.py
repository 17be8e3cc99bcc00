"""Say what a target of any kind is asked, and how its answers come."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self

from pgvigil.certificate import Peer
from pgvigil.errors import QueryFailed
from pgvigil.plan import Facts, Wanted
from pgvigil.target import Target

CHUNK = 1000
"""Rows that are handed over at once; bounds memory and the time the loop stands still."""


class Rows(Protocol):
    """Some rows of a result, at most CHUNK of them: text, by position. libpq's results are such."""

    @property
    def ntuples(self) -> int:
        """How many rows there are."""

    @property
    def nfields(self) -> int:
        """How many columns each has."""

    def fname(self, column_number: int, /) -> bytes | None:
        """A column's name."""

    def ftype(self, column_number: int, /) -> int:
        """The OID of a column's type in PostgreSQL; 0 where there is none."""

    def get_value(self, row_number: int, column_number: int, /) -> bytes | None:
        """A value as PostgreSQL would write it; None for NULL."""


class Table:
    """Rows that stand in no server's result."""

    __slots__ = ("_columns", "_rows")

    def __init__(
        self, columns: Sequence[str], rows: Sequence[Sequence[str | bytes | float | None]]
    ) -> None:
        """Each row has a value for each column; a boolean stands as 1 or 0."""
        self._columns = [column.encode() for column in columns]
        self._rows = [[_written(value) for value in row] for row in rows]

    @property
    def ntuples(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    @property
    def nfields(self) -> int:
        """How many columns each has."""
        return len(self._columns)

    def fname(self, column_number: int, /) -> bytes | None:
        """A column's name."""
        return self._columns[column_number]

    def ftype(self, column_number: int, /) -> int:  # noqa: ARG002  (the same for all)
        """No type: what a number is shows when it is read."""
        return 0

    def get_value(self, row_number: int, column_number: int, /) -> bytes | None:
        """A value as text; None for NULL."""
        return self._rows[row_number][column_number]


def _written(value: str | bytes | float | None) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    return str(int(value) if isinstance(value, bool) else value).encode()


class Ask(NamedTuple):
    """One statement to send."""

    text: str
    timeout: float
    """Seconds the server may spend on it."""


class Answers(NamedTuple):
    """What to call while the answers to some statements come in, by their position."""

    rows: Callable[[int, Rows], None]
    end: Callable[[int, QueryFailed | None, float], None]
    """The statement's fault, if any, and the seconds since the answer before it ended."""


NO_ANSWERS = Answers(lambda _position, _rows: None, lambda _position, _failure, _seconds: None)


class Source(Protocol):
    """An open way to a target, of whatever kind that is.

    It belongs to one task at a time. After `abandon` or a lost connection it is `closed` and of no
    further use.
    """

    opened: float
    """When, on the monotonic clock."""

    @classmethod
    async def open(cls, target: Target, wanted: Wanted, deadline: float) -> Self:
        """A new one to `target`, or Unreachable with the reason; done before `deadline`.

        `deadline` is a time of the running loop's clock.
        """

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""

    @property
    def known(self) -> bool:
        """Whether it has told its facts."""

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""

    @property
    def peer(self) -> Peer | None:
        """Who shows a certificate at the other end; None without TLS."""

    async def facts(self, deadline: float) -> Facts:
        """The facts alone; raises as `ask` does."""

    async def ask(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> Facts:
        """Ask all, hand over the answers as they come, and return the facts.

        When the facts equal those of the last call, the same object comes back.

        Raises TimeoutError at `deadline` (what came until then was handed over; it is closed) and
        Unreachable when the target cannot be asked any more (it is closed).
        """

    def still_there(self) -> bool:
        """Whether it is alive as far as this end can tell without asking."""

    def close(self) -> None:
        """End it at once."""

    def abandon(self) -> None:
        """End it though something may be under way at the other end, and have that cancelled."""

    def cut(self) -> None:
        """End it under whoever hangs in it."""
