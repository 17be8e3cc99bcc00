"""A PgBouncer that clients do not get through, or soon will not."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

from lab.pgbouncer import Pooler as Proxy
from tests.faults.fault import Alert, Fault
from tests.faults.meanwhile import meanwhile
from tests.faults.pieces.pooler import SETTINGS, Pooler
from tests.faults.stage import Stage

SESSIONS = "app_session"
"""The database whose clients keep a server connection for as long as they stay."""


def _proxy(stage: Stage) -> Proxy:
    return stage.piece(Pooler).proxy


@contextlib.contextmanager
def _killed(stage: Stage) -> Iterator[None]:
    pooler = stage.piece(Pooler)
    pooler.stop()
    yield
    pooler.start()


@contextlib.contextmanager
def _exporter_refused(stage: Stage) -> Iterator[None]:
    """Its user is no longer among those who may look at the console."""
    pooler = stage.piece(Pooler)
    pooler.stop()
    pooler.start(f"{SETTINGS}stats_users = somebody\n")
    yield
    pooler.stop()
    pooler.start()


@contextlib.contextmanager
def _clients(stage: Stage, count: int, database: str = SESSIONS) -> Iterator[None]:
    """So many come and stay, each having asked for something once where that makes a difference."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(contextlib.closing(_proxy(stage).connect(dbname=database)))
            if database == SESSIONS:
                client.execute("select 1")
        yield


@contextlib.contextmanager
def _one_waits(stage: Stage) -> Iterator[None]:
    """All connections of a pool belong to clients who stay, and one more comes."""
    _proxy(stage).command("set default_pool_size = 1")
    with _clients(stage, 1), contextlib.closing(_proxy(stage).connect(dbname=SESSIONS)) as waiter:
        waiter.pgconn.send_query(b"select 1")
        yield
    _proxy(stage).command("set default_pool_size = 5")


@contextlib.contextmanager
def _many_wait_briefly(stage: Stage) -> Iterator[None]:
    over = threading.Event()

    def work() -> None:
        with contextlib.closing(_proxy(stage).connect()) as client:
            while not over.is_set():
                client.execute("select pg_sleep(0.05)")

    _proxy(stage).command("set default_pool_size = 1")
    try:
        with meanwhile(over, *[work] * 5):
            yield
    finally:
        _proxy(stage).command("set default_pool_size = 5")


@contextlib.contextmanager
def _limited(stage: Stage, setting: str) -> Iterator[None]:
    """A limit over all pools is nearly reached, while each pool has room."""
    _proxy(stage).command(f"set {setting} = 10")
    _proxy(stage).command("set default_pool_size = 20")
    with _clients(stage, 9):
        yield
    _proxy(stage).command("set default_pool_size = 5")
    _proxy(stage).command(f"set {setting} = 20")


@contextlib.contextmanager
def _told(stage: Stage, make: str, mend: str) -> Iterator[None]:
    """Somebody says something to the console."""
    _proxy(stage).command(make)
    yield
    _proxy(stage).command(mend)


FAULTS = (
    Fault(
        "a PgBouncer is killed",
        _killed,
        (Alert("PoolerDown", "page", "pooler"),),
        scene="pooler",
    ),
    Fault(
        "a PgBouncer does not let the exporter look at its console any more",
        _exporter_refused,
        (Alert("PoolerRefusesExporter", "ticket", "pooler"),),
        scene="pooler",
    ),
    Fault(
        "a client of a PgBouncer gets no server connection",
        _one_waits,
        (
            Alert("PoolerClientsWait", "ticket", "pooler", (("database", SESSIONS),)),
            Alert("PoolerClientsWait", "page", "pooler", (("database", SESSIONS),)),
        ),
        scene="pooler",
    ),
    Fault(
        "transactions wait in a PgBouncer, each for a moment",
        _many_wait_briefly,
        (Alert("PoolerMeanWait", "ticket", "pooler", (("database", "app"),)),),
        also=("CostlyStatement",),
        lingers=("CostlyStatement",),
        scene="pooler",
    ),
    Fault(
        "a pool of a PgBouncer is used up",
        partial(_clients, count=5),
        (Alert("PoolerPoolNearLimit", "ticket", "pooler", (("database", SESSIONS),)),),
        scene="pooler",
    ),
    Fault(
        "a database has nearly all the server connections that a PgBouncer gives it",
        partial(_limited, setting="max_db_connections"),
        (Alert("PoolerDatabaseNearLimit", "ticket", "pooler", (("database", SESSIONS),)),),
        scene="pooler",
    ),
    Fault(
        "a user has nearly all the server connections that a PgBouncer gives it",
        partial(_limited, setting="max_user_connections"),
        (Alert("PoolerUserNearLimit", "ticket", "pooler", (("user", "client"),)),),
        scene="pooler",
    ),
    Fault(
        "most of the clients that a PgBouncer takes are there",
        partial(_clients, count=25, database="app"),
        (Alert("PoolerClientsNearLimit", "ticket", "pooler"),),
        scene="pooler",
    ),
    Fault(
        "as many clients as a PgBouncer takes are there",
        partial(_clients, count=29, database="app"),
        (Alert("PoolerClientsNearLimit", "page", "pooler"),),
        # Its ticket is held back while it fires.
        also=("PoolerClientsNearLimit",),
        scene="pooler",
    ),
    Fault(
        "somebody pauses a database in a PgBouncer and forgets it",
        partial(_told, make="pause app", mend="resume app"),
        (Alert("PoolerPaused", "ticket", "pooler", (("database", "app"),)),),
        scene="pooler",
    ),
    Fault(
        "somebody pauses a PgBouncer as a whole and forgets it",
        partial(_told, make="pause", mend="resume"),
        (Alert("PoolerPaused", "ticket", "pooler"),),
        scene="pooler",
    ),
    Fault(
        "somebody disables a database in a PgBouncer and forgets it",
        partial(_told, make="disable app", mend="enable app"),
        (Alert("PoolerDisabled", "ticket", "pooler", (("database", "app"),)),),
        scene="pooler",
    ),
)
