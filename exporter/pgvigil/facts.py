"""Ask a server for its facts, in one statement that cannot fail."""

from collections.abc import Mapping, Sequence
from typing import Any

from pgvigil.connect import GUARDS
from pgvigil.plan import Extension, Facts, Wanted


def literal(value: str) -> str:
    """A text as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def statement(wanted: Wanted) -> str:
    """The statement that asks for a server's facts.

    Its parameters are statement_timeout, whether that holds for this transaction only, and the
    process that the connection says it leads to.
    Every name it needs is asked in a way that cannot fail: what does not exist is absent.
    Its operators are written with their schema too, for it finds out whether search_path holds.
    """

    def array(values: Sequence[str]) -> str:
        return f"array[{', '.join(map(literal, values))}]::pg_catalog.text[]"

    def current(names: Sequence[str]) -> str:
        pairs = (f"{literal(n)}, pg_catalog.current_setting({literal(n)}, true)" for n in names)
        return f"pg_catalog.json_build_object({', '.join(pairs)})"

    # Only names that the catalogue's schema has let through stand in it, and as literals.
    return f"""select
  pg_catalog.set_config('statement_timeout', $1, $2),
  pg_catalog.json_build_object(
    'version', pg_catalog.current_setting('server_version_num')::pg_catalog.int4,
    'in_recovery', pg_catalog.pg_is_in_recovery(),
    'user', current_user,
    'superuser', pg_catalog.current_setting('is_superuser') operator(pg_catalog.=) 'on',
    'database', pg_catalog.current_database(),
    'guards', {current(list(GUARDS))},
    'direct', pg_catalog.pg_backend_pid() operator(pg_catalog.=) $3::pg_catalog.int4,
    'extensions', (
      select pg_catalog.json_object_agg(e.extname, pg_catalog.json_build_array(
        e.extversion, pg_catalog.quote_ident(n.nspname)) order by e.extname)
      from pg_catalog.pg_extension as e
      join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) e.extnamespace
      where pg_catalog.has_schema_privilege(n.oid, 'usage')),
    'privileges', (
      select pg_catalog.json_agg(r.rolname order by r.rolname)
      from pg_catalog.pg_roles as r
      where r.rolname operator(pg_catalog.=) any({array(wanted.privileges)}::pg_catalog.name[])
        and pg_catalog.pg_has_role(r.oid, 'usage')),
    'functions', (
      select pg_catalog.json_agg(f order by f)
      from pg_catalog.unnest({array(wanted.functions)}) as f
      where case
        -- Who may not use a schema gets an error for a name in it, even from to_regprocedure.
        when exists (
          select from pg_catalog.pg_namespace as n
          where n.nspname operator(pg_catalog.=) pg_catalog.split_part(f, '.', 1)
            and pg_catalog.has_schema_privilege(n.oid, 'usage'))
        then pg_catalog.has_function_privilege(pg_catalog.to_regprocedure(f), 'execute')
      end),
    'settings', {current(wanted.settings)},
    'provider', case
      when pg_catalog.to_regprocedure('pg_catalog.aurora_version()') is not null then 'aurora'
      end)"""  # noqa: S608


def told(row: Mapping[str, Any]) -> Facts:
    """The facts as `statement` brought them; raises KeyError or TypeError for anything else."""
    return Facts(
        version=row["version"],
        in_recovery=row["in_recovery"],
        user=row["user"],
        superuser=row["superuser"],
        database=row["database"],
        guarded=row["guards"] == dict(GUARDS),
        extensions={name: Extension(*of) for name, of in (row["extensions"] or {}).items()},
        privileges=frozenset(row["privileges"] or ()),
        functions=frozenset(row["functions"] or ()),
        settings=row["settings"],
        provider=row["provider"] or "",
    )
