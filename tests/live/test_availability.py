"""What is said of the server's state and limits is what the server does."""

from collections.abc import Callable

import pytest
from pgvigil import catalogue
from pgvigil.plan import Facts, Reason, concerning, make_plan

from lab.catalogue import number, only, rows_of
from lab.cluster import BARE, PGVIGIL, Cluster
from lab.postgres import Server

FreshServer = Callable[..., Server]

QUERIES = concerning(catalogue.load(), "postgresql")


@pytest.mark.parametrize("major", [13, 18])
def test_a_checkpoint_notes_every_id_that_was_used_until_then(server: Server) -> None:
    server.execute("create table shared as select 1 as n")
    try:
        server.execute("checkpoint")
        before = only(rows_of(server, "availability.checkpoint"))

        server.execute(
            "do $$ begin for i in 1..200 loop insert into shared values (i); commit;"
            " end loop; end $$"
        )
        ((last,),) = server.execute("select txid_current()")
        # Two lockers of a row make a multixact with two members.
        server.execute(
            "begin; select 1 from shared limit 1 for key share;"
            " savepoint s; select 1 from shared limit 1 for update; commit"
        )
        unmoved = only(rows_of(server, "availability.checkpoint"))
        ((position,),) = server.execute("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")
        server.execute("checkpoint")
        after = only(rows_of(server, "availability.checkpoint"))
    finally:
        server.execute("drop table shared")

    assert unmoved["next_xid"] == before["next_xid"]
    assert number(after, "next_xid") >= last + 1
    assert number(after, "next_xid") - number(before, "next_xid") >= 201
    assert number(after, "next_multixact_id") - number(before, "next_multixact_id") >= 1
    assert number(after, "next_multi_offset") - number(before, "next_multi_offset") >= 2
    assert number(after, "redo_lsn") >= float(position) > number(before, "redo_lsn")
    assert number(after, "checkpoint_time") >= number(before, "checkpoint_time")
    ((age,),) = server.execute("select max(age(datfrozenxid)) from pg_database")
    assert abs(age - number(after, "oldest_xid_age")) <= 3


@pytest.mark.parametrize("major", [13, 18])
def test_a_standby_is_consistent_once_it_has_replayed_what_its_control_file_asks_for(
    cluster: Cluster,
) -> None:
    row = only(rows_of(cluster.standby, "availability.recovery"))

    ((replayed,),) = cluster.standby.execute(
        "select pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')"
    )
    assert 0 < number(row, "min_recovery_end_lsn") <= float(replayed)
    assert row["backup"] is False


@pytest.mark.parametrize("major", [13, 18])
def test_limits_are_told_to_everybody_and_who_uses_them_to_those_who_may_know(
    server: Server,
) -> None:
    server.execute("create database narrow connection limit 3")
    try:
        for query, label, name, limit in (
            ("availability.database_limits", "datname", "narrow", 3),
            ("availability.role_limits", "rolname", "pgvigil", 5),
        ):
            rows = {row[label]: row for row in rows_of(server, query, role=BARE)}
            assert rows[name] == {label: name, "connection_limit": limit}
            rows = {row[label]: row for row in rows_of(server, query, role=PGVIGIL)}
            # Our own connection counts against our role's limit.
            used = 1 if label == "rolname" else 0
            assert rows[name] == {label: name, "connection_limit": limit, "connections": used}
    finally:
        server.execute("drop database narrow")


@pytest.mark.parametrize("major", [13, 18])
def test_a_promotion_shows_in_the_timeline_at_once(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major)
    assert only(rows_of(server, "availability.state"))["timeline_id"] == 1
    standby = server.standby()
    assert only(rows_of(standby, "availability.state"))["timeline_id"] == 1
    assert only(rows_of(standby, "availability.state"))["in_recovery"] is True

    standby.promote()

    row = only(rows_of(standby, "availability.state"))
    assert (row["timeline_id"], row["in_recovery"]) == (2, False)


@pytest.mark.parametrize("in_recovery", [False, True])
def test_on_aurora_only_what_its_functions_give_is_lost(in_recovery: bool) -> None:
    wanted = [need for q in QUERIES for need in (q.needs, *(m.needs for m in q.metrics))]
    facts = Facts(
        version=160004,
        in_recovery=in_recovery,
        provider="aurora",
        privileges=frozenset(name for need in wanted for name in need.privilege),
        functions=frozenset(name for need in wanted for name in need.function),
    )
    plan = make_plan(QUERIES, facts)

    areas = ("availability", "activity", "replication", "backup", "resources")
    refused = {r.query.name for r in plan.refusals if r.reason is Reason.PROVIDER}
    lost = {
        loss.metric.name
        for loss in plan.losses
        if loss.reason is Reason.PROVIDER and loss.query.area in areas
    }
    both = {
        *("availability.checkpoint", "backup.archive_status", "backup.recoverable"),
        *("replication.positions", "replication.sender_lags", "resources.wal_directory"),
    }
    standby = {
        *("availability.recovery", "replication.receiver", "replication.receiver_status"),
        *("replication.replay", "replication.replay_state", "replication.upstream"),
        "replication.wal_receiver",
    }
    assert {name for name in refused if name.partition(".")[0] in areas} == both | (
        standby if in_recovery else set()
    )
    assert lost == {
        *("pg_timeline_id", "pg_archiving_unarchived_bytes"),
        *("pg_replication_slots_retained_bytes", "pg_replication_slots_confirmed_flush_lag_bytes"),
    }
