"""Connect to a server under guards, or say by PostgreSQL's own condition why that fails."""

import asyncio
import contextlib
import ctypes
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from threading import Thread

from psycopg import pq

from pgvigil import password
from pgvigil.dsn import libpq_defaults
from pgvigil.errors import DOWN_BY_SQLSTATE, Down, Unreachable
from pgvigil.hosts import Allowed
from pgvigil.target import Target

if pq.version() < 170000:
    raise ImportError(
        f"pgvigil needs libpq 17 or newer, and psycopg has loaded {pq.version() // 10000}; "
        "its binary package brings one: pip install 'psycopg[binary]'"
    )

STATEMENT_TIMEOUT = 1.0
"""Seconds; the server's bound on a statement that asks for none of its own."""

GUARDS: Mapping[str, str] = {
    # What we send never waits long for a lock, never writes, never runs somebody's operator from
    # another schema, and never takes more than one process of the server.
    "search_path": "pg_catalog",
    "lock_timeout": "250ms",
    "idle_in_transaction_session_timeout": "5s",
    "default_transaction_read_only": "on",
    # A standby takes no other; our statements are alone in their transactions anyway.
    "default_transaction_isolation": "read committed",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    # Enough for 10,000 entries of pg_stat_statements; at 4 MB they go to a temporary file.
    "work_mem": "16MB",
    # What a text means, and how values are spelled, must not depend on what somebody set.
    "standard_conforming_strings": "on",
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
}
"""The session's defaults, seen again in the facts."""

LATER = ("work_mem", "jit", "max_parallel_workers_per_gather", "extra_float_digits")
"""Those that are set after connecting: what comes with the connection stands in pg_settings as if
it were the server's own, and these are of interest. Nothing is at risk before."""

CONSOLE = b"/bouncer"
"""What stands behind the version that a PgBouncer's console tells."""

_TRANSPORT = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
_LOOK_UPS = 256
"""Names that are looked up at once at most, each in a thread."""
_looking: dict[
    tuple[asyncio.AbstractEventLoop, str], asyncio.Future[Sequence[str] | Exception]
] = {}
_DEFAULT, _VERBOSE = 1, 2
"""PQERRORS_DEFAULT and PQERRORS_VERBOSE of libpq-fe.h."""

_FINAL = {*DOWN_BY_SQLSTATE.values()} - {Down.CANNOT_CONNECT_NOW}
"""What a server refuses for, and would again at its next address; libpq stops there as well."""

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


_REFUSED = (Down.INVALID_PASSWORD, Down.INVALID_AUTHORIZATION)
"""When another password may do."""
_BROKEN_PROTOCOL = "08P01"
_WORDS_OF_PGBOUNCER = (
    # It refuses for whatever reason with that one SQLSTATE, and always in English.
    (re.compile(r"authentication failed|no such user"), Down.INVALID_PASSWORD),
    (re.compile(r": not allowed|login rejected"), Down.INVALID_AUTHORIZATION),
    (re.compile(r"no more connections allowed"), Down.TOO_MANY_CONNECTIONS),
    (re.compile(r"no such database"), Down.INVALID_CATALOG_NAME),
    (re.compile(r'database ".*" is disabled|shutting down|shut down'), Down.CANNOT_CONNECT_NOW),
    (re.compile(r"SSL required"), Down.TLS),
)


class NoStartupOptionsError(Exception):
    """Something between us and the server takes no settings with the connection."""


async def connect(target: Target, deadline: float, *, guarded: bool) -> pq.abc.PGconn:
    """A ready connection in non-blocking mode, made before `deadline` (of the loop's clock).

    `guarded` sends the guards along; NoStartupOptionsError tells that something on the way refuses
    them. Raises Unreachable with the reason.
    """
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                given = await password.parameters(target)
        except TimeoutError:
            text = f"{target.password_command[0]} did not tell the password in time"
            raise Unreachable(Down.PASSWORD_COMMAND, text) from None
        try:
            return await _connect(given, target.allowed, deadline, guarded=guarded)
        except Unreachable as error:
            if error.reason not in _REFUSED or not password.refused(target, given):
                raise


