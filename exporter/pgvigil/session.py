"""Hold one guarded connection to a server and ask it many things in one round trip."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import psycopg
from psycopg import generators, pq, waiting

from pgvigil import facts
from pgvigil.connect import (
    GUARDS,
    LATER,
    STATEMENT_TIMEOUT,
    NoStartupOptionsError,
    connect,
    is_console,
    libpq,
    pointer,
)
from pgvigil.errors import AGAIN, CONFLICT, Down, QueryFailed, Unreachable
from pgvigil.plan import Facts, Wanted
from pgvigil.source import CHUNK, NO_ANSWERS, Answers, Ask, Rows
from pgvigil.target import Target
from pgvigil.wire import Connection, Wire, failed

_STALE_PREPARED = {"26000", "0A000"}
"""SQLSTATEs after which a prepared statement is prepared anew: gone, or its columns changed."""

_CANCELS = 4
"""How many cancel requests may be on their way at once, over all targets."""
_cancelling: set[asyncio.Task[None]] = set()

_NEWER = ((140000, "idle_session_timeout"), (170000, "transaction_timeout"))
"""What would end our session, and leave a line in the server's log each time, where somebody set it
for everybody; with the version that has it first. Others bound what we do."""

_WRONG_KIND = (
    "a PgBouncer's console answers there: name another database, or say kind: pgbouncer in the file"
)
_IN_THE_WAY = "what the server replays has cancelled the question for its facts each time"
_OUT_OF_STEP = "the answers do not fit the questions; something between us has mixed them up"
_TUPLES = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.TUPLES_CHUNK)


@dataclass(frozen=True, slots=True)
class _Part:
    """One command of a segment; only the answers to `rows` concern the asker."""

    rows: bool
    prepares: str | None = None


class Session(Connection):
    """One connection with its guards, its prepared statements and its last facts.

    It belongs to one task at a time. `open` makes one; after `abandon` or a lost connection it is
    `closed` and of no further use.
    """

    def __init__(self, pgconn: pq.abc.PGconn, wanted: Wanted, *, pooled: bool) -> None:
        self.pooled = pooled
        """No session state: a pooler stands between, so settings travel with each statement."""
        super().__init__(pgconn)
        self._facts_text = facts.statement(wanted)
        self._facts_raw = b""
        self._facts: Facts | None = None
        self._prepared: dict[str, str] = {}
        self._names = 0
        self._later = {key: GUARDS[key] for key in LATER}
        if not pooled:
            self._later |= {key: "0" for since, key in _NEWER if pgconn.server_version >= since}
        if pgconn.parameter_status(b"server_encoding") == b"SQL_ASCII":
            # The server would check each byte as UTF-8, and names may be anything.
            self._later["client_encoding"] = "SQL_ASCII"

    @classmethod
    async def open(cls, target: Target, wanted: Wanted, deadline: float) -> "Session":
        """A new session to `target`, or Unreachable with the reason; done before `deadline`.

        `deadline` is a time of the running loop's clock.
        """
        pooled = target.pooler
        try:
            pgconn = await connect(target, deadline, guarded=not pooled)
        except NoStartupOptionsError:
            pooled = True
            pgconn = await connect(target, deadline, guarded=False)
        if is_console(pgconn):
            pgconn.finish()
            raise Unreachable(Down.WRONG_KIND, _WRONG_KIND)
        return cls(pgconn, wanted, pooled=pooled)

    @property
    def _sure(self) -> bool:
        """Whether this session's state is ours: direct, as the first facts have shown.

        Until then nothing may stay behind on a connection that a pooler gives to the next.
        """
        return not self.pooled and self._facts is not None

    @property
    def known(self) -> bool:
        """Whether it has told its facts."""
        return self._facts is not None

    @property
    def backend_pid(self) -> int:
        """The process at the other end."""
        return self._pgconn.backend_pid

    def abandon(self) -> None:
        """End the connection though a statement may be running, and have that cancelled.

        The cancel request goes out in the background: to a server that does not answer it may
        take seconds, and nobody waits for it.
        """
        if self.closed:
            return
        request = self._pgconn.cancel_conn() if len(_cancelling) < _CANCELS else None
        self._pgconn.finish()
        if request:
            task = asyncio.get_running_loop().create_task(_cancel(request))
            _cancelling.add(task)
            task.add_done_callback(_cancelling.discard)

    async def facts(self, deadline: float) -> Facts:
        """The facts alone; raises as `ask` does."""
        return await self.ask((), NO_ANSWERS, deadline)

    async def ask(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> Facts:
        """Send all statements at once, hand over the answers as they come, return the facts.

        The facts are asked first, in the same round trip. When they equal those of the last call,
        the same object comes back.

        Raises TimeoutError at `deadline` (what came until then was handed over; the session is
        abandoned) and Unreachable when the connection breaks (it is closed).
        """
        try:
            async with asyncio.timeout_at(deadline):
                if self._facts is None:
                    await self._first_facts(answers, deadline)
                    if not asks and self._facts:
                        return self._facts
                await self._pipeline(asks, answers, deadline)
        except psycopg.Error as error:
            # Before anything was read: libpq already knew, or learnt on sending, that it is over.
            self.close()
            raise Unreachable(Down.CONNECTION_LOST, " ".join(str(error).split())) from None
        except BaseException:
            # Also when the task is cancelled: half a pipeline leaves no usable connection.
            self.abandon()
            raise
        assert self._facts
        return self._facts

    async def _first_facts(self, answers: Answers, deadline: float) -> None:
        """Ask the facts alone: whose guards hold here decides how all others may be sent."""
        for _ in range(1 + AGAIN):
            await self._pipeline((), answers, deadline)
            if self._facts:
                return
        raise Unreachable(Down.OTHER, _IN_THE_WAY)

    async def _pipeline(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> None:
        left = max(0.05, deadline - asyncio.get_running_loop().time())
        bound = min(STATEMENT_TIMEOUT, left)
        parameters = [_milliseconds(bound), str(not self._sure).encode(), b"%d" % self.backend_pid]

        def queue(position: int) -> list[_Part]:
            if position < 0:
                return self._send(self._facts_text, bound, None, parameters)
            ask = asks[position]
            return self._send(ask.text, min(ask.timeout, left), bound, None)

        positions = range(-1, len(asks))
        self._pgconn.enter_pipeline_mode()
        # A pooler gets one at a time: PgBouncer 1.18 may take a connection away between two that
        # are under way, and then other clients of its pool get our answers, and we get theirs.
        queued = {} if self.pooled else {position: queue(position) for position in positions}
        told: list[bytes] = []
        async with Wire(self._pgconn) as wire:
            clock = time.perf_counter()
            wire.flush()
            for position in positions:
                parts = queued.get(position)
                if parts is None:
                    parts = queue(position)
                    wire.flush()
                if position < 0:
                    failure = await self._answer(wire, parts, partial(_keep, told))
                    self._learn(told, failure)
                else:
                    failure = await self._answer(wire, parts, partial(answers.rows, position))
                    self._forget(asks[position].text, failure)
                now = time.perf_counter()
                if position >= 0:
                    answers.end(position, failure, now - clock)
                clock = now
        self._pgconn.exit_pipeline_mode()

    async def _answer(
        self, wire: "Wire", parts: Sequence[_Part], take: Callable[[Rows], None]
    ) -> QueryFailed | None:
        """Read what comes back for one segment, up to its sync; the failure, if it failed."""
        failure: QueryFailed | None = None
        taken = False
        for part in parts:
            # libpq refuses the mode for a command that an error before it has skipped.
            if part.rows and not failure:
                self._pgconn.set_chunked_rows_mode(CHUNK)
            while result := await wire.result():
                if result.status == pq.ExecStatus.PIPELINE_SYNC:
                    raise Unreachable(Down.CONNECTION_LOST, _OUT_OF_STEP)
                failure = failure or failed(result)
                if failure or not part.rows or result.status not in _TUPLES:
                    continue
                # Chunks are followed by an empty result, which then says nothing new.
                if result.ntuples or not taken:
                    take(result)
                    taken = True
                if result.ntuples == CHUNK:
                    await asyncio.sleep(0)
            if part.prepares and failure:
                self._prepared.pop(part.prepares, None)
        sync = await wire.result()
        if sync is None or sync.status != pq.ExecStatus.PIPELINE_SYNC:
            raise Unreachable(Down.CONNECTION_LOST, _OUT_OF_STEP)
        return failure

    def _send(
        self, text: str, timeout: float, current: float | None, values: list[bytes] | None
    ) -> list[_Part]:
        """Queue one segment: what its settings need, the statement, and the sync after it."""
        pgconn = self._pgconn
        parts: list[_Part] = []
        if self.pooled:
            settings: dict[str, str | float] = {**_POOLED, **self._later}
            settings["statement_timeout"] = timeout
            pgconn.send_query_params(_set(settings, local=True), None)
            parts.append(_Part(rows=False))
        elif self._later:
            # For good once we know that the session is ours.
            pgconn.send_query_params(_set(self._later, local=not self._sure), None)
            parts.append(_Part(rows=False))
            self._later = {} if self._sure else self._later
        if not self.pooled and current is not None and abs(timeout - current) > 0.0005:
            # Not SET LOCAL: outside a transaction block that writes a warning to the server's log.
            pgconn.send_query_params(_set({"statement_timeout": timeout}, local=True), None)
            parts.append(_Part(rows=False))
        if not self._sure:
            pgconn.send_query_params(text.encode(), values)
        else:
            name = self._prepared.get(text)
            if name is None:
                self._names += 1
                name = self._prepared[text] = f"pgvigil_{self._names}"
                pgconn.send_prepare(name.encode(), text.encode())
                parts.append(_Part(rows=False, prepares=text))
            pgconn.send_query_prepared(name.encode(), values)
        parts.append(_Part(rows=True))
        # psycopg's pipeline_sync would write to the socket each time: 40 packets instead of one.
        if not libpq(pgconn).PQsendPipelineSync(pointer(pgconn)):
            raise psycopg.OperationalError(pgconn.get_error_message())
        return parts

    def _learn(self, raw: list[bytes], failure: QueryFailed | None) -> None:
        if failure and failure.sqlstate == CONFLICT:
            return  # a standby needed it out of the way for a moment; what it told last holds
        if failure or not raw:
            detail = failure.detail if failure else "no row"
            raise Unreachable(Down.OTHER, f"the server did not tell its facts: {detail}")
        if raw[0] != self._facts_raw:
            self._facts_raw = raw[0]
            try:
                row = json.loads(raw[0].decode(errors="replace"))
                self._facts, direct = facts.told(row), row["direct"]
            except (ValueError, TypeError, KeyError):
                raise Unreachable(Down.CONNECTION_LOST, _OUT_OF_STEP) from None
            if not self._facts.guarded and direct and not self.pooled:
                # Somebody's trigger at login has set others; the session is ours all the same.
                self._later |= GUARDS
            elif not self._facts.guarded:
                # A pooler may take `options` and drop them; then settings travel with each
                # statement. It makes the process's number up, so that it can tell its clients.
                self.pooled = True

    def _forget(self, text: str, failure: QueryFailed | None) -> None:
        if failure and failure.sqlstate in _STALE_PREPARED:
            self._prepared.pop(text, None)


async def _cancel(request: pq.abc.PGcancelConn) -> None:
    try:
        request.start()
        await waiting.wait_conn_async(generators.cancel(request), interval=0.1, timeout=3.0)
    except (psycopg.Error, OSError):
        pass  # the server is out of reach, or the statement is over: nothing is left to do
    finally:
        request.finish()


def _keep(told: list[bytes], rows: Rows) -> None:
    if rows.ntuples:
        told.append(rows.get_value(0, 1) or b"")


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(1, round(seconds * 1000))


_POOLED = {**GUARDS, "transaction_read_only": "on"}


def _set(settings: Mapping[str, str | float], *, local: bool) -> bytes:
    """A statement that sets what holds for the session, or until the next sync and no longer."""
    calls = (
        f"pg_catalog.set_config('{key}', "
        + facts.literal(value if isinstance(value, str) else _milliseconds(value).decode())
        + f", {str(local).lower()})"
        for key, value in settings.items()
    )
    return f"select {', '.join(calls)}".encode()
