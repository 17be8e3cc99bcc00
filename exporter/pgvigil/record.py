"""Write down on a server what a job has done, where the exporter reads it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import psycopg
from psycopg import generators, pq, waiting

from pgvigil.connect import NoStartupOptionsError, connect
from pgvigil.errors import Down, QueryFailed, Unreachable, printable
from pgvigil.target import Target

KINDS = ("backup", "restore_verification", "failover_drill", "integrity_check", "attestation")
"""What may be written down."""

PATIENCE = 15.0
"""Seconds that writing may take, connecting included."""

PLACE_LENGTH, TOOL_LENGTH, NOTE_LENGTH = 100, 60, 1000
"""Characters that the table has room for."""

_BEGIN = b"""begin read write;
set local search_path = pg_catalog;
set local lock_timeout = '2s';
set local statement_timeout = '5s';
set local idle_in_transaction_session_timeout = '5s';
set local synchronous_commit = local"""
"""In the transaction, where a pooler leaves them to us. No timeout bounds a commit that waits for a
synchronous standby, so it waits for none."""

# The server's clock serves where the job's is not told: ages are reckoned by the former. Of a job
# whose clock is ahead only the start may be told.
_INSERT = b"""insert into pgvigil.record
  (kind, place, ok, started, ended, size_bytes, recovery_point, window_start, tool, note)
select $1, $2, $3::boolean,
  coalesce($4::timestamptz, at.ended - pg_catalog.make_interval(secs => $5::float8)), at.ended,
  $7::int8, $8::timestamptz, $9::timestamptz, $10, $11
from (
  select coalesce($6::timestamptz, greatest($4::timestamptz, pg_catalog.clock_timestamp())) as ended
) as at"""

REFUSALS = {
    "record_kind": f"the kind must be one of {', '.join(KINDS)}",
    "record_place": f"the place may have {PLACE_LENGTH} characters at most",
    "record_tool": f"the tool may have {TOOL_LENGTH} characters at most",
    "record_note": f"the note may have {NOTE_LENGTH} characters at most",
    "record_size_bytes": "the size must not be below 0",
    "record_order": "it ended before it started; mind the clocks of both machines",
    "record_started": "it started before the year 2000",
    "record_ended": "it ended before the year 2000 or more than 10 minutes in the future, by the "
    "server's clock; mind the job's",
    "record_recovery_point": "the recovery point lies before the year 2000 or more than 10 minutes "
    "in the future, by the server's clock",
    "record_window_start": "the start of the window lies before the year 2000, after the recovery "
    "point or in the future",
}
"""What the table refuses, by the name it has for that."""

_REMEDIES = {
    "42501": "this role may not write there; grant it pgvigil_record, or the role that was chosen "
    "in its place",
    "42P01": "there is no table pgvigil.record in this database; run what `pgvigil grants "
    "--record` prints, in the database that the exporter connects to",
    "42703": "the table pgvigil.record has other columns than this program knows; run what "
    "`pgvigil grants --record` prints",
}
_REMEDIES["3F000"] = _REMEDIES["42P01"]
_STANDBY = (
    "this is a standby; records are written on the primary: name all servers of the cluster, as in "
    "host=db1,db2, and the primary among them is found"
)


@dataclass(frozen=True, slots=True)
class Record:
    """What a job has done; times have a zone."""

    kind: str
    """One of KINDS."""
    ok: bool
    place: str = ""
    """Which repository, region or disk it concerns; becomes a label, so one of few."""
    started: datetime | None = None
    """When absent, as long before the end as `lasted` says."""
    ended: datetime | None = None
    """When absent, now by the server's clock."""
    lasted: float | None = None
    """Seconds; of no account where `started` is known."""
    size_bytes: int | None = None
    recovery_point: datetime | None = None
    """Up to when one can recover, or has recovered."""
    window_start: datetime | None = None
    """The oldest point one can recover to."""
    tool: str = ""
    note: str = ""


async def write(target: Target, record: Record) -> None:
    """Add a row to pgvigil.record on the primary among the target's servers.

    Raises Unreachable where there is none, and QueryFailed with the remedy where it refuses.
    """
    deadline = asyncio.get_running_loop().time() + PATIENCE
    only_primary = {**target.connection, "target_session_attrs": "primary"}
    try:
        pgconn = await connect(replace(target, connection=only_primary), deadline, guarded=False)
    except NoStartupOptionsError:
        detail = "a pooler refuses the options of the connection string"
        raise Unreachable(Down.OTHER, detail) from None
    except Unreachable as error:
        if "hot standby" not in error.detail:
            raise
        raise Unreachable(error.reason, _STANDBY) from None
    try:
        async with asyncio.timeout_at(deadline):
            await _run(pgconn, _BEGIN)
            await _run(pgconn, _INSERT, _values(record))
            await _run(pgconn, b"commit")
    except TimeoutError:
        raise Unreachable(Down.TIMEOUT, "the server did not answer in time") from None
    except psycopg.Error as error:
        raise Unreachable(Down.CONNECTION_LOST, " ".join(str(error).split())) from None
    finally:
        pgconn.finish()


def _values(record: Record) -> Sequence[bytes | None]:
    values: tuple[str | datetime | float | None, ...] = (
        *(record.kind, record.place, str(record.ok)),
        *(record.started, record.lasted, record.ended),
        *(record.size_bytes, record.recovery_point, record.window_start),
        *(record.tool, record.note),
    )
    return [None if value is None else _text(value).encode() for value in values]


def _text(value: str | datetime | float) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


async def _run(
    pgconn: pq.abc.PGconn, text: bytes, values: Sequence[bytes | None] | None = None
) -> None:
    """Send one statement and await its end."""
    if values is None:
        pgconn.send_query(text)
    else:
        pgconn.send_query_params(text, values)
    results = await waiting.wait_async(generators.execute(pgconn), pgconn.socket)
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise _failure(result)


def _failure(result: pq.abc.PGresult) -> QueryFailed:
    """What the server refuses, with the remedy; the row itself is not repeated."""

    def told(field: pq.DiagnosticField) -> str:
        return (result.error_field(field) or b"").decode(errors="replace")

    sqlstate = told(pq.DiagnosticField.SQLSTATE)
    message = printable(told(pq.DiagnosticField.MESSAGE_PRIMARY))
    constraint = told(pq.DiagnosticField.CONSTRAINT_NAME)
    remedy = REFUSALS.get(constraint) or _REMEDIES.get(sqlstate)
    return QueryFailed(constraint or sqlstate, remedy or message, sqlstate)
