"""What extensions say of themselves, checked where a server has them.

Only the extensions of PostgreSQL itself are there everywhere. The others are looked for in the
servers installed on the machine, among them the one whose pg_config comes first in PATH. Where
none has them, their tests are skipped, but not in CI: that fetches a server which does. Citus is a
stand-in: tables as its documentation describes them.
"""

import functools
import os
from collections.abc import Callable, Iterator

import psycopg
import pytest

from lab import debian
from lab.binaries import Binaries, UnavailableError, examine, find
from lab.catalogue import Row, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, prepare
from lab.postgres import MAJORS, Server

PRELOADED = {"pg_stat_kcache": "", "pg_wait_sampling": "", "timescaledb": ""}
ROLES = (PGVIGIL, READER, BARE, None)

FETCHED = 18
EXTENSIONS = ("pg-stat-kcache", "pg-wait-sampling", "postgis-3", "timescaledb")
"""Debian's packages of them, without `postgresql-18-`."""


@functools.cache
def fetched() -> Binaries | str:
    """A server of Debian's with all of the extensions; a string is the reason why there is none."""
    server = f"postgresql-{FETCHED}"
    packages = [server, *(f"{server}-{extension}" for extension in EXTENSIONS)]
    try:
        programs = debian.fetch("postgres-extensions", ["sid"], packages)
    except RuntimeError as error:
        return str(error)
    return examine(FETCHED, "installed", programs)


def server_with(library: str) -> Binaries:
    """The newest server on this machine that can load a library; in CI, else one of Debian's."""
    for major in reversed(MAJORS):
        try:
            binaries = find(major, ["installed"])
        except UnavailableError:
            continue
        if binaries.has_library(library):
            return binaries
    reason = f"no server on this machine has the library {library}"
    if not os.environ.get("CI"):
        pytest.skip(reason)
    debians = fetched()
    if isinstance(debians, str):
        pytest.fail(f"{reason}, and none can be fetched: {debians}")
    if not debians.has_library(library):
        pytest.fail(f"{reason}, nor has the one that was fetched")
    return debians


@pytest.fixture(scope="module")
def having() -> Iterator[Callable[[str], Server]]:
    """A function that gives a running server which has a library, preloaded where it must be."""
    servers: dict[Binaries, Server] = {}

    def give(library: str) -> Server:
        binaries = server_with(library)
        if binaries not in servers:
            preloaded = [name for name in PRELOADED if binaries.has_library(name)]
            server = Server(binaries.major, binaries=binaries)
            servers[binaries] = server
            server.set({"shared_preload_libraries": ",".join(["pg_stat_statements", *preloaded])})
            server.start()
            prepare(server)
            for name in preloaded:
                server.execute(f"create extension {name}")
        return servers[binaries]

    yield give
    for server in servers.values():
        server.destroy()


@pytest.mark.parametrize("major", [13, 18])
def test_installed_extensions_are_told_for_each_database(server: Server) -> None:
    server.execute("create database extended")
    try:
        server.execute(
            'create schema "odd "" \'one"; create extension hstore schema "odd "" \'one" version'
            " '1.6'; create extension pg_trgm",
            database="extended",
        )
        expected = server.execute(
            "select extname, extversion, nspname from pg_extension"
            " join pg_namespace as n on n.oid = extnamespace",
            database="extended",
        )
        for role in ROLES:
            rows = rows_of(server, "extensions.installed", dbname="extended", role=role)

            told = {(row["extname"], row["extversion"], row["schemaname"]) for row in rows}
            assert told == set(expected)
            assert len(told) == len(rows)
            assert {row["info"] for row in rows} == {1}
        assert ("hstore", "1.6", "odd \" 'one") in told
    finally:
        server.execute("drop database extended")


@pytest.mark.parametrize("major", [13, 18])
@pytest.mark.parametrize(
    ("query", "extension"),
    [
        ("extensions.postgis", "postgis"),
        ("extensions.kcache", "pg_stat_kcache"),
        ("extensions.wait_sampling", "pg_wait_sampling"),
        ("extensions.wait_sampling_period", "pg_wait_sampling"),
        ("extensions.timescaledb_hypertables", "timescaledb"),
        ("extensions.timescaledb_jobs", "timescaledb"),
        ("extensions.citus_nodes", "citus"),
        ("extensions.citus_tables", "citus"),
    ],
)
def test_nothing_is_asked_of_an_extension_that_is_not_installed(
    server: Server, query: str, extension: str
) -> None:
    refusal = refusal_of(server, query)
    assert refusal
    assert refusal.startswith(f"extension: {extension} is not installed in postgres, or ")


