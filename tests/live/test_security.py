"""Holds what the catalogue says of roles, passwords, rules and encryption against real servers."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import psycopg
import pytest
from pgvigil import grants

from lab.catalogue import Row, asking, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, READER, Role, prepare
from lab.ports import own_address
from lab.postgres import MAJORS, Server

NEWEST_AND_OLDEST = [13, 18]


@pytest.fixture(scope="module", params=NEWEST_AND_OLDEST)
def secured(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with TLS that other machines may reach, and all that the grants command makes."""
    address = own_address()
    with Server(
        request.param,
        tls=True,
        settings={"listen_addresses": "*", "password_encryption": "scram-sha-256"},
        hba=[
            "local all all scram-sha-256",
            "host all all 127.0.0.1/32 scram-sha-256",
            f"host all all {address or '127.0.0.1'}/32 scram-sha-256",
        ],
    ) as server:
        prepare(server)
        server.execute(grants.script("pgvigil", grants.PARTS, create=False))
        yield server


def row_of(server: Server, query: str, *, dbname: str = "postgres") -> Row:
    (row,) = rows_of(server, query, dbname=dbname)
    return row


@contextmanager
def database(server: Server, name: str) -> Iterator[str]:
    server.execute(f"create database {name}")
    try:
        yield name
    finally:
        server.execute(f"drop database {name}")


def test_sessions_from_other_machines_are_told_apart_by_their_encryption(secured: Server) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but the loopback")
    before = row_of(secured, "security.transport")
    plain = secured.conninfo(host=address, sslmode="disable", **READER.login)
    tls = secured.conninfo(host=address, sslmode="require", **READER.login)
    with psycopg.connect(plain), psycopg.connect(tls) as encrypted:
        after = row_of(secured, "security.transport")
        assert (before["remote"], before["unencrypted"]) == (0, 0)
        assert (after["remote"], after["unencrypted"]) == (2, 1)

        (offender,) = rows_of(secured, "security.unencrypted")
        assert offender == {"datname": "postgres", "usename": "reader", "sessions": 1}

        (truth,) = secured.execute(
            "select version, cipher from pg_stat_ssl where pid = %s", [encrypted.info.backend_pid]
        )
        remote = [r for r in rows_of(secured, "security.sessions") if r["client"] == "remote"]
        assert {(r["encryption"], r["version"], r["cipher"], r["sessions"]) for r in remote} == {
            ("none", None, None, 1),
            ("tls", *truth, 1),
        }


def test_sessions_over_socket_and_loopback_are_not_remote(secured: Server) -> None:
    own = secured.conninfo(host=str(secured.directory))
    with psycopg.connect(own):
        rows = rows_of(secured, "security.sessions")
    assert {r["client"] for r in rows} == {"socket", "loopback"}


def test_who_has_a_privilege_is_counted_and_named_over_any_number_of_steps(
    secured: Server,
) -> None:
    secured.execute("""
        create role "hid""den" login superuser bypassrls;
        create role maker login createrole createdb;
        create role copier replication;
        create role beyond login bypassrls;
        create role "group";
        create role "inner group";
        create role program login;
        grant pg_execute_server_program to "group";
        grant "group" to "inner group";
        grant "inner group" to program;
    """)
    try:
        counts = {r["privilege"]: r for r in rows_of(secured, "security.privileges")}
        assert {k: (r["roles"], r["login_roles"]) for k, r in counts.items()} == {
            "superuser": (2, 2),
            "createrole": (1, 1),
            "createdb": (1, 1),
            "replication": (1, 0),
            "bypassrls": (1, 1),
            "pg_execute_server_program": (3, 1),
            "pg_read_server_files": (0, 0),
            "pg_write_server_files": (0, 0),
            **(
                {"pg_read_all_data": (0, 0), "pg_write_all_data": (0, 0)}
                if secured.major >= 14
                else {}
            ),
        }
        named = {
            (r["rolname"], r["privilege"], r["login"])
            for r in rows_of(secured, "security.privileged")
        }
        assert named == {
            ("postgres", "superuser", "true"),
            ('hid"den', "superuser", "true"),
            ("maker", "createrole", "true"),
            ("maker", "createdb", "true"),
            ("copier", "replication", "false"),
            ("beyond", "bypassrls", "true"),
            ("group", "pg_execute_server_program", "false"),
            ("inner group", "pg_execute_server_program", "false"),
            ("program", "pg_execute_server_program", "true"),
        }
    finally:
        secured.execute(
            """drop role "hid""den", maker, copier, beyond, "group", "inner group", program"""
        )


