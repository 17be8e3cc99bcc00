"""What is said of statements is what pg_stat_statements counted, whichever version of it."""

import re
from collections.abc import Callable, Iterator, Mapping

import psycopg
import pytest
from psycopg import sql

from lab.catalogue import Row, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, Cluster
from lab.postgres import Server, Setting

BLOCK = 8192
STATEMENTS = "queries.statements"

FreshServer = Callable[..., Server]


@pytest.fixture
def counted(server: Server) -> Iterator[str]:
    """A database whose statements nobody else runs."""
    server.execute("create database counted")
    yield "counted"
    server.execute("drop database counted")


def statements(server: Server, **labels: str | None) -> list[Row]:
    """The rows of `queries.statements` with these labels."""
    rows = rows_of(server, STATEMENTS)
    return [row for row in rows if all(row[name] == value for name, value in labels.items())]


def queryid(server: Server, text: str) -> str:
    """The queryid of the only statement with this text."""
    ((found,),) = server.execute(
        "select distinct queryid::text from pg_stat_statements where query = %s",
        [text],
    )
    return str(found)


@pytest.mark.parametrize("major", [13, 18])
def test_calls_rows_times_and_blocks_are_those_of_the_view(server: Server, counted: str) -> None:
    with psycopg.connect(server.conninfo(dbname=counted), autocommit=True) as connection:
        connection.execute("set work_mem = '64kB'")
        connection.execute("create table t (n int)")
        connection.execute("insert into t select generate_series(1, 30000)")
        for _ in range(3):
            connection.execute("select n from t order by n desc")
        connection.execute("create temporary table l as select generate_series(1, 9000) as n")
        connection.execute("select count(*) from l")
        connection.execute("select pg_sleep(0.05)")

    rows = statements(server, datname=counted)

    renamed = "shared_blk" if server.major >= 17 else "blk"
    columns = {
        **{name: (name, 1) for name in ("calls", "plans", "wal_records", "wal_fpi", "wal_bytes")},
        **{name: (f"total_{name}", 1 / 1000) for name in ("plan_time", "exec_time")},
        **{name: (name, 1 / 1000) for name in ("mean_exec_time", "max_exec_time")},
        **{
            f"{kind}_blks_{what}": (f"{kind}_blks_{what}", BLOCK)
            for kind in ("shared", "local")
            for what in ("hit", "read", "dirtied", "written")
        },
        **{f"temp_blks_{what}": (f"temp_blks_{what}", BLOCK) for what in ("read", "written")},
        **{f"shared_blk_{w}_time": (f"{renamed}_{w}_time", 1 / 1000) for w in ("read", "write")},
        "row_count": ("rows", 1),
    }
    expected = server.execute(
        sql.SQL(
            "select queryid::text, {} from pg_stat_statements where dbid ="
            " (select oid from pg_database where datname = 'counted')"
        ).format(
            sql.SQL(", ").join(
                sql.SQL("{}::float8 * {}").format(sql.Identifier(column), factor)
                for column, factor in columns.values()
            )
        )
    )
    assert len(expected) == len(rows) > 5
    by_id = {str(row["queryid"]): row for row in rows}
    for found, *values in expected:
        given = [by_id[found][name] for name in columns]
        assert given == pytest.approx(values, rel=1e-12), found
    (slow,) = [row for row in rows if row["queryid"] == queryid(server, "select pg_sleep($1)")]
    assert 0.05 <= number(slow, "exec_time") < 5
    (sort,) = [
        row for row in rows if row["queryid"] == queryid(server, "select n from t order by n desc")
    ]
    assert (sort["calls"], sort["row_count"]) == (3, 90000)
    assert number(sort, "temp_blks_written") > 0
    assert sum(number(row, "local_blks_hit") for row in rows) > 0
    assert sum(number(row, "wal_bytes") for row in rows) > 30000 * 30


def number(row: Mapping[str, object], column: str) -> float:
    value = row[column]
    assert isinstance(value, float)
    return value


