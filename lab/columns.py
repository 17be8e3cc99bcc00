"""Writes down the columns of what the catalogue reads, as each version of PostgreSQL has them.

`python -m lab.columns` writes all snapshots anew, `python -m lab.columns 17` that of one version.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pgvigil import catalogue

from lab.cluster import prepare
from lab.postgres import MAJORS, Server
from lab.statements import Relation, relations, texts

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "live" / "columns"

Columns = dict[str, dict[str, str]]
"""By relation, `()` after a function's name, the type of each column by its name."""


class Read(NamedTuple):
    """Something that the catalogue reads rows from."""

    relation: Relation
    """Its schema is `{name}` where that is an extension's."""
    everywhere: bool
    """Whether it is read without asking for an extension."""


_OF_RELATIONS = """
select a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)
from pg_catalog.pg_attribute a
where a.attrelid = pg_catalog.to_regclass(%s) and a.attnum > 0 and not a.attisdropped
order by a.attnum"""

_OF_FUNCTIONS = """
select distinct on (p.oid, argument.position) argument.name,
  pg_catalog.format_type(argument.type, null)
from pg_catalog.pg_proc p
cross join lateral rows from (
  pg_catalog.unnest(p.proargnames), pg_catalog.unnest(p.proallargtypes),
  pg_catalog.unnest(p.proargmodes)
) with ordinality as argument (name, type, mode, position)
where p.pronamespace = pg_catalog.to_regnamespace(%s) and p.proname = %s
  and argument.mode in ('o', 'b', 't')
order by p.oid, argument.position"""

_OF_OTHER_FUNCTIONS = """
select distinct '' as name, pg_catalog.format_type(p.prorettype, null)
from pg_catalog.pg_proc p
where p.pronamespace = pg_catalog.to_regnamespace(%s) and p.proname = %s"""


def read(major: int) -> dict[str, Read]:
    """Return what the catalogue reads rows from on a version, by how it is written in it."""
    found: dict[str, Read] = {}
    for text in texts(catalogue.load()):
        if text.major != major:
            continue
        for relation in relations(text.tokens):
            if relation.schema:
                title = f"{relation.schema}.{relation.name}{'()' * relation.called}"
                everywhere = not any(needs.extension for needs in text.query.all_needs)
                everywhere |= title in found and found[title].everywhere
                found[title] = Read(relation, everywhere)
    return found


def of(server: Server) -> Columns:
    """Return the columns on a server; what it should have and does not has none.

    Left out is what belongs to an extension that is not in the database `postgres`, or not yet in
    its version there. A function that gives just values has one column without a name.
    """
    schemas = dict(
        server.execute(
            "select '{' || e.extname || '}', n.nspname from pg_catalog.pg_extension e"
            " join pg_catalog.pg_namespace n on n.oid = e.extnamespace"
        )
    )
    schemas["pg_catalog"] = "pg_catalog"
    wanted = read(min(server.major, MAJORS[-1]))  # what the next version will be asked as well
    found: Columns = {}
    for title, ((schema, name, called), everywhere) in sorted(wanted.items()):
        if schema not in schemas:
            continue
        if called:
            function = [schemas[schema], name]
            rows = server.execute(_OF_FUNCTIONS, function)
            rows = rows or server.execute(_OF_OTHER_FUNCTIONS, function)
        else:
            rows = server.execute(_OF_RELATIONS, [f'{schemas[schema]}."{name}"'])
        if rows or everywhere:
            found[title] = dict(rows)
    return found


def snapshot(major: int) -> Columns:
    """Return what was written down for a version."""
    columns: Columns = json.loads(_path(major).read_text())
    return columns


def differences(written: Columns, found: Columns) -> list[str]:
    """Say in words what a server has otherwise than it was written down; its lacks are none."""
    said = []
    for relation, columns in found.items():
        if relation not in written:
            said.append(f"{relation} is not written down")
            continue
        before = written[relation]
        said += [f"{relation} lost {name}" for name in before.keys() - columns.keys()]
        said += [f"{relation} has a new {name}" for name in columns.keys() - before.keys()]
        said += [
            f"{relation}.{name} was {before[name]} and is {columns[name]}"
            for name in before.keys() & columns.keys()
            if before[name] != columns[name]
        ]
    return sorted(said)


def main(told: Sequence[str]) -> None:
    """Write the snapshots of some versions, or of all."""
    for major in map(int, told or map(str, MAJORS)):
        with Server(major) as server:
            prepare(server)
            _write(major, of(server))
            print(_path(major).relative_to(FOLDER.parents[2]))


def _write(major: int, columns: Mapping[str, Mapping[str, str]]) -> None:
    """One line for each relation, so that a change is seen for what it is."""
    lines = (f" {json.dumps(name)}: {json.dumps(of)}" for name, of in columns.items())
    FOLDER.mkdir(exist_ok=True)
    _path(major).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _path(major: int) -> Path:
    return FOLDER / f"{major}.json"


if __name__ == "__main__":
    main(sys.argv[1:])
