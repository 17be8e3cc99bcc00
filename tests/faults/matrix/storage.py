"""Files that grow."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

from tests.faults.fault import Alert, Fault
from tests.faults.meanwhile import meanwhile
from tests.faults.stage import Stage
from tests.faults.surroundings import CAPACITY


@contextlib.contextmanager
def _temporary(stage: Stage) -> Iterator[None]:
    """A client sorts more than fits into memory, and reads the first row."""
    with stage.session() as session:
        session.execute("set work_mem = '64kB'")
        session.execute(
            "declare sorted cursor for select n, repeat('x', 100) from"
            " generate_series(1, 300000) as n order by n desc"
        )
        session.execute("fetch sorted")
        yield


@contextlib.contextmanager
def _logs(stage: Stage) -> Iterator[None]:
    for _ in range(5):
        stage.execute("do $$ begin raise log '%', repeat('x', 1000000); end $$")
    yield
    for file in (stage.primary.data / "log").iterdir():
        os.truncate(file, 0)


@contextlib.contextmanager
def _wal(stage: Stage) -> Iterator[None]:
    """A slot keeps WAL, and wal_keep_size asks for none of it."""
    stage.primary.set({"max_wal_size": "32MB", "wal_keep_size": 0})
    stage.execute("checkpoint")
    stage.execute("select pg_create_physical_replication_slot('forgotten', true)")
    for _ in range(90):
        stage.execute("select pg_logical_emit_message(false, 'fault', repeat('x', 1000000))")
    yield
    stage.execute("select pg_drop_replication_slot('forgotten')")
    stage.execute("checkpoint")
    stage.primary.set({"max_wal_size": None, "wal_keep_size": "64MB"})


@contextlib.contextmanager
def _full(stage: Stage) -> Iterator[None]:
    """A table grows until there is hardly any room besides."""
    stage.execute(
        "create unlogged table ballast (id bigint, filler text);"
        "alter table ballast alter filler set storage plain"
    )
    _grow(stage, _pages_left(stage, 0.98))
    stage.execute("vacuum analyze ballast")
    yield
    stage.execute("drop table ballast; checkpoint")


@contextlib.contextmanager
def _fills(stage: Stage) -> Iterator[None]:
    """A table that already takes most of the room grows on."""
    room = _pages_left(stage, 0.75)
    stage.execute(
        "create unlogged table ballast (id bigint, filler text);"
        "alter table ballast alter filler set storage plain"
    )
    _grow(stage, room)
    with _again(lambda: _grow(stage, 20)):
        yield
    stage.execute("drop table ballast; checkpoint")


@contextlib.contextmanager
def _disk_full(stage: Stage, share: float) -> Iterator[None]:
    stage.disk.fill(share)
    yield
    stage.disk.free()


@contextlib.contextmanager
def _files_full(stage: Stage) -> Iterator[None]:
    stage.disk.fill_with_files(0.9)
    yield
    stage.disk.free()


@contextlib.contextmanager
def _disk_fills(stage: Stage) -> Iterator[None]:
    shares = (0.72 + step / 500 for step in itertools.count())
    with _again(lambda: stage.disk.fill(min(0.84, next(shares)))):
        yield
    stage.disk.free()


def _pages_left(stage: Stage, share: float) -> int:
    """How many pages of a table bring the files to a share of what they may take."""
    ((used,),) = stage.primary.execute(
        "select (select sum(pg_tablespace_size(oid)) from pg_tablespace)"
        " + (select sum(size) from pg_ls_waldir())"
    )
    return max(0, int(share * CAPACITY - int(used)) // 8192)


def _grow(stage: Stage, pages: int) -> None:
    stage.execute(
        f"insert into ballast select n, repeat('x', 8000) from generate_series(1, {pages}) as n"
    )


@contextlib.contextmanager
def _again(work: Callable[[], None]) -> Iterator[None]:
    """It is done about each second."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(1):
            work()

    with meanwhile(over, go_on):
        yield


FAULTS = (
    Fault(
        "a query's temporary files take much room",
        _temporary,
        (Alert("TemporaryFilesLarge", "ticket", "primary"),),
        also=("IdleInTransaction", "TemporaryFilesMany"),
        scene="small",
    ),
    Fault(
        "the server's logs take much room",
        _logs,
        (Alert("LogsLarge", "ticket", "primary"),),
        scene="small",
    ),
    Fault(
        "WAL takes much more room than it shall",
        _wal,
        (Alert("WalLarge", "ticket", "primary"),),
        also=("CheckpointsRequested", "SlotFillsDisk", "SlotInactive"),
        scene="small",
    ),
    Fault(
        "the server's files have used up what they were given",
        _full,
        (Alert("StorageFull", "page", "primary"),),
        also=("CacheMissed", "CheckpointsRequested", "TableWithoutPrimaryKey"),
        scene="small",
    ),
    Fault(
        "the server's files are about to use up what they were given",
        _fills,
        (Alert("StorageFills", "ticket", "primary"),),
        also=(
            "AutovacuumBehind",
            "CacheMissed",
            "CostlyStatement",
            "NeverAnalyzed",
            "StatisticsStale",
            "TableWithoutPrimaryKey",
        ),
        scene="days",
    ),
    Fault(
        "a disk is nearly full",
        partial(_disk_full, share=0.9),
        (Alert("FilesystemFull", "ticket"),),
        scene="machine",
    ),
    Fault(
        "a disk is all but full",
        partial(_disk_full, share=0.97),
        (Alert("FilesystemFull", "page"),),
        also=("FilesystemFull",),
        scene="machine",
    ),
    Fault(
        "a disk has room for few more files",
        _files_full,
        (Alert("FilesystemInodesFull", "ticket"),),
        scene="machine",
    ),
    Fault(
        "a disk fills up within days",
        _disk_fills,
        (Alert("FilesystemFills", "ticket"),),
        also=("CostlyStatement", "StorageFills"),  # what fills it lies among the server's files
        scene="days",
    ),
)
