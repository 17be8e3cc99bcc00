"""Runs the exporter as a process of its own, connected as the role its grants describe."""

import secrets
import subprocess
import sys

import psycopg

from demo.program import Program
from lab.postgres import Server


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


def start(server: Server, password: str, port: int) -> Program:
    """Start it, with its log beside the server's."""
    command = [sys.executable, "-m", "pgvigil", "serve", "--listen", f"127.0.0.1:{port}"]
    return Program(
        "the exporter",
        [*command, "--dsn", server.conninfo(user="pgvigil")],
        port,
        "/readyz",
        server.directory / "exporter.log",
        {"PGPASSWORD": password},
    )
