"""What pg_up and its reason say of the ways to be down that tests/live/test_down.py leaves out."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from threading import Thread

import psycopg
import pytest

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

TIMEOUT = 3.0
"""Seconds that a scrape is granted."""

Fault = Callable[[Server], AbstractContextManager[object]]


@pytest.fixture(scope="module", params=[13, 18])
def place(request: pytest.FixtureRequest, module_server: Callable[..., Server]) -> Server:
    server = module_server(request.param, tls=True)
    server.execute("create database other")
    return server


@dataclass(frozen=True)
class Cell:
    """A fault, and what the page says as long as it lasts."""

    fault: Fault
    reason: str
    connection: dict[str, str] = field(default_factory=dict)
    """Of our connection, beside where and who."""


def sql(do: str, undo: str) -> Fault:
    @contextmanager
    def fault(server: Server) -> Iterator[None]:
        server.execute(do)
        try:
            yield
        finally:
            server.execute(undo)

    return fault


@contextmanager
def hba(server: Server, *lines: str) -> Iterator[None]:
    server.set_hba(lines)
    try:
        yield
    finally:
        server.set_hba(None)


@contextmanager
def instead(server: Server, behave: Callable[[socket.socket], object]) -> Iterator[None]:
    """Something that is no PostgreSQL listens in the server's place."""
    server.stop()
    with socket.create_server(("127.0.0.1", server.port), backlog=64) as door:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = door.accept()
                    Thread(target=guest, args=[client], daemon=True).start()

        def guest(client: socket.socket) -> None:
            with client, suppress(OSError):
                client.recv(1024)
                behave(client)

        thread = Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            door.shutdown(socket.SHUT_RDWR)
            thread.join()
            door.close()
            server.start()


def half_a_message(client: socket.socket) -> None:
    client.sendall(b"N")  # no TLS here
    client.recv(1024)
    client.sendall(b"R\x00\x00\x00\x17\x00")  # and the rest never comes
    client.recv(1024)


