"""What the queries of the area maintenance say, beside what autovacuum and the server do."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg
import pytest
from pgvigil import grants

from lab.catalogue import AskedError, Row, number, refusal_of, rows_of
from lab.cluster import BARE, READER, Cluster, Role
from lab.postgres import Server

DATABASE = "maintained"

pytestmark = pytest.mark.parametrize("major", [13, 18])

# Autovacuum does not come in between: it waits a day before it looks at this database.
FIXTURES = """
create schema shop;
create table shop.plain (id int, a text);
create table shop.own (id int, a text) with (
  autovacuum_vacuum_threshold = '1e2', autovacuum_vacuum_scale_factor = ' .5',
  autovacuum_analyze_threshold = 10, autovacuum_analyze_scale_factor = 0,
  autovacuum_vacuum_insert_threshold = 500, autovacuum_vacuum_insert_scale_factor = 0.1);
create table shop.off (id int) with (autovacuum_enabled = 'of');
create table shop.no_inserts (id int) with (autovacuum_vacuum_insert_threshold = -1);
create table shop.long (id int, body text) with (
  autovacuum_vacuum_threshold = 40, autovacuum_vacuum_scale_factor = 0);
create table shop.longer (id int, body text) with (
  autovacuum_vacuum_threshold = 40, toast.autovacuum_vacuum_threshold = 400,
  toast.autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_scale_factor = 0);
