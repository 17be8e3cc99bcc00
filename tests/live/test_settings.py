"""Holds what the catalogue says of settings against what servers were given."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from lab.catalogue import asking, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, ROLES, Cluster, Role
from lab.postgres import MAJORS, Server, Setting

FreshServer = Callable[..., Server]

OURS = {
    "default_transaction_read_only",
    "idle_in_transaction_session_timeout",
    "lock_timeout",
    "standard_conforming_strings",
    "statement_timeout",
}
"""What our session has of its own, so that the server's value is not seen from it."""

OF_A_TRANSACTION = {"in_hot_standby", "transaction_deferrable", "transaction_read_only"}
MODES = {"data_directory_mode", "log_file_mode", "unix_socket_permissions"}


def values(server: Server, role: Role = PGVIGIL) -> dict[str, tuple[object, object]]:
    """The numbers and switches by name: value and unit."""
    rows = rows_of(server, "settings.values", role=role)
    found: dict[str, tuple[object, object]] = {
        str(r["name"]): (r["value"], r["unit"]) for r in rows
    }
    assert len(found) == len(rows)
    return found


@contextmanager
def changed(server: Server, **settings: Setting) -> Iterator[None]:
    server.set(settings)
    try:
        yield
    finally:
        server.set(dict.fromkeys(settings))


def in_base_units(setting: str, unit: str | None) -> tuple[float, str | None]:
    """A setting as pg_settings writes it, by our own reckoning."""
    if setting in ("on", "off"):
        return float(setting == "on"), None
    number = float(setting)
    if unit is None:
        return number, None
    parts = re.fullmatch(r"(\d*)(\D+)", unit)
    assert parts
    bytes_of = {"B": 1, "kB": 2**10, "MB": 2**20, "GB": 2**30}
    seconds_of = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}
    kind = "bytes" if parts[2] in bytes_of else "seconds"
    factor = int(parts[1] or 1) * {**bytes_of, **seconds_of}[parts[2]]
    return (number * factor if number >= 0 else number), kind


@pytest.mark.parametrize("major", MAJORS)
def test_every_number_and_switch_is_told_in_base_units(cluster: Cluster) -> None:
    for server in (cluster.primary, cluster.standby):
        told = values(server)
        expected = {
            name: in_base_units(setting, unit)
            for name, setting, unit in server.execute(
                "select name, setting, unit from pg_settings"
                " where vartype in ('bool', 'integer', 'real')"
            )
            if name not in OURS | OF_A_TRANSACTION | MODES
        }
        assert told.keys() == expected.keys()
        for name, (value, unit) in expected.items():
            assert told[name] == (pytest.approx(value), unit), name


@pytest.mark.parametrize("major", [13, 18])
def test_what_was_set_is_told_as_it_was_meant(server: Server) -> None:
    with changed(
        server,
        log_min_duration_statement="1500ms",
        maintenance_work_mem="96MB",
        checkpoint_timeout="7min",
        effective_cache_size="3GB",
        autovacuum_vacuum_scale_factor=0.125,
        full_page_writes=False,
        zero_damaged_pages=True,
        autovacuum_work_mem=-1,
        log_rotation_age="1d",
        work_mem="7MB",
        jit=False,
    ):
        told = values(server)
    # Our own session has others of these.
    assert told["work_mem"] == (7 * 2**20, "bytes")
    assert told["jit"] == (0, None)
    assert told["log_min_duration_statement"] == (1.5, "seconds")
    assert told["maintenance_work_mem"] == (96 * 2**20, "bytes")
    assert told["checkpoint_timeout"] == (420, "seconds")
    assert told["effective_cache_size"] == (3 * 2**30, "bytes")
    assert told["autovacuum_vacuum_scale_factor"] == (0.125, None)
    assert told["full_page_writes"] == (0, None)
    assert told["zero_damaged_pages"] == (1, None)
    assert told["fsync"] == (0, None)  # the lab's servers lose nothing that matters
    assert told["track_io_timing"] == (1, None)
    # No limit of its own, and not -1 kB.
    assert told["autovacuum_work_mem"] == (-1, "bytes")
    assert told["log_rotation_age"] == (86400, "seconds")
    assert told["shared_buffers"] == (16 * 2**20, "bytes")
    assert values(server)["log_min_duration_statement"] == (-1, "seconds")


