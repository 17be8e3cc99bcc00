"""Run the expensive queries of one target in the background, one database after the other."""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Container, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import structlog

from pgvigil import certificate, pace
from pgvigil.catalogue import Query
from pgvigil.certificate import Peer
from pgvigil.errors import Down, Unreachable
from pgvigil.kinds import open_source
from pgvigil.lane import LIFETIME, Layout, Ledger, MakeLayout, Reception, Sheet
from pgvigil.plan import Facts, Loss, Plan, Refusal, Statement, make_plan, wanted
from pgvigil.session import Session
from pgvigil.source import Answers, Ask, Rows, Source
from pgvigil.target import Target

PATIENCE = 600.0
"""Seconds after the last scrape for which the lane goes on; who is not scraped asks nothing."""

REFRESH = 60.0
"""Seconds after which the list of databases is read again; less when a query runs more often."""

KEEP = 300.0
"""Seconds for which a result is served at least, however often its query runs."""

_GROUP, _GROUP_AT_HOME = 4, 20
"""Statements sent to a database at once, others' and the connected one. Between two groups others
may be left."""
_STAY = 1.0
"""Seconds after which a database is left although work remains: DROP DATABASE waits 5 seconds for
others to leave, then gives up (postgres_exporter #529)."""
_PAUSE = 0.25
"""Seconds out of a database before it is visited again; DROP DATABASE looks every 0.1 seconds."""
_FRESH = 1.0
"""Seconds after which the list of databases is read again before one is visited: who comes to a
database that is gone leaves a line in the server's log."""
_CONNECT = 5.0
"""Seconds a connection to a database may take."""
_RETRY = 60.0
"""Seconds before a database that could not be visited is tried again, or a query that failed."""
_IDLE = 600.0
"""Seconds before a database is looked at again for what does not fit it."""
_HANDSHAKE = 3600.0
"""Seconds after which the server's certificate is looked at again."""
_FAREWELL = 2.0
"""Seconds that statements under way are given when the program ends."""
_LATE = 10.0
"""Seconds over its time after which a visit is called late."""

_PROVIDERS = {
    "rdsadmin": "Amazon RDS",
    "cloudsqladmin": "Google Cloud SQL",
    "alloydbadmin": "Google AlloyDB",
    "azure_maintenance": "Azure",
    "azure_sys": "Azure",
}
"""Databases that managed services keep for themselves (postgres_exporter #681), with whose they
are. Customers may not enter them."""

# An invalid database, left by an interrupted DROP, has the limit -2; one of limit 0 lets nobody in.
_LIST = """select datname,
  case
    when datname = pg_catalog.current_database() then 'here'
    when not datallowconn or datistemplate or datconnlimit in (-2, 0) then null
    when pg_catalog.has_database_privilege(oid, 'connect') then 'open'
    when not pg_catalog.has_database_privilege(oid, 'connect') then 'shut'
  end
from pg_catalog.pg_database"""
_SIZES = """select datname, pg_catalog.pg_database_size(oid)
from pg_catalog.pg_database
where datallowconn and not datistemplate and datconnlimit not in (-2, 0)
  and pg_catalog.has_database_privilege(oid, 'connect')"""

_log = structlog.get_logger()


@dataclass(slots=True)
class Result:
    """What a query last found in a place."""

    statement: Statement
    sheet: Sheet
    at: float
    """When it was asked, on the monotonic clock."""


@dataclass(slots=True)
class Place:
    """The server itself, or one of its databases, and when what is due there."""

    database: str
    """``''`` for the server."""
    due: dict[str, float] = field(default_factory=dict)
    """By query; times of the monotonic clock."""
    results: dict[str, Result] = field(default_factory=dict)
    layouts: dict[str, tuple[Statement, Layout]] = field(default_factory=dict)
    """Of queries that show their rows in the light of those before."""
    facts: Facts | None = None
    plan: Plan | None = None
    visited: float = 0.0
    """When it was last visited, on the monotonic clock; 0 for never."""
    down: Unreachable | None = None
    """Why the last visit failed."""

    @property
    def next(self) -> float:
        """When it is to be visited; infinity when nothing is to do."""
        return min(self.due.values(), default=float("inf"))


