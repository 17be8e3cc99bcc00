"""What becomes of replication slots, as primary and standby tell it, beside pg_replication_slots.

The classic lies: a lost slot that still keeps WAL and rows by its last figures, a synchronized slot
that looks forgotten because nobody can read from it, a slot that is missing on a standby.
"""

import math
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import psycopg
import pytest
from pgvigil import catalogue
from psycopg import pq

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server
from lab.truth import Cells, Look, cells_of, fits

MakeServer = Callable[..., Server]

# Somebody writes between two looks, so that what a slot keeps grows. The words are lab.truth's,
# those of `state` PostgreSQL's: wal_status and invalidation_reason.

SEEN_ON_THE_PRIMARY = """
slot               active  retained  xmin  behind  state               safe  since   conflict  copy
physical_active    1       grows     -     -       reserved            some  -       -         0
physical_inactive  0       grows     -     -       reserved            some  stands  -         0
physical_unused    0       -         -     -       -                   some  stands  -         0
physical_lost      0       -         -     -       lost, wal_removed   -     stands  -         0
physical_expired   0       -         -     -       lost, idle_timeout  -     stands  -         0
logical_active     1       grows     some  grows   reserved            some  -       0         0
logical_inactive   0       grows     some  grows   reserved            some  stands  0         0
logical_lost       0       -         -     grows   lost, wal_removed   -     stands  0         0
logical_expired    0       -         -     grows   lost, idle_timeout  -     stands  0         0
failover           0       grows     some  grows   reserved            some  stands  0         0
failover_lost      0       -         -     grows   lost, wal_removed   -     stands  0         0
"""

# What nobody reads from is the primary's to read from while it is synchronized.
SEEN_ON_THE_STANDBY = """
slot               active  retained  xmin  behind  state               safe  since   conflict  copy
physical_active    1       grows     -     -       reserved            some  -       -         0
physical_inactive  0       grows     -     -       reserved            some  stands  -         0
physical_unused    0       -         -     -       -                   some  stands  -         0
physical_lost      0       -         -     -       lost, wal_removed   -     stands  -         0
logical_active     1       grows     some  grows   reserved            some  -       0         0
logical_inactive   0       grows     some  grows   reserved            some  stands  0         0
logical_conflict   0       -         -     grows   lost, rows_removed  -     stands  1         0
failover           0       grows     some  grows   reserved            some  stands  0         1
failover_lost      0       -         -     grows   lost, wal_removed   -     stands  0         1
"""

ROWS_SINCE = {"failover": 17, "failover_lost": 17, "physical_expired": 18, "logical_expired": 18}
LOGICAL_ON_STANDBYS_SINCE = 16


class Column(NamedTuple):
    """A metric with the label slot_name, the superuser's SQL for it, and since which version."""

    metric: str
    truth: str
    since: int = 13


_WRITTEN = """case when pg_is_in_recovery() then pg_last_wal_receive_lsn()
  else pg_current_wal_lsn() end"""

COLUMNS = {
    "active": Column("pg_replication_slots_active", "active::int"),
    "retained": Column("pg_replication_slots_retained_bytes", f"{_WRITTEN} - restart_lsn"),
    "xmin": Column("pg_replication_slots_catalog_xmin_age_xids", "age(catalog_xmin)"),
    "behind": Column(
        "pg_replication_slots_confirmed_flush_lag_bytes", f"{_WRITTEN} - confirmed_flush_lsn"
    ),
    "safe": Column("pg_replication_slots_safe_wal_size_bytes", "safe_wal_size"),
    "since": Column(
        "pg_replication_slots_inactive_since_timestamp_seconds",
        "extract(epoch from inactive_since)",
        since=17,
    ),
    # PostgreSQL 16 has no reason yet, and calls a conflict what is none.
    "conflict": Column(
        "pg_replication_slots_conflicting",
        "(case when conflicting then restart_lsn is not null else conflicting end)::int",
        since=16,
    ),
    "copy": Column("pg_replication_slots_synced", "synced::int", since=17),
}
STATES = {"reserved", "extended", "unreserved", "lost"}


