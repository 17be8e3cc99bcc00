"""Runs the whole catalogue on every version and role of server, as every kind of user."""

import json
from pathlib import Path

import pytest
from pgvigil import catalogue

from lab.cluster import BARE, PGVIGIL, READER, Cluster
from lab.exporter import Exporter
from lab.postgres import Server

QUERIES = catalogue.load()
SUPERUSER = {"user": "postgres"}
WAYS = {
    "pgvigil": {**PGVIGIL.login, "sslmode": "prefer"},
    "plain": {**PGVIGIL.login, "sslmode": "disable"},
    "reader": READER.login,
    "bare": BARE.login,
    "superuser": SUPERUSER,
}


def configuration(directory: Path, server: Server) -> Path:
    """A file with one target for each way to connect."""
    targets = {
        name: {
            "connection": {"host": "127.0.0.1", "port": server.port, "dbname": "postgres", **way}
        }
        for name, way in WAYS.items()
    }
    if server.tls:
        targets["tls"] = {"connection": {**targets["pgvigil"]["connection"], "sslmode": "require"}}
    path = directory / "pgvigil.yml"
    path.write_text(json.dumps({"targets": targets}))  # JSON is YAML
    return path


@pytest.mark.parametrize("role", ["primary", "standby"])
def test_every_query_works_for_every_user_and_the_server_log_stays_clean(
    cluster: Cluster, role: str, tmp_path: Path
) -> None:
    server = cluster.primary if role == "primary" else cluster.standby
    path = configuration(tmp_path, server)
    begin = server.log_position()

    with Exporter("--config", str(path)) as exporter:
        for name in json.loads(path.read_text())["targets"]:
            exporter.scrape(name)
            page = exporter.scrape(name)

            assert page.value("pg_up") == 1, name
            assert page.failed() == set(), name
            assert page.series("pgvigil_query_failures_total") == {}, name
            assert page.series("pgvigil_query_dropped_samples_total") == {}, name

            promised = {m.name for q in QUERIES for m in q.metrics if m.fits(server.major)}
            exposed = {n for n in page.names if n.startswith("pg_")}
            assert exposed - promised == {"pg_up", "pg_down_reason"}, name
            refused = {dict(k)["query"] for k in page.series("pgvigil_query_skipped")}
            ran = {dict(k)["query"] for k in page.series("pgvigil_query_success")}
            assert refused | ran == {q.name for q in QUERIES}, name
            if name in ("pgvigil", "superuser"):
                wrong_role = {q.name for q in QUERIES if q.role not in ("any", role)}
                reasons = {
                    dict(k)["query"]: dict(k)["reason"]
                    for k in page.series("pgvigil_query_skipped")
                }
                kept = {q for q, r in reasons.items() if r not in ("role", "version")}
                assert kept == set(), reasons
                assert wrong_role <= refused

    assert server.errors_in_log(begin) == []


@pytest.mark.parametrize("major", [13, 18])
def test_a_page_parses_as_text_and_as_openmetrics_with_the_same_series(cluster: Cluster) -> None:
    with Exporter(
        environment={"PGVIGIL_DSN": cluster.primary.conninfo(**PGVIGIL.login)}
    ) as exporter:
        exporter.scrape()
        as_text = exporter.scrape()
        as_openmetrics = exporter.scrape(accept="application/openmetrics-text;version=1.0.0")

    # Counters with `_created` aside, the parsers name samples alike.
    assert as_text.names == as_openmetrics.names
    assert set(as_text.series("pg_stat_database_xact_commit_total")) == set(
        as_openmetrics.series("pg_stat_database_xact_commit_total")
    )


@pytest.mark.parametrize("major", [17])
def test_values_are_what_sql_says(cluster: Cluster) -> None:
    server = cluster.primary
    server.execute("create database counted connection limit 7")
    try:
        with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
            page = exporter.scrape()
            sql = {
                "pg_server_version_num": "select current_setting('server_version_num')::int",
                "pg_postmaster_start_timestamp_seconds": "select extract(epoch from "
                "pg_postmaster_start_time())",
            }
            for name, query in sql.items():
                (value,) = server.execute(query)[0]
                assert page.value(name) == float(value), name
            assert page.value("pg_in_recovery") == 0
    finally:
        server.execute("drop database counted")
