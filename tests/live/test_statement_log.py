"""The durations in the server's log are told exactly, in each format, and nothing else of it."""

import time
from collections.abc import Callable

import psycopg
import pytest
from pgvigil import grants

from lab.catalogue import rows_of
from lab.cluster import BARE, PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

FreshServer = Callable[..., Server]

QUERY = "queries.logged_statements"
NAME = "pg_log_statement_duration_seconds"
SCRIPT = grants.script(PGVIGIL.name, ["log"], create=False)


@pytest.fixture
def logging(fresh_server: FreshServer, log_format: str, major: int) -> Server:
    """A server that logs what takes 20 ms, to files of its own collector."""
    settings = {
        "logging_collector": "on",
        "log_destination": log_format,
        "log_min_duration_statement": "20ms",
        "log_filename": "of-%H%M%S",
        "log_line_prefix": "%m [%p] %u@%d ",
    }
    server = fresh_server(major, **settings)
    server.execute(SCRIPT)
    return server


def durations(connection: psycopg.Connection) -> tuple[list[float], int]:
    """What one more call in a session tells."""
    row = connection.execute("select took, skipped from pgvigil.logged_durations()").fetchone()
    assert row is not None
    return [float(text) for text in row[0].split(",") if text], row[1]


def collected(watcher: psycopg.Connection, count: int) -> list[float]:
    """So many durations and no more; the collector writes them a little later."""
    found: list[float] = []
    end = time.monotonic() + 30
    while len(found) < count:
        assert time.monotonic() < end, found
        more, skipped = durations(watcher)
        assert skipped == 0
        found += more
    assert len(found) == count
    assert durations(watcher) == ([], 0)
    return found


def page_where(exporter: Exporter, holds: Callable[[Page], bool]) -> Page:
    """The first page of which something holds."""
    end = time.monotonic() + 60
    while not holds(page := exporter.scrape()):
        assert time.monotonic() < end, page.body
        time.sleep(0.2)
    return page


FORMATS = [(13, "stderr"), (13, "csvlog"), (18, "stderr"), (18, "csvlog"), (18, "jsonlog")]
each_format = pytest.mark.parametrize(("major", "log_format"), FORMATS)


@each_format
def test_slow_statements_are_told_once_and_what_pretends_to_be_one_is_not(
    logging: Server, log_format: str
) -> None:
    lies = [
        "select pg_sleep(0.03), 'LOG:  duration: 9000.0 ms  statement: '",
        "select pg_sleep(0.03), ',LOG,00000,\"duration: 9000.0 ms  statement: '",
        'select pg_sleep(0.03), \'"error_severity":"LOG","message":"duration: 9000 ms  execute \'',
        "select pg_sleep(0.03), '\n2026 LOG:  duration: 9000.0 ms  statement: '",
        "select nothing 'LOG:  duration: 9000.0 ms  statement: '",
    ]
    with (
        psycopg.connect(logging.conninfo(**PGVIGIL.login), autocommit=True) as watcher,
        psycopg.connect(logging.conninfo(**BARE.login), autocommit=True) as client,
    ):
        client.execute("select pg_sleep(0.05)")
        log = f"pg_read_file(pg_current_logfile('{log_format}'))"
        logging.wait_until(f"select {log} like '%pg_sleep(0.05)%'")
        assert durations(watcher) == ([], 0)  # what was before is history
        client.execute("select pg_sleep(0.15)")  # simple, and
        client.execute("select pg_sleep(%s)", [0.15], prepare=True)  # extended protocol
        for lie in lies:
            try:
                client.execute(lie.encode(), prepare=False)
            except psycopg.Error:
                continue
        found = collected(watcher, 6)
        assert sum(150 <= duration < 1000 for duration in found) == 2
        assert max(found) < 9000


@pytest.mark.parametrize(("major", "log_format"), [(13, "csvlog"), (18, "stderr")])
def test_a_log_that_moves_to_another_file_is_read_to_its_end(logging: Server) -> None:
    with (
        psycopg.connect(logging.conninfo(**PGVIGIL.login), autocommit=True) as watcher,
        psycopg.connect(logging.conninfo(**BARE.login), autocommit=True) as client,
    ):
        durations(watcher)
        client.execute("select pg_sleep(0.03)")
        logging.set({"log_filename": "another"})
        logging.reload()
        logging.wait_until("select pg_current_logfile() like '%another%'")
        client.execute("select pg_sleep(0.03)")
        collected(watcher, 2)


@pytest.mark.parametrize(("major", "log_format"), [(18, "csvlog")])
def test_of_a_flood_a_megabyte_is_read_and_the_rest_is_counted(logging: Server) -> None:
    with (
        psycopg.connect(logging.conninfo(**PGVIGIL.login), autocommit=True) as watcher,
        psycopg.connect(logging.conninfo(**BARE.login), autocommit=True) as client,
    ):
        durations(watcher)
        for _ in range(3):
            client.execute(f"select pg_sleep(0.03) -- {'x' * 700_000}")
        logging.wait_until("select max(size) > 2100000 from pg_ls_logdir()")
        found, skipped = durations(watcher)
        assert len(found) == 1
        assert skipped > 1_000_000


@pytest.mark.parametrize(("major", "log_format"), [(18, "jsonlog")])
def test_the_page_has_a_histogram_and_the_role_reads_no_more_than_durations(
    logging: Server,
) -> None:
    environment = {"PGVIGIL_DSN": logging.conninfo(**PGVIGIL.login)}
    with Exporter(environment=environment) as exporter:
        page_where(exporter, lambda page: bool(page.series(f"{NAME}_count")))
        with psycopg.connect(logging.conninfo(**BARE.login), autocommit=True) as client:
            client.execute("select pg_sleep(0.03)")
            client.execute("select pg_sleep(0.3)")
        page = page_where(exporter, lambda page: page.value(f"{NAME}_count") >= 2)
        # What the exporter asks may have been slow as well, though hardly so slow.
        assert page.value(f"{NAME}_count") - page.value(f"{NAME}_bucket", le="0.25") == 1
        assert page.value(f"{NAME}_sum") >= 0.33
        assert page.value("pg_log_skipped_bytes_total") == 0
    for role, forbidden in (
        (PGVIGIL, "select pg_read_binary_file(pg_current_logfile())"),
        (BARE, "select pgvigil.logged_durations()"),
    ):
        with (
            psycopg.connect(logging.conninfo(**role.login)) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute(forbidden.encode())


@pytest.mark.parametrize("major", [16])
def test_a_server_without_a_log_file_gives_nothing_and_no_error(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major)
    server.execute(SCRIPT)
    assert [row["took"] for row in rows_of(server, QUERY)] == [None]
    assert server.errors_in_log() == []