@dataclass(frozen=True)
class Slots:
    """A primary and its standby, with slots of all kinds on both."""

    primary: Server
    standby: Server

    def write(self) -> None:
        """Commit on the primary, and return when the standby has replayed it."""
        self.primary.execute("insert into written select generate_series(1, 100)")
        self.arrive()

    def arrive(self) -> None:
        """Return when the standby has replayed all and said so."""
        self.primary.wait_until(
            "select replay_lsn = pg_current_wal_lsn() from pg_stat_replication"
            " where application_name = 'standby'",
            timeout=60,
        )

    def lose(self) -> None:
        """Take the WAL away from all slots that nobody has moved on."""
        for _ in range(3):
            self.primary.execute("insert into written values (0); select pg_switch_wal()")
            self.arrive()
        for server in (self.primary, self.standby):
            server.set({"max_slot_wal_keep_size": "1MB"})
            server.execute("checkpoint")
            server.set({"max_slot_wal_keep_size": "1GB"})

    def decode_on_standby(self, name: str) -> None:
        """Make a logical slot on the standby, which needs a word from the primary."""
        maker = threading.Thread(
            target=self.standby.execute,
            args=("select pg_create_logical_replication_slot(%s, 'pgoutput')", [name]),
        )
        maker.start()
        while maker.is_alive():
            self.primary.execute("select pg_log_standby_snapshot()")
            maker.join(0.05)

    def synchronize(self, name: str) -> None:
        """Bring the standby's copy of a slot in step, once the primary's has been read from."""
        copied = (
            f"select true from pg_replication_slots where slot_name = '{name}' and not temporary"
        )
        self.standby.execute("select pg_sync_replication_slots()")
        while not self.standby.execute(copied):
            self.primary.execute(
                "select pg_log_standby_snapshot();"
                f" select pg_replication_slot_advance('{name}', pg_current_wal_lsn())"
            )
            self.arrive()
            self.standby.execute("select pg_sync_replication_slots()")


def physical(server: Server, name: str, reserve: bool = True) -> None:
    server.execute("select pg_create_physical_replication_slot(%s, %s)", [name, reserve])


def logical(server: Server, name: str) -> None:
    server.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [name])


def failover(server: Server, name: str) -> None:
    server.execute(
        "select pg_create_logical_replication_slot(%s, 'pgoutput', failover => true)", [name]
    )


def read_from(server: Server, slot: str) -> pq.abc.PGconn:
    """A client that streams from a slot and confirms nothing, until it is finished."""
    ((kind, lsn),) = server.execute(
        "select slot_type, restart_lsn::text from pg_replication_slots where slot_name = %s", [slot]
    )
    start = {
        "physical": f"START_REPLICATION SLOT {slot} PHYSICAL {lsn}",
        "logical": f"START_REPLICATION SLOT {slot} LOGICAL 0/0"
        " (proto_version '1', publication_names 'everything')",
    }
    replication = "true" if kind == "physical" else "database"
    client = pq.PGconn.connect(server.conninfo(replication=replication).encode())
    client.exec_(b"IDENTIFY_SYSTEM")  # what a standby of 13 wants to be asked first
    answer = client.exec_(start[kind].encode())
    assert answer.status == pq.ExecStatus.COPY_BOTH, answer.error_message
    return client


@pytest.fixture(scope="module", params=[13, 16, 17, 18])
def slots(request: pytest.FixtureRequest, module_server: MakeServer) -> Iterator[Slots]:
    major: int = request.param
    primary = module_server(
        major,
        autovacuum=False,
        checkpoint_timeout="1h",
        max_replication_slots=20,
        max_slot_wal_keep_size="1GB",
        max_wal_senders=20,
        wal_keep_size=0,
        wal_level="logical",
        wal_sender_timeout=0,
    )
    source = f"host=127.0.0.1 port={primary.port} user=postgres application_name=standby"
    standby = primary.standby(
        slot="standby", settings={"primary_conninfo": f"{source} dbname=postgres"}
    )
    both = Slots(primary, standby)
    primary.execute("create table written (n int); create publication everything for all tables")
    both.arrive()

    # The doomed come first, lest others share their fate.
    if major >= LOGICAL_ON_STANDBYS_SINCE:
        both.decode_on_standby("logical_conflict")
        for statement in ("create table t ()", "drop table t", "vacuum pg_class"):
            primary.execute(statement)
        both.write()
        standby.wait_until("select conflicting from pg_replication_slots")
    if major >= 17:
        standby.set({"hot_standby_feedback": True})
        primary.wait_until("select xmin is not null from pg_replication_slots")
        failover(primary, "failover_lost")
        both.synchronize("failover_lost")
    physical(primary, "physical_lost")
    logical(primary, "logical_lost")
    physical(standby, "physical_lost")
    both.lose()
    if major >= 18:
        physical(primary, "physical_expired")
        logical(primary, "logical_expired")
        primary.set({"idle_replication_slot_timeout": "1s"})
        primary.wait_until(
            "select max(inactive_since) < now() - interval '1.1 s' from pg_replication_slots"
        )
        primary.execute("checkpoint")
        primary.set({"idle_replication_slot_timeout": None})

    for server in (primary, standby):
        physical(server, "physical_active")
        physical(server, "physical_inactive")
        physical(server, "physical_unused", reserve=False)
    for name in ("logical_active", "logical_inactive"):
        logical(primary, name)
        if major >= LOGICAL_ON_STANDBYS_SINCE:
            both.decode_on_standby(name)
    if major >= 17:
        failover(primary, "failover")
        both.synchronize("failover")
    with ExitStack() as clients:
        for server in (primary, standby):
            found = server.execute(
                "select slot_name from pg_replication_slots where slot_name ~ '_active$'"
            )
            for (name,) in found:
                clients.callback(read_from(server, name).finish)
            passing = clients.enter_context(psycopg.connect(server.conninfo(), autocommit=True))
            passing.execute("select pg_create_physical_replication_slot('passing', true, true)")
        yield both


