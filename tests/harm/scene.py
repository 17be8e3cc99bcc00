"""Puts an exporter before a server, has a fault happen, and judges what was seen."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import Timer
from typing import Any, Literal, TypeVar

from lab.exporter import Page
from lab.line import Line
from lab.postgres import Server, Setting
from tests.harm.observer import Observer, Session
from tests.harm.subject import Answer, Running, Subject

BUDGET = 3
"""Sessions that an exporter may have at any moment."""

KEPT = 0.98
"""The share of the series of before that must be there while the fault lasts; a few come and go
with the server's own life."""

ROLE = "harm"
"""The login of every exporter here: pg_monitor, and no password on loopback."""

ROOM = 20_000
"""Series that a page may have; nobody's small server needs as many."""

GROWTH = 200 * 1024 * 1024
"""Bytes by which the process may grow over the most it had before the fault."""

Series = tuple[str, frozenset[tuple[str, str]]]
State = Literal["up", "down", "either"]
Thing = TypeVar("Thing")
Rule = Literal[
    "answers", "truth", "series", "bounds", "connections", "leaves", "recovers", "log", "lives"
]  # in the order in which a table shows them

RULES: Mapping[Rule, str] = {
    "answers": "each scrape is answered 200, whole and in time, and parses",
    "truth": "what the page says of the fault is right, or it says nothing",
    "series": f"{KEPT:.0%} of the series that the fault does not concern are there while it lasts",
    "bounds": f"no page has over {ROOM:,} series, nor grows the process by over "
    f"{GROWTH // 1024**2} MB",
    "connections": f"at most {BUDGET} sessions at any look, ten a second",
    "leaves": "no statement runs on 2 s after the answer, none is ever idle in transaction",
    "recovers": "the first scrape after the fault is as those before it",
    "log": "no line of severity ERROR in the server's log but for what the fault is made of",
    "lives": "the process goes on",
}


class UnplayableError(RuntimeError):
    """This machine lacks what a scenario needs."""


@dataclass(frozen=True)
class Scenario:
    """One fault, and what a good exporter does while it lasts.

    `fault` is entered when scrapes come in steadily; leaving it heals. It may keep things for
    `truth` in `scene.notes`.
    """

    name: str
    """A sentence, as the table shows it."""
    fault: Callable[["Scene"], AbstractContextManager[None]]
    expects: State = "up"
    """What the page must say of the server while it lasts."""
    before: Callable[["Scene"], None] | None = None
    """Prepares the server before the exporter starts; raises UnplayableError where it cannot."""
    truth: Callable[["Scene"], Iterable[str]] | None = None
    """Complaints about what the pages said, after all is over."""
    concerned: Callable[[Series], bool] | None = None
    """Whether the fault may take a series away, or bring it."""
    provoked: str = ""
    """A pattern of the lines in the server's log that the fault itself is made of."""
    scrapes: int = 2
    """Scrapes while it lasts."""
    watch: Callable[["Scene"], None] | None = None
    """Instead, how it is scraped while it lasts."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    standby: bool = False
    """Whether the exporter watches a standby, of `scene.primary`."""
    line: bool = False
    """Whether it reaches the server by a line that can break, `scene.line`."""
    superuser: bool = False
    sql: str | None = None
    """A query of the user's own; only for exporters that take one."""


