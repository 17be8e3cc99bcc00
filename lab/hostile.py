"""Fills a server with what real ones hold at their worst: names, encodings, kinds of objects."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psycopg
from pgvigil.connect import GUARDS
from psycopg.conninfo import make_conninfo

from lab.postgres import Server

NAMES: Sequence[bytes] = tuple(
    name.encode()
    for name in (
        'it\'s "quoted"',
        "line\nbreak\r\ttab",
        "back\\slash \\n",
        "100 % %s {columns} {{0}} $1",
        "🐘 élan",
        "x" + "é" * 31,  # 63 bytes, as long as a name can be
        " -- /* ; ",
        "select",
    )
)
"""Names of every kind of object in a database whose encoding knows them all."""

_BRACES = NAMES[3]

PLAIN_NAMES: Sequence[bytes] = tuple(name for name in NAMES if name.isascii())

BROKEN_NAMES: Sequence[bytes] = (b"caf\xe9", b"cut \xf0\x9f\x90", b"\xff\xfe")
"""What is no UTF-8; a database in SQL_ASCII takes it as it is."""

LATIN_NAMES: Sequence[bytes] = (b"caf\xe9", b"\xa7 \xff")


@dataclass(frozen=True)
class Database:
    """One of the databases that `populate` makes."""

    name: str
    encoding: str
    names: Sequence[bytes]


def databases(major: int) -> list[Database]:
    """Return those that can be connected to."""
    # 19 refuses line breaks in the names of what all databases share.
    breaking = "line\nbreak " if major < 19 else ""
    return [
        Database(f"it's \"{breaking}\\ % {{0}} 🐘", "UTF8", NAMES),
        Database("x" + "é" * 31, "SQL_ASCII", (*PLAIN_NAMES, *BROKEN_NAMES)),
        Database("latin = 1", "LATIN1", (*PLAIN_NAMES, *LATIN_NAMES)),
    ]


def populate(server: Server) -> list[str]:
    """Make roles and databases with everything in them; return the databases' names.

    Some statements fail on purpose, so what the log held until now is of no interest after this.
    """
    for name in _shared(NAMES, server.major):
        quoted = _quoted(name)
        run(server, "postgres", b"create role %b connection limit 3; " % quoted)
        run(server, "postgres", b"alter role %b set work_mem = '5MB'" % quoted)
    made = databases(server.major)
    for database in made:
        quoted = _quoted(database.name.encode())
        run(
            server,
            "postgres",
            b"create database %b template template0 encoding '%b' locale 'C' connection limit 50"
            % (quoted, database.encoding.encode()),
        )
        for setting in _settings(server.major):
            run(server, "postgres", b"alter database %b set %b" % (quoted, setting))
        _fill(server, database)
    run(server, "postgres", b'create database "closed" template template0 allow_connections false')
    # Its name is UTF-8 for nobody, and every database lists it.
    ascii_database = next(of for of in made if of.encoding == "SQL_ASCII")
    for statement in (b'create database "caf\xe9" template template0', b'create role "caf\xe9"'):
        run(server, ascii_database.name, statement)
    return [database.name for database in made]


def many_tables(server: Server, tables: int, database: str = "many") -> None:
    """Make a database with so many tables, each with TOAST, two indexes, a row and statistics."""
    run(server, "postgres", b"create database %b template template0" % _quoted(database.encode()))
    for first in range(0, tables, _AT_ONCE):
        text = b"select pg_catalog.set_config('synchronous_commit', 'off', false); " + _MANY
        last = min(first + _AT_ONCE, tables) - 1
        run(server, database, text % (first, last))
    run(server, database, b"analyze")


@contextmanager
def temporary_tables(server: Server) -> Iterator[None]:
    """Have a session in each database that holds temporary tables with indexes and sequences."""
    with ExitStack() as stack:
        for database in databases(server.major):
            connection = stack.enter_context(_connected(server, database.name))
            for name in database.names:
                text = b"create temp table %b (id serial primary key, %b text unique)"
                quoted = _quoted(name)
                connection.execute(text % (quoted, quoted))
        yield


@contextmanager
def every_relation_locked(server: Server) -> Iterator[int]:
    """Hold each user's relation in every database in ACCESS EXCLUSIVE mode; gives their number."""
    with ExitStack() as stack:
        held = 0
        for database in databases(server.major):
            connection = stack.enter_context(_connected(server, database.name))
            connection.execute(b"begin")
            held += _lock_all(connection)
        yield held


