"""Hold one guarded connection to a server and ask it many things in one round trip."""

import asyncio
import contextlib
import ctypes
import json
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import psycopg
from psycopg import conninfo, errors, generators, pq, waiting

from pgvigil.config import Target
from pgvigil.errors import DOWN_BY_SQLSTATE, Down, QueryFailed, Unreachable
from pgvigil.plan import Extension, Facts, Wanted

if pq.version() < 170000:
    raise ImportError(
        f"pgvigil needs libpq 17 or newer, and psycopg has loaded {pq.version() // 10000}; "
        "its binary package brings one: pip install 'psycopg[binary]'"
    )

Rows = pq.abc.PGresult
"""Some rows of a result, at most CHUNK of them, as libpq holds them: text, by position."""

CHUNK = 1000
"""Rows that are handed over at once; bounds memory and the time the loop stands still."""

STATEMENT_TIMEOUT = 1.0
"""Seconds; the server's bound on a statement that asks for none of its own."""

GUARDS: Mapping[str, str] = {
    # What we send never waits long for a lock, never writes, never runs somebody's operator from
    # another schema, and never takes more than one process of the server.
    "search_path": "pg_catalog",
    "lock_timeout": "250ms",
    "idle_in_transaction_session_timeout": "5s",
    "default_transaction_read_only": "on",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "work_mem": "4MB",
    # How values are spelled must not depend on what somebody set for the role.
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
}
"""The session's defaults: sent with the connection, seen again in the facts."""

_TRANSPORT = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
_STALE_PREPARED = {"26000", "0A000"}
"""SQLSTATEs after which a prepared statement is prepared anew: gone, or its columns changed."""

_CANCELS = 4
"""How many cancel requests may be on their way at once, over all targets."""
_cancelling: set[asyncio.Task[None]] = set()

_DEFAULT, _VERBOSE = 1, 2
"""PQERRORS_DEFAULT and PQERRORS_VERBOSE of libpq-fe.h."""

_TUPLES = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.TUPLES_CHUNK)
_WITHOUT_SQLSTATE = (
    # libpq's own words for what happens before a server speaks; it has no codes for them.
    (re.compile(r"could not translate host name|Name or service not known"), Down.HOST_UNKNOWN),
    (re.compile(r"Connection refused|No such file or directory"), Down.CONNECTION_REFUSED),
    (re.compile(r"No route to host|Network is unreachable|Host is down"), Down.HOST_UNREACHABLE),
    (re.compile(r"timed out|timeout expired"), Down.TIMEOUT),
    (re.compile(r"no password supplied|fe_sendauth"), Down.INVALID_PASSWORD),
    (re.compile(r"SSL|certificate|root\.crt|private key|TLS", re.I), Down.TLS),
    (re.compile(r"closed the connection|reset by peer|Broken pipe|EOF"), Down.CONNECTION_LOST),
)


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


@dataclass(frozen=True, slots=True)
class _Part:
    """One command of a segment; only the answers to `rows` concern the asker."""

    rows: bool
    prepares: str | None = None


