"""Scrapes a server through a real PgBouncer, in session and in transaction mode."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
    if not pgbouncer.available():
        if os.environ.get("CI"):
            pytest.fail("PgBouncer is not installed")
        pytest.skip("PgBouncer is not installed")
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
    for page in pages:
        assert page.reason is None
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
