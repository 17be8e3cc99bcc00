"""Executor time is told as the server counted it, and what the counters never see beside it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from lab.catalogue import rows_of
from lab.cluster import BARE, PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

FreshServer = Callable[..., Server]

NAME = "pg_statement_executor_seconds"

OFF = "storage schema maintenance security replication extensions settings backup resources"


@contextmanager
def watched(server: Server, *words: str) -> Iterator[Exporter]:
    environment = {"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login), "PGVIGIL_DISABLE": OFF}
    with Exporter(*words, environment=environment) as exporter:
        yield exporter


def page_where(exporter: Exporter, holds: Callable[[Page], bool], seconds: float = 60) -> Page:
    """The first page of which something holds."""
    end = time.monotonic() + seconds
    while True:
        page = exporter.scrape()
        if holds(page):
            return page
        assert time.monotonic() < end, "\n".join(
            line for line in page.body.splitlines() if line.startswith("pg_stat")
        )
        time.sleep(0.2)


def count(page: Page, database: str = "app") -> float:
    found = page.series(f"{NAME}_count", datname=database)
    return sum(found.values()) if found else -1.0


def run(server: Server, times: list[float]) -> None:
    """Have BARE execute pg_sleep for so long each, in milliseconds."""
    with psycopg.connect(
        server.conninfo(dbname="app", **BARE.login), autocommit=True
    ) as connection:
        for each in times:
            connection.execute("select pg_sleep(%s)", [each / 1000], prepare=False)


@pytest.fixture
def app(fresh_server: FreshServer, major: int) -> Server:
    server = fresh_server(major)
    server.execute("create database app")
    return server


@pytest.mark.parametrize("major", [13, 14, 18])
def test_counts_and_sums_are_the_servers_own_and_the_truth_lies_between(app: Server) -> None:
    run(app, [1.0] * 5)
    with watched(app) as exporter:
        first = page_where(exporter, lambda page: count(page) >= 0)
        assert count(first) == 0  # what was before is history
        view = "select sum(calls), sum(total_exec_time) from pg_stat_statements where dbid = "
        view += "(select oid from pg_database where datname = 'app')"
        (before,) = app.execute(view)
        times = [2.0] * 60 + [130.0] * 6
        run(app, times)
        (after,) = app.execute(view)
        page = page_where(exporter, lambda page: count(page) >= after[0] - before[0])
        assert count(page) == after[0] - before[0] == len(times)
        assert page.value(f"{NAME}_sum", datname="app") == pytest.approx(
            (after[1] - before[1]) / 1000
        )
        at = {"datname": "app", "le": "0.1"}
        lower = page.value("pg_statement_executor_lower_seconds_bucket", **at)
        upper = page.value("pg_statement_executor_upper_seconds_bucket", **at)
        assert lower <= 60 <= upper
        assert lower <= page.value(f"{NAME}_bucket", **at) <= upper
        # Nothing of ours is in it.
        assert count(page, "postgres") <= 2
    assert app.errors_in_log() == []


@pytest.mark.parametrize("major", [18])
def test_an_extension_that_lags_behind_its_server_is_read_as_far_as_it_goes(app: Server) -> None:
    app.execute("drop extension pg_stat_statements")
    app.execute("create extension pg_stat_statements version '1.8'")
    with watched(app) as exporter:
        page_where(exporter, lambda page: count(page) == 0)
        run(app, [1.0] * 3)
        page = page_where(exporter, lambda page: count(page) > 0)
        assert count(page) == 3
    assert app.errors_in_log() == []


@pytest.mark.parametrize("major", [17])
def test_after_a_reset_counts_go_on_from_where_they_were(app: Server) -> None:
    with watched(app) as exporter:
        page_where(exporter, lambda page: count(page) == 0)
        run(app, [1.0] * 3)
        page_where(exporter, lambda page: count(page) == 3)
        app.execute("select pg_stat_statements_reset()")
        run(app, [1.0] * 4)
        assert count(page_where(exporter, lambda page: count(page) > 3)) == 7


@pytest.mark.parametrize("major", [13, 18])
def test_a_crash_is_a_start_for_it_ends_all_entries(app: Server) -> None:
    query = "queries.statement_latency"
    (before,) = {row["started"] for row in rows_of(app, query)}
    with psycopg.connect(app.conninfo()) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            victim.execute("select pg_sleep(10)")
    end = time.monotonic() + 30
    while True:
        try:
            app.execute("select 1")
        except psycopg.OperationalError:
            assert time.monotonic() < end
            time.sleep(0.1)
        else:
            break
    (after,) = {row["started"] for row in rows_of(app, query)}
    assert float(str(after)) > float(str(before))


@pytest.mark.parametrize("major", [18])
def test_a_stall_shows_in_what_runs_while_the_histogram_says_nothing(app: Server) -> None:
    app.execute("create table t (n int)", database="app")
    app.execute("grant all on t to bare", database="app")
    with watched(app) as exporter:
        page_where(exporter, lambda page: count(page) == 0)
        with psycopg.connect(app.conninfo(dbname="app")) as locker:
            locker.execute("lock table t")

            def wait() -> None:
                with psycopg.connect(app.conninfo(dbname="app", **BARE.login)) as connection:
                    connection.execute("select count(*) from t")

            stuck = [threading.Thread(target=wait) for _ in range(3)]
            for each in stuck:
                each.start()

            def shown(page: Page) -> bool:
                name = "pg_stat_activity_running_statements"
                return sum(page.series(name, datname="app", over="5.0").values()) == 3

            page = page_where(exporter, shown)
            assert count(page) == 0
            locker.rollback()
        for each in stuck:
            each.join()
        page = page_where(exporter, lambda page: not shown(page))
        assert page.value("pg_stat_activity_long_statements_total", datname="app", over="5.0") == 3


@pytest.mark.parametrize("major", [18])
def test_a_limit_of_ones_own_is_an_edge(app: Server, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text(
        "targets:\n  main:\n    latency_limits: [0.08]\n    connection:\n"
        f"      host: 127.0.0.1\n      port: {app.port}\n"
        "      dbname: postgres\n      user: postgres\n"
    )
    with Exporter("--config", str(path)) as exporter:
        page = page_where(exporter, lambda page: count(page) >= 0)
    assert page.value(f"{NAME}_bucket", datname="app", le="0.08") == 0


@pytest.mark.parametrize("spelled", [str.lower, str.upper])
def test_transaction_control_is_no_query_from_its_first_call_on(
    app: Server, spelled: Callable[[str], str]
) -> None:
    blocks = [("begin;", "commit"), ("start transaction", "rollback"), ("begin", "end")]
    if app.major < 16:  # from then on each option makes another queryid
        blocks += [("begin isolation level serializable", "abort"), ("begin read only", "commit")]
    if app.major > 16:  # until then each name did
        blocks += [("begin; savepoint a; rollback to a; release a", "commit")]
    with psycopg.connect(app.conninfo(dbname="app", **BARE.login), autocommit=True) as connection:
        for begin, end in blocks:
            for statement in (*begin.split("; "), "select 1", end):
                connection.execute(spelled(statement), prepare=False)
        connection.execute("select 2", prepare=False)  # else the last one is what a session shows
    entries = [row for row in rows_of(app, "queries.statement_latency") if row["datname"] == "app"]
    assert [row["calls"] for row in entries] == [len(blocks) + 1]


MONITOR = """
create table monitored (
  bucket bigint, bucket_start_time timestamptz, userid oid, dbid oid, datname text, query text,
  elevel integer, calls bigint, total_exec_time float8, resp_calls text[], bucket_done boolean);
