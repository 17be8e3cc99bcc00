"""What the queries of the area schema find, beside what was built there to be found."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from pgvigil import grants

from lab.catalogue import Row, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, Cluster, Role
from lab.postgres import Server

DATABASE = "schema_area"

pytestmark = pytest.mark.parametrize("major", [13, 18])

INDEXES = """
create table used (id int primary key, a int, b int, c text);
insert into used select n, n, n % 7, 'c' || n from generate_series(1, 20000) n;
create index used_a on used (a);
create index used_b on used (b);
create unique index used_c on used (c);

create table twins (id int primary key, a int, b int, c text, d text);
insert into twins select n, n, n, n, n from generate_series(1, 3000) n;
create index twins_a on twins (a);
create index twins_ab on twins (a, b);
create index twins_ab_again on twins (a, b);
create index twins_b_desc on twins (b desc nulls last);
create index twins_b on twins (b);
create index twins_c on twins (c);
create index twins_c_pattern on twins (c text_pattern_ops);
create index twins_c_collated on twins (c collate "POSIX");
create index twins_c_hash on twins using hash (c);
create index twins_id on twins (id);
create unique index twins_id_b on twins (id, b);
create index twins_lower on twins (lower(c), a);
create index        twins_lower_again on twins   (lower(c), a);
create index twins_lower_other on twins (upper(c), a);
create index twins_d on twins (d) where a > 10;
create index    twins_d_again on    twins (d, b) where a > 10;
create index twins_d_all on twins (d, a);
create index twins_d_plus on twins (d) include (c);
create unique index twins_unique on twins (a, c, d);
create unique index twins_unique_wider on twins (a, c, d, b);

create table parted (a int, b int, at date) partition by range (at);
create table parted_1 partition of parted for values from ('2026-01-01') to ('2026-02-01');
create table parted_2 partition of parted for values from ('2026-02-01') to ('2026-03-01');
insert into parted select n, n, '2026-01-20'::date + n % 20 from generate_series(1, 5000) n;
create index parted_a on parted (a);
create index parted_ab on parted (a, b);
create index parted_b on parted (b);
create index parted_open on only parted (a, at);

create table doubtful (a int);
insert into doubtful values (1), (1);
"""

KEYS = """
create table parent (id int primary key, code varchar(9) unique, n int, unique (id, n));
insert into parent select n, n, n from generate_series(1, 50) n;
create table child (
  good int constraint child_good references parent,
  bare int constraint child_bare references parent,
  partly int constraint child_partly references parent,
  other int constraint child_other references parent,
  wide int8 constraint child_wide references parent,
  n int, constraint child_pair foreign key (n, good) references parent (n, id));
alter table parent add unique (n, id);
create index on child (good, n);
create index on child (partly) where partly is not null;
create index on child (other) where other > 3;
create index on child (wide);
insert into child select 1, 1, 1, 1, 1, 1 from generate_series(1, 2000);
create table hollow (id int references parent);

create table no_key (a int);
insert into no_key select generate_series(1, 1000);
create table no_primary (a int not null unique);
create table half_unique (a int);
create unique index on half_unique (a) where a > 0;
create table full_identity (a int);
alter table full_identity replica identity full;
create publication news for table no_key, full_identity, no_primary;
create unlogged table light (a int primary key);
insert into light select generate_series(1, 1000);

create table checked (a int, b int references parent, c int);
insert into checked values (1, 1);
alter table checked add constraint checked_a check (a > 0) not valid;
create function nothing() returns trigger language plpgsql as 'begin return null; end';
create trigger audited after insert on checked execute procedure nothing();
create trigger watched after insert on checked execute procedure nothing();
alter table checked disable trigger audited;
create table loaded (b int constraint loaded_b references parent);
alter table loaded disable trigger all;

create function sly() returns int security definer language sql as 'select 1';
create function sly(int) returns int security definer language sql as 'select 1';
create function careful() returns int security definer language sql set search_path = pg_catalog
  as 'select 1';
