"""Puts a real PgBouncer before a server."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from lab.binaries import account
from lab.cluster import PGVIGIL
from lab.ports import free_port
from lab.postgres import Server


def available() -> str | None:
    """The path of an installed PgBouncer; Debian keeps it where only root looks by default."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


@contextlib.contextmanager
def pooled(server: Server, mode: str, settings: str = "") -> Iterator[int]:
    """Yield the port of a PgBouncer that lets anybody in as the role pgvigil.

    `mode` is `session` or `transaction`; `settings` are further lines of its configuration.
    """
    program = available()
    if program is None:
        raise FileNotFoundError("pgbouncer is not installed")
    port = free_port()
    user, group = account()
    with tempfile.TemporaryDirectory(prefix="pgvigil-pgbouncer-") as directory:
        path = Path(directory)
        password = PGVIGIL.password.replace("'", "''")
        (path / "pgbouncer.ini").write_text(
            "[databases]\n"
            f"postgres = host=127.0.0.1 port={server.port} user=pgvigil password='{password}'\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
            f"unix_socket_dir =\npool_mode = {mode}\ndefault_pool_size = 3\n{settings}\n"
        )
        path.chmod(0o755)
        as_root = {"user": user, "group": group, "extra_groups": []} if os.getuid() == 0 else {}
        with (path / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, str(path / "pgbouncer.ini")],
                stdout=log,
                stderr=log,
                **as_root,  # type: ignore[call-overload]
            )
        try:
            _wait_until_it_answers(port, process, path / "log")
            yield port
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_it_answers(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(
                f"host=127.0.0.1 port={port} user=pgvigil dbname=postgres", connect_timeout=5
            ).close()
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()) from error
            time.sleep(0.02)
        else:
            return
