"""Runs the commands as people do, against real servers."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.cluster import BARE, PGVIGIL, Cluster
from lab.exporter import Exporter
from lab.postgres import Server

Start = Callable[..., Server]


def pgvigil(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATA_SOURCE"))}
    return subprocess.run(
        [sys.executable, "-m", "pgvigil", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_printed_grants_make_a_role_that_is_enough_on_every_version(cluster: Cluster) -> None:
    server = cluster.primary
    printed = pgvigil("grants", "--role", "fresh Role").stdout
    server.execute(printed)
    server.execute("""alter role "fresh Role" password 'secret'""")
    try:
        limit = server.execute("select rolconnlimit from pg_roles where rolname = 'fresh Role'")
        assert limit == [(5,)]
        dsn = server.conninfo(user="fresh Role", password="secret")
        with Exporter(environment={"PGVIGIL_DSN": dsn}) as exporter:
            page = exporter.scrape()
        assert page.value("pg_up") == 1
        assert page.value("pgvigil_superuser") == 0
        assert page.failed() == set()
        refused = page.series("pgvigil_query_skipped")
        # Nothing that a privilege would give is missing.
        assert "privilege" not in {dict(key)["reason"] for key in refused}
    finally:
        server.execute('drop role "fresh Role"')


@pytest.mark.parametrize("major", [17, 18])
def test_a_trigger_that_writes_down_who_logs_in_keeps_the_printed_role_from_nothing(
    fresh_server: Start, major: int
) -> None:
    server = fresh_server(major)
    server.execute(
        "create table visits (role name); grant insert on visits to public;"
        "create function note() returns event_trigger language plpgsql as"
        " $$ begin insert into public.visits values (session_user); end $$;"
        "create event trigger note on login execute function note()"
    )
    server.execute(pgvigil("grants", "--role", "watcher").stdout)
    server.execute("alter role watcher password 'secret'")
    with Exporter(
        environment={"PGVIGIL_DSN": server.conninfo(user="watcher", password="secret")}
    ) as exporter:
        page = exporter.scrape()
    assert (page.reason, page.value("pg_up")) == (None, 1)
    assert server.errors_in_log() == []


@pytest.mark.parametrize("major", [13, 18])
def test_explain_shows_what_runs_on_a_server_and_what_does_not_and_why(cluster: Cluster) -> None:
    begin = cluster.standby.log_position()
    done = pgvigil("explain", PGVIGIL_DSN=cluster.standby.conninfo(**BARE.login))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"PostgreSQL {cluster.major}\.\d+, standby, as bare", done.stdout)
    assert "activity.sessions: privilege: bare lacks the privileges of pg_read_all" in done.stdout
    assert "-- availability.state: " in done.stdout
    assert re.search(r"every 300 s in each database, at most [\d.]+ s, \d+ rows", done.stdout)
    assert "metrics are missing from queries that run" in done.stdout
    assert "pg_catalog.pg_is_in_recovery()" in done.stdout
    assert cluster.standby.errors_in_log(begin) == []

    short = pgvigil("explain", "--no-sql", "--dsn", cluster.primary.conninfo(**PGVIGIL.login))
    assert short.returncode == 0
    assert "select" not in short.stdout
    assert "replication.wal_receiver: role: runs on a standby, this is a primary" in short.stdout


def test_what_explain_prints_runs_as_it_stands(fresh_server: Start) -> None:
    server = fresh_server(18)
    printed = pgvigil("explain", PGVIGIL_DSN=server.conninfo()).stdout
    server.execute(printed)


def test_explain_says_why_a_server_cannot_be_asked() -> None:
    done = pgvigil("explain", "--dsn", "host=127.0.0.1 port=1 user=somebody")
    assert done.returncode == 1
    assert "connection_refused" in done.stderr


def test_sigterm_lets_a_scrape_in_flight_end_and_exits_with_0(fresh_server: Start) -> None:
    server = fresh_server()
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
        exporter.scrape()
        server.pause()
        client = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=30)
        with contextlib.closing(client):
            headers = {"X-Prometheus-Scrape-Timeout-Seconds": "3"}
            client.request("GET", "/metrics", headers=headers)
            # The loop takes what comes in order: who is answered now came after the scrape.
            for _ in range(3):
                assert exporter.get("/livez").status == 200
            exporter.process.send_signal(signal.SIGTERM)
            response = client.getresponse()
            body = response.read().decode()
        server.resume()
        assert response.status == 200
        assert 'pg_down_reason{reason="timeout"} 1' in body
        assert exporter.process.wait(30) == 0
        assert "pgvigil ends" in exporter.log


def test_a_port_that_is_taken_is_told_and_ends_with_1() -> None:
    with Exporter(environment={"PGVIGIL_DSN": "host=127.0.0.1 port=1"}) as exporter:
        done = pgvigil("serve", "--listen", f"127.0.0.1:{exporter.port}")
    assert done.returncode == 1
    assert "Address already in use" in done.stderr


OWN = """
relations:
  why: Somebody wants to know.
  every: 5m
  scope: database
  max_series: 20
  labels: [relkind]
  sql: |
    select relkind::text as relkind, pg_catalog.count(*) as relations
    from pg_catalog.pg_class group by relkind
  metrics: {own_relations: {column: relations, type: gauge, help: Relations.}}
gone:
  why: Somebody wants to know.
  max_series: 1
  sql: select 1 as one from public.gone
  metrics: {own_gone: {column: one, type: gauge, help: One.}}
away:
  why: Somebody wants to know.
  on: standby
  max_series: 1
  sql: select 1 as one
  metrics: {own_away: {column: one, type: gauge, help: One.}}
"""


@pytest.mark.parametrize("major", [17])
def test_a_query_is_tried_with_its_rows_and_its_series(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text(OWN)
    own = ("--catalogue", str(tmp_path))
    dsn = cluster.primary.conninfo(**PGVIGIL.login)

    done = pgvigil(
        "query", "own.relations", *own, "--sql", "--database", "template1", PGVIGIL_DSN=dsn
    )
    (views,) = cluster.primary.execute("select count(*) from pg_class where relkind = 'v'")[0]
    assert done.returncode == 0, done.stderr
    assert "from pg_catalog.pg_class group by relkind" in done.stdout
    assert re.search(r"^relkind +relations$", done.stdout, re.M)
    assert 'own_relations{datname="template1",relkind="r"} ' in done.stdout
    assert re.search(r"^v +\d+$", done.stdout, re.M)
    assert views

    ours = pgvigil("query", "activity.processes", "--rows", "1", PGVIGIL_DSN=dsn)
    assert re.search(r"-- and \d+ more; --rows \d+ shows them", ours.stdout)


@pytest.mark.parametrize("major", [17])
@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("own.gone", 1, 'undefined_table: relation "public.gone" does not exist'),
        ("own.away", 1, "role: runs on a standby, this is a primary"),
        ("own.relation", 2, "did you mean own.relations?"),
    ],
)
def test_a_query_that_cannot_be_tried_says_why_and_where_it_stands(
    cluster: Cluster, tmp_path: Path, name: str, code: int, told: str
) -> None:
    (tmp_path / "own.yml").write_text(OWN)
    dsn = cluster.primary.conninfo(**PGVIGIL.login)
    done = pgvigil("query", name, "--catalogue", str(tmp_path), PGVIGIL_DSN=dsn)
    assert done.returncode == code
    assert told in done.stderr
    if code == 1:
        assert "own.yml:" in done.stderr