"""

SEQUENCES = """
create table s_serial (id serial); select setval('s_serial_id_seq', 1610612736);
create table s_fresh (id serial);
create table s_big (id bigserial); select setval('s_big_id_seq', 5000000000);
create table s_identity (id smallint generated always as identity);
select setval('s_identity_id_seq', 30000);
create sequence s_shared; create table s_user (a bigint default nextval('s_shared'));
create table s_user_int (b int default nextval('s_shared')); select setval('s_shared', 2000000000);
create domain small as smallint; create sequence s_domained;
create table s_domain (a small default nextval('s_domained')); select setval('s_domained', 20000);
create sequence s_down increment -1 minvalue -1000; select setval('s_down', -900);
create sequence s_round maxvalue 1000 cycle; select setval('s_round', 990);
create sequence s_round_int maxvalue 4000000000 cycle; select setval('s_round_int', 1932735283);
create table s_rounded (id int default nextval('s_round_int'));
create sequence s_ended maxvalue 10; select setval('s_ended', 10);
create sequence s_low maxvalue 100; select setval('s_low', 49);
"""

PARTITIONS = """
create table p_ready (at timestamptz) partition by range (at);
create table p_late (at date, region text) partition by list (region);
create table p_late_eu partition of p_late for values in ('eu') partition by range (at);
create table p_late_us partition of p_late for values in ('us') partition by range (at);
create table p_late_any partition of p_late default;
insert into p_late select '2020-01-01', 'mars' from generate_series(1, 7);
create table p_old (at timestamp) partition by range (at);
create table p_old_1 partition of p_old for values from ('1969-12-31 12:00') to ('1999-01-01');
create table p_open (at date) partition by range (at);
create table p_open_1 partition of p_open for values from ('2020-02-29') to (maxvalue)
  partition by hash (at);
create table p_open_1a partition of p_open_1 for values with (modulus 2, remainder 0);
create table p_open_1b partition of p_open_1 for values with (modulus 2, remainder 1);
create table p_number (id int8) partition by range (id);
create table p_number_1 partition of p_number for values from (1) to (1000);
create table p_number_rest partition of p_number default;
do $$
declare
  days record;
begin
  for days in select current_date + d as begins, current_date + d + 10 as ends, d
    from generate_series(-15, 5, 10) as d
  loop
    execute format('create table p_ready_%s partition of p_ready for values from (%L) to (%L)',
      days.d + 50, days.begins, days.ends);
    execute format('create table p_late_eu_%s partition of p_late_eu for values from (%L) to (%L)',
      days.d + 50, days.begins, days.ends);
    if days.d < 0 then
      execute format(
        'create table p_late_us_%s partition of p_late_us for values from (%L) to (%L)',
        days.d + 50, days.begins, days.ends);
    end if;
  end loop;