alter table shop.long alter body set storage external;
alter table shop.longer alter body set storage external;
create table shop.parted (id int) partition by range (id);
create table shop.parted_1 partition of shop.parted for values from (0) to (1000);
create table shop.parted_2 partition of shop.parted for values from (1000) to (2000);
"""

FILL = (
    "insert into shop.plain select n, 'a' from generate_series(1, 1000) n",
    "insert into shop.own select n, 'a' from generate_series(1, 1000) n",
    "insert into shop.off select n from generate_series(1, 1000) n",
    "insert into shop.no_inserts select n from generate_series(1, 5000) n",
    "insert into shop.long select n, repeat('b', 5000) from generate_series(1, 100) n",
    "insert into shop.longer select n, repeat('b', 5000) from generate_series(1, 100) n",
    "insert into shop.parted select generate_series(0, 1999)",
    "vacuum analyze",
    "update shop.plain set a = 'b' where id <= 300",
    "update shop.own set a = 'b' where id <= 300",
    "insert into shop.own select n, 'c' from generate_series(1, 900) n",
    "delete from shop.off",
    "insert into shop.no_inserts select n from generate_series(1, 5000) n",
    "delete from shop.long where id <= 60",
    "delete from shop.longer where id <= 60",
    "delete from shop.parted where id < 100 or id >= 1800",
    "create table shop.never (id int)",
    "insert into shop.never select n from generate_series(1, 10) n",
)

COUNTED = (
    "select exists (select from pg_stat_all_tables where relname = 'never' and n_live_tup = 10)"
    " and exists (select from pg_stat_all_tables where relname = 'own' and n_dead_tup = 300)"
)


def ask_database(server: Server, query: str) -> list[tuple[object, ...]]:
    return server.execute(query, database=DATABASE)


def until(server: Server, query: str) -> None:
    """Wait for a condition in our database."""
    end = time.monotonic() + 20
    while not (rows := ask_database(server, query)) or not rows[0][0]:
        assert time.monotonic() < end, query
        time.sleep(0.02)


@pytest.fixture
def maintained(cluster: Cluster) -> Server:
    """The shared primary with a database of these fixtures, made when the first test asks."""
    server = cluster.primary
    if not server.execute("select 1 from pg_database where datname = %s", [DATABASE]):
        server.set({"autovacuum_naptime": "1d"})
        server.execute(f"create database {DATABASE}")
        ask_database(server, FIXTURES)
        for statement in FILL:
            ask_database(server, statement)
        until(server, COUNTED)
    return server


@pytest.fixture(autouse=True, scope="module")
def _removed(clusters: object) -> Iterator[None]:
    """Leave the shared clusters as they were."""
    yield
    for cluster in getattr(clusters, "_clusters", {}).values():
        cluster.primary.execute(f"drop database if exists {DATABASE} with (force)")
        cluster.primary.set({"autovacuum_naptime": None})


def tables(server: Server) -> dict[object, Row]:
    rows = rows_of(server, "maintenance.tables", dbname=DATABASE)
    return {row["relname"]: row for row in rows if row["schemaname"] == "shop"}


def test_a_table_is_measured_by_the_settings_of_the_server(maintained: Server) -> None:
    row = tables(maintained)["plain"]

    # 50 + 0.2 * 1000 dead rows, 1000 + 0.2 * 1000 inserted ones, 50 + 0.1 * 1000 changed ones.
    assert row["n_dead_tup"] == 300
    assert row["n_mod_since_analyze"] == 300
    assert row["vacuum_ratio"] == pytest.approx(300 / 250)
    assert row["analyze_ratio"] == pytest.approx(300 / 150)
    assert row["insert_ratio"] == 0
    assert row["disabled"] is False


def test_a_table_is_measured_by_its_own_settings_however_they_are_spelled(
    maintained: Server,
) -> None:
    row = tables(maintained)["own"]

    assert row["vacuum_ratio"] == pytest.approx(300 / (100 + 0.5 * 1000))
    assert row["analyze_ratio"] == pytest.approx(1200 / 10)
    assert row["n_ins_since_vacuum"] == 900
    thawed = 1.0
    if maintained.major >= 18:
        found = ask_database(
            maintained,
            "select 1 - relallfrozen::float8 / relpages from pg_class where relname = 'own'",
        )
        thawed = float(str(found[0][0]))
    assert row["insert_ratio"] == pytest.approx(900 / (500 + 0.1 * 1000 * thawed))


def test_where_autovacuum_is_off_it_is_told_and_the_rows_still_count(maintained: Server) -> None:
    row = tables(maintained)["off"]

    assert row["disabled"] is True
    assert row["vacuum_ratio"] == pytest.approx(1000 / 250)


def test_inserts_do_not_count_where_they_are_not_to(maintained: Server) -> None:
    row = tables(maintained)["no_inserts"]

    assert row["n_ins_since_vacuum"] == 5000
    assert row["insert_ratio"] == 0


def test_a_toast_table_counts_for_its_table_by_its_own_settings_or_those_of_the_table(
    maintained: Server,
) -> None:
    found = tables(maintained)

    # 60 rows of three chunks each.
    assert found["long"]["n_dead_tup"] == 60
    assert found["long"]["vacuum_ratio"] == pytest.approx(180 / 40)
    assert found["longer"]["vacuum_ratio"] == pytest.approx(60 / 40)


def test_the_worst_partition_speaks_for_the_root(maintained: Server) -> None:
    found = tables(maintained)

    assert {name for name in found if str(name).startswith("parted")} == {"parted"}
    assert found["parted"]["n_dead_tup"] == 300
    assert found["parted"]["vacuum_ratio"] == pytest.approx(200 / 250)


def test_a_limit_on_the_threshold_is_minded_where_there_is_one(maintained: Server) -> None:
    if maintained.major < 18:
        return
    ask_database(maintained, "alter table shop.plain set (autovacuum_vacuum_max_threshold = 100)")
    try:
        assert tables(maintained)["plain"]["vacuum_ratio"] == pytest.approx(3)
    finally:
        ask_database(maintained, "alter table shop.plain reset (autovacuum_vacuum_max_threshold)")
    maintained.set({"autovacuum_vacuum_max_threshold": 150})
    try:
        assert tables(maintained)["plain"]["vacuum_ratio"] == pytest.approx(2)
    finally:
        maintained.set({"autovacuum_vacuum_max_threshold": None})


def test_the_counts_are_those_of_the_tables(maintained: Server) -> None:
    (row,) = rows_of(maintained, "maintenance.debt", dbname=DATABASE)
    catalogs = """
      select count(*) filter (where s.n_dead_tup > 50 + 0.2 * greatest(c.reltuples, 0)
          or s.n_ins_since_vacuum > 1000 + 0.2 * greatest(c.reltuples, 0)),
        count(*) filter (where s.n_mod_since_analyze > 50 + 0.1 * greatest(c.reltuples, 0)
          and s.relname <> 'pg_statistic'),
        count(*) filter (where s.n_mod_since_analyze > 2 * (50 + 0.1 * greatest(c.reltuples, 0))
          and s.relname <> 'pg_statistic'),
        count(*) filter (where s.n_dead_tup > 2 * (50 + 0.2 * greatest(c.reltuples, 0))
          or s.n_ins_since_vacuum > 2 * (1000 + 0.2 * greatest(c.reltuples, 0)))
      from pg_stat_sys_tables s join pg_class c on c.oid = s.relid
      where s.schemaname in ('pg_catalog', 'information_schema')"""
    dead, due, overdue, dead_twice = (float(str(n)) for n in ask_database(maintained, catalogs)[0])

    # plain, off, long and longer for dead rows, own for inserted ones.
    assert row["vacuum_due"] == 5 + dead
    assert row["vacuum_overdue"] == 2 + dead_twice  # off and long
    # plain, own, off, no_inserts and one partition.
    assert number(row, "analyze_due") == 5 + due
    # own, off, no_inserts; plain is at twice, and not above.
    assert number(row, "analyze_overdue") == 3 + overdue
    assert row["never_analyzed"] == 1
    assert row["disabled"] == 1


def test_autovacuum_comes_for_what_is_due_and_for_nothing_else(maintained: Server) -> None:
    """The judge of the ratios is autovacuum itself."""
    maintained.set({"autovacuum_naptime": "1s"})
    try:
        until(
            maintained,
            "select count(*) = 4 from pg_stat_user_tables where autovacuum_count > 0",
        )
        until(
            maintained,
            "select autoanalyze_count > 0 from pg_stat_user_tables where relname = 'plain'",
        )
        end = time.monotonic() + 20
        # What autovacuum must leave alone stays due: the table for which it is off.
        while rows_of(maintained, "maintenance.debt", dbname=DATABASE)[0]["vacuum_due"] != 1:
            assert time.monotonic() < end
    finally:
        maintained.set({"autovacuum_naptime": "1d"})
    vacuumed = {
        str(name)
        for (name,) in ask_database(
            maintained, "select relname from pg_stat_user_tables where autovacuum_count > 0"
        )
    }

    assert vacuumed == {"plain", "own", "longer", "long"}
    found = tables(maintained)
    assert number(found["plain"], "autovacuum_count") >= 1
    assert found["plain"]["last_autovacuum"] is not None
    assert found["plain"]["vacuum_count"] == 1
    assert found["off"]["autovacuum_count"] == 0
    assert found["plain"]["vacuum_ratio"] == 0
    if maintained.major >= 18:
        told = ask_database(
            maintained,
            "select total_autovacuum_time / 1000 from pg_stat_user_tables where relname = 'plain'",
        )
        assert found["plain"]["total_autovacuum_time"] == pytest.approx(told[0][0])


def test_tables_are_asked_on_primaries_only(maintained: Server, cluster: Cluster) -> None:
    for name in ("tables", "debt", "oldest_relations"):
        assert "standby" in (refusal_of(cluster.standby, f"maintenance.{name}") or "")
        assert rows_of(maintained, f"maintenance.{name}", dbname=DATABASE, role=BARE)


def test_ages_are_those_of_the_catalog_and_all_databases_count(
    maintained: Server, cluster: Cluster
) -> None:
    for server in (maintained, cluster.standby):
        (lsn,) = maintained.execute("select pg_current_wal_lsn()::text")[0]
        cluster.standby.wait_until(f"select pg_last_wal_replay_lsn() >= '{lsn}'")
        expected = server.execute(
            "select datname, age(datfrozenxid), mxid_age(datminmxid) from pg_database"
        )
        found = {row["datname"]: row for row in rows_of(server, "maintenance.freeze", role=BARE)}

        assert set(found) == {name for name, _, _ in expected}
        assert "template0" in found
        for name, xids, multixacts in expected:
            assert found[name]["xid_age"] == xids
            assert found[name]["multixact_age"] == multixacts
            stop = 2**31 - 1 - (1_000_000 if server.major == 13 else 3_000_000)
            assert found[name]["xid_ratio"] == pytest.approx(xids / stop)


def test_the_oldest_relations_are_named_toast_and_temporary_ones_too(maintained: Server) -> None:
    with psycopg.connect(maintained.conninfo(dbname=DATABASE), autocommit=True) as client:
        client.execute("create temp table passing (id int)")
        ask_database(maintained, "do $$ begin for i in 1..50 loop "
                     "perform txid_current(); commit; end loop; end $$")  # fmt: skip
        ask_database(maintained, "vacuum freeze")
        rows = rows_of(maintained, "maintenance.oldest_relations", dbname=DATABASE)
    oldest = max(rows, key=lambda row: number(row, "xid_age"))

    assert (oldest["relkind"], oldest["schemaname"], oldest["relname"]) == (
        "temporary table",
        "pg_temp",
        None,
    )
    # What VACUUM FREEZE froze is as young as the next transaction id.
    assert number(oldest, "xid_age") >= 50

    ask_database(maintained, "do $$ begin for i in 1..50 loop "
                 "perform txid_current(); commit; end loop; end $$")  # fmt: skip
    names = "select schemaname || '.' || relname from pg_stat_all_tables where schemaname <> all "
    for (name,) in ask_database(
        maintained, names + "('{pg_toast,shop,pg_catalog,information_schema}')"
    ):
        ask_database(maintained, f"vacuum freeze {name}")
    for schema in ("pg_catalog", "information_schema", "shop"):
        for (name,) in ask_database(
            maintained,
            f"select relname from pg_stat_all_tables where schemaname = '{schema}' "
            "and relname <> 'long'",
        ):
            ask_database(maintained, f'vacuum freeze {schema}."{name}"')
    rows = rows_of(maintained, "maintenance.oldest_relations", dbname=DATABASE)
    by_age = sorted(rows, key=lambda row: -number(row, "xid_age"))
    named = {(row["relkind"], row["schemaname"], row["relname"]) for row in by_age[:2]}
    assert named == {("table", "shop", "long"), ("toast table", "shop", "long")}
    assert 10 <= len(rows) <= 20


def test_the_limits_are_the_settings_of_the_server(maintained: Server) -> None:
    (row,) = rows_of(maintained, "maintenance.settings", role=BARE)
    settings = dict(maintained.execute("select name, setting from pg_settings"))

    for name in (
        *("autovacuum_freeze_max_age", "autovacuum_multixact_freeze_max_age"),
        *("autovacuum_max_workers", "autovacuum_naptime"),
        *(
            ("vacuum_failsafe_age", "vacuum_multixact_failsafe_age")
            if maintained.major > 13
            else ()
        ),
    ):
        assert row[name] == float(settings[name]), name
    assert row["autovacuum"] is True
    assert row["track_counts"] is True
    assert row["xid_stop_age"] == (2146483647 if maintained.major == 13 else 2144483647)


@contextmanager
def held(server: Server, table: str) -> Iterator[None]:
    """Hold rows of a table pinned, so that a vacuum of it must wait."""
    with psycopg.connect(server.conninfo(dbname=DATABASE)) as client:
        client.execute(f"lock table {table} in share mode")
        yield


def test_vacuums_are_counted_by_what_drives_them(maintained: Server) -> None:
    with (
        closing(psycopg.connect(maintained.conninfo(dbname=DATABASE))) as client,
        held(maintained, "shop.never"),
    ):
        client.pgconn.send_query(b"/* nightly */ -- now\n VACUUM shop.never")
        maintained.wait_until(
            "select exists (select from pg_stat_activity where wait_event_type = 'Lock' "
            "and query like '%VACUUM shop.never')"
        )
        found = {row["kind"]: row for row in rows_of(maintained, "maintenance.workers")}
    assert found["manual"]["processes"] == 1
    assert number(found["manual"], "age") > 0
    assert found["autovacuum"]["processes"] == 0
    assert found["autovacuum to prevent wraparound"]["age"] == 0
    with pytest.raises(AskedError, match="pg_read_all_stats"):
        rows_of(maintained, "maintenance.workers", role=BARE)


def test_a_worker_that_prevents_wraparound_is_told_from_others(maintained: Server) -> None:
    # As old as if 150,000 transactions had passed; the server counts them in a circle.
    ask_database(
        maintained,
        """
        alter table shop.no_inserts set (
          autovacuum_freeze_max_age = 100000, autovacuum_freeze_min_age = 0);
        update pg_class set relfrozenxid = ((4294967296 + txid_current() - 150000)
          % 4294967296)::text::xid where relname = 'no_inserts'""",
    )
    rows = rows_of(maintained, "maintenance.oldest_relations", dbname=DATABASE)
    oldest = max(rows, key=lambda row: number(row, "xid_age"))
    with held(maintained, "shop.no_inserts"):
        maintained.set({"autovacuum_naptime": "1s"})
        try:
            maintained.wait_until(
                "select exists (select from pg_stat_activity where query like '%wraparound)' "
                "and backend_type = 'autovacuum worker' and wait_event_type = 'Lock')"
            )
            found = {row["kind"]: row for row in rows_of(maintained, "maintenance.workers")}
        finally:
            maintained.set({"autovacuum_naptime": "1d"})

    assert oldest["relname"] == "no_inserts"
    assert number(oldest, "xid_age") >= 150_000
    assert found["autovacuum to prevent wraparound"]["processes"] == 1
    assert number(found["autovacuum to prevent wraparound"], "age") > 0
    # Freed of its lock, it sees to it.
    until(
        maintained,
        "select age(relfrozenxid) < 100000 from pg_class where relname = 'no_inserts'",
    )


def test_an_extension_that_stays_behind_is_found(maintained: Server) -> None:
    ask_database(maintained, "create extension pg_stat_statements version '1.7'")
    try:
        found = {
            row["extname"]: row
            for row in rows_of(maintained, "maintenance.extensions", dbname=DATABASE, role=BARE)
        }
    finally:
        ask_database(maintained, "drop extension pg_stat_statements")

    assert found["pg_stat_statements"]["update_available"] is True
    assert found["pg_stat_statements"]["extversion"] == "1.7"
    assert found["plpgsql"]["update_available"] is False


def test_a_setting_that_waits_for_a_restart_is_named_and_is_no_error(maintained: Server) -> None:
    maintained.execute(grants.script("pgvigil", ["security"], create=False))
    try:
        assert rows_of(maintained, "maintenance.pending_restarts")[0]["settings"] == 0
        (row,) = rows_of(maintained, "maintenance.configuration_files")
        assert row["errors"] == 0

        maintained.set({"max_connections": 123})
        maintained.wait_until(
            "select pending_restart from pg_settings where name = 'max_connections'"
        )
        # Not loaded: a server that finds it takes over nothing from the file.
        with (maintained.data / "lab.conf").open("a") as file:
            file.write("no_such_setting = 1\n")
        waiting = rows_of(maintained, "maintenance.pending_restart", role=READER)
        counted = rows_of(maintained, "maintenance.pending_restarts", role=BARE)
        (files,) = rows_of(maintained, "maintenance.configuration_files")
        superuser = Role("postgres", "")
        (seen,) = rows_of(maintained, "maintenance.configuration_files", role=superuser)
        names = maintained.execute("select name from pgvigil.wrong_file_settings() order by name")
    finally:
        maintained.set({"max_connections": None})
        maintained.execute("drop schema pgvigil cascade")

    assert [row["name"] for row in waiting] == ["max_connections"]
    assert counted[0]["settings"] == 1
    assert files["errors"] == seen["errors"] == 1
    assert names == [("no_such_setting",)]
    refusal = refusal_of(maintained, "maintenance.configuration_files") or ""
    assert "pgvigil.wrong_file_settings()" in refusal, "the one that our grants make"
