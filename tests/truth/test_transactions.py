"""Who counts as a long transaction, and who holds back vacuum, for each kind of process."""

import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import psycopg
import pytest
from psycopg import pq

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

BURNT = 200
"""Transaction ids used up behind a holder, so that it shows."""

TRANSACTION = "pg_stat_activity_oldest_transaction_seconds"
QUERY = "pg_stat_activity_oldest_query_seconds"
IDLE = "pg_stat_activity_oldest_idle_in_transaction_seconds"
XMIN = "pg_stat_activity_oldest_xmin_age_xids"

Actor = Callable[[Server], AbstractContextManager[int]]
"""Makes a process do something and gives its process id, 0 for none."""


class Watched(NamedTuple):
    """A server with a database for the actors, and the exporter that watches it."""

    server: Server
    exporter: Exporter


@pytest.fixture(scope="module", params=[13, 18])
def watched(
    request: pytest.FixtureRequest, module_server: Callable[..., Server]
) -> Iterator[Watched]:
    server = module_server(
        request.param,
        autovacuum=False,
        # Where it is on, it shall come to no table that does not ask for it.
        autovacuum_analyze_threshold=2**31 - 1,
        autovacuum_vacuum_insert_threshold=-1,
        autovacuum_vacuum_scale_factor=0,
        autovacuum_vacuum_threshold=2**31 - 1,
        autovacuum_naptime="1s",
        autovacuum_vacuum_cost_delay="100ms",
        autovacuum_vacuum_cost_limit=1,
        max_prepared_transactions=2,
        wal_level="logical",
        wal_receiver_status_interval=1,
    )
    server.execute("create database watched")
    server.execute("create table probe ()", database="watched")
    server.execute("create database subscriber template watched")
    server.execute(
        "create table rows with (autovacuum_enabled = off) as"
        " select n, repeat('x', 100) as x from generate_series(1, 20000) as n;"
        " create table sent (n int primary key)",
        database="watched",
    )
    disable = "storage schema maintenance security extensions settings queries"
    environment = {"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login), "PGVIGIL_DISABLE": disable}
    with Exporter(environment=environment) as exporter:
        yield Watched(server, exporter)


@contextmanager
def client(
    server: Server, *statements: str, running: str = "", name: str = "application"
) -> Iterator[int]:
    """Leave a session as some statements leave it, or at one that runs."""
    dsn = server.conninfo(dbname="watched", application_name=name)
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        for statement in statements:
            with suppress(psycopg.errors.DivisionByZero):
                connection.execute(statement.encode())
        pid = connection.info.backend_pid
        if running:
            connection.pgconn.send_query(running.encode())
            server.wait_until(
                f"select state = 'active' and backend_xmin is not null"
                f" from pg_stat_activity where pid = {pid}"
            )
        try:
            yield pid
        finally:
            server.execute("select pg_terminate_backend(%s)", [pid])


def session(*statements: str, running: str = "", name: str = "application") -> Actor:
    return lambda server: client(server, *statements, running=running, name=name)


@contextmanager
def parallel_query(server: Server) -> Iterator[int]:
    """A query whose leader and workers sleep."""
    settings = (
        "set min_parallel_table_scan_size = 0",
        "set parallel_setup_cost = 0",
        "set parallel_tuple_cost = 0",
    )
    sleep = "select count(*) from rows where pg_sleep(60) is not null"
    with client(server, *settings, running=sleep) as pid:
        server.wait_until(
            "select count(*) > 0 from pg_stat_activity where backend_type = 'parallel worker'"
        )
        yield pid


@contextmanager
def replication(server: Server, command: str, database: str = "") -> Iterator[int]:
    """A WAL sender that has been given a command."""
    dsn = server.conninfo(replication="database" if database else "true", dbname=database or None)
    connection = pq.PGconn.connect(dsn.encode())
    assert connection.status == pq.ConnStatus.OK, connection.error_message
    try:
        connection.send_query(command.encode())
        connection.flush()
        yield connection.backend_pid
    finally:
        connection.finish()


@contextmanager
def physical_sender(server: Server) -> Iterator[int]:
    """What a standby has of a server for months."""
    ((position,),) = server.execute("select pg_current_wal_flush_lsn()")
    with replication(server, f"START_REPLICATION PHYSICAL {position}") as pid:
        server.wait_until(f"select state = 'active' from pg_stat_activity where pid = {pid}")
        yield pid


@contextmanager
def base_backup(server: Server) -> Iterator[int]:
    """A base backup so slow that it is not over before we are."""
    options = (
        "(MAX_RATE 32, CHECKPOINT 'fast')" if server.major >= 15 else "MAX_RATE 32 FAST NOWAIT"
    )
    with replication(server, f"BASE_BACKUP {options}") as pid:
        server.wait_until(
            f"select backup_streamed > 0 from pg_stat_progress_basebackup where pid = {pid}", 60
        )
        yield pid


@contextmanager
def first_copy(server: Server) -> Iterator[int]:
    """The sender of a table's first copy, which holds a snapshot until the table is copied."""
    copy = "begin isolation level repeatable read; select 1"
    with replication(server, copy, "watched") as pid:
        server.wait_until(
            f"select state = 'idle in transaction' from pg_stat_activity where pid = {pid}"
        )
        yield pid


WORKER = (
    "select {} from pg_stat_activity where datname = 'subscriber'"
    " and backend_type like 'logical replication%worker'"
)


@contextmanager
def subscription(server: Server) -> Iterator[None]:
    """Publish a table of one database to another one of the same server."""
    server.execute("truncate sent", database="watched")
    server.execute("create publication sent for table sent", database="watched")
    server.execute("create table sent (n int primary key)", database="subscriber")
    # In a session of its own: it waits for transactions that have written.
    server.execute(
        "select pg_create_logical_replication_slot('sent', 'pgoutput')", database="watched"
    )
    server.execute(
        f"create subscription sent connection '{server.conninfo(dbname='watched')}'"
        " publication sent with (create_slot = false, slot_name = sent, copy_data = false)",
        database="subscriber",
    )
    try:
        server.wait_until("select count(*) > 0 from pg_stat_replication where state = 'streaming'")
        yield
    finally:
        server.execute("alter subscription sent disable", database="subscriber")
        server.wait_until("select not bool_or(active) from pg_replication_slots")
        server.execute("alter subscription sent set (slot_name = none)", database="subscriber")
        server.execute("drop subscription sent", database="subscriber")
        server.execute("drop table sent", database="subscriber")
        server.execute("select pg_drop_replication_slot('sent')")
        server.execute("drop publication sent", database="watched")


@contextmanager
def logical_sender(server: Server) -> Iterator[int]:
    """What a subscriber has of its publisher as long as both live."""
    with subscription(server):
        ((pid,),) = server.execute("select pid from pg_stat_replication")
        yield pid


@contextmanager
def idle_apply_worker(server: Server) -> Iterator[int]:
    """A worker that has applied everything."""
    with subscription(server):
        server.execute("insert into sent values (1)", database="watched")
        server.wait_until(
            "select bool_and(replay_lsn >= pg_current_wal_flush_lsn()) from pg_stat_replication"
        )
        ((pid,),) = server.execute(WORKER.format("pid"))
        yield pid


@contextmanager
def stuck_apply_worker(server: Server) -> Iterator[int]:
    """A worker that stands in the middle of a transaction."""
    with subscription(server):
        server.execute(
            "create function stand() returns trigger language plpgsql as $$"
            " begin perform pg_catalog.pg_sleep(600); return new; end $$;"
            " create trigger stand after insert on sent for each row execute function stand();"
            " alter table sent enable always trigger stand",
            database="subscriber",
        )
        server.execute("insert into sent values (1)", database="watched")
        server.wait_until(WORKER.format("xact_start is not null and wait_event = 'PgSleep'"))
        ((pid,),) = server.execute(WORKER.format("pid"))
        try:
            yield pid
        finally:
            server.execute("alter subscription sent disable", database="subscriber")
            server.execute("select pg_terminate_backend(%s)", [pid])
            server.wait_until(WORKER.format("count(*) = 0"))
            server.execute("drop function stand cascade", database="subscriber")


ORDINARY = (
    "update rows set n = n;"
    " alter table rows set (autovacuum_enabled = on, autovacuum_vacuum_threshold = 0)"
)
TO_PREVENT_WRAPAROUND = "alter table rows set (autovacuum_freeze_max_age = 100000)"
"""Comes though autovacuum is off for the table."""


@contextmanager
def autovacuum_worker(server: Server, because: str) -> Iterator[int]:
    """A worker at a table, slowed down as far as it can be."""
    server.execute(because, database="watched")
    burn(server, 101_000)
    marked = "%rows (to prevent wraparound)" if because == TO_PREVENT_WRAPAROUND else "%rows"
    find = (
        "select a.pid from pg_stat_activity as a join pg_stat_progress_vacuum as v using (pid)"
        f" where a.backend_type = 'autovacuum worker' and a.query like '{marked}'"
        " and v.phase = 'scanning heap'"
    )
    server.set({"autovacuum": True})
    try:
        server.wait_until(f"select exists ({find})", 60)
        ((pid,),) = server.execute(find)
        yield pid
    finally:
        server.set({"autovacuum": False})
        workers = "from pg_stat_activity where backend_type = 'autovacuum worker'"
        server.execute(f"select pg_terminate_backend(pid) {workers}")
        server.wait_until(f"select count(*) = 0 {workers}")
        server.execute(
            "alter table rows reset (autovacuum_freeze_max_age, autovacuum_vacuum_threshold),"
            " set (autovacuum_enabled = off)",
            database="watched",
        )


@contextmanager
def prepared(server: Server) -> Iterator[int]:
    """A transaction that nobody finishes and no process has."""
    server.execute("begin; create table p (); prepare transaction 'p'", database="watched")
    try:
        yield 0
    finally:
        server.execute("rollback prepared 'p'", database="watched")


@dataclass(frozen=True)
class Cell:
    """What is to be seen of an actor."""

    actor: Actor
    processes: tuple[str, ...] = ()
    """The kinds of process that must be counted."""
    counts: frozenset[str] = frozenset()
    """The ages it counts in."""
    state: str = ""
    """It is one more session in this state, if any."""
    kind: str = "query"
    holder: str = ""
    """What holds back vacuum: a label of pg_xmin_horizon_age_xids."""


SNAPSHOT = "begin isolation level repeatable read"
SLEEP = "select pg_sleep(600)"
VACUUM = "vacuum rows"
SENDER = ("walsender",)
AUTOVACUUM = ("autovacuum worker",)
SLOW_VACUUM = ("set vacuum_cost_delay = 100", "set vacuum_cost_limit = 1")

CELLS = {
    "an active client": Cell(
        session(running=SLEEP),
        counts=frozenset({TRANSACTION, QUERY, XMIN}),
        state="active",
        holder="backend",
    ),
    "an active client in a longer transaction": Cell(
        session("begin", "select 1", running=SLEEP),
        counts=frozenset({TRANSACTION, QUERY, XMIN}),
        state="active",
        holder="backend",
    ),
    "a client idle in transaction without a snapshot": Cell(
        session("begin", "select 1"),
        counts=frozenset({TRANSACTION, IDLE}),
        state="idle in transaction",
    ),
    "a client idle in transaction with a snapshot": Cell(
        session(SNAPSHOT, "select 1"),
        counts=frozenset({TRANSACTION, IDLE, XMIN}),
        state="idle in transaction",
        holder="backend",
    ),
    "a client idle in transaction that has written": Cell(
        session("begin", "select txid_current()"),
        counts=frozenset({TRANSACTION, IDLE, XMIN}),
        state="idle in transaction",
        holder="backend",
    ),
    "a client idle in a failed transaction": Cell(
        session("begin", "select 1 / 0"),
        # PostgreSQL forgets when it began; nothing is held any more.
        counts=frozenset({IDLE}),
        state="idle in transaction (aborted)",
    ),
    "an idle client": Cell(session(SLEEP.replace("600", "0")), state="idle"),
    "a dump": Cell(
        session(SNAPSHOT, "select 1", name="pg_dump"),
        counts=frozenset({TRANSACTION, IDLE, XMIN}),
        state="idle in transaction",
        kind="backup",
        holder="backend",
    ),
    "a client that vacuums": Cell(
        session(*SLOW_VACUUM, running=VACUUM),
        counts=frozenset({TRANSACTION, QUERY}),
        state="active",
        kind="maintenance",
    ),
    "a query with parallel workers": Cell(
        parallel_query,
        ("parallel worker",),
        counts=frozenset({TRANSACTION, QUERY, XMIN}),
        state="active",
        holder="backend",
    ),
    "the sender of a standby": Cell(physical_sender, SENDER),
    "the sender of a subscriber": Cell(logical_sender, SENDER),
    "the sender of a table's first copy": Cell(first_copy, SENDER, holder="standby_feedback"),
    "a base backup": Cell(base_backup, SENDER),
    "an idle apply worker": Cell(idle_apply_worker),
    "an apply worker in a transaction": Cell(stuck_apply_worker, holder="backend"),
    "autovacuum": Cell(lambda s: autovacuum_worker(s, ORDINARY), AUTOVACUUM),
    "autovacuum to prevent wraparound": Cell(
        lambda s: autovacuum_worker(s, TO_PREVENT_WRAPAROUND), AUTOVACUUM
    ),
    "a prepared transaction": Cell(prepared, holder="prepared_xact"),
    "another exporter of ours": Cell(session("begin", "select 1", name="pgvigil")),
}


def burn(server: Server, count: int = BURNT) -> None:
    """Use up transaction ids."""
    server.execute(
        f"do $$ begin for i in 1..{count} loop perform txid_current(); commit; end loop; end $$"
    )


def seen(server: Server, pid: int) -> dict[str, float | None]:
    """The ages of a process as the server tells them to its superuser."""
    rows = server.execute(
        "select extract(epoch from clock_timestamp() - xact_start),"
        " extract(epoch from clock_timestamp() - query_start),"
        " extract(epoch from clock_timestamp() - state_change),"
        " greatest(age(backend_xid), age(backend_xmin))"
        " from pg_stat_activity where pid = %s",
        [pid],
    )
    (row,) = rows or [(None,) * 4]
    values = (None if value is None else float(value) for value in row)
    return dict(zip((TRANSACTION, QUERY, IDLE, XMIN), values, strict=True))


def held_back(server: Server, database: str) -> int:
    """How many transactions behind the newest vacuum stops in a database, by its own word."""
    notices: list[str] = []
    dsn = server.conninfo(dbname=database, application_name="lab")
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        connection.add_notice_handler(
            lambda notice: notices.append(f"{notice.message_primary} {notice.message_detail}")
        )
        connection.execute("vacuum verbose probe")
        newest = connection.execute("select txid_snapshot_xmax(txid_current_snapshot())").fetchone()
    said = re.search(r"(?:oldest xmin|removable cutoff): (\d+)", " ".join(notices))
    assert said
    assert newest
    return int(newest[0]) - int(said[1])


def told(page: Page, name: str) -> dict[tuple[str, str], float]:
    """What of an age is not 0, by database and kind."""
    found = {
        (dict(key)["datname"], dict(key)["kind"]): value for key, value in page.series(name).items()
    }
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize("cell", CELLS.values(), ids=[*CELLS])
def test_only_clients_count_as_long_transactions_and_every_holder_of_xmin_is_told(
    watched: Watched, cell: Cell
) -> None:
    server, exporter = watched
    server.wait_until("select count(*) = 0 from pg_stat_activity where datname = 'watched'")
    with cell.actor(server) as pid:
        burn(server)
        before = seen(server, pid)
        page = exporter.scrape()
        after = seen(server, pid)
        behind = max(held_back(server, "watched"), held_back(server, "subscriber"))

    for name in (TRANSACTION, QUERY, IDLE, XMIN):
        found = told(page, name)
        assert found.keys() == ({("watched", cell.kind)} if name in cell.counts else set()), name
        for value in found.values():
            earlier, later = before[name], after[name]
            assert earlier is not None
            assert later is not None
            assert earlier <= value <= later
            assert name != XMIN or value >= BURNT

    held = {
        dict(key)["holder"]: value
        for key, value in page.series("pg_xmin_horizon_age_xids").items()
        # What a logical slot keeps of the catalogs is another test's.
        if dict(key)["holder"] != "slot_catalog"
    }
    assert {name for name, age in held.items() if age >= BURNT} == ({cell.holder} - {""})
    assert (behind >= BURNT) == bool(cell.holder)
    if cell.holder:
        assert BURNT <= held[cell.holder] <= behind

    sessions = {
        dict(key)["state"]: value
        for key, value in page.series("pg_stat_activity_sessions", datname="watched").items()
    }
    assert sessions == ({cell.state: 1} if cell.state else {})
    # There was something to count, and it is told where it belongs.
    assert cell.actor is prepared or any(before.values())
    for backend_type in cell.processes:
        assert page.value("pg_stat_activity_processes", backend_type=backend_type) >= 1


@contextmanager
def login(server: Server) -> Iterator[None]:
    """A client that has been asked for its password and has not given it yet."""
    words = struct.pack("!i", 3 << 16) + b"user\0bare\0database\0watched\0\0"
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(struct.pack("!i", 4 + len(words)) + words)
        assert client.recv(1) == b"R"
        yield


def test_a_client_that_is_still_logging_in_has_no_transaction(watched: Watched) -> None:
    server, exporter = watched
    server.wait_until("select count(*) = 0 from pg_stat_activity where datname = 'watched'")
    with login(server):
        ((there,),) = server.execute(
            "select count(*) from pg_stat_activity"
            " where backend_type = 'client backend' and datid is null and xact_start is not null"
        )
        page = exporter.scrape()

    assert there == (server.major >= 18)
    for name in (TRANSACTION, QUERY, IDLE, XMIN):
        assert told(page, name) == {}, name


def test_a_prepared_transaction_is_as_old_as_the_server_says(watched: Watched) -> None:
    server, exporter = watched

    def age() -> float:
        query = "select extract(epoch from clock_timestamp() - prepared) from pg_prepared_xacts"
        return float(server.execute(query)[0][0])

    with prepared(server):
        burn(server)
        before = age()
        page = exporter.scrape()
        after = age()
    gone = exporter.scrape()

    assert page.value("pg_prepared_xacts") == 1
    assert before <= page.value("pg_prepared_xacts_oldest_seconds") <= after
    assert page.value("pg_prepared_xacts_oldest_xmin_age_xids") == BURNT + 1
    assert gone.value("pg_prepared_xacts") == gone.value("pg_prepared_xacts_oldest_seconds") == 0
    assert gone.value("pg_prepared_xacts_oldest_xmin_age_xids") == 0


def test_the_exporters_own_sessions_take_room_and_nothing_else(watched: Watched) -> None:
    server, exporter = watched
    exporter.scrape()
    ours = "select count(*) from pg_stat_activity where application_name like 'pgvigil%'"
    server.wait_until(f"select ({ours}) = 2")
    others = "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    server.wait_until(f"select ({others} and pid <> pg_backend_pid()) = 2")
    page = exporter.scrape()

    assert page.value("pg_connections_used") >= 2
    for name in (TRANSACTION, QUERY, IDLE, XMIN):
        assert told(page, name) == {}
