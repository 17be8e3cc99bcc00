"""Who holds what, who waits, and how far long commands are, made on purpose and then asked."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from psycopg import sql

from lab.catalogue import Row, number, only, refusal_of, rows_of
from lab.cluster import BARE, READER
from lab.postgres import Server

FreshServer = Callable[..., Server]
Connection = psycopg.Connection[tuple[object, ...]]

BURNT = 50
"""Transaction ids used up behind a holder."""


def burn(server: Server) -> None:
    """Use up transaction ids."""
    server.execute(
        f"do $$ begin for i in 1..{BURNT} loop perform txid_current(); commit; end loop; end $$"
    )


@contextmanager
def transaction(server: Server, statement: str) -> Iterator[Connection]:
    """Leave a transaction open after a statement."""
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute("begin isolation level repeatable read")
        connection.execute(statement.encode())
        yield connection
        connection.execute("rollback")


def holders(server: Server) -> set[object]:
    """Who holds back vacuum by what `burn` used up, or more."""
    rows = rows_of(server, "activity.xmin_horizon", role=READER)
    assert [row["holder"] for row in rows] == [
        "backend",
        "prepared_xact",
        "slot",
        "slot_catalog",
        "standby_feedback",
    ]
    return {row["holder"] for row in rows if number(row, "age") >= BURNT}


@pytest.mark.parametrize("major", [13, 18])
def test_each_holder_of_the_xmin_horizon_is_named(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major, wal_level="logical", max_prepared_transactions=2, autovacuum=False)
    standby = server.standby(settings={"wal_receiver_status_interval": 1})
    assert holders(server) == holders(standby) == set()

    with transaction(server, "select 1"):
        burn(server)
        assert holders(server) == {"backend"}
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        # A transaction that has written and looks at nothing now has no snapshot, but its own id.
        connection.execute("begin")
        connection.execute("select txid_current()")
        burn(server)
        assert holders(server) == {"backend"}
        connection.execute("rollback")

    server.execute("create table t ()")
    server.execute("begin; create table u (); prepare transaction 'p'")
    burn(server)
    assert holders(server) == {"prepared_xact"}
    server.execute("rollback prepared 'p'")
    assert holders(server) == set()

    server.execute("select pg_create_logical_replication_slot('decoded', 'pgoutput')")
    burn(server)
    assert holders(server) == {"slot_catalog"}
    server.execute("select pg_drop_replication_slot('decoded')")

    with transaction(standby, "select count(*) from pg_class"):
        standby.set({"hot_standby_feedback": True})
        burn(server)
        server.wait_until(
            f"select max(age(backend_xmin)) >= {BURNT} from pg_stat_replication", timeout=30
        )
        assert holders(server) == {"standby_feedback"}
        standby.wait_until(f"select max(age(backend_xmin)) >= {BURNT} from pg_stat_activity")
        assert holders(standby) == {"backend"}

        server.execute("select pg_create_physical_replication_slot('kept')")
        standby.set({"primary_slot_name": "kept"})
        server.wait_until(f"select max(age(xmin)) >= {BURNT} from pg_replication_slots", timeout=30)
        assert holders(server) == {"slot"}
    server.wait_until(f"select max(age(xmin)) < {BURNT} from pg_replication_slots", timeout=30)
    assert holders(server) == set()


@pytest.mark.parametrize("major", [13, 18])
def test_transaction_ids_are_counted_one_by_one(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major, autovacuum=False)
    before = number(only(rows_of(server, "activity.transaction_ids", role=BARE)), "xmax")

    burn(server)

    after = number(only(rows_of(server, "activity.transaction_ids", role=BARE)), "xmax")
    ((next_id,),) = server.execute("select txid_current()")
    assert after - before == BURNT
    assert after == next_id


@pytest.mark.parametrize("major", [13, 18])
def test_locks_are_told_by_database_and_fill_the_lock_table(server: Server) -> None:
    server.execute("create database locked")
    try:
        before = only(rows_of(server, "activity.lock_table", role=BARE))
        with psycopg.connect(server.conninfo(dbname="locked"), autocommit=True) as connection:
            connection.execute("select pg_advisory_lock(n) from generate_series(1, 300) as n")
            connection.execute("select pg_advisory_lock_shared(1)")
            full = only(rows_of(server, "activity.lock_table", role=BARE))
            connection.execute("begin")
            rows = rows_of(server, "activity.locks", role=BARE)
    finally:
        server.execute("drop database locked with (force)")

    assert 300 <= number(full, "entries") - number(before, "entries") < 320
    assert number(full, "room") > 64 * 100
    found = {
        row["mode"]: row["locks"]
        for row in rows
        if row["datname"] == "locked" and row["locktype"] == "advisory"
    }
    assert found == {"ExclusiveLock": 300, "ShareLock": 1}
    assert {row["datname"] for row in rows if row["locktype"] == "virtualxid"} == {None}


@pytest.mark.parametrize("major", [13, 18])
def test_sessions_have_the_age_of_their_state_and_connection(server: Server) -> None:
    server.execute("create database aged")
    try:
        with (
            psycopg.connect(server.conninfo(dbname="aged"), autocommit=True) as old,
            psycopg.connect(server.conninfo(dbname="aged"), autocommit=True) as young,
        ):
            old.execute("select pg_sleep(0.3)")
            young.execute("select 1")
            rows = [row for row in rows_of(server, "activity.states") if row["datname"] == "aged"]
            ((connected, idle),) = server.execute(
                "select extract(epoch from clock_timestamp() - min(backend_start)),"
                " extract(epoch from clock_timestamp() - min(state_change))"
                " from pg_stat_activity where datname = 'aged'"
            )
    finally:
        server.execute("drop database aged with (force)")

    row = only(rows)
    assert row["state"] == "idle"
    assert 0.3 < number(row, "backend_age") <= float(connected)
    assert 0 <= number(row, "state_age") <= float(idle)


@pytest.mark.parametrize("major", [13, 18])
def test_a_listener_that_reads_nothing_fills_the_notification_queue(server: Server) -> None:
    assert only(rows_of(server, "activity.notifications", role=BARE)) == {"queue_usage": 0}
    with psycopg.connect(server.conninfo(), autocommit=True) as listener:
        listener.execute("listen lab")
        listener.execute("begin")
        server.execute(
            "select pg_notify('lab', repeat('x', 7000) || n) from generate_series(1, 2000) as n"
        )

        usage = number(only(rows_of(server, "activity.notifications", role=BARE)), "queue_usage")

        # Each message has a page of 8 kB; the queue takes 8 GB, from 17 on what its setting says.
        pages = 2000 / 1048576 if server.major >= 17 else 2000 / (32 * 65536 / 2)
        assert usage == pytest.approx(pages, rel=0.1)
        listener.execute("rollback")


SLOW = """
    create function slow(n int) returns int language plpgsql immutable
      as $$ begin return n; end $$;
    create table vacuumed with (autovacuum_enabled = off) as
      select n, repeat('x', 100) as x from generate_series(1, 20000) as n;
    delete from vacuumed where n % 2 = 0;
    create table analyzed with (autovacuum_enabled = off) as
      select n, repeat('x', 100) as x from generate_series(1, 20000) as n;
    create table indexed with (autovacuum_enabled = off) as
      select n from generate_series(1, 1000) as n;
    create table rewritten with (autovacuum_enabled = off) as
      select n from generate_series(1, 1000) as n;
    create index on rewritten (slow(n));
    create or replace function slow(n int) returns int language plpgsql immutable
      as $$ begin perform pg_sleep(60); return n; end $$;
    create table copied (n int)