def test_processor_time_and_reads_of_statements_are_those_of_pg_stat_kcache(
    having: Callable[[str], Server],
) -> None:
    server = having("pg_stat_kcache")
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute("create table kept (n int, filler text)")
        connection.execute(
            "insert into kept select n, repeat('x', 500) from generate_series(1, 30000) as n"
        )
        connection.execute("select count(*), sum(sqrt(n)) from generate_series(1, 400000) as n")
    texts = "select queryid::text from pg_stat_statements where query ~ %s"
    sums = (
        "select sum(plan_user_time + exec_user_time), sum(plan_system_time + exec_system_time),"
        " sum(plan_reads + exec_reads)::float8, sum(plan_writes + exec_writes)::float8,"
        " sum(exec_majflts)::float8, sum(exec_nvcsws)::float8, sum(exec_nivcsws)::float8"
        " from pg_stat_kcache() where queryid = %s"
    )
    names = ("user_time", "system_time", "reads", "writes", "major_faults", "voluntary")
    begin = server.log_position()

    for text in ("^select count.*sqrt", "^insert into kept"):
        ((found,),) = server.execute(texts, [text])
        (expected,) = server.execute(sums, [found])
        for role in (PGVIGIL, READER, None):
            rows = rows_of(server, "extensions.kcache", role=role)
            (row,) = [row for row in rows if row["queryid"] == found]
            given = [row[name] for name in (*names, "involuntary")]
            assert given == pytest.approx([float(value) for value in expected])
            assert (row["datname"], row["usename"]) == ("postgres", "postgres")
        if "insert" in text:
            assert expected[3] > 0  # it wrote
        else:
            assert 0.01 < expected[0] < 5  # it computed

    assert str(refusal_of(server, "extensions.kcache", role=BARE)).startswith("privilege")
    assert server.errors_in_log(begin) == []


def test_samples_of_waits_are_those_of_pg_wait_sampling(having: Callable[[str], Server]) -> None:
    server = having("pg_wait_sampling")
    seen = (
        "select coalesce(sum(count), 0)::float8 from pg_wait_sampling_profile"
        " where event_type = 'Timeout' and event = 'PgSleep'"
    )
    ((before,),) = server.execute(seen)
    server.execute("select pg_sleep(0.6)")
    server.wait_until(f"select ({seen}) > {before} + 20")
    ((after,),) = server.execute(seen)
    begin = server.log_position()

    for role in ROLES:
        rows = rows_of(server, "extensions.wait_sampling", role=role)
        keys = {(row["wait_event_type"], row["wait_event"]) for row in rows}
        assert len(keys) == len(rows) > 3
        (sleep,) = [row for row in rows if row["wait_event"] == "PgSleep"]
        assert sleep["samples"] == after
        assert rows_of(server, "extensions.wait_sampling_period", role=role) == [{"period": 0.01}]

    # A hundred looks per second: those samples are the 0.6 seconds, were some of them late.
    assert 0.2 < (after - before) * 0.01 <= 0.7
    assert server.errors_in_log(begin) == []


def test_a_postgis_that_was_not_updated_is_told(having: Callable[[str], Server]) -> None:
    server = having("postgis-3")
    server.execute("create database maps")
    server.execute("create schema gis; create extension postgis schema gis", database="maps")
    server.execute("grant usage on schema gis to public", database="maps")
    begin = server.log_position()

    for role in ROLES:
        (row,) = rows_of(server, "extensions.postgis", dbname="maps", role=role)
        ((version,),) = server.execute(
            "select extversion from pg_extension where extname = 'postgis'", database="maps"
        )
        assert row["lib_version"] == version
        assert str(row["scripts_version"]).startswith(version)
        assert row["geos_version"]
        assert row["outdated"] is False
    server.execute(
        "create or replace function gis.postgis_scripts_installed() returns text"
        " language sql immutable as $$ select '3.0.1 abc' $$",
        database="maps",
    )
    (row,) = rows_of(server, "extensions.postgis", dbname="maps")
    assert (row["scripts_version"], row["outdated"]) == ("3.0.1 abc", True)
    assert server.errors_in_log(begin) == []


def test_hypertables_and_jobs_are_those_of_timescaledb(having: Callable[[str], Server]) -> None:
    server = having("timescaledb")
    names = ("wide \" 'one", "wide two")
    for days, name in ((3, names[0]), (7, names[1])):
        quoted = '"' + name.replace('"', '""') + '"'
        server.execute(
            f"create table {quoted} (time timestamptz not null, n int)",
        )
        server.execute(
            "select create_hypertable(quote_ident(%s)::regclass, 'time',"
            " chunk_time_interval => interval '1 day')",
            [name],
        )
        server.execute(
            f"insert into {quoted} select '2026-01-01'::timestamptz + n * interval '1 day', n"
            f" from generate_series(1, {days}) as n"
        )
    begin = server.log_position()

    for role in ROLES:
        rows = rows_of(server, "extensions.timescaledb_hypertables", role=role)
        told = {(row["relname"], row["chunks"], row["compressed"]) for row in rows}
        assert told == {(names[0], 3, 0), (names[1], 7, 0)}
        for row in rows:
            assert (row["schemaname"], row["dimensions"]) == ("public", 1)
            assert row["compression_enabled"] is False
        ((number, scheduled),) = server.execute(
            "select count(*), bool_and(scheduled) from timescaledb_information.jobs"
        )
        jobs = rows_of(server, "extensions.timescaledb_jobs", role=role)
        assert len(jobs) == number > 0
        assert all(job["scheduled"] is scheduled for job in jobs)
    assert server.errors_in_log(begin) == []


