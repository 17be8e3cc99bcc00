"""Takes a backup, has `pgvigil drill restore` prove it, and has both recorded."""

import os
import subprocess
import sys
from pathlib import Path

from lab import basebackup
from lab.binaries import Binaries, LocalBinaries
from lab.postgres import Server

PLACE = "demo"


class DrillError(Exception):
    """A command of ours failed; the text is what it said."""


def take(server: Server) -> Path:
    """Take a base backup with the WAL that it needs, and record it."""
    script = _pgvigil(server, "grants", "--record")
    server.execute(script)
    place = server.directory / "backup"
    basebackup.take(server, place, wal=True)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    _pgvigil(server, "record", "backup", "--ok", "--place", PLACE, "--size", str(size))
    return place


def drill(server: Server, binaries: Binaries, backup: Path) -> str:
    """Restore it in a drill, which records itself; return what the drill said."""
    assert isinstance(binaries, LocalBinaries)
    return _pgvigil(
        server,
        *("drill", "restore", "--from", str(backup), "--place", PLACE),
        *("--bin", str(binaries.directory), "--scratch", str(server.directory)),
        *("--set", "fsync=off"),  # as the server itself has it here
        *("--query", "select count(*) > 0 from public.orders", "--database", "shop"),
        *(("--as", "nobody") if os.getuid() == 0 else ()),
    )


def _pgvigil(server: Server, *words: str) -> str:
    """Run one of our commands as the superuser, who comes in through the socket."""
    done = subprocess.run(
        [sys.executable, "-m", "pgvigil", *words],
        env={
            **os.environ,
            "PGHOST": str(server.directory),
            "PGPORT": str(server.port),
            "PGUSER": "postgres",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise DrillError(f"pgvigil {words[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout
