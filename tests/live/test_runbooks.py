"""What the runbooks have people run is what PostgreSQL runs."""

import re
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql

from lab.cluster import PGVIGIL
from lab.postgres import Server

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
PAGES = sorted(RUNBOOKS.glob("*.md"))

pytestmark = pytest.mark.parametrize("major", [13, 18])


class Fence(NamedTuple):
    """SQL of a runbook."""

    line: int
    changes: bool
    """Whether it changes something, and is not run here."""
    text: str


def fences(page: Path) -> list[Fence]:
    text = page.read_text()
    found = re.finditer(r"^```(sql.*)\n((?:.*\n)*?)```$", text, re.M)
    return [
        Fence(text.count("\n", 0, match.start()) + 1, check(match[1]) == "changes", match[2])
        for match in found
    ]


def check(words: str) -> str:
    kind = words.removeprefix("sql").strip()
    assert kind in ("", "changes"), f"a fence is sql or sql changes, not {words}"
    return kind


def fault(server: Server, fence: Fence) -> str | None:
    """What the server says against it."""
    try:
        if fence.changes:
            parse(server, fence.text)
        else:
            run(server, fence.text)
    except psycopg.Error as error:
        return str(error)
    return None


def run(server: Server, text: str) -> None:
    """Run it as one who may look at everything, else as a superuser; nobody may change anything."""
    try:
        execute(server.conninfo(**PGVIGIL.login), text)
    except psycopg.errors.InsufficientPrivilege:
        execute(server.conninfo(), text)


def execute(conninfo: str, text: str) -> None:
    options = "-c default_transaction_read_only=on -c statement_timeout=10s"
    with psycopg.connect(conninfo, autocommit=True, options=options) as connection:
        connection.execute(text.encode())


def parse(server: Server, text: str) -> None:
    """Have it parsed and not run: what stands behind a return is."""
    body = sql.Literal(f"begin\nreturn;\n{text}\nend")
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(sql.SQL("do {}").format(body))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_sql_of_a_runbook_runs(server: Server, page: Path) -> None:
    faults = {fence.line: fault(server, fence) for fence in fences(page)}
    assert {line: text for line, text in faults.items() if text} == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("sql", "select no_such_column from pg_stat_activity;"),
        ("sql", "create table pgvigil_runbook ();"),
        ("sql changes", "select pg_terminate_backend(pid) form pg_stat_activity;"),
        ("sql changes", r"\x on"),
    ],
)
def test_sql_that_does_not_run_is_seen(
    server: Server, words: str, text: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```{words}\n{text}\n```\n")
    (fence,) = fences(page)
    assert fence.line == 3
    assert fault(server, fence)


def test_what_changes_something_is_not_run(server: Server) -> None:
    fence = Fence(1, True, "create table pgvigil_runbook ();\nalter system set work_mem = '8MB';\n")
    assert fault(server, fence) is None
    assert server.execute("select to_regclass('pgvigil_runbook')") == [(None,)]