@pytest.mark.parametrize("major", [13, 18])
def test_what_only_our_role_or_database_was_given_is_not_told_for_the_server(
    server: Server,
) -> None:
    server.execute("alter role pgvigil set random_page_cost = 1.5")
    server.execute("alter database postgres set seq_page_cost = 2.5")
    server.execute("alter role pgvigil in database postgres set synchronous_commit = off")
    server.execute("alter role all set cpu_tuple_cost = 0.25")
    try:
        told = values(server)
        assert {"random_page_cost", "seq_page_cost"}.isdisjoint(told)
        assert told["cpu_tuple_cost"] == (0.25, None)
        words = {r["name"] for r in rows_of(server, "settings.enums")}
        assert "synchronous_commit" not in words

        (count,) = rows_of(server, "settings.overrides")
        assert count == {"settings": 4}
        named = {
            (r["datname"], r["rolname"], r["name"]) for r in rows_of(server, "settings.override")
        }
        assert named == {
            (None, "pgvigil", "random_page_cost"),
            ("postgres", None, "seq_page_cost"),
            ("postgres", "pgvigil", "synchronous_commit"),
            (None, None, "cpu_tuple_cost"),
        }
        assert values(server, READER)["random_page_cost"] == (4, None)
    finally:
        server.execute("alter role pgvigil reset all")
        server.execute("alter database postgres reset seq_page_cost")
        server.execute("alter role pgvigil in database postgres reset all")
        server.execute("alter role all reset all")


@pytest.mark.parametrize("major", [13, 18])
def test_what_a_pooled_session_sets_for_a_moment_does_not_hide_the_server(server: Server) -> None:
    with asking(server) as asker:
        text = asker.ask(["settings.values"])["settings.values"].statement.text
    own = {**READER.login, "options": "-c jit=off"}

    def told() -> dict[str, float]:
        with psycopg.connect(server.conninfo(**own)) as connection:
            connection.execute("select set_config('work_mem', '1MB', true)")
            connection.execute("select set_config('statement_timeout', '9s', true)")
            return {name: value for name, _, value in connection.execute(text)}

    with changed(server, work_mem="13MB"):
        found = told()
        assert found["work_mem"] == 13 * 2**20
        assert {"jit", "statement_timeout"}.isdisjoint(found)
        server.execute("alter role reader set work_mem = '5MB'")
        try:
            assert "work_mem" not in told()
        finally:
            server.execute("alter role reader reset work_mem")


@pytest.mark.parametrize("major", MAJORS)
def test_words_are_told_as_labels_and_texts_never(cluster: Cluster) -> None:
    server = cluster.primary
    told = {r["name"]: r["setting"] for r in rows_of(server, "settings.enums")}
    expected = dict(
        server.execute(
            "select name, setting from pg_settings where vartype = 'enum'"
            " and name not in ('transaction_isolation', 'session_replication_role',"
            " 'default_transaction_isolation')"
        )
    )
    assert told == expected
    assert (told["wal_level"], told["synchronous_commit"]) == ("replica", "on")


@pytest.mark.parametrize("major", [18])
def test_a_word_that_was_changed_is_told(server: Server) -> None:
    with changed(server, synchronous_commit="local", log_statement="ddl"):
        told = {r["name"]: r["setting"] for r in rows_of(server, "settings.enums")}
    assert (told["synchronous_commit"], told["log_statement"]) == ("local", "ddl")


