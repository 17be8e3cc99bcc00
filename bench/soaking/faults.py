"""Breaks servers and lines for a while, and mends them."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import psycopg
from psycopg import sql

from bench.soaking.course import Course, Fault
from lab.line import Line
from lab.postgres import Server, ServerError

Break = Callable[[], contextlib.AbstractContextManager[None]]
"""Breaks something on entering and mends it on leaving."""

_LOCKED = (
    # What the exporter reads, what it needs to log in, and what only an application has.
    "pg_catalog.pg_class",
    "pg_catalog.pg_database",
    "pg_catalog.pg_authid",
    "pg_catalog.pg_index",
    "public.orders",
)


class Faults:
    """A thread that breaks one thing after the other, as a generator of random numbers says."""

    def __init__(
        self, course: Course, clock: Callable[[], float], chance: random.Random, pause: float
    ) -> None:
        """Rest between two faults for up to so many seconds."""
        self._course = course
        self._clock = clock
        self._chance = chance
        self._pause = pause
        self._first = self._last = 0.0
        self._stop = threading.Event()
        self._kinds: list[tuple[str, str, Break]] = []
        self._mends: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._work, daemon=True)

    def add(self, where: str, kinds: Mapping[str, Break]) -> None:
        """Have it break things in these ways, too."""
        self._kinds += [(where, kind, fault) for kind, fault in kinds.items()]

    def mend(self, way: Callable[[], None]) -> None:
        """Call this after a fault that went wrong, so that the next one finds things as usual."""
        self._mends.append(way)

    def start(self, first: float, last: float) -> None:
        """Break things between these moments of the clock."""
        self._first, self._last = first, last
        self._thread.start()

    def stop(self) -> None:
        """Return when the last fault is mended."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        self._stop.wait(self._first - self._clock())
        while not self._stop.wait(self._chance.uniform(0.2, 1) * self._pause):
            if self._clock() >= self._last:
                break
            where, kind, make = self._chance.choice(self._kinds)
            fault = Fault(kind, where, self._clock())
            self._course.faults.append(fault)
            # Drawn before, so that the same seed draws the same whatever goes wrong.
            seconds = self._chance.uniform(1, 7)
            try:
                with make():
                    self._stop.wait(seconds)
            except (psycopg.Error, ServerError, OSError) as error:
                fault.problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                for way in self._mends:
                    way()
            fault.ended = self._clock()


