"""Watches a real PgBouncer, of several versions, as a target of its own kind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
from pgvigil import catalogue
from pgvigil.errors import Down

from lab import pgbouncer
from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.pgbouncer import ADMIN, CLIENT, STATS, Pooler
from lab.postgres import Server

QUERIES = [query for query in catalogue.load() if query.kind == "pgbouncer"]
METRICS = {metric.name: query for query in QUERIES for metric in query.metrics}

RELEASES = ("installed", "trixie", "sid")
"""Debian 12's 1.18 in CI, and what newer suites have."""

LACKS: Mapping[str, set[str]] = {
    "1.18": {
        *("pgbouncer_databases_max_client_connections", "pgbouncer_stats_client_logins_total"),
        "pgbouncer_databases_current_client_connections",
        *("pgbouncer_stats_server_assignments_total", "pgbouncer_stats_binds_total"),
        *("pgbouncer_stats_client_parses_total", "pgbouncer_stats_server_parses_total"),
        *("pgbouncer_config_max_db_client_connections", "pgbouncer_config_max_prepared_statements"),
        "pgbouncer_config_max_user_client_connections",
        *(
            name
            for name, query in METRICS.items()
            if query.name in ("pooler.state", "pooler.users")
        ),
    },
    "1.24": {"pgbouncer_stats_client_logins_total"},
}
"""What older versions do not show."""

SETTINGS = "pool_mode = transaction\ndefault_pool_size = 1\nquery_wait_timeout = 20\n"


@dataclass
class Watched:
    """A PgBouncer with pools of one connection, and an exporter that watches it as `pool`."""

    pooler: Pooler
    exporter: Exporter
    version: str

    def page(self, **options: Any) -> Page:
        """One scrape, which finds the PgBouncer up."""
        page = self.exporter.scrape("pool", **options)
        assert page.value("pgbouncer_up") == 1, self.exporter.log
        return page

    def wait_until(self, holds: Callable[[Page], bool]) -> Page:
        """The first page of which something holds."""
        end = time.monotonic() + 30
        while not holds(page := self.page()):
            assert time.monotonic() < end, page.body
            time.sleep(0.05)
        return page


def program(release: str) -> str:
    """A PgBouncer of a release; the test is skipped where there is none, and fails in CI."""
    try:
        found = pgbouncer.available() if release == "installed" else pgbouncer.fetched(release)
        missing = "PgBouncer is not installed"
    except RuntimeError as error:
        found, missing = None, str(error)
    return found or require(missing)


def require(missing: str) -> NoReturn:
    """Skip the test for what is missing, or fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def connection(pooler: Pooler, **others: str) -> dict[str, Any]:
    """The connection of a target that looks at a PgBouncer's console."""
    login = {key: value for key, value in pooler.login(STATS).items() if key != "dbname"}
    return {"connection": {**login, **others}, "kind": "pgbouncer"}


@pytest.fixture(scope="module")
def server(module_server: Callable[..., Server]) -> Server:
    """A server behind all poolers of these tests."""
    return module_server(18)


