"""What pgBackRest says of its repositories."""

import contextlib
import json
from collections.abc import Iterator

from tests.faults.fault import Alert, Fault
from tests.faults.pieces.repository import Repository
from tests.faults.stage import Stage

_PAGE_BYTES = 8192


@contextlib.contextmanager
def _command_gone(stage: Stage) -> Iterator[None]:
    command = stage.piece(Repository).command
    aside = command.rename(command.with_suffix(".aside"))
    # One that runs already asks for the version again after ten minutes only.
    stage.exporter.stop()
    stage.start_exporter_anew()
    yield
    aside.rename(command)


@contextlib.contextmanager
def _list_damaged(stage: Stage) -> Iterator[None]:
    """One repository's list of backups cannot be read, nor its copy."""
    place = stage.piece(Repository).tool.repository(2) / "backup" / "main"
    kept = {path: path.read_bytes() for path in place.glob("backup.info*")}
    for path in kept:
        path.write_bytes(b"damage")
    yield
    for path, content in kept.items():
        path.write_bytes(content)


@contextlib.contextmanager
def _page_damaged(stage: Stage) -> Iterator[None]:
    """A page of a table is damaged on disk, which the backup sees and nobody else."""
    tool = stage.piece(Repository).tool
    stage.execute("create table damaged as select 1 as id; analyze damaged; checkpoint")
    ((path,),) = stage.execute("select pg_relation_filepath('damaged')")
    file = stage.primary.data / path
    good = file.read_bytes()
    file.write_bytes(good[: _PAGE_BYTES // 2] + b"damage" + good[_PAGE_BYTES // 2 + 6 :])
    tool.backup("full")
    (stanza,) = json.loads(tool.run("--repo=1", "--output=json", "info"))
    yield
    file.write_bytes(good)
    stage.execute("drop table damaged")
    tool.run("--repo=1", f"--set={stanza['backup'][-1]['label']}", "expire")


@contextlib.contextmanager
def _no_backups(stage: Stage) -> Iterator[None]:
    """Nobody takes backups any more."""
    yield
    stage.piece(Repository).back_up()


FAULTS = (
    Fault(
        "pgBackRest is not where the exporter looks for it",
        _command_gone,
        (Alert("BackupToolUnreachable", "ticket", "repository"),),
        scene="repository",
    ),
    Fault(
        "a repository's list of backups is damaged",
        _list_damaged,
        (
            Alert("RepositoryUnwell", "ticket", "repository", (("repo", "2"),)),
            Alert("StanzaUnwell", "ticket", "repository"),
        ),
        scene="repository",
    ),
    Fault(
        "a backup finds a page that is damaged",
        _page_damaged,
        (Alert("StanzaBackupErroneous", "ticket", "repository", (("repo", "1"),)),),
        scene="repository",
    ),
    Fault(
        "nobody takes backups any more",
        _no_backups,
        (
            Alert("StanzaBackupTooOld", "page", "repository"),
            Alert("RepositoryBackupOld", "ticket", "repository"),
        ),
        scene="repository that ages",
    ),
)