class _Findings(NamedTuple):
    """What the plans of all databases come to."""

    running: frozenset[str]
    refusals: Sequence[Refusal]
    losses: Sequence[Loss]


def _findings(plans: Sequence[Plan]) -> _Findings:
    running = frozenset(s.query.name for plan in plans for s in plan.statements)
    given = {m.name for plan in plans for s in plan.statements for m in s.metrics}
    refused = {refusal.query.name: refusal for plan in plans for refusal in plan.refusals}
    lost = {loss.metric.name: loss for plan in plans for loss in plan.losses}
    return _Findings(
        running,
        [refusal for name, refusal in refused.items() if name not in running],
        [loss for name, loss in lost.items() if name not in given],
    )


class SlowLane:
    """The background work on one target; it begins with the first scrape that finds the server up.

    One connection to the connected database stays open, and one more to one other database at a
    time.
    """

    def __init__(
        self,
        target: Target,
        queries: Sequence[Query],
        off: Container[str],
        ledger: Ledger,
        make_layout: MakeLayout,
    ) -> None:
        self.server = Place("")
        self.databases: dict[str, Place] = {}
        """Those that are visited, by name."""
        self.left_out: list[str] = []
        """The smallest databases, for which `max_databases` leaves no room."""
        self._target = target
        self._off = off
        self._queries = [query for query in queries if query.scope == "database"]
        self._rounds = {q.name: 0.0 for q in self._queries if q.name not in off}
        self._every = {query.name: query.every for query in queries}
        self._wanted = wanted(queries)
        self.provider = ""
        """Whose managed service the server is, for a person; empty where none was recognised."""
        self.certificate_expiry: float | None = None
        """Seconds since the epoch; None when it is not known."""
        self._peer: Peer | None = None
        self._peered = float("-inf")
        self._visitor: Source | None = None
        """The connection to another database, while there is one."""
        self._ledger = ledger
        self._make_layout = make_layout
        self._findings: _Findings | None = None
        self._session: Source | None = None
        self._lifetime = 0.0
        self._facts: Facts | None = None
        self._refresh = min([REFRESH, *(q.every for q in self._queries if q.name not in off)])
        self._listed = float("-inf")
        self._sizes: dict[str, int] = {}
        self._scraped = 0.0
        self._woken = asyncio.Event()
        self._due = float("inf")
        """When what is under way ends at the latest, unless it hangs; on the loop's clock."""
        self._task: asyncio.Task[None] | None = None
        self._gave_way = False
        self.put_off = 0
        """Visits that waited for a program that could not keep up."""

    @property
    def connections(self) -> int:
        """Connections open now."""
        return sum(s is not None and not s.closed for s in (self._session, self._visitor))

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return self._task is not None and self._due < float("inf")

    def overdue(self) -> float:
        """Seconds for which what is under way has been hanging; 0 while it is within its bounds."""
        return max(0.0, asyncio.get_running_loop().time() - self._due - _CONNECT)

    def _deadline(self, seconds: float) -> float:
        """The time until which the next step may take."""
        self._due = _deadline(seconds)
        return self._due

    def scraped(self, facts: Facts, plan: Plan, peer: Peer | None) -> None:
        """A scrape has found the server up: go on, with what fits it now.

        `peer` shows a certificate to those who connect.
        """
        if peer != self._peer:
            self._peer, self._peered, self.certificate_expiry = peer, float("-inf"), None
        before, self._facts = self._facts, facts
        if before and (before.version, before.in_recovery) != (facts.version, facts.in_recovery):
            for place in (self.server, *self.databases.values()):
                place.due = dict.fromkeys(place.due, 0.0)
                # A promotion changes what is asked, and leaves what a server has counted and holds.
                _drop_others(
                    place.results,
                    {
                        name
                        for name, result in place.results.items()
                        if before.version == facts.version and result.statement.query.role == "any"
                    },
                )
        if plan is not self.server.plan:
            known = self.server.plan.statements if self.server.plan else ()
            self.server.plan = plan
            # What is asked in other words, as after a grant, is asked at once.
            self.server.due = {
                name: self.server.due.get(name, 0.0) if statement in known else 0.0
                for statement in plan.statements
                if statement.query.every and (name := statement.query.name)
            }
            _drop_others(self.server.results, self.server.due.keys())
        self._scraped = time.monotonic()
        self._woken.set()
        if self._task is None and (self.server.due or self._rounds):
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._ended)

    def results(self) -> Iterator[Result]:
        """What is young enough to be served, query by query, the biggest database first."""
        now = time.monotonic()
        for name, every in self._every.items():
            for place in self.databases.values() if name in self._rounds else (self.server,):
                result = place.results.get(name)
                if result and now - result.at <= max(3 * every, KEEP):
                    yield result

    def running(self) -> frozenset[str]:
        """The names of the queries that run in some database."""
        return self._found().running

    def refusals(self) -> Sequence[Refusal]:
        """The queries that run in no database, with what forbids them in one of those visited."""
        return self._found().refusals

    def losses(self) -> Sequence[Loss]:
        """The metrics that no database gives though their query runs."""
        return self._found().losses

    def _found(self) -> "_Findings":
        if self._findings is None:
            plans = [place.plan for place in self.databases.values() if place.plan]
            self._findings = _findings(plans)
        return self._findings

    def late(self) -> list[str]:
        """The databases whose visit is overdue."""
        now = time.monotonic()
        return [name for name, place in self.databases.items() if now - place.next > _LATE]

    async def close(self) -> None:
        """End what runs, and the connection.

        What is under way gets a moment: a server writes a line about each client it loses.
        """
        self._scraped = float("-inf")
        self._woken.set()
        if task := self._task:
            await asyncio.wait({task}, timeout=_FAREWELL)
            task.cancel()
            await asyncio.wait({task})
        self._leave()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log a fault of our own; the next scrape starts the lane again."""
        self._task = None
        if not task.cancelled() and (error := task.exception()):
            _log.error("the slow lane fell by our fault", target=self._target.name, exc_info=error)

    def _leave(self) -> None:
        if self._session:
            self._session.close()

    async def _run(self) -> None:
        try:
            while (now := time.monotonic()) < self._scraped + PATIENCE:
                listing = self._listed + self._refresh if self._rounds else float("inf")
                place = min((self.server, *self.databases.values()), key=lambda p: p.next)
                handshake = self._peered + _HANDSHAKE if self._peer else float("inf")
                due = min(place.next, listing, handshake)
                if due > now:
                    self._woken.clear()
                    self._due = float("inf")
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(due - now, PATIENCE)):
                            await self._woken.wait()  # a scrape may change what is due
                elif await self._gives_way():
                    pass  # what is due now may be another
                elif handshake <= now and self._peer:
                    self._peered = now
                    self._deadline(_CONNECT)
                    self.certificate_expiry = await certificate.expiry(self._peer, _CONNECT)
                elif listing <= place.next:
                    await self._list()
                else:
                    if place.database and self._listed < now - _FRESH:
                        await self._list()
                    if place is self.server or place is self.databases.get(place.database):
                        await self._visit(place)
        finally:
            self._leave()

    async def _gives_way(self) -> bool:
        """Whether scrapes had to come first; who asks again is not put off at once."""
        if self._gave_way:
            self._gave_way = False
            return False
        self._due = float("inf")
        self._gave_way = await pace.give_way()
        self.put_off += self._gave_way
        return self._gave_way

    async def _visit(self, place: Place) -> None:
        """Run what is due in a place; the rest of the world goes on whatever happens there."""
        begun = time.monotonic()
        due = {name for name, moment in place.due.items() if moment <= begun + 1}
        # One draw for all, so that what ran together stays together.
        share = random.uniform(0.9, 1.0)  # noqa: S311  (not a secret)
        try:
            await self._work(place, due)
        except (Unreachable, TimeoutError) as error:
            self._stumbled(place, error)
            place.due |= dict.fromkeys(due, time.monotonic() + _RETRY * share)
            return
        place.visited, place.down = time.monotonic(), None
        running = {s.query.name for s in place.plan.statements} if place.plan else set()
        for name in due & place.due.keys():
            pause = self._every[name]
            if name not in running:
                # What does not fit may do so one day: an extension is made, a standby promoted.
                pause = max(pause, _IDLE)
            elif self._ledger.failing(name, place.database):
                pause = min(pause, max(_RETRY, pause / 12))
            place.due[name] = begun + share * pause

    def _stumbled(self, place: Place, error: Unreachable | TimeoutError) -> None:
        if not isinstance(error, Unreachable):
            error = Unreachable(Down.TIMEOUT, "no answer in time")
        if place.database and (place.down is None or place.down.reason != error.reason):
            _log.warning(
                "a database cannot be visited",
                target=self._target.name,
                database=place.database,
                reason=error.reason,
                detail=error.detail,
            )
        place.down = error
        if error.reason is Down.INVALID_CATALOG_NAME:
            self._listed = float("-inf")  # it was dropped, or renamed

    async def _work(self, place: Place, due: set[str]) -> None:
        home = not place.database or (self._facts and place.database == self._facts.database)
        session = await (self._at_home() if home else self._enter(place.database))
        try:
            if place.database:
                self._learn(place, await session.facts(self._deadline(_CONNECT)))
            elif not session.known:
                self._compare(await session.facts(self._deadline(_CONNECT)))
            assert place.plan
            resting = self._ledger.resting()
            work = [
                statement
                for statement in place.plan.statements
                if statement.query.name in due
                and (statement.query.name, place.database) not in resting
            ]
            group = _GROUP_AT_HOME if home else _GROUP
            for first in range(0, len(work), group):
                if self._scraped < 0:
                    return  # the program ends
                if not home and time.monotonic() - session.opened > _STAY:
                    session.close()
                    await asyncio.sleep(_PAUSE)
                    session = await self._enter(place.database)
                await self._ask(session, place, work[first : first + group])
        finally:
            if not home:
                session.close()

    def _compare(self, facts: Facts) -> None:
        """See whether a new connection leads to what the plan is for; else a scrape must tell.

        A server may have been upgraded since, or given way to its standby.
        """
        seen = self._facts
        if seen and (facts.version, facts.in_recovery) != (seen.version, seen.in_recovery):
            raise Unreachable(Down.OTHER, "the server is another one than the last scrape saw")

    def _learn(self, place: Place, facts: Facts) -> None:
        """Plan for a database, if anything has changed there."""
        if facts == place.facts and place.plan:
            return
        place.facts, place.plan = facts, make_plan(self._queries, facts, self._off)
        _drop_others(place.results, {s.query.name for s in place.plan.statements})
        self._findings = None

    async def _ask(self, session: Source, place: Place, group: Sequence[Statement]) -> None:
        asked = time.monotonic()

        def keep(statement: Statement, sheet: Sheet) -> None:
            place.results[statement.query.name] = Result(statement, sheet, asked)

        work = [(statement, self._layout(place, statement).sheet()) for statement in group]
        reception = Reception(self._ledger, place.database, work, keep)
        bound = _CONNECT + sum(statement.query.timeout for statement in group)
        try:
            await session.ask(reception.asks, reception.answers, self._deadline(bound))
        except TimeoutError:
            reception.give_up()
            raise

    def _layout(self, place: Place, statement: Statement) -> Layout:
        labels = {"datname": shown(place.database)} if place.database else {}
        if statement.query.top is None and not statement.query.computes:
            return self._make_layout(statement, labels)
        # What it shows depends on the rows before.
        known = place.layouts.get(statement.query.name)
        if known is None or known[0] != statement:
            known = statement, self._make_layout(statement, labels)
            place.layouts[statement.query.name] = known
        return known[1]

    async def _at_home(self) -> Source:
        """The connection to the connected database."""
        session = self._session
        if session and not session.closed and time.monotonic() - session.opened > self._lifetime:
            session.close()
        if session is None or not session.still_there():
            session = await open_source(self._target, self._wanted, self._deadline(_CONNECT))
            self._session = session
            self._lifetime = LIFETIME * random.uniform(0.9, 1.1)  # noqa: S311
        return session

    async def _enter(self, database: str) -> Source:
        """A connection to another database."""
        connection = {**self._target.connection, "dbname": database}
        target = replace(self._target, connection=connection)
        self._visitor = await open_source(target, self._wanted, self._deadline(_CONNECT))
        return self._visitor

    async def _list(self) -> None:
        """See which databases there are now."""
        self._listed = time.monotonic()
        try:
            session = await self._at_home()
            rows = await _rows(session, _LIST, self._deadline(_CONNECT + 5))
            self.provider = next((_PROVIDERS[name] for name, _ in rows if name in _PROVIDERS), "")
            pooled = isinstance(session, Session) and session.pooled
            ways = (b"here",) if pooled else (b"here", b"open")
            names = [name for name, way in rows if way in ways and self._watched(name)]
            # What the role never might enter is somebody's choice, what it might is lost.
            shut = [name for name, way in rows if way == b"shut" and name in self.databases]
            if not self._sizes.keys() >= set(names):
                # Looking at every file is for when there is something new to compare.
                sizes = await _rows(session, _SIZES, self._deadline(_CONNECT + 5))
                self._sizes = {name: int(size or 0) for name, size in sizes}
        except (Unreachable, TimeoutError):
            return  # the fresh lane tells that the server is away
        self._sizes = {name: self._sizes.get(name, 0) for name in names}
        names.sort(key=lambda name: (-self._sizes[name], name))
        most = self._target.max_databases
        self.left_out = names[most:]
        before, visited = self.databases, names[:most]
        for name in before.keys() - set(visited):
            self._ledger.forget(name)
        self._findings = None
        # In the order of their sizes, so that the biggest is visited first. What was shut has
        # nothing due, and begins anew.
        self.databases = {
            name: before[name] if name in before and before[name].due else self._open(name)
            for name in visited
        }
        self.databases |= {name: self._shut(before[name]) for name in shut}

    def _open(self, name: str) -> Place:
        return Place(name, dict(self._rounds))

    def _shut(self, place: Place) -> Place:
        """A database that the role may not enter any more: it is named, and not tried."""
        if not place.due:
            return place
        shut = Place(place.database, down=place.down)
        self._stumbled(shut, Unreachable(Down.INSUFFICIENT_PRIVILEGE, "CONNECT was revoked"))
        return shut

    def _watched(self, name: str) -> bool:
        if name in _PROVIDERS:
            return False
        label = shown(name)
        include, exclude = self._target.include_databases, self._target.exclude_databases
        return (not include or _matches(include, label)) and not _matches(exclude, label)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _drop_others(results: dict[str, Result], names: Set[str]) -> None:
    for name in results.keys() - names:
        del results[name]


def shown(name: str) -> str:
    """A database's name as a label: a name may hold bytes that are no UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _deadline(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def _rows(session: Source, text: str, deadline: float) -> list[tuple[str, bytes | None]]:
    """The rows of a statement of our own about databases: name and value."""
    found: list[tuple[str, bytes | None]] = []

    def take(_: int, rows: Rows) -> None:
        for row in range(rows.ntuples):
            # Databases of one server may differ in encoding: a name's bytes must come back as sent.
            name = (rows.get_value(row, 0) or b"").decode(errors="surrogateescape")
            found.append((name, rows.get_value(row, 1)))

    answers = Answers(take, lambda _position, _failure, _seconds: None)
    await session.ask([Ask(text, 5.0)], answers, deadline)
    return found
