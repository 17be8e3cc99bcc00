"""Asks a real server what the catalogue asks, one query at a time or all, and returns the rows."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pgvigil import catalogue
from pgvigil.catalogue import Query
from pgvigil.errors import QueryFailed, Unreachable
from pgvigil.plan import Facts, Plan, Statement, Wanted, make_plan, wanted
from pgvigil.session import Session
from pgvigil.source import Answers, Ask, Rows
from pgvigil.target import Target
from psycopg import conninfo, postgres

from lab.cluster import PGVIGIL, Role
from lab.postgres import Server

PATIENCE = 30.0
"""Seconds; a server that answers later is broken."""

Value = str | float | bool | None
Row = dict[str, Value]

_NUMBERS = {
    postgres.types[name].oid
    for name in ("int2", "int4", "int8", "float4", "float8", "numeric", "oid")
}
_BOOLEAN = postgres.types["bool"].oid


class AskedError(Exception):
    """A query was refused or failed; the text is the refusal's reason or the server's message."""


@dataclass
class Outcome:
    """What became of one statement."""

    statement: Statement
    rows: list[Row] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    """Of the result, in its order."""
    failure: QueryFailed | None = None
    seconds: float = 0.0
    """Since the answer before it ended."""

    def take(self, rows: Rows) -> None:
        """Add some rows."""
        names = [(rows.fname(at) or b"").decode() for at in range(rows.nfields)]
        kinds = [rows.ftype(at) for at in range(rows.nfields)]
        self.columns = tuple(names)
        labels = self.statement.query.labels
        self.rows += (
            {
                name: _value(rows.get_value(row, at), 0 if name in labels else kinds[at])
                for at, name in enumerate(names)
            }
            for row in range(rows.ntuples)
        )


class Asker:
    """One session to one database of a server, as the exporter holds it, and a plan for it."""

    def __init__(self, runner: asyncio.Runner, session: Session, facts: Facts, plan: Plan) -> None:
        self.facts = facts
        self.plan = plan
        self.backend_pid = session.backend_pid
        self._runner = runner
        self._session = session

    def refusal(self, name: str) -> str | None:
        """Why the plan leaves a query out, or None."""
        for refusal in self.plan.refusals:
            if refusal.query.name == name:
                return f"{refusal.reason}: {refusal.detail}"
        return None

    def ask(self, names: Iterable[str] | None = None) -> dict[str, Outcome]:
        """Send the statements of these queries (None: of the whole plan) in one pipeline."""
        chosen = None if names is None else set(names)
        outcomes = [
            Outcome(statement)
            for statement in self.plan.statements
            if chosen is None or statement.query.name in chosen
        ]

        def end(position: int, failure: QueryFailed | None, seconds: float) -> None:
            outcomes[position].failure, outcomes[position].seconds = failure, seconds

        answers = Answers(lambda position, rows: outcomes[position].take(rows), end)
        asks = [Ask(o.statement.text, o.statement.query.timeout) for o in outcomes]
        self._runner.run(self._session.ask(asks, answers, _soon(self._runner)))
        return {outcome.statement.query.name: outcome for outcome in outcomes}


@contextmanager
def asking(
    server: Server,
    *,
    dbname: str = "postgres",
    role: Role | None = PGVIGIL,
    extra: Sequence[Path] = (),
    **keywords: str,
) -> Iterator[Asker]:
    """Connect as a role (None: the superuser) and plan the catalogue, of `extra` files as well.

    More keywords are libpq's, such as `sslmode`.
    """
    queries = _catalogue(tuple(extra))
    login = {} if role is None else role.login
    connection = server.conninfo(dbname=dbname, **login, **keywords)
    target = Target("lab", {k: str(v) for k, v in conninfo.conninfo_to_dict(connection).items()})
    with asyncio.Runner() as runner:
        session, facts = runner.run(_opened(target, wanted(queries)))
        try:
            yield Asker(runner, session, facts, make_plan(queries, facts))
        finally:
            session.close()


async def _opened(target: Target, to_tell: Wanted) -> tuple[Session, Facts]:
    """A session that has told its facts, as soon as the server is quick enough for its own bound.

    A machine that stands still for a second, as one among many does, makes the server cancel them.
    """
    end = asyncio.get_running_loop().time() + PATIENCE
    while True:
        session = await Session.open(target, to_tell, end)
        try:
            return session, await session.facts(end)
        except Unreachable as error:
            session.close()
            if "statement timeout" not in str(error):
                raise


def rows_of(
    server: Server,
    query_name: str,
    *,
    dbname: str = "postgres",
    role: Role | None = PGVIGIL,
    extra: Sequence[Path] = (),
) -> list[Row]:
    """All rows that a query gives in a database, columns by name, as a role (None: superuser).

    Numbers are floats, booleans bool, labels and all else text; bytes that are no UTF-8 are
    surrogates. The rows are the statement's: `top` and `max_series` choose among them later, and
    the label `datname` of a query with scope database is not there yet. Raises AskedError.
    """
    with asking(server, dbname=dbname, role=role, extra=extra) as asker:
        _known(query_name, extra)
        if refusal := asker.refusal(query_name):
            raise AskedError(refusal)
        outcome = asker.ask([query_name])[query_name]
        if outcome.failure:
            raise AskedError(outcome.failure.detail)
        return outcome.rows


def refusal_of(
    server: Server,
    query_name: str,
    *,
    dbname: str = "postgres",
    role: Role | None = PGVIGIL,
    extra: Sequence[Path] = (),
) -> str | None:
    """Why a query is not sent to a database as a role, such as `role: runs on a standby`."""
    with asking(server, dbname=dbname, role=role, extra=extra) as asker:
        _known(query_name, extra)
        return asker.refusal(query_name)


def only(rows: list[Row]) -> Row:
    """The one row of a result that has one; raises ValueError for any other."""
    (row,) = rows
    return row


def number(row: Row, column: str) -> float:
    """A value of a row that is a number; raises TypeError for any other."""
    value = row[column]
    if not isinstance(value, float):
        raise TypeError(f"{column} is {value!r}")
    return value


@cache
def _catalogue(extra: Sequence[Path]) -> tuple[Query, ...]:
    return catalogue.load(extra)


def _known(name: str, extra: Sequence[Path]) -> None:
    if name not in {query.name for query in _catalogue(tuple(extra))}:
        raise AskedError(f"the catalogue has no query {name}")


def _soon(runner: asyncio.Runner) -> float:
    return runner.get_loop().time() + PATIENCE


def _value(raw: bytes | None, kind: int) -> Value:
    if raw is None:
        return None
    if kind == _BOOLEAN:
        return raw == b"t"
    if kind in _NUMBERS:
        return float(raw)
    return raw.decode(errors="surrogateescape")