@pytest.fixture(scope="module", params=RELEASES)
def watched(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """One of each release; tests leave it as they found it."""
    path = tmp_path_factory.mktemp("watched") / "pgvigil.yml"
    with pgbouncer.running(server, SETTINGS, program(request.param)) as pooler:
        targets = {
            "pool": {**connection(pooler), "labels": {"cluster": "a"}},
            # What the environment might add does no harm.
            "adorned": connection(pooler, options="-c jit=off", target_session_attrs="standby"),
            "password": connection(pooler, password="wrong"),
            "client": connection(pooler, user=CLIENT.name, password=CLIENT.password),
            "postgresql": connection(pooler, port=str(server.port), **PGVIGIL.login),
            "console": {"connection": pooler.login(STATS, "pgbouncer")},
            "behind": {"connection": pooler.login(ADMIN)},
            "behind_wrong": {"connection": {**pooler.login(), "password": "wrong"}},
            "behind_nothing": {"connection": pooler.login(dbname="nothing")},
            "nobody": connection(pooler, port="1"),
        }
        path.write_text(json.dumps({"targets": targets}))  # JSON is YAML
        with Exporter("--config", str(path)) as exporter:
            ((version,),) = pooler.command("SHOW VERSION")
            yield Watched(pooler, exporter, str(version).split()[1])


@pytest.fixture(params=["app", "app_session"])
def database(request: pytest.FixtureRequest) -> str:
    """A pooled database in transaction mode, and one in session mode."""
    name: str = request.param
    return name


def told_missing(page: Page) -> set[str]:
    """The metrics that a page says this version cannot give."""
    queries = {dict(k)["query"] for k in page.series("pgvigil_query_skipped", reason="version")}
    metrics = page.series("pgvigil_metric_skipped", reason="version")
    return {dict(k)["metric"] for k in metrics} | {
        name for name, query in METRICS.items() if query.name in queries
    }


def test_each_version_gives_all_that_it_shows_and_the_rest_is_told(watched: Watched) -> None:
    with watched.pooler.connect() as client:
        client.execute("select 1")
        page = watched.page()
    lacks = LACKS.get(watched.version.rpartition(".")[0], set())
    if watched.version >= "1.26":
        lacks = {"pgbouncer_state_suspended"}
    assert told_missing(page) == lacks
    given = {name for name in page.names if name.startswith("pgbouncer_")}
    assert given == METRICS.keys() - lacks | {"pgbouncer_up", "pgbouncer_down_reason"}
    assert page.failed() == set()
    assert page.value("pgbouncer_version_info", version=watched.version, cluster="a") == 1
    assert not page.series("pgvigil_query_dropped_samples_total")
    # Nothing that is of a PostgreSQL, and nothing that the console says of itself.
    assert not [name for name in page.names if name.startswith("pg_")]
    assert not [key for key in page.samples if ("database", "pgbouncer") in key[1]]


def test_promtool_has_no_complaint_about_the_page(watched: Watched) -> None:
    watched.page(accept="application/openmetrics-text")  # a Page refuses what does not parse
    body = watched.page().body
    if not shutil.which("promtool"):
        require("promtool is not installed")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=body, capture_output=True, text=True, timeout=60
    )
    # What the exporter says of itself is judged on the page of a PostgreSQL.
    assert not [line for line in checked.stderr.splitlines() if not line.startswith("pgvigil_")]


def test_values_are_those_of_the_console_in_seconds(watched: Watched) -> None:
    with watched.pooler.connect() as client:
        client.execute("select pg_sleep(0.05)")
    page = watched.page()
    assert page.value("pgbouncer_databases_pool_size", database="app") == 1
    assert page.value("pgbouncer_config_default_pool_size") == 1
    assert page.value("pgbouncer_config_max_client_conn") == 100
    assert page.value("pgbouncer_config_query_wait_timeout_seconds") == 20
    place = {"host": "127.0.0.1", "dbname": "postgres", "database": "app_session"}
    assert page.value("pgbouncer_databases_info", pool_mode="session", **place) == 1
    assert page.value("pgbouncer_config_info", auth_type="scram-sha-256") == 1
    spent = page.value("pgbouncer_stats_query_seconds_total", database="app")
    (row,) = (row for row in watched.pooler.command("SHOW STATS_TOTALS") if row[0] == "app")
    assert spent >= 0.05
    assert any(abs(float(value) - spent * 1e6) < 1 for value in row[1:])


