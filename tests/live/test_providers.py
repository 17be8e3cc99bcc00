"""Recognises managed services by what they leave in a server, and calls nothing that raises."""

import time
from collections.abc import Callable

import pytest
from pgvigil.plan import RAISES

from lab.cluster import PGVIGIL
from lab.exporter import Exporter
from lab.postgres import Server

FreshServer = Callable[..., Server]

OWN = {
    "rdsadmin": "Amazon RDS",
    "cloudsqladmin": "Google Cloud SQL",
    "alloydbadmin": "Google AlloyDB",
    "azure_maintenance": "Azure",
}


def skipped(exporter: Exporter, name: str) -> dict[str, str]:
    """The queries or metrics that are skipped, with the reason."""
    kind = name.removeprefix("pgvigil_").removesuffix("_skipped")
    series = exporter.scrape().series(name)
    return {dict(labels)[kind]: dict(labels)["reason"] for labels in series}


@pytest.mark.parametrize("major", [16])
@pytest.mark.parametrize(("name", "provider"), OWN.items())
def test_a_services_own_database_is_neither_entered_nor_measured(
    server: Server, name: str, provider: str
) -> None:
    server.execute(f"create database {name}")
    try:
        server.execute(f"revoke connect on database {name} from public")
        begin = server.log_position()
        with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
            end = time.monotonic() + 30
            while not (sizes := exporter.scrape().series("pg_database_size_bytes")):
                assert time.monotonic() < end
                time.sleep(0.1)
            assert name not in {dict(labels)["datname"] for labels in sizes}
            while provider.encode() not in exporter.get("/").body:
                assert time.monotonic() < end
                time.sleep(0.1)
            page = exporter.scrape()
            assert page.failed() == set()
            assert not page.series("pgvigil_database_up", datname=name)
            assert server.errors_in_log(begin) == []
    finally:
        server.execute(f"drop database {name}")


def raising(server: Server) -> None:
    """Make the functions that Aurora has and that raise there raise here."""
    server.execute(
        "create function pg_catalog.aurora_version() returns text language sql as $$ select '1' $$"
    )
    found = server.execute(
        """select p.oid::regprocedure::text, pg_get_function_result(p.oid),
          pg_get_function_arguments(p.oid)
        from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace
        where n.nspname = 'pg_catalog' and p.proname = any(%s)""",
        [list(RAISES["aurora"])],
    )
    assert len(found) >= 10
    for signature, result, arguments in found:
        name = signature.partition("(")[0]
        server.execute(
            f"create or replace function pg_catalog.{name}({arguments}) returns {result} "
            "language plpgsql as $$ begin raise feature_not_supported; end $$"
        )


@pytest.mark.parametrize("major", [13, 17])
def test_what_raises_on_aurora_is_not_called_and_costs_only_its_own_metrics(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major)
    raising(server)
    begin = server.log_position()
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
        exporter.scrape()
        page = exporter.scrape()
        assert page.failed() == set()
        for name in (
            "pg_in_recovery",
            "pg_connections_used",
            "pg_stat_archiver_failed_count_total",
        ):
            assert page.series(name), name
        lost = skipped(exporter, "pgvigil_metric_skipped")
        assert lost["pg_archiving_unarchived_bytes"] == "provider"
        assert skipped(exporter, "pgvigil_query_skipped")["backup.archive_status"] == "provider"
        assert b"pg_ls_archive_statusdir raises an error on aurora" in exporter.get("/").body
    assert server.errors_in_log(begin) == []
