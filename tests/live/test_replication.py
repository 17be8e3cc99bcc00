"""Both ends of replication are told as they are: idle, paused, cut off, promoted, half copied."""

import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from lab.catalogue import Row, number, only, refusal_of, rows_of
from lab.cluster import READER, Cluster
from lab.postgres import Server

FreshServer = Callable[..., Server]


def position(server: Server, function: str = "pg_current_wal_lsn") -> float:
    """A position in WAL in bytes, by the function that gives it."""
    ((found,),) = server.execute(
        sql.SQL("select pg_wal_lsn_diff({}(), '0/0')").format(sql.Identifier(function))
    )
    return float(found)


def true_of(rows: list[Row], label: str) -> list[object]:
    """Of rows that tell one state each, those that say yes."""
    return [row[label] for row in rows if row["matches"]]


def caught_up(primary: Server, standby: Server) -> None:
    lsn = primary.execute("select pg_current_wal_lsn()::text")[0][0]
    standby.wait_until(f"select pg_last_wal_replay_lsn() >= '{lsn}'")


def comes_to(server: Server, query: str, expected: dict[str, float]) -> None:
    """Ask a query until it says so.

    Nobody writes, and still there is new WAL now and then: who reads a page first writes its hint
    bits, which checksums (18 has them unless told) put into WAL whole, and the background writer
    logs what runs.
    """
    patience = time.monotonic() + 30
    while expected.items() - (row := only(rows_of(server, query))).items():
        assert time.monotonic() < patience, row
        time.sleep(0.02)


def until(server: Server, query: str, database: str) -> None:
    """Wait for what only one database knows."""
    patience = time.monotonic() + 30
    while not server.execute(query, database=database)[0][0]:
        assert time.monotonic() < patience, query
        time.sleep(0.02)


@pytest.mark.parametrize("major", [13, 18])
def test_a_standby_is_known_idle_paused_cut_off_and_promoted(
    fresh_server: FreshServer, major: int
) -> None:
    primary = fresh_server(major, autovacuum=False)
    standby = primary.standby(
        slot="kept", settings={"wal_receiver_timeout": "1s", "wal_retrieve_retry_interval": "100ms"}
    )
    primary.execute("create table t (n int)")
    caught_up(primary, standby)

    # Idle: however old the last commit, nothing is late.
    row = only(rows_of(standby, "replication.wal_receiver", role=READER))
    assert (row["up"], row["lag"]) == (1, 0)
    assert true_of(rows_of(standby, "replication.receiver_status"), "status") == ["streaming"]
    received = only(rows_of(standby, "replication.receiver"))
    at = position(primary)
    assert number(received, "written") == number(received, "flushed") <= at
    assert number(received, "latest_end") <= at
    assert abs(number(received, "receipt") - number(received, "sent")) < 60
    sender = only(rows_of(primary, "replication.senders"))
    assert (sender["senders"], sender["sync_priority"], sender["state"]) == (1, 0, "streaming")
    ((started,),) = primary.execute(
        "select extract(epoch from backend_start) from pg_stat_replication"
    )
    assert number(sender, "started") == float(started)
    nothing = dict.fromkeys(("sent_bytes", "flush_bytes", "replay_bytes", "replay_seconds"), 0.0)
    comes_to(primary, "replication.sender_lags", nothing)

    # Paused: what was received and not replayed is late, on both ends.
    standby.execute("select pg_wal_replay_pause()")
    if major >= 14:
        standby.wait_until("select pg_get_wal_replay_pause_state() = 'paused'")
        assert true_of(rows_of(standby, "replication.replay_state"), "state") == ["paused"]
    else:
        assert refusal_of(standby, "replication.replay_state") is not None
    primary.execute("insert into t select generate_series(1, 20000)")
    at = position(primary)
    comes_to(primary, "replication.sender_lags", {"flush_bytes": 0.0})
    replay = only(rows_of(standby, "replication.replay"))
    lags = only(rows_of(primary, "replication.sender_lags"))
    replayed = position(standby, "pg_last_wal_replay_lsn")
    most = position(primary) - replayed
    assert replay["paused"] is True
    assert 1e6 < at - replayed <= number(replay, "backlog") <= number(lags, "replay_bytes") <= most
    assert number(only(rows_of(standby, "replication.wal_receiver")), "lag") > 0
    standby.execute("select pg_wal_replay_resume()")
    comes_to(standby, "replication.wal_receiver", {"lag": 0.0})

    # Cut off: nothing comes any more, and no number stays as it was.
    primary.pause()
    standby.wait_until(
        "select not exists (select from pg_stat_wal_receiver where status = 'streaming')"
    )
    row = only(rows_of(standby, "replication.wal_receiver"))
    assert row["up"] == 0
    first = number(row, "lag")
    assert first > 0
    assert number(only(rows_of(standby, "replication.wal_receiver")), "lag") > first
    assert "streaming" not in true_of(rows_of(standby, "replication.receiver_status"), "status")

    # Promoted: nothing of a standby is left.
    standby.promote()
    for query in ("replay", "wal_receiver", "receiver", "receiver_status", "upstream"):
        assert refusal_of(standby, f"replication.{query}") == (
            "role: runs on a standby, this is a primary"
        )
    row = only(rows_of(standby, "replication.positions"))
    assert number(row, "current_lsn") == position(standby)
    assert (row["receive_lsn"], row["replay_lsn"]) == (None, None)
    primary.resume()


