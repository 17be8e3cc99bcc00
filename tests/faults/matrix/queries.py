"""Statements that take long, or do not end, or are too many to count."""

import contextlib
import itertools
import threading
from collections.abc import Iterator

import psycopg

from tests.faults.fault import Alert, Fault
from tests.faults.meanwhile import meanwhile
from tests.faults.stage import DATABASE, Stage
from tests.faults.surroundings import QUICK


@contextlib.contextmanager
def _slow(stage: Stage) -> Iterator[None]:
    """All that is asked of a database takes twice as long as it may."""
    over = threading.Event()

    def ask() -> None:
        conninfo = stage.primary.conninfo(dbname="reports")
        with psycopg.connect(conninfo, autocommit=True) as session:
            while not over.is_set():
                session.execute("select pg_sleep(0.2)")

    stage.primary.execute("create database reports")
    try:
        with meanwhile(over, *[ask] * 3):
            yield
    finally:
        stage.primary.execute("drop database reports")


@contextlib.contextmanager
def _some_slow(stage: Stage) -> Iterator[None]:
    """One client of many asks what takes twice as long as it may."""
    over = threading.Event()

    def ask() -> None:
        with stage.session() as session:
            session.autocommit = True
            while not over.is_set():
                session.execute("select pg_sleep(0.2)")

    with meanwhile(over, ask):
        yield


@contextlib.contextmanager
def _slower(stage: Stage) -> Iterator[None]:
    """Reports take nearly twice as long as they did a week ago."""
    week_ago = "instance_datname_usename_queryid:pg_stat_statements_exec_time_seconds:rate1h_week"
    stage.wait(
        lambda: stage.prometheus.query(f'{week_ago}{{datname="reports"}}'),
        lambda: "there is no week ago",
    )
    stage.primary.execute(f"update pace set seconds = {1.8 * QUICK}", database="reports")
    yield
    stage.primary.execute(f"update pace set seconds = {QUICK}", database="reports")


@contextlib.contextmanager
def _endless(stage: Stage) -> Iterator[None]:
    """More statements than there shall be run for long."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(stage.session()) for _ in range(22)]
        for session in sessions:
            session.autocommit = True
            session.pgconn.send_query(b"select pg_sleep(600)")
        yield
        for session in sessions:
            session.cancel_safe()


@contextlib.contextmanager
def _stuck(stage: Stage) -> Iterator[None]:
    """All wait for one table, those of the load as well."""
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(stage.session())
        holder.execute("lock table orders in access exclusive mode")
        waiters = [stack.enter_context(stage.session()) for _ in range(7)]
        for waiter in waiters:
            waiter.autocommit = True
            waiter.pgconn.send_query(b"select count(*) from orders where id = 1")
        yield
        holder.rollback()


@contextlib.contextmanager
def _evicted(stage: Stage) -> Iterator[None]:
    """A program asks each question in words of its own, until there is room for no other.

    And goes on: what comes and goes from one look to the next, 13 does not count.
    """
    over = threading.Event()

    def ask() -> None:
        with stage.session() as session:
            session.autocommit = True
            for first in itertools.count(step=_AT_ONCE):
                with session.pipeline():
                    for number in range(first, first + _AT_ONCE):
                        signs = (" - 1" if number >> place & 1 else " + 1" for place in range(20))
                        session.execute(f"select 1{''.join(signs)}", prepare=False)
                if over.wait(0.1):
                    return

    with meanwhile(over, ask):
        yield


_AT_ONCE = 300
"""Statements, ten times a second."""


_OF_SHOP = (("datname", DATABASE),)

FAULTS = (
    Fault(
        "all statements of a database are slow",
        _slow,
        (Alert("QueryLatency", "page", "primary", (("datname", "reports"),)),),
        also=(
            "Bottleneck",
            "CacheMissed",
            "CostlyStatement",
            "NeverAnalyzed",
            "PublicMayCreate",
            "SlowStatement",
        ),
    ),
    Fault(
        "some statements are slow, for days",
        _some_slow,
        (Alert("QueryLatency", "ticket", "primary", _OF_SHOP),),
        also=("Bottleneck", "CostlyStatement", "SlowStatement"),
        scene="days",
    ),
    Fault(
        "statements take longer than a week ago",
        _slower,
        (Alert("QueriesSlower", "ticket", "primary", (("datname", "reports"),)),),
        also=("QueryLatency", "SlowStatement", "CostlyStatement"),
        scene="days",
    ),
    Fault(
        "many statements do not end",
        _endless,
        (Alert("StatementsStuck", "ticket", "primary", _OF_SHOP),),
        also=("Bottleneck", "ConnectionsNearLimit", "LongQuery", "SlowStatement"),
    ),
    Fault(
        "a program locks a table that all others want",
        _stuck,
        (Alert("StatementsStuck", "page", "primary", _OF_SHOP),),
        also=(
            "Bottleneck",
            "ExclusiveLock",
            "LockWait",
            "IdleInTransaction",
            "LongQuery",
            "LongTransaction",
        ),
    ),
    Fault(
        "statements come in more forms than pg_stat_statements has room for",
        _evicted,
        (Alert("StatementsEvicted", "ticket", "primary"),),
    ),
)
