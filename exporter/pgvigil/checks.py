"""Look into every database of a restored server: does it open, and is what is in it whole."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psycopg
from psycopg import sql

from pgvigil.errors import DrillFailed, printable
from pgvigil.recovery import PORT

Connection = psycopg.Connection[tuple[object, ...]]

_MOST_TOLD = 20
"""Faults that are told of; the others are counted."""
_BLOCK_FILE = re.compile(r"(?:^|/)\d+(?:_(?:fsm|vm|init))?(?:\.\d+)?$")
_SCHEMA = "pgvigil_drill"

_RELATIONS = """
select c.oid, c.oid::pg_catalog.regclass::text, c.relkind::text, a.amname::text,
  c.relpages, pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::bigint
from pg_catalog.pg_class as c
left join pg_catalog.pg_am as a on a.oid = c.relam
left join pg_catalog.pg_index as i on i.indexrelid = c.oid
where c.relkind in ('r', 'm', 't', 'i') and c.relpersistence = 'p' and c.relispopulated
  and (i.indexrelid is null or i.indisvalid and i.indisready)
order by c.relkind <> 'i', c.oid
"""
_HEAP = """
select pg_catalog.format('block %s, item %s: %s', blkno, offnum, msg)
from {schema}.verify_heapam({oid}) limit 5
"""
_INDEX = "select {schema}.bt_index_check({oid})"
_READ = "select pg_catalog.count(*) from only {relation}"


@dataclass(slots=True)
class Findings:
    """What the checks came to."""

    databases: int = 0
    relations: int = 0
    tables: int = 0
    """Tables of which every row was looked at."""
    indexes: int = 0
    """B-trees whose order was checked by amcheck."""
    data_checksums: bool = False
    block_size: int = 8192
    queries: int = 0
    faults: list[str] = field(default_factory=list)
    more_faults: int = 0
    warnings: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Note one; beyond some they are only counted."""
        if len(self.faults) < _MOST_TOLD:
            self.faults.append(printable(" ".join(text.split())))
        else:
            self.more_faults += 1


@dataclass(frozen=True, slots=True)
class Server:
    """How the restored server is reached, and until when it may be asked."""

    socket: Path
    user: str
    major: int
    deadline: float
    """Of time.monotonic()."""

    def connect(self, database: str) -> Connection:
        """A connection in which each statement stands for itself and ends in time."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DrillFailed("the checks did not end in time")
        # What the environment says is meant for the servers that are watched.
        connection = psycopg.connect(
            host=str(self.socket),
            port=PORT,
            user=self.user,
            dbname=database,
            autocommit=True,
            application_name="pgvigil drill",
            client_encoding="UTF8",
            options="-c search_path=pg_catalog -c lock_timeout=60s",
            connect_timeout=60,
            passfile=str(self.socket / "none"),
            sslmode="disable",
            gssencmode="disable",
            channel_binding="disable",
            require_auth="none",
            target_session_attrs="any",
        )
        connection.execute(f"set statement_timeout = {int(left * 1000)}".encode())
        return connection


def look(
    server: Server, queries: Sequence[str], database: str, tell: Callable[[str], None]
) -> Findings:
    """Check all databases, then ask the operator's own queries in one; raises DrillFailed."""
    found = Findings()
    with _asked(server, "postgres") as connection:
        rows = connection.execute(
            "select datname, pg_catalog.current_setting('data_checksums') = 'on',"
            " pg_catalog.current_setting('block_size')::int"
            " from pg_catalog.pg_database where datallowconn and datconnlimit <> -2"
            " order by datname"
        ).fetchall()
    found.data_checksums, found.block_size = bool(rows[0][1]), int(str(rows[0][2]))
    for name, *_ in rows:
        try:
            _database(server, str(name), found, tell)
        except psycopg.Error as error:
            found.fault(f"{name}: {_words(error)}")
    for query in queries:
        tell(f"query {found.queries + 1} of {len(queries)}")
        _query(server, query, database, found)
    with _asked(server, "postgres") as connection:
        failures = connection.execute(
            "select coalesce(datname, 'shared objects'), checksum_failures"
            " from pg_catalog.pg_stat_database where checksum_failures > 0"
        ).fetchall()
    for where, count in failures:
        found.fault(f"{count} pages of {where} have another checksum than they should")
    return found


@contextlib.contextmanager
def _asked(server: Server, database: str) -> Iterator[Connection]:
    """A connection for what no drill goes on without; raises DrillFailed."""
    try:
        with server.connect(database) as connection:
            yield connection
    except psycopg.Error as error:
        raise DrillFailed(f"the restored server cannot be asked: {_words(error)}") from None


