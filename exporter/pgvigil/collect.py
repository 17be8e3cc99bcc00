"""Run the plan of one target, one scrape at a time, so that no fault costs more than its query."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from pgvigil.catalogue import Query
from pgvigil.config import Target
from pgvigil.errors import Down, QueryFailed, Unreachable
from pgvigil.plan import Facts, Plan, Statement, make_plan, wanted
from pgvigil.session import Answers, Ask, Rows, Session

LIFETIME = 600.0
"""Seconds after which a connection is made anew: a backend's memory grows with its age, and so the
way to connect is tried now and then (postgres_exporter #694, #436)."""

QUIET = 3600.0
"""Seconds for which a query that cannot work here is not sent again, for the server log's sake."""

_CANNOT_WORK = ("0A", "3D", "3F", "42")
"""SQLSTATE classes that the next scrape would meet again: not supported, not there, not allowed."""

_log = structlog.get_logger()


class Sheet(Protocol):
    """What the rows of one run of one statement are written on."""

    rows: int
    dropped: Counter[str]
    """The samples that were left out, by reason."""

    def add(self, rows: Rows) -> None:
        """Take some rows; raises QueryFailed when they are not what the catalogue declares."""


class Layout(Protocol):
    """Gives the sheets for the runs of one statement."""

    def sheet(self) -> Sheet:
        """A sheet for one run."""


@dataclass(slots=True)
class Tally:
    """What one query has done on one target since the program started."""

    seconds: float = 0.0
    rows: int = 0
    succeeded: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Scrape:
    """One scrape of one target; it fills while it runs, so that it can be served half done."""

    up: bool = False
    """Whether the server answered in this scrape."""
    down: Down | None = Down.TIMEOUT
    detail: str = "no answer yet"
    sheets: dict[str, Sheet] = field(default_factory=dict)
    """Those that are complete, by query, in the plan's order."""
    seconds: float = 0.0
    ended_at: float = 0.0
    """Seconds since the epoch."""


class Collector:
    """The fresh lane of one target: its connection, its plan and what became of each query.

    `make_layout` says how a statement's rows are written down.
    """

    def __init__(
        self, target: Target, queries: Sequence[Query], make_layout: Callable[[Statement], Layout]
    ) -> None:
        self.target = target
        self.facts: Facts | None = None
        """As last seen; kept while the server is away."""
        self.facts_at = 0.0
        """When the facts were last confirmed, in seconds since the epoch."""
        self.plan: Plan | None = None
        self.last: Scrape | None = None
        """The last scrape that ended, without its sheets."""
        self.layouts: dict[str, Layout] = {}
        """How each query of the plan is written down."""
        self.tallies: dict[str, Tally] = {}
        self.quiet: dict[str, tuple[float, QueryFailed]] = {}
        """Queries that proved impossible here: until when they rest (monotonic), and why."""
        self.scrapes = 0
        self.overruns = 0
        """Scrapes that the deadline cut short."""
        self.connects = 0
        self.connect_seconds = 0.0
        """What the last connection cost."""
        self._queries = [query for query in queries if not query.every]
        self._wanted = wanted(queries)
        self._make_layout = make_layout
        self._session: Session | None = None
        self._lifetime = 0.0
        self._running: tuple[asyncio.Task[None], Scrape] | None = None

    @property
    def connections(self) -> int:
        """Connections open now."""
        return int(self._session is not None and not self._session.closed)

    @property
    def tls(self) -> bool:
        """Whether the open connection is encrypted."""
        return self._session is not None and self._session.tls

    async def scrape(self, deadline: float) -> Scrape:
        """The result of a scrape, at the latest at `deadline` (a time of the loop's clock).

        Who asks while a scrape runs joins it; so there is never more than one. It goes on though
        everybody who waited has hung up.
        """
        loop = asyncio.get_running_loop()
        if self._running is None:
            scrape = Scrape()
            task = loop.create_task(self._run(scrape, deadline))
            task.add_done_callback(self._look_back)
            self._running = task, scrape
        task, scrape = self._running
        await asyncio.wait({task}, timeout=max(0.0, deadline - loop.time()))
        return scrape

    async def close(self) -> None:
        """End what runs, and the connection."""
        if self._running:
            self._running[0].cancel()
            await asyncio.wait({self._running[0]})
        if self._session:
            self._session.close()

    async def _run(self, scrape: Scrape, deadline: float) -> None:
        begun = time.perf_counter()
        try:
            await self._ask_all(scrape, deadline)
        except Unreachable as error:
            scrape.up, scrape.down, scrape.detail = False, error.reason, error.detail
        except TimeoutError:
            self.overruns += 1
            if not scrape.up:
                scrape.down, scrape.detail = Down.TIMEOUT, "no answer before the deadline"
        finally:
            self._running = None
            scrape.seconds, scrape.ended_at = time.perf_counter() - begun, time.time()
            self.scrapes += 1
            self._tell(scrape)
            self.last = replace(scrape, sheets={})
            self._retire()

    async def _ask_all(self, scrape: Scrape, deadline: float) -> None:
        """The whole plan in one round trip; another when the facts turn out to have changed."""
        reused = self._session is not None and self._session.still_there()
        try:
            await self._ask_here(scrape, deadline)
        except Unreachable:
            # A connection that died while it was idle says nothing about the server.
            if not reused:
                raise
            await self._ask_here(scrape, deadline)

    async def _ask_here(self, scrape: Scrape, deadline: float) -> None:
        session = await self._connected(deadline)
        if self.plan is None:
            self._learn(await session.facts(deadline))
        for _ in range(3):  # a server may be promoted, but not again and again
            scrape.sheets.clear()
            reception = self._reception(scrape)
            try:
                facts = await session.ask(reception.asks, reception.answers(), deadline)
            except TimeoutError:
                reception.give_up()
                raise
            if facts == self.facts:  # on a new connection another object tells the same
                self.facts_at = time.time()
                return
            self._learn(facts)

    async def _connected(self, deadline: float) -> Session:
        if self._session is None or self._session.closed:
            begun = time.perf_counter()
            self._session = await Session.open(self.target, self._wanted, deadline)
            self.connects += 1
            self.connect_seconds = time.perf_counter() - begun
            self._lifetime = LIFETIME * random.uniform(0.9, 1.1)  # noqa: S311  (not a secret)
        return self._session

    def _learn(self, facts: Facts) -> None:
        if facts.superuser and not (self.facts and self.facts.superuser):
            _log.warning(
                "connected as a superuser; `pgvigil grants` prints a role that is enough",
                target=self.target.name,
                user=facts.user,
            )
        self.facts, self.facts_at = facts, time.time()
        self.plan = make_plan(self._queries, facts)
        self.layouts = {s.query.name: self._make_layout(s) for s in self.plan.statements}
        self.quiet.clear()

    def _reception(self, scrape: Scrape) -> "_Reception":
        assert self.plan
        now = time.monotonic()
        self.quiet = {name: rest for name, rest in self.quiet.items() if rest[0] > now}
        chosen = [s for s in self.plan.statements if s.query.name not in self.quiet]
        sheets = [self.layouts[statement.query.name].sheet() for statement in chosen]
        return _Reception(self, scrape, chosen, sheets)

    def settle(self, query: Query, sheet: Sheet, failure: QueryFailed | None, took: float) -> None:
        """Book what one run of one query came to."""
        tally = self.tallies.setdefault(query.name, Tally())
        tally.seconds += took
        if sheet.dropped:
            tally.dropped += sheet.dropped
        if failure is None:
            tally.rows, tally.succeeded = sheet.rows, True
            return
        if tally.succeeded or not tally.failures[failure.reason]:
            _log.warning(
                "a query failed",
                target=self.target.name,
                query=query.name,
                reason=failure.reason,
                detail=failure.detail,
            )
        tally.failures[failure.reason] += 1
        tally.succeeded = False
        if failure.sqlstate.startswith(_CANNOT_WORK) or failure.reason == "wrong_columns":
            self.quiet[query.name] = time.monotonic() + QUIET, failure

    def _tell(self, scrape: Scrape) -> None:
        """Log that a server went down or came back; once, not at each scrape."""
        before = self.last
        log = _log.bind(target=self.target.name)
        if not scrape.up and (before is None or before.up or before.down != scrape.down):
            log.warning("the server cannot be asked", reason=scrape.down, detail=scrape.detail)
        if scrape.up and not (before and before.up) and self.facts:
            log.info(
                "the server answers",
                version=self.facts.version,
                role=self.facts.role,
                user=self.facts.user,
            )

    def _look_back(self, task: asyncio.Task[None]) -> None:
        """Log a fault of our own; the scrape it ended is served as far as it came."""
        if not task.cancelled() and (error := task.exception()):
            _log.error("a scrape failed by our fault", target=self.target.name, exc_info=error)

    def _retire(self) -> None:
        session = self._session
        if session and time.monotonic() - session.opened > self._lifetime:
            session.close()


class _Reception:
    """Takes the answers to one pipeline and stands between each query and all the others."""

    def __init__(
        self,
        collector: Collector,
        scrape: Scrape,
        statements: Sequence[Statement],
        sheets: Sequence[Sheet],
    ) -> None:
        self.asks = [Ask(s.text, s.query.timeout) for s in statements]
        self._collector = collector
        self._scrape = scrape
        self._statements = statements
        self._sheets = sheets
        self._faults: dict[int, QueryFailed] = {}
        self._ended = 0

    def answers(self) -> Answers:
        return Answers(self._rows, self._end)

    def _rows(self, position: int, rows: Rows) -> None:
        self._up()
        if position in self._faults:
            return
        try:
            self._sheets[position].add(rows)
        except QueryFailed as failure:
            self._faults[position] = failure
        except Exception as error:  # noqa: BLE001  the wall: one query's oddity stays its own
            _log.exception("a result could not be read", query=self._name(position))
            self._faults[position] = QueryFailed("unreadable", type(error).__name__)

    def _end(self, position: int, failure: QueryFailed | None, seconds: float) -> None:
        self._up()
        self._ended = position + 1
        failure = failure or self._faults.get(position)
        query, sheet = self._statements[position].query, self._sheets[position]
        self._collector.settle(query, sheet, failure, seconds)
        if failure is None:
            self._scrape.sheets[query.name] = sheet

    def give_up(self) -> None:
        """Book the statements that the deadline left unanswered."""
        if not self._scrape.up:
            return  # no fault of any query
        for position in range(self._ended, len(self._statements)):
            failure = QueryFailed("unanswered", "the deadline came first")
            query = self._statements[position].query
            self._collector.settle(query, self._sheets[position], failure, 0.0)

    def _up(self) -> None:
        self._scrape.up, self._scrape.down, self._scrape.detail = True, None, ""

    def _name(self, position: int) -> str:
        return self._statements[position].query.name
