"""Shows each way to be down with its reason, and that the next scrape sees the server well."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from threading import Thread

import psycopg
import pytest
from pgvigil import catalogue
from pgvigil.plan import concerning

from lab.cluster import BARE, PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server
from lab.processes import descendants
from lab.silent_port import silent_port

Start = Callable[..., Server]

TIMEOUT = 2.0
"""Seconds that the scrapes here grant; the exporter answers before."""


def watching(server: Server, **overrides: str) -> Exporter:
    dsn = server.conninfo(**{**PGVIGIL.login, **overrides})
    return Exporter(environment={"PGVIGIL_DSN": dsn})


def scrape_in_time(exporter: Exporter) -> Page:
    """A page that Prometheus would have taken: 200 and parsed, before it gives up."""
    return exporter.scrape(timeout=TIMEOUT)


def assert_down_then_up(exporter: Exporter, reason: str, heal: Callable[[], object]) -> None:
    for _ in range(2):
        page = scrape_in_time(exporter)
        assert page.value("pg_up") == 0
        assert page.reason == reason
        assert not any(name.startswith("pg_stat") for name in page.names)
    heal()
    page = scrape_in_time(exporter)
    assert page.value("pg_up") == 1
    assert page.reason is None
    assert page.value("pg_in_recovery") == 0


def test_a_stopped_server_refuses_the_connection(fresh_server: Start) -> None:
    server = fresh_server()
    with watching(server) as exporter:
        assert scrape_in_time(exporter).value("pg_up") == 1
        server.stop()
        assert_down_then_up(exporter, "connection_refused", server.start)


def test_a_server_that_was_never_there_refuses_the_connection(fresh_server: Start) -> None:
    server = fresh_server()
    server.stop()
    with watching(server) as exporter:
        assert_down_then_up(exporter, "connection_refused", server.start)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restarted_server_is_up_at_the_next_scrape(fresh_server: Start, mode: str) -> None:
    server = fresh_server()
    with watching(server) as exporter:
        before = scrape_in_time(exporter)
        server.restart(mode)  # type: ignore[arg-type]
        page = scrape_in_time(exporter)
        assert page.value("pg_up") == 1
        assert page.failed() == set()
        name = "pg_postmaster_start_timestamp_seconds"
        assert page.value(name) > before.value(name)


def test_a_wrong_password_is_told_from_a_server_that_is_away(fresh_server: Start) -> None:
    server = fresh_server()
    with watching(server, password="wrong") as exporter:
        assert_down_then_up(
            exporter,
            "invalid_password",
            lambda: server.execute("alter role pgvigil password 'wrong'"),
        )


def test_a_login_that_is_refused_is_not_tried_at_the_next_address(fresh_server: Start) -> None:
    server = fresh_server()
    port = f"{server.port},{server.port}"
    with watching(server, password="wrong", host="127.0.0.1,127.0.0.1", port=port) as exporter:
        assert scrape_in_time(exporter).reason == "invalid_password"
    assert len([line for line in server.errors_in_log() if "password" in line]) == 1


def test_the_next_address_is_tried_when_the_first_is_silent_or_refuses(
    fresh_server: Start,
) -> None:
    server = fresh_server()
    with silent_port() as silent:
        ports = f"1,{silent},{server.port}"
        with watching(server, host="127.0.0.1,127.0.0.1,127.0.0.1", port=ports) as exporter:
            assert scrape_in_time(exporter).value("pg_up") == 1


def test_a_password_that_is_no_utf_8_is_sent_as_it_is(fresh_server: Start) -> None:
    server = fresh_server(hba=["host all all 127.0.0.1/32 password"])
    odd = os.fsdecode(b"\xe9\xff")
    uri = f"127.0.0.1:{server.port}/postgres"
    apart = {"DATA_SOURCE_URI": uri, "DATA_SOURCE_USER": "pgvigil", "DATA_SOURCE_PASS": odd}
    libpq = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "pgvigil"}
    for environment in (apart, {**libpq, "PGPASSWORD": odd}):
        with Exporter(environment=environment) as exporter:
            assert scrape_in_time(exporter).reason == "invalid_password"


def test_a_role_that_pg_hba_turns_away_is_not_authorized(fresh_server: Start) -> None:
    server = fresh_server(hba=["host all all 127.0.0.1/32 reject"])
    with watching(server) as exporter:
        assert_down_then_up(
            exporter, "invalid_authorization_specification", lambda: server.set_hba(None)
        )


def test_an_unknown_database_is_named_so(fresh_server: Start) -> None:
    server = fresh_server()
    with watching(server, dbname="later") as exporter:
        assert_down_then_up(
            exporter, "invalid_catalog_name", lambda: server.execute("create database later")
        )


def test_an_unknown_host_is_named_so(fresh_server: Start) -> None:
    with watching(fresh_server(), host="no-such-host.invalid") as exporter:
        page = scrape_in_time(exporter)
        assert (page.value("pg_up"), page.reason) == (0, "host_unknown")


def test_a_port_that_accepts_and_says_nothing_times_out(fresh_server: Start) -> None:
    server = fresh_server()
    server.stop()
    silent = socket.create_server(("127.0.0.1", server.port), backlog=64)
    with watching(server) as exporter:

        def heal() -> None:
            silent.close()
            server.start()

        assert_down_then_up(exporter, "timeout", heal)


def test_a_server_that_stands_still_times_out(fresh_server: Start) -> None:
    server = fresh_server()
    with watching(server) as exporter:
        assert scrape_in_time(exporter).value("pg_up") == 1
        server.pause()
        assert_down_then_up(exporter, "timeout", server.resume)


def test_a_server_without_a_connection_left_is_named_so(fresh_server: Start) -> None:
    server = fresh_server(max_connections=10, superuser_reserved_connections=3)
    with contextlib.ExitStack() as crowd:
        for _ in range(7):
            connection = psycopg.connect(server.conninfo(**BARE.login))
            crowd.enter_context(contextlib.closing(connection))
        with watching(server) as exporter:
            assert_down_then_up(exporter, "too_many_connections", crowd.close)


def test_the_limit_of_its_own_role_is_named_so(fresh_server: Start) -> None:
    server = fresh_server()
    server.execute("alter role pgvigil connection limit 1")
    taken = psycopg.connect(server.conninfo(**PGVIGIL.login))
    with watching(server) as exporter:
        assert_down_then_up(exporter, "too_many_connections", taken.close)


@contextlib.contextmanager
def held_in_recovery(server: Server) -> Iterator[None]:
    """Crash a server by the death of one session, and hold its startup process in mid-recovery."""
    server.execute(
        "create table replayed as select g, repeat('x', 200) from generate_series(1, 600000) as g"
    )
    postmaster = server.pid
    with contextlib.closing(psycopg.connect(server.conninfo())) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
    startup = None
    end = time.monotonic() + 20
    while startup is None and time.monotonic() < end:
        for pid in descendants(postmaster):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                if b": startup" in file.read():
                    os.kill(pid, signal.SIGSTOP)
                    startup = pid
                    break
    assert startup, "the startup process was too quick to be caught"
    try:
        yield
    finally:
        os.kill(startup, signal.SIGCONT)
        wait_until_up(server)


def wait_until_up(server: Server) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            server.execute("select 1")
        except psycopg.OperationalError:
            assert time.monotonic() < end
            time.sleep(0.02)
        else:
            return


def test_a_server_in_crash_recovery_cannot_be_connected_to_now(fresh_server: Start) -> None:
    server = fresh_server(max_wal_size="4GB", checkpoint_timeout="1h")
    with watching(server) as exporter:
        assert scrape_in_time(exporter).value("pg_up") == 1
        with contextlib.ExitStack() as recovery:
            recovery.enter_context(held_in_recovery(server))
            assert_down_then_up(exporter, "cannot_connect_now", recovery.close)


def test_a_server_that_is_up_and_slow_is_up_and_loses_only_the_slow_queries(
    fresh_server: Start,
) -> None:
    server = fresh_server()
    with watching(server) as exporter:
        exporter.scrape()
        with psycopg.connect(server.conninfo()) as blocker:
            # What reads pg_database waits; all else does not.
            blocker.execute("lock table pg_catalog.pg_database in access exclusive mode")
            page = exporter.scrape(timeout=10)
        assert page.value("pg_up") == 1
        assert page.failed()
        failures = page.series("pgvigil_query_failures_total")
        assert {dict(k)["reason"] for k in failures} == {"lock_not_available"}
        assert page.value("pg_in_recovery") == 0
        fresh = {
            query.name for query in concerning(catalogue.load(), "postgresql") if not query.every
        }
        assert exporter.scrape().failed() & fresh == set()


def test_many_scrapes_of_a_dead_server_at_once_all_say_why() -> None:
    with Exporter(environment={"PGVIGIL_DSN": "host=127.0.0.1 port=1 user=nobody"}) as exporter:
        pages: list[Page] = []
        threads = [Thread(target=lambda: pages.append(exporter.scrape())) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [page.reason for page in pages] == ["connection_refused"] * 20