"""
COMMANDS = {
    "vacuum": "set vacuum_cost_delay = 100; set vacuum_cost_limit = 1; vacuum vacuumed",
    "analyze": "set vacuum_cost_delay = 100; set vacuum_cost_limit = 1; analyze analyzed",
    "create_index": "create index on indexed (slow(n))",
    "cluster": "vacuum full rewritten",
}
"""Statements that take their time, by the view that shows them."""


@contextmanager
def running(server: Server, database: str) -> Iterator[None]:
    """Run the slow commands, and a COPY, each in a session of its own, until we are done."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(COMMANDS)))
        for statement in COMMANDS.values():
            connection = stack.enter_context(
                psycopg.connect(server.conninfo(dbname=database), autocommit=True)
            )
            *settings, last = statement.split("; ")
            for setting in settings:
                connection.execute(setting.encode())
            pool.submit(connection.execute, last.encode())
        copying = stack.enter_context(psycopg.connect(server.conninfo(dbname=database)))
        with copying.cursor() as cursor, cursor.copy("copy copied from stdin") as copy:
            copy.write(b"1\n" * 100_000)
            for view in COMMANDS:
                server.wait_until(
                    sql.SQL("select count(*) = 1 from {} where datname = {}").format(
                        sql.Identifier(f"pg_stat_progress_{view}"), database
                    )
                )
            yield
        copying.rollback()
        server.execute(
            "select pg_cancel_backend(pid) from pg_stat_activity where datname = %s"
            " and state = 'active' and pid <> pg_backend_pid()",
            [database],
        )


