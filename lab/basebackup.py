"""Takes base backups of the lab's servers with what every server has, its SQL functions."""

import os
import shutil
import subprocess
from pathlib import Path

import psycopg

from lab.binaries import account
from lab.postgres import Server


def archive(server: Server) -> Path:
    """Have a server archive its WAL into a directory beside its data, from its next start on."""
    place = server.directory / "archive"
    place.mkdir()
    own(place)
    server.set({"archive_mode": True, "archive_command": f"cp %p {place}/%f"})
    return place


def take(server: Server, place: Path, *, wal: bool = False) -> None:
    """Copy the data of a running server between the start and the stop of a backup.

    With `wal` the backup has what it needs of that, so that it wants no archive.
    """
    newer = server.major >= 15
    start = "pg_backup_start('lab', true)" if newer else "pg_start_backup('lab', true, false)"
    stop = "pg_backup_stop(false)" if newer else "pg_stop_backup(false, false)"
    conninfo = f"host={server.directory} port={server.port} user=postgres dbname=postgres"
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f"select {start}".encode())
        subprocess.run(["cp", "-a", server.data, place], check=True)
        label, spaces = connection.execute(
            f"select labelfile, spcmapfile from {stop}".encode()
        ).fetchall()[0]
    (place / "postmaster.pid").unlink()
    for path in (*(place / "pg_wal").iterdir(), *(place / "pg_replslot").iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if wal:
        for path in (server.data / "pg_wal").glob("[0-9A-F]" * 24):
            subprocess.run(["cp", "-a", path, place / "pg_wal"], check=True)
    for name, text in (("backup_label", label), ("tablespace_map", spaces)):
        if text:
            (place / name).write_text(text)
            own(place / name)


def archive_all(server: Server) -> None:
    """End the WAL file being written, and return when it has reached the archive."""
    server.execute("select pg_logical_emit_message(false, 'lab', 'something to archive')")
    ((name,),) = server.execute("select pg_walfile_name(pg_switch_wal())")
    server.wait_until(f"select last_archived_wal >= '{name}' from pg_stat_archiver", timeout=30)


def own(path: Path) -> None:
    """Let the servers' account own what we made."""
    if os.getuid() == 0:
        os.chown(path, *account())
