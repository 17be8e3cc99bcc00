"""What keeps vacuum and maintenance from their work."""

import contextlib
from collections.abc import Iterator

from tests.faults.fault import Alert, Fault
from tests.faults.stage import Stage


@contextlib.contextmanager
def _prepared(stage: Stage) -> Iterator[None]:
    stage.execute("begin; insert into orders (note) values ('x'); prepare transaction 'forgotten'")
    yield
    stage.execute("rollback prepared 'forgotten'")


@contextlib.contextmanager
def _restart_pending(stage: Stage) -> Iterator[None]:
    stage.primary.set({"max_worker_processes": 9})
    yield
    # Taken out of the file it would stay pending: the server compares what stands there.
    stage.primary.set({"max_worker_processes": 8})


@contextlib.contextmanager
def _files_wrong(stage: Stage) -> Iterator[None]:
    file = stage.primary.data / "lab.conf"
    good = file.read_text()
    file.write_text(f"{good}work_mem = lots\n")
    yield
    file.write_text(good)


@contextlib.contextmanager
def _autovacuum_off(stage: Stage) -> Iterator[None]:
    """And a table's rows die."""
    stage.primary.set({"autovacuum": False})
    stage.execute(
        "create table dying (n int primary key);"
        "insert into dying select n from generate_series(1, 3000) as n;"
        "update dying set n = n + 3000; analyze dying"
    )
    yield
    stage.primary.set({"autovacuum": True})
    stage.execute("drop table dying")


@contextlib.contextmanager
def _held_back(stage: Stage) -> Iterator[None]:
    """A transaction that was prepared keeps vacuum from all that dies after it."""
    with _prepared(stage):
        _burn(stage, 30_000)
        yield
    stage.execute("vacuum")


@contextlib.contextmanager
def _aged(stage: Stage) -> Iterator[None]:
    """No vacuum can freeze what a prepared transaction may still see."""
    # Before the transaction: a slot is made when all that run then have ended.
    stage.execute("select pg_create_logical_replication_slot('forgotten', 'test_decoding')")
    with _prepared(stage):
        _burn(stage, 180_000)
        yield
        stage.execute("select pg_drop_replication_slot('forgotten')")
    for (name,) in stage.primary.execute("select datname from pg_database where datallowconn"):
        stage.primary.execute("vacuum freeze", database=name)
    stage.primary.execute("alter database template0 allow_connections true")
    stage.primary.execute("vacuum freeze", database="template0")
    stage.primary.execute("alter database template0 allow_connections false")


@contextlib.contextmanager
def _workers_busy(stage: Stage) -> Iterator[None]:
    """The only worker is slow, and more tables than it can vacuum want it."""
    stage.primary.set({"autovacuum_vacuum_cost_delay": "100ms", "autovacuum_vacuum_cost_limit": 1})
    for table in _HEAPED:
        stage.execute(
            f"create table {table} (n int primary key);"
            f"insert into {table} select n from generate_series(1, 5000) as n;"
            f"update {table} set n = n + 10000; analyze {table}"
        )
    yield
    stage.primary.set({"autovacuum_vacuum_cost_delay": None, "autovacuum_vacuum_cost_limit": None})
    stage.execute(f"drop table {', '.join(_HEAPED)}")


_HEAPED = tuple(f"heaped_{number}" for number in range(8))


def _burn(stage: Stage, transactions: int) -> None:
    """Use up transaction ids: a subtransaction that writes takes one."""
    stage.execute("create table burnt (id int primary key)")
    for _ in range(transactions // 10_000):
        stage.execute(
            "do $$ begin for n in 1..10000 loop"
            " begin insert into burnt values (n); exception when others then null; end;"
            " end loop; end $$; truncate burnt"
        )
    stage.execute("drop table burnt")


FAULTS = (
    Fault(
        "a prepared transaction is forgotten",
        _prepared,
        (Alert("PreparedTransactionOld", "ticket", "primary"),),
    ),
    Fault(
        "a setting waits for a restart",
        _restart_pending,
        findings=("PendingRestart",),
    ),
    Fault(
        "a configuration file has a value that is none",
        _files_wrong,
        (Alert("ConfigurationFilesWrong", "ticket", "primary"),),
        scene="files shown",
    ),
    Fault(
        "somebody turns autovacuum off and forgets it",
        _autovacuum_off,
        (
            Alert("AutovacuumOff", "ticket", "primary"),
            Alert("AutovacuumBehind", "ticket", "primary"),
        ),
        also=("StatisticsStale", "NeverAnalyzed"),
    ),
    Fault(
        "a prepared transaction holds back vacuum while many others end",
        _held_back,
        (Alert("VacuumHeldBack", "ticket", "primary"),),
        also=("PreparedTransactionOld",),
        scene="days",
    ),
    Fault(
        "transaction ids grow old, for nothing can be frozen",
        _aged,
        (
            Alert("TransactionIdWraparound", "ticket", "primary"),
            Alert("TransactionIdsRunOut", "ticket", "primary"),
            Alert("SlotHoldsVacuum", "ticket", "primary"),
        ),
        also=("PreparedTransactionOld", "VacuumHeldBack", "SlotInactive"),
        scene="aged",
    ),
    Fault(
        "autovacuum has fewer workers than it needs",
        _workers_busy,
        (Alert("AutovacuumWorkersBusy", "ticket", "primary"),),
        also=(
            "AutovacuumBehind",
            "NeverAnalyzed",
            "StatisticsStale",
        ),
        scene="small",
    ),
)