def test_a_job_of_timescaledb_that_failed_is_told(having: Callable[[str], Server]) -> None:
    server = having("timescaledb")
    # The edition that Debian ships has no jobs of users, so what the scheduler would write of one
    # that fails is written here.
    server.execute(
        "update _timescaledb_catalog.bgw_job set scheduled = false;"
        " delete from _timescaledb_internal.bgw_job_stat;"
        " insert into _timescaledb_internal.bgw_job_stat"
        " select job_id, '2026-11-20 10:00+00', '2026-11-20 10:00:05+00', '2026-11-20 11:00+00',"
        "  '2026-11-19 10:00+00', false, 9, '9 s', '2 s', 7, 2, 0, 2, 0, 0"
        " from timescaledb_information.jobs"
    )

    (job,) = rows_of(server, "extensions.timescaledb_jobs")

    assert (job["runs"], job["failures"], job["failed"], job["scheduled"]) == (9, 2, True, False)
    assert job["duration"] == 5
    ((expected,),) = server.execute("select extract(epoch from '2026-11-19 10:00+00'::timestamptz)")
    assert job["last_success"] == float(expected)


@pytest.fixture
def citus(server: Server) -> Iterator[str]:
    """A database with tables such as Citus 12 has: not Citus, but what its documents say."""
    server.execute("create database sharded")
    # In pg_catalog, so that they are found where Citus has them.
    server.execute(
        """
        set allow_system_table_mods = on;
        create type pg_catalog.noderole as enum ('primary', 'secondary', 'unavailable');
        create table pg_catalog.pg_dist_node (nodeid int, groupid int, nodename text, nodeport int,
          noderack text, hasmetadata boolean, isactive boolean, noderole pg_catalog.noderole,
          nodecluster name, metadatasynced boolean, shouldhaveshards boolean);
        create table pg_catalog.pg_dist_partition (logicalrelid regclass, partmethod "char");
        create table pg_catalog.pg_dist_shard (logicalrelid regclass, shardid bigint);
        create table pg_catalog.pg_dist_placement (placementid bigint, shardid bigint,
          shardstate int, shardlength bigint, groupid int);
        grant select on pg_catalog.pg_dist_node, pg_catalog.pg_dist_partition,
          pg_catalog.pg_dist_shard, pg_catalog.pg_dist_placement to public;
        insert into pg_catalog.pg_extension
          select 99999, 'citus', 10, 11, false, '12.1-1', null, null;
        insert into pg_catalog.pg_dist_node values
          (1, 0, 'coordinator', 5432, 'default', true, true, 'primary', 'default', true, false),
          (2, 1, 'worker "1"', 5432, 'default', true, true, 'primary', 'default', true, true),
          (3, 2, 'worker 2', 5433, 'default', true, false, 'primary', 'default', false, true);
        insert into pg_catalog.pg_dist_partition values ('pg_class', 'h');
        insert into pg_catalog.pg_dist_shard values ('pg_class', 1), ('pg_class', 2);
        insert into pg_catalog.pg_dist_placement values
          (1, 1, 1, 0, 1), (2, 2, 1, 0, 1), (3, 2, 4, 0, 2)
        """,
        database="sharded",
    )
    yield "sharded"
    server.execute("drop database sharded")


@pytest.mark.parametrize("major", [13, 18])
def test_nodes_and_shards_are_those_of_the_tables_of_citus(server: Server, citus: str) -> None:
    begin = server.log_position()

    def node(row: Row) -> tuple[object, ...]:
        flags = ("active", "should_have_shards", "has_metadata", "metadata_synced", "shards")
        return tuple(row[name] for name in flags)

    for role in ROLES:
        rows = rows_of(server, "extensions.citus_nodes", dbname=citus, role=role)
        assert {(row["nodename"], row["nodeport"], row["noderole"]): node(row) for row in rows} == {
            ("coordinator", "5432", "primary"): (True, False, True, True, 0),
            ('worker "1"', "5432", "primary"): (True, True, True, True, 2),
            ("worker 2", "5433", "primary"): (False, True, True, False, 1),
        }
        totals = rows_of(server, "extensions.citus_tables", dbname=citus, role=role)
        assert totals == [{"tables": 1, "shards": 2, "not_active": 1}]
    assert server.errors_in_log(begin) == []


def test_libraries_that_are_not_preloaded_any_more_are_not_called(
    having: Callable[[str], Server],
) -> None:
    # Not so pg_stat_kcache: loading it is an error by itself, which is why nobody is asked for it
    # unless somebody enables it.
    server = having("pg_wait_sampling")
    server.set({"shared_preload_libraries": ""})
    server.restart()
    begin = server.log_position()

    assert rows_of(server, "extensions.wait_sampling") == []
    assert rows_of(server, "extensions.wait_sampling_period") == []
    for query in ("extensions.timescaledb_hypertables", "extensions.timescaledb_jobs"):
        if not str(refusal_of(server, query)).startswith("extension"):
            assert rows_of(server, query)  # views; what compresses is not asked

    assert server.errors_in_log(begin) == []