def test_passwords_that_ran_out_or_will_are_told_with_their_day(secured: Server) -> None:
    secured.execute("""
        create role late login valid until '2001-02-03 04:05:06+00';
        create role later login valid until '2101-02-03 04:05:06+00';
        create role never login valid until 'infinity';
        create role nobody valid until '2001-02-03 04:05:06+00';
    """)
    try:
        (login,) = secured.execute("select count(*) from pg_roles where rolcanlogin")[0]
        assert row_of(secured, "security.roles") == {"login": login, "expired": 1}
        days = {
            r["rolname"]: r["valid_until"] for r in rows_of(secured, "security.password_expiry")
        }
        assert days == {
            name: datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC).timestamp()
            for name, year in (("late", 2001), ("later", 2101))
        }
    finally:
        secured.execute("drop role late, later, never, nobody")


def test_password_kinds_are_counted_and_the_weak_ones_named(secured: Server) -> None:
    secured.execute("""
        set password_encryption = 'md5';
        create role old login password 'secret';
        create role none_at_all login;
        create role unlisted password 'secret';
    """)
    try:
        kinds = {r["kind"]: r["roles"] for r in rows_of(secured, "security.password_kinds")}
        # pgvigil, reader and bare; postgres and none_at_all.
        assert kinds == {"scram-sha-256": 3, "md5": 1, "none": 2, "other": 0}
        weak = {(r["rolname"], r["kind"]) for r in rows_of(secured, "security.weak_passwords")}
        assert weak == {("old", "md5"), ("none_at_all", "none"), ("postgres", "none")}
    finally:
        secured.execute("drop role old, none_at_all, unlisted")


@pytest.mark.parametrize("major", NEWEST_AND_OLDEST)
def test_lines_of_pg_hba_are_counted_by_what_they_let_in(server: Server, major: int) -> None:
    with Server(major, binaries=server.binaries) as own:
        prepare(own)
        own.execute(grants.script("pgvigil", ["security"], create=False))
        clean = row_of(own, "security.hba")
        lines = [
            "host all all 127.0.0.1/32 scram-sha-256",
            "host all all 127.0.0.1/32 trust",
            "host all all ::1/128 md5",
            "host all all 127.0.0.1/0 md5",
            "host all all 10.0.0.0/8 trust",
            "hostssl all all 0.0.0.0/0 scram-sha-256",
            "hostnossl all all 10.1.0.0/16 password",
            "host all all 0.0.0.0/0 reject",
            'hostssl all all 10.2.0.0/16 radius radiusservers=10.0.0.1 radiussecrets="hush"',
        ]
        # The file is read as it stands; a wrong line must not be loaded, so nothing is. Lines with
        # hostssl are no mistake on a server without TLS, though PostgreSQL has a word on them.
        with (own.data / "pg_hba.conf").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.write("host all all 10.0.0.0/8 guesswork\n")
        found = row_of(own, "security.hba")
        assert {
            k: found[k] for k in ("trust", "password", "md5", "remote_unencrypted", "errors")
        } == {
            "trust": clean["trust"] + 2,  # type: ignore[operator]
            "password": 1,
            "md5": 2,
            # 127.0.0.1/0 is everybody, 10.0.0.0/8 twice
            "remote_unencrypted": 3,
            "errors": 1,
        }
        assert found["fingerprint"] != clean["fingerprint"]
        assert row_of(own, "security.hba") == found

        rules = {
            (r["type"], r["auth_method"], r["local"]): r["rules"]
            for r in rows_of(own, "security.hba_rules")
        }
        assert rules["hostssl", "radius", "false"] == 1
        assert rules["host", "md5", "true"] == 1
        assert rules["host", "md5", "false"] == 1
        count = sum(count for count in rules.values() if isinstance(count, float))
        assert [(count,)] == own.execute(
            "select count(*) from pg_hba_file_rules where type is not null"
        )
        seen = rows_of(own, "security.hba_rules")
        assert "hush" not in str(seen)


def test_what_public_may_do_in_databases_is_told(secured: Server) -> None:
    with database(secured, "shut") as shut, database(secured, "ajar") as ajar:
        secured.execute(f"revoke all on database {shut} from public")
        secured.execute(f"grant create on database {ajar} to public")
        told = {
            r["datname"]: (r["connect"], r["temporary"], r["make_schemas"])
            for r in rows_of(secured, "security.databases")
        }
    assert told == {
        "postgres": (True, True, False),
        "shut": (False, False, False),
        "ajar": (True, True, True),
    }


def test_holes_in_a_database_are_counted(secured: Server) -> None:
    with database(secured, "holes") as name:
        begin = row_of(secured, "security.objects", dbname=name)
        schemas = {
            r["schemaname"] for r in rows_of(secured, "security.public_schemas", dbname=name)
        }
        # Until PostgreSQL 14 everybody may create in public.
        assert schemas == ({"public"} if secured.major < 15 else set())
        assert begin["public_create"] == len(schemas)
        assert {k: v for k, v in begin.items() if v} == (
            {"public_create": 1} if secured.major < 15 else {}
        )

        secured.execute(
            """
            create schema "open";
            grant create on schema "open" to public;
            create table "open".seen (tenant int);
            grant select on "open".seen to public;
            create table "open".changed (tenant int);
            grant insert, delete on "open".changed to public;
            create table "open".guarded (tenant int);
            alter table "open".guarded enable row level security, force row level security;
            create policy own on "open".guarded using (tenant = 1);
            create policy other on "open".guarded using (tenant = 2);
            create table "open".owner_sees_all (tenant int);
            alter table "open".owner_sees_all enable row level security;
            create table "open".forgotten (tenant int) partition by list (tenant);
            create table "open".part partition of "open".forgotten default;
            create policy own on "open".forgotten using (tenant = 1);
            create policy own on "open".part using (tenant = 1);
            alter default privileges in schema "open" grant select on tables to public;
            alter default privileges revoke execute on functions from public;
            create function "open".bare() returns int language sql security definer as 'select 1';
            create function "open".careful() returns int language sql security definer
              set search_path = pg_catalog as 'select 1';
            create foreign data wrapper wrapper;
            create server far foreign data wrapper wrapper;
            create user mapping for public server far options (password 'hush');
            create function "open".on_ddl() returns event_trigger language plpgsql
              as 'begin end';
            create event trigger quiet on ddl_command_start execute function "open".on_ddl();
            alter event trigger quiet disable;
            """,
            database=name,
        )
        found = row_of(secured, "security.objects", dbname=name)
        assert found == {
            "public_create": len(schemas) + 1,
            "public_read": 1,
            "public_write": 1,
            "row_security": 2,
            "force_row_security": 1,
            "idle_policies": 2,
            "default_acl": 1,
            "definer": 2,
            "definer_without_path": 1,
            "policies": 4,
            "foreign_servers": 1,
            "user_mappings": 1,
            "event_triggers": 1,
            "disabled_event_triggers": 1,
        }
        named = {r["schemaname"] for r in rows_of(secured, "security.public_schemas", dbname=name)}
        assert named == schemas | {"open"}
        tables = {
            r["relname"]: (r["row_security"], r["force_row_security"], r["policies"])
            for r in rows_of(secured, "security.row_security", dbname=name)
        }
        assert tables == {
            "guarded": (True, True, 2),
            "owner_sees_all": (True, False, 0),
            "forgotten": (False, False, 1),
        }


def test_findings_in_a_database_wait_for_no_lock(secured: Server) -> None:
    with database(secured, "locked") as name:
        secured.execute(
            "create table t (i int); alter table t enable row level security", database=name
        )
        own = secured.conninfo(host=str(secured.directory), dbname=name)
        with psycopg.connect(own) as holder:
            holder.execute("lock table t in access exclusive mode")
            assert row_of(secured, "security.objects", dbname=name)["row_security"] == 1
            assert len(rows_of(secured, "security.row_security", dbname=name)) == 1


def test_what_is_logged_of_sessions_and_statements_is_told(secured: Server) -> None:
    assert row_of(secured, "security.audit") == {
        "log_connections": False,
        "log_disconnections": False,
        "log_statement": False,
        "pgaudit_loaded": False,
        "pgaudit_log": None,
    }
    some = "authentication" if secured.major >= 18 else "on"
    secured.set({"log_connections": some, "log_disconnections": True, "log_statement": "ddl"})
    try:
        told = row_of(secured, "security.audit")
        logged = ("log_connections", "log_disconnections", "log_statement")
        assert [told[name] for name in logged] == [True, True, True]
        # Without the right to read it nobody tries.
        assert "pgaudit_loaded" not in rows_of(secured, "security.audit", role=BARE)[0]

        # What our own role was given is no answer about the others.
        secured.execute("alter role pgvigil set log_statement = 'none'")
        assert row_of(secured, "security.audit")["log_statement"] is None
    finally:
        secured.execute("alter role pgvigil reset log_statement")
        secured.set({"log_connections": None, "log_disconnections": None, "log_statement": None})


@pytest.mark.parametrize(
    ("libraries", "loaded"),
    [
        ("pgaudit", True),
        ("pg_stat_statements, pgaudit", True),
        ('"$libdir/pgaudit",other', True),
        ("/usr/lib/pgaudit.so", True),
        ("pgauditlogtofile", False),
        ("my_pgaudit", False),
        ("", False),
    ],
)
def test_pgaudit_is_known_by_its_library(secured: Server, libraries: str, loaded: bool) -> None:
    with asking(secured) as asker:
        statement = asker.ask(["security.audit"])["security.audit"].statement
    (value,) = [m.value for m in statement.metrics if m.column == "pgaudit_loaded"]
    told = secured.execute(f"select {value} from (select %s::text as libraries) as s", [libraries])
    assert told == [(loaded,)]