def watching(server: Server) -> Exporter:
    """An exporter that asks about replication and sessions alone."""
    others = sorted({query.area for query in catalogue.load()} - {"activity", "replication"})
    dsn = server.conninfo(**PGVIGIL.login)
    return Exporter(environment={"PGVIGIL_DSN": dsn, "PGVIGIL_DISABLE": " ".join(others)})


def look(server: Server, exporter: Exporter) -> dict[str, dict[str, Look]]:
    """What the page says of each slot in each column, between two looks of the superuser."""
    before = _truth(server)
    page = exporter.scrape()
    after = _truth(server)

    assert page.failed() == set()
    assert "passing" not in page.body
    told = {dict(labels)["slot_name"] for labels in page.series("pg_replication_slots_active")}
    assert told == set(before) - {"passing"} == set(after) - {"passing"}
    return {
        slot: {
            name: Look(
                _value(page, column.metric, slot),
                min(before[slot].get(name, math.nan), after[slot].get(name, math.nan)),
                max(before[slot].get(name, math.nan), after[slot].get(name, math.nan)),
            )
            for name, column in COLUMNS.items()
        }
        for slot in told
    }


def _truth(server: Server) -> dict[str, dict[str, float]]:
    """What the superuser reads of each slot in each column."""
    columns = {n: column.truth for n, column in COLUMNS.items() if server.major >= column.since}
    query = f"select slot_name, {', '.join(columns.values())} from pg_replication_slots"
    return {
        slot: {name: float(v) for name, v in zip(columns, values, strict=True) if v is not None}
        for slot, *values in server.execute(query)
    }


def _value(page: Page, metric: str, slot: str) -> float | None:
    found = page.series(metric, slot_name=slot)
    assert len(found) <= 1, found
    return next(iter(found.values()), None)


def state_of(page: Page, slot: str) -> str:
    """The wal_status that the page says holds for a slot, and why it was invalidated."""
    states = {
        dict(labels)["wal_status"]: value
        for labels, value in page.series("pg_replication_slots_wal_status", slot_name=slot).items()
    }
    assert states.keys() == STATES
    held = [state for state, value in states.items() if value == 1]
    assert sorted(states.values()) == [0] * (4 - len(held)) + [1] * len(held)
    reasons = page.series("pg_replication_slots_invalidation_reason", slot_name=slot)
    assert set(reasons.values()) <= {1}
    return ", ".join([*held, *(dict(labels)["invalidation_reason"] for labels in reasons)]) or "-"


def states_of(server: Server, exporter: Exporter) -> dict[str, str]:
    """The state of each slot on the page, once it is the superuser's."""
    reason = "invalidation_reason" if server.major >= 17 else "null"
    true = {
        slot: ", ".join(word for word in words if word) or "-"
        for slot, *words in server.execute(
            f"select slot_name, wal_status, {reason} from pg_replication_slots where not temporary"
        )
    }
    patience = time.monotonic() + 30
    while True:
        page = exporter.scrape()
        told = {slot: state_of(page, slot) for slot in true}
        # The reasons come from the background.
        if told == true or time.monotonic() > patience:
            return told
        time.sleep(0.05)


def expected(table: str, server: Server) -> Mapping[str, Cells]:
    """The rows of a table that a server's version has, its newer columns absent."""
    newer = {name for name, column in COLUMNS.items() if server.major < column.since}
    rows = {}
    for slot, cells in cells_of(table).items():
        if server.major < ROWS_SINCE.get(slot, 13):
            continue
        state = cells["state"] if server.major >= 17 else cells["state"].partition(",")[0]
        absent = dict.fromkeys(newer & cells.keys(), "-")
        rows[slot] = {**cells, **absent, "state": state}
    return rows


