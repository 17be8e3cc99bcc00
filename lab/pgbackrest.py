"""Runs a real pgBackRest with two repositories for a server of the lab."""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from lab import basebackup, debian
from lab.binaries import account
from lab.postgres import Server

STANZA = "main"


SOURCES = ("installed", "sid")
"""pgBackRest of the machine, and of Debian's newest suite."""


def program(source: str) -> str:
    """Return the program of one of SOURCES; raise RuntimeError when it cannot be had."""
    if source == "sid":
        return str(debian.fetch("pgbackrest", ["sid"], ["pgbackrest"], "usr/bin") / "pgbackrest")
    if (found := shutil.which("pgbackrest")) is None:
        raise RuntimeError("pgBackRest is not installed")
    return found


@dataclass
class PgBackRest:
    """pgBackRest for one server, with its configuration and repositories beside the data."""

    server: Server
    program: str
    config: Path = field(init=False)

    def __post_init__(self) -> None:
        """Write the configuration and have the server archive; it is restarted."""
        place = self.server.directory / "pgbackrest"
        for name in ("", "repo1", "repo2", "log", "lock", "spool"):
            (place / name).mkdir()
            basebackup.own(place / name)
        self.config = place / "pgbackrest.conf"
        self.config.write_text(
            f"[global]\nrepo1-path={place}/repo1\nrepo2-path={place}/repo2\n"
            f"log-path={place}/log\nlock-path={place}/lock\nspool-path={place}/spool\n"
            "start-fast=y\nrepo1-retention-full=9\nrepo2-retention-full=9\ncompress-level=1\n"
            "archive-timeout=60\njob-retry=0\nlog-level-console=warn\n"
            f"[{STANZA}]\npg1-path={self.server.data}\npg1-port={self.server.port}\n"
            f"pg1-socket-path={self.server.directory}\npg1-user=postgres\n"
        )
        push = f"{self.program} --config={self.config} --stanza={STANZA} archive-push %p"
        self.server.set({"archive_mode": True, "archive_command": push})
        self.server.restart()

    def repository(self, number: int) -> Path:
        """The directory of a repository."""
        return self.config.parent / f"repo{number}"

    def run(self, *words: str) -> str:
        """Run a command for the stanza as the servers' account; return what it said."""
        user, group = account()
        done = subprocess.run(
            [self.program, f"--config={self.config}", f"--stanza={STANZA}", *words],
            capture_output=True,
            text=True,
            user=user,
            group=group,
            extra_groups=[],
            cwd="/",
            timeout=120,
        )
        if done.returncode != 0:
            raise RuntimeError(f"pgbackrest {words[-1]}: {done.stdout}{done.stderr}")
        return done.stdout

    def backup(self, kind: str, repository: int = 1) -> None:
        """Take a backup: full, diff or incr."""
        self.run(f"--repo={repository}", f"--type={kind}", "backup")