@contextmanager
def alter_waiting(server: Server, database: str, table: bytes) -> Iterator[int]:
    """Have an ALTER TABLE wait for a reader; gives the process that waits.

    Who asks for the table now, for whatever lock, waits behind the ALTER.
    """
    with _connected(server, database) as reader, _connected(server, database) as writer:
        reader.execute(b"begin")
        reader.execute(b"select from %b limit 0" % table)
        writer.pgconn.send_query(b"alter table %b add column waiting int" % table)
        pid = writer.info.backend_pid
        server.wait_until(
            f"select wait_event_type = 'Lock' from pg_stat_activity where pid = {pid}"
        )
        try:
            yield pid
        finally:
            writer.pgconn.get_cancel().cancel()
            while writer.pgconn.get_result():
                pass


def _fill(server: Server, database: Database) -> None:
    with _connected(server, database.name) as connection:
        connection.execute(_ONCE)
        _expect_failure(
            connection, b"create unique index concurrently invalid on public.duplicates (id)"
        )
        for name in database.names:
            quoted = _quoted(name)
            for template in _OF_EACH_NAME:
                connection.execute(template.replace(b"$NAME", quoted))
        if server.binaries.has_library("pg_stat_statements"):
            schema = _quoted(_BRACES)
            connection.execute(b"create extension pg_stat_statements schema %b" % schema)
            connection.execute(b"grant usage on schema %b to pgvigil" % schema)
        connection.execute(b"analyze")


def _lock_all(connection: psycopg.Connection) -> int:
    """Lock relations of all kinds, each by a statement that takes the lock for its kind."""
    # Tables first: who locks a table locks its partitions and, to rebuild them, its indexes.
    found = connection.execute(
        b"""select c.relkind::text, pg_catalog.format('%I.%I', n.nspname, c.relname),
          exists (select from pg_catalog.pg_index i
            where i.indrelid = c.oid and not i.indisvalid)
        from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
          and c.relkind in ('r', 'p', 'v', 'm', 'S', 'f')
          and not exists (select from pg_catalog.pg_depend d
            where d.objid = c.oid and c.relkind = 'S' and d.deptype in ('a', 'i'))
        order by c.relkind not in ('p', 'r'), c.oid"""
    ).fetchall()
    for kind, name, unbuilt in found:
        if kind in (b"r", b"p"):
            connection.execute(b"lock table %b in access exclusive mode" % name)
        if kind == b"r" and not unbuilt:
            connection.execute(b"reindex table %b" % name)
        connection.execute(b"alter table %b owner to bare" % name)  # its sequences as well
    (count,) = connection.execute(
        b"""select pg_catalog.count(distinct l.relation) from pg_catalog.pg_locks l
        where l.pid = pg_catalog.pg_backend_pid() and l.mode = 'AccessExclusiveLock'
          and l.granted and l.relation >= 16384"""
    ).fetchone() or (0,)
    return int(count)


def _shared(names: Sequence[bytes], major: int) -> list[bytes]:
    """Those names that an object which all databases share may have; 19 takes no line breaks."""
    return [name for name in names if major < 19 or not {10, 13} & set(name)]


def _settings(major: int) -> Iterator[bytes]:
    """What somebody set for a database, and what a session must not depend on."""
    yield b"search_path = public, pg_catalog"
    yield b"datestyle = 'German'"
    yield b"intervalstyle = 'sql_standard'"
    yield b"timezone = 'Asia/Kathmandu'"
    yield b"bytea_output = 'escape'"
    yield b"extra_float_digits = -15"
    yield b"transform_null_equals = on"
    yield b"quote_all_identifiers = on"
    yield b"row_security = off"
    yield b"enable_seqscan = off"
    yield b"statement_timeout = '1ms'"
    yield b"lock_timeout = '1ms'"
    yield b"default_transaction_deferrable = on"
    # With these a session has to be guarded before its first statement: the one turns a
    # backslash into an escape, with the other a standby refuses every statement.
    if major < 19 and "standard_conforming_strings" in GUARDS:
        yield b"standard_conforming_strings = off"
    if "default_transaction_isolation" in GUARDS:
        yield b"default_transaction_isolation = 'serializable'"


