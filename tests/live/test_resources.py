"""Files, buffers, shared memory and functions are counted as the machine and server have them."""

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from lab.catalogue import number, only, refusal_of, rows_of
from lab.cluster import BARE, READER, Cluster
from lab.postgres import Server

FreshServer = Callable[..., Server]


def listed(directory: Path) -> tuple[int, int]:
    """How many files a directory holds, and their size."""
    sizes = [path.stat().st_size for path in directory.iterdir() if path.is_file()]
    return len(sizes), sum(sizes)


@pytest.mark.parametrize("major", [13, 18])
def test_wal_temporary_and_log_files_are_those_of_the_file_system(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(
        major, logging_collector=True, autovacuum=False, allow_in_place_tablespaces=True
    )
    server.execute("select pg_switch_wal()")
    row = only(rows_of(server, "resources.wal_directory"))
    assert (row["files"], row["bytes"]) == listed(server.data / "pg_wal")

    row = only(rows_of(server, "resources.log_directory"))
    assert row["files"] == listed(server.data / "log")[0] == 1
    assert 0 < number(row, "bytes") <= listed(server.data / "log")[1]

    assert only(rows_of(server, "resources.temporary_files")) == {
        "spcname": "pg_default",
        "files": 0,
        "bytes": 0,
    }
    with psycopg.connect(server.conninfo()) as connection:
        connection.execute("set work_mem = '64kB'")
        connection.execute(
            "declare c cursor for select n from generate_series(1, 300000) as n order by n desc"
        )
        connection.execute("fetch 1 from c")
        row = only(rows_of(server, "resources.temporary_files"))
        assert (row["files"], row["bytes"]) == listed(server.data / "base/pgsql_tmp")
        assert number(row, "bytes") > 3e6

    server.execute("create tablespace elsewhere location ''")
    with psycopg.connect(server.conninfo()) as connection:
        connection.execute("set temp_tablespaces = 'elsewhere'; set work_mem = '64kB'")
        connection.execute(
            "declare c cursor for select n from generate_series(1, 300000) as n order by n desc"
        )
        connection.execute("fetch 1 from c")
        found = {row["spcname"]: row for row in rows_of(server, "resources.temporary_files")}
        (files,) = server.data.glob("pg_tblspc/*/*/pgsql_tmp")
        assert (found["elsewhere"]["files"], found["elsewhere"]["bytes"]) == listed(files)
        assert found["pg_default"]["files"] == 0
    for query in ("wal_directory", "log_directory", "temporary_files"):
        assert refusal_of(server, f"resources.{query}", role=READER) is not None


@pytest.mark.parametrize("major", [13, 18])
def test_the_log_directory_is_left_alone_where_no_collector_makes_it(server: Server) -> None:
    refusal = refusal_of(server, "resources.log_directory")
    assert refusal == "setting: logging_collector is off, not on"


@pytest.mark.parametrize("major", [13, 18])
def test_shared_memory_adds_up_to_what_the_server_took(server: Server) -> None:
    role = None if server.major < 15 else READER
    rows = rows_of(server, "resources.shared_memory", role=role)
    sizes = {str(row["name"]): number(row, "allocated_size") for row in rows}

    assert sizes["Buffer Blocks"] == pytest.approx(16 * 1024 * 1024, rel=0.001)
    assert {"<free>", "<anonymous>"} <= sizes.keys()
    if server.major >= 15:
        ((whole,),) = server.execute(
            "select setting::int * 1048576 from pg_settings where name = 'shared_memory_size'"
        )
        assert whole - 2 * 1048576 < sum(sizes.values()) <= whole
    assert refusal_of(server, "resources.shared_memory", role=BARE) is not None


@pytest.mark.parametrize("major", [13, 18])
def test_functions_are_counted_with_those_that_share_their_name(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, track_functions="all")
    server.execute(
        "create function f(int) returns int language plpgsql as $$ begin perform pg_sleep(0.01);"
        " return 1; end $$;"
        " create function f(text) returns int language plpgsql as $$ begin return f(1); end $$"
    )
    server.execute("select f(n) from generate_series(1, 3) as n")
    server.execute("select f('x')")
    server.wait_until("select sum(calls) = 5 from pg_stat_user_functions where funcname = 'f'")

    row = only(rows_of(server, "resources.functions", role=BARE))

    ((total, own),) = server.execute(
        "select sum(total_time) / 1000, sum(self_time) / 1000 from pg_stat_user_functions"
    )
    assert (row["schemaname"], row["funcname"], row["calls"]) == ("public", "f", 5)
    assert number(row, "total_time") == pytest.approx(float(total))
    assert number(row, "self_time") == pytest.approx(float(own))
    assert total > own >= 0.04


@pytest.mark.parametrize("major", [16, 18])
def test_shared_buffers_are_those_that_the_extension_lists(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, autovacuum=False)
    assert refusal_of(server, "resources.buffercache") is not None
    server.execute(
        "create schema odd; create extension pg_buffercache schema odd;"
        " grant usage on schema odd to pgvigil, reader"
    )
    server.execute("create table t as select generate_series(1, 100000)")
    server.execute("checkpoint")
    server.execute("create table u as select generate_series(1, 20000)")

    rows_of(server, "resources.buffercache")  # reads what it needs into buffers
    row = only(rows_of(server, "resources.buffercache"))
    usage = rows_of(server, "resources.buffercache_usage")

    ((used, free, dirty, pinned, average),) = server.execute(
        "select count(relfilenode), count(*) - count(relfilenode), count(*) filter (where isdirty),"
        " count(*) filter (where pinning_backends > 0), avg(usagecount) from odd.pg_buffercache"
    )
    assert row["buffers_used"] == pytest.approx(used, abs=30)
    assert row["buffers_unused"] == pytest.approx(free, abs=30)
    assert row["buffers_pinned"] == pinned
    assert number(row, "buffers_used") + number(row, "buffers_unused") == 2048
    assert 80 < number(row, "buffers_dirty") == pytest.approx(dirty, abs=30)
    assert number(row, "usagecount_avg") == pytest.approx(float(average), abs=0.1)
    assert sum(number(of, "buffers") for of in usage) == 2048
    assert sum(number(of, "dirty") for of in usage) == pytest.approx(dirty, abs=30)
    assert refusal_of(server, "resources.buffercache", role=READER) is not None


@pytest.mark.parametrize("major", [13, 18])
def test_the_small_caches_are_counted_as_in_their_view(server: Server) -> None:
    view = "select name, blks_hit, blks_written, flushes from pg_stat_slru"
    before = {name: values for name, *values in server.execute(view)}
    rows = rows_of(server, "resources.slru", role=BARE)
    after = {name: values for name, *values in server.execute(view)}

    assert {row["name"] for row in rows} == before.keys()
    for row in rows:
        name = str(row["name"])
        told = [row[column] for column in ("blks_hit", "blks_written", "flushes")]
        for low, value, high in zip(before[name], told, after[name], strict=True):
            assert isinstance(value, float)
            assert low <= value <= high, name


@pytest.mark.parametrize("major", [16, 18])
def test_what_was_asked_of_the_kernel_and_used_again_is_counted(
    fresh_server: FreshServer, major: int
) -> None:
    # Without fsync 18 asks the kernel for nothing.
    server = fresh_server(major, autovacuum=False, checkpoint_flush_after="256kB", fsync=True)
    server.execute("select pg_stat_reset_shared('io')")
    ((reset,),) = server.execute("select extract(epoch from max(stats_reset)) from pg_stat_io")
    server.execute(
        "create table t as select n, repeat('x', 100) as x from generate_series(1, 300000) as n"
    )
    server.execute("select count(*) from t")  # larger than a quarter of the buffers: a ring
    server.execute("update t set n = n where n % 500 = 0")
    server.execute("checkpoint")
    server.wait_until("select sum(writebacks) > 0 and sum(reuses) > 0 from pg_stat_io")

    rows = rows_of(server, "resources.io", role=BARE)

    ((writebacks, reuses),) = server.execute("select sum(writebacks), sum(reuses) from pg_stat_io")
    assert sum(number(r, "writebacks") for r in rows if r["writebacks"]) == writebacks > 0
    assert sum(number(r, "reuses") for r in rows if r["reuses"]) == reuses > 0
    assert only(rows_of(server, "resources.io_reset")) == {"stats_reset": float(reset)}


@pytest.mark.parametrize("major", [17, 18])
def test_asynchronous_reads_exist_from_18_on(cluster: Cluster, major: int) -> None:
    if major < 18:
        assert refusal_of(cluster.primary, "resources.aios") is not None
    else:
        for row in rows_of(cluster.primary, "resources.aios", role=READER):
            assert number(row, "handles") > 0