end $$;
"""


@pytest.fixture(scope="module")
def built() -> dict[int, str]:
    """The servers whose database stands already."""
    return {}


@pytest.fixture
def house(server: Server, cluster: Cluster, built: dict[int, str]) -> Server:
    """The shared primary with a database that has something of everything."""
    if server.major not in built:
        server.execute(f"drop database if exists {DATABASE}")
        server.execute(f"create database {DATABASE}")
        for text in (INDEXES, KEYS, SEQUENCES, PARTITIONS):
            server.execute(text, database=DATABASE)
        with pytest.raises(psycopg.errors.UniqueViolation):
            server.execute(
                "create unique index concurrently doubtful_a on doubtful (a)", database=DATABASE
            )
        if server.major >= 18:
            server.execute(
                "alter table checked add constraint checked_c check (c > 0) not enforced",
                database=DATABASE,
            )
        server.execute("vacuum analyze", database=DATABASE)
        built[server.major] = DATABASE
    return server


@pytest.fixture(scope="module", autouse=True)
def leave_nothing(built: dict[int, str], clusters: object) -> Iterator[None]:
    """Drop the databases when all tests of this file are done."""
    yield
    for major in built:
        clusters.get(major).primary.execute(f"drop database {DATABASE} with (force)")  # type: ignore[attr-defined]


def rows(server: Server, name: str, role: Role | None = PGVIGIL) -> list[Row]:
    return rows_of(server, f"schema.{name}", dbname=DATABASE, role=role)


def row(server: Server, name: str, role: Role | None = PGVIGIL) -> Row:
    (only,) = rows(server, name, role)
    return only


def by(rows: list[Row], label: str) -> dict[str, Row]:
    return {str(row[label]): row for row in rows}


def one(server: Server, query: str) -> float:
    return float(server.execute(query, database=DATABASE)[0][0])


def eventually(true: Callable[[], bool]) -> None:
    """Statistics of a session arrive at the server's some time after it."""
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_use_of_an_index_is_what_the_views_say_and_partitions_are_one(house: Server) -> None:
    house.execute(
        "set enable_seqscan = off; set enable_bitmapscan = off;"
        " select a from used where a = 5; select a from used where a < 100;"
        " select b from parted where b = 7;",
        database=DATABASE,
    )
    scans = (
        "select sum(idx_scan) from pg_stat_user_indexes"
        " where indexrelname in ('parted_1_b_idx', 'parted_2_b_idx')"
    )
    eventually(lambda: one(house, scans) >= 2)

    found = by(rows(house, "indexes"), "indexrelname")

    assert found["used_a"]["relname"] == "used"
    assert found["used_a"]["schemaname"] == "public"
    (said,) = house.execute(
        "select idx_scan, idx_tup_read, idx_tup_fetch, idx_blks_read, idx_blks_hit,"
        " pg_relation_size(indexrelid)"
        " from pg_stat_user_indexes join pg_statio_user_indexes using (indexrelid)"
        " where pg_stat_user_indexes.indexrelname = 'used_a'",
        database=DATABASE,
    )
    columns = ("idx_scan", "idx_tup_read", "idx_tup_fetch", "idx_blks_read", "idx_blks_hit", "size")
    assert tuple(found["used_a"][name] for name in columns) == said
    assert said[0] >= 2
    if house.major >= 16:
        last = (
            "select extract(epoch from last_idx_scan) from pg_stat_user_indexes"
            " where indexrelname = 'used_a'"
        )
        assert found["used_a"]["last_idx_scan"] == pytest.approx(one(house, last))
        assert found["used_b"]["last_idx_scan"] is None
    else:
        assert "last_idx_scan" not in found["used_a"]
    assert found["parted_b"]["idx_scan"] == one(house, scans)
    size = "select pg_relation_size('parted_1_b_idx') + pg_relation_size('parted_2_b_idx')"
    assert found["parted_b"]["size"] == one(house, size)
    assert "parted_1_b_idx" not in found


def test_unused_indexes_are_those_that_could_go(house: Server, cluster: Cluster) -> None:
    house.execute(
        "set enable_seqscan = off; set enable_bitmapscan = off; select a from used where a = 5;"
        " select b from parted where b = 7;",
        database=DATABASE,
    )
    eventually(lambda: "used_a" not in by(rows(house, "unused_indexes"), "indexrelname"))
    eventually(lambda: "parted_b" not in by(rows(house, "unused_indexes"), "indexrelname"))

    found = by(rows(house, "unused_indexes"), "indexrelname")

    assert found["used_b"]["size"] == one(house, "select pg_relation_size('used_b')")
    assert {"parted_a", "parted_ab"} <= set(found)
    assert not {"used_pkey", "used_c", "doubtful_a", "twins_unique", "parted_1_a_idx"} & set(found)
    totals = row(house, "index_totals")
    assert totals["unused"] == len(found)
    assert totals["unused_size"] == sum(float(r["size"] or 0) for r in found.values())
    since = (
        "select extract(epoch from greatest(b.stats_reset, d.stats_reset))"
        f" from pg_stat_bgwriter b, pg_stat_database d where datname = '{DATABASE}'"
    )
    assert totals["since"] == pytest.approx(one(house, since))

    # A standby counts its own scans: what its primary uses is unused there.
    assert row(cluster.standby, "index_totals")["unused"] == len(
        rows(cluster.standby, "unused_indexes")
    )
    assert "used_a" in by(rows(cluster.standby, "unused_indexes"), "indexrelname")