def run(server: Server, database: str, statement: bytes) -> None:
    """Run SQL as superuser where `Server.execute` would stumble over the database's settings."""
    with _connected(server, database) as connection:
        connection.execute(statement)


@contextmanager
def _connected(server: Server, database: str) -> Iterator[psycopg.Connection]:
    """A superuser's session whose texts are bytes, in whatever encoding the database has."""
    way = make_conninfo(
        host=str(server.directory),
        port=server.port,
        user="postgres",
        dbname=database,
        application_name="lab",
        client_encoding="SQL_ASCII",
        options="-c search_path=pg_catalog -c statement_timeout=60s -c lock_timeout=10s "
        "-c standard_conforming_strings=on -c check_function_bodies=off "
        "-c client_min_messages=error",
    )
    connection = psycopg.connect(way, autocommit=True)
    # Not psycopg's own `with`, which would end what a test wants to have open.
    try:
        yield connection
    finally:
        connection.close()


def _expect_failure(connection: psycopg.Connection, statement: bytes) -> None:
    try:
        connection.execute(statement)
    except psycopg.Error:
        return
    raise AssertionError(f"should have failed: {statement.decode()}")


def _quoted(name: bytes) -> bytes:
    return b'"' + name.replace(b'"', b'""') + b'"'


_ONCE = rb"""
-- What a statement without schemas would call or read in place of the system's own.
create table public.pg_class (oid oid, relname name);
create table public.pg_database (datname name);
create view public.pg_locks as select 1 as pid;
create function public.now() returns timestamptz language plpgsql as
  $$ begin raise exception 'mine'; end $$;
create function public.count(bigint) returns bigint language plpgsql as
  $$ begin raise exception 'mine'; end $$;
create function public.same(bigint, bigint) returns bool language plpgsql as
  $$ begin raise exception 'mine'; end $$;
create operator public.= (leftarg = bigint, rightarg = bigint, function = public.same);

-- Two equal rows, so that a unique index cannot be built and stays invalid.
create table public.duplicates (id int);
insert into public.duplicates values (1), (1);

create table public.nothing ();
create table public.no_statistics (id int, gone "char") with (autovacuum_enabled = off);
alter table public.no_statistics drop column gone;

-- Settings of tables as their owners spell them.
create table public.spelled (id int primary key, word text) with (
  fillfactor = '0x20', autovacuum_enabled = 'of', autovacuum_vacuum_threshold = '1e3',
  autovacuum_vacuum_scale_factor = ' .5', autovacuum_analyze_threshold = ' 7 ',
  autovacuum_freeze_max_age = 100000000, autovacuum_vacuum_insert_threshold = -1,
  toast.autovacuum_enabled = 'n', toast.autovacuum_vacuum_scale_factor = '1e-2');
create index spelled_low on public.spelled (word text_pattern_ops) with (fillfactor = 50);
create index spelled_brin on public.spelled using brin (id) with (autosummarize = on);
create index spelled_gin on public.spelled using gin (pg_catalog.to_tsvector('simple', word));
create index spelled_part on public.spelled (id) where word is null;
create index spelled_again on public.spelled (id);

create sequence public.small as smallint start 32760;
select pg_catalog.nextval('public.small');
create sequence public.whole start 9223372036854775806;
select pg_catalog.nextval('public.whole'), pg_catalog.nextval('public.whole');
create sequence public.downwards increment -3 minvalue -9223372036854775808 start -5;
select pg_catalog.nextval('public.downwards');
create sequence public.narrow minvalue 1 maxvalue 2 cycle;
create sequence public.unused;
create table public.numbered (
  id int generated always as identity, narrow smallserial, wide bigserial, plain int);
alter table public.numbered alter plain set default pg_catalog.nextval('public.small');

create table public.parted (id int, at date, primary key (id, at)) partition by range (at);
create table public.parted_old partition of public.parted
  for values from (minvalue) to ('2026-01-01') partition by hash (id);
create table public.parted_old_0 partition of public.parted_old
  for values with (modulus 2, remainder 0);
create unlogged table public.parted_old_1 partition of public.parted_old
  for values with (modulus 2, remainder 1);
create table public.parted_rest partition of public.parted default;
create table public.parted_empty (id int) partition by list (id);
create index parted_only on only public.parted (id);
insert into public.parted select n, '2025-12-25'::date + n from pg_catalog.generate_series(1, 20) n;
create table public.unsure (a int, b int, check (a > 0) not valid);
create table public.heir (c int) inherits (public.unsure);
create table public.two_parents () inherits (public.unsure, public.numbered);

create foreign data wrapper nowhere;
create type public.mood as enum ('good', 'it''s "bad"');
create type public.pair as (a int, b public.mood);
create materialized view public.empty_view as select 1 as one with no data;
create function public.always() returns trigger language plpgsql as $$ begin return new; end $$;
select pg_catalog.lo_from_bytea(0, 'large');
create table public.wide (id int, long text, longer bytea) with (toast_tuple_target = 128);
insert into public.wide select n, pg_catalog.repeat(n::text, 2000), null
  from pg_catalog.generate_series(1, 50) n;
delete from public.wide where id > 25;
create publication everything for all tables;
"""
"""Run in one transaction, so none of it may want to be alone."""

