"""Runs the whole catalogue on every version and role of server, as every kind of user."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pgvigil import catalogue, grants
from pgvigil.computed import KINDS
from pgvigil.plan import concerning

from lab.binaries import UnavailableError
from lab.catalogue import Outcome, asking
from lab.cluster import BARE, PGVIGIL, READER, Cluster, Role
from lab.exporter import Exporter, Page
from lab.hostile import populate, run, temporary_tables
from lab.postgres import MAJORS, Server

QUERIES = concerning(catalogue.load(), "postgresql")
WAYS: dict[str, tuple[Role | None, str]] = {
    "pgvigil": (PGVIGIL, "prefer"),
    "plain": (PGVIGIL, "disable"),
    "reader": (READER, "prefer"),
    "bare": (BARE, "prefer"),
    "superuser": (None, "prefer"),
}
"""Each a role, None for the superuser, and whether it comes over TLS."""

FEWER = {"plain": 1, "reader": 2, "bare": 2}
"""How many databases are enough for those to whom the rest would be the same again."""

EXPECTED_REASONS = {"role", "version", "disabled", "extension", "setting", "function"}
"""Why a role with pg_monitor may miss a query; never for want of another role's privileges."""

GRANTED = {
    q.name
    for q in QUERIES
    for n in q.all_needs
    if any(f.startswith("pgvigil.") for f in n.function)
}
"""Queries that need what `pgvigil grants` makes in some databases, and so a superuser as well."""


class Hostile(NamedTuple):
    """A primary and a standby with the worst in them, and the names of their databases."""

    cluster: Cluster
    databases: list[str]


TESTED = tuple(map(int, os.environ.get("PGVIGIL_TEST_MAJORS", "").split())) or MAJORS
"""`make next` names a version that is not promised yet."""


@pytest.fixture(scope="module", params=TESTED)
def hostile(request: pytest.FixtureRequest) -> Iterator[Hostile]:
    """One of each major version."""
    try:
        cluster = Cluster.start(request.param)
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        made = populate(cluster.primary)
        # Some databases have what `pgvigil grants` makes, the others not.
        for database in ("postgres", made[0]):
            run(
                cluster.primary,
                database,
                grants.script(PGVIGIL.name, grants.PARTS, create=False).encode(),
            )
        with temporary_tables(cluster.primary):
            ((position,),) = cluster.primary.execute("select pg_current_wal_lsn()::text")
            cluster.standby.wait_until(f"select pg_last_wal_replay_lsn() >= '{position}'")
            yield Hostile(cluster, ["postgres", *made])
    finally:
        cluster.destroy()


def configuration(directory: Path, server: Server) -> Path:
    """A file with one target for each way to connect."""
    targets = {
        name: {
            "connection": {
                "host": "127.0.0.1",
                "port": server.port,
                "dbname": "postgres",
                "sslmode": sslmode,
                **(role.login if role else {"user": "postgres"}),
            }
        }
        for name, (role, sslmode) in WAYS.items()
        if name != "plain"  # the same role again, and it has but so many connections
    }
    path = directory / "pgvigil.yml"
    path.write_text(json.dumps({"targets": targets}))  # JSON is YAML
    return path


@pytest.mark.parametrize("role", ["primary", "standby"])
def test_every_scrape_works_for_every_user_and_the_server_log_stays_clean(
    hostile: Hostile, role: str, tmp_path: Path
) -> None:
    server: Server = getattr(hostile.cluster, role)
    path = configuration(tmp_path, server)
    begin = server.log_position()

    with Exporter("--config", str(path)) as exporter:
        names = list(json.loads(path.read_text())["targets"])
        for name in names:
            exporter.scrape(name)
        # The background takes its time, so only the oldest and the newest version wait for it.
        ends = server.major not in MAJORS[1:-1]
        pages = {n: settled(exporter, n) if ends else exporter.scrape(n) for n in names}
        errors = server.errors_in_log(begin)

    for name, page in pages.items():
        assert page.value("pg_up") == 1, name
        assert page.failed() == set(), name
        assert page.series("pgvigil_query_failures_total") == {}, name
        assert page.series("pgvigil_query_dropped_samples_total") == {}, name

        promised = {
            name for q in QUERIES for m in q.metrics if m.fits(server.major) for name in samples(m)
        }
        exposed = {n for n in page.names if n.startswith("pg_")}
        assert exposed - promised == {"pg_up", "pg_down_reason"}, name
        refused = skipped(page)
        if name in ("pgvigil", "superuser"):
            odd = {q: r for q, r in refused.items() if r not in EXPECTED_REASONS}
            assert odd == {}, name
            if name == "superuser":
                assert {q for q, r in refused.items() if r == "function"} <= GRANTED
            assert {q.name for q in QUERIES if q.role not in ("any", role)} <= set(refused)
    assert errors == []


def samples(metric: catalogue.Metric) -> Iterator[str]:
    """The names under which a metric's samples stand."""
    if metric.type != "histogram":
        yield metric.name
        return
    for suffix in ("bucket", "sum", "count"):
        yield f"{metric.name}_{suffix}"


def skipped(page: Page) -> dict[str, str]:
    """The reasons by query."""
    return {dict(k)["query"]: dict(k)["reason"] for k in page.series("pgvigil_query_skipped")}


def settled(exporter: Exporter, name: str) -> Page:
    """A target's page after every query has run or was refused, in the background as well."""
    missing = set[str]()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        page = exporter.scrape(name)
        ran = {dict(k)["query"] for k in page.series("pgvigil_query_success")}
        missing = {q.name for q in QUERIES} - ran - skipped(page).keys()
        if not missing:
            return page
        time.sleep(0.2)
    raise AssertionError(f"{name} never ran {sorted(missing)}")


@pytest.mark.parametrize("role", ["primary", "standby"])
def test_every_query_works_in_every_database_for_every_user(hostile: Hostile, role: str) -> None:
    server: Server = getattr(hostile.cluster, role)
    begin = server.log_position()
    wrong: dict[str, list[str]] = {}
    ran: set[str] = set()

    for way, (user, sslmode) in WAYS.items():
        for database in hostile.databases[: FEWER.get(way)]:
            with asking(server, dbname=database, role=user, sslmode=sslmode) as asker:
                for name, outcome in asker.ask().items():
                    ran.add(name)
                    if found := list(faults(outcome)):
                        wrong[f"{name} as {way} in {database!r}"] = found

    assert wrong == {}
    assert server.errors_in_log(begin) == []
    # What no role may run is never proven.
    fitting = {q.name for q in QUERIES if q.role in ("any", role) and any_metric(q, server.major)}
    assert fitting - ran <= {q.name for q in QUERIES if q.needs.extension or q.needs.setting}


def any_metric(query: catalogue.Query, major: int) -> bool:
    return any(metric.fits(major) for metric in query.metrics)


def faults(outcome: Outcome) -> Iterator[str]:
    """What the answer to a statement is not as the catalogue promises."""
    query, metrics = outcome.statement.query, outcome.statement.metrics
    if outcome.failure:
        yield f"{outcome.failure.sqlstate}: {outcome.failure.detail}"
        return
    values = {metric.column for metric in metrics}
    promised = {*query.labels, *values}
    if query.computes:
        kind = KINDS[query.computes]
        values, promised = set(), {*kind.columns, *kind.server}
    if missing := promised - set(outcome.columns):
        yield f"is missing {sorted(missing)}"
    chosen_by = query.top.by if query.top else ()
    if idle := set(outcome.columns) - promised - set(chosen_by):
        yield f"has columns for nothing: {sorted(idle)}"
    if twice := [name for name, times in Counter(outcome.columns).items() if times > 1]:
        yield f"has two columns {twice}"
    if not (query.top or query.computes) and len(outcome.rows) > outcome.statement.max_rows:
        yield f"has more than {outcome.statement.max_rows} rows"
    keys = ("key", "datname") if query.computes else query.labels
    rows = Counter(tuple(row.get(key) for key in keys) for row in outcome.rows)
    if twice := [str(labels) for labels, times in rows.items() if times > 1]:
        yield f"has rows with the same labels: {twice[:5]}"
    counters = {metric.column for metric in metrics if metric.type == "counter"}
    for row in outcome.rows:
        for column in values & row.keys():
            value = row[column]
            if isinstance(value, str) or value != value:  # NaN
                yield f"{column} is {value!r}, which is no number"
            elif column in counters and value is not None and value < 0:
                yield f"{column} counts to {value}"


@pytest.mark.parametrize("major", [13, 18])
def test_a_page_parses_as_text_and_as_openmetrics_with_the_same_series(cluster: Cluster) -> None:
    with Exporter(
        environment={"PGVIGIL_DSN": cluster.primary.conninfo(**PGVIGIL.login)}
    ) as exporter:
        exporter.scrape()
        as_text = exporter.scrape()
        as_openmetrics = exporter.scrape(accept="application/openmetrics-text;version=1.0.0")

    # What has labels comes and goes with what it tells of.
    lasting = {
        m.name for q in QUERIES if not (q.labels or q.every) for m in q.metrics
    } & as_text.names
    assert lasting
    assert lasting <= as_openmetrics.names
    # Counters with `_created` aside, the parsers name samples alike.
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