def test_duplicate_indexes_are_named_with_the_one_that_does_their_work(house: Server) -> None:
    found = rows(house, "duplicate_indexes")

    assert {(r["indexrelname"], r["covered_by"]) for r in found} == {
        ("twins_a", "twins_ab"),
        ("twins_ab_again", "twins_ab"),
        ("twins_id", "twins_id_b"),
        ("twins_lower_again", "twins_lower"),
        ("twins_d", "twins_d_again"),
        ("parted_a", "parted_ab"),
    }
    sizes = {r["indexrelname"]: r["size"] for r in found}
    assert sizes["twins_a"] == one(house, "select pg_relation_size('twins_a')")
    size = "select pg_relation_size('parted_1_a_idx') + pg_relation_size('parted_2_a_idx')"
    assert sizes["parted_a"] == one(house, size)

    totals = row(house, "index_totals")
    assert totals["duplicate"] == len(found)
    assert totals["duplicate_size"] == sum(float(str(size)) for size in sizes.values())
    names = {str(r["indexrelname"]): r["size"] for r in (*found, *rows(house, "unused_indexes"))}
    assert totals["reclaimable_size"] == sum(float(str(size)) for size in names.values())


def test_of_two_equal_indexes_the_one_that_enforces_something_stays(house: Server) -> None:
    house.execute(
        "create table equals (a int not null, b int);"
        "create index equals_plain on equals (a);"
        "create unique index equals_unique on equals (a);"
        "alter table equals add constraint equals_key primary key (a);"
        "create unique index equals_identity on equals (a);"
        "alter table equals replica identity using index equals_identity;",
        database=DATABASE,
    )
    try:
        found = [r for r in rows(house, "duplicate_indexes") if r["relname"] == "equals"]
        assert {r["indexrelname"] for r in found} == {"equals_plain", "equals_unique"}
        if house.major >= 15:
            house.execute(
                "create unique index equals_b on equals (b);"
                "create unique index equals_b_nulls on equals (b) nulls not distinct",
                database=DATABASE,
            )
            assert (
                len([r for r in rows(house, "duplicate_indexes") if r["relname"] == "equals"]) == 2
            )
    finally:
        house.execute("drop table equals", database=DATABASE)


def test_indexes_are_counted_by_kind(house: Server) -> None:
    found = {(r["amname"], r["kind"]): r["indexes"] for r in rows(house, "index_kinds")}

    assert found["hash", "plain"] == 1
    primary = (
        "select count(*) from pg_index join pg_class c on c.oid = indexrelid"
        " where indisprimary and c.relnamespace = 'public'::regnamespace"
    )
    assert found["btree", "primary"] == one(house, primary)


def test_an_invalid_index_is_found_unless_it_is_being_built(house: Server) -> None:
    found = by(rows(house, "invalid_indexes", BARE), "indexrelname")

    assert set(found) == {"doubtful_a", "parted_open"}
    assert found["doubtful_a"]["size"] == one(house, "select pg_relation_size('doubtful_a')")
    assert row(house, "integrity_totals")["invalid_indexes"] == 2

    with (
        psycopg.connect(house.conninfo(dbname=DATABASE)) as reader,
        building(house, "create index concurrently twins_slow on twins (c, d, a)", reader),
    ):
        assert "twins_slow" not in by(rows(house, "invalid_indexes", BARE), "indexrelname")
        assert row(house, "integrity_totals", BARE)["invalid_indexes"] == 2
    house.execute("drop index twins_slow", database=DATABASE)


@contextmanager
def building(
    server: Server, statement: str, reader: "psycopg.Connection[tuple[object, ...]]"
) -> Iterator[None]:
    """A concurrent build that waits for a reader's transaction."""
    reader.execute("insert into twins values (0, 0, 0, '0', '0')")
    builder = psycopg.connect(server.conninfo(dbname=DATABASE), autocommit=True)
    builder.pgconn.send_query(statement.encode())
    server.wait_until(
        "select exists (select from pg_stat_progress_create_index where phase like 'waiting%')"
    )
    try:
        yield
    finally:
        reader.rollback()
        while builder.pgconn.get_result():
            pass
        builder.close()


def test_foreign_keys_are_found_that_no_index_serves(house: Server) -> None:
    found = by(rows(house, "foreign_keys"), "conname")

    unindexed = {name for name, r in found.items() if r["unindexed_size"] is not None}
    assert unindexed == {"child_bare", "child_other", "checked_b_fkey"}
    assert {name for name, r in found.items() if r["mistyped_size"] is not None} == {"child_wide"}
    size = one(house, "select pg_relation_size('child')")
    assert found["child_bare"]["unindexed_size"] == size
    assert found["child_wide"]["mistyped_size"] == size
    totals = row(house, "totals")
    assert totals["unindexed"] == len(unindexed)
    assert totals["mistyped"] == 1
    assert totals["foreign_keys"] == one(
        house, "select count(*) from pg_constraint where contype = 'f'"
    )


