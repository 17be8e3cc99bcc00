"""Scrapes real servers while clients crowd, queries fail, facts change and readers hang up."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest

from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter
from lab.postgres import Server

Start = Callable[..., Server]

ODD_QUERIES = """
fine_before:
  why: It stands before the odd ones.
  max_series: 1
  sql: select 1 as one
  metrics: {pg_odd_before: {column: one, type: gauge, help: One.}}
fails:
  why: It divides by zero.
  max_series: 1
  sql: select 1 / (random() * 0)::int as one
  metrics: {pg_odd_fails: {column: one, type: gauge, help: One.}}
sleeps:
  why: It sleeps longer than it may.
  timeout: 200ms
  max_series: 1
  sql: select 1 as one from pg_catalog.pg_sleep(60)
  metrics: {pg_odd_sleeps: {column: one, type: gauge, help: One.}}
forbidden:
  why: It reads what it may not.
  max_series: 1
  sql: select count(*) as one from pg_catalog.pg_authid
  metrics: {pg_odd_forbidden: {column: one, type: gauge, help: One.}}
missing:
  why: It reads what is not there.
  max_series: 1
  sql: select one from nowhere.nothing
  metrics: {pg_odd_missing: {column: one, type: gauge, help: One.}}
not_sql:
  why: It is no SQL.
  max_series: 1
  sql: select one from where
  metrics: {pg_odd_not_sql: {column: one, type: gauge, help: One.}}
writes:
  why: It tries to write.
  max_series: 1
  sql: select setval(c.oid::regclass, 1) as one from pg_class as c where c.relname = 'counting'
  metrics: {pg_odd_writes: {column: one, type: gauge, help: One.}}
fails_late:
  why: It fails after many rows.
  max_series: 100000
  labels: [n]
  sql: select n, 1 / (3500 - n) as one from generate_series(1, 5000) as n
  metrics: {pg_odd_fails_late: {column: one, type: gauge, help: One.}}
text:
  why: It gives no number.
  max_series: 3
  labels: [n]
  sql: "select * from (values (1, '12'), (2, 'many'), (3, null)) as v (n, one)"
  metrics: {pg_odd_text: {column: one, type: gauge, help: One.}}
doubled:
  why: It gives the same labels twice.
  max_series: 10
  labels: [name]
  sql: select 'same' as name, n as one from generate_series(1, 3) as n
  metrics: {pg_odd_doubled: {column: one, type: gauge, help: One.}}
endless:
  why: It gives more rows than anybody wants.
  max_series: 10
  labels: [n]
  sql: select generate_series(1, 2000000000) as n, 1 as one
  metrics: {pg_odd_endless: {column: one, type: gauge, help: One.}}
hostile:
  why: Its labels hold what the format gives a meaning.
  max_series: 10
  labels: [name]
  sql: select E'a"b\\\\c\\nd%s\\u00e9' as name, true as one
  metrics: {pg_odd_hostile: {column: one, type: gauge, help: 'A "quoted" \\ help.'}}
fine_after:
  why: It stands behind the odd ones.
  max_series: 1
  sql: select 'Infinity'::float8 as one
  metrics: {pg_odd_after: {column: one, type: gauge, help: One.}}
