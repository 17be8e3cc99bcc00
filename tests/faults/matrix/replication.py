"""A standby that is not what it shall be."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from functools import partial

import psycopg

from lab.line import Line
from lab.postgres import Setting
from tests.faults.fault import Alert, Fault
from tests.faults.matrix.availability import OUTAGE
from tests.faults.meanwhile import meanwhile
from tests.faults.stage import DATABASE, HBA, SETTINGS, Stage


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
def _standby_lost(stage: Stage) -> Iterator[None]:
    stage.standby.stop()
    yield
    stage.standby.start()


@contextlib.contextmanager
def _asynchronous(stage: Stage) -> Iterator[None]:
    stage.primary.set({"synchronous_standby_names": ""})
    yield
    stage.primary.set({"synchronous_standby_names": "*"})


@contextlib.contextmanager
def _slot_forgotten(
    stage: Stage, settings: Mapping[str, Setting], megabytes: int
) -> Iterator[None]:
    """WAL is kept for a slot that nobody reads."""
    stage.primary.set(settings)
    stage.execute("checkpoint")  # the slot keeps what was written since the last one
    stage.execute("select pg_create_physical_replication_slot('forgotten', true)")
    _write(stage, megabytes)
    stage.execute("checkpoint")
    yield
    stage.execute("select pg_drop_replication_slot('forgotten')")
    stage.primary.set({name: SETTINGS.get(name) for name in settings})
    stage.execute("checkpoint")


@contextlib.contextmanager
def _slot_endangered(stage: Stage) -> Iterator[None]:
    """More is kept than may be, and the next checkpoint will remove it."""
    stage.execute("checkpoint")
    stage.execute("select pg_create_physical_replication_slot('forgotten', true)")
    stage.primary.set({"max_slot_wal_keep_size": "16MB", "wal_keep_size": 0})
    _write(stage, 70)
    yield
    stage.execute("select pg_drop_replication_slot('forgotten')")
    stage.primary.set({"max_slot_wal_keep_size": None, "wal_keep_size": "64MB"})


@contextlib.contextmanager
def _far_behind(stage: Stage) -> Iterator[None]:
    with _paused(stage):
        _write(stage, 75)
        yield


@contextlib.contextmanager
def _reader_gone(stage: Stage) -> Iterator[None]:
    """Whoever read the changes of this slot reads no more."""
    stage.execute("select pg_create_logical_replication_slot('forgotten', 'test_decoding')")
    _write(stage, 75)
    yield
    stage.execute("select pg_drop_replication_slot('forgotten')")


def _write(stage: Stage, megabytes: int) -> None:
    for _ in range(megabytes):
        stage.execute("select pg_logical_emit_message(false, 'fault', repeat('x', 1000000))")


@contextlib.contextmanager
def _subscribed(stage: Stage, port: int | None = None) -> Iterator[None]:
    """A table of one database goes to another by a subscription that works, by a way of its own."""
    there = stage.primary.conninfo(dbname=DATABASE, port=port or stage.primary.port)
    for database in (DATABASE, "postgres"):
        stage.primary.execute(
            "create table sent (id int primary key); analyze sent", database=database
        )
    stage.execute("create publication sent for table sent")
    stage.execute("select pg_create_logical_replication_slot('sent', 'pgoutput')")
    stage.primary.execute(
        f"create subscription sent connection '{there}' publication sent"
        " with (create_slot = false, copy_data = false)"
    )
    stage.prometheus.wait_until('pg_stat_subscription_up{subname="sent"} == 1')
    yield
    stage.primary.execute("alter subscription sent disable")
    stage.primary.execute("alter subscription sent set (slot_name = none)")
    stage.primary.execute("drop subscription sent")
    stage.primary.execute("drop table sent")
    stage.primary.wait_until("select not active from pg_replication_slots where slot_name = 'sent'")
    stage.execute("select pg_drop_replication_slot('sent')")
    stage.execute("drop publication sent; drop table sent")


@contextlib.contextmanager
def _subscription_disabled(stage: Stage) -> Iterator[None]:
    with _subscribed(stage):
        stage.primary.execute("alter subscription sent disable")
        yield
        stage.primary.execute("alter subscription sent enable")


@contextlib.contextmanager
def _subscription_conflicts(stage: Stage) -> Iterator[None]:
    """A row that comes is there already."""
    with _subscribed(stage):
        stage.primary.execute("insert into sent values (1)")
        stage.execute("insert into sent values (1)")
        yield
        stage.primary.execute("delete from sent")


@contextlib.contextmanager
def _subscription_unheard(stage: Stage) -> Iterator[None]:
    """What the publisher sends does not arrive, and the connection is not closed."""
    with Line("127.0.0.1", stage.primary.port) as line, _subscribed(stage, line.port):
        line.freeze()
        yield
        line.thaw()


@contextlib.contextmanager
def _slot_lost(stage: Stage) -> Iterator[None]:
    """The slot is used once, and then WAL that it still wants is removed."""
    limits: Mapping[str, Setting] = {"max_slot_wal_keep_size": "1MB", "wal_keep_size": 0}
    with _slot_forgotten(stage, {}, 1):
        stage.primary.set(limits)
        for _ in range(3):
            stage.execute("select pg_switch_wal(); checkpoint")
            stage.execute("select pg_logical_emit_message(false, 'fault', 'x')")
        stage.primary.wait_until(
            "select wal_status = 'lost' from pg_replication_slots where slot_name = 'forgotten'"
        )
        yield
    stage.primary.set({"max_slot_wal_keep_size": None, "wal_keep_size": "64MB"})


@contextlib.contextmanager
def _conflicts(stage: Stage) -> Iterator[None]:
    """Queries on the standby need rows that vacuum has removed."""
    delay = stage.standby.execute("show max_standby_streaming_delay")[0][0]
    stage.standby.set({"max_standby_streaming_delay": 0})
    over = threading.Event()

    def read() -> None:
        conninfo = stage.standby.conninfo(dbname=DATABASE)
        while not over.is_set():
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(conninfo) as session,
            ):
                session.execute("set transaction isolation level repeatable read")
                session.execute("select count(*) from churned")
                session.execute("select pg_sleep(5)")

    def write() -> None:
        while not over.wait(0.3):
            stage.execute("update churned set id = id + 1")
            stage.execute("vacuum churned")

    try:
        with meanwhile(over, read, write):
            yield
    finally:
        stage.standby.set({"max_standby_streaming_delay": delay})


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
    Fault(
        "the only standby goes away",
        _standby_lost,
        (Alert("StandbyLost", "ticket", "primary"),),
        also=("DatabaseDown", *OUTAGE),
        lingers=OUTAGE,
    ),
    Fault(
        "WAL is kept for a slot that nobody reads, over half of its limit",
        partial(_slot_forgotten, settings={"max_slot_wal_keep_size": "64MB"}, megabytes=42),
        (Alert("SlotNearLimit", "ticket", "primary", (("slot_name", "forgotten"),)),),
        also=("SlotFillsDisk", "SlotInactive"),
    ),
    Fault(
        "WAL is kept for a slot that nobody reads, close to its limit",
        partial(_slot_forgotten, settings={"max_slot_wal_keep_size": "64MB"}, megabytes=61),
        (Alert("SlotNearLimit", "page", "primary", (("slot_name", "forgotten"),)),),
        also=("SlotFillsDisk", "SlotNearLimit", "SlotEndangered", "SlotInactive"),
    ),
    Fault(
        "WAL is kept without limit for a slot that nobody reads",
        partial(_slot_forgotten, settings={"max_wal_size": "32MB"}, megabytes=80),
        (Alert("SlotFillsDisk", "ticket", "primary", (("slot_name", "forgotten"),)),),
        also=("CheckpointsRequested", "SlotInactive"),
        lingers=("CheckpointsRequested",),
    ),
    Fault(
        "WAL is kept without limit for a slot that nobody reads, and for long",
        partial(_slot_forgotten, settings={"max_wal_size": "32MB"}, megabytes=350),
        (Alert("SlotFillsDisk", "page", "primary", (("slot_name", "forgotten"),)),),
        also=("CheckpointsRequested", "SlotFillsDisk", "SlotInactive"),
        lingers=("CheckpointsRequested",),
    ),
    Fault(
        "a slot keeps more WAL than it may, until the next checkpoint",
        _slot_endangered,
        (Alert("SlotEndangered", "page", "primary", (("slot_name", "forgotten"),)),),
        also=("SlotNearLimit", "SlotInactive"),
    ),
    Fault(
        "a standby falls far behind",
        _far_behind,
        (Alert("SenderLag", "ticket", "primary"),),
        also=("ReplicationLag", "ReplayPaused"),
    ),
    Fault(
        "nobody reads the changes of a logical slot any more",
        _reader_gone,
        (Alert("LogicalReplicationLag", "ticket", "primary"),),
        also=("SlotInactive",),
    ),
    Fault(
        "somebody disables a subscription and forgets it",
        _subscription_disabled,
        (Alert("SubscriptionDisabled", "ticket", "primary"),),
        also=("SlotInactive", "SubscriptionTablesNotReady"),
    ),
    Fault(
        "nothing comes from a publisher any more, and the connection stays",
        _subscription_unheard,
        (Alert("SubscriptionSilent", "ticket", "primary"),),
        also=(
            "SubscriptionTablesNotReady",
            "LogicalReplicationLag",
            "SlotInactive",
        ),
    ),
    Fault(
        "a row that a subscription brings is there already",
        _subscription_conflicts,
        (
            Alert("SubscriptionErrors", "ticket", "primary"),
            Alert("SubscriptionDown", "ticket", "primary"),
        ),
        also=("SlotInactive", "SubscriptionTablesNotReady"),
        since=15,
    ),
    Fault(
        "a slot has lost WAL that its reader needs",
        _slot_lost,
        (Alert("SlotLost", "ticket", "primary", (("slot_name", "forgotten"),)),),
        also=("SlotNearLimit", "SlotEndangered", "SlotInactive"),
    ),
    Fault(
        "queries on the standby are cancelled for what it replays",
        _conflicts,
        (Alert("RecoveryConflicts", "ticket", "standby"),),
        also=("ReplicationLag", "RollbackShare"),
    ),
    Fault(
        "one of the standbys that were asked for goes away",
        _standby_lost,
        (
            Alert("StandbysMissing", "ticket", "primary"),
            Alert("SynchronousStandbyMissing", "page", "primary"),
        ),
        also=("DatabaseDown", *OUTAGE, "LongQuery", "LongTransaction"),
        lingers=OUTAGE,
        scene="synchronous",
    ),
    Fault(
        "somebody makes replication asynchronous",
        _asynchronous,
        (Alert("SynchronousReplicationOff", "ticket", "primary"),),
        scene="synchronous",
    ),
)
