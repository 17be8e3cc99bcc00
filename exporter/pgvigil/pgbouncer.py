"""Ask the console of a PgBouncer what it shows of itself."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import psycopg
from psycopg import pq

from pgvigil.connect import CONSOLE, NoStartupOptionsError, connect, is_console
from pgvigil.errors import Down, QueryFailed, Unreachable
from pgvigil.plan import Facts, Wanted
from pgvigil.source import CHUNK, NO_ANSWERS, Answers, Ask, Table
from pgvigil.target import Target
from pgvigil.wire import Connection, Result, Wire, failed

_PAIRS = {"config": ("key", "value"), "lists": ("list", "items"), "state": ("key", "value")} | {
    "totals": ("name", "value")
}
"""What is shown as one row for each name: the columns that hold name and value."""
_MOST = 1000
"""Names that are taken of such a table."""

_SECRETS = {"auth_ldap_options"}
"""Names whose values may hold a password."""

_RENAMED = {
    # The name by which clients know a database is `database` everywhere else.
    "databases": {"name": "database", "database": "dbname", "reserve_pool": "reserve_pool_size"},
    "users": {"name": "user"},
}
_MICROSECONDS = re.compile(r"(total|avg)_\w+_time")
_TRUTH = {b"yes": b"1", b"no": b"0"}

_NOT_ALLOWED = "name the user in stats_users of pgbouncer.ini, and RELOAD"
_WRONG_KIND = "what answers there is no PgBouncer; mind host and port, or drop kind: pgbouncer"


class Console(Connection):
    """One connection to the console, which understands the simple protocol alone."""

    def __init__(self, pgconn: pq.abc.PGconn, wanted: Wanted) -> None:
        super().__init__(pgconn)
        self._wanted = wanted
        self._facts: Facts | None = None

    @classmethod
    async def open(cls, target: Target, wanted: Wanted, deadline: float) -> Self:
        """A new connection to `target`, or Unreachable with the reason; done before `deadline`."""
        # What the environment or a service's file may add: the console refuses settings, and
        # cannot tell libpq whether it may write.
        fixed = {"options": "", "target_session_attrs": "any"}
        there = replace(target, connection={**target.connection, **fixed})
        try:
            pgconn = await connect(there, deadline, guarded=False)
        except NoStartupOptionsError:
            detail = "it refuses the connection's settings; mind PGOPTIONS and the connection"
            raise Unreachable(Down.OTHER, detail) from None
        except Unreachable as error:
            raise _told(error) from None
        if not is_console(pgconn):
            pgconn.finish()
            raise Unreachable(Down.WRONG_KIND, _WRONG_KIND)
        return cls(pgconn, wanted)

    @property
    def known(self) -> bool:
        """Whether it has told its facts."""
        return self._facts is not None

    async def facts(self, deadline: float) -> Facts:
        """The facts alone; raises as `ask` does."""
        return await self.ask((), NO_ANSWERS, deadline)

    async def ask(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> Facts:
        """Ask one after the other, and hand over what comes; the facts.

        The console knows no timeouts, and one process does all: so there is the deadline alone.
        Raises as every source does.
        """
        try:
            async with asyncio.timeout_at(deadline), Wire(self._pgconn) as wire:
                if self._facts is None:
                    self._facts = await self._learn(wire)
                elif not asks:
                    await self._show(wire, "version", lambda _: None)
                for position, ask in enumerate(asks):
                    await self._answer(wire, position, ask, answers)
        except psycopg.Error as error:
            self.close()
            raise Unreachable(Down.CONNECTION_LOST, " ".join(str(error).split())) from None
        except Unreachable as error:
            self.close()
            raise _told(error) from None
        except BaseException:
            self.abandon()  # a console that has not answered would answer the next question
            raise
        return self._facts

    async def _answer(self, wire: Wire, position: int, ask: Ask, answers: Answers) -> None:
        begun = time.perf_counter()
        word = ask.text.removeprefix("show ")
        failure = await self._show(wire, word, lambda table: answers.rows(position, table))
        answers.end(position, failure, time.perf_counter() - begun)

    async def _learn(self, wire: Wire) -> Facts:
        """The version, and which columns there are: both are the process's own for good."""
        columns: dict[str, frozenset[str]] = {}
        for word in self._wanted.tables:
            found: list[Table] = []
            if not await self._show(wire, word, found.append):
                names = (found[0].fname(n) or b"" for n in range(found[0].nfields))
                columns[word] = frozenset(name.decode() for name in names)
        version = (self._pgconn.parameter_status(b"server_version") or b"").removesuffix(CONSOLE)
        return Facts(
            version=self._pgconn.server_version,
            in_recovery=False,
            user=self._pgconn.user.decode(errors="replace"),
            database=self._pgconn.db.decode(errors="replace"),
            kind="pgbouncer",
            product=f"PgBouncer {version.decode(errors='replace')}",
            columns=columns,
        )

    async def _show(
        self, wire: Wire, word: str, take: Callable[[Table], None]
    ) -> QueryFailed | None:
        """Hand over what it shows, in tables of at most CHUNK rows, at least one."""
        self._pgconn.send_query(f"SHOW {word.upper()}".encode())
        self._pgconn.set_chunked_rows_mode(CHUNK)
        wire.flush()
        failure: QueryFailed | None = None
        pairs: list[Result] = []
        taken = False
        while result := await wire.result():
            failure = failure or failed(result)
            if failure or not result.nfields:
                continue
            if word in _PAIRS:
                pairs.append(result)
            elif result.ntuples or not taken:
                take(_table(word, result))
                taken = True
                await asyncio.sleep(0)
        if pairs and not failure:
            take(_turned(pairs, *_PAIRS[word]))
        return failure