_AT_ONCE = 500
"""Tables made in one transaction; each holds five locks."""

_MANY = b"""do $$ begin
  for number in %d .. %d loop
    execute pg_catalog.format('create table public.table_%%1$s '
      '(id int primary key, word text, at timestamptz);'
      'create index on public.table_%%1$s (at);'
      'insert into public.table_%%1$s values (1)', number);
  end loop;
end $$"""

_OF_EACH_NAME: Sequence[bytes] = (
    rb"create schema $NAME",
    rb"create domain $NAME.$NAME as text check (value <> '')",
    rb"create sequence $NAME.sequence as int",
    rb"create table $NAME.referenced ($NAME int constraint $NAME primary key)",
    # An index has the name in its schema already, so the table with the name stands in another.
    rb"""create table public.$NAME (
      id bigserial, $NAME $NAME.$NAME, mood public.mood, moods public.pair[], at timestamptz,
      other int constraint $NAME references $NAME.referenced,
      constraint "positive" check (id > 0))""",
    rb"create unique index on public.$NAME (id, $NAME)",
    rb"create statistics $NAME.$NAME on id, at from public.$NAME",
    rb"create unlogged table $NAME.unlogged ($NAME int)",
    rb"create index on $NAME.unlogged ($NAME)",
    rb"create view $NAME.looked as select $NAME from public.$NAME",
    rb"create materialized view $NAME.kept as select $NAME from public.$NAME",
    rb"create table $NAME.parted ($NAME int, at int) partition by list (at)",
    rb"create table $NAME.part partition of $NAME.parted for values in (1)",
    rb"create table $NAME.heir () inherits ($NAME.unlogged)",
    rb"create server $NAME foreign data wrapper nowhere options (host $$it's$$)",
    rb"create foreign table $NAME.far ($NAME int) server $NAME",
    rb"create function $NAME.$NAME(int) returns int language sql security definer as 'select 1'",
    rb"create function $NAME.trigger() returns trigger language plpgsql as 'begin return new; end'",
    rb"""create trigger $NAME before insert on public.$NAME
      for each row execute function $NAME.trigger()""",
    rb"create policy $NAME on public.$NAME using (true)",
    rb"alter table public.$NAME enable row level security",
    rb"alter table $NAME.unlogged force row level security",
    rb"""alter table public.$NAME
      add constraint later foreign key (other) references $NAME.referenced not valid""",
    rb"create rule $NAME as on update to $NAME.referenced do also select 1",
    rb"create publication $NAME for table $NAME.referenced",
    rb"""create subscription $NAME connection 'host=127.0.0.1 port=1 dbname=nowhere'
      publication $NAME with (connect = false, enabled = false, slot_name = none)""",
    rb'create collation $NAME.$NAME from "C"',
    rb"insert into $NAME.referenced select pg_catalog.generate_series(1, 10)",
    rb"alter default privileges in schema $NAME grant select on tables to public",
    rb"comment on schema $NAME is $$it's$$",
)
