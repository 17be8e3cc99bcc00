"""Runs the exporter as a process of its own, connected as the role its grants describe."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path

import psycopg

from demo import summary
from lab.postgres import Server

_PATIENCE_SECONDS = 20.0
_LAST_PORT = 65535


class ExporterError(Exception):
    """The exporter does not run; the text ends with its last words."""


def create_role(server: Server) -> str:
    """Create the role pgvigil with the SQL that `pgvigil grants` prints; return its password."""
    printed = subprocess.run(
        [sys.executable, "-m", "pgvigil", "grants"], capture_output=True, text=True, check=True
    )
    server.execute(printed.stdout)
    password = secrets.token_urlsafe()
    # As psql's \password does it: what goes to the server, and into its statistics, is a hash.
    with psycopg.connect(
        host=str(server.directory), port=server.port, user="postgres", dbname="postgres"
    ) as superuser:
        superuser.pgconn.change_password(b"pgvigil", password.encode())
    return password


def free_port(wanted: int) -> int:
    """Return the port, or the next above it that nobody listens on; raise OSError for none."""
    for port in range(wanted, _LAST_PORT + 1):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                return port
    raise OSError(f"no port from {wanted} up to {_LAST_PORT} is free")


class Exporter:
    """The exporter's process, which writes its log beside the server's."""

    def __init__(self, server: Server, password: str, port: int) -> None:
        """Start it; `wait` tells when it answers."""
        self.port = port
        self.log_path = server.directory / "exporter.log"
        dsn = server.conninfo(user="pgvigil")
        command = [sys.executable, "-m", "pgvigil", "serve"]
        command += ["--listen", f"127.0.0.1:{port}", "--dsn", dsn]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PGPASSWORD": password},
                # Out of reach of the terminal's Ctrl-C: it is ended in its turn.
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Return when it serves; raise ExporterError when it ends or takes too long."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while self.running and time.monotonic() < end:
            with contextlib.suppress(OSError, HTTPException):
                summary.fetch(self.port, "/readyz")
                return
            time.sleep(0.05)
        raise ExporterError(f"the exporter does not serve; {last_words(self.log_path)}")

    def stop(self) -> None:
        """End it and return when it is gone."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def last_words(log: Path) -> str:
    """Return the end of a log, for a message about its program."""
    lines = log.read_text(errors="replace").splitlines()[-10:] if log.exists() else []
    return "its log ends with:\n" + "\n".join(lines) if lines else "its log is empty"