class Scene:
    """A server, an exporter that watches it, and what was seen of both."""

    def __init__(
        self, scenario: Scenario, subject: Subject, timeout: float, major: int = 18
    ) -> None:
        """`timeout` is what each scrape allows, in seconds."""
        self.scenario = scenario
        self.subject = subject
        self.timeout = timeout
        self.notes: dict[str, Any] = {}
        self.role = f"{ROLE}_superuser" if scenario.superuser else ROLE
        self._pending: list[Timer] = []
        self.before: list[Answer] = []
        self.during: list[Answer] = []
        self.after: list[Answer] = []
        self.steady: frozenset[Series] = frozenset()
        """The series that stand on every page before the fault."""
        self._memory = 0
        self.grown = 0
        """Bytes by which the process has grown over the most it had before the fault."""
        self._major = major
        self._stack = ExitStack()

    def __enter__(self) -> "Scene":
        try:
            self._set()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set(self) -> None:
        scenario = self.scenario
        settings = {"max_connections": 30, "autovacuum": False, **scenario.settings}
        hba = ["host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust"]
        self.primary = Server(self._major, settings=settings, hba=hba)
        self._stack.callback(self.primary.destroy)
        if scenario.standby:
            # A standby goes by the settings with which its primary last ran.
            self.primary.start()
            self.server = self.primary.standby()
        else:
            self.server = self.primary
            self.server.start()
        self._populate()
        port = self.server.port
        if scenario.line:
            self.line = self._stack.enter_context(Line("127.0.0.1", port))
            port = self.line.port
        if scenario.before:
            scenario.before(self)
        self.reached = port
        """The port by which the exporter reaches the server."""
        conninfo = f"host=127.0.0.1 port={port} user={self.role} dbname=postgres sslmode=disable"
        self._conninfo = conninfo
        self._log_begins = self.server.log_position()
        self.observer = self._stack.enter_context(Observer(self.server, self.role))
        self._start()

    def _start(self) -> None:
        self.exporter = self._stack.enter_context(
            Running(self.subject, self._conninfo, self.timeout, self.scenario.sql)
        )

    def _populate(self) -> None:
        """A few databases with a few tables each, as small as a server with a life can be."""
        execute = self.primary.execute
        execute(f"create role {ROLE} login in role pg_monitor")
        execute(f"create role {ROLE}_superuser login superuser")
        execute("create extension if not exists pg_stat_statements")
        for database in ("app", "shop"):
            execute(f"create database {database}")
        for database in ("postgres", "app", "shop"):
            execute(
                "create table orders (n int primary key, note text);"
                "insert into orders select n, repeat('x', 50) from generate_series(1, 1000) as n;"
                "create table customers (n int primary key); analyze",
                database=database,
            )
        if self.scenario.standby:
            lsn = execute("select pg_current_wal_lsn()")[0][0]
            self.server.wait_until(f"select pg_last_wal_replay_lsn() >= '{lsn}'")

    def play(self) -> "Verdict":
        """Let it happen and judge."""
        self._settle()
        self._memory = self.exporter.peak_memory()
        with self.scenario.fault(self):
            if self.scenario.watch:
                self.scenario.watch(self)
            else:
                for _ in range(self.scenario.scrapes):
                    self.scrape()
            # Long enough to see what runs on though its answer went out.
            time.sleep(2.3)
            self._watched_until = time.monotonic()
            self.grown = max(self.grown, self.exporter.peak_memory() - self._memory)
        self.after = [self.exporter.scrape()]
        time.sleep(0.2)
        return Verdict.of(self)

    def scrape(self) -> Answer:
        """One scrape during the fault."""
        for timer in self._pending:
            timer.start()
        answer = self.exporter.scrape()
        self.during.append(answer)
        while self._pending:
            self._pending.pop().join()
        return answer

    def start_anew(self, *, wait: bool = True) -> None:
        """End the exporter and start it on the server as it is now; return when it knows it.

        Without `wait`, return when it listens.
        """
        self.exporter.stop()
        self.server.wait_until(
            f"select not exists (select from pg_stat_activity where usename = '{self.role}')"
        )
        self._start()
        if wait:
            self.wait_until_known()

    def wait_until_known(self) -> None:
        """Scrape until what a page had before the fault is there, for a while."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            answer = self.exporter.scrape()
            if answer.page and answer.up == 1 and self.share(answer.page) >= KEPT:
                return
            time.sleep(0.4)

    def log_of_role(self) -> list[str]:
        """The lines that the exporter's sessions left in the server's log, of any severity."""
        lines = self.server.log(self._log_begins).splitlines()
        return [line for line in lines if re.search(rf" {self.role}@", line)]

    def keep(self, context: AbstractContextManager[Thing]) -> Thing:
        """Enter what is left only when all is over, before the server is removed."""
        return self._stack.enter_context(context)

    def amid_next_scrape(self, delay: float, act: Callable[[], object]) -> None:
        """Do something `delay` seconds after the next scrape has begun."""
        self._pending.append(Timer(delay, act))

    def _settle(self) -> None:
        """Scrape until what runs in the background has come in as well."""
        end = time.monotonic() + 20
        pages: list[frozenset[Series]] = []
        while time.monotonic() < end:
            answer = self.exporter.scrape()
            if answer.page and answer.up == 1:
                self.before.append(answer)
                pages.append(frozenset(answer.page.samples))
            if len(pages) >= 4 and len({frozenset(map(_name, page)) for page in pages[-4:]}) == 1:
                break
            time.sleep(0.4)
        if len(pages) < 4:
            raise RuntimeError(
                f"{self.subject.name} never was well: {answer.fault} {self.exporter.log[-600:]}"
            )
        self.steady = frozenset.intersection(*pages[-4:])

    def left_running(self) -> list[Session]:
        """The sessions whose statement outlived the last answer by 2 s."""
        if not self.during:
            return []
        return self.observer.left_running(self.during[-1].ended, self._watched_until)

    def share(self, page: Page) -> float:
        """The share of the steady series that a page has, without those the fault concerns."""
        wanted = self._wanted()
        return len(wanted & page.samples.keys()) / len(wanted) if wanted else 1.0

    def missing(self, page: Page) -> list[str]:
        """The metrics that a page lacks series of, the most first."""
        lost = Counter(name for name, _ in self._wanted() - page.samples.keys())
        return [name for name, _ in lost.most_common(5)]

    def _wanted(self) -> frozenset[Series]:
        concerned = self.scenario.concerned
        return (
            self.steady
            if concerned is None
            else frozenset(series for series in self.steady if not concerned(series))
        )

    def errors(self) -> list[str]:
        """The lines of severity ERROR and above that the exporter's sessions left in the log."""
        of_role = [
            line
            for line in self.server.errors_in_log(self._log_begins)
            if re.search(rf" {self.role}@", line)
        ]
        provoked = self.scenario.provoked
        return [line for line in of_role if not (provoked and re.search(provoked, line))]


