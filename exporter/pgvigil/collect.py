"""Scrape one target: the fresh queries now, and what the slow lane has found."""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import structlog

from pgvigil.catalogue import Query
from pgvigil.errors import AGAIN, Down, Unreachable
from pgvigil.kinds import open_source
from pgvigil.lane import LIFETIME, Layout, Ledger, MakeLayout, Reception, Sheet
from pgvigil.plan import Facts, Loss, Plan, Statement, concerning, disabled, make_plan, wanted
from pgvigil.slow import Result, SlowLane
from pgvigil.source import Source
from pgvigil.target import Target

GRACE = 1.0
"""Seconds past its deadline after which a scrape hangs, and is given up."""
_SHORTEST, _LONGEST = 10.0, 300.0
"""Bounds of what is taken for the interval at which a target is scraped, in seconds."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Scrape:
    """One scrape of one target; it fills while it runs, so that it can be served half done."""

    up: bool = False
    """Whether the server answered in this scrape."""
    down: Down | None = Down.TIMEOUT
    detail: str = "no answer yet"
    sheets: dict[str, Sheet] = field(default_factory=dict)
    """Those of the fresh queries that are complete, by query, in the plan's order."""
    results: Sequence[Result] = ()
    """What the slow lane has found, one after the other by query."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """The series for which the target's `max_series` left no room, by query."""
    seconds: float = 0.0
    ended_at: float = 0.0
    """Seconds since the epoch."""

    def answered(self) -> None:
        """The server has said something."""
        self.up, self.down, self.detail = True, None, ""


@dataclass(slots=True)
class _Running:
    """The scrape under way."""

    task: asyncio.Task[None]
    scrape: Scrape
    due: float
    """When it ends at the latest, unless it hangs; a time of the loop's clock."""