def test_waiting_clients_are_counted_and_their_longest_wait_is_told(
    watched: Watched, database: str
) -> None:
    def one(of: str, page: Page) -> float:
        # The pool is that of the user whom the database forces on all.
        return page.value(f"pgbouncer_pools_{of}", database=database, user=PGVIGIL.name)

    begun = time.monotonic()
    ask(watched.pooler, database)  # which makes the pool, and its row
    before = watched.page().value("pgbouncer_stats_wait_seconds_total", database=database)
    with watched.pooler.connect(dbname=database) as holder, ThreadPoolExecutor(2) as threads:
        holder.execute("begin")
        holder.execute("select 1")
        waiting = [threads.submit(ask, watched.pooler, database) for _ in range(2)]
        watched.wait_until(lambda page: one("cl_waiting", page) == 2)
        page = watched.wait_until(
            # Whole seconds and what is beyond them stand in two columns.
            lambda page: (wait := one("maxwait_seconds", page)) >= 0.3 and not wait.is_integer()
        )
        assert one("maxwait_seconds", page) <= time.monotonic() - begun
        # The pool is used up: as many connections as it may have, and none is idle.
        size = page.value("pgbouncer_databases_pool_size", database=database)
        assert one("sv_active", page) / size == 1
        assert one("sv_idle", page) == 0
        assert page.value("pgbouncer_databases_current_connections", database=database) == 1
        assert page.value("pgbouncer_lists_used_clients") >= 3
        holder.execute("rollback")
        if database == "app_session":
            holder.close()
        assert [future.result(30) for future in waiting] == [1, 1]
    page = watched.wait_until(lambda page: one("cl_waiting", page) == 0)
    assert one("maxwait_seconds", page) == 0
    waited = page.value("pgbouncer_stats_wait_seconds_total", database=database) - before
    assert 0.3 <= waited <= 2 * (time.monotonic() - begun)


def ask(pooler: Pooler, database: str) -> int:
    """What a client gets that asks for one thing."""
    with pooler.connect(dbname=database) as client:
        ((found,),) = client.execute("select 1").fetchall()
    return int(found)


def test_a_paused_database_is_told_until_it_goes_on(watched: Watched) -> None:
    watched.pooler.command("PAUSE app")
    try:
        page = watched.page()
        assert page.value("pgbouncer_databases_paused", database="app") == 1
        assert page.value("pgbouncer_databases_paused", database="app_session") == 0
    finally:
        watched.pooler.command("RESUME app")
    assert watched.page().value("pgbouncer_databases_paused", database="app") == 0


def test_a_pooler_that_is_paused_as_a_whole_is_told(watched: Watched) -> None:
    def waiting(page: Page) -> bool:
        return 1 in page.series("pgbouncer_pools_cl_waiting", database="app").values()

    watched.pooler.command("PAUSE")
    try:
        with ThreadPoolExecutor(1) as threads:
            client = threads.submit(ask, watched.pooler, "app")
            page = watched.wait_until(waiting)
            # The oldest shows it in no column: there only the waiting clients tell.
            if "pgbouncer_state_paused" not in told_missing(page):
                assert page.value("pgbouncer_state_paused") == 1
                assert page.value("pgbouncer_state_active") == 0
            watched.pooler.command("RESUME")
            assert client.result(30) == 1
    finally:
        with contextlib.suppress(psycopg.Error):  # it is not paused any more
            watched.pooler.command("RESUME")
    watched.wait_until(lambda page: not waiting(page))


def test_a_disabled_database_is_told_and_new_clients_learn_it(watched: Watched) -> None:
    watched.pooler.command("DISABLE app")
    try:
        assert watched.page().value("pgbouncer_databases_disabled", database="app") == 1
        page = watched.exporter.scrape("behind")
        assert page.reason == "cannot_connect_now"
    finally:
        watched.pooler.command("ENABLE app")
    assert watched.page().value("pgbouncer_databases_disabled", database="app") == 0


def test_server_connections_go_after_reconnect_and_counters_stay(watched: Watched) -> None:
    def connections(page: Page) -> float:
        return page.value("pgbouncer_databases_current_connections", database="app")

    ask(watched.pooler, "app")
    before = watched.wait_until(lambda page: connections(page) == 1)
    watched.pooler.command("RECONNECT app")
    after = watched.wait_until(lambda page: connections(page) == 0)
    total = "pgbouncer_stats_queries_total"
    assert after.value(total, database="app") >= before.value(total, database="app") > 0


