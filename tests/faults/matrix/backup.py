"""The archive, and what jobs write down."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import psycopg

from tests.faults.fault import Alert, Fault
from tests.faults.stage import Stage


def _write_wal(stage: Stage, files: int = 1) -> None:
    for _ in range(files):
        stage.primary.execute(
            "select pg_logical_emit_message(false, 'fault', 'x'); select pg_switch_wal()"
        )


@contextlib.contextmanager
def _refused(stage: Stage) -> Iterator[None]:
    stage.refusal.touch()
    _write_wal(stage)
    yield
    stage.refusal.unlink()


@contextlib.contextmanager
def _hung(stage: Stage) -> Iterator[None]:
    stage.hang.touch()
    _write_wal(stage)
    yield
    stage.hang.unlink()


@contextlib.contextmanager
def _nowhere(stage: Stage) -> Iterator[None]:
    command = stage.primary.execute("show archive_command")[0][0]
    stage.primary.set({"archive_command": ""})
    yield
    stage.primary.set({"archive_command": command})


@contextlib.contextmanager
def _ever_more(stage: Stage) -> Iterator[None]:
    """WAL is written and the archive is slower."""
    over = threading.Event()

    def write() -> None:
        while not over.wait(0.3):
            _write_wal(stage)

    writer = threading.Thread(target=write)
    with _hung(stage):
        _write_wal(stage, 18)
        writer.start()
        try:
            yield
        finally:
            over.set()
            writer.join()


@contextlib.contextmanager
def _no_timeout(stage: Stage) -> Iterator[None]:
    stage.primary.set({"archive_timeout": 0})
    yield
    stage.primary.set({"archive_timeout": 2})


@contextlib.contextmanager
def _recorded(
    stage: Stage,
    kind: str,
    age: str = "1 minute",
    *,
    ok: bool = True,
    lasted: str = "5 seconds",
    only: bool = False,
    places: Sequence[str] = ("here",),
) -> Iterator[None]:
    """The newest of its kind is such a one in each of these places, or the only one."""
    stage.primary.execute(f"delete from pgvigil.record where kind = '{kind}' and ({ok} or {only})")
    for place in places:
        stage.record(kind, age, ok, lasted, place)
    yield
    stage.primary.execute(f"delete from pgvigil.record where kind = '{kind}'")
    stage.record(kind)
    if kind == "backup":
        stage.record(kind, place="elsewhere")


@contextlib.contextmanager
def _backup_stuck(stage: Stage) -> Iterator[None]:
    """Whoever takes a backup reads no more of it."""
    conninfo = stage.primary.conninfo(dbname=None, replication="true", application_name="backup")
    command = b"BASE_BACKUP (LABEL 'fault')" if stage.major >= 15 else b"BASE_BACKUP LABEL 'fault'"
    with contextlib.closing(psycopg.connect(conninfo, autocommit=True)) as session:
        session.pgconn.send_query(command)
        yield


@contextlib.contextmanager
def _backup_forgotten(stage: Stage) -> Iterator[None]:
    """Somebody begins to copy the files and never says that it is over."""
    stage.primary.execute("select pg_start_backup('fault', true)")
    yield
    stage.primary.execute("select pg_stop_backup()")


FAULTS = (
    Fault(
        "the archive refuses WAL",
        _refused,
        (Alert("ArchivingFailing", "page", "primary"),),
        also=("RecoveryPointOld", "ArchivingHung"),
    ),
    Fault(
        "the archive takes WAL and never says that it has it",
        _hung,
        (Alert("ArchivingHung", "page", "primary"), Alert("RecoveryPointOld", "page", "primary")),
        also=("RecoveryPointOld", "ArchivingBehind"),
    ),
    Fault(
        "somebody empties archive_command",
        _nowhere,
        (Alert("ArchiveDestinationMissing", "ticket", "primary"),),
        also=("RecoveryPointOld", "ArchivingHung"),
    ),
    Fault(
        "WAL is written faster than it is archived",
        _ever_more,
        (Alert("ArchivingBehind", "page", "primary"),),
        also=("ArchivingHung", "RecoveryPointOld"),
    ),
    Fault(
        "a server with little to write has no archive_timeout",
        _no_timeout,
        (Alert("RecoveryPointOld", "ticket", "primary"),),
    ),
    Fault(
        "no backup has ever succeeded",
        partial(_recorded, kind="backup", ok=False, only=True),
        (Alert("BackupNeverGood", "page", "primary"),),
        also=("BackupFailed", "BackupPlacesTooFew"),
        scene="never saved",
    ),
    Fault(
        "a backup takes longer than a night",
        partial(_recorded, kind="backup", lasted="9 hours"),
        (Alert("BackupSlow", "ticket", "primary"),),
        also=("BackupPlacesTooFew",),
    ),
    Fault(
        "a restore takes longer than the business can wait",
        partial(_recorded, kind="restore_verification", lasted="2 hours"),
        (Alert("RestoreSlow", "ticket", "primary"),),
    ),
    Fault(
        "the last good backup is from the day before yesterday",
        partial(_recorded, kind="backup", age="40 hours", places=("here", "elsewhere")),
        (Alert("BackupTooOld", "page"),),
        also=("BackupPlacesTooFew",),
    ),
    Fault(
        "last night's backup failed",
        partial(_recorded, kind="backup", ok=False),
        (Alert("BackupFailed", "ticket", "primary"),),
    ),
    Fault(
        "one of two places has got no backup",
        partial(_recorded, kind="backup"),
        (Alert("BackupPlacesTooFew", "ticket", "primary"),),
    ),
    Fault(
        "no backup was restored for weeks",
        partial(_recorded, kind="restore_verification", age="20 days"),
        (Alert("RestoreUnverified", "ticket"),),
    ),
    Fault(
        "the restore of a backup fails",
        partial(_recorded, kind="restore_verification", ok=False),
        (Alert("RestoreFailed", "ticket", "primary"),),
    ),
    Fault(
        "the check of the data finds something wrong",
        partial(_recorded, kind="integrity_check", ok=False),
        (Alert("IntegrityCheckFailed", "page", "primary"),),
    ),
    Fault(
        "the data were not checked for months",
        partial(_recorded, kind="integrity_check", age="80 days"),
        findings=("IntegrityCheckDue",),
    ),
    Fault(
        "failover was not practised for a quarter of a year",
        partial(_recorded, kind="failover_drill", age="95 days"),
        findings=("FailoverDrillDue",),
    ),
    Fault(
        "failover was not practised for much longer",
        partial(_recorded, kind="failover_drill", age="200 days"),
        (Alert("FailoverDrillOverdue", "ticket", "primary"),),
        also=("FailoverDrillDue",),
    ),
    Fault(
        "whoever takes a base backup reads no more of it",
        _backup_stuck,
        (Alert("BaseBackupLong", "ticket", "primary"),),
        scene="quick backups",
    ),
    Fault(
        "somebody begins an exclusive backup and forgets it",
        _backup_forgotten,
        (Alert("ExclusiveBackupOpen", "ticket", "primary"),),
        scene="quick backups",
        until=15,
    ),
)
