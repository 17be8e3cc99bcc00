"""Sessions, transactions and locks in users' way."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import psycopg

from tests.faults.fault import Alert, Fault
from tests.faults.meanwhile import meanwhile
from tests.faults.stage import CONNECTIONS, DATABASE, Stage


@contextlib.contextmanager
def _idle(stage: Stage) -> Iterator[None]:
    with stage.session() as session:
        session.execute("select 1")
        yield


@contextlib.contextmanager
def _long_query(stage: Stage) -> Iterator[None]:
    with stage.session() as session:
        session.autocommit = True
        session.pgconn.send_query(b"select pg_sleep(600)")
        yield
        session.cancel_safe()


@contextlib.contextmanager
def _long_transaction(stage: Stage) -> Iterator[None]:
    """Each of its statements is short."""
    over = threading.Event()

    def work(session: "psycopg.Connection[tuple[object, ...]]") -> None:
        while not over.wait(0.1):
            session.execute("select pg_sleep(0.3)")

    with stage.session() as session, meanwhile(over, partial(work, session)):
        yield


@contextlib.contextmanager
def _lock_wait(stage: Stage) -> Iterator[None]:
    """A migration waits behind a reader, and the readers after it wait behind the migration."""
    with stage.session() as holder, stage.session() as waiter:
        holder.execute("select count(*) from parked")
        waiter.autocommit = True
        waiter.pgconn.send_query(b"alter table parked add column later int")
        stage.primary.wait_until("select exists (select from pg_locks where not granted)")
        yield
        waiter.cancel_safe()


@contextlib.contextmanager
def _sessions(stage: Stage, count: int) -> Iterator[None]:
    """As many clients as there is room for, or fewer."""
    conninfo = stage.primary.conninfo(dbname=DATABASE, user="client")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg.OperationalError):
            for _ in range(count):
                stack.enter_context(contextlib.closing(psycopg.connect(conninfo)))
        yield


@contextlib.contextmanager
def _limited(stage: Stage, what: str) -> Iterator[None]:
    """Something has a limit of its own, which is nearly reached."""
    stage.execute(f"alter {what} connection limit 10")
    with _sessions(stage, 9):
        yield
    stage.execute(f"alter {what} connection limit -1")


@contextlib.contextmanager
def _table_locked(stage: Stage) -> Iterator[None]:
    with stage.session() as holder, stage.session() as reader:
        holder.execute("lock table parked in access exclusive mode")
        reader.autocommit = True
        reader.pgconn.send_query(b"select count(*) from parked")
        yield
        reader.cancel_safe()


@contextlib.contextmanager
def _many_locks(stage: Stage, share: float) -> Iterator[None]:
    ((_, room),) = stage.prometheus.query('pg_locks_table_room{instance="primary"}')
    with stage.session() as session:
        session.autocommit = True
        session.execute(
            "select count(pg_advisory_lock(n)) from generate_series(1, %s) as n",
            [int(room * share)],
        )
        yield


@contextlib.contextmanager
def _deadlocks(stage: Stage) -> Iterator[None]:
    for _ in range(8):
        with stage.session() as first, stage.session() as second:
            first.execute("set deadlock_timeout = '10ms'")
            second.execute("set deadlock_timeout = '10ms'")
            first.execute("select pg_advisory_xact_lock(1)")
            second.execute("select pg_advisory_xact_lock(2)")
            first.pgconn.send_query(b"select pg_advisory_xact_lock(2)")
            with contextlib.suppress(psycopg.errors.DeadlockDetected):
                second.execute("select pg_advisory_xact_lock(1)")
    yield


@contextlib.contextmanager
def _rollbacks(stage: Stage) -> Iterator[None]:
    over = threading.Event()

    def work() -> None:
        with stage.session() as session:
            while not over.wait(0.02):
                # From PostgreSQL 15 on transactions are told only with other news, of a table here.
                session.execute("select from parked")
                session.rollback()

    with meanwhile(over, work):
        yield


@contextlib.contextmanager
def _sessions_fail(stage: Stage) -> Iterator[None]:
    """A program leaves its sessions to the server's patience, which is short."""
    over = threading.Event()
    conninfo = stage.primary.conninfo(
        dbname=DATABASE, user="client", options="-c idle_session_timeout=50ms"
    )

    def work() -> None:
        while not over.is_set():
            with psycopg.connect(conninfo) as session:
                over.wait(0.2)
                with contextlib.suppress(psycopg.OperationalError):
                    session.execute("select 1")

    with meanwhile(over, work):
        yield


FAULTS = (
    Fault(
        "somebody leaves a transaction open and goes away",
        _idle,
        (
            Alert("IdleInTransaction", "ticket", "primary"),
            Alert("IdleInTransaction", "page", "primary"),
        ),
    ),
    Fault(
        "a query does not end",
        _long_query,
        (Alert("LongQuery", "ticket", "primary"),),
    ),
    Fault(
        "a transaction of many short statements does not end",
        _long_transaction,
        (Alert("LongTransaction", "ticket", "primary"),),
        also=("SlowStatement", "CostlyStatement"),
    ),
    Fault(
        "a migration waits behind a reader who went away",
        _lock_wait,
        (
            Alert("LockWait", "ticket", "primary"),
            Alert("LockWait", "page", "primary"),
        ),
        also=("IdleInTransaction", "LongQuery"),
    ),
    Fault(
        "a program opens more connections than it needs",
        partial(_sessions, count=int(0.72 * CONNECTIONS)),
        (Alert("ConnectionsNearLimit", "ticket", "primary"),),
    ),
    Fault(
        "a program opens connections until it is refused",
        partial(_sessions, count=2 * CONNECTIONS),
        (Alert("ConnectionsNearLimit", "page", "primary"),),
        # Its ticket is held back while it fires.
        also=("ConnectionsNearLimit",),
    ),
    Fault(
        "a database has taken nearly all connections of its own limit",
        partial(_limited, what=f"database {DATABASE}"),
        (Alert("DatabaseConnectionsNearLimit", "ticket", "primary", (("datname", DATABASE),)),),
    ),
    Fault(
        "a role has taken nearly all connections of its own limit",
        partial(_limited, what="role client"),
        (Alert("RoleConnectionsNearLimit", "ticket", "primary", (("rolname", "client"),)),),
    ),
    Fault(
        "somebody locks a table that others read",
        _table_locked,
        (Alert("ExclusiveLock", "ticket", "primary"),),
        also=("LockWait", "IdleInTransaction", "LongQuery"),
    ),
    Fault(
        "a program takes many locks",
        partial(_many_locks, share=0.8),
        (Alert("LockTableNearLimit", "ticket", "primary"),),
    ),
    Fault(
        "a program takes nearly all locks that there are",
        partial(_many_locks, share=0.97),
        (Alert("LockTableNearLimit", "page", "primary"),),
        also=("LockTableNearLimit",),
    ),
    Fault(
        "two programs take the same locks in another order",
        _deadlocks,
        (Alert("Deadlocks", "ticket", "primary"),),
    ),
    Fault(
        "a program rolls back what it begins",
        _rollbacks,
        (Alert("RollbackShare", "ticket", "primary"),),
    ),
    Fault(
        "a program's sessions are ended by the server",
        _sessions_fail,
        (Alert("SessionsFail", "ticket", "primary", (("datname", DATABASE),)),),
        since=14,
    ),
)
