"""Rooms import upstream only, and each third-party library has one door."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pgvigil
import pytest

PACKAGE = Path(pgvigil.__file__).parent
ROOT = Path(__file__).parents[2]

ORDER = (
    "errors",
    "grants",
    "job",
    "documents",
    "standards",
    "maintenance",
    "expected",
    "dsn",
    "shard",
    "hosts",
    "target",
    "listed",
    "config",
    "catalogue",
    "own",
    "reference",
    "plan",
    "certificate",
    "tls",
    "web",
    "credentials",
    "surroundings",
    "runner",
    "password",
    "connect",
    "record",
    "entry",
    "source",
    "facts",
    "wire",
    "session",
    "pgbouncer",
    "wal",
    "command",
    "repository",
    "barman",
    "walg",
    "kinds",
    "lane",
    "pace",
    "slow",
    "collect",
    "watch",
    "garbage",
    "render",
    "ranking",
    "latency",
    "computed",
    "fleet",
    "discovery",
    "reload",
    "coverage",
    "about",
    "trial",
    "verdict",
    "landing",
    "door",
    "serve",
    "fence",
    "scratch",
    "programs",
    "basebackup",
    "recovery",
    "checks",
    "drill",
    "pgbackrest",
    "orders",
    "shipped",
    "alive",
    "options",
    "logs",
    "cli",
    "__main__",
)
BESIDE: dict[str, set[str]] = {"__init__": set(), "apart": {"errors"}}
"""What stands outside the order, with all that it may import."""

DOORS = {
    "bcrypt": {"credentials"},
    "hypercorn": {"serve"},
    "isal": {"serve"},
    "jsonschema": {"documents"},
    "prometheus_client": {"render"},
    # dsn has libpq read connection strings; checks asks a server of its own.
    "psycopg": {"dsn", "connect", "record", "wire", "session", "pgbouncer", "checks"},
    "structlog": {*ORDER, *BESIDE},
    "yaml": {"documents"},
}

ROOMS = sorted(
    path.parent.name if path.parent != PACKAGE else path.stem for path in PACKAGE.rglob("*.py")
)


def source(room: str) -> Path:
    path = PACKAGE / f"{room}.py"
    return path if path.exists() else PACKAGE / room / "__init__.py"


def imported(room: str) -> set[str]:
    """The dotted names of all that a room imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source(room).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} imports relatively"
            module = node.module or ""
            if module == "pgvigil":
                names |= {f"pgvigil.{alias.name}" for alias in node.names}
            else:
                names.add(module)
    return names


def rooms_imported(room: str) -> set[str]:
    own = {name.split(".")[1] for name in imported(room) if name.startswith("pgvigil.")}
    return own - {"__version__"}


def libraries_imported(room: str) -> set[str]:
    names = {name.split(".")[0] for name in imported(room)}
    return names - set(sys.stdlib_module_names) - {"pgvigil"}


def test_every_room_has_its_place() -> None:
    assert sorted([*ORDER, *BESIDE]) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_upstream_only(room: str) -> None:
    allowed = BESIDE[room] if room in BESIDE else set(ORDER[: ORDER.index(room)])
    if room == "cli":
        allowed |= {"apart"}
    assert rooms_imported(room) <= allowed


@pytest.mark.parametrize("room", ROOMS)
def test_a_library_is_imported_by_its_own_room_only(room: str) -> None:
    assert [name for name in libraries_imported(room) if room not in DOORS.get(name, ())] == []


def test_every_library_that_is_declared_is_used_and_has_a_door() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module_of = {"pyyaml": "yaml", "prometheus-client": "prometheus_client"}
    declared = {re.split(r"[\[<>=; ]", text)[0] for text in project["dependencies"]}
    declared = {module_of.get(name, name) for name in declared}
    assert declared == set(DOORS)
    assert declared == {name for room in ROOMS for name in libraries_imported(room)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_opens_with_one_sentence_on_its_purpose(room: str) -> None:
    doc = ast.get_docstring(ast.parse(source(room).read_text("utf-8")))
    assert doc
    assert re.fullmatch(r"[A-Z][^\n]*\.", doc)


def test_there_is_one_wall_and_no_other_broad_except() -> None:
    broad = [
        room
        for room in ROOMS
        for node in ast.walk(ast.parse(source(room).read_text("utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) == "Exception")
    ]
    assert broad == ["lane"]


def test_no_room_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "types", "base", "core"}
    assert drawers.isdisjoint(ROOMS)