async def _connect(
    given: Mapping[str, str], allowed: Allowed | None, deadline: float, *, guarded: bool
) -> pq.abc.PGconn:
    """The same, with these keywords of libpq's."""
    parameters = {"application_name": "pgvigil", **_TRANSPORT, **given, "client_encoding": "UTF8"}
    if guarded:
        ours = {**GUARDS, "statement_timeout": f"{STATEMENT_TIMEOUT:.0f}s"}
        ours = {key: value for key, value in ours.items() if key not in LATER}
        settings = " ".join(f"-c {key}={_escaped(value)}" for key, value in ours.items())
        # Ours stand last: what the operator wrote may add to them, not undo them.
        parameters["options"] = f"{given.get('options', '')} {settings}".strip()
    try:
        async with asyncio.timeout_at(deadline):
            attempts = await _attempts(parameters, allowed)
    except TimeoutError:
        raise Unreachable(Down.TIMEOUT, "the host's name was not looked up in time") from None
    clock = asyncio.get_running_loop().time
    failure = Unreachable(Down.HOST_UNKNOWN, "there is no address to try")
    for tried, attempt in enumerate(attempts):
        # A silent address must leave time for the next one.
        share = (deadline - clock()) / (len(attempts) - tried)
        try:
            async with asyncio.timeout(share):
                return await _start(_conninfo(attempt))
        except TimeoutError:
            failure = Unreachable(Down.TIMEOUT, "no answer to the connection in time")
        except Unreachable as error:
            failure = error
            if error.reason in _FINAL:
                break
    raise failure


async def _attempts(parameters: Mapping[str, str], allowed: Allowed | None) -> list[dict[str, str]]:
    """One set of parameters for each address of each host, in order.

    Names are looked up here because libpq would stop the event loop for it; and so that what is
    looked at is what is connected to, where only some addresses are allowed.
    """
    defaults = libpq_defaults()
    if "service" in parameters:
        return [dict(parameters)]  # its file may name the host; libpq alone reads it
    hosts = (parameters.get("host") or defaults.get("host") or "").split(",")
    ports = (parameters.get("port") or defaults.get("port") or "5432").split(",")
    if not allowed and (parameters.get("hostaddr") or defaults.get("hostaddr")):
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
            addresses = await look_up(host)
        except (OSError, UnicodeError):
            unknown.append(host)
            continue
        if allowed and not (addresses := [of for of in addresses if allowed.reached(of)]):
            detail = f"no address of {host} is one that allow_hosts has"
            raise Unreachable(Down.HOST_UNKNOWN, detail)
        attempts += ({**here, "hostaddr": address} for address in addresses)
    if not attempts:
        raise Unreachable(Down.HOST_UNKNOWN, f"no address is known for {', '.join(unknown)}")
    if parameters.get("target_session_attrs") == "prefer-standby":
        standbys = [{**attempt, "target_session_attrs": "standby"} for attempt in attempts]
        anybody = [{**attempt, "target_session_attrs": "any"} for attempt in attempts]
        return [*standbys, *anybody]
    return attempts


async def look_up(host: str) -> Sequence[str]:
    """The addresses of a host; raises OSError or UnicodeError where there are none.

    Who asks for a name that is being looked up waits for the same answer. asyncio's own way has
    room for six at once, so that a resolver that hangs for some names would hold up all others,
    and waits for them when the program ends.
    """
    with contextlib.suppress(OSError, UnicodeError):
        return _addresses(host, socket.AI_NUMERICHOST)
    loop = asyncio.get_running_loop()
    while (loop, host) not in _looking:
        ours = {known for (of, _), known in _looking.items() if of is loop}
        if len(ours) < _LOOK_UPS:
            break
        await asyncio.wait(ours, return_when=asyncio.FIRST_COMPLETED)
    if (loop, host) not in _looking:
        _looking[loop, host] = loop.create_future()
        Thread(
            target=_look_up_apart, args=(loop, host), name=f"look up {host}", daemon=True
        ).start()
    known = _looking[loop, host]
    await asyncio.wait({known})  # which leaves it to others when this one is cancelled
    found = known.result()
    if isinstance(found, Exception):
        raise found
    return found


