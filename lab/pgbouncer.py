"""Puts a real PgBouncer before a server."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from lab import debian
from lab.binaries import account
from lab.cluster import PGVIGIL, Role
from lab.ports import free_port
from lab.postgres import Server

STATS = Role("watcher", "w@tch'er\"")
"""A user who may look at the console."""
ADMIN = Role("boss", "boss")
"""A user who may do anything there."""
CLIENT = Role("client", "client")
"""A user of the databases alone."""
USERS = (STATS, ADMIN, CLIENT)


def available() -> str | None:
    """The path of an installed PgBouncer; Debian keeps it where only root looks by default."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def fetched(suite: str) -> str:
    """The path of the PgBouncer of a suite of Debian; raises RuntimeError where none is had."""
    return str(debian.fetch(f"pgbouncer-{suite}", [suite], ["pgbouncer"], "usr/sbin") / "pgbouncer")


@dataclass(frozen=True)
class Pooler:
    """A PgBouncer that runs; its databases `app` and `app_session` lead to `postgres`."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def login(self, role: Role = CLIENT, dbname: str = "app") -> dict[str, str | int]:
        """What connects to it as a role."""
        return {"host": "127.0.0.1", "port": self.port, "dbname": dbname, **role.login}

    def connect(self, role: Role = CLIENT, dbname: str = "app") -> "psycopg.Connection[Any]":
        """Connect as a client does."""
        return psycopg.connect(
            **self.login(role, dbname),  # type: ignore[arg-type]
            autocommit=True,
            prepare_threshold=None,
            connect_timeout=10,
        )

    def command(self, text: str) -> Sequence[tuple[Any, ...]]:
        """Run a command of the console as its admin, and return what it shows."""
        with contextlib.closing(self.connect(ADMIN, "pgbouncer")) as connection:
            cursor = psycopg.ClientCursor(connection)
            cursor.execute(text.encode())
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def running(
    server: Server,
    settings: str,
    program: str,
    port: int | None = None,
    as_role: Role = PGVIGIL,
) -> Iterator[Pooler]:
    """Yield a PgBouncer that knows the users above, each by a password.

    `settings` are further lines of its configuration; `port` is a free one when absent. The server
    sees all clients as one role.
    """
    with tempfile.TemporaryDirectory(prefix="pgvigil-pgbouncer-") as directory:
        users = Path(directory, "users")
        users.write_text("".join(f'"{r.name}" {_quoted(r.password)}\n' for r in USERS))
        Path(directory).chmod(0o755)
        ours = f"auth_type = scram-sha-256\nauth_file = {users}\n"
        ours += f"stats_users = {STATS.name}\nadmin_users = {ADMIN.name}\n"
        with _started(
            server, program, "app", ours + settings, port or free_port(), as_role
        ) as pooler:
            _wait_until_it_answers(pooler, pooler.login(ADMIN, "pgbouncer"))
            yield pooler


@contextlib.contextmanager
def pooled(server: Server, mode: str, settings: str = "") -> Iterator[int]:
    """Yield the port of a PgBouncer that lets anybody in as the role pgvigil.

    `mode` is `session` or `transaction`; `settings` are further lines of its configuration.
    """
    program = available()
    if program is None:
        raise FileNotFoundError("pgbouncer is not installed")
    ours = f"auth_type = any\npool_mode = {mode}\ndefault_pool_size = 3\n"
    with _started(server, program, "postgres", ours + settings, free_port(), PGVIGIL) as pooler:
        _wait_until_it_answers(pooler, {**pooler.login(), "user": "pgvigil", "dbname": "postgres"})
        yield pooler.port


@contextlib.contextmanager
def _started(
    server: Server, program: str, database: str, settings: str, port: int, as_role: Role
) -> Iterator[Pooler]:
    user, group = account()
    with tempfile.TemporaryDirectory(prefix="pgvigil-pgbouncer-") as directory:
        path = Path(directory)
        password = as_role.password.replace("'", "''")
        there = f"host=127.0.0.1 port={server.port} dbname=postgres user={as_role.name}"
        (path / "pgbouncer.ini").write_text(
            f"[databases]\n{database} = {there} password='{password}'\n"
            f"{database}_session = {there} password='{password}' pool_mode=session\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"{settings}\n"
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
            yield Pooler(port, process, path / "log")
        finally:
            process.kill()  # which also ends one that a test has stopped
            process.wait(60)


def _quoted(text: str) -> str:
    """A text as the file of users writes it."""
    return '"' + text.replace('"', '""') + '"'


def _wait_until_it_answers(pooler: Pooler, login: Mapping[str, str | int]) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(**login, connect_timeout=5).close()  # type: ignore[arg-type]
        except psycopg.OperationalError as error:
            if pooler.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(pooler.log.read_text()) from error
            time.sleep(0.02)
        else:
            return