def recovered(server: Server) -> tuple[datetime | None, int]:
    """When the last transaction that was replayed was committed, and the size of a WAL file.

    Raises DrillFailed.
    """
    try:
        server.connect("postgres").close()
    except psycopg.Error as error:
        raise DrillFailed(
            f"the restored server lets nobody in: {_words(error)}; --superuser names a role that "
            "it has"
        ) from None
    with _asked(server, "postgres") as connection:
        ((moment, size),) = connection.execute(
            "select pg_catalog.pg_last_xact_replay_timestamp(),"
            " pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size'))"
        ).fetchall()
    return (moment if isinstance(moment, datetime) else None), int(str(size))


def _database(server: Server, name: str, found: Findings, tell: Callable[[str], None]) -> None:
    """Look at each relation of a database; raises psycopg's errors for what concerns all."""
    with server.connect(name) as connection:
        schema = _amcheck(connection, name, found)
        rows = connection.execute(_RELATIONS.encode()).fetchall()
        for position, (oid, relation, kind, method, expected, pages) in enumerate(rows):
            tell(f"database {printable(name)}: relation {position + 1} of {len(rows)}")
            if kind != "i" and int(str(expected)) > int(str(pages)):
                found.warnings.append(
                    f"{name}: {relation} has {pages} pages, and had {expected} when it was counted"
                )
            check = _check(server, str(kind), str(method), schema)
            if check is None:
                continue
            statement = sql.SQL(check).format(
                schema=sql.SQL(schema or ""),
                oid=sql.Literal(oid),
                relation=sql.SQL(str(relation)),
            )
            try:
                told = connection.execute(statement).fetchall()
            except psycopg.Error as error:
                if connection.closed:
                    raise
                found.fault(f"{name}: {relation}: {_words(error)}")
                continue
            if check == _HEAP:
                for (text,) in told:
                    found.fault(f"{name}: {relation}: {text}")
            if kind == "i":
                found.indexes += 1
            else:
                found.tables += 1
        found.relations += len(rows)
    found.databases += 1


def _check(server: Server, kind: str, method: str, schema: str | None) -> str | None:
    """The statement that looks at each row or entry of a relation; None when there is none."""
    if kind == "i":
        return _INDEX if schema and method == "btree" else None
    return _HEAP if schema and method == "heap" and server.major >= 14 else _READ


def _amcheck(connection: Connection, name: str, found: Findings) -> str | None:
    """The quoted schema of amcheck in a database, where it is made if it can be had."""
    try:
        connection.execute(f"create schema if not exists {_SCHEMA}".encode())
        connection.execute(f"create extension if not exists amcheck with schema {_SCHEMA}".encode())
        connection.execute(b"alter extension amcheck update")
    except psycopg.Error as error:
        if connection.closed:
            raise
        found.warnings.append(
            f"{name}: without amcheck tables are only read, and indexes not: {_words(error)}"
        )
        return None
    rows = connection.execute(
        "select pg_catalog.quote_ident(n.nspname) from pg_catalog.pg_extension as e"
        " join pg_catalog.pg_namespace as n on n.oid = e.extnamespace where e.extname = 'amcheck'"
    ).fetchall()
    return str(rows[0][0])


def _query(server: Server, query: str, database: str, found: Findings) -> None:
    """Ask one of the operator's own; its last statement must return one true value."""
    shown = printable(" ".join(query.split()))
    shown = shown if len(shown) <= 60 else f"{shown[:59]}\N{HORIZONTAL ELLIPSIS}"
    found.queries += 1
    try:
        with server.connect(database) as connection:
            cursor = connection.execute(query.encode())
            while cursor.nextset():
                pass
            row = cursor.fetchone() if cursor.description else None
    except psycopg.Error as error:
        found.fault(f"{database}: query {shown!r}: {_words(error)}")
        return
    if row is None or row[0] is not True:
        told = "no row" if row is None else repr(row[0])
        found.fault(f"{database}: query {shown!r} returned {told}, and not true")


def torn(data: Path, block_size: int) -> Iterator[str]:
    """The relations' files that do not end with a whole page."""
    for root in (data / "base", data / "global", *(data / "pg_tblspc").glob("*/PG_*")):
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if not (_BLOCK_FILE.search(name) and path.is_file()):
                continue
            if (size := path.stat().st_size) % block_size:
                yield f"{path.relative_to(data)} ends within a page, after {size} bytes"


def _words(error: psycopg.Error) -> str:
    text = error.diag.message_primary or str(error)
    return printable(" ".join(text.split())) or type(error).__name__