def _look_up_apart(loop: asyncio.AbstractEventLoop, host: str) -> None:
    """Look up a name in a thread of its own, for as long as it takes."""
    found: Sequence[str] | Exception
    try:
        found = _addresses(host)
    except (OSError, UnicodeError) as error:
        found = error

    def tell() -> None:
        _looking.pop((loop, host)).set_result(found)

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:  # the loop has ended, and nobody waits
        _looking.pop((loop, host), None)


def _addresses(host: str, flags: int = 0) -> Sequence[str]:
    found = socket.getaddrinfo(
        host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=flags
    )
    return list(dict.fromkeys(str(address[4][0]) for address in found))


async def _start(text: bytes) -> pq.abc.PGconn:
    """A ready connection, or Unreachable with the condition the server named.

    psycopg's own connect keeps no SQLSTATE of a refused connection, and the server's words come in
    its own language. A verbose libpq writes the code into its message, if it is told in time.
    """
    pgconn = pq.PGconn.connect_start(text)
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
        raise NoStartupOptionsError
    code = re.search(r": +((?=[A-Z]*[0-9])[0-9A-Z]{5}): ", message)
    raise unreachable(
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


def is_console(pgconn: pq.abc.PGconn) -> bool:
    """Whether a PgBouncer's console is at the other end, which tells its own version."""
    return (pgconn.parameter_status(b"server_version") or b"").endswith(CONSOLE)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


@cache
def _library(module: str) -> ctypes.CDLL:
    return ctypes.CDLL(sys.modules[module].__file__)


def libpq(pgconn: pq.abc.PGconn) -> ctypes.CDLL:
    """The library itself, for the two calls that psycopg does not wrap.

    The extension module that psycopg has loaded leads to the very libpq it is linked with.
    """
    return _library(type(pgconn).__module__)


def pointer(pgconn: pq.abc.PGconn) -> ctypes.c_void_p:
    """The connection as that library knows it."""
    return ctypes.c_void_p(pgconn.pgconn_ptr)  # type: ignore[attr-defined]


def _verbosity(pgconn: pq.abc.PGconn, level: int) -> None:
    """Say how much of an error libpq puts into a message."""
    libpq(pgconn).PQsetErrorVerbosity(pointer(pgconn), level)


def unreachable(sqlstate: str, message: str) -> Unreachable:
    """The error for what the server said, or libpq where `sqlstate` is empty."""
    detail = " ".join(message.split()) or "the connection broke"
    if sqlstate == _BROKEN_PROTOCOL:
        for pattern, reason in _WORDS_OF_PGBOUNCER:
            if pattern.search(detail):
                return Unreachable(reason, detail)
    if sqlstate:
        # Class 08 and the rest of 57P are the line or the server going away.
        lost = Down.CONNECTION_LOST if sqlstate.startswith(("08", "57P")) else Down.OTHER
        return Unreachable(DOWN_BY_SQLSTATE.get(sqlstate, lost), detail)
    for pattern, reason in _WITHOUT_SQLSTATE:
        if pattern.search(detail):
            return Unreachable(reason, detail)
    return Unreachable(Down.OTHER, detail)


def _conninfo(parameters: Mapping[str, str]) -> bytes:
    """A connection string for libpq; unlike psycopg's it takes any bytes the environment holds."""
    values = {k: v.replace("\\", r"\\").replace("'", r"\'") for k, v in parameters.items()}
    text = " ".join(f"{key}='{value}'" for key, value in values.items())
    return text.encode(errors="surrogateescape")


def _escaped(value: str) -> str:
    """A value as one word of libpq's `options`."""
    return re.sub(r"([\\\s])", r"\\\1", value)