def _table(word: str, rows: Result) -> Table:
    """What was shown, as the catalogue knows it.

    Without what the console says of itself, names made one, times in seconds, and with a column
    `info` that is always 1.
    """
    renamed = _RENAMED.get(word, {})
    given = [(rows.fname(n) or b"").decode(errors="replace") for n in range(rows.nfields)]
    names = [renamed.get(name, name) for name in given]
    read: list[Callable[[int], bytes | None]] = []
    for column, name in enumerate(names):
        fraction = names.index(f"{name}_us") if f"{name}_us" in names else None
        read.append(_reader(rows, word, name, column, fraction))
    known_by = names.index("database") if "database" in names else None
    kept = [
        row
        for row in range(rows.ntuples)
        if known_by is None or rows.get_value(row, known_by) != b"pgbouncer"
    ]
    return Table([*names, "info"], [[*(value(row) for value in read), 1] for row in kept])


def _reader(
    rows: Result, word: str, name: str, column: int, fraction: int | None
) -> Callable[[int], bytes | None]:
    """What gives the value of a column in a row."""
    value = rows.get_value
    if fraction is not None:
        return lambda row: _seconds(value(row, column), value(row, fraction))
    if word == "stats" and _MICROSECONDS.fullmatch(name):
        return lambda row: _seconds(b"0", value(row, column))
    if word == "version":
        return lambda row: (value(row, column) or b"").removeprefix(b"PgBouncer ")
    return lambda row: value(row, column)


def _turned(results: Sequence[Result], name: str, of: str) -> Table:
    """A table of names and values as one row, with a column for each name."""
    found: dict[str, bytes | None] = {}
    for rows in results:
        given = [rows.fname(n) for n in range(rows.nfields)]
        if name.encode() not in given or of.encode() not in given:
            continue
        key, value = given.index(name.encode()), given.index(of.encode())
        for row in range(min(rows.ntuples, _MOST - len(found))):
            column, raw = rows.get_value(row, key) or b"", rows.get_value(row, value)
            found[column.decode(errors="replace")] = _TRUTH.get(raw, raw) if raw else None
    for secret in _SECRETS:
        found.pop(secret, None)
    return Table([*found, "info"], [[*found.values(), 1]])


def _seconds(seconds: bytes | None, microseconds: bytes | None) -> bytes | None:
    """Both as seconds, without losing a digit; None where one is no number."""
    if not seconds or not microseconds or not (seconds + microseconds).isdigit():
        return None
    whole = int(seconds) * 1_000_000 + int(microseconds)
    return b"%d.%06d" % divmod(whole, 1_000_000)


def _told(error: Unreachable) -> Unreachable:
    """Why a console could not be asked, by what it said, with what is to be done."""
    if error.reason is Down.INVALID_CATALOG_NAME:
        return Unreachable(Down.WRONG_KIND, f"{error.detail}: {_WRONG_KIND}")
    if error.reason is Down.INVALID_AUTHORIZATION:
        return Unreachable(error.reason, f"{error.detail}: {_NOT_ALLOWED}")
    return error