"""


@pytest.fixture
def odd_queries(tmp_path: Path) -> Path:
    path = tmp_path / "odd.yml"
    path.write_text(ODD_QUERIES)
    return path


@pytest.mark.parametrize("major", [13, 18])
def test_what_goes_wrong_in_one_query_leaves_all_others_standing(
    cluster: Cluster, odd_queries: Path
) -> None:
    server = cluster.primary
    server.execute("create sequence public.counting")
    server.execute("grant all on sequence public.counting to pgvigil")
    begin = server.log_position()
    try:
        dsn = server.conninfo(**PGVIGIL.login)
        with Exporter(
            "--catalogue", str(odd_queries), environment={"PGVIGIL_DSN": dsn}
        ) as exporter:
            pages = [exporter.scrape()]
            # Nor does a new connection, which finds the same facts, wake what rests.
            server.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'pgvigil'"
            )
            pages.append(exporter.scrape())
            openmetrics = exporter.scrape(accept="application/openmetrics-text;version=1.0.0")
    finally:
        server.execute("drop sequence public.counting")

    for page in (*pages, openmetrics):
        assert page.value("pg_up") == 1
        assert page.value("pg_odd_before") == 1
        assert page.value("pg_odd_after") == float("inf")
        assert page.series("pg_odd_fails_late") == {}
        assert page.value("pg_odd_text") == 12
        assert page.value("pg_odd_doubled") == 1
        assert len(page.series("pg_odd_endless")) == 10
        assert page.value("pg_odd_hostile", name='a"b\\c\nd%sé') == 1
        failed = {name.partition(".")[2] for name in page.failed()}
        assert failed == {
            *("fails", "sleeps", "forbidden", "missing", "not_sql", "writes", "fails_late")
        }

    reasons = {
        dict(key)["query"].partition(".")[2]: dict(key)["reason"]
        for key in pages[0].series("pgvigil_query_failures_total")
    }
    assert reasons == {
        "fails": "division_by_zero",
        "sleeps": "query_canceled",
        "forbidden": "insufficient_privilege",
        "missing": "undefined_table",
        "not_sql": "syntax_error",
        "writes": "read_only_sql_transaction",
        "fails_late": "division_by_zero",
    }
    dropped = {
        (dict(key)["query"].partition(".")[2], dict(key)["reason"]): value
        for key, value in pages[0].series("pgvigil_query_dropped_samples_total").items()
    }
    assert dropped == {
        ("text", "not_a_number"): 1,
        ("doubled", "duplicate"): 2,
        ("endless", "max_series"): 1,
    }
    assert pages[1].value("pgvigil_connects_total") == 2
    # What cannot work here is sent once, then rests; the server's log stays quiet about it.
    errors = server.errors_in_log(begin)
    for word in ("pg_authid", "nowhere", "syntax error"):
        assert sum(word in line for line in errors) == 1, word
    resting = {
        dict(key)["query"].partition(".")[2]: dict(key)["reason"]
        for key in pages[1].series("pgvigil_query_skipped")
        if dict(key)["query"].startswith("odd.")
    }
    assert resting == {
        "forbidden": "insufficient_privilege",
        "missing": "undefined_table",
        "not_sql": "syntax_error",
    }


@contextlib.contextmanager
def counted_connections(server: Server) -> Iterator[list[int]]:
    """How many connections our role has, seen again and again from the server's side."""
    seen: list[int] = []
    stop = Event()

    def count() -> None:
        query = "select count(*) from pg_stat_activity where usename = 'pgvigil'"
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            while not stop.is_set():
                row = connection.execute(query).fetchone()
                assert row
                seen.append(row[0])

    thread = Thread(target=count)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_fifty_scrapers_of_whom_some_hang_up_use_two_connections_at_most(
    fresh_server: Start,
) -> None:
    server = fresh_server()

    def scrape(number: int) -> int:
        served = 0
        for _ in range(6):
            if number % 4 == 0:  # hangs up without waiting for the answer
                with socket.create_connection(("127.0.0.1", exporter.port)) as client:
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            else:
                assert exporter.scrape().value("pg_up") == 1
                served += 1
        return served

    dsn = server.conninfo(**PGVIGIL.login)
    with (
        Exporter(environment={"PGVIGIL_DSN": dsn}) as exporter,
        counted_connections(server) as seen,
        ThreadPoolExecutor(50) as pool,
    ):
        assert sum(pool.map(scrape, range(50))) == 37 * 6
        page = exporter.scrape()
    assert max(seen) <= 2
    assert page.value("pgvigil_connections") <= 2  # one for scrapes, one for the background
    assert page.value("pgvigil_connects_total") == 1
    # Who came while a scrape ran has joined it.
    assert page.value("pgvigil_scrapes_total") < 50 * 6


