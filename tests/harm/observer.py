"""Looks ten times a second at the sessions that an exporter has on a server."""

import contextlib
import time
from collections.abc import Sequence
from threading import Event, Thread
from typing import NamedTuple, Self

import psycopg
from psycopg.adapt import Buffer, Loader
from psycopg.conninfo import make_conninfo

from lab.postgres import Server

INTERVAL = 0.1
"""Seconds between two looks."""

_SESSIONS = """select pid, state, extract(epoch from clock_timestamp() - query_start)::float8,
  datname, left(query, 100)
from pg_stat_activity where usename = %s and backend_type = 'client backend'"""


class Session(NamedTuple):
    """A session as pg_stat_activity has it."""

    pid: int
    state: str | None
    age: float | None
    """Seconds since its last statement began."""
    database: str
    query: str


class Look(NamedTuple):
    """All sessions of the role at one moment."""

    at: float
    """On the monotonic clock."""
    sessions: Sequence[Session]


class _Lenient(Loader):
    """Takes names and texts that are no UTF-8, as databases in other encodings have them."""

    def load(self, data: Buffer) -> str:
        """The text, with a mark for each odd byte."""
        return bytes(data).decode(errors="replace")


class Observer:
    """Watches the sessions of a role, as a superuser, while it is entered.

    A server that stands still or is away is not seen; looking goes on when it is back.
    """

    def __init__(self, server: Server, role: str) -> None:
        self.looks: list[Look] = []
        self._conninfo = make_conninfo(
            host=str(server.directory),
            port=server.port,
            user="postgres",
            dbname="template1",
            application_name="observer",
            connect_timeout=2,
        )
        self._role = role
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        looked = self._thread.is_alive()
        self._over.set()
        self._thread.join(10)
        if not looked:
            raise RuntimeError("the observer fell, and nobody has looked since")

    def _watch(self) -> None:
        while not self._over.is_set():
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(self._conninfo, autocommit=True) as connection,
            ):
                for kind in ("name", "text"):
                    connection.adapters.register_loader(kind, _Lenient)
                while not self._over.wait(INTERVAL):
                    begun = time.monotonic()
                    rows = connection.execute(_SESSIONS, [self._role]).fetchall()
                    self.looks.append(Look(begun, [Session(*row) for row in rows]))
            self._over.wait(INTERVAL)

    def most(self) -> int:
        """The most sessions at any moment."""
        return max((len(look.sessions) for look in self.looks), default=0)

    def idle_in_transaction(self) -> int:
        """How often a session was seen idle in a transaction."""
        return sum(
            session.state is not None and session.state.startswith("idle in transaction")
            for look in self.looks
            for session in look.sessions
        )

    def left_running(self, answered: float, until: float) -> list[Session]:
        """The sessions whose statement ran before the answer and still does 2 s after it."""
        return [
            session
            for look in self.looks
            if answered + 2 <= look.at < until
            for session in look.sessions
            if session.state == "active"
            and session.age is not None
            # Begun before the answer, by the server's clock; ours and its may differ by a tick.
            and look.at - session.age <= answered - 0.05
        ]