@pytest.mark.parametrize("major", [15, 18])
def test_reading_ahead_of_replay_is_counted(cluster: Cluster) -> None:
    view = "select prefetch + hit + skip_init + skip_new + skip_fpw + skip_rep from"
    view += " pg_stat_recovery_prefetch"
    ((before,),) = cluster.standby.execute(view)
    row = only(rows_of(cluster.standby, "replication.recovery_prefetch"))
    ((after,),) = cluster.standby.execute(view)

    kinds = ("prefetch", "hit", "skip_init", "skip_new", "skip_fpw", "skip_rep")
    assert before <= sum(number(row, kind) for kind in kinds) <= after
    assert refusal_of(cluster.primary, "replication.recovery_prefetch") is not None


@pytest.mark.parametrize("major", [13, 18])
def test_a_slot_says_what_decodes_it(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major, wal_level="logical", autovacuum=False)
    server.execute("select pg_create_logical_replication_slot('decoded', 'pgoutput')")
    server.execute("select pg_create_physical_replication_slot('kept', true)")
    server.execute("create table t as select generate_series(1, 1000)")
    at = position(server)

    info = {row["slot_name"]: row for row in rows_of(server, "replication.slot_info")}
    slots = {row["slot_name"]: row for row in rows_of(server, "replication.slots")}

    assert (info["decoded"]["plugin"], info["decoded"]["datname"]) == ("pgoutput", "postgres")
    assert (info["kept"]["plugin"], info["kept"]["datname"]) == (None, None)
    for name, slot in slots.items():
        ((kept,),) = server.execute(
            "select pg_wal_lsn_diff(restart_lsn, '0/0') from pg_replication_slots"
            " where slot_name = %s",
            [name],
        )
        assert at - float(kept) <= number(slot, "retained") <= position(server) - float(kept)
        if major >= 14:
            assert slot["two_phase"] is False
    assert slots["kept"]["unconfirmed"] is None
    assert number(slots["decoded"], "unconfirmed") > 0