@pytest.mark.parametrize("major", [13, 18])
def test_settings_of_any_form_and_name_break_nothing_and_are_not_shown(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(
        major,
        **{
            "google_dataplex.max_messages": "-1:100",
            "app.secret": "hush 'quoted' line",
            "app.number": "1e999",
        },
    )
    server.execute("alter role bare set app.jwt_secret = E'hush\n'")
    begin = server.log_position()
    with asking(server) as asker:
        names = [s.query.name for s in asker.plan.statements if s.query.area == "settings"]
        outcomes = asker.ask(names)
    assert [o.failure for o in outcomes.values() if o.failure] == []
    assert len(names) == 6
    shown = str([o.rows for o in outcomes.values()])
    assert "hush" not in shown
    assert "1e999" not in shown
    assert "app.jwt_secret" in shown
    assert server.errors_in_log(begin) == []


@pytest.mark.parametrize("major", [18])
@pytest.mark.parametrize(
    ("vartype", "setting", "unit", "value"),
    [
        ("integer", "-1:100", None, None),
        ("integer", "", None, None),
        ("integer", "0750", None, None),
        ("integer", "9223372036854775807", "TB", 9223372036854775807 * 2**40),
        ("integer", "3", "32kB", 98304),
        ("integer", "3", "furlong", None),
        ("integer", "3", "", None),
        ("real", "1e999", None, None),
        ("real", "1.5e-05", None, 0.000015),
        ("real", "2.5", "ms", 0.0025),
        ("real", "NaN", None, None),
        ("real", "Infinity", "s", None),
        ("bool", "perhaps", None, None),
        ("string", "12", None, None),
    ],
)
def test_a_value_that_is_not_understood_is_left_out(
    server: Server, vartype: str, setting: str, unit: str | None, value: float | None
) -> None:
    with asking(server) as asker:
        text = asker.ask(["settings.values"])["settings.values"].statement.text
    instead = """(select 'x.y' as name, %(vartype)s as vartype, %(setting)s as setting,
      %(setting)s as reset_val, %(unit)s::text as unit, 'default' as source)"""
    escaped = text.replace("%", "%%").replace("pg_catalog.pg_settings", instead)
    rows = server.execute(escaped, {"vartype": vartype, "setting": setting, "unit": unit})
    assert [row[2] for row in rows] == ([] if value is None else [pytest.approx(value)])


@pytest.mark.parametrize("major", [13, 18])
def test_the_fingerprint_changes_with_the_settings_and_with_nothing_else(server: Server) -> None:
    def fingerprint() -> object:
        (row,) = rows_of(server, "settings.fingerprint")
        value = row["fingerprint"]
        assert isinstance(value, float)
        assert 0 <= value < 2**52
        return value

    before = fingerprint()
    assert fingerprint() == before
    with psycopg.connect(server.conninfo(options="-c work_mem=1MB")):
        assert fingerprint() == before
    with changed(server, archive_command="cp %p /somewhere"):
        assert fingerprint() != before
    assert fingerprint() == before


@pytest.mark.parametrize("major", [13, 18])
def test_where_settings_come_from_is_counted_for_who_may_see_all(server: Server) -> None:
    def sources() -> dict[object, object]:
        return {r["source"]: r["settings"] for r in rows_of(server, "settings.sources")}

    before = sources()
    with changed(server, random_page_cost=2):
        server.execute("alter role all set seq_page_cost = 2")
        try:
            after = sources()
        finally:
            server.execute("alter role all reset all")
    assert before["global"] == 0
    assert after == {
        **before,
        "global": 1,
        "configuration file": float(str(before["configuration file"])) + 1,
    }
    for role in (READER, BARE):
        assert "pg_read_all_settings" in (refusal_of(server, "settings.sources", role=role) or "")


@pytest.mark.parametrize("major", [18])
@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_role_sees_the_numbers(server: Server, role: Role) -> None:
    assert (
        values(server, role).items() >= {"fsync": (0, None), "full_page_writes": (1, None)}.items()
    )
