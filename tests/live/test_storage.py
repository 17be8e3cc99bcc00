"""What the queries of the area storage say, beside what the files and the rows themselves say."""

from collections.abc import Iterator

import psycopg
import pytest
from pgvigil.grants import script

from lab.catalogue import Row, number, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, Cluster, Role
from lab.postgres import Server

DATABASE = "stored"
BLOCK = 8192

pytestmark = pytest.mark.parametrize("major", [13, 18])

FIXTURES = """
create extension pgstattuple;
create schema shop;
create table shop.orders (id int primary key, note text, body text);
alter table shop.orders alter body set storage external;
insert into shop.orders select n, 'note ' || n, repeat('b', 3000) from generate_series(1, 500) n;
create index orders_note on shop.orders (note);
create table shop.events (id int, at date) partition by range (at);
create table shop.events_old partition of shop.events
  for values from ('2026-01-01') to ('2026-02-01') partition by list (id);
create table shop.events_old_1 partition of shop.events_old for values in (1);
create table shop.events_old_2 partition of shop.events_old for values in (2);
create table shop.events_new partition of shop.events
  for values from ('2026-02-01') to ('2026-03-01');
insert into shop.events select 1 + n % 2, '2026-01-15'::date + (n % 30)
  from generate_series(0, 29999) n;
create materialized view shop.kept as select n from generate_series(1, 1000) n;
create unlogged table shop.fleeting as select n from generate_series(1, 5000) n;
"""

# Each a table of some hundred pages whose live rows would fit into fewer, or not.
BLOATED = """
create schema bloat;
create function bloat.churn(text) returns void language plpgsql as $$ begin
  execute 'delete from ' || $1 || ' where id % 3 <> 0'; end $$;

create table bloat.none (id int, a text);
insert into bloat.none select n, 'row ' || n from generate_series(1, 40000) n;

create table bloat.deleted (id int, a text, b timestamptz);
insert into bloat.deleted select n, 'row ' || n, now() from generate_series(1, 40000) n;
select bloat.churn('bloat.deleted');

create table bloat.updated (id int primary key, a int, b text);
insert into bloat.updated select n, n, repeat('x', 10 + n % 50) from generate_series(1, 30000) n;
update bloat.updated set a = a + 1;

create table bloat.padded (a bool, b int8, c bool, d int8, id int, e int8, f int2);
insert into bloat.padded select true, n, false, n, n, n, 1 from generate_series(1, 30000) n;
select bloat.churn('bloat.padded');

create table bloat.wide (id int, a text, b text);
alter table bloat.wide alter a set storage plain, alter b set storage plain;
insert into bloat.wide select n, repeat('a', 900 + n % 200), repeat('b', 1500)
  from generate_series(1, 2000) n;
select bloat.churn('bloat.wide');

create table bloat.nullable (id int, a int, b text, c int8, d text, e int, f int, g int, h int);
insert into bloat.nullable
  select n, case when n % 2 = 0 then n end, case when n % 5 <> 0 then 'text ' || n end,
    case when n % 3 = 0 then n end, null, n, null, n, n from generate_series(1, 40000) n;
select bloat.churn('bloat.nullable');

create table bloat.filled (id int, a text) with (fillfactor = 60);
insert into bloat.filled select n, 'filled ' || n from generate_series(1, 40000) n;

create table bloat.dropped (id int, gone text, a int, b text);
alter table bloat.dropped drop column gone;
insert into bloat.dropped select n, n, 'some text ' || n from generate_series(1, 40000) n;
select bloat.churn('bloat.dropped');

create table bloat.tiny (flag bool, id int2);
insert into bloat.tiny select true, n from generate_series(1, 30000) n;
select bloat.churn('bloat.tiny');

create table bloat.keys (id int, word text, kind int, other int8, gap int);
insert into bloat.keys select n, md5(n::text), n % 100, n, case when n % 2 = 0 then n end
  from generate_series(1, 60000) n;
create index keys_built on bloat.keys (id);
create index keys_word on bloat.keys (word);
create index keys_shared on bloat.keys (kind);
create index keys_alone on bloat.keys (kind) with (deduplicate_items = off);
create index keys_two on bloat.keys (kind, other);
create index keys_null on bloat.keys (gap);
create index keys_half on bloat.keys (other) with (fillfactor = 50);
create index keys_expression on bloat.keys (lower(word));
create table bloat.worn (id int, word text, kind int);
insert into bloat.worn select n, md5(n::text), n % 100 from generate_series(1, 60000) n;
create index worn_id on bloat.worn (id);
create index worn_word on bloat.worn (word);
create index worn_kind on bloat.worn (kind);
delete from bloat.worn where id % 4 <> 0;
"""


