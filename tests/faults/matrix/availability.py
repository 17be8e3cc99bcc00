"""Servers that do not answer, and who leads."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator

import psycopg

from lab import basebackup
from lab.cluster import PGVIGIL
from lab.postgres import Server
from tests.faults.fault import Alert, Fault
from tests.faults.stage import DATABASE, HBA, Stage

OUTAGE = ("AvailabilityBudgetBurn", "CrashRecovery", "DatabaseRestarted", "NeverAnalyzed")
"""What is told for minutes after a server was away; a crash also loses the statistics."""


@contextlib.contextmanager
def _standby_stopped(stage: Stage) -> Iterator[None]:
    stage.standby.stop()
    yield
    stage.standby.start()


@contextlib.contextmanager
def _primary_stopped(stage: Stage) -> Iterator[None]:
    stage.primary.stop("fast")
    yield
    stage.primary.start()


@contextlib.contextmanager
def _both_stopped(stage: Stage) -> Iterator[None]:
    stage.primary.stop("fast")
    stage.standby.stop("fast")
    yield
    stage.primary.start()
    stage.standby.start()


@contextlib.contextmanager
def _restarted(stage: Stage) -> Iterator[None]:
    stage.primary.restart()
    stage.mind_archive_timeout()
    yield


@contextlib.contextmanager
def _crashed(stage: Stage) -> Iterator[None]:
    """One process dies, as of a lack of memory, and all the others start anew.

    What is known of the tables is lost with it, so they are analyzed.
    """
    checkpointer = "select backend_start from pg_stat_activity where backend_type = 'checkpointer'"
    before = stage.primary.execute(checkpointer)
    with stage.session() as session:
        os.kill(session.info.backend_pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(psycopg.OperationalError):  # it recovers
            if stage.primary.execute(checkpointer) != before:
                break
        assert time.monotonic() < end, stage.primary.log()
        time.sleep(0.1)
    stage.mind_archive_timeout()
    yield
    stage.analyze()


@contextlib.contextmanager
def _exporter_killed(stage: Stage) -> Iterator[None]:
    stage.exporter.stop(signal.SIGKILL)
    yield
    stage.start_exporter_anew()


@contextlib.contextmanager
def _locked_out(stage: Stage) -> Iterator[None]:
    stage.standby.set_hba([f"host all {PGVIGIL.name} 127.0.0.1/32 reject", *HBA])
    stage.standby.execute(
        f"select pg_terminate_backend(pid) from pg_stat_activity where usename = '{PGVIGIL.name}'"
    )
    yield
    stage.standby.set_hba(HBA)


@contextlib.contextmanager
def _not_permitted(stage: Stage) -> Iterator[None]:
    stage.execute(f"revoke pg_monitor from {PGVIGIL.name}")
    yield
    stage.execute(f"grant pg_monitor to {PGVIGIL.name}")


@contextlib.contextmanager
def _database_closed(stage: Stage) -> Iterator[None]:
    stage.execute(f"revoke connect on database {DATABASE} from public")
    yield
    stage.execute(f"grant connect on database {DATABASE} to public")


@contextlib.contextmanager
def _two_primaries(stage: Stage) -> Iterator[None]:
    """Somebody promotes the standby while the primary lives."""
    stage.standby.promote()
    yield
    _copy_anew(stage)


@contextlib.contextmanager
def _back_and_forth(stage: Stage) -> Iterator[None]:
    """The standby is promoted, and again."""
    stage.standby.promote()
    stage.prometheus.wait_until('pg_timeline_id{instance="standby"} == 2')
    stage.standby.stop()
    _follow_at_start(stage.standby)
    stage.standby.set({"primary_conninfo": ""})
    stage.standby.start()
    stage.standby.promote()
    yield
    _copy_anew(stage)


@contextlib.contextmanager
def _left_behind(stage: Stage) -> Iterator[None]:
    """The primary begins a new timeline, and the standby is held to the old one."""
    stage.standby.set({"recovery_target_timeline": "current"})
    stage.standby.restart()
    primary = stage.primary
    primary.stop()
    _follow_at_start(primary)
    primary.start()
    primary.promote()
    yield
    stage.standby.set({"recovery_target_timeline": None})
    stage.standby.restart()
    primary.wait_until("select count(*) = 1 from pg_stat_replication where state = 'streaming'", 60)


def _copy_anew(stage: Stage) -> None:
    """Make the standby one again, from a copy of the primary."""
    standby, primary = stage.standby, stage.primary
    standby.stop()
    shutil.rmtree(standby.data)
    basebackup.take(primary, standby.data, wal=True)
    _follow_at_start(stage.standby)
    conninfo = primary.conninfo(dbname=None, application_name="standby")
    standby.set({"primary_conninfo": conninfo})
    standby.set_hba(HBA)
    standby.start()
    primary.wait_until("select count(*) = 1 from pg_stat_replication where state = 'streaming'", 60)


def _follow_at_start(server: Server) -> None:
    signal_file = server.data / "standby.signal"
    signal_file.touch()
    basebackup.own(signal_file)


FAULTS = (
    Fault(
        "the exporter's role is let in no more",
        _locked_out,
        (Alert("ExporterLockedOut", "ticket", "standby"),),
        also=("DatabaseDown", "DatabaseUnwatched", *OUTAGE),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "the standby's server is stopped",
        _standby_stopped,
        (
            Alert("DatabaseDown", "page", "standby"),
            Alert("StandbysMissing", "page", "primary"),
        ),
        also=("StandbyLost", *OUTAGE),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "the primary's server is stopped and nobody is promoted",
        _primary_stopped,
        (
            Alert("DatabaseDown", "page", "primary"),
            Alert("NoPrimary", "page", "standby"),
        ),
        also=("StandbyDisconnected", "ReplicationLag", *OUTAGE),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "all servers of a cluster are stopped",
        _both_stopped,
        (Alert("ClusterDown", "page"),),
        also=("DatabaseDown", "NoPrimary", *OUTAGE),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "the exporter is killed",
        _exporter_killed,
        (Alert("ExporterDown", "page"),),
        also=("ClusterDown", *OUTAGE),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "somebody promotes the standby while the primary lives",
        _two_primaries,
        (
            Alert("SplitBrain", "page"),
            Alert("PrimaryChanged", "ticket", "standby"),
            Alert("RoleUnexpected", "ticket", "standby"),
        ),
        also=("DatabaseDown", "StandbysMissing", "StandbyLost", *OUTAGE),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "a server is promoted again and again",
        _back_and_forth,
        (Alert("RoleFlapping", "ticket", "standby"),),
        also=(
            "DatabaseDown",
            "SplitBrain",
            "PrimaryChanged",
            "RoleUnexpected",
            "StandbysMissing",
            "StandbyLost",
            *OUTAGE,
        ),
        lingers=OUTAGE,
        scene="failover",
    ),
    Fault(
        "the exporter's role may look at less than before",
        _not_permitted,
        (Alert("PermissionLost", "ticket", "primary"),),
    ),
    Fault(
        "the exporter's role may not enter a database any more",
        _database_closed,
        (Alert("DatabaseUnwatched", "ticket", "primary", (("datname", DATABASE),)),),
    ),
    Fault(
        "a server is away for longer than its budget allows",
        _standby_stopped,
        (Alert("AvailabilityBudgetBurn", "page", "standby"),),
        also=("DatabaseDown", "StandbyLost", *OUTAGE),
        lingers=OUTAGE,
    ),
    Fault(
        "somebody restarts a server",
        _restarted,
        (Alert("DatabaseRestarted", "ticket", "primary"),),
        also=("AvailabilityBudgetBurn",),
    ),
    Fault(
        "a process of the server is killed and it recovers",
        _crashed,
        (Alert("CrashRecovery", "ticket", "primary"),),
        also=OUTAGE,
        lingers=("NeverAnalyzed",),
    ),
    Fault(
        "a standby stays on the timeline that its primary has left",
        _left_behind,
        (Alert("TimelineDivergence", "ticket", "standby"),),
        also=(
            "DatabaseDown",
            "NoPrimary",
            "PrimaryChanged",
            "ReplicationLag",
            "RoleFlapping",
            "RoleUnexpected",
            "StandbyDisconnected",
            "StandbyLost",
            "StandbysMissing",
            *OUTAGE,
        ),
        lingers=("RoleFlapping", "PrimaryChanged", *OUTAGE),
        scene="failover",
    ),
)