def test_scrapers_of_a_server_that_stands_still_add_no_connection(fresh_server: Start) -> None:
    server = fresh_server()
    dsn = server.conninfo(**PGVIGIL.login)
    with (
        Exporter(environment={"PGVIGIL_DSN": dsn}) as exporter,
        ThreadPoolExecutor(20) as pool,
    ):
        exporter.scrape()
        server.pause()
        for _ in range(2):
            pages = list(pool.map(lambda _: exporter.scrape(timeout=1), range(20)))
            assert {page.reason for page in pages} == {"timeout"}
        server.resume()
        assert exporter.scrape().value("pg_up") == 1
        query = "select count(*) from pg_stat_activity where usename = 'pgvigil'"
        server.wait_until(f"select ({query}) <= 2")  # one for scrapes, one for the background


@pytest.mark.parametrize("major", [13, 18])
def test_a_promoted_standby_is_a_primary_within_the_same_scrape(
    fresh_server: Start, major: int
) -> None:
    standby = fresh_server(major).standby()
    with Exporter(environment={"PGVIGIL_DSN": standby.conninfo(**PGVIGIL.login)}) as exporter:
        before = exporter.scrape()
        assert before.value("pg_in_recovery") == 1
        assert before.value("pg_server_info", role="standby") == 1
        begin = standby.log_position()
        standby.promote()
        page = exporter.scrape()
    assert page.value("pg_in_recovery") == 0
    assert page.value("pg_server_info", role="primary") == 1
    assert page.value("pg_timeline_id") == 2
    assert page.failed() == set()
    assert page.value("pgvigil_connects_total") == 1
    assert [line for line in standby.errors_in_log(begin) if "pgvigil" in line] == []


STANDS_ASIDE = """
create function public.stands_aside() returns bool language plpgsql as $$
declare
  asked int := 1 + count(*) from pg_locks where locktype = 'advisory';
begin
  -- A session keeps such a lock though its transaction, which may not write, fails.
  perform pg_try_advisory_lock(asked);
  if asked = any({times}) then
    raise 'canceling statement due to conflict with recovery' using errcode = '40001';
  end if;
  return true;
end $$;
set allow_system_table_mods = on;
"""
"""Has the view that the facts read fail as what stands in the way of replay does."""


def _cancel_facts(server: Server, times: Sequence[int]) -> None:
    """The facts fail when they are asked for the n-th time, by `times`."""
    ((definition,),) = server.execute("select pg_get_viewdef('pg_catalog.pg_roles')")
    view = f"create or replace view pg_catalog.pg_roles as {definition.rstrip(';')}"
    server.execute(
        STANDS_ASIDE.format(times=f"array{list(times)}")
        + f"{view} where (select public.stands_aside())"
    )


@pytest.mark.parametrize("times", [[1], [1, 2, 3], [2], [3]])
def test_facts_that_a_standby_cancels_cost_neither_the_scrape_nor_the_connection(
    fresh_server: Start, times: Sequence[int]
) -> None:
    server = fresh_server()
    _cancel_facts(server, times)
    begin = server.log_position()
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
        pages = [exporter.scrape() for _ in range(3)]
        assert {page.value("pg_up") for page in pages} == {1}
        assert pages[-1].value("pgvigil_connects_total") == 1
        assert {page.value("pg_server_info", role="primary") for page in pages} == {1}
    errors = server.errors_in_log(begin)
    assert len(errors) == len(times)
    assert all("conflict with recovery" in line for line in errors)


def test_a_server_whose_facts_are_cancelled_each_time_is_down_by_name(fresh_server: Start) -> None:
    server = fresh_server()
    _cancel_facts(server, range(1, 50))
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
        page = exporter.scrape()
        assert page.value("pg_up") == 0
        assert page.reason == "other"
        assert "what the server replays has cancelled" in exporter.log
    # Four times, and no more.
    assert len(server.errors_in_log()) == 4