class ServerFaults:
    """What can happen to a server; `roles` are those of the exporter on it."""

    def __init__(
        self, server: Server, roles: Sequence[str], chance: random.Random, course: Course
    ) -> None:
        self._server = server
        self._roles = roles
        self._chance = chance
        self._course = course
        self._databases = 0

    def on_primary(self) -> Mapping[str, Break]:
        """All of them by kind."""
        return {
            **self.on_standby(),
            "lock": self.lock,
            "databases": self.databases,
            "500 tables": self.tables,
            "narrow role": self.narrow,
            "reset": self.reset,
            "extension": self.extension,
            "full": self.full,
        }

    def on_standby(self) -> Mapping[str, Break]:
        """Those that need not write."""
        return {
            "pause": self.pause,
            "crash": self.crash,
            "restart": self.restart,
            "terminate": self.terminate,
        }

    def mend(self) -> None:
        """Have it run."""
        self._server.resume()
        if not self._server.running:
            self._server.start()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Halt all its processes."""
        self._server.pause()
        try:
            yield
        finally:
            self._server.resume()

    @contextlib.contextmanager
    def crash(self) -> Iterator[None]:
        """Kill it, and start it later."""
        self._server.crash()
        try:
            yield
        finally:
            self._server.start()

    @contextlib.contextmanager
    def restart(self) -> Iterator[None]:
        """Shut it down in one way or another, and start it later."""
        self._server.stop("fast" if self._chance.random() < 0.5 else "immediate")
        try:
            yield
        finally:
            self._server.start()

    @contextlib.contextmanager
    def terminate(self) -> Iterator[None]:
        """End the exporter's sessions."""
        self._terminate()
        yield

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a table or a catalog so that nobody can read it."""
        table = self._chance.choice(_LOCKED)
        with self._session() as connection:
            connection.execute("set statement_timeout = '5s'")
            connection.execute("begin")
            connection.execute(f"lock table {table} in access exclusive mode")
            yield
            connection.execute("rollback")

    @contextlib.contextmanager
    def databases(self) -> Iterator[None]:
        """Make some databases, and drop them while they may be visited."""
        names = []
        for _ in range(self._chance.randint(1, 4)):
            self._databases += 1
            names.append(f"soak_{self._databases}")
            self._server.execute(f"create database {names[-1]}")
        yield
        for name in names:
            self._drop(name)

    @contextlib.contextmanager
    def tables(self) -> Iterator[None]:
        """Make a database with many tables."""
        self._databases += 1
        name = f"soak_{self._databases}"
        self._server.execute(f"create database {name}")
        self._server.execute(
            """do $$ begin for n in 1 .. 500 loop
                execute pg_catalog.format('create table public.t%s (id int primary key)', n);
            end loop; end $$""",
            database=name,
        )
        yield
        self._drop(name)

    @contextlib.contextmanager
    def narrow(self) -> Iterator[None]:
        """Let each role in once only."""
        self._limit(1)
        self._terminate()
        try:
            yield
        finally:
            self._limit(5)

    @contextlib.contextmanager
    def reset(self) -> Iterator[None]:
        """Have all counters begin anew."""
        self._server.execute("select pg_stat_reset()")
        self._server.execute("select pg_stat_reset_shared('bgwriter')")
        with contextlib.suppress(psycopg.errors.UndefinedFunction):
            self._server.execute("select pg_stat_statements_reset()")
        yield

    @contextlib.contextmanager
    def extension(self) -> Iterator[None]:
        """Be without pg_stat_statements for a while."""
        self._server.execute("drop extension if exists pg_stat_statements")
        try:
            yield
        finally:
            self._server.execute("create extension if not exists pg_stat_statements")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Take every connection that is not kept for superusers, and the exporter's with them."""
        with contextlib.ExitStack() as taken:
            self._terminate()
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    way = self._server.conninfo(user="crowd", password="crowd")
                    taken.enter_context(contextlib.closing(psycopg.connect(way, connect_timeout=2)))
            yield

    def _limit(self, connections: int) -> None:
        for role in self._roles:
            name = sql.Identifier(role)
            self._server.execute(
                sql.SQL(f"alter role {{}} connection limit {connections}").format(name)
            )

    def _terminate(self) -> None:
        self._server.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = any (%s)",
            [list(self._roles)],
        )

    def _drop(self, name: str) -> None:
        try:
            self._server.execute(f"drop database {name}")
        except psycopg.errors.ObjectInUse as error:
            self._course.refused_drops.append(" ".join(str(error).split()))
            self._server.execute(f"drop database {name} with (force)")

    @contextlib.contextmanager
    def _session(self) -> Iterator[psycopg.Connection]:
        way = self._server.conninfo(host=str(self._server.directory))
        with contextlib.closing(
            psycopg.connect(way, autocommit=True, connect_timeout=5)
        ) as session:
            yield session


class LineFaults:
    """What can happen to a line."""

    def __init__(self, line: Line, chance: random.Random) -> None:
        self._line = line
        self._chance = chance

    def all(self) -> Mapping[str, Break]:
        """By kind."""
        return {
            "freeze": self.freeze,
            "freeze and cut": self.freeze_and_cut,
            "cut": self.cut,
            "refuse": self.refuse,
            "swallow": self.swallow,
        }

    @contextlib.contextmanager
    def freeze(self) -> Iterator[None]:
        """Hold all bytes for a while."""
        self._line.freeze()
        try:
            yield
        finally:
            self._line.thaw()

    @contextlib.contextmanager
    def freeze_and_cut(self) -> Iterator[None]:
        """Hold all bytes, and lose them."""
        self._line.freeze()
        try:
            yield
        finally:
            self._line.cut()
            self._line.thaw()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Reset what is there."""
        self._line.cut()
        yield

    @contextlib.contextmanager
    def refuse(self) -> Iterator[None]:
        """Be away."""
        self._line.refuse()
        self._line.cut()
        try:
            yield
        finally:
            self._line.accept()

    @contextlib.contextmanager
    def swallow(self) -> Iterator[None]:
        """Lose the server's answers, from somewhere in the middle on."""
        self._line.swallow(self._chance.randint(0, 20_000))
        try:
            yield
        finally:
            self._line.swallow(None)
