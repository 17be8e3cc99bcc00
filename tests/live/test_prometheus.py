"""Has real Prometheus servers scrape the exporter, and asks back what they stored."""

import os
import subprocess
import time
from collections.abc import Callable

import pytest

from lab import prometheus
from lab.cluster import PGVIGIL
from lab.exporter import Exporter
from lab.postgres import Server
from lab.prometheus import Prometheus

Start = Callable[..., Server]

SECONDS = 60 if os.environ.get("CI") else 15
"""How long Prometheus scrapes, once a second."""

SAME = {
    "pg_up": "select 1",
    "pg_in_recovery": "select 0",
    "pg_server_version_num": "select current_setting('server_version_num')::int",
    "pg_timeline_id": "select timeline_id from pg_control_checkpoint()",
    "pg_postmaster_start_timestamp_seconds": "select extract(epoch from "
    "pg_postmaster_start_time())",
    "pg_conf_load_timestamp_seconds": "select extract(epoch from pg_conf_load_time())",
    "pg_settings_max_connections": "select current_setting('max_connections')::int",
    "pg_database_connection_limit{datname='still'}": "select 9",
    'pg_server_info{role="primary"}': "select 1",
    "pg_stat_database_tup_inserted_total{datname='still'}": "select tup_inserted from "
    "pg_stat_database where datname = 'still'",
    "pg_stat_database_xact_rollback_total{datname='still'}": "select xact_rollback from "
    "pg_stat_database where datname = 'still'",
    "pg_stat_database_blks_read_total{datname='still'}": "select blks_read from "
    "pg_stat_database where datname = 'still'",
    "pg_stat_database_stats_reset_timestamp_seconds{datname='still'}": "select extract(epoch from "
    "stats_reset) from pg_stat_database where datname = 'still'",
    "pg_stat_archiver_failed_count_total": "select failed_count from pg_stat_archiver",
    "pg_locks_blocked_sessions": "select count(*) from pg_locks where not granted",
}
"""What Prometheus must give back, and the SQL that says the same of a server that rests."""


def required(found: prometheus.Installed | str | None, what: str) -> prometheus.Installed:
    if isinstance(found, prometheus.Installed):
        return found
    reason = f"{what} cannot be had: {found or 'it is not installed'}"
    if os.environ.get("CI") and found is None:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("which", ["installed", "newer"])
def test_prometheus_scrapes_for_a_minute_and_gives_back_what_sql_says(
    fresh_server: Start, which: str
) -> None:
    found = prometheus.installed() if which == "installed" else prometheus.newer()
    program = required(found, f"the {which} Prometheus")
    server = fresh_server(17, autovacuum="off")
    server.execute("create database still connection limit 9")
    server.execute("select pg_stat_reset(); create table t as select 1", database="still")
    jobs: list[dict[str, object]] = [{"job_name": "gzip"}]
    if program.version >= (3,):
        text, openmetrics = "PrometheusText0.0.4", "OpenMetricsText1.0.0"
        jobs = [
            {"job_name": f"{protocol}-{packed}", "scrape_protocols": [protocol],
             "enable_compression": packed}
            for protocol in (text, openmetrics)
            for packed in (True, False)
        ]  # fmt: skip
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
        static = [{"targets": [f"127.0.0.1:{exporter.port}"]}]
        with Prometheus(program, [{**job, "static_configs": static} for job in jobs]) as watcher:
            watcher.wait_until(f"count(up) == {len(jobs)}")
            time.sleep(SECONDS)

            assert [value for _, value in watcher.query("min_over_time(up[10m])")] == [1] * len(
                jobs
            )
            scrapes = watcher.query("count_over_time(up[10m])")
            assert min(value for _, value in scrapes) >= SECONDS * 0.8
            assert [target["lastError"] for target in watcher.targets()] == [""] * len(jobs)
            for name in (
                "scrapes_sample_duplicate_timestamp",
                "scrapes_sample_out_of_order",
                "scrapes_exceeded_sample_limit",
            ):
                # Prometheus does not scrape itself here; its log says the same in words.
                assert name not in watcher.log
            for word in ("Error on ingesting", "append failed", "strconv", "expected"):
                assert word not in watcher.log
            samples = watcher.query("scrape_samples_scraped")
            kept = watcher.query("scrape_samples_post_metric_relabeling")
            assert [v for _, v in samples] == [v for _, v in kept]
            assert min(v for _, v in samples) > 300

            for expression, query in SAME.items():
                (expected,) = server.execute(query)[0]
                values = [value for _, value in watcher.query(expression)]
                assert values == [pytest.approx(float(expected))] * len(jobs), expression


def test_promtool_has_no_complaint_about_the_page(fresh_server: Start) -> None:
    program = prometheus.installed()
    required(program, "promtool")
    server = fresh_server(18)
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login)}) as exporter:
        # What is read in the background comes later, histograms among it.
        end = time.monotonic() + 60
        while not (page := exporter.scrape()).series("pg_statement_executor_seconds_count"):
            assert time.monotonic() < end, page.body
            time.sleep(0.2)
        body = page.body
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=body, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
