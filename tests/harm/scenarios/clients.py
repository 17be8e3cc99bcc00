"""Clients crowd: those who scrape, those who only pretend to, and those of the database."""

import http.client
import io
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from threading import Event, Thread
from typing import cast

import psycopg

from lab.exporter import Page
from tests.harm.scene import Scenario, Scene, of_sessions
from tests.harm.subject import Answer

_SCRAPERS = 50
_IN_A_HURRY = 15
"""Those of the scrapers who hang up before they have the page."""


@contextmanager
def _nothing(_: Scene) -> Iterator[None]:
    yield


def _crowd_scrapes(scene: Scene) -> None:
    """Two crowds, one after the other, so that sessions that are kept open show."""
    for _ in range(2):
        visits = [_Visit(scene, hurried=number < _IN_A_HURRY) for number in range(_SCRAPERS)]
        for visit in visits:
            visit.start()
        for visit in visits:
            visit.join()
        # Who joined the same scrape has the same page, and to parse it takes its time.
        known: dict[bytes, Page] = {}
        scene.during += [visit.answer(known) for visit in visits if not visit.hurried]


class _Visit(Thread):
    """One scraper of many; it reads now and parses when all are done, to leave the others time."""

    def __init__(self, scene: Scene, *, hurried: bool) -> None:
        super().__init__(daemon=True)
        self.hurried = hurried
        self._port = scene.exporter.port
        self._timeout = scene.timeout
        self._request = _request(scene)
        self._begun = self._ended = 0.0
        self._raw = bytearray()
        self._fault = ""

    def run(self) -> None:
        """Ask, and read to the end or, in a hurry, hang up at once."""
        self._begun = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", self._port), self._timeout) as line:
                line.sendall(self._request)
                if not self.hurried:
                    self._read(line)
        except TimeoutError:
            self._fault = f"no answer in {self._timeout:g} s"
        except OSError as error:
            self._fault = f"{type(error).__name__}: {error}"
        self._ended = time.monotonic()

    def _read(self, line: socket.socket) -> None:
        while (left := self._begun + self._timeout - time.monotonic()) > 0:
            line.settimeout(left)
            chunk = line.recv(65536)
            if not chunk:
                return
            self._raw += chunk
        raise TimeoutError

    def answer(self, known: dict[bytes, Page]) -> Answer:
        """What it got; `known` keeps the pages by their bodies."""
        page, fault = None, self._fault
        if not fault:
            try:
                page = _page(bytes(self._raw), known)
            except (http.client.HTTPException, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
        return Answer(self._begun, self._ended, page, fault)


class _Socket:
    """What http.client wants of a socket, for bytes that are there already."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, _mode: str) -> io.BytesIO:
        """All of it."""
        return io.BytesIO(self._raw)


def _page(raw: bytes, known: dict[bytes, Page]) -> Page:
    response = http.client.HTTPResponse(cast(socket.socket, _Socket(raw)))
    response.begin()
    body = response.read()
    if response.status != 200:
        raise ValueError(f"HTTP {response.status}: {body[:120]!r}")
    if body not in known:
        known[body] = Page(body.decode(), response.headers.get("Content-Type", "text/plain"))
    return known[body]


def _request(scene: Scene) -> bytes:
    lines = (
        f"GET {scene.subject.path} HTTP/1.1",
        f"Host: 127.0.0.1:{scene.exporter.port}",
        "Accept: text/plain",
        f"X-Prometheus-Scrape-Timeout-Seconds: {scene.timeout:g}",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode()


_SLOW, _IDLE = 30, 200


@contextmanager
def _slow_clients(scene: Scene) -> Iterator[None]:
    """Readers of a byte a second, headers that never end, and connections that say nothing."""
    with ExitStack() as stack:
        connect = partial(_connected, stack, scene.exporter.port)
        idle = [connect() for _ in range(_IDLE)]
        readers = [connect(receive=4096) for _ in range(_SLOW)]
        writers = [connect() for _ in range(_SLOW)]
        for reader in readers:
            reader.sendall(_request(scene))
        for writer in writers:
            writer.sendall(f"GET {scene.subject.path} HTTP/1.1\r\nHost: me\r\nX-Long: ".encode())
        over = Event()
        torment = Thread(target=_trickle, args=(readers, writers, over), daemon=True)
        torment.start()
        try:
            yield
        finally:
            over.set()
            torment.join(10)
            # Whom the exporter has shown out is no matter here.
            assert len(idle) == _IDLE


def _connected(stack: ExitStack, port: int, receive: int | None = None) -> socket.socket:
    line = stack.enter_context(socket.socket())
    if receive:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    line.settimeout(5)
    line.connect(("127.0.0.1", port))
    return line


def _trickle(
    readers: Sequence[socket.socket], writers: Sequence[socket.socket], over: Event
) -> None:
    for line in (*readers, *writers):
        line.setblocking(False)
    while not over.wait(1.0):
        for reader in readers:
            with suppress(OSError):
                reader.recv(1)
        for writer in writers:
            with suppress(OSError):
                writer.send(b"x")


_HOLDING, _WAITING, _FAILED, _RESTING, _BUSY = 150, 50, 10, 10, 5
"""Sessions that are idle in a transaction, wait for a lock, are idle in a failed transaction, are
idle, and work. The first of them has the lock."""


def _role_for_crowds(scene: Scene) -> None:
    scene.server.execute("create role crowd login in role pg_write_all_data, pg_read_all_data")


@contextmanager
def _crowded(scene: Scene) -> Iterator[None]:
    conninfo = scene.server.conninfo(dbname="app", user="crowd")
    with ExitStack() as stack:

        def session() -> psycopg.Connection:
            return stack.enter_context(closing(psycopg.connect(conninfo, autocommit=True)))

        holding = [session() for _ in range(_HOLDING)]
        for one in holding:
            one.execute("begin; select 1")
        holding[0].execute("update orders set note = 'mine' where n = 1")
        for _ in range(_FAILED):
            failed = session()
            failed.execute("begin")
            with suppress(psycopg.Error):
                failed.execute("select 1 / 0")
        for _ in range(_RESTING):
            session().execute("select 1")
        for statement in (
            *["update orders set note = 'mine' where n = 1"] * _WAITING,
            *["select pg_sleep(600)"] * _BUSY,
        ):
            one = session()
            one.pgconn.send_query(statement.encode())
            stack.callback(one.cancel_safe)
        scene.server.wait_until(
            f"select count(*) = {_WAITING} from pg_stat_activity where wait_event_type = 'Lock'", 30
        )
        scene.notes["states"] = dict(
            scene.server.execute(
                "select state, count(*) from pg_stat_activity where usename = 'crowd' group by 1"
            )
        )
        yield


_COUNTS = ("pg_stat_activity_sessions", "pg_stat_activity_count")
"""What exporters call the number of sessions of a database by their state."""


def _counts(scene: Scene) -> Iterable[str]:
    """Those states only in which an exporter's own sessions never are."""
    for answer in scene.during:
        for name in _COUNTS:
            for state in ("idle in transaction", "idle in transaction (aborted)"):
                if not answer.page or not answer.page.series(name, datname="app"):
                    continue
                told = sum(answer.page.series(name, datname="app", state=state).values())
                if told != (real := scene.notes["states"][state]):
                    yield f"{name}: {told:g} sessions are {state}, and in truth {real}"
        blocked = answer.page.series("pg_locks_blocked_sessions") if answer.page else {}
        if blocked and sum(blocked.values()) != _WAITING:
            yield f"{sum(blocked.values()):g} sessions wait, and in truth {_WAITING}"


SCENARIOS = (
    Scenario(
        f"{_SCRAPERS} scrape at once, and {_IN_A_HURRY} of them hang up",
        _nothing,
        watch=_crowd_scrapes,
    ),
    Scenario(
        f"{_SLOW} read a byte a second, {_SLOW} send headers without end, {_IDLE} say nothing",
        _slow_clients,
        scrapes=4,
    ),
    Scenario(
        f"{_HOLDING} sessions are idle in transactions and {_WAITING} wait for one lock",
        _crowded,
        before=_role_for_crowds,
        truth=_counts,
        concerned=of_sessions,
        settings={"max_connections": 260},
    ),
)
