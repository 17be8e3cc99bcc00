"""A pgBackRest with two repositories, which is watched as the target `repository`."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lab import basebackup, pgbackrest
from lab.binaries import account
from lab.pgbackrest import PgBackRest
from tests.faults.pieces import Piece

if TYPE_CHECKING:
    from tests.faults.stage import Stage

REPOSITORIES = (1, 2)


class Repository(Piece):
    """The tool, with a backup in each repository."""

    def __init__(self, stage: "Stage", age: float) -> None:
        self._age = age
        self.tool = PgBackRest(stage.primary, pgbackrest.program("sid"))
        self.tool.run("stanza-create")
        self.back_up()
        self.command = stage.directory / "pgbackrest"
        self.command.write_text(f'#!/bin/sh\nexec {" ".join(self._words())} "$@"\n')
        self.command.chmod(0o755)

    def back_up(self) -> None:
        """Take a backup into each repository."""
        for repository in REPOSITORIES:
            self.tool.backup("full", repository)
        basebackup.archive_all(self.tool.server)

    def _words(self) -> list[str]:
        """How the exporter runs it; newer ones refuse to be run by root."""
        if os.getuid() != 0:
            return [self.tool.program]
        user, group = account()
        ours = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        return [*ours, self.tool.program]

    def configure(self, configuration: dict[str, Any]) -> None:
        """It is a target with the same objectives, but for the age of backups."""
        targets = configuration["targets"]
        ages = {
            "BAK-2": {"backup_age_seconds": {"page": self._age}},
            "BAK-7": {"place_age_seconds": {"ticket": self._age}},
        }
        targets["repository"] = {
            "kind": "pgbackrest",
            "command": [str(self.command), f"--config={self.tool.config}"],
            "objectives": targets["primary"]["objectives"] | ages,
        }


@contextlib.contextmanager
def repository(stage: "Stage", age: float = 26 * 3600) -> Iterator[Piece]:
    """Both repositories well, and a backup in each, which is too old after these seconds."""
    yield Repository(stage, age)
