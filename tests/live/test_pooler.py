"""Scrapes a server through a real PgBouncer, in session and in transaction mode."""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pgvigil.plan import Wanted
from pgvigil.session import Session
from pgvigil.source import Answers, Ask, Rows
from pgvigil.target import Target

from lab import pgbouncer
from lab.cluster import Cluster
from lab.exporter import Exporter

OWN = """
guards:
  why: It reads the settings that protect the server.
  max_series: 20
  labels: [name, setting]
  sql: select name, setting, 1 as one from pg_catalog.pg_settings where name in
    ('search_path', 'statement_timeout', 'lock_timeout', 'transaction_read_only')
  metrics: {pg_own_guard: {column: one, type: gauge, help: One.}}
slow:
  why: It is slower than it may be.
  timeout: 100ms
  max_series: 1
  sql: select 1 as one from pg_catalog.pg_sleep(30)
  metrics: {pg_own_slow: {column: one, type: gauge, help: One.}}
"""


pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def installed() -> None:
    if not pgbouncer.available():
        if os.environ.get("CI"):
            pytest.fail("PgBouncer is not installed")
        pytest.skip("PgBouncer is not installed")


@pytest.mark.parametrize("major", [13, 18])
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("session", ""),
        ("transaction", ""),
        # PgBouncer then takes the settings and drops them.
        ("session", "ignore_startup_parameters = options, extra_float_digits"),
        ("transaction", "ignore_startup_parameters = options, extra_float_digits"),
    ],
)
def test_a_server_behind_a_pooler_is_scraped_under_the_same_guards(
    cluster: Cluster, mode: str, settings: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.yml"
    path.write_text(OWN)
    server = cluster.primary
    begin = server.log_position()
    with (
        pgbouncer.pooled(server, mode, settings) as port,
        Exporter(
            "--catalogue",
            str(path),
            environment={"PGVIGIL_DSN": f"host=127.0.0.1 port={port} user=pgvigil"},
        ) as exporter,
        # Other clients of the same pool, so that one pipeline meets several of its connections.
        ThreadPoolExecutor(2) as pool,
        Exporter(
            environment={"PGVIGIL_DSN": f"host=127.0.0.1 port={port} user=pgvigil"}
        ) as neighbour,
    ):
        neighbours = pool.map(lambda _: neighbour.scrape(), range(10))
        pages = [exporter.scrape() for _ in range(10)]
        pages += list(neighbours)
        log = exporter.log + neighbour.log
    for page in pages:
        assert page.reason is None, log
        assert page.value("pg_in_recovery") == 0
        assert page.failed() <= {"own.slow"}
    guards = {dict(k)["name"]: dict(k)["setting"] for k in pages[9].series("pg_own_guard")}
    assert guards == {
        "search_path": "pg_catalog",
        "statement_timeout": "1000",
        "lock_timeout": "250",
        "transaction_read_only": "on",
    }
    # The slow one is cut short by the server, each time, and nothing else is said in its log.
    assert {"canceling statement due to statement timeout" in line
            for line in server.errors_in_log(begin)} == {True}  # fmt: skip
    # What was set for us must not stay behind for whoever gets the connection next.
    left = server.execute("select count(*) from pg_stat_activity where state like 'idle in%'")
    assert left == [(0,)]


@pytest.mark.parametrize("major", [18])
def test_no_planted_operator_runs_though_a_pooler_drops_the_guards(cluster: Cluster) -> None:
    server = cluster.primary
    server.execute(
        "create schema trap; grant usage on schema trap to public;"
        "create function trap.same(oid, oid) returns bool language plpgsql as"
        " $$ begin raise log 'planted'; return false; end $$;"
        "create operator trap.= (leftarg = oid, rightarg = oid, function = trap.same);"
        "alter role pgvigil set search_path = trap, pg_catalog"
    )
    begin = server.log_position()
    try:
        with (
            pgbouncer.pooled(server, "session", "ignore_startup_parameters = options") as port,
            Exporter(
                environment={"PGVIGIL_DSN": f"host=127.0.0.1 port={port} user=pgvigil"}
            ) as exporter,
        ):
            assert exporter.scrape().value("pg_up") == 1
        assert "planted" not in server.log(begin)
    finally:
        server.execute("alter role pgvigil reset search_path; drop schema trap cascade")


@pytest.mark.parametrize("major", [18])
def test_the_background_works_through_a_pooler_in_the_connected_database_alone(
    cluster: Cluster,
) -> None:
    server = cluster.primary
    server.execute("create database beside")
    begin = server.log_position()
    try:
        with (
            pgbouncer.pooled(server, "transaction") as port,
            Exporter(
                environment={"PGVIGIL_DSN": f"host=127.0.0.1 port={port} user=pgvigil"}
            ) as exporter,
        ):
            end = time.monotonic() + 30
            page = exporter.scrape()
            # A visit is over a moment after its first results are there.
            awaited = ("pg_schema_objects", "pg_database_size_bytes", "pgvigil_database_up")
            while not all(map(page.series, awaited)):
                assert time.monotonic() < end, exporter.log
                time.sleep(0.2)
                page = exporter.scrape()
            assert page.failed() == set(), exporter.log
            visited = page.series("pgvigil_database_up")
            assert {dict(labels)["datname"] for labels in visited} == {"postgres"}
            assert server.errors_in_log(begin) == []
    finally:
        server.execute("drop database beside")


async def ask_again_and_again(port: int, name: str, rounds: int) -> None:
    """Ask what tells us apart from everybody else; fail when an answer is not to our question."""
    loop = asyncio.get_running_loop()
    connection = {"host": "127.0.0.1", "port": str(port), "user": "pgvigil", "dbname": "postgres"}
    session = await Session.open(Target(name, connection), Wanted((), (), ()), loop.time() + 10)
    # Of many lengths, so that packets end anywhere in a message.
    asks = [Ask(f"select '{name} {n}', repeat('x', {n * 50})", 1.0) for n in range(30)]
    for _ in range(rounds):
        answers: dict[int, bytes | None] = {}
        failures: list[object] = []

        def rows(position: int, result: Rows, into: dict[int, bytes | None] = answers) -> None:
            if result.ntuples:
                into[position] = result.get_value(0, 0)

        def end(_: int, failure: object, __: float, into: list[object] = failures) -> None:
            into.append(failure)

        await session.ask(asks, Answers(rows, end), loop.time() + 10)
        assert failures == [None] * len(asks)
        assert answers == {n: f"{name} {n}".encode() for n in range(30)}
    session.close()


@pytest.mark.parametrize("major", [18])
def test_answers_are_never_mixed_up_in_a_pool_that_many_share(cluster: Cluster) -> None:
    async def crowd(port: int) -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abcd":
                group.create_task(ask_again_and_again(port, name, 150))

    with pgbouncer.pooled(cluster.primary, "transaction") as port:
        asyncio.run(crowd(port))