@pytest.mark.parametrize(
    ("target", "reason", "remedy"),
    [
        ("password", "invalid_password", "authentication failed"),
        ("client", "invalid_authorization_specification", "name the user in stats_users"),
        ("postgresql", "wrong_kind", "no PgBouncer"),
        ("nobody", "connection_refused", "Connection refused"),
    ],
)
def test_a_console_that_cannot_be_asked_says_why_and_what_to_do(
    watched: Watched, target: str, reason: str, remedy: str
) -> None:
    page = watched.exporter.scrape(target)
    assert page.value("pgbouncer_up") == 0
    holding = {dict(k)["reason"] for k, v in page.series("pgbouncer_down_reason").items() if v}
    assert holding == {reason}
    assert len(page.series("pgbouncer_down_reason")) == len(Down)
    shown = watched.exporter.get("/").body.decode()
    assert remedy in shown
    assert remedy in watched.exporter.log
    assert STATS.password not in shown + watched.exporter.log


def test_a_postgresql_that_is_a_console_in_truth_says_so(watched: Watched) -> None:
    assert watched.exporter.scrape("console").reason == "wrong_kind"
    assert "say kind: pgbouncer" in watched.exporter.log


def test_a_server_behind_a_pooler_is_down_for_the_poolers_reason(watched: Watched) -> None:
    assert watched.exporter.scrape("behind_wrong").reason == "invalid_password"
    assert watched.exporter.scrape("behind_nothing").reason == "invalid_catalog_name"


def test_what_the_console_would_refuse_is_not_sent(watched: Watched) -> None:
    assert watched.exporter.scrape("adorned").value("pgbouncer_up") == 1


def test_a_console_that_hangs_costs_the_scrape_its_deadline_and_no_more(watched: Watched) -> None:
    watched.page()
    for _ in range(2):  # over the connection that was there, and over a new one
        watched.pooler.process.send_signal(signal.SIGSTOP)
        try:
            page = watched.exporter.scrape("pool", timeout=1)  # which gives up itself after it
        finally:
            watched.pooler.process.send_signal(signal.SIGCONT)
        assert page.value("pgbouncer_up") == 0
        assert page.value("pgbouncer_down_reason", reason="timeout") == 1
    watched.page()
    assert watched.exporter.scrape("pool").value("pgvigil_connections") == 1


@pytest.mark.parametrize("release", RELEASES)
def test_a_console_that_dies_in_the_middle_is_told_and_found_again(
    server: Server, release: str, tmp_path: Path
) -> None:
    path = tmp_path / "pgvigil.yml"
    with pgbouncer.running(server, SETTINGS, program(release)) as pooler:
        path.write_text(json.dumps({"targets": {"pool": connection(pooler)}}))
        with Exporter("--config", str(path)) as exporter, ThreadPoolExecutor(1) as threads:
            assert exporter.scrape().value("pgbouncer_up") == 1
            pooler.process.send_signal(signal.SIGSTOP)
            page = threads.submit(exporter.scrape)
            wait_until_asked(pooler)
            pooler.process.kill()
            found = page.result(30)
            assert found.value("pgbouncer_up") == 0
            # It is tried once more over a new connection, which nobody takes, or not for long.
            reasons = ("connection_refused", "connection_lost")
            assert 1 in [found.value("pgbouncer_down_reason", reason=of) for of in reasons]
            with pgbouncer.running(server, SETTINGS, program(release), pooler.port):
                assert exporter.scrape().value("pgbouncer_up") == 1


def wait_until_asked(pooler: Pooler) -> None:
    """Wait until something has come in for a PgBouncer that reads nothing."""
    end = time.monotonic() + 30
    port = f"{pooler.port:04X}"
    while time.monotonic() < end:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, queues, *_ = line.split()
            if local.endswith(f":{port}") and state == "01" and not queues.endswith(":00000000"):
                return
        time.sleep(0.01)
    raise TimeoutError


