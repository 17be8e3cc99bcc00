"""Runs a real Barman for a server of the lab, with its catalogue beside the data."""

import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab import basebackup, debian, packages
from lab.binaries import account
from lab.patroni import POSTGRES_15
from lab.postgres import Server

SERVER = "main"

RELEASES = ("3.4", "3.19")
"""Barman of Debian 12, and a current one."""


@dataclass
class Barman:
    """Barman for one server of PostgreSQL 15 at most, whose WAL comes by archive_command."""

    server: Server
    release: str
    config: Path = field(init=False)

    def __post_init__(self) -> None:
        """Install it, write the configuration and have the server archive; it is restarted.

        Raises RuntimeError when Barman or pg_basebackup cannot be had.
        """
        self._python = packages.python()
        self._packages = packages.installed(f"barman-{self.release}", self._python)
        programs = debian.fetch("postgres-15", ["bookworm"], POSTGRES_15)
        place = self.server.directory / "barman"
        incoming = place / "home" / SERVER / "incoming"
        for path in (place, place / "home", incoming.parent, incoming):
            path.mkdir()
            basebackup.own(path)
        self.config = place / "barman.conf"
        user = pwd.getpwuid(account()[0]).pw_name
        reach = f"host=127.0.0.1 port={self.server.port} user=postgres"
        self.config.write_text(
            f"[barman]\nbarman_user = {user}\nbarman_home = {place}/home\n"
            f"barman_lock_directory = {place}\nlog_file = {place}/barman.log\n"
            f"[{SERVER}]\ndescription = lab\nconninfo = {reach} dbname=postgres\n"
            f"streaming_conninfo = {reach}\nbackup_method = postgres\narchiver = on\n"
            f"path_prefix = {programs}\n"
        )
        push = f"cp %p {incoming}/%f"
        self.server.set({"archive_mode": True, "archive_command": push})
        self.server.restart()

    def words(self) -> list[str]:
        """How it is run, with its configuration."""
        run = "import sys; from barman.cli import main; sys.exit(main())"
        at = f"PYTHONPATH={self._packages}"
        return ["env", at, str(self._python), "-c", run, "-c", str(self.config)]

    def run(self, *words: str, codes: Sequence[int] = (0,)) -> str:
        """Run a command as the servers' account; return what it said."""
        user, group = account() if os.getuid() == 0 else (None, None)
        done = subprocess.run(
            [*self.words(), *words],
            capture_output=True,
            text=True,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self.config.parent)},
            timeout=120,
        )
        if done.returncode not in codes:
            raise RuntimeError(f"barman {words}: {done.stdout}{done.stderr}")
        return done.stdout

    def backup(self) -> None:
        """Take a backup, and return when it has the WAL it needs."""
        self.archive()  # older ones refuse while no WAL has come
        self.run("backup", SERVER)
        self.archive()

    def archive(self) -> None:
        """Have all WAL so far in Barman's catalogue."""
        basebackup.archive_all(self.server)
        self.run("archive-wal", SERVER)