@pytest.mark.parametrize("version", ["1.8", "1.9", "1.10", "1.11", "1.12"])
@pytest.mark.parametrize("major", [18])
def test_an_extension_that_pg_upgrade_left_old_costs_only_what_it_does_not_have(
    server: Server, counted: str, version: str
) -> None:
    server.execute(
        sql.SQL(
            "create schema {0}; grant usage on schema {0} to public;"
            " create extension pg_stat_statements schema {0} version {1}"
        ).format(sql.Identifier("odd \" 'schema"), version),
        database=counted,
    )
    with psycopg.connect(server.conninfo(dbname=counted), autocommit=True) as connection:
        connection.execute("create table t as select generate_series(1, 9000) as n")
    begin = server.log_position()

    old = rows_of(server, STATEMENTS, dbname=counted)
    new = rows_of(server, STATEMENTS)

    minor = int(version.partition(".")[2])
    since = {
        "nested_exec_time": 9,
        **dict.fromkeys(("temp_blk_read_time", "jit_functions", "jit_time"), 10),
        **dict.fromkeys(("local_blk_read_time", "local_blk_write_time"), 11),
        **dict.fromkeys(("wal_buffers_full", "parallel_workers_to_launch"), 12),
    }
    for column, first in since.items():
        assert (column in old[0]) is (minor >= first), column
    stable = [row for row in old if row["datname"] == counted and row["usename"] == "postgres"]
    for row in stable:
        (same,) = [other for other in new if other["queryid"] == row["queryid"]
                   and other["datname"] == counted and other["usename"] == "postgres"]  # fmt: skip
        assert {name: same[name] for name in row} == row
    assert any(number(row, "shared_blk_write_time") >= 0 for row in stable)
    assert sum(number(row, "wal_bytes") for row in stable) > 9000 * 30
    assert rows_of(server, "queries.entries", dbname=counted)[0]["entries"]
    assert (refusal_of(server, "queries.tracking", dbname=counted) is None) is (minor >= 9)
    assert server.errors_in_log(begin) == []


@pytest.mark.parametrize("major", [14, 18])
def test_a_statement_within_a_function_is_one_row_and_told_apart(fresh_server: FreshServer,
                                                                  major: int) -> None:  # fmt: skip
    server = fresh_server(major, **{"pg_stat_statements.track": "all"})
    server.execute("create table t as select 1 as n")
    server.execute(
        "create function f() returns bigint language plpgsql as"
        " $$ begin perform pg_sleep(0.05); return (select count(*) from t); end $$"
    )
    server.execute("select f()")
    server.execute("select pg_sleep(0.01)")
    sleep = server.execute(
        "select queryid::text, count(*), sum(calls), sum(total_exec_time) / 1000,"
        "  sum(total_exec_time) filter (where not toplevel) / 1000"
        " from pg_stat_statements where query ~ 'pg_sleep' and query !~ 'function'"
        " group by queryid having count(*) = 2"
    )
    if not sleep:  # PERFORM and SELECT are spelt differently; what counts is the queryid
        pytest.fail("no statement ran both ways")
    ((found, entries, calls, seconds, nested),) = sleep
    assert (entries, calls) == (2, 2)

    (row,) = statements(server, queryid=found, usename="postgres")

    assert row["calls"] == calls
    assert row["exec_time"] == pytest.approx(seconds)
    assert row["nested_exec_time"] == pytest.approx(nested)
    assert 0.05 <= number(row, "nested_exec_time") < number(row, "exec_time")
    rows = rows_of(server, STATEMENTS)
    keys = {(row["datname"], row["usename"], row["queryid"]) for row in rows}
    assert len(keys) == len(rows)


