"""Every query of every dashboard has something to show of real servers under load."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pgvigil import catalogue

from lab import alertmanager, grafana, pgbackrest, pgbouncer, prometheus, rules, series, walg
from lab.binaries import find
from lab.exporter import Exporter
from lab.grafana import Asked
from lab.pgbouncer import STATS
from tests.faults.pieces.repository import Repository
from tests.faults.stage import DATABASE, Stage

FILES = [file for file in grafana.files() if file.stem not in series.OTHERS]
MEMBERS = "primary", "standby"
TARGETS = *MEMBERS, "away", "pool", "repository", "storage", "own"

A_WEEK = "the stage is minutes old, and shows what is by that of a week ago"
UNSHOWN: Mapping[str, str] = {
    "As many as a week ago?": A_WEEK,
    "Mean time now and a week ago": A_WEEK,
    "Which became slower?": A_WEEK,
    "instance:pg_storage_bytes:full_in_seconds": A_WEEK,
    "barman_": "one that is asked all the time takes a processor; tests/live/test_barman.py has it",
}
"""Panels, and series by how their names begin, of which this stage has none, and why."""

every = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

SCHEMA = """
create table unkeyed (id int, parked bigint references parked, note text);
insert into unkeyed select n, null, repeat('x', 20) from generate_series(1, 400000) n;
create index once on unkeyed (id);
create index twice on unkeyed (id);
create table parts (at date not null) partition by range (at);
create table part partition of parts for values from ('2020-01-01') to ('2030-01-01');
create table rest partition of parts default;
create table tenants (id int);
alter table tenants enable row level security;
create table counted (id smallserial);
create table shared (n int);
insert into shared values (1);
select setval('counted_id_seq', 30000);
select pg_create_logical_replication_slot('applied', 'pgoutput');
create publication everything for table orders;
create role leaver login password 'x' valid until '2035-01-01' connection limit 5;
alter database shop connection limit 35;
create database copies;
analyze
"""
"""What a dashboard has a panel for, and a server that is well has not."""

BUSY = """
do $$ begin loop perform count(*) from unkeyed; perform pg_sleep(0.2); end loop; end $$
"""


LOCKED_TWICE = """
do $$ begin
  perform from shared for share;
  begin update shared set n = n; exception when division_by_zero then null; end;
end $$
"""
"""A lock that a subtransaction makes stronger, which takes a multixact."""

CHANGES = "create table passing (id int primary key)", "drop table passing"

FAILING = """
fails:
  why: It shows what a dashboard says of a query that fails.
  max_series: 1
  sql: select 1 / pg_catalog.pg_backend_pid() / 0 as one
  metrics:
    pg_own_one: {column: one, type: gauge, help: One.}
