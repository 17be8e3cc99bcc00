"""Somebody plants things in the way of names, undoes what guards a session, and names things oddly.

What is planted writes a line into the server's log when it runs, and gives a wrong result.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from lab import hostile
from tests.harm.scene import Scenario, Scene, Series, of_sessions

_DATABASES = ("postgres", "app", "shop")

_PLANT = r"""
set search_path = pg_catalog;
create schema trap;
grant usage on schema trap to public;

create function trap.sprung(what text) returns bool language plpgsql as $$
  begin raise log 'planted %', what; return false; end $$;

-- A view in the place of each relation of the system; the condition is looked at once.
do $$
declare name text;
begin
  for name in select relname from pg_class
    where relnamespace = 'pg_catalog'::regnamespace and relkind in ('r', 'v')
  loop
    begin
      execute format('create view trap.%1$I as select * from pg_catalog.%1$I'
        ' where (select trap.sprung(%1$L))', name);
      execute format('grant select on trap.%I to public', name);
    exception when invalid_table_definition then null;  -- columns that only the system has
    end;
  end loop;
end $$;

-- A function in the place of each that can be written in PL/pgSQL; all of them, whoever calls them.
do $$
declare
  of record;
  body text;
begin
  for of in select p.oid, proname, proretset, pg_get_function_result(p.oid) as result,
      pg_get_function_arguments(p.oid) as arguments
    from pg_proc as p join pg_type as t on t.oid = prorettype
    where pronamespace = 'pg_catalog'::regnamespace and prokind = 'f'
      and (t.typtype <> 'p' or t.typname = 'record')
      and (proretset or t.typname <> 'record' or proargmodes is not null)
      and not exists (select from unnest(coalesce(proallargtypes, proargtypes::oid[])) as a
        join pg_type as at on at.oid = a where at.typtype = 'p')
      and proname !~ '(in|out|recv|send)$'
  loop
    body := case when of.proretset or of.result = 'record' then 'return;' else 'return null;' end;
    begin
      execute format('create function trap.%I(%s) returns %s language plpgsql as %L', of.proname,
        of.arguments, of.result,
        format('begin perform trap.sprung(%L); %s end', of.proname, body));
    exception when others then null;
    end;
  end loop;
end $$;

create function trap.counted(bigint) returns bigint language plpgsql as $$
  begin perform trap.sprung('count'); return 0; end $$;