def http(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def garbage(client: socket.socket) -> None:
    client.sendall(b"N")
    client.recv(1024)
    client.sendall(bytes(range(255, 0, -1)) * 20)
    client.recv(1024)


def hang_up(client: socket.socket) -> None:
    client.close()


def somebody_else(behave: Callable[[socket.socket], object]) -> Fault:
    return lambda server: instead(server, behave)


@contextmanager
def taken(server: Server, limit: str, unlimit: str) -> Iterator[None]:
    """Connections are limited to one, and that is taken by somebody of our name."""
    with closing(psycopg.connect(server.conninfo(dbname="other", **PGVIGIL.login))):
        server.execute(limit)
        try:
            yield
        finally:
            server.execute(unlimit)


@contextmanager
def without_tls(server: Server) -> Iterator[None]:
    server.set({"ssl": False})
    try:
        yield
    finally:
        server.set({"ssl": True})


@contextmanager
def expired(server: Server) -> Iterator[None]:
    """The server's certificate has ended a moment ago."""
    kept = server.certificate.read_bytes()
    command = ["openssl", "x509", "-in", str(server.certificate), "-days", "0"]
    command += ["-signkey", str(server.directory / "server.key"), "-copy_extensions", "copy"]
    ended = subprocess.run(command, check=True, capture_output=True).stdout
    time.sleep(2)
    server.certificate.write_bytes(ended)
    server.reload()
    try:
        yield
    finally:
        server.certificate.write_bytes(kept)
        server.reload()


QUOTED = PGVIGIL.password.replace("'", "''")
NEW_PASSWORD = f"alter role pgvigil password '{QUOTED}'"
LOGIN = "invalid_authorization_specification"
OTHER = {"dbname": "other"}

CELLS = {
    "no line in pg_hba.conf": Cell(lambda s: hba(s, "host all nobody 127.0.0.1/32 trust"), LOGIN),
    "a role that may not log in": Cell(
        sql("alter role pgvigil nologin", "alter role pgvigil login"), LOGIN
    ),
    "a password that has expired": Cell(
        sql(
            "alter role pgvigil valid until '2000-01-01'",
            "alter role pgvigil valid until 'infinity'",
        ),
        "invalid_password",
    ),
    "a database that takes no connections": Cell(
        sql(
            "alter database other allow_connections false",
            "alter database other allow_connections true",
        ),
        "other",
        OTHER,
    ),
    "a database that a broken DROP left": Cell(
        sql(
            "update pg_database set datconnlimit = -2 where datname = 'other'",
            "update pg_database set datconnlimit = -1 where datname = 'other'",
        ),
        "other",
        OTHER,
    ),
    "a database without the right to connect": Cell(
        sql(
            "revoke connect on database other from public",
            "grant connect on database other to public",
        ),
        "insufficient_privilege",
        OTHER,
    ),
    "the limit of the database": Cell(
        lambda s: taken(
            s,
            "alter database other connection limit 1",
            "alter database other connection limit -1",
        ),
        "too_many_connections",
        OTHER,
    ),
    "TLS that the server wants and we do not": Cell(
        lambda s: hba(s, "hostssl all all 127.0.0.1/32 scram-sha-256"),
        LOGIN,
        {"sslmode": "disable"},
    ),
    "TLS that we want and the server has not": Cell(without_tls, "tls", {"sslmode": "require"}),
    "an expired certificate": Cell(expired, "tls", {"sslmode": "verify-full"}),
    "half a message": Cell(somebody_else(half_a_message), "timeout"),
    # It was asked for TLS, and what it said to that is all there is to tell.
    "HTTP": Cell(somebody_else(http), "tls"),
    "HTTP, where we want no TLS": Cell(somebody_else(http), "other", {"sslmode": "disable"}),
    "garbage": Cell(somebody_else(garbage), "other"),
    "somebody who hangs up": Cell(somebody_else(hang_up), "connection_lost"),
}


def watching(server: Server, **connection: str) -> Exporter:
    disable = "storage schema maintenance security extensions settings queries resources"
    dsn = server.conninfo(**{**PGVIGIL.login, **connection})
    return Exporter(environment={"PGVIGIL_DSN": dsn, "PGVIGIL_DISABLE": disable})


def hang_up_on_us(server: Server) -> None:
    """End the exporter's connections, so that it has to make new ones."""
    ended = server.execute(
        "select pid, pg_terminate_backend(pid)"
        " from pg_stat_activity where application_name = 'pgvigil'"
    )
    # The background may have come again by now.
    pids = ", ".join(str(pid) for pid, _ in ended) or "0"
    server.wait_until(f"select count(*) = 0 from pg_stat_activity where pid in ({pids})")


def assert_up(page: Page) -> None:
    assert (page.value("pg_up"), page.reason) == (1, None)
    assert page.value("pg_in_recovery") == 0


def assert_down(page: Page, reason: str) -> None:
    assert (page.value("pg_up"), page.reason) == (0, reason)
    assert sum(page.series("pg_down_reason").values()) == 1
    assert not any(name.startswith("pg_stat") for name in page.names)


@pytest.mark.parametrize("cell", CELLS.values(), ids=[*CELLS])
def test_whoever_connects_in_vain_says_why_and_is_up_at_once_when_it_is_mended(
    place: Server, cell: Cell
) -> None:
    connection = dict(cell.connection)
    if connection.get("sslmode") == "verify-full":
        connection["sslrootcert"] = str(place.certificate)
    with watching(place, **connection) as exporter:
        assert_up(exporter.scrape(timeout=TIMEOUT))
        with cell.fault(place):
            if place.running:
                hang_up_on_us(place)
            for _ in range(2):
                assert_down(exporter.scrape(timeout=TIMEOUT), cell.reason)
        assert_up(exporter.scrape(timeout=TIMEOUT))


def test_a_password_that_is_changed_counts_when_a_connection_is_made(place: Server) -> None:
    with watching(place) as exporter:
        assert_up(exporter.scrape())
        with sql("alter role pgvigil password 'other'", NEW_PASSWORD)(place):
            assert_up(exporter.scrape())  # by the connection that is open
            hang_up_on_us(place)
            assert_down(exporter.scrape(), "invalid_password")
        assert_up(exporter.scrape())


def test_a_role_that_is_dropped_under_us_is_down_and_back_when_it_is_made_anew(
    place: Server,
) -> None:
    with watching(place) as exporter:
        assert_up(exporter.scrape())
        with sql(
            "drop role pgvigil",
            f"create role pgvigil login password '{QUOTED}' in role pg_monitor",
        )(place):
            for _ in range(2):
                # PostgreSQL does not say whether a role or its password is wrong.
                assert_down(exporter.scrape(), "invalid_password")
        assert_up(exporter.scrape())


def test_a_server_that_shuts_down_smartly_serves_who_is_in_and_nobody_else(place: Server) -> None:
    with watching(place) as inside, watching(place) as outside:
        assert_up(inside.scrape())
        begin = place.log_position()
        os.kill(place.pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while "received smart shutdown request" not in place.log(begin):
            assert time.monotonic() < end
            time.sleep(0.02)
        for _ in range(2):
            assert_up(inside.scrape())
            assert_down(outside.scrape(), "cannot_connect_now")
    end = time.monotonic() + 20
    while place.running:
        assert time.monotonic() < end
        time.sleep(0.02)
    place.start()
    with watching(place) as exporter:
        assert_up(exporter.scrape())


def test_a_standby_that_serves_nobody_cannot_be_connected_to_now(
    fresh_server: Callable[..., Server],
) -> None:
    standby = fresh_server(18).standby()
    with watching(standby) as exporter:
        assert exporter.scrape().value("pg_in_recovery") == 1
        standby.set({"hot_standby": False})
        standby.restart()
        for _ in range(2):
            assert_down(exporter.scrape(), "cannot_connect_now")
        standby.stop()
        standby.set({"hot_standby": True})
        standby.start()
        page = exporter.scrape()
    assert (page.value("pg_up"), page.value("pg_in_recovery")) == (1, 1)