"""


class Watched(Stage):
    """A pair where much is amiss, a server that does not answer, and all else that is watched.

    WAL-G is a stand-in. One query of ours always fails, and each statement is logged.
    """

    def __init__(self, major: int, program: str) -> None:
        """`program` is the PgBouncer that is run."""
        super().__init__(major)
        self._program = program
        logged = {"logging_collector": True, "log_min_duration_statement": 0}
        self.scene = self.scene._replace(settings=logged, tls=True)

    def furnish(self) -> None:
        self._repository = Repository(self, age=26 * 3600)
        self.mind_archive_timeout()
        walg.stand_in(self.directory / "wal-g")
        (self.directory / "own.yml").write_text(FAILING)
        for statement in SCHEMA.split(";"):
            self.execute(statement)
        self.primary.execute(printed("grants", "--security", "--host", "--log"))
        self.execute(f"{printed('grants', '--bloat', '--sequences')}")
        self.primary.execute(
            "insert into pgvigil.record (kind, place, started, ended, ok, size_bytes, window_start)"
            " values ('backup', 'here', now() - interval '20 s', now(), true, 1e6,"
            " now() - interval '8 days')"
        )
        publisher = self.primary.conninfo(dbname=DATABASE)
        for statement in (
            "create table orders (id bigint primary key, note text)",
            f"create subscription applied connection '{publisher}' publication everything"
            " with (create_slot = false, slot_name = 'applied', copy_data = false)",
        ):
            self.primary.execute(statement, database="copies")
        self.standby.set(
            {
                "hot_standby_feedback": True,
                "max_slot_wal_keep_size": "1GB",
                "track_io_timing": False,
            }
        )
        self.standby.execute("select pg_create_physical_replication_slot('kept', true)")
        self.pooler = self._stack.enter_context(pgbouncer.running(self.primary, "", self._program))
        for scene in (self._sessions(), self._clients(), self._base_backup()):
            self._stack.enter_context(scene)

    def configuration(self) -> dict[str, Any]:
        told = super().configuration()
        login = self.pooler.login(STATS, "pgbouncer")
        told["targets"]["away"] = {"dsn": "host=127.0.0.1 port=1"}
        told["targets"]["pool"] = {"kind": "pgbouncer", "connection": login}
        self._repository.configure(told)
        command = [str(self.directory / "wal-g")]
        told["targets"]["storage"] = {"kind": "wal-g", "command": command}
        told["catalogue"] = [str(self.directory / "own.yml")]
        for of in MEMBERS:
            told["targets"][of]["enable"] = ["host", "queries.texts"]
            capacity = {"STO-1": {"capacity_bytes": {"page": 1e12, "ticket": 1e12}}}
            told["targets"][of]["objectives"] |= capacity
        return told

    def _exporter(self, port: int | None = None) -> Exporter:
        exporter = super()._exporter(port)
        own = {"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"instance": "own"}}
        self.jobs = [{"job_name": "own", "static_configs": [own]}]
        return exporter

    @contextlib.contextmanager
    def _sessions(self) -> Iterator[None]:
        """One reads, one vacuums, one is idle, and one waits for what the idle one has locked."""
        slowly = "-c vacuum_cost_delay=100 -c vacuum_cost_limit=1 -c vacuum_cost_page_hit=100"
        with contextlib.ExitStack() as stack:
            busy = stack.enter_context(self.session())
            vacuuming = stack.enter_context(self.session(options=slowly))
            idle = stack.enter_context(self.session())
            waiting = stack.enter_context(self.session())
            standby = self.standby.conninfo(dbname=DATABASE)
            stack.enter_context(contextlib.closing(psycopg.connect(standby)))
            busy.pgconn.send_query(BUSY.encode())
            vacuuming.pgconn.send_query(b"vacuum (disable_page_skipping) unkeyed")
            idle.execute("lock table parked")
            waiting.pgconn.send_query(b"select from parked")
            try:
                yield
            finally:
                for connection in (busy, vacuuming, waiting):
                    connection.cancel_safe(timeout=5)

    @contextlib.contextmanager
    def _base_backup(self) -> Iterator[None]:
        """Somebody takes a base backup and reads none of it."""
        words = "(LABEL 'slow', MAX_RATE 32)" if self.major > 14 else "LABEL 'slow' MAX_RATE 32"
        login = self.primary.conninfo(replication="true")
        with contextlib.closing(psycopg.connect(login, autocommit=True)) as connection:
            connection.pgconn.send_query(f"BASE_BACKUP {words}".encode())
            yield

    @contextlib.contextmanager
    def _clients(self) -> Iterator[None]:
        """Somebody asks through the pooler, locks a row twice, and changes the schema.

        And asks for checkpoints.
        """
        over = threading.Event()

        def ask() -> None:
            with (
                contextlib.closing(self.pooler.connect()) as connection,
                self.session() as direct,
            ):
                for turn in itertools.count():
                    if over.wait(0.1):
                        break
                    connection.execute("select 1")
                    direct.execute(LOCKED_TWICE)
                    if turn % 50 == 0:
                        direct.execute(CHANGES[turn // 50 % 2])
                        direct.execute("checkpoint")
                    direct.commit()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module", params=[13, 18])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    program = pgbouncer.available()
    if program is None or prometheus.installed() is None or alertmanager.installed() is None:
        reason = "Prometheus, Alertmanager and PgBouncer are not all installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    try:
        pgbackrest.program("sid")
    except RuntimeError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    if not find(request.param).tls:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("PostgreSQL is built without TLS")
    with Watched(request.param, program) as stage:
        yield stage


def printed(*command: str) -> str:
    """What our program prints."""
    words = [sys.executable, "-m", "pgvigil", *command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def chosen(instance: str) -> dict[str, str]:
    """What Grafana puts into the places of variables."""
    every = {"system_identifier": ".*", "datname": ".*", "datasource": "prometheus"}
    return {**every, "instance": instance, "__rate_interval": "5s", "__range": "1m"}


def unshown(of: Asked, major: int) -> bool:
    """Whether this stage has nothing to show, or PostgreSQL has none of it in this version."""
    rule = rules.make("panel", {"record": "panel", "expr": of.expression})
    names = [selector.name for selector in rule.selectors()]
    later = {
        metric.name
        for query in catalogue.load()
        for metric in query.metrics
        if not metric.fits(major)
    }
    return of.panel in UNSHOWN or any(
        name in later or name.startswith(tuple(UNSHOWN)) for name in names
    )


@every
def test_every_query_has_data(stage: Stage, file: Path) -> None:
    # Each query of some target, and each panel that says nothing else of both members.
    asked = list(grafana.queries(file, chosen("x")))
    members = MEMBERS if file.stem != "pooler" else ("pool",)
    missing: set[tuple[str, int | str]]
    missing = {(of.panel, at) for at, of in enumerate(asked) if not unshown(of, stage.major)}
    missing |= {(of.panel, who) for of in asked if not of.empty_when for who in members}
    # One round through all of them takes many seconds where the machine has other things to do.
    end = time.monotonic() + 300
    while missing and time.monotonic() < end:
        time.sleep(0.5)
        for target in TARGETS:
            for at, of in enumerate(grafana.queries(file, chosen(target))):
                shown: set[tuple[str, int | str]] = {(of.panel, at), (of.panel, target)}
                if shown & missing and stage.prometheus.query(of.expression):
                    missing -= shown
    assert missing == set()


@every
def test_every_variable_has_values(stage: Stage, file: Path) -> None:
    shown = {"pool"} if file.stem == "pooler" else {*MEMBERS, "away"}
    for member in {*MEMBERS} & shown or shown:
        for variable in grafana.variables(file):
            wanted = shown if variable["name"] == "instance" else set[str]()
            end = time.monotonic() + 60
            # On a busy machine a scrape may just have come too late.
            while not (values := resolved(stage, variable, chosen(member))) or wanted - set(values):
                assert time.monotonic() < end, variable["name"]
                time.sleep(0.5)


def resolved(stage: Stage, variable: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    """The values of a variable, by the two functions of Grafana that ours are written with."""
    text = grafana.replaced(variable["query"]["query"], given)
    if found := re.fullmatch(r"label_values\((.+), (\w+)\)", text):
        return stage.prometheus.values(found[2], found[1])
    found = re.fullmatch(r"query_result\((.+)\)", text)
    assert found
    return [labels[variable["name"]] for labels, _ in stage.prometheus.query(found[1])]


@every
def test_every_annotation_is_a_query_that_prometheus_takes(stage: Stage, file: Path) -> None:
    for of in grafana.annotations(file):
        text = grafana.replaced(of["expr"], chosen("primary"))
        stage.prometheus.query(text)  # one that it does not take raises HTTPError
        if of["useValueForTime"]:
            stage.prometheus.wait_until(f"({text}) / 1000 > time() - 3600")


@every
def test_all_of_two_thousand_servers_can_be_asked_for_at_once(stage: Stage, file: Path) -> None:
    # Grafana's "All" is an expression that names each.
    names = [rf"database-{at}\\.of-the-house\\.example:5432" for at in range(2000)]
    every_one = "(" + "|".join([*names, "primary"]) + ")"
    stage.prometheus.wait_until(f'pg_up{{instance=~"{every_one}"}} == 1')
    for of in grafana.queries(file, chosen(every_one)):
        stage.prometheus.query(of.expression)


def test_a_standard_is_known_by_any_metric_that_decides_on_it(stage: Stage) -> None:
    # Before version 16 there is no pg_stat_io, but the statistics of the databases.
    (state,) = (
        of.expression
        for of in grafana.queries(grafana.DASHBOARDS / "standards.json", chosen(".*"))
        if of.panel == "Kept?" and of.expression.startswith("max by")
    )
    for seen in (
        'pg_stat_database_blks_read_total{instance="primary"}',
        'pgbouncer_pools_cl_waiting{instance="pool"}',
        'pgvigil_objective{instance="away"}',
        'pgvigil_target_up{instance="own"}',
    ):
        stage.prometheus.wait_until(seen)
    told = stage.prometheus.query(state)
    states = {(labels["instance"], labels["standard"]): value for labels, value in told}
    assert min(states["primary", "RES-4"], states["pool", "RES-2"]) > 0
    assert states["primary", "RES-2"] == states["pool", "RES-4"] == states["away", "RES-4"] == 0
    assert {instance for instance, _ in states} == {*TARGETS} - {"own"}