@pytest.mark.parametrize("role", [READER, BARE], ids=lambda role: role.name)
def test_without_the_granted_functions_passwords_and_rules_are_unknown(
    secured: Server, role: Role
) -> None:
    begin = secured.log_position()
    for query in ("password_kinds", "weak_passwords", "hba", "hba_rules"):
        assert (refusal_of(secured, f"security.{query}", role=role) or "").startswith("function")
    assert secured.errors_in_log(begin) == []
    for function in ("password_kinds", "hba_rules"):
        with (
            psycopg.connect(secured.conninfo(**role.login)) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute(f"select * from pgvigil.{function}()")


@pytest.mark.parametrize("major", MAJORS)
def test_the_printed_scripts_run_again_and_show_no_more_than_they_say(
    server: Server, major: int
) -> None:
    script = grants.script('Some "role"', grants.PARTS, create=True)
    server.execute(script)
    try:
        server.execute(grants.script('Some "role"', grants.PARTS, create=False))
        functions = server.execute("""
            select p.proname, p.prosecdef, p.proconfig,
              has_function_privilege('Some "role"', p.oid, 'execute'),
              has_function_privilege('bare', p.oid, 'execute')
            from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace
            where n.nspname = 'pgvigil'
        """)
        assert {"password_kinds", "hba_rules", "wrong_file_settings", "host_file"} <= {
            name for name, *_ in functions
        }
        for name, definer, config, granted, others in functions:
            assert (definer, granted, others) == (True, True, False), name
            assert config[0].startswith("search_path=pg_catalog"), name
        columns = server.execute("select * from pgvigil.password_kinds() where rolname = 'bare'")
        assert columns == [("bare", "scram-sha-256")]
    finally:
        server.execute("drop schema pgvigil cascade")
        server.execute('drop owned by "Some ""role"""; drop role "Some ""role""", pgvigil_record')


@pytest.mark.parametrize(
    ("options", "holds", "lacks"),
    [
        ((), {"CREATE ROLE watcher"}, {"CREATE FUNCTION"}),
        (
            ("--security",),
            {"pgvigil.password_kinds()", "pgvigil.hba_rules()"},
            {"CREATE ROLE", "host_file"},
        ),
        (("--host",), {"pgvigil.host_file(text)"}, {"CREATE ROLE", "password_kinds"}),
        (
            ("--all", "--record-role", "writer"),
            {
                *("CREATE ROLE", "pgvigil.hba_rules()", "pgvigil.host_file(text)"),
                *("ALL SEQUENCES", "pgvigil.newest_records()"),
            },
            {"TO pgvigil"},
        ),
        (("--sequences",), {"ALL SEQUENCES"}, {"CREATE ROLE", "CREATE SCHEMA"}),
        (
            ("--record",),
            {"CREATE ROLE pgvigil_record NOLOGIN", "CREATE TABLE IF NOT EXISTS pgvigil.record"},
            {"CREATE ROLE watcher", "password_kinds"},
        ),
    ],
)
def test_the_command_prints_what_is_asked_for(
    options: tuple[str, ...], holds: set[str], lacks: set[str]
) -> None:
    command = [sys.executable, "-m", "pgvigil", "grants", "--role", "watcher", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    printed = done.stdout.replace('"', "")
    assert {text for text in holds if text not in printed} == set()
    assert {text for text in lacks if text in printed} == set()


def test_a_schema_of_somebody_else_is_not_built_upon(secured: Server) -> None:
    with database(secured, "taken") as name:
        secured.execute("create schema pgvigil authorization bare", database=name)
        with pytest.raises(psycopg.errors.RaiseException, match="belongs to somebody else"):
            secured.execute(grants.script("pgvigil", ["security"], create=False), database=name)
        assert secured.execute(
            "select count(*) from pg_proc where proname = 'hba_rules'", database=name
        ) == [(0,)]


def test_without_monitoring_rights_roles_are_told_all_the_same(secured: Server) -> None:
    with asking(secured, role=BARE) as asker:
        names = [s.query.name for s in asker.plan.statements if s.query.area == "security"]
        outcomes = asker.ask(names)
    assert "security.privileges" in outcomes
    assert "security.transport" not in outcomes
    assert [o.failure for o in outcomes.values() if o.failure] == []
    assert outcomes["security.roles"].rows == rows_of(secured, "security.roles", role=PGVIGIL)
