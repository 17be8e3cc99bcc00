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
)