def test_a_new_extension_is_seen_at_the_next_scrape(fresh_server: Start, tmp_path: Path) -> None:
    server = fresh_server()
    path = tmp_path / "own.yml"
    path.write_text(
        "crypto:\n"
        "  why: It needs an extension in a schema of its own.\n"
        "  needs: {extension: {pgcrypto: '1.0'}}\n"
        "  max_series: 1\n"
        "  sql: 'select length({pgcrypto}.gen_salt(''md5'')) as length'\n"
        "  metrics: {pg_own_salt: {column: length, type: gauge, help: A length.}}\n"
    )
    dsn = server.conninfo(**PGVIGIL.login)
    with Exporter("--catalogue", str(path), environment={"PGVIGIL_DSN": dsn}) as exporter:
        page = exporter.scrape()
        assert page.value("pgvigil_query_skipped", query="own.crypto", reason="extension") == 1
        server.execute('create schema "Odd Place"; create extension pgcrypto schema "Odd Place"')
        page = exporter.scrape()  # it is there, and we may not use its schema
        assert page.value("pgvigil_query_skipped", query="own.crypto", reason="extension") == 1
        assert server.errors_in_log() == []
        server.execute('grant usage on schema "Odd Place" to public')
        assert exporter.scrape().value("pg_own_salt") == 11
        server.execute("drop extension pgcrypto")
        page = exporter.scrape()
        assert page.value("pgvigil_query_skipped", query="own.crypto", reason="extension") == 1
    # The scrape that finds the extension gone has asked for it in the same breath.
    assert len(server.errors_in_log()) == 1


def test_guards_hold_whatever_was_set_for_the_role(fresh_server: Start, tmp_path: Path) -> None:
    server = fresh_server()
    for name, value in {
        "search_path": "public",
        "statement_timeout": "'1h'",
        "lock_timeout": "'1h'",
        "default_transaction_read_only": "off",
        "extra_float_digits": "-10",
        "datestyle": "'German'",
        "idle_session_timeout": "'500ms'",
        "transaction_timeout": "'1h'",
    }.items():
        server.execute(f"alter role pgvigil set {name} = {value}")
    server.execute("create function public.count(int) returns int language sql as 'select 666'")
    path = tmp_path / "own.yml"
    path.write_text(
        "guards:\n"
        "  why: It reads the settings that protect the server.\n"
        "  max_series: 20\n"
        "  labels: [name, setting]\n"
        "  sql: select name, setting, 1 as one from pg_catalog.pg_settings where name in\n"
        "    ('search_path', 'statement_timeout', 'lock_timeout', 'transaction_read_only', 'jit',\n"
        "     'idle_in_transaction_session_timeout', 'max_parallel_workers_per_gather',\n"
        "     'application_name', 'client_encoding', 'TimeZone', 'extra_float_digits',\n"
        "     'idle_session_timeout', 'transaction_timeout')\n"
        "  metrics: {pg_own_guard: {column: one, type: gauge, help: One.}}\n"
    )
    dsn = server.conninfo(**PGVIGIL.login)
    with Exporter("--catalogue", str(path), environment={"PGVIGIL_DSN": dsn}) as exporter:
        exporter.scrape()
        time.sleep(1.2)
        page = exporter.scrape()
    # Nobody ended the session while it was idle.
    assert server.errors_in_log() == []
    settings = {dict(k)["name"]: dict(k)["setting"] for k in page.series("pg_own_guard")}
    assert settings == {
        "search_path": "pg_catalog",
        "statement_timeout": "1000",
        "lock_timeout": "250",
        "idle_in_transaction_session_timeout": "5000",
        "transaction_read_only": "on",
        "jit": "off",
        "max_parallel_workers_per_gather": "0",
        "application_name": "pgvigil",
        "client_encoding": "UTF8",
        "TimeZone": "UTC",
        "extra_float_digits": "1",
        "idle_session_timeout": "0",
        "transaction_timeout": "0",
    }