create aggregate trap.count(*) (sfunc = trap.counted, stype = bigint, initcond = '0');
do $$
declare type text;
begin
  foreach type in array array['int4', 'int8', 'float8', 'numeric', 'interval', 'timestamptz',
    'text', 'name', 'bool', 'oid', 'xid']
  loop
    execute format('create function trap.added(pg_catalog.%1$s, pg_catalog.%1$s)
      returns pg_catalog.%1$s language plpgsql as
      ''begin perform trap.sprung(''''aggregate''''); return $1; end''', type);
    for word in 1 .. 5 loop
      execute format('create aggregate trap.%s(pg_catalog.%s) (sfunc = trap.added, stype = %2$s)',
        (array['sum', 'max', 'min', 'avg', 'bool_or'])[word], type);
    end loop;
    execute format('create function trap.counted(bigint, pg_catalog.%1$s) returns bigint
      language plpgsql as ''begin perform trap.sprung(''''count''''); return 0; end''', type);
    execute format('create aggregate trap.count(pg_catalog.%1$s) (sfunc = trap.counted,
      stype = bigint, initcond = ''0'')', type);
  end loop;
end $$;

-- The same for operators.
do $$
declare of record;
begin
  for of in select o.oid, oprname, oprleft::regtype, oprright::regtype, oprresult::regtype
    from pg_operator as o
    join pg_type as l on l.oid = oprleft
    join pg_type as r on r.oid = oprright
    join pg_type as t on t.oid = oprresult
    where oprnamespace = 'pg_catalog'::regnamespace
      and 'p' not in (l.typtype, r.typtype, t.typtype)
  loop
    execute format('create function trap.operator_%s(%s, %s) returns %s language plpgsql as %L',
      of.oid, of.oprleft, of.oprright, of.oprresult,
      format('begin perform trap.sprung(%L); return null; end', of.oprname));
    execute format('create operator trap.%s (leftarg = %s, rightarg = %s,'
      ' function = trap.operator_%s)', of.oprname, of.oprleft, of.oprright, of.oid);
  end loop;
end $$;

-- Last, as what stands above names types without their schema.
do $$
declare type text;
begin
  foreach type in array array['text', 'name', 'int4', 'int8', 'float8', 'bool', 'oid', 'regclass',
    'regprocedure', 'timestamptz', 'pg_lsn', 'xid']
  loop
    execute format('create domain trap.%1$I as pg_catalog.%1$I check (trap.sprung(''type'')'
      ' is not null)', type);
  end loop;
end $$;

-- In public, where everybody's search_path leads: what fits the system's own columns better than
-- the system's functions do, so that it is taken though pg_catalog comes first.
create function public.lower(name) returns text language plpgsql as $$
  begin perform trap.sprung('lower'); return 'mine'; end $$;
create function public.left(name, int) returns text language plpgsql as $$
  begin perform trap.sprung('left'); return 'mine'; end $$;
create function public.to_char(oid, text) returns text language plpgsql as $$
  begin perform trap.sprung('to_char'); return 'mine'; end $$;
create function public.differs(float8, bigint) returns bool language plpgsql as $$
  begin perform trap.sprung('differs'); return null; end $$;
create function public.times(bigint, float8) returns float8 language plpgsql as $$
  begin perform trap.sprung('times'); return null; end $$;
create function public.joined(name, text) returns text language plpgsql as $$
  begin perform trap.sprung('joined'); return 'mine'; end $$;
create operator public.<> (leftarg = float8, rightarg = bigint, function = public.differs);
create operator public.* (leftarg = bigint, rightarg = float8, function = public.times);
create operator public./ (leftarg = bigint, rightarg = float8, function = public.times);
create operator public.|| (leftarg = name, rightarg = text, function = public.joined);
"""

_CLEAR = """
set search_path = pg_catalog;
drop schema trap cascade;
drop function public.lower(name), public.left(name, int), public.to_char(oid, text),
  public.differs(float8, bigint), public.times(bigint, float8), public.joined(name, text) cascade;
"""

_PATH = "trap, public, pg_catalog"


@contextmanager
def _planted(scene: Scene) -> Iterator[None]:
    """The role's search_path leads into the trap, in all databases, before the system's schema."""
    for database in _DATABASES:
        scene.server.execute(_PLANT, database=database)
    scene.server.execute(f"alter role {scene.role} set search_path = {_PATH}")
    yield
    scene.server.execute(f"alter role {scene.role} reset search_path")
    for database in _DATABASES:
        scene.server.execute(_CLEAR, database=database)


_UNDO = """
create function public.undo() returns event_trigger language plpgsql
  set search_path = pg_catalog as $$
begin
  if session_user in ('postgres') then return; end if;
  begin
    execute 'create temp view pg_stat_activity as select 1 as pid where trap.sprung(''pg_temp'')';
    execute 'create temp view pg_database as select 1 as oid where trap.sprung(''pg_temp'')';
  exception when read_only_sql_transaction then null;
  end;
end $$;
create function public.undo_settings() returns event_trigger language plpgsql as $$
begin
  if session_user in ('postgres') then return; end if;
  perform pg_catalog.set_config('search_path', 'trap, public, pg_catalog', false);
  perform pg_catalog.set_config('default_transaction_read_only', 'off', false);
  perform pg_catalog.set_config('statement_timeout', '0', false);
  perform pg_catalog.set_config('lock_timeout', '0', false);
end $$;
create event trigger undo_1 on login execute function public.undo();
create event trigger undo_2 on login execute function public.undo_settings();
"""


@contextmanager
def _undone_at_login(scene: Scene) -> Iterator[None]:
    """A trigger at login sets the session back; PostgreSQL has such from 17 on."""
    with _planted(scene):
        if scene.server.major >= 17:
            for database in _DATABASES:
                scene.server.execute(_UNDO, database=database)
        yield
        if scene.server.major >= 17:
            for database in _DATABASES:
                scene.server.execute(
                    "drop event trigger undo_1; drop event trigger undo_2;"
                    "drop function public.undo(), public.undo_settings()",
                    database=database,
                )


def _sprung(scene: Scene) -> Iterable[str]:
    lines = [line for line in scene.log_of_role() if "LOG:  planted " in line]
    if lines:
        kinds = sorted({line.partition("LOG:  planted ")[2] for line in lines})
        yield f"ran what was planted, {len(lines)} times: {', '.join(kinds[:12])}"


_SETTINGS = {
    "default_transaction_read_only": (13, "off"),
    "default_transaction_isolation": (13, "serializable"),
    "statement_timeout": (13, "1ms"),
    "lock_timeout": (13, "1ms"),
    "idle_in_transaction_session_timeout": (13, "1ms"),
    "idle_session_timeout": (14, "500ms"),
    "transaction_timeout": (17, "500ms"),
    "work_mem": (13, "64kB"),
    "enable_hashjoin": (13, "off"),
    "enable_seqscan": (13, "off"),
    "enable_indexscan": (13, "off"),
    "datestyle": (13, "German"),
    "intervalstyle": (13, "sql_standard"),
    "timezone": (13, "Asia/Kathmandu"),
    "bytea_output": (13, "escape"),
    "extra_float_digits": (13, "-15"),
    "standard_conforming_strings": (13, "off"),
    "transform_null_equals": (13, "on"),
    "client_encoding": (13, "LATIN1"),
    "client_min_messages": (13, "debug5"),
    "row_security": (13, "off"),
    "plan_cache_mode": (13, "force_generic_plan"),
    "synchronous_commit": (13, "off"),
}
"""What somebody sets for the role, with the version that has it first."""


@contextmanager
def _set_for_role(scene: Scene) -> Iterator[None]:
    for name, (since, value) in _SETTINGS.items():
        if scene.server.major >= since:
            scene.server.execute(f"alter role {scene.role} set {name} = '{value}'")
    yield
    scene.server.execute(f"alter role {scene.role} reset all")
    scene.start_anew()  # a session keeps what it began with


@contextmanager
def _oddly_named(scene: Scene) -> Iterator[None]:
    """Names of everything that hurt, in UTF8, LATIN1 and SQL_ASCII, and what else lab knows."""
    hostile.populate(scene.server)
    yield


def _lab_roles(scene: Scene) -> None:
    scene.server.execute("create role pgvigil; create role bare")


def _anew(scene: Scene) -> None:
    """Scrape an exporter that starts among all this: who was there keeps its old sessions."""
    scene.start_anew()
    for _ in range(3):
        scene.scrape()


def _is_chosen(series: Series) -> bool:
    return of_sessions(series) or series[0].startswith("pg_stat_statements_")


_played = partial(Scenario, watch=_anew, concerned=_is_chosen)

_LOCKS = {"max_locks_per_transaction": 1024}

SCENARIOS = (
    _played(
        "the search_path leads into a trap",
        _planted,
        truth=_sprung,
        settings=_LOCKS,
    ),
    _played(
        "the search_path of a superuser leads into a trap",
        _planted,
        truth=_sprung,
        settings=_LOCKS,
        superuser=True,
    ),
    _played(
        "a trigger at login undoes what guards a session",
        _undone_at_login,
        truth=_sprung,
        settings=_LOCKS,
    ),
    _played("settings of the role are absurd", _set_for_role),
    _played("names of everything are odd", _oddly_named, before=_lab_roles),
)