def test_tables_without_a_key_or_an_identity_are_found(house: Server) -> None:
    found = by(rows(house, "keyless_tables"), "relname")

    assert found["no_key"]["size"] == one(house, "select pg_relation_size('no_key')")
    assert found["no_key"]["without_unique"] is not None
    assert found["no_primary"]["without_unique"] is None
    assert found["half_unique"]["without_unique"] is not None
    published = {name for name, r in found.items() if r["without_identity"] is not None}
    assert published == {"no_key", "no_primary"}
    assert not {"used", "light", "parted_1"} & set(found)
    assert "parted" in found
    totals = row(house, "totals")
    assert totals["no_primary"] == len(found)
    assert totals["no_unique"] == sum(r["without_unique"] is not None for r in found.values())
    assert totals["no_identity"] == 2
    assert totals["unlogged"] == 1
    assert totals["unlogged_size"] == one(house, "select pg_relation_size('light')")


def test_a_big_table_read_from_end_to_end_is_found(house: Server) -> None:
    house.execute(
        "create table read_whole as select n, repeat('x', 500) from generate_series(1, 24000) n;"
        "create table read_by_key as select n, repeat('x', 500) from generate_series(1, 24000) n;"
        "alter table read_by_key add primary key (n); analyze read_whole, read_by_key;",
        database=DATABASE,
    )
    try:
        house.execute(
            "select count(*) from read_whole;"
            " set enable_seqscan = off; set enable_bitmapscan = off;"
            " set enable_indexonlyscan = off; set enable_indexscan = on;"
            + "select sum(length(repeat)) from read_by_key where n > 0;"
            * 3,
            database=DATABASE,
        )
        eventually(
            lambda: (
                one(
                    house,
                    "select idx_tup_fetch from pg_stat_user_tables where relname = 'read_by_key'",
                )
                >= 72000
            )
        )

        found = by(rows(house, "sequential_tables"), "relname")

        assert found["read_whole"]["size"] == one(house, "select pg_relation_size('read_whole')")
        assert found["read_whole"]["share"] == 1
        assert set(found) == {"read_whole"}
        assert row(house, "sequential_totals")["tables"] == 1
    finally:
        house.execute("drop table read_whole, read_by_key", database=DATABASE)


def test_what_the_schema_does_not_enforce_is_found(house: Server) -> None:
    found = by(rows(house, "unenforced_constraints"), "conname")
    assert set(found) == {"checked_a"}
    assert found["checked_a"]["size"] == one(house, "select pg_relation_size('checked')")

    triggers = {
        (r["relname"], r["tgname"]): r["triggers"] for r in rows(house, "disabled_triggers")
    }
    assert triggers == {("checked", "audited"): 1, ("loaded", "loaded_b"): 2}

    totals = row(house, "integrity_totals")
    assert totals["not_valid"] == 1
    assert totals["disabled_triggers"] == 1
    assert totals["disabled_keys"] == 2
    assert totals.get("not_enforced") == (1 if house.major >= 18 else None)
    assert totals.get("detach_pending") == (0 if house.major >= 14 else None)


def test_a_security_definer_that_sets_no_search_path_is_found(house: Server) -> None:
    (found,) = rows(house, "unsafe_functions")
    assert (found["proname"], found["functions"]) == ("sly", 2)


def test_a_sequence_is_measured_against_the_nearest_end(house: Server) -> None:
    found = {str(r["sequencename"]): r for r in rows(house, "sequences", None)}

    used = {name: r["used"] for name, r in found.items()}
    assert used == {
        "s_serial_id_seq": pytest.approx(0.75, rel=1e-6),
        "s_identity_id_seq": pytest.approx(30000 / 32767, rel=1e-4),
        "s_shared": pytest.approx(2000000000 / 2147483647, rel=1e-6),
        "s_domained": pytest.approx(20000 / 32767, rel=1e-4),
        "s_down": pytest.approx(899 / 999),
        "s_round_int": pytest.approx(0.9, rel=1e-6),
        "s_ended": 1,
    }
    assert (found["s_shared"]["relname"], found["s_shared"]["attname"]) == ("s_user_int", "b")
    assert (found["s_down"]["relname"], found["s_down"]["attname"]) == (None, None)
    totals = row(house, "sequence_totals", None)
    assert totals["used"] == 1
    assert totals["unread"] == 0
    assert totals["sequences"] == one(house, "select count(*) from pg_sequences")
    # Of all but s_big and s_round, which never end.
    assert totals["limited"] == one(house, "select count(*) from pg_sequences") - 2