@dataclass(frozen=True)
class Verdict:
    """What an exporter did in a scenario."""

    scenario: str
    subject: str
    broken: Mapping[Rule, str]
    """The rules that it broke, with what was seen."""
    slowest: float
    """Seconds that the slowest answer during the fault took; those that never came count whole."""
    kept: float | None
    """The smallest share of the steady series; None when the server was to be down."""
    sessions: int
    left: int
    """Statements that ran on after the answer."""
    errors: int
    """Lines in the server's log."""
    grown: int
    """Bytes by which the process has grown."""

    @classmethod
    def of(cls, scene: Scene) -> "Verdict":
        """Judge a scene that is over."""
        broken: dict[Rule, str] = {}
        for rule, seen in _seen(scene):
            broken.setdefault(rule, seen)
        return cls(
            scene.scenario.name,
            scene.subject.name,
            broken,
            max((answer.seconds for answer in scene.during), default=0.0),
            min(map(scene.share, _pages_up(scene)), default=None),
            scene.observer.most(),
            len({session.pid for session in scene.left_running()}),
            len(scene.errors()),
            scene.grown,
        )


def _pages_up(scene: Scene) -> list[Page]:
    return [answer.page for answer in scene.during if answer.page and answer.up]


def _seen(scene: Scene) -> Iterator[tuple[Rule, str]]:
    """What was against a rule."""
    faults = [answer.fault for answer in (*scene.during, *scene.after) if answer.fault]
    if faults:
        yield "answers", f"{len(faults)} times: {faults[0]}"
    for complaint in (*_untrue(scene), *(scene.scenario.truth or _nothing)(scene)):
        yield "truth", complaint
    if scene.scenario.expects == "up":
        worst = min(_pages_up(scene), key=scene.share, default=None)
        if worst is None:
            yield "series", "none"
        elif scene.share(worst) < KEPT:
            missing = ", ".join(scene.missing(worst))
            yield "series", f"{scene.share(worst):.0%}; missing: {missing}"
    for excess in _excess(scene):
        yield "bounds", excess
    if (most := scene.observer.most()) > BUDGET:
        yield "connections", str(most)
    for trace in _left(scene):
        yield "leaves", trace
    if trouble := _ill(scene):
        yield "recovers", trouble
    if errors := scene.errors():
        yield "log", f"{len(errors)} lines: {errors[0][:200]}"
    if not scene.exporter.alive:
        yield "lives", f"it ended with {scene.exporter.process.returncode}"


def _left(scene: Scene) -> Iterator[str]:
    """What an exporter left behind in the server."""
    for session in scene.left_running():
        yield f"runs on: {session.query[:60]!r}"
    if idle := scene.observer.idle_in_transaction():
        yield f"idle in transaction at {idle} looks"


def _excess(scene: Scene) -> Iterator[str]:
    """What is more than it may be."""
    series = max((len(page.samples) for page in _pages_up(scene)), default=0)
    if series > ROOM:
        yield f"{series:,} series"
    if scene.grown > GROWTH:
        yield f"the process has grown by {scene.grown // 1024**2} MB"


def _nothing(_: Scene) -> Iterable[str]:
    return ()


def _untrue(scene: Scene) -> Iterable[str]:
    """What the pages say of the server, against what the scenario wants."""
    wanted = {"up": 1.0, "down": 0.0}.get(scene.scenario.expects)
    for answer in scene.during:
        if answer.page and wanted is not None and answer.up != wanted:
            yield f"pg_up is {answer.up} while the server is {scene.scenario.expects}"


def _ill(scene: Scene) -> str:
    """What is not as before at the first scrape after the fault."""
    (answer,) = scene.after
    if answer.page is None:
        return answer.fault
    if answer.up != 1:
        return f"pg_up is {answer.up}"
    share = scene.share(answer.page)
    if share < KEPT:
        return f"{share:.0%} of the series; missing: {', '.join(scene.missing(answer.page))}"
    return ""


def _name(series: Series) -> str:
    return series[0]


def of_database(*names: str) -> Callable[[Series], bool]:
    """Whether a series is of one of some databases, under any label."""
    return partial(_has_value, frozenset(names))


def of_sessions(series: Series) -> bool:
    """Whether a series is of what sessions do, by their states, waits or snapshots."""
    return re.search("activity|wait_event|xmin", series[0]) is not None


def _has_value(values: frozenset[str], series: Series) -> bool:
    return any(value in values for _, value in series[1])