@pytest.fixture
def stored(cluster: Cluster) -> Server:
    """The shared primary with a database of these fixtures, made when the first test asks."""
    server = cluster.primary
    if not server.execute("select 1 from pg_database where datname = %s", [DATABASE]):
        server.execute(f"create database {DATABASE}")
        server.execute(FIXTURES, database=DATABASE)
        server.execute(BLOATED, database=DATABASE)
        server.execute("vacuum analyze", database=DATABASE)
        server.execute(script("pgvigil", ["bloat"], create=False), database=DATABASE)
    return server


@pytest.fixture(autouse=True, scope="module")
def _removed(clusters: object) -> Iterator[None]:
    """Leave the shared clusters as they were."""
    yield
    for cluster in getattr(clusters, "_clusters", {}).values():
        cluster.primary.execute(f"drop database if exists {DATABASE}")


def ask(server: Server, name: str) -> dict[tuple[object, ...], Row]:
    """The rows of a query in our database, by schema and name."""
    rows = rows_of(server, f"storage.{name}", dbname=DATABASE)
    return {(row["schemaname"], row["relname"]): row for row in rows}


def one(server: Server, query: str) -> float:
    return float(server.execute(query, database=DATABASE)[0][0])


@pytest.mark.parametrize("role", [PGVIGIL, READER])
def test_a_database_is_as_large_as_the_server_says(stored: Server, role: Role) -> None:
    found = {row["datname"]: row["size"] for row in rows_of(stored, "storage.databases", role=role)}

    expected = stored.execute("select datname, pg_database_size(oid) from pg_database")
    assert set(found) == {name for name, _ in expected}
    for name, size in expected:
        # A file of statistics, or of a hint bit's free space, may come in between.
        assert found[name] == pytest.approx(size, abs=20 * BLOCK)


def test_a_role_without_privileges_sizes_what_it_may_connect_to_and_nothing_is_refused(
    stored: Server,
) -> None:
    stored.execute("create database closed")
    stored.execute("revoke connect on database closed from public")
    begin = stored.log_position()
    try:
        found = {row["datname"] for row in rows_of(stored, "storage.databases", role=BARE)}
        tablespaces = rows_of(stored, "storage.tablespaces", role=BARE)
    finally:
        stored.execute("drop database closed")

    assert DATABASE in found
    assert "closed" not in found
    assert tablespaces == []
    assert stored.errors_in_log(begin) == []


def test_a_database_that_is_half_dropped_is_left_out(stored: Server) -> None:
    stored.execute("create database half")
    stored.execute("update pg_database set datconnlimit = -2 where datname = 'half'")
    try:
        found = {row["datname"] for row in rows_of(stored, "storage.databases")}
    finally:
        stored.execute("update pg_database set datconnlimit = -1 where datname = 'half'")
        stored.execute("drop database half")

    assert "half" not in found
    assert DATABASE in found


def test_a_tablespace_is_as_large_as_the_server_says(stored: Server) -> None:
    found = {row["spcname"]: row["size"] for row in rows_of(stored, "storage.tablespaces")}

    assert set(found) == {"pg_default", "pg_global"}
    expected = dict(stored.execute("select spcname, pg_tablespace_size(oid) from pg_tablespace"))
    assert found["pg_default"] == pytest.approx(expected["pg_default"], abs=50 * BLOCK)


def test_a_table_is_as_large_as_its_files_with_indexes_and_toast(stored: Server) -> None:
    row = ask(stored, "tables")["shop", "orders"]

    main = "select sum(pg_relation_size(c.oid, 'main')) from pg_class c "
    toast = "(select reltoastrelid from pg_class where oid = 'shop.orders'::regclass)"
    heap = one(stored, main + "where oid = 'shop.orders'::regclass")
    indexes = one(stored, main + "join pg_index i on i.indexrelid = c.oid and "
                  "i.indrelid = 'shop.orders'::regclass")  # fmt: skip
    toasted = one(
        stored,
        main + f"where oid = {toast} or oid in (select indexrelid from pg_index "
        f"where indrelid = {toast})",
    )
    assert (row["heap_size"], row["indexes_size"]) == (heap, indexes)
    # VACUUM leaves the pages of an index as they were while it has nothing to remove from it.
    assert row["toast_size"] == pytest.approx(toasted, rel=0.03)
    assert row["total_size"] == heap + indexes + number(row, "toast_size")
    assert toasted > 500 * 3000
    assert row["reltuples"] == 500