class Collector:
    """One target: its fresh lane, its slow lane and the books of both.

    Of the queries, only those for targets of its kind concern it. `make_layout` says how a
    statement's rows are written down.
    """

    def __init__(self, target: Target, queries: Sequence[Query], make_layout: MakeLayout) -> None:
        self.target = target
        self.queries = queries = concerning(queries, target.kind)
        self.facts: Facts | None = None
        """As last seen; kept while the server is away."""
        self._confirmed = float("-inf")
        """When the facts were last confirmed, on the monotonic clock."""
        self.plan: Plan | None = None
        """For what is asked of the server as a whole, fresh or slow."""
        self.last: Scrape | None = None
        """The last scrape that ended, without its results."""
        self.turned_at = 0.0
        """When the server was first seen as the last scrape saw it, up or down; since the epoch."""
        self.scrapes = 0
        self.joined = 0
        """Requests that were answered by a scrape that ran already."""
        self.overruns = 0
        """Scrapes that the deadline cut short."""
        self.abandoned = 0
        """Scrapes that hung, and were given up."""
        self.connects = 0
        self.connect_seconds = 0.0
        """What the last connection cost."""
        self.ledger = Ledger(target.name)
        self._off = disabled(queries, target.enable, target.disable)
        slow = [query for query in queries if query.every]
        self.slow = SlowLane(target, slow, self._off, self.ledger, make_layout)
        self._queries = [query for query in queries if query.scope == "server"]
        self._wanted = wanted(self._queries)
        self._by_name = {query.name: query for query in queries}
        self._make_layout = make_layout
        self._fresh: list[tuple[Statement, Layout]] = []
        self._session: Source | None = None
        self._lifetime = 0.0
        self._running: _Running | None = None
        self._asked: deque[float] = deque(maxlen=4)
        """When the last requests came, on the loop's clock."""
        self._hung_since: float | None = None
        """When the first scrape was due of those that hung since one has ended."""

    @property
    def facts_at(self) -> float:
        """When the facts were last confirmed, in seconds since the epoch.

        By the clock as it is now: one that was set makes them no older and no younger.
        """
        return time.time() - (time.monotonic() - self._confirmed)

    @facts_at.setter
    def facts_at(self, moment: float) -> None:
        self._confirmed = time.monotonic() - (time.time() - moment)

    @property
    def connections(self) -> int:
        """Connections open now."""
        return int(self._session is not None and not self._session.closed) + self.slow.connections

    @property
    def tls(self) -> bool:
        """Whether the open connection is encrypted."""
        return self._session is not None and self._session.tls

    def running(self) -> set[str]:
        """The names of the queries that run here."""
        names = {s.query.name for s in self.plan.statements} if self.plan else set()
        return names | self.slow.running()

    def losses(self) -> Iterator[Loss]:
        """The metrics that are missing though their query runs."""
        yield from self.plan.losses if self.plan else ()
        yield from self.slow.losses()

    def refusals(self) -> Iterator[tuple[Query, str, str]]:
        """Each query that does not run, the reason and a detail for a person."""
        plan = self.plan.refusals if self.plan else ()
        for refusal in (*plan, *self.slow.refusals()):
            yield refusal.query, refusal.reason, refusal.detail
        for (name, database), rest in self.ledger.resting().items():
            where = f" in {database}" if database else ""
            query = self._by_name[name]
            yield query, rest.failure.reason, f"{rest.failure.detail}{where}"

    async def scrape(self, deadline: float) -> Scrape:
        """The result of a scrape, at the latest at `deadline` (a time of the loop's clock).

        Who asks while a scrape runs joins it; so there is never more than one. It goes on though
        everybody who waited has hung up.
        """
        loop = asyncio.get_running_loop()
        self._asked.append(loop.time())
        if self._running and loop.time() > self._running.due:
            self._abandon(self._running)
        if self._running is None:
            scrape = Scrape()
            task = loop.create_task(self._run(scrape, deadline))
            task.add_done_callback(self._look_back)
            self._running = _Running(task, scrape, deadline + GRACE)
        else:
            self.joined += 1
        running = self._running
        await asyncio.wait({running.task}, timeout=max(0.0, deadline - loop.time()))
        return running.scrape

    @property
    def interval(self) -> float:
        """Seconds between two requests, as the last ones came; within bounds."""
        gaps = (later - before for before, later in pairwise(self._asked))
        return min(_LONGEST, max(_SHORTEST, max(gaps, default=0.0)))

    @property
    def wanted(self) -> bool:
        """Whether somebody still scrapes the target."""
        now = asyncio.get_running_loop().time()
        return bool(self._asked) and now - self._asked[-1] <= 3 * self.interval

    @property
    def idle(self) -> float:
        """Seconds since the last request."""
        now = asyncio.get_running_loop().time()
        return now - self._asked[-1] if self._asked else 0.0

    def overdue(self) -> float:
        """Seconds for which scrapes have been hanging; 0 while they end in time."""
        since = self._hung_since
        if since is None and self._running:
            since = self._running.due
        return max(0.0, asyncio.get_running_loop().time() - since) if since is not None else 0.0

    def _abandon(self, running: _Running) -> None:
        """Give up a scrape that hangs, so that the next can begin (pg_exporter of nbari, #34)."""
        self.abandoned += 1
        if self._hung_since is None:
            self._hung_since = running.due
        _log.error("a scrape hung and was given up", target=self.target.name)
        self._running = None
        running.task.cancel()
        if session := self._session:
            self._session = None
            # What takes its end well closes it itself, and before its descriptor has another use.
            asyncio.get_running_loop().call_later(GRACE, session.cut)

    async def retire(self) -> None:
        """Close when the scrape under way has ended; whoever waits for it gets all of it."""
        if running := self._running:
            patience = running.due - asyncio.get_running_loop().time()
            await asyncio.wait({running.task}, timeout=max(0.0, patience))
        await self.close()

    async def close(self) -> None:
        """End what runs, and the connection."""
        if self._running:
            self._running.task.cancel()
            await asyncio.wait({self._running.task}, timeout=GRACE)
        await self.slow.close()
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
            if self._is_running():
                self._end(scrape, begun)

    def _is_running(self) -> bool:
        """Whether this task is the scrape under way, and was not given up."""
        return self._running is not None and self._running.task is asyncio.current_task()

    def _end(self, scrape: Scrape, begun: float) -> None:
        self._running = self._hung_since = None
        self._complete(scrape)
        scrape.seconds, scrape.ended_at = time.perf_counter() - begun, time.time()
        self.scrapes += 1
        self._tell(scrape)
        self.last = replace(scrape, sheets={}, results=())
        self._retire()

    async def _ask_all(self, scrape: Scrape, deadline: float) -> None:
        """The whole plan in one round trip; another when the facts turn out to have changed."""
        for tries in range(1 + AGAIN):
            reused = self._session is not None and self._session.still_there()
            try:
                await self._ask_here(scrape, deadline)
                break
            except Unreachable as error:
                # A connection that died while it was idle says nothing about the server, nor does
                # one that stood in the way of what a standby replays.
                if tries == AGAIN or not (reused or error.passing):
                    raise

    async def _ask_here(self, scrape: Scrape, deadline: float) -> None:
        new = self._session is None or self._session.closed
        session = await self._connected(deadline)
        if new and (facts := await session.facts(deadline)) != self.facts:
            # They are asked first anyway; another version would log errors for the old plan.
            self._learn(facts)
        for _ in range(3):  # a server may be promoted, but not again and again
            scrape.sheets.clear()
            reception = self._reception(scrape)
            try:
                facts = await session.ask(reception.asks, reception.answers, deadline)
            except TimeoutError:
                if scrape.up:  # else it is no fault of any query
                    reception.give_up()
                raise
            scrape.answered()  # also where no query is fresh
            if facts == self.facts:  # on a new connection another object tells the same
                self.facts_at = time.time()
                await self._ask_again(session, scrape, reception, deadline)
                return
            self._learn(facts)

    async def _ask_again(
        self, session: Source, scrape: Scrape, reception: Reception, deadline: float
    ) -> None:
        """Ask what a standby has cancelled, which costs others nothing: they have been answered."""
        if not reception.cancelled:
            return
        tries = 0
        while reception.cancelled and tries < AGAIN:
            tries += 1
            reception = self._reception(scrape, reception.cancelled)
            await session.ask(reception.asks, reception.answers, deadline)
        order = [statement.query.name for statement, _ in self._fresh]
        scrape.sheets = {name: scrape.sheets[name] for name in order if name in scrape.sheets}

    async def _connected(self, deadline: float) -> Source:
        if self._session is None or self._session.closed:
            begun = time.perf_counter()
            session = await open_source(self.target, self._wanted, deadline)
            if not self._is_running():
                session.close()  # it comes too late
                raise TimeoutError
            self._session = session
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
        self.plan = make_plan(self._queries, facts, self._off)
        fresh = (statement for statement in self.plan.statements if not statement.query.every)
        self._fresh = [(statement, self._make_layout(statement, {})) for statement in fresh]
        self.ledger.wake()

    def _reception(self, scrape: Scrape, only: Collection[str] | None = None) -> Reception:
        resting = self.ledger.resting()
        work = [
            (statement, layout.sheet())
            for statement, layout in self._fresh
            if (statement.query.name, "") not in resting
            and (only is None or statement.query.name in only)
        ]

        def done(statement: Statement, sheet: Sheet) -> None:
            scrape.sheets[statement.query.name] = sheet

        return Reception(self.ledger, "", work, done, scrape.answered)

    def _complete(self, scrape: Scrape) -> None:
        """Add what the slow lane knows, as far as there is room."""
        if not scrape.up or not self.facts or not self.plan:
            return
        peer = self._session.peer if self._session else None
        self.slow.scraped(self.facts, self.plan, peer)
        results = list(self.slow.results())
        claims = [(self._by_name[name], sheet) for name, sheet in scrape.sheets.items()]
        claims += [(result.statement.query, result.sheet) for result in results]
        room = self.target.max_series
        left_out: Counter[str] = Counter()
        dropped: set[int] = set()
        for query, sheet in sorted(claims, key=lambda claim: claim[0].priority):
            if sheet.series <= room:
                room -= sheet.series
            else:
                left_out[query.name] += sheet.series
                dropped.add(id(sheet))
        scrape.left_out = left_out
        scrape.sheets = {n: sheet for n, sheet in scrape.sheets.items() if id(sheet) not in dropped}
        scrape.results = [result for result in results if id(result.sheet) not in dropped]

    def _tell(self, scrape: Scrape) -> None:
        """Log that a server went down or came back; once, not at each scrape."""
        before = self.last
        if before is None or before.up != scrape.up:
            self.turned_at = scrape.ended_at
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