@pytest.mark.parametrize("major", [13, 18])
def test_statements_of_dropped_roles_and_databases_have_no_name_and_are_one_row(
    server: Server,
) -> None:
    names = ["gone \" 'one", "gone \n é 二"]
    for name in names:
        server.execute(sql.SQL("create role {} login superuser").format(sql.Identifier(name)))
        server.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        with psycopg.connect(
            host=str(server.directory), port=server.port, user="postgres", dbname=name,
            autocommit=True,
        ) as connection:  # fmt: skip
            connection.execute(sql.SQL("set session authorization {}").format(sql.Identifier(name)))
            connection.execute("select 'of the dropped', 1 + 1, 2 * 2, 3 - 3")
    found = queryid(server, "select $1, $2 + $3, $4 * $5, $6 - $7")

    alive = statements(server, queryid=found)
    for name in names:
        server.execute(sql.SQL("drop database {}").format(sql.Identifier(name)))
        server.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))
    (dropped,) = statements(server, queryid=found)

    assert {(row["datname"], row["usename"]) for row in alive} == {(n, n) for n in names}
    assert (dropped["datname"], dropped["usename"], dropped["calls"]) == (None, None, 2)
    assert dropped["exec_time"] == pytest.approx(sum(number(row, "exec_time") for row in alive))


@pytest.mark.parametrize("major", [13, 18])
def test_the_file_with_the_texts_is_not_read(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major)
    file = server.data / "pg_stat_tmp" / "pgss_query_texts.stat"
    # Each text ends with a zero; one that does not is passed over.
    file.write_bytes(re.sub(rb"[^\0]", b"\xff", file.read_bytes()))
    begin = server.log_position()

    assert rows_of(server, STATEMENTS)
    assert rows_of(server, "queries.entries")
    assert rows_of(server, "exporter.statements")

    assert server.errors_in_log(begin) == []
    with pytest.raises(psycopg.errors.CharacterNotInRepertoire):
        server.execute("select count(*) from pg_stat_statements")


@pytest.mark.parametrize("major", [13, 18])
def test_thousands_of_long_statements_are_summed_without_temporary_files(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, **{"pg_stat_statements.track": "all"})
    # 4,000 statements of 4 kB, each with its own choice of twelve operators.
    server.execute(
        """do $$
        declare list text;
        begin
          for number in 1..4000 loop
            select string_agg(case when number & (1 << bit) = 0 then '1 + 1' else '1 * 1' end, ', ')
            into list from generate_series(0, 11) as bit;
            execute 'select /*' || repeat('x', 4000) || '*/ ' || list;
          end loop;
        end $$"""
    )
    server.execute("select count(*) from pg_stat_statements")

    rows = rows_of(server, STATEMENTS)
    rows_of(server, "queries.entries")
    rows_of(server, "exporter.statements")

    assert len(rows) > 4000
    written = server.execute(
        "select sum(temp_blks_written), max(max_exec_time) from pg_stat_statements"
        " join pg_roles on oid = userid where rolname = %s",
        [PGVIGIL.name],
    )
    assert written[0][0] == 0
    assert written[0][1] < 1000


@pytest.mark.parametrize("major", [14, 18])
def test_entries_that_are_thrown_out_are_counted(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major, **{"pg_stat_statements.max": 100})
    before = rows_of(server, "queries.tracking")[0]
    assert before["dealloc"] == 0
    for number_of_columns in range(120):
        server.execute("select " + ", ".join(["1"] * (number_of_columns + 1)))

    ((least,),) = server.execute("select dealloc from pg_stat_statements_info")
    (tracking,) = rows_of(server, "queries.tracking")
    (entries,) = rows_of(server, "queries.entries")

    ((dealloc, reset),) = server.execute(
        "select dealloc, extract(epoch from stats_reset)::float8 from pg_stat_statements_info"
    )
    # What is asked meanwhile throws out others in its turn.
    assert 0 < least <= number(tracking, "dealloc") <= dealloc
    assert tracking["stats_reset"] == pytest.approx(reset)
    assert entries["maximum"] == 100
    assert 50 < number(entries, "entries") <= 100