TRAP = """
create schema trap;
grant usage on schema trap to public;
create function trap.same(oid, oid) returns bool language plpgsql as
  $$ begin raise log 'planted'; return false; end $$;
create function trap.same(name, text) returns bool language plpgsql as
  $$ begin raise log 'planted'; return false; end $$;
create function trap.same(text, text) returns bool language plpgsql as
  $$ begin raise log 'planted'; return false; end $$;
create operator trap.= (leftarg = oid, rightarg = oid, function = trap.same);
create operator trap.= (leftarg = name, rightarg = text, function = trap.same);
create operator trap.= (leftarg = text, rightarg = text, function = trap.same);
"""
"""Operators that would be taken for the system's own by who lets them lead the search_path."""

AT_LOGIN = """
create function public.undo() returns event_trigger language plpgsql as $$ begin
  if session_user = 'pgvigil' then
    perform pg_catalog.set_config('search_path', 'trap, pg_catalog', false);
    perform pg_catalog.set_config('default_transaction_read_only', 'off', false);
  end if;
end $$;
create event trigger undo on login execute function public.undo();
"""


@pytest.mark.parametrize("major", [17, 18])
def test_a_trigger_at_login_undoes_no_guard_and_hides_no_database(
    fresh_server: Start, major: int
) -> None:
    server = fresh_server(major=major)
    server.execute("create database other")
    for database in ("postgres", "other"):
        server.execute(TRAP, database=database)
        server.execute(AT_LOGIN, database=database)
    dsn = server.conninfo(**PGVIGIL.login)
    with Exporter(environment={"PGVIGIL_DSN": dsn}) as exporter:
        end = time.monotonic() + 30
        page = exporter.scrape()
        # Behind a pooler it would be left out: there others get our settings.
        while not page.series("pg_schema_objects", datname="other"):
            assert time.monotonic() < end, exporter.log
            time.sleep(0.2)
            page = exporter.scrape()
    assert page.failed() == set()
    assert "planted" not in server.log()


def test_several_targets_have_a_page_each(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    servers = {"first": cluster.primary, "second": cluster.standby}
    targets = {
        name: {
            "dsn": server.conninfo(**PGVIGIL.login),
            "labels": {"cluster": 'with "quotes" and 100 %'},
        }
        for name, server in servers.items()
    }
    targets["away"] = {"dsn": "host=127.0.0.1 port=1", "labels": {}}
    path.write_text(json.dumps({"targets": targets}))
    with Exporter("--config", str(path)) as exporter:
        assert exporter.get("/probe?target=nobody").status == 404
        assert b"first, second, away" in exporter.get("/probe").body
        cluster_label = 'with "quotes" and 100 %'
        first, second = exporter.scrape("first"), exporter.scrape("second")
        assert first.value("pg_in_recovery", cluster=cluster_label) == 0
        assert second.value("pg_in_recovery", cluster=cluster_label) == 1
        assert exporter.scrape("away").reason == "connection_refused"
        overview = exporter.scrape()
        up = {dict(k)["target"]: v for k, v in overview.series("pgvigil_target_up").items()}
        assert up == {"first": 1, "second": 1, "away": 0}
        assert exporter.get("/primary?target=first").status == 200
        assert exporter.get("/primary?target=second").status == 503
        assert exporter.get("/replica?target=second").status == 200
        assert exporter.get("/replica?target=away").status == 503
        groups = json.loads(exporter.get("/sd").body)
        assert [group["labels"]["__param_target"] for group in groups] == list(targets)
        page = exporter.get("/").body.decode()
        for word in ("first", "second", "connection_refused", "standby", "queries run here"):
            assert word in page
