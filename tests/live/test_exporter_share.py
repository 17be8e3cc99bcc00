"""What the exporter says it costs the server is what the server itself says of it."""

import re
from contextlib import ExitStack

import psycopg
import pytest

from lab.catalogue import asking, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, ROLES, Role
from lab.postgres import Server


@pytest.mark.parametrize("major", [13, 18])
def test_sessions_are_counted_as_the_server_sees_them(member: Server, role: Role) -> None:
    named = {
        "pgvigil": role.login,
        "pgvigil background": role.login,
        "psql": role.login,  # ours by its role alone
        "pgvigil of another role": {"user": "postgres"},
    }
    with ExitStack() as stack:
        for name, login in named.items():
            line = member.conninfo(application_name=name, **login)
            stack.enter_context(psycopg.connect(line))

        (row,) = rows_of(member, "exporter.sessions", role=role)

    assert row["sessions"] == 3  # two of these, and the one that asked


@pytest.mark.parametrize("major", [13, 18])
def test_statements_are_those_of_the_exporters_role_and_no_others(
    server: Server, role: Role
) -> None:
    asked = (
        "select sum(calls)::float8, sum(rows)::float8, sum(total_exec_time) / 1000"
        f" from pg_stat_statements join pg_roles on oid = userid where rolname = '{role.name}'"
    )
    with psycopg.connect(server.conninfo(**role.login), autocommit=True) as connection:
        for _ in range(5):
            connection.execute("select pg_sleep(0.01), generate_series(1, 10)")
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute("select pg_sleep(0.5)")
    ((calls, count, seconds),) = server.execute(asked)

    (row,) = rows_of(server, "exporter.statements", role=role)

    ((calls_after, count_after, seconds_after),) = server.execute(asked)
    assert isinstance(row["calls"], float)
    assert isinstance(row["row_count"], float)
    assert isinstance(row["exec_time"], float)
    assert 5 <= calls <= row["calls"] < calls_after  # that statement is counted when it is over
    assert 50 <= count <= row["row_count"] < count_after
    assert 0.05 <= seconds <= row["exec_time"] < seconds_after


@pytest.mark.parametrize("major", [15, 18])
def test_memory_is_what_the_server_writes_to_its_log_of_that_session(member: Server) -> None:
    with asking(member) as asker:
        asker.ask(["exporter.memory"])  # what the first one learns stays in memory
        (row,) = asker.ask(["exporter.memory"])["exporter.memory"].rows
        begin = member.log_position()
        member.execute("select pg_log_backend_memory_contexts(%s)", [asker.backend_pid])
        total = re.compile(r"Grand total: (\d+) bytes in .*; (\d+) used")
        found = None
        for _ in range(1000):  # an idle session writes when it is next spoken to, or before
            asker.ask([])
            if found := total.search(member.log(begin)):
                break

    assert found
    # The statement that looks at the memory takes some itself.
    assert row["total_bytes"] == pytest.approx(float(found[1]), rel=0.2)
    assert row["used_bytes"] == pytest.approx(float(found[2]), rel=0.2)


@pytest.mark.parametrize("major", [13, 14, 15, 18])
def test_memory_is_asked_only_by_those_who_may(server: Server) -> None:
    if server.major < 15:
        expected: dict[str, str | None] = dict.fromkeys((role.name for role in ROLES), "version")
    else:
        expected = {PGVIGIL.name: None, READER.name: None, BARE.name: "function"}

    for role in ROLES:
        refusal = refusal_of(server, "exporter.memory", role=role)
        assert (refusal and refusal.partition(":")[0]) == expected[role.name], role.name