def faults(rows: Mapping[str, Cells], server: Server, write: Callable[[], None]) -> dict[str, str]:
    """The cells that are not what they should be, with what they are."""
    with watching(server) as exporter:
        write()
        first = look(server, exporter)
        write()
        then = look(server, exporter)
        states = states_of(server, exporter)
    assert set(rows) | {"standby"} >= set(first) >= set(rows)
    wrong = {
        f"{slot} {name}": f"is not {cells[name]}: {first[slot][name]}, {then[slot][name]}"
        for slot, cells in rows.items()
        for name in COLUMNS.keys() & cells.keys()
        if not fits(cells[name], first[slot][name], then[slot][name])
    }
    wrong |= {
        f"{slot} state": f"is not {cells['state']}: {states[slot]}"
        for slot, cells in rows.items()
        if states[slot] != cells["state"]
    }
    return wrong


def test_slots_are_told_on_a_primary_as_they_are(slots: Slots) -> None:
    rows = expected(SEEN_ON_THE_PRIMARY, slots.primary)
    assert faults(rows, slots.primary, slots.write) == {}


def test_slots_are_told_on_a_standby_as_they_are(slots: Slots) -> None:
    rows = dict(expected(SEEN_ON_THE_STANDBY, slots.standby))
    if slots.standby.major < LOGICAL_ON_STANDBYS_SINCE:
        rows = {slot: cells for slot, cells in rows.items() if slot.startswith("physical")}
    assert faults(rows, slots.standby, slots.write) == {}


# What becomes of a slot that nobody reads from, physical or logical alike. Without a limit the WAL
# it keeps outgrows max_wal_size; with one it is doomed, and the next checkpoint does it.
LIFE = """
step       retained  xmin  state              safe
fresh      some      some  reserved           -
outgrown   some      some  extended           -
limited    some      some  unreserved         under
forsaken   -         -     lost, wal_removed  -
"""


@pytest.mark.parametrize("major", [13, 18])
def test_a_slot_nobody_reads_from_is_told_on_its_way_down(
    fresh_server: MakeServer, major: int
) -> None:
    server = fresh_server(
        major, autovacuum=False, max_wal_size="32MB", wal_keep_size=0, wal_level="logical"
    )
    server.execute("create table written (n int)")
    physical(server, "physical")
    logical(server, "logical")

    def nothing() -> None:
        pass

    def outgrow() -> None:
        for _ in range(4):
            server.execute("insert into written values (0); select pg_switch_wal()")
        server.execute("checkpoint")

    def limit() -> None:
        server.set({"max_slot_wal_keep_size": "1MB"})

    def forsake() -> None:
        server.execute("checkpoint")

    steps = {"fresh": nothing, "outgrown": outgrow, "limited": limit, "forsaken": forsake}
    for step, cells in expected(LIFE, server).items():
        steps[step]()
        rows = {"physical": {**cells, "xmin": "-"}, "logical": cells}
        assert (step, faults(rows, server, nothing)) == (step, {})


@pytest.mark.parametrize("major", [13, 18])
def test_a_lost_slot_is_not_told_to_keep_rows_that_vacuum_removes(
    fresh_server: MakeServer, major: int
) -> None:
    server = fresh_server(major, autovacuum=False, wal_keep_size=0)
    server.execute("create table written as select generate_series(1, 1000) as n")
    physical(server, "standby")
    ((xid,),) = server.execute("select txid_current()")
    client = read_from(server, "standby")
    # What a standby with hot_standby_feedback says: when, its oldest snapshot, none of catalogs.
    client.put_copy_data(struct.pack("!cqIIII", b"h", 0, xid, 0, 0, 0))
    client.flush()
    server.wait_until("select xmin is not null from pg_replication_slots")
    client.finish()

    def left() -> int:
        server.execute("vacuum written")
        return int(server.execute("select pg_relation_size('written')")[0][0])

    server.execute("delete from written")
    with watching(server) as exporter:
        assert left() > 0
        ((age,),) = server.execute("select age(xmin) from pg_replication_slots")
        page = exporter.scrape()
        assert page.value("pg_replication_slots_xmin_age_xids", slot_name="standby") == age > 0
        assert page.value("pg_xmin_horizon_age_xids", holder="slot") == age

        for _ in range(3):
            server.execute("insert into written values (0); delete from written")
            server.execute("select pg_switch_wal()")
        server.set({"max_slot_wal_keep_size": "1MB"})
        server.execute("checkpoint")
        assert left() == 0
        assert server.execute("select xmin is not null from pg_replication_slots") == [(True,)]
        page = exporter.scrape()
        assert state_of(page, "standby").startswith("lost")
        assert not page.series("pg_replication_slots_xmin_age_xids")
        assert page.value("pg_xmin_horizon_age_xids", holder="slot") == 0