class Session:
    """One connection with its guards, its prepared statements and its last facts.

    It belongs to one task at a time. `open` makes one; after `abandon` or a lost connection it is
    `closed` and of no further use.
    """

    def __init__(self, pgconn: pq.abc.PGconn, wanted: Wanted, *, pooled: bool) -> None:
        self.pooled = pooled
        """No session state: a pooler stands between, so settings travel with each statement."""
        self.opened = time.monotonic()
        self._pgconn = pgconn
        self._facts_text = _facts_text(wanted)
        self._facts_raw = b""
        self._facts: Facts | None = None
        self._prepared: dict[str, str] = {}
        self._names = 0

    @classmethod
    async def open(cls, target: Target, wanted: Wanted, deadline: float) -> "Session":
        """A new session to `target`, or Unreachable with the reason; done before `deadline`.

        `deadline` is a time of the running loop's clock.
        """
        pooled = target.pooler
        try:
            pgconn = await _connect(target, deadline, guarded=not pooled)
        except _NoStartupOptionsError:
            pooled = True
            pgconn = await _connect(target, deadline, guarded=False)
        return cls(pgconn, wanted, pooled=pooled)

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return self._pgconn.status == pq.ConnStatus.BAD

    @property
    def _sure(self) -> bool:
        """Whether this session's state is ours: direct, as the first facts have shown.

        Until then nothing may stay behind on a connection that a pooler gives to the next.
        """
        return not self.pooled and self._facts is not None

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return not self.closed and self._pgconn.ssl_in_use

    @property
    def backend_pid(self) -> int:
        """The process at the other end."""
        return self._pgconn.backend_pid

    def close(self) -> None:
        """End the connection at once; the server notices."""
        self._pgconn.finish()

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

    async def ask(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> Facts:
        """Send all statements at once, hand over the answers as they come, return the facts.

        The facts are asked first, in the same round trip. When they equal those of the last call,
        the same object comes back.

        Raises TimeoutError at `deadline` (what came until then was handed over; the session is
        abandoned) and Unreachable when the connection breaks (it is closed).
        """
        try:
            async with asyncio.timeout_at(deadline):
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

    async def _pipeline(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> None:
        left = max(0.05, deadline - asyncio.get_running_loop().time())
        bound = min(STATEMENT_TIMEOUT, left)
        pgconn = self._pgconn
        pgconn.enter_pipeline_mode()
        segments = [
            self._send(
                self._facts_text, bound, None, [_milliseconds(bound), str(not self._sure).encode()]
            )
        ]
        segments += [self._send(a.text, min(a.timeout, left), bound, None) for a in asks]
        raw: list[bytes] = []
        async with _Socket(pgconn) as wire:
            clock = time.perf_counter()
            for position, parts in enumerate(segments, -1):
                failure: QueryFailed | None = None
                handed = False
                for part in parts:
                    # libpq refuses the mode for a command that an error before it has skipped.
                    if part.rows and not failure:
                        pgconn.set_chunked_rows_mode(CHUNK)
                    while result := await wire.result():
                        failure = failure or _failure(result)
                        if failure or not part.rows or result.status not in _TUPLES:
                            continue
                        if position >= 0:
                            # Chunks are followed by an empty result, which then says nothing new.
                            if result.ntuples or not handed:
                                answers.rows(position, result)
                                handed = True
                            if result.ntuples == CHUNK:
                                await asyncio.sleep(0)
                        elif result.ntuples:
                            raw.append(result.get_value(0, 1) or b"")
                    if part.prepares and failure:
                        self._prepared.pop(part.prepares, None)
                await wire.result()  # the sync
                now = time.perf_counter()
                if position < 0:
                    self._learn(raw, failure)
                else:
                    self._forget(asks[position].text, failure)
                    answers.end(position, failure, now - clock)
                clock = now
        pgconn.exit_pipeline_mode()

    def _send(
        self, text: str, timeout: float, current: float | None, values: list[bytes] | None
    ) -> list[_Part]:
        """Queue one segment: what its settings need, the statement, and the sync after it."""
        pgconn = self._pgconn
        parts: list[_Part] = []
        if self.pooled:
            pgconn.send_query_params(_local({**_POOLED, "statement_timeout": timeout}), None)
            parts.append(_Part(rows=False))
        elif current is not None and abs(timeout - current) > 0.0005:
            # Not SET LOCAL: outside a transaction block that writes a warning to the server's log.
            pgconn.send_query_params(_local({"statement_timeout": timeout}), None)
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
        if not _libpq(pgconn).PQsendPipelineSync(_pointer(pgconn)):
            raise psycopg.OperationalError(pgconn.get_error_message())
        return parts

    def _learn(self, raw: list[bytes], failure: QueryFailed | None) -> None:
        if failure or not raw:
            detail = failure.detail if failure else "no row"
            raise Unreachable(Down.OTHER, f"the server did not tell its facts: {detail}")
        if raw[0] != self._facts_raw:
            self._facts_raw = raw[0]
            self._facts = _facts(json.loads(raw[0].decode(errors="replace")))
            # A pooler may take `options` and drop them; then settings travel with each statement.
            self.pooled = self.pooled or not self._facts.guarded

    def _forget(self, text: str, failure: QueryFailed | None) -> None:
        if failure and failure.sqlstate in _STALE_PREPARED:
            self._prepared.pop(text, None)


class _Socket:
    """libpq's socket on the event loop while one pipeline runs: sends what waits, reads results."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._descriptor = pgconn.socket

    async def __aenter__(self) -> "_Socket":
        self._loop.add_reader(self._descriptor, self._readable.set)
        self._flush()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)

    def _flush(self) -> None:
        try:
            waits = self._pgconn.flush()
        except psycopg.OperationalError:
            waits = 0  # the reader will see the broken connection, and perhaps the server's word
            self._readable.set()
        if waits:
            self._loop.add_writer(self._descriptor, self._flush)
        else:
            self._loop.remove_writer(self._descriptor)

    async def result(self) -> Rows | None:
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
                    return _unreachable(sqlstate, result.get_error_message())
                if result.status == pq.ExecStatus.PIPELINE_SYNC:
                    continue
        return _unreachable("", str(error)) if str(error) else _unreachable("", "EOF")


class _NoStartupOptionsError(Exception):
    """Something between us and the server takes no settings with the connection."""


async def _connect(target: Target, deadline: float, *, guarded: bool) -> pq.abc.PGconn:
    try:
        given = target.parameters()
    except OSError as error:
        detail = f"the password file cannot be read: {error.strerror}"
        raise Unreachable(Down.PASSWORD_FILE, detail) from None
    parameters = {"application_name": "pgvigil", **_TRANSPORT, **given, "client_encoding": "UTF8"}
    if guarded:
        ours = {**GUARDS, "statement_timeout": f"{STATEMENT_TIMEOUT:.0f}s"}
        settings = " ".join(f"-c {key}={_escaped(value)}" for key, value in ours.items())
        # Ours stand last: what the operator wrote may add to them, not undo them.
        parameters["options"] = f"{given.get('options', '')} {settings}".strip()
    attempts = await _attempts(parameters)
    clock = asyncio.get_running_loop().time
    failure = Unreachable(Down.HOST_UNKNOWN, "there is no address to try")
    for tried, attempt in enumerate(attempts):
        # A silent address must leave time for the next one.
        share = (deadline - clock()) / (len(attempts) - tried)
        try:
            async with asyncio.timeout(share):
                return await _start(conninfo.make_conninfo("", **attempt))
        except TimeoutError:
            failure = Unreachable(Down.TIMEOUT, "no answer to the connection in time")
        except Unreachable as error:
            failure = error
    raise failure


async def _attempts(parameters: Mapping[str, str]) -> list[dict[str, str]]:
    """One set of parameters for each address of each host, in order.

    Names are looked up here because libpq would stop the event loop for it.
    """
    defaults = {o.keyword.decode(): o.val.decode() for o in pq.Conninfo.get_defaults() if o.val}
    if "service" in parameters:
        return [dict(parameters)]  # its file may name the host; libpq alone reads it
    hosts = (parameters.get("host") or defaults.get("host") or "").split(",")
    ports = (parameters.get("port") or defaults.get("port") or "5432").split(",")
    if parameters.get("hostaddr") or defaults.get("hostaddr"):
        return [dict(parameters)]
    ports = ports * len(hosts) if len(ports) == 1 else ports
    attempts: list[dict[str, str]] = []
    unknown: list[str] = []
    for host, port in zip(hosts, ports, strict=False):
        here = {**parameters, "host": host, "port": port} if host else dict(parameters)
        if not host or host.startswith(("/", "@")):
            attempts.append(here)
            continue
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
        except (socket.gaierror, UnicodeError):
            unknown.append(host)
            continue
        addresses = dict.fromkeys(str(address[4][0]) for address in found)
        attempts += ({**here, "hostaddr": address} for address in addresses)
    if not attempts:
        raise Unreachable(Down.HOST_UNKNOWN, f"no address is known for {', '.join(unknown)}")
    if parameters.get("target_session_attrs") == "prefer-standby":
        standbys = [{**attempt, "target_session_attrs": "standby"} for attempt in attempts]
        anybody = [{**attempt, "target_session_attrs": "any"} for attempt in attempts]
        return [*standbys, *anybody]
    return attempts


async def _start(text: str) -> pq.abc.PGconn:
    """A ready connection, or Unreachable with the condition the server named.

    psycopg's own connect keeps no SQLSTATE of a refused connection, and the server's words come in
    its own language. A verbose libpq writes the code into its message, if it is told in time.
    """
    pgconn = pq.PGconn.connect_start(text.encode())
    try:
        _verbosity(pgconn, _VERBOSE)
        await _poll(pgconn)
    except BaseException:
        pgconn.finish()
        raise
    if pgconn.status == pq.ConnStatus.OK:
        _verbosity(pgconn, _DEFAULT)
        pgconn.nonblocking = 1
        return pgconn
    message = pgconn.get_error_message()
    pgconn.finish()
    if "unsupported startup parameter" in message and "options" in message:
        raise _NoStartupOptionsError
    code = re.search(r": +((?=[A-Z]*[0-9])[0-9A-Z]{5}): ", message)
    raise _unreachable(
        code[1] if code else "", re.sub(r"\s*\bLOCATION: .*", "", message, flags=re.S)
    )


async def _poll(pgconn: pq.abc.PGconn) -> None:
    loop = asyncio.get_running_loop()
    wants: int = pq.PollingStatus.WRITING
    while pgconn.status != pq.ConnStatus.BAD:
        ready = loop.create_future()
        # The socket may be another after each step: one host after the other, TLS and without.
        descriptor = pgconn.socket
        writing = wants == pq.PollingStatus.WRITING
        (loop.add_writer if writing else loop.add_reader)(descriptor, _set, ready)
        try:
            await ready
        finally:
            (loop.remove_writer if writing else loop.remove_reader)(descriptor)
        wants = pgconn.connect_poll()
        if wants in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
            return


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


@cache
def _library(module: str) -> ctypes.CDLL:
    return ctypes.CDLL(sys.modules[module].__file__)


def _libpq(pgconn: pq.abc.PGconn) -> ctypes.CDLL:
    """The library itself, for the two calls that psycopg does not wrap.

    The extension module that psycopg has loaded leads to the very libpq it is linked with.
    """
    return _library(type(pgconn).__module__)


def _pointer(pgconn: pq.abc.PGconn) -> ctypes.c_void_p:
    return ctypes.c_void_p(pgconn.pgconn_ptr)  # type: ignore[attr-defined]


def _verbosity(pgconn: pq.abc.PGconn, level: int) -> None:
    """Say how much of an error libpq puts into a message."""
    _libpq(pgconn).PQsetErrorVerbosity(_pointer(pgconn), level)


async def _cancel(request: pq.abc.PGcancelConn) -> None:
    try:
        request.start()
        await waiting.wait_conn_async(generators.cancel(request), interval=0.1, timeout=3.0)
    except (psycopg.Error, OSError):
        pass  # the server is out of reach, or the statement is over: nothing is left to do
    finally:
        request.finish()


def _sqlstate(result: Rows) -> str:
    return (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()


def _unreachable(sqlstate: str, message: str) -> Unreachable:
    detail = " ".join(message.split()) or "the connection broke"
    if sqlstate:
        # Class 08 and the rest of 57P are the line or the server going away.
        lost = Down.CONNECTION_LOST if sqlstate.startswith(("08", "57P")) else Down.OTHER
        return Unreachable(DOWN_BY_SQLSTATE.get(sqlstate, lost), detail)
    for pattern, reason in _WITHOUT_SQLSTATE:
        if pattern.search(detail):
            return Unreachable(reason, detail)
    return Unreachable(Down.OTHER, detail)


def _failure(result: Rows) -> QueryFailed | None:
    """What a result says went wrong; Unreachable when the server ends the whole session."""
    if result.status != pq.ExecStatus.FATAL_ERROR:
        return None
    sqlstate, message = _sqlstate(result), result.get_error_message()
    severity = result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED)
    if severity in (b"FATAL", b"PANIC") or not sqlstate:
        raise _unreachable(sqlstate, message)
    return QueryFailed(condition(sqlstate), " ".join(message.split()), sqlstate)


def condition(sqlstate: str) -> str:
    """PostgreSQL's name for an SQLSTATE, such as `lock_not_available` for 55P03."""
    try:
        name = errors.lookup(sqlstate).__name__
    except KeyError:
        return "other"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _escaped(value: str) -> str:
    """A value as one word of libpq's `options`."""
    return re.sub(r"([\\\s])", r"\\\1", value)


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(1, round(seconds * 1000))


_POOLED = {**GUARDS, "transaction_read_only": "on"}


def _local(settings: Mapping[str, str | float]) -> bytes:
    """A statement that sets what holds until the next sync, and no longer."""
    calls = (
        f"pg_catalog.set_config('{key}', "
        + _literal(value if isinstance(value, str) else _milliseconds(value).decode())
        + ", true)"
        for key, value in settings.items()
    )
    return f"select {', '.join(calls)}".encode()


def _facts_text(wanted: Wanted) -> str:
    """The statement that asks for a server's facts.

    Its parameters are statement_timeout and whether that holds for this transaction only.
    Every name it needs is asked in a way that cannot fail: what does not exist is absent.
    """

    def array(values: Sequence[str]) -> str:
        return f"array[{', '.join(map(_literal, values))}]::pg_catalog.text[]"

    def current(names: Sequence[str]) -> str:
        pairs = (f"{_literal(n)}, pg_catalog.current_setting({_literal(n)}, true)" for n in names)
        return f"pg_catalog.json_build_object({', '.join(pairs)})"

    # Only names that the catalogue's schema has let through stand in it, and as literals.
    return f"""select
  pg_catalog.set_config('statement_timeout', $1, $2),
  pg_catalog.json_build_object(
    'version', pg_catalog.current_setting('server_version_num')::pg_catalog.int4,
    'in_recovery', pg_catalog.pg_is_in_recovery(),
    'user', current_user,
    'superuser', pg_catalog.current_setting('is_superuser') = 'on',
    'database', pg_catalog.current_database(),
    'guards', {current(list(GUARDS))},
    'extensions', (
      select pg_catalog.json_object_agg(e.extname, pg_catalog.json_build_array(
        e.extversion, pg_catalog.quote_ident(n.nspname)) order by e.extname)
      from pg_catalog.pg_extension as e
      join pg_catalog.pg_namespace as n on n.oid = e.extnamespace),
    'privileges', (
      select pg_catalog.json_agg(r.rolname order by r.rolname)
      from pg_catalog.pg_roles as r
      where r.rolname = any({array(wanted.privileges)}::pg_catalog.name[])
        and pg_catalog.pg_has_role(r.oid, 'usage')),
    'functions', (
      select pg_catalog.json_agg(f order by f)
      from pg_catalog.unnest({array(wanted.functions)}) as f
      where pg_catalog.has_function_privilege(pg_catalog.to_regprocedure(f), 'execute')),
    'settings', {current(wanted.settings)})"""  # noqa: S608


def _facts(told: Mapping[str, Any]) -> Facts:
    return Facts(
        version=told["version"],
        in_recovery=told["in_recovery"],
        user=told["user"],
        superuser=told["superuser"],
        database=told["database"],
        guarded=told["guards"] == dict(GUARDS),
        extensions={name: Extension(*of) for name, of in (told["extensions"] or {}).items()},
        privileges=frozenset(told["privileges"] or ()),
        functions=frozenset(told["functions"] or ()),
        settings=told["settings"],
    )