def test_partitions_count_for_their_root_and_for_nothing_else(stored: Server) -> None:
    tables = ask(stored, "tables")

    names = {name for schema, name in tables if schema == "shop"}
    assert names == {"orders", "events", "kept", "fleeting"}
    events = tables["shop", "events"]
    assert events["reltuples"] == 30000
    assert events["n_tup_ins"] == 30000
    leaves = "select sum(pg_relation_size(relid, 'main')) from pg_partition_tree('shop.events')"
    assert events["heap_size"] == one(stored, f"{leaves} where isleaf")


def test_counters_are_those_of_the_views(stored: Server) -> None:
    views = {
        "pg_stat_user_tables": (
            *("seq_scan", "seq_tup_read", "idx_scan", "idx_tup_fetch", "n_tup_ins"),
            *("n_tup_upd", "n_tup_del", "n_tup_hot_upd"),
            *(("n_tup_newpage_upd",) if stored.major >= 16 else ()),
        ),
        "pg_statio_user_tables": (
            *("heap_blks_read", "heap_blks_hit", "idx_blks_read", "idx_blks_hit"),
            *("toast_blks_read", "toast_blks_hit", "tidx_blks_read", "tidx_blks_hit"),
        ),
    }
    with psycopg.connect(
        stored.conninfo(dbname=DATABASE), autocommit=True, options="-c enable_seqscan=off"
    ) as client:
        client.execute("select count(body || note) from shop.orders where id between 1 and 50")
        client.execute("update shop.orders set note = note || '!' where id <= 20")
        client.execute("delete from shop.orders where id = 21")

    def told() -> dict[str, float]:
        return {
            column: one(
                stored,
                f"select {column} from {view} where schemaname = 'shop' and relname = 'orders'",
            )
            for view, columns in views.items()
            for column in columns
        }

    # What a session counts is told some time after it ended, and is told to nobody at once.
    for _ in range(500):
        before = told()
        row = ask(stored, "tables")["shop", "orders"]
        if before["n_tup_del"] and before == told():
            break
    assert before["n_tup_del"] == 1
    assert {column: row[column] for column in before} == before
    assert before["n_tup_ins"] == 500
    assert before["idx_scan"] > 0
    if stored.major >= 16:
        assert row["last_idx_scan"] == pytest.approx(
            one(
                stored,
                "select extract(epoch from last_idx_scan) from pg_stat_user_tables "
                "where relname = 'orders'",
            )
        )


def test_all_relations_add_up_to_the_database(stored: Server) -> None:
    with psycopg.connect(stored.conninfo(dbname=DATABASE), autocommit=True) as client:
        client.execute("create temp table passing as select n from generate_series(1, 1000) n")
        client.execute("analyze passing")
        rows = rows_of(stored, "storage.relations", dbname=DATABASE)
    by_kind = {(row["relkind"], row["relpersistence"], row["catalog"]): row for row in rows}

    count = "select count(*) from pg_class where not relisshared"
    assert sum(number(row, "relations") for row in rows) in (
        one(stored, count),
        one(stored, count) + 1,
    )
    assert by_kind["materialized view", "permanent", "false"]["relations"] == 1
    assert by_kind["partitioned table", "permanent", "false"]["size"] is None
    assert by_kind["table", "unlogged", "false"]["size"] == one(
        stored, "select pg_relation_size('shop.fleeting', 'main')"
    )
    assert number(by_kind["table", "temporary", "false"], "size") > 0
    assert number(by_kind["table", "permanent", "true"], "size") > 50 * BLOCK
    files = one(
        stored,
        "select sum(pg_relation_size(oid, 'main')) from pg_class "
        "where relkind in ('r', 'i', 't', 'm', 'S') and not relisshared",
    )
    told = sum(number(row, "size") for row in rows if row["size"] is not None)
    assert told == pytest.approx(files, rel=0.05)


def test_tables_need_no_privilege_and_a_standby_tells_their_sizes(
    stored: Server, cluster: Cluster
) -> None:
    (lsn,) = stored.execute("select pg_current_wal_lsn()::text")[0]
    cluster.standby.wait_until(f"select pg_last_wal_replay_lsn() >= '{lsn}'")

    as_bare = rows_of(stored, "storage.tables", dbname=DATABASE, role=BARE)
    on_standby = rows_of(cluster.standby, "storage.tables", dbname=DATABASE)

    def sizes(rows: list[Row]) -> dict[object, object]:
        return {row["relname"]: row["total_size"] for row in rows}

    assert sizes(as_bare) == sizes(on_standby)
    assert "orders" in sizes(as_bare)