@pytest.mark.parametrize("major", [13, 18])
def test_a_library_that_is_not_preloaded_is_told_and_never_called(
    fresh_server: FreshServer, major: int
) -> None:
    # The setting alone makes a placeholder, which looks as if the library were there.
    settings: dict[str, Setting | None] = {
        "shared_preload_libraries": "",
        "pg_stat_statements.max": 100,
    }
    server = fresh_server(major)
    assert rows_of(server, "queries.library") == [{"loaded": True}]
    server.set(settings)
    server.restart()
    begin = server.log_position()

    for role in (PGVIGIL, READER, BARE, None):
        assert rows_of(server, "queries.library", role=role) == [{"loaded": False}]
    for query in (STATEMENTS, "queries.texts", "exporter.statements"):
        assert rows_of(server, query) == []
    if major > 13:
        assert rows_of(server, "queries.tracking") == []
    assert server.errors_in_log(begin) == []


@pytest.mark.parametrize("major", [13, 18])
def test_who_may_not_see_statements_is_not_asked_for_them(server: Server) -> None:
    for query in (STATEMENTS, "queries.texts"):
        refusal = refusal_of(server, query, role=BARE)
        assert refusal == "privilege: bare lacks the privileges of pg_read_all_stats"
        assert refusal_of(server, query, role=READER) is None
    assert all(row["queryid"] for row in statements(server))


@pytest.mark.parametrize("major", [13, 18])
def test_a_standby_tells_what_ran_on_it(cluster: Cluster) -> None:
    with psycopg.connect(cluster.standby.conninfo(), autocommit=True) as connection:
        for _ in range(4):
            connection.execute("select 'on the standby', 1 + 1, 2 + 2, 3 * 3, 4 * 4")

    found = queryid(cluster.standby, "select $1, $2 + $3, $4 + $5, $6 * $7, $8 * $9")

    (row,) = statements(cluster.standby, queryid=found)
    assert row["calls"] == 4
    assert statements(cluster.primary, queryid=found) == []


def texts(server: Server) -> dict[str, str]:
    rows = rows_of(server, "queries.texts")
    assert len({row["queryid"] for row in rows}) == len(rows)
    return {str(row["queryid"]): str(row["query_text"]) for row in rows}


@pytest.mark.parametrize("major", [13, 18])
def test_texts_are_folded_cut_and_without_secrets(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major)
    said = [
        "select\n\t 'secret-1'  as  a,   1+1",
        "/* by 'secret-2' */ -- it's\n ( select 22*22 as commented)",
        "select 1 /* 'secret-3 */ , $tag$secret-4$tag$, 3*3*3",
        "create role someone login password 'secret-5'",
        "/* hidden */ alter role someone password 'secret-6'",
        "create table made as select 'secret-7' as column_of_made",
        "with w as (select 5 as five) select five from w where five::text <> 'secret-9'",
        "select '" + "x" * 900 + "'" + ", 1" * 900 + " as long",
    ]
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        for text in said:
            connection.execute(text.encode())
    begin = server.log_position()

    shown = texts(server)

    assert [text for text in shown.values() if "secret" in text] == []
    assert "select $1 as a, $2+$3" in shown.values()
    assert "select $1*$2 as commented)" in shown.values()
    assert {"CREATE", "ALTER"} <= set(shown.values())
    assert "with w as (select $1 as five) select five from w where five::text <> $2" in (
        shown.values()
    )
    assert max(len(text) for text in shown.values()) == 500
    assert not any("<insufficient" in text for text in shown.values())
    known = {str(row["queryid"]) for row in statements(server)}
    assert set(shown) <= known
    assert server.errors_in_log(begin) == []


@pytest.mark.parametrize("major", [13, 18])
def test_no_text_is_read_where_one_might_not_be_converted(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major)
    server.execute("create database bytes encoding 'SQL_ASCII' template template0 lc_collate 'C'"
                   " lc_ctype 'C'")  # fmt: skip
    with psycopg.connect(server.conninfo(dbname="bytes"), autocommit=True) as connection:
        connection.execute("set client_encoding to 'SQL_ASCII'")
        connection.pgconn.exec_(b'select 1 as "\xff\xfe"')
    with pytest.raises(psycopg.errors.CharacterNotInRepertoire):
        server.execute("select query from pg_stat_statements")
    begin = server.log_position()

    assert rows_of(server, "queries.texts") == []
    assert statements(server, datname="bytes")
    assert server.errors_in_log(begin) == []