OWN = """
memory:
  why: It is a query of somebody's own.
  every: 60s
  max_series: 3
  labels: [name]
  show: mem
  metrics: {own_memory_bytes: {column: memtotal, type: gauge, help: Bytes.}}
strange:
  why: No version has this column.
  max_series: 2
  labels: [database]
  show: pools
  metrics:
    own_waiting: {column: cl_waiting, type: gauge, help: Clients.}
    own_nothing: {column: nothing, type: gauge, help: Nothing.}
unlabelled:
  why: No version has this label.
  max_series: 1
  labels: [nothing]
  show: pools
  metrics: {own_idle: {column: sv_idle, type: gauge, help: Idle.}}
"""


def test_queries_of_ones_own_run_there_under_the_same_bounds(
    watched: Watched, tmp_path: Path
) -> None:
    (tmp_path / "own.yml").write_text(OWN)
    path = tmp_path / "pgvigil.yml"
    targets = {"pool": connection(watched.pooler)}
    path.write_text(json.dumps({"targets": targets, "catalogue": ["own.yml"]}))
    with (
        Exporter("--config", str(path)) as exporter,
        watched.pooler.connect() as one,
        watched.pooler.connect(dbname="app_session") as other,
    ):
        one.execute("select 1")
        other.execute("select 1")
        end = time.monotonic() + 30
        while not (page := exporter.scrape()).series("own_memory_bytes"):
            assert time.monotonic() < end, exporter.log
            time.sleep(0.05)
    assert len(page.series("own_memory_bytes")) == 3
    dropped = {"query": "own.memory", "reason": "max_series"}
    assert page.value("pgvigil_query_dropped_samples_total", **dropped) > 0
    assert len(page.series("own_waiting")) == 2
    assert page.value("pgvigil_metric_skipped", metric="own_nothing", reason="version") == 1
    assert page.value("pgvigil_query_skipped", query="own.unlabelled", reason="version") == 1
    assert page.failed() == set()
    assert page.value("pgvigil_connections") == 2


@pytest.mark.parametrize("watched", ["sid"], indirect=True)
def test_the_commands_show_what_is_asked_there(watched: Watched, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text(json.dumps({"targets": {"pool": connection(watched.pooler)}}))
    assert f":{watched.pooler.port}/pgbouncer" in command("check", path).stdout

    explained = command("explain", path).stdout
    assert f"PgBouncer {watched.version}, as {STATS.name}" in explained
    assert "\nshow pools;\n" in explained
    assert "activity" not in explained

    shown = command("query", path, "pooler.databases", "--sql").stdout
    assert shown.startswith("show databases;\n")
    assert 'pgbouncer_databases_pool_size{database="app"} 1' in shown

    refused = command("query", path, "activity.sessions")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "activity.sessions is for targets of kind postgresql, and pool is none" in refused.stderr


def command(name: str, config: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run one command of the program's."""
    line = [sys.executable, "-m", "pgvigil", name, "--config", str(config), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_a_password_among_the_settings_is_not_read(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    settings = f"{SETTINGS}auth_ldap_options = ldapbindpasswd=canary\n"
    with pgbouncer.running(server, settings, program("sid")) as pooler:
        assert "canary" in str(pooler.command("SHOW CONFIG"))
        path.write_text(json.dumps({"targets": {"pool": connection(pooler)}}))
        shown = command("query", path, "pooler.config").stdout
    assert "auth_query" in shown
    assert "canary" not in shown


def test_no_role_is_told_of_a_pooler(watched: Watched) -> None:
    watched.page()
    for path in ("/primary", "/replica"):
        answer = watched.exporter.get(f"{path}?target=pool")
        assert (answer.status, answer.body) == (404, b"a pgbouncer has no role\n")


def test_the_admins_own_words_are_refused_to_the_exporters_user(watched: Watched) -> None:
    with (
        contextlib.closing(watched.pooler.connect(STATS, "pgbouncer")) as console,
        pytest.raises(psycopg.Error, match="admin access needed"),
    ):
        psycopg.ClientCursor(console).execute(b"PAUSE")
