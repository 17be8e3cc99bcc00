"""What docs/record.md and docs/archive.md tell people to run does what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pgvigil import catalogue

from lab.postgres import Server

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "record.md").read_text("utf-8")
QUERIES = {query.name: query for query in catalogue.load()}
KNOWN = {metric.name for query in QUERIES.values() for metric in query.metrics}

LINES = re.findall(r"^\|[^|`]*\| `(pgvigil record [^`]*)` \|$", PAGE, re.M)
BLOCKS = re.findall(r"(?:^    .*\n)+", PAGE, re.M)
PROMQL = re.findall(r"^\|[^|`]*\| `([^`]*pg_record_[^`]*)` \|$", PAGE, re.M)

STAND_INS = (
    *("pg_dump", "pg_basebackup", "pgbackrest", "barman", "wal-g", "pg_amcheck"),
    "restore-and-check",
)
OLDEST = 1795200000
INFO = [{"name": "main", "backup": [{"timestamp": {"start": OLDEST - 60, "stop": OLDEST}}]}]
"""The part of what pgBackRest 2.60 tells that the page reads."""


@pytest.fixture(scope="module")
def server(module_server: Callable[..., Server]) -> Server:
    # No older than the programs of the system, which refuse what is newer than they are.
    return module_server(13)


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Iterator[Path]:
    """Where commands are run, with a record set up as the page says."""
    psql = installed("psql")
    programs = tmp_path / "bin"
    programs.mkdir()
    write(programs / "pgvigil", f'exec {sys.executable} -m pgvigil "$@"')
    (set_up,) = [block for block in BLOCKS if "grants --record" in block]
    (role,) = [block for block in BLOCKS if "CREATE ROLE backup_job" in block]
    done = run(server, tmp_path, f"set -e; {set_up}", user="postgres")
    assert done.returncode == 0, done.stderr
    (create, _password) = role.strip().splitlines()
    server.execute(create)
    server.execute("alter role backup_job password 'x'")
    assert psql
    yield tmp_path
    server.execute("drop schema pgvigil cascade")
    server.execute("drop role backup_job, pgvigil_record")


def installed(program: str) -> str:
    """The path of a program that a user's machine may lack."""
    path = shutil.which(program)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed")
    return path


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def stand_in(place: Path, script: str = "") -> None:
    """Put programs there that only note what they were told, and do what the script does."""
    for name in STAND_INS:
        write(place / "bin" / name, f'echo {name} "$@" >> {place}/told; {script}')
    shutil.copy(place / "bin" / "restore-and-check", place)


def run(
    server: Server, place: Path, line: str, user: str = "backup_job"
) -> "subprocess.CompletedProcess[str]":
    """Run a line of a shell as the page has it, its files in a folder of ours."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATA_SOURCE"))}
    there = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": user, "PGPASSWORD": "x"}
    return subprocess.run(
        ["sh", "-c", line.replace("/backup/", f"{place}/")],
        env={
            **clean,
            **there,
            "PYTHONPATH": ":".join(sys.path),
            "PATH": f"{place}/bin:{os.environ['PATH']}",
            "PGDATA": "/data",
            "began": str(OLDEST),
        },
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
    )


def rows(server: Server) -> list[tuple[object, ...]]:
    return server.execute("select kind, place, ok, tool from pgvigil.record order by id")


def test_the_page_has_the_lines_that_are_looked_for() -> None:
    assert len(LINES) == 9
    assert len(PROMQL) == 6
    assert len(BLOCKS) == 7


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_writes_down_what_it_says(
    server: Server, place: Path, line: str
) -> None:
    stand_in(place)
    done = run(server, place, line)
    assert (done.returncode, done.stderr) == (0, "")
    kind = line.split()[2]
    where = re.search(r"--place (\S+)", line)
    _, _, job = line.partition(" -- ")
    tool = Path(job.split()[0]).name if job else ""
    assert rows(server) == [(kind, where[1] if where else "", True, tool)]
    if job:
        words = job.replace('"$PGDATA"', "/data").replace("/backup/", f"{place}/")
        assert (place / "told").read_text() == words.removeprefix("./") + "\n"


@pytest.mark.parametrize(("fails", "ok"), [("", True), ("test $3 != backup", False)])
def test_the_script_for_pgbackrest_tells_how_far_back_one_can_recover(
    server: Server, place: Path, fails: str, ok: bool
) -> None:
    installed("jq")
    (script,) = [block for block in BLOCKS if "info --output=json" in block]
    stand_in(place, f"{fails or 'true'} || exit 1; test $3 = info && echo '{json.dumps(INFO)}'; :")
    done = run(server, place, script)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(server) == [("backup", "repo1", ok, "pgbackrest")]
    ((window, started),) = server.execute(
        "select extract(epoch from window_start), started <= ended from pgvigil.record"
    )
    assert (window, started) == (OLDEST if ok else None, True)


@pytest.mark.parametrize("code", [0, 1])
def test_a_pipeline_fails_where_any_of_it_does(server: Server, place: Path, code: int) -> None:
    installed("bash")
    (line,) = [block for block in BLOCKS if "pipefail" in block]
    stand_in(place, f"exit {code}")
    assert run(server, place, line.strip()).returncode == code
    assert rows(server) == [("backup", "", not code, "bash")]


def test_a_real_dump_is_written_down(server: Server, place: Path) -> None:
    installed("pg_dump")
    (line,) = [line for line in LINES if "pg_dump" in line]
    failed = run(server, place, line)
    assert failed.returncode == 1
    assert 'database "app" does not exist' in failed.stderr
    server.execute("create database app")
    try:
        done = run(server, place, line)
    finally:
        server.execute("drop database app")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row[2:] for row in rows(server)] == [(False, "pg_dump"), (True, "pg_dump")]
    assert (place / "app.dump").read_bytes().startswith(b"PGDMP")


def test_old_rows_are_removed_as_the_page_says(server: Server, place: Path) -> None:
    assert place
    server.execute(
        "insert into pgvigil.record (kind, ok, place, ended) values"
        " ('backup', true, '', now()), ('backup', true, '', now() - interval '900 days'),"
        " ('backup', true, 'old', now())"
    )
    deletes = re.findall(r"DELETE FROM .*?(?=;|`)", PAGE)
    assert len(deletes) == 2
    for statement in deletes:
        server.execute(statement)
    assert len(rows(server)) == 1


def test_the_promql_of_the_page_is_sound(tmp_path: Path) -> None:
    promtool = installed("promtool")
    rules = [{"record": f"r{at}", "expr": text} for at, text in enumerate(PROMQL)]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "page", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["record.md", "archive.md"])
def test_the_metrics_that_a_page_names_exist(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    named = set(re.findall(r"\bpg_(?:record|archiving|settings|stat_archiver)_\w+[a-z]\b", text))
    assert named
    assert named <= KNOWN | {"pg_archiving_ready_"}