def test_a_locked_table_delays_nothing(stored: Server) -> None:
    with psycopg.connect(stored.conninfo(dbname=DATABASE)) as client:
        client.execute("lock shop.orders in access exclusive mode")
        for name in ("tables", "table_bloat"):
            ask(stored, name)
        rows_of(stored, "storage.index_bloat", dbname=DATABASE)
        rows_of(stored, "storage.relations", dbname=DATABASE)


def test_bloat_is_asked_only_where_it_was_granted(stored: Server) -> None:
    for name in ("storage.table_bloat", "storage.index_bloat"):
        assert "column_widths" in (refusal_of(stored, name) or "")
        assert "column_widths" in (refusal_of(stored, name, dbname=DATABASE, role=BARE) or "")
        assert refusal_of(stored, name, dbname=DATABASE) is None


def test_the_bloat_of_tables_is_near_that_of_pgstattuple(stored: Server) -> None:
    told = ask(stored, "table_bloat")

    off = {}
    for (name,) in stored.execute(
        "select relname from pg_class where relnamespace = 'bloat'::regnamespace "
        "and relkind = 'r' and relname not in ('keys', 'worn')",
        database=DATABASE,
    ):
        # What a table takes when it is written anew, with the same rows and the same settings.
        options = one(
            stored,
            "select coalesce(max(option_value::int), 100) from pg_class c, "
            f"pg_options_to_table(c.reloptions) where c.oid = 'bloat.{name}'::regclass",
        )
        stored.execute("create table bloat.anew (like bloat." + name + ")", database=DATABASE)
        try:
            stored.execute(
                f"alter table bloat.anew set (fillfactor = {options})"
                + (
                    ", alter a set storage plain, alter b set storage plain"
                    if name == "wide"
                    else ""
                ),
                database=DATABASE,
            )
            stored.execute(f"insert into bloat.anew select * from bloat.{name}", database=DATABASE)
            small = one(stored, "select pg_relation_size('bloat.anew', 'main')")
        finally:
            stored.execute("drop table bloat.anew", database=DATABASE)
        length, free, dead = stored.execute(
            f"select table_len, free_space, dead_tuple_len from pgstattuple('bloat.{name}')",
            database=DATABASE,
        )[0]
        row = told.get(("bloat", name))
        wasted = number(row, "wasted") if row else 0.0
        off[name] = (
            round((wasted - (length - small)) / length, 3),
            round((wasted - free - dead) / length, 3),
        )
        if row:
            assert row["ratio"] == pytest.approx(wasted / length)
    assert all(abs(against_rewrite) <= 0.05 for against_rewrite, _ in off.values()), off


def test_the_bloat_of_indexes_is_near_what_a_rebuild_saves(stored: Server) -> None:
    told = {
        row["indexrelname"]: row for row in rows_of(stored, "storage.index_bloat", dbname=DATABASE)
    }

    off = {}
    for table in ("keys", "worn"):
        names = [
            name
            for (name,) in stored.execute(
                f"select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid "
                f"where i.indrelid = 'bloat.{table}'::regclass",
                database=DATABASE,
            )
        ]
        before = {name: one(stored, f"select pg_relation_size('bloat.{name}')") for name in names}
        stored.execute(f"create table bloat.rebuilt as table bloat.{table}", database=DATABASE)
        try:
            for name in names:
                (text,) = stored.execute(
                    f"select pg_get_indexdef('bloat.{name}'::regclass)", database=DATABASE
                )[0]
                text = text.replace(f"INDEX {name} ON bloat.{table}", "INDEX anew ON bloat.rebuilt")
                stored.execute(text, database=DATABASE)
                after = one(stored, "select pg_relation_size('bloat.anew')")
                stored.execute("drop index bloat.anew", database=DATABASE)
                wasted = number(told[name], "wasted") if name in told else 0.0
                off[name] = round((wasted - (before[name] - after)) / before[name], 3)
        finally:
            stored.execute("drop table bloat.rebuilt", database=DATABASE)
    assert all(abs(difference) <= 0.1 for difference in off.values()), off
    assert number(told["worn_id"], "ratio") > 0.6