def test_a_sequence_that_may_not_be_read_is_counted(house: Server) -> None:
    begin = house.log_position()
    limited = row(house, "sequence_totals", None)["limited"]

    for role in (PGVIGIL, READER, BARE):
        assert rows(house, "sequences", role) == []
        totals = row(house, "sequence_totals", role)
        assert (totals["unread"], totals["limited"], totals["used"]) == (limited, limited, None)
    house.execute("grant select on s_ended to bare", database=DATABASE)
    assert row(house, "sequence_totals", BARE)["used"] == 1
    assert row(house, "sequence_totals", BARE)["unread"] == float(str(limited)) - 1
    house.execute("revoke select on s_ended from bare", database=DATABASE)
    house.execute(grants.script("pgvigil", ["sequences"], create=False), database=DATABASE)
    assert row(house, "sequence_totals", PGVIGIL)["unread"] == 0
    house.execute("drop owned by pgvigil", database=DATABASE)

    assert house.errors_in_log(begin) == []


def test_a_sequence_that_somebody_alters_is_left_alone(house: Server) -> None:
    begin = house.log_position()
    with psycopg.connect(house.conninfo(dbname=DATABASE)) as other:
        other.execute("alter sequence s_ended maxvalue 10")

        names = {r["sequencename"] for r in rows(house, "sequences", None)}
        assert "s_serial_id_seq" in names
        assert "s_ended" not in names
        assert row(house, "sequence_totals", None)["unread"] == 1
        other.rollback()
    assert house.errors_in_log(begin) == []


def test_no_more_sequences_are_read_at_once_than_the_lock_table_bears(house: Server) -> None:
    house.execute(
        """
        create schema crowd;
        do $$ begin
          for n in 1..700 loop
            execute format('create table crowd.t%s (id serial)', n);
          end loop;
        end $$;
        insert into crowd.t650 values (default);
        select setval('crowd.t650_id_seq', 2000000000);
        analyze crowd.t650;
        """,
        database=DATABASE,
    )
    try:
        totals = row(house, "sequence_totals", None)
        assert totals["unread"] == float(str(totals["limited"])) - 500
        # The fuller a table the sooner its sequence is read.
        assert "t650_id_seq" in by(rows(house, "sequences", None), "sequencename")
    finally:
        for begin in range(1, 700, 100):
            tables = ", ".join(f"crowd.t{n}" for n in range(begin, begin + 100))
            house.execute(f"drop table {tables}", database=DATABASE)
        house.execute("drop schema crowd", database=DATABASE)


def test_partitions_tell_whether_the_next_one_exists(house: Server) -> None:
    found = by(rows(house, "partitions"), "relname")

    today = one(house, "select extract(epoch from current_date::timestamp)")
    day = 86400
    zone = one(house, "select extract(epoch from current_date::timestamptz)") - today
    assert found["p_ready"]["newest_from"] == today + zone + 5 * day
    assert found["p_ready"]["newest_to"] == today + zone + 15 * day
    assert found["p_ready"]["next_missing"] == 0
    # Below one region the newest partition has begun, though not below the other.
    assert found["p_late"]["newest_from"] == today - 5 * day
    assert found["p_late"]["newest_to"] == today + 5 * day
    assert found["p_late"]["next_missing"] == 1
    assert found["p_late"]["default_rows"] == 7
    assert (found["p_late"]["partitions"], found["p_late"]["levels"]) == (6, 2)
    assert found["p_old"]["newest_from"] == -43200
    assert found["p_old"]["newest_to"] == 915148800
    assert found["p_old"]["next_missing"] == 0
    assert found["p_open"]["newest_from"] == 1582934400
    assert found["p_open"]["newest_to"] is None
    assert found["p_open"]["next_missing"] == 1
    assert found["p_number"]["newest_from"] is None
    assert found["p_number"]["next_missing"] is None
    assert found["p_number"]["default_rows"] == 0
    assert found["p_ready"]["default_rows"] is None


