"""A standby that is not what it shall be."""

import contextlib
from collections.abc import Iterator

from tests.faults.fault import Alert, Fault
from tests.faults.stage import HBA, Stage


@contextlib.contextmanager
def _paused(stage: Stage) -> Iterator[None]:
    stage.standby.execute("select pg_wal_replay_pause()")
    yield
    stage.standby.execute("select pg_wal_replay_resume()")


@contextlib.contextmanager
def _cut_off(stage: Stage) -> Iterator[None]:
    """The primary no longer lets the standby in, which goes on serving."""
    inside = "host all all 127.0.0.1/32 scram-sha-256"
    stage.primary.set_hba(["host all postgres 127.0.0.1/32 trust", inside])
    stage.primary.execute("select pg_terminate_backend(pid) from pg_stat_replication")
    yield
    stage.primary.set_hba(HBA)


@contextlib.contextmanager
def _standby_stopped(stage: Stage) -> Iterator[None]:
    stage.standby.stop()
    yield
    stage.standby.start()


@contextlib.contextmanager
def _slot_forgotten(stage: Stage) -> Iterator[None]:
    stage.execute("select pg_create_logical_replication_slot('forgotten', 'test_decoding')")
    yield
    stage.execute("select pg_drop_replication_slot('forgotten')")


FAULTS = (
    Fault(
        "somebody pauses replay and forgets it",
        _paused,
        (
            Alert("ReplayPaused", "ticket", "standby"),
            Alert("ReplicationLag", "ticket", "standby"),
            Alert("ReplicationLag", "page", "standby"),
        ),
    ),
    Fault(
        "the primary lets the standby in no more",
        _cut_off,
        (Alert("StandbyDisconnected", "ticket", "standby"),),
        also=("ReplicationLag", "StandbyLost", "StandbysMissing"),
    ),
)