def ratio(row: Row, column: str) -> bool:
    return 0 <= number(row, column) < 1


@pytest.mark.parametrize("major", [13, 18])
def test_commands_tell_how_far_they_are_and_by_name_when_they_last(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, autovacuum=False)
    server.execute(SLOW)
    names = {
        "vacuum": "vacuumed",
        "analyze": "analyzed",
        "create_index": "indexed",
        "cluster": "rewritten",
    }
    with running(server, "postgres"):
        young = {view: only(rows_of(server, f"activity.{view}_progress")) for view in COMMANDS}
        for view, row in young.items():
            if number(row, "oldest") < 5:
                assert (row["relid"], row["relname"]) == (None, None), view
        server.wait_until(
            "select count(*) = 4 from pg_stat_activity where state = 'active'"
            " and query ~ '^(vacuum|analyze|create)' and query_start < now() - interval '5.2 s'",
            timeout=30,
        )
        rows = {view: only(rows_of(server, f"activity.{view}_progress")) for view in COMMANDS}
        elsewhere = rows_of(server, "activity.vacuum_progress", dbname="template1")
        if major >= 14:
            copy = only(rows_of(server, "activity.copy_progress"))
            assert (copy["datname"], copy["command"], copy["type"]) == (
                "postgres",
                "COPY FROM",
                "PIPE",
            )
            assert copy["processes"] == 1
            assert 0 < number(copy, "bytes_processed") <= 200_000
            assert copy["share"] is None
        else:
            assert refusal_of(server, "activity.copy_progress") is not None

    for view, row in rows.items():
        ((oid,),) = server.execute(
            "select oid::text from pg_class where relname = %s", [names[view]]
        )
        assert (row["datname"], row["schemaname"], row["relname"], row["relid"]) == (
            "postgres",
            "public",
            names[view],
            oid,
        )
        assert row["processes"] == 1
        assert number(row, "oldest") >= 5
    vacuum = rows["vacuum"]
    ((size,),) = server.execute("select pg_relation_size('vacuumed')")
    assert vacuum["phase"] == "scanning heap"
    assert vacuum["heap"] == size
    assert ratio(vacuum, "scanned")
    assert number(vacuum, "vacuumed") <= number(vacuum, "scanned")
    assert vacuum["index_vacuums"] == 0
    assert ratio(vacuum, "dead_ratio")
    assert ratio(rows["analyze"], "scanned")
    assert rows["analyze"]["ext_stats"] is None
    assert rows["create_index"]["command"] == "CREATE INDEX"
    assert str(rows["create_index"]["phase"]).startswith("building index")
    assert rows["create_index"]["lockers"] == 0
    assert (rows["cluster"]["command"], rows["cluster"]["phase"]) == (
        "VACUUM FULL",
        "rebuilding index",
    )
    assert rows["cluster"]["index_rebuilds"] == 0
    other = only(elsewhere)
    assert (other["datname"], other["relid"]) == ("postgres", vacuum["relid"])
    assert (other["schemaname"], other["relname"]) == (None, None)


@pytest.mark.parametrize("major", [13, 18])
def test_a_relation_that_nobody_can_read_is_told_with_the_age_of_its_holder(
    server: Server,
) -> None:
    server.execute("create database shut")
    try:
        server.execute("create table t (); create table u ()", database="shut")
        with psycopg.connect(server.conninfo(dbname="shut"), autocommit=True) as connection:
            connection.execute("begin")
            connection.execute("lock table t, u in access exclusive mode")
            rows = rows_of(server, "activity.exclusive_locks")
            ((age,),) = server.execute(
                "select extract(epoch from clock_timestamp() - xact_start)"
                " from pg_stat_activity where datname = 'shut'"
            )
    finally:
        server.execute("drop database shut with (force)")

    row = only([row for row in rows if row["datname"] == "shut"])
    assert row["relations"] == 2
    assert 0 < number(row, "age") <= float(age)


