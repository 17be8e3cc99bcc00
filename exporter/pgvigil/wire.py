"""Hold one connection of libpq, and read what comes over it without standing still."""

import asyncio
import contextlib
import re
import select
import time

import psycopg
from psycopg import errors, pq

from pgvigil.certificate import Peer
from pgvigil.connect import unreachable
from pgvigil.errors import CONFLICT, QueryFailed, Unreachable

Result = pq.abc.PGresult


class Connection:
    """What is the same for every connection, whoever is at the other end."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self.opened = time.monotonic()
        self._pgconn = pgconn

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return self._pgconn.status == pq.ConnStatus.BAD

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return not self.closed and self._pgconn.ssl_in_use

    @property
    def peer(self) -> Peer | None:
        """Who shows a certificate at the other end; None without TLS."""
        if not self.tls:
            return None
        decoded = [
            part.decode(errors="replace") for part in (self._pgconn.hostaddr, self._pgconn.host)
        ]
        return Peer(decoded[0], int(self._pgconn.port), decoded[1])

    def close(self) -> None:
        """End the connection at once; the server notices."""
        self._pgconn.finish()

    def abandon(self) -> None:
        """End the connection though something may be under way."""
        self.close()

    def cut(self) -> None:
        """End the connection under whoever hangs in it."""
        if not self.closed:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._pgconn.socket)
            loop.remove_writer(self._pgconn.socket)
            self.abandon()

    def still_there(self) -> bool:
        """Whether an idle connection is alive as far as this end can tell without asking."""
        if not self.closed:
            poll = select.poll()
            poll.register(self._pgconn.socket, select.POLLIN)
            try:
                # A server that went away said so first; the end of the stream comes behind.
                while not self.closed and poll.poll(0):
                    self._pgconn.consume_input()
            except psycopg.OperationalError:
                self.close()
        return not self.closed


class Wire:
    """libpq's socket on the event loop while one pipeline runs: sends what waits, reads results."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._descriptor = pgconn.socket

    async def __aenter__(self) -> "Wire":
        self._loop.add_reader(self._descriptor, self._readable.set)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)

    def flush(self) -> None:
        """Send what is queued, now and as soon as the socket takes more."""
        try:
            waits = self._pgconn.flush()
        except psycopg.OperationalError:
            waits = 0  # the reader will see the broken connection, and perhaps the server's word
            self._readable.set()
        if waits:
            self._loop.add_writer(self._descriptor, self.flush)
        else:
            self._loop.remove_writer(self._descriptor)

    async def result(self) -> Result | None:
        """The next result, or None at the end of a command; Unreachable when the line is cut."""
        pgconn = self._pgconn
        while pgconn.is_busy():
            await self._readable.wait()
            self._readable.clear()
            try:
                pgconn.consume_input()
            except psycopg.OperationalError as error:
                raise self._lost(error) from None
        return pgconn.get_result()

    def _lost(self, error: psycopg.OperationalError) -> Unreachable:
        """Why the connection broke: in the server's own last words where it had any."""
        with contextlib.suppress(psycopg.OperationalError):
            while not self._pgconn.is_busy() and (result := self._pgconn.get_result()):
                if result.status == pq.ExecStatus.FATAL_ERROR and (sqlstate := _sqlstate(result)):
                    return _ended(sqlstate, result.get_error_message())
                if result.status == pq.ExecStatus.PIPELINE_SYNC:
                    continue
        return unreachable("", str(error)) if str(error) else unreachable("", "EOF")


def _sqlstate(result: Result) -> str:
    return (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()


def failed(result: Result) -> QueryFailed | None:
    """What a result says went wrong; Unreachable when the server ends the whole session."""
    if result.status != pq.ExecStatus.FATAL_ERROR:
        return None
    sqlstate, message = _sqlstate(result), result.get_error_message()
    severity = result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED)
    if severity in (b"FATAL", b"PANIC") or not sqlstate:
        raise _ended(sqlstate, message)
    return QueryFailed(condition(sqlstate), " ".join(message.split()), sqlstate)


def _ended(sqlstate: str, message: str) -> Unreachable:
    """Why the server has ended the session."""
    error = unreachable(sqlstate, message)
    return Unreachable(error.reason, error.detail, passing=sqlstate == CONFLICT)


def condition(sqlstate: str) -> str:
    """PostgreSQL's name for an SQLSTATE, such as `lock_not_available` for 55P03."""
    try:
        name = errors.lookup(sqlstate).__name__
    except KeyError:
        return "other"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