@pytest.mark.parametrize("major", [13, 18])
def test_a_subscription_tells_what_is_copied_and_applied(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, wal_level="logical", autovacuum=False)
    for name in ("source", "sink"):
        server.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        server.execute("create table good (n int); create table bad (n int)", database=name)
    server.execute(
        "alter table bad add m int; insert into good values (1); insert into bad values (1, 2);"
        " create publication named for table good, bad;"
        " create publication all_of_it for all tables",
        database="source",
    )
    if major >= 15:
        server.execute("create publication whole for tables in schema public", database="source")
    server.execute("alter table bad add constraint never check (n > 5)", database="sink")
    server.execute("select pg_create_logical_replication_slot('s', 'pgoutput')", database="source")
    server.execute(
        sql.SQL(
            "create subscription s connection {} publication named with (create_slot = false)"
        ).format(server.conninfo(dbname="source")),
        database="sink",
    )
    until(server, "select count(*) = 1 from pg_subscription_rel where srsubstate = 'r'", "sink")
    server.execute("insert into good values (2)", database="source")
    server.wait_until(
        "select count(*) = 1 from pg_replication_origin_status"
        " where external_id !~ '^pg_[0-9]+_[0-9]+$' and remote_lsn > '0/0'"
    )

    states = rows_of(server, "replication.subscription_relations", dbname="sink", role=READER)
    assert {str(row["state"]): row["relations"] for row in states}["ready"] == 1
    assert sum(number(row, "relations") for row in states) == 2
    assert {row["subname"] for row in states} == {"s"}
    assert rows_of(server, "replication.subscription_relations", dbname="source") == []

    published = {
        row["pubname"]: row
        for row in rows_of(server, "replication.publications", dbname="source", role=READER)
    }
    expected = {"named": (False, 2, 0), "all_of_it": (True, 0, 0)}
    if major >= 15:
        expected["whole"] = (False, 0, 1)
    assert {
        name: (row["all_tables"], row["relations"], row.get("schemas", 0))
        for name, row in published.items()
    } == expected

    row = only(rows_of(server, "replication.subscriptions"))
    assert (row["datname"], row["subname"], row["enabled"], row["up"]) == ("sink", "s", True, True)
    assert 0 < number(row, "latest_end") <= number(row, "received") <= position(server)

    if major < 14:
        assert refusal_of(server, "replication.origins", role=None) is not None
    else:
        # It is for superusers, and for whom they grant it.
        assert refusal_of(server, "replication.origins") is not None
        server.execute("grant execute on function pg_show_replication_origin_status to pgvigil")
        origin = only(rows_of(server, "replication.origins"))
        ((remote,),) = server.execute(
            "select pg_wal_lsn_diff(remote_lsn, '0/0') from pg_replication_origin_status"
            " where external_id = %s",
            [origin["external_id"]],
        )
        assert (origin["subname"], origin["remote_lsn"]) == ("s", float(remote))
    server.execute("drop subscription s", database="sink")


@pytest.mark.parametrize("major", [15, 18])
def test_files_of_logical_decoding_are_those_of_the_file_system(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, wal_level="logical", autovacuum=False)
    empty = {"files": 0, "bytes": 0, "mapping_files": 0, "mapping_bytes": 0}
    assert only(rows_of(server, "replication.logical_files")) == empty
    server.execute("select pg_create_logical_replication_slot('s', 'pgoutput')")
    server.execute("create table t ()")
    server.execute("checkpoint")
    server.execute("create publication p for all tables")
    server.execute(
        "select count(*) from pg_logical_slot_peek_binary_changes('s', null, null,"
        " 'proto_version', '1', 'publication_names', 'p')"
    )

    row = only(rows_of(server, "replication.logical_files"))

    sizes = [p.stat().st_size for p in Path(server.data, "pg_logical/snapshots").iterdir()]
    assert (row["files"], row["bytes"]) == (len(sizes), sum(sizes))
    assert sizes


@pytest.mark.parametrize("major", [13, 18])
def test_a_query_that_stands_in_the_way_of_replay_is_counted_by_its_cause(
    cluster: Cluster,
) -> None:
    def counts() -> dict[str, float]:
        rows = rows_of(cluster.standby, "replication.conflicts")
        row = only([row for row in rows if row["datname"] == "postgres"])
        return {column: number(row, column) for column in row if column != "datname"}

    cluster.primary.execute("create table contested ()")
    caught_up(cluster.primary, cluster.standby)
    before = counts()
    cluster.standby.set({"max_standby_streaming_delay": 0})
    try:
        with psycopg.connect(cluster.standby.conninfo()) as connection:
            connection.execute("select * from contested")
            cluster.primary.execute("drop table contested")
            cluster.standby.wait_until(
                f"select confl_lock > {before['confl_lock']} from pg_stat_database_conflicts"
                " where datname = 'postgres'",
                timeout=30,
            )
            connection.close()
    finally:
        cluster.standby.set({"max_standby_streaming_delay": None})

    assert counts() == {**before, "confl_lock": before["confl_lock"] + 1}