@contextmanager
def queue(server: Server, *statements: str) -> Iterator[None]:
    """Have statements wait for a lock, each in a session of its own, one behind the other."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(statements)))
        for number_of, statement in enumerate(statements, 1):
            connection = stack.enter_context(psycopg.connect(server.conninfo(), autocommit=True))
            pool.submit(connection.execute, statement.encode())
            server.wait_until(f"select count(*) = {number_of} from pg_locks where not granted")
        yield
        server.execute(
            "select pg_cancel_backend(pid) from pg_stat_activity where wait_event_type = 'Lock'"
        )


@pytest.mark.parametrize("major", [13, 18])
def test_of_a_queue_for_a_lock_only_the_root_is_named(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, autovacuum=False, max_prepared_transactions=2)
    server.execute("create table t (n int)")
    pile = ("alter table t add m int", *["select * from t"] * 5)
    with transaction(server, "select * from t"), queue(server, *pile):
        row = only(rows_of(server, "activity.blockers", role=READER))
        waits = only(rows_of(server, "activity.lock_waits", role=BARE))

    assert (row["datname"], row["usename"], row["kind"]) == (
        "postgres",
        "postgres",
        "idle in transaction",
    )
    assert row["sessions"] == 1
    assert number(row, "age") > 0
    assert waits["blocked"] == 6
    if major >= 14:  # 13 knows of a waiting query only what its role may see
        assert number(waits, "longest") > 0

    server.execute("begin; lock table t; prepare transaction 'p'")
    with queue(server, "select * from t"):
        row = only(rows_of(server, "activity.blockers", role=READER))
    server.execute("rollback prepared 'p'")

    assert (row["kind"], row["sessions"], row["age"]) == ("prepared transaction", 1, None)
    assert rows_of(server, "activity.blockers", role=READER) == []


@pytest.mark.parametrize("major", [13, 18])
def test_a_wait_that_is_meant_to_be_long_is_no_long_wait(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, autovacuum=False)
    server.execute("create table t (n int)")
    patient = "select pg_advisory_lock(1)", "create index concurrently on t (n)"
    with transaction(server, "select pg_advisory_lock(1) from (select count(*) from t) as read"):
        with queue(server, *patient):
            waits = only(rows_of(server, "activity.lock_waits", role=READER))
        assert (waits["blocked"], waits["longest"]) == (2, 0)
        with queue(server, patient[0], "alter table t add m int"):
            waits = only(rows_of(server, "activity.lock_waits", role=READER))
        assert waits["blocked"] == 2
        assert number(waits, "longest") > 0


def unremovable(server: Server) -> int:
    """How many dead rows of pg_class vacuum must leave, by its own word."""
    notices: list[str] = []
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.add_notice_handler(
            lambda notice: notices.append(f"{notice.message_primary} {notice.message_detail}")
        )
        connection.execute("vacuum verbose pg_catalog.pg_class")
    words = r"(\d+) (?:dead row versions cannot be removed|are dead but not yet removable)"
    (found,) = re.findall(words, " ".join(notices))
    return int(found)


@pytest.mark.parametrize("major", [13, 18])
def test_a_slot_holds_back_vacuum_until_it_has_lost_its_wal(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(
        major,
        autovacuum=False,
        max_slot_wal_keep_size="1MB",
        max_wal_size="32MB",
        wal_keep_size=0,
        wal_level="logical",
    )
    server.execute("select pg_create_logical_replication_slot('decoded', 'pgoutput')")
    server.execute(
        f"do $$ begin for i in 1..{BURNT} loop create table t (); drop table t; commit;"
        " end loop; end $$"
    )
    assert unremovable(server) >= BURNT
    assert holders(server) == {"slot_catalog"}

    for _ in range(4):
        server.execute("select pg_logical_emit_message(false, 'lab', 'x'), pg_switch_wal()")
        server.execute("checkpoint")
    server.wait_until("select wal_status = 'lost' from pg_replication_slots")

    assert unremovable(server) == 0
    assert holders(server) == set()