create view pg_stat_monitor as select * from monitored;
grant select on pg_stat_monitor to public;
create function get_histogram_timings() returns text language sql as
  $$ select '{{0.000 - 1.000}, (1.000 - 80.000}, (80.000 - 120.000}, (120.000 - ...}}' $$;
"""


@pytest.mark.parametrize("major", [18])
def test_where_pg_stat_monitor_counts_calls_its_buckets_are_told(
    fresh_server: FreshServer, major: int
) -> None:
    """The extension cannot be had here: this is the part of its documented view that is read."""
    server = fresh_server(major)
    folder = server.directory / "more" / "extension"
    folder.mkdir(parents=True)
    (folder / "pg_stat_monitor.control").write_text("default_version = '2.1'\n")
    (folder / "pg_stat_monitor--2.1.sql").write_text(MONITOR)
    server.set({"extension_control_path": f"$system:{folder.parent}"})
    server.reload()
    for statement in ("create database app", "create extension pg_stat_monitor"):
        server.execute(statement)

    def bucket(minute: int, calls: str, *, query: str = "select $1", done: bool = True) -> None:
        # The same in two entries, of which the one is the superuser's.
        server.execute(
            f"insert into monitored select 0, '2026-01-01 00:{minute}', 10, oid, datname, "
            f"'{query}', 0, 1, 500, '{calls}', {done} from pg_database where datname = 'app'"
        )

    name = "queries.statement_latency"
    bucket(1, "{1,0,0,1}")
    assert [row["counts"] for row in rows_of(server, name) if row["datname"] == "app"] == [None]
    server.set({"pg_stat_monitor.pgsm_max": "256"})  # as the library sets it, once it is loaded
    server.reload()
    with watched(server) as exporter:
        page_where(exporter, lambda page: count(page) == 0)  # what was before is history
        bucket(2, "{1,2,4,3}")
        bucket(2, "{1,0,0,0}")
        bucket(2, "{9,0,0,0}", query="COMMIT")
        bucket(3, "{5,5,5,5}", done=False)
        page = page_where(exporter, lambda page: count(page) > 0)
        assert count(page) == 11
        assert page.value(f"{NAME}_sum", datname="app") == 1.0
        for le, within in (("0.001", 2), ("0.08", 4), ("0.12", 8)):
            assert page.value(f"{NAME}_bucket", datname="app", le=le) == within
    assert server.errors_in_log() == []
