"""What a rate makes of counters over restarts, crashes, resets and upgrades is never too much."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

import psycopg
import pytest
from pgvigil import catalogue
from pgvigil.plan import concerning

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

FreshServer = Callable[..., Server]
Name = tuple[str, frozenset[tuple[str, str]]]

LOTS = 20_000
"""Transactions, and rows, before an event."""
FEW = 100
"""Transactions just before the last scrape before an event, and again after it."""

POSTGRES = {"datname": "postgres"}
STATISTICS = {
    "database": ("pg_stat_database_tup_inserted_total", POSTGRES),
    "bgwriter": ("pg_stat_bgwriter_buffers_alloc_total", {}),
    "checkpointer": ("pg_stat_checkpointer_buffers_written_total", {}),
    "wal": ("pg_stat_wal_wal_records_total", {}),
    "io": (
        "pg_stat_io_hits_total",
        {"backend_type": "client backend", "object": "relation", "context": "normal"},
    ),
    "slru": ("pg_stat_slru_blks_hit_total", {}),
    "statements": ("pg_stat_statements_rows_total", POSTGRES),
}
"""A counter, or some, of each kind of statistics that `work` drives up."""
RESETS = {
    "database": ("pg_stat_database_stats_reset_timestamp_seconds", POSTGRES),
    "bgwriter": ("pg_stat_bgwriter_stats_reset_timestamp_seconds", {}),
    "checkpointer": ("pg_stat_checkpointer_stats_reset_timestamp_seconds", {}),
    "wal": ("pg_stat_wal_stats_reset_timestamp_seconds", {}),
    "io": ("pg_stat_io_stats_reset_timestamp_seconds", {}),
    "slru": ("pg_stat_slru_stats_reset_timestamp_seconds", {}),
    "statements": ("pg_stat_statements_info_stats_reset_timestamp_seconds", {}),
    "archiver": ("pg_stat_archiver_stats_reset_timestamp_seconds", {}),
}
SINCE = {"wal": 14, "io": 16}
"""Since which major version there are such statistics, where not all have them."""
RESETS_SINCE = {**SINCE, "statements": 14}


@dataclass(frozen=True)
class Cell:
    """Something that happens to a server, and the statistics that are gone after it."""

    event: Callable[[Server], object]
    lost: frozenset[str] = frozenset()
    restarted: bool = False
    """Whether something of the server is younger after it."""


def restart(server: Server) -> None:
    server.restart()


def restart_at_once(server: Server) -> None:
    server.restart("immediate")


def crash(server: Server) -> None:
    server.crash()
    server.start()


def kill_a_session(server: Server) -> None:
    """The server ends all sessions, recovers, and goes on under the same process."""
    with closing(psycopg.connect(server.conninfo())) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        with suppress(psycopg.OperationalError):
            victim.execute("select 1")
    end = time.monotonic() + 30
    while True:
        with suppress(psycopg.OperationalError):
            server.execute("select 1")
            return
        assert time.monotonic() < end
        time.sleep(0.05)


def reset(server: Server) -> None:
    server.execute("select pg_stat_reset()")
    server.wait_until(
        f"select tup_inserted < {LOTS} from pg_stat_database where datname = 'postgres'"
    )


def reset_shared(server: Server) -> None:
    since = {"archiver": 0, "bgwriter": 0, "wal": 14, "io": 16, "checkpointer": 17}
    for kind in (kind for kind, first in since.items() if server.major >= first):
        server.execute(f"select pg_stat_reset_shared('{kind}')")
    server.execute("select pg_stat_reset_slru(null)")
    # Until 14 a process of its own hears of it in time.
    server.wait_until("select sum(blks_hit) < 1000 from pg_stat_slru")


def reset_statements(server: Server) -> None:
    server.execute("select pg_stat_statements_reset()")


SHARED = frozenset({"bgwriter", "checkpointer", "wal", "io", "slru"})
ALL = SHARED | {"database", "statements"}
CELLS = {
    "a restart in order": Cell(restart, restarted=True),
    # pg_stat_statements writes its own file at each end but a crash.
    "an immediate restart": Cell(restart_at_once, ALL - {"statements"}, restarted=True),
    "a crash": Cell(crash, ALL, restarted=True),
    "a killed session": Cell(kill_a_session, ALL, restarted=True),
    "a reset": Cell(reset, frozenset({"database"})),
    "a reset of what is shared": Cell(reset_shared, SHARED),
    "a reset of statements": Cell(reset_statements, frozenset({"statements"})),
}


def watching(server: Server) -> Exporter:
    disable = "storage schema maintenance security extensions settings"
    environment = {"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login), "PGVIGIL_DISABLE": disable}
    return Exporter(environment=environment)


def spend(server: Server, count: int) -> None:
    """Take transaction ids that reach the disk only when somebody flushes WAL."""
    server.execute(
        f"do $$ begin for i in 1..{count} loop perform txid_current(); commit; end loop; end $$"
    )


def work(server: Server) -> None:
    """Give every kind of statistics something to count."""
    server.execute("drop table if exists t")
    server.execute("create table t (n int primary key, x text)")
    server.execute(f"insert into t select g, 'x' from generate_series(1, {LOTS}) as g")
    server.execute("update t set x = x")
    spend(server, LOTS)
    server.execute("select pg_switch_wal()")
    server.execute("checkpoint")
    server.wait_until(
        f"select xact_commit > {LOTS} and tup_updated >= {LOTS}"
        " from pg_stat_database where datname = 'postgres'"
    )
    # Those two report when they next look round.
    written = "pg_stat_checkpointer", "buffers_written"
    for view, column in (
        ("pg_stat_bgwriter", "buffers_alloc"),
        written if server.major >= 17 else ("pg_stat_bgwriter", "buffers_checkpoint"),
    ):
        server.wait_until(f"select {column} > 0 from {view}", 30)


def counters(page: Page) -> dict[Name, float]:
    """What tells of PostgreSQL and never falls, as its name says."""
    return {
        name: value
        for name, value in page.samples.items()
        if name[0].startswith("pg_") and name[0].endswith("_total")
    }


def increase(before: float, after: float) -> float:
    """What Prometheus makes of a counter: one that has fallen began at 0."""
    return after - before if after >= before else after


def whole(server: Server) -> Page:
    """A page with what the background finds, too; nothing on it is older than the call."""
    wanted = {name for name, _ in STATISTICS.values()} | {"pg_control_checkpoint_next_xid_total"}
    wanted -= {STATISTICS[kind][0] for kind, first in SINCE.items() if server.major < first}
    with watching(server) as exporter:
        end = time.monotonic() + 30
        while not wanted <= (page := exporter.scrape()).names:
            assert time.monotonic() < end, wanted - page.names
            time.sleep(0.05)
        return page


def sums(page: Page, major: int) -> dict[str, float]:
    """How far each kind of statistics has counted."""
    return {
        kind: sum(page.series(name, **labels).values())
        for kind, (name, labels) in STATISTICS.items()
        if major >= SINCE.get(kind, 0)
    }


def resets(page: Page) -> dict[str, float]:
    """When each kind of statistics was reset, as far as the page tells."""
    return {
        kind: max(found.values())
        for kind, (name, labels) in RESETS.items()
        if (found := page.series(name, **labels))
    }


@pytest.fixture(scope="module", params=[13, 18])
def counting(request: pytest.FixtureRequest, module_server: FreshServer) -> Server:
    # The ids that nobody flushes to the disk shall be lost in a crash.
    return module_server(request.param, autovacuum=False, wal_writer_delay="10s")


@pytest.mark.parametrize("cell", CELLS.values(), ids=[*CELLS])
def test_a_rate_over_an_event_is_no_more_than_what_took_place(counting: Server, cell: Cell) -> None:
    server, major = counting, counting.major
    with watching(server) as exporter:
        work(server)
        earlier = whole(server)
        spend(server, FEW)  # seen by the next scrape, and yet not on the disk
        before = exporter.scrape()
        spend(server, FEW)
        cell.event(server)
        after = exporter.scrape()
        later = whole(server)

    for one, other in ((before, after), (earlier, later)):
        then, now = counters(one), counters(other)
        assert min(now.values()) >= 0
        # What is no statistic outlives everything: a fall would count as all it ever was.
        fallen = {
            name: (then[name], value)
            for name, value in now.items()
            if value < then.get(name, 0) and not name[0].startswith("pg_stat_")
        }
        assert fallen == {}
        commits = "pg_stat_database_xact_commit_total"
        assert one.value(commits, **POSTGRES) > LOTS
        seen = increase(one.value(commits, **POSTGRES), other.value(commits, **POSTGRES))
        assert seen <= 2 * FEW + 300

    counted, left = sums(earlier, major), sums(later, major)
    assert min(counted.values()) > 0
    assert {kind for kind in left if left[kind] < counted[kind]} == cell.lost & left.keys()

    old, new = resets(earlier), resets(later)
    expected = cell.lost | ({"archiver"} if cell.lost >= SHARED else set())
    if cell.restarted and major >= 15:
        expected -= {"database"}  # of a database PostgreSQL then notes only what somebody resets
    assert {kind for kind in new if new[kind] > old.get(kind, 0)} == {
        kind for kind in expected if major >= RESETS_SINCE.get(kind, 0)
    }
    started = (
        "pg_postmaster_start_timestamp_seconds",
        "pg_stat_activity_checkpointer_start_timestamp_seconds",
    )
    assert cell.restarted == any(after.value(name) > before.value(name) for name in started)


QUERIES = concerning(catalogue.load(), "postgresql")
SLOW = {metric.name for query in QUERIES if query.every for metric in query.metrics}


def known(major: int) -> set[str]:
    """The metrics that a major version may have."""
    return {
        metric.name
        for query in QUERIES
        for metric in query.metrics
        if metric.since <= major < metric.until
    }


GONE = {
    (13, 18): {"pg_stat_bgwriter_buffers_backend_total"},
    (16, 17): {"pg_stat_bgwriter_buffers_backend_total"},
    (17, 18): {"pg_stat_wal_wal_write_total"},
}
"""Some of what an upgrade takes away."""


@pytest.mark.parametrize(("old", "new"), GONE)
def test_an_upgraded_server_is_asked_anew_in_the_first_scrape(
    fresh_server: FreshServer, old: int, new: int
) -> None:
    before, after = fresh_server(old), fresh_server(new)
    after.stop()
    with watching(before) as exporter:
        exporter.scrape()
        end = time.monotonic() + 30
        waited_for = {name for name, _ in STATISTICS.values()} & SLOW
        while not waited_for <= (page := exporter.scrape()).names:
            assert time.monotonic() < end
            time.sleep(0.05)
        # The binaries at hand have no pg_upgrade; its new cluster has no statistics either.
        before.stop()
        after.port = before.port
        after.set({})  # writes the port down
        begin = after.log_position()
        after.start()
        upgraded = exporter.scrape()
        end = time.monotonic() + 30
        while not {"pg_control_checkpoint_next_xid_total"} <= exporter.scrape().names:
            assert time.monotonic() < end
            time.sleep(0.05)

    assert upgraded.value("pg_up") == 1
    assert {dict(key)["major"] for key in upgraded.series("pg_server_info")} == {str(new)}
    assert upgraded.value("pg_server_version_num") // 10000 == new
    assert upgraded.failed() == set()
    assert [line for line in after.errors_in_log(begin) if "pgvigil" in line] == []

    ours = {metric.name for query in QUERIES for metric in query.metrics}
    assert page.names & ours <= known(old)
    assert upgraded.names & ours <= known(new)
    # What there is in both has kept its name. A database's own reset is told when somebody resets.
    kept = page.names & known(new) - SLOW - {"pg_stat_database_stats_reset_timestamp_seconds"}
    assert kept <= upgraded.names
    assert "pg_stat_checkpointer_buffers_written_total" in kept
    assert ("pg_stat_io_read_bytes_total" in kept) == (old >= 16)
    assert GONE[old, new] <= page.names - upgraded.names
    # What the background had found of the old version is not served.
    assert upgraded.names & SLOW == set()
