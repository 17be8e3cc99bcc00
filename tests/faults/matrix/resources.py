"""A machine and its disks, which cannot keep up."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from itertools import count

from lab import strain
from tests.faults.fault import Alert, Fault
from tests.faults.stage import Stage
from tests.faults.surroundings import LESS_MEMORY


@contextlib.contextmanager
def _slow_reads(stage: Stage) -> Iterator[None]:
    """The disk does fifty reads a second, and nothing is cached."""
    stage.execute(
        "create table wide (id int primary key, filler text);"
        "alter table wide alter filler set storage plain;"
        "insert into wide select n, repeat('x', 6000) from generate_series(1, 10000) as n"
    )
    stage.execute("vacuum analyze wide")
    stage.execute("checkpoint")
    ((path,),) = stage.execute("select pg_relation_filepath('wide')")
    over = threading.Event()

    def read(first: int) -> None:
        with stage.session() as session:
            session.autocommit = True
            for number in count(first):
                if over.is_set():
                    return
                if number % 100 == 0:
                    stage.disk.forget(stage.primary.data / path)
                session.execute("select filler from wide where id = %s", [number * 77 % 10_000])

    stage.disk.slow_down(read_iops=50)
    workers = [threading.Thread(target=read, args=(first * 1000,)) for first in range(3)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        stage.disk.hasten()
        for worker in workers:
            worker.join()
        stage.execute("drop table wide; checkpoint")


@contextlib.contextmanager
def _checkpoints(stage: Stage, slow: bool) -> Iterator[None]:
    """Somebody has each of his jobs end with one; the disk may write a megabyte a second."""
    stage.execute("create table rewritten as select n from generate_series(1, 5000) as n")
    if slow:
        stage.disk.slow_down(write_bps=1 << 20)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            if slow:
                stage.execute("update rewritten set n = n + 1")
                stage.execute("vacuum rewritten")
            stage.execute("checkpoint")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        over.set()
        stage.disk.hasten()
        worker.join()
        stage.execute("drop table rewritten")


@contextlib.contextmanager
def _sessions_synchronize(stage: Stage) -> Iterator[None]:
    """The checkpointer is busy, and cannot be told of one more file."""
    ((checkpointer,),) = stage.execute(
        "select pid from pg_stat_activity where backend_type = 'checkpointer'"
    )
    os.kill(checkpointer, signal.SIGSTOP)
    try:
        with stage.session() as session:
            for number in range(400):
                session.execute(
                    f"create table if not exists many_{number} as select 1 as id".encode()
                )
            session.commit()
    finally:
        os.kill(checkpointer, signal.SIGCONT)
    yield
    for number in range(400):
        stage.execute(f"drop table if exists many_{number}")


@contextlib.contextmanager
def _busy_sessions(stage: Stage) -> Iterator[None]:
    """More sessions compute than there are processors, and leave them to all others."""
    with strain.modest() as restrain, contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(stage.session()) for _ in range(2 * (os.cpu_count() or 1))]
        for session in sessions:
            session.autocommit = True
            restrain(session.info.backend_pid)
            session.pgconn.send_query(b"do $$ begin loop perform 1; end loop; end $$")
        try:
            yield
        finally:
            for session in sessions:
                session.cancel_safe()


@contextlib.contextmanager
def _memory_taken(_: Stage) -> Iterator[None]:
    with strain.memory_taken(2 * LESS_MEMORY):
        yield


@contextlib.contextmanager
def _killed(_: Stage) -> Iterator[None]:
    strain.have_one_killed()
    yield


@contextlib.contextmanager
def _no_checkpoint(stage: Stage) -> Iterator[None]:
    """The checkpointer hangs, as on a disk that does not answer, and WAL goes on."""
    ((pid,),) = stage.execute(
        "select pid from pg_stat_activity where backend_type = 'checkpointer'"
    )
    stage.primary.set({"max_wal_size": "8MB"})
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(40):
            stage.execute("select pg_logical_emit_message(false, 'fault', repeat('x', 1000000))")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    stage.primary.set({"max_wal_size": None})
    stage.execute("checkpoint")


FAULTS = (
    Fault(
        "a disk takes long to read",
        _slow_reads,
        (
            Alert("DiskReadsSlow", "ticket", "primary"),
            Alert("HostStalls", "ticket", "primary", (("resource", "io"),)),
        ),
        also=("Bottleneck", "CacheMissed", "CostlyStatement", "SlowStatement"),
        scene="machine",
    ),
    Fault(
        "a disk takes longer to write than checkpoints have",
        partial(_checkpoints, slow=True),
        (Alert("CheckpointsSlow", "ticket", "primary"),),
        # The table changes as a whole for days, and nobody analyzes it meanwhile.
        also=("CheckpointsRequested", "StatisticsStale", "TableWithoutPrimaryKey"),
        scene="days",
    ),
    Fault(
        "a job asks for a checkpoint again and again",
        partial(_checkpoints, slow=False),
        (Alert("CheckpointsRequested", "ticket", "primary"),),
        also=("CheckpointsSlow", "TableWithoutPrimaryKey"),
        scene="days",
    ),
    Fault(
        "sessions have to synchronize files themselves",
        _sessions_synchronize,
        (Alert("SessionsSynchronize", "ticket", "primary"),),
        also=("CacheMissed", "NeverAnalyzed", "TableWithoutPrimaryKey"),
        scene="few buffers",
    ),
    Fault(
        "more sessions compute than there are processors",
        _busy_sessions,
        (Alert("CpuSaturated", "ticket", "primary"),),
        also=("LongQuery",),
        scene="machine",
    ),
    Fault(
        "a program takes the memory that the others need",
        _memory_taken,
        (Alert("MemoryLow", "ticket", "primary"),),
        scene="machine",
    ),
    Fault(
        "the kernel kills a program for its memory",
        _killed,
        (Alert("OutOfMemory", "ticket", "primary"),),
        scene="machine",
    ),
    Fault(
        "a checkpoint hangs while WAL is written",
        _no_checkpoint,
        (Alert("RecoveryLong", "ticket", "primary"),),
        # It is the checkpointer that minds archive_timeout.
        also=("RecoveryPointOld", "WalLarge"),
    ),
)