def numbers(server: Server) -> dict[str, Row]:
    return by(rows(server, "fingerprints"), "kind")


CHANGES = {
    "add column": ("alter table used add z int", {"columns"}),
    "default": ("alter table used alter b set default 5", {"columns"}),
    "options": ("alter table used set (fillfactor = 90)", {"tables"}),
    "comment": ("comment on table used is 'x'", set()),
    "index": ("create index on used (b, c)", {"indexes"}),
    "check": ("alter table used add check (b < 9)", {"constraints"}),
    "validate": ("alter table checked validate constraint checked_a", {"constraints"}),
    "view": ("create view seen as select a from used", {"views", "columns", "grants"}),
    "function": (
        "create or replace function careful() returns int security definer language sql"
        " set search_path = pg_catalog as 'select 2'",
        {"functions"},
    ),
    "trigger": ("alter table checked disable trigger watched", {"triggers"}),
    "row security": ("alter table used enable row level security", {"policies"}),
    "policy": ("create policy mine on used using (b > 0)", {"policies"}),
    "type": ("create type colour as enum ('red')", {"types"}),
    "label": ("alter type mood add value 'sad'", {"types"}),
    "grant": ("grant select (a) on used to bare", {"grants"}),
    "sequence": ("alter sequence s_low maxvalue 101", {"sequences"}),
    "schema": ("create schema more", {"schemas", "grants"}),
    "partition": (
        "create table parted_3 partition of parted"
        " for values from ('2026-03-01') to ('2026-04-01')",
        {"partitions"},
    ),
    "extension": ("alter extension plpgsql set schema pg_catalog", set()),
    "use": ("select nextval('s_low'); insert into used values (-1); analyze used", set()),
    "rewrite": (
        "truncate hollow; cluster used using used_pkey; alter table used set without cluster",
        set(),
    ),
    "vacuum": ("vacuum full used", set()),
    "reindex": ("reindex table concurrently used", set()),
    "temporary": (
        "create temporary table gone (a int); create temporary view was as select 1",
        set(),
    ),
}


def test_a_fingerprint_changes_with_its_kind_and_with_nothing_else(house: Server) -> None:
    house.execute("drop database if exists changing")
    house.execute(f"create database changing template {DATABASE}")
    house.execute("create type mood as enum ('glad')", database="changing")

    def look() -> dict[str, Row]:
        return by(rows_of(house, "schema.fingerprints", dbname="changing"), "kind")

    try:
        before = look()
        assert all(0 <= float(str(r["fingerprint"])) < 2**53 for r in before.values())
        for name, (statement, kinds) in CHANGES.items():
            house.execute(statement, database="changing")
            after = look()
            changed = {k for k in after if after[k]["fingerprint"] != before[k]["fingerprint"]}
            assert changed == kinds, name
            before = after
    finally:
        house.execute("drop database changing with (force)")


def test_a_fingerprint_counts_objects_and_is_the_same_for_every_role(house: Server) -> None:
    found = numbers(house)

    assert found["views"]["objects"] == 0
    assert found["sequences"]["objects"] == one(house, "select count(*) from pg_sequences")
    assert found["functions"]["objects"] == 4
    assert found["extensions"]["objects"] == 1
    tables = (
        "select count(*) from pg_class where relkind in ('r', 'p')"
        " and relnamespace = 'public'::regnamespace and"
    )
    assert found["tables"]["objects"] == one(house, f"{tables} not relispartition")
    assert found["partitions"]["objects"] == one(house, f"{tables} relispartition")
    for role in (READER, BARE, None):
        assert by(rows(house, "fingerprints", role), "kind") == found


def test_what_only_a_primary_can_tell_is_not_asked_of_a_standby(
    house: Server, cluster: Cluster
) -> None:
    refused = {"sequences", "partitions", "fingerprints", "invalid_indexes", "totals"}
    for name in refused:
        assert "role" in str(refusal_of(cluster.standby, f"schema.{name}"))
