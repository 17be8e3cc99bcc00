"""The commands end with the codes and the words that operators and their scripts rely on."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pgvigil import __version__
from pgvigil.catalogue import load
from pgvigil.config import Address
from pgvigil.serve import listen

from lab.ports import free_port

CANARY = "CANARY"
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("PG", "DATA_SOURCE_"))
}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgvigil", *words],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def in_order() -> str:
    queries = load()
    metrics = sum(len(query.metrics) for query in queries)
    return f"{len(queries)} queries with {metrics} metrics are in order\n"


def test_the_version_is_told() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"pgvigil {__version__}\n")


@pytest.mark.parametrize("words", [(), ("srve",), ("check", "--conf", "x")])
def test_a_command_line_that_is_not_understood_is_refused(words: tuple[str, ...]) -> None:
    ended = run(*words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: pgvigil")


def test_check_says_what_is_in_order_and_whom_it_would_watch() -> None:
    ended = run("check")
    told = f"{in_order()}target localhost:5432: local socket:5432/postgres\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, told, "")
    ended = run("check", PGHOST="db1", PGDATABASE="app")
    assert ended.stdout == f"{in_order()}target db1:5432: db1:5432/app\n"


def test_check_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("targets:\n  a: {dsn: postgresql://db1.invalid/x}\n  b: {dsn: host=/run}\n")
    told = f"{in_order()}target a: db1.invalid:5432/x\ntarget b: /run:5432/postgres\n"
    for ended in (run("check", "--config", str(path)), run("check", PGVIGIL_CONFIG=str(path))):
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, told, "")


def test_check_counts_the_queries_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.yml"
    own.write_text(
        "a: {why: W., max_series: 1, sql: select 1 as a, "
        "metrics: {own_a: {column: a, type: gauge, help: A.}}}"
    )
    ended = run("check", "--catalogue", str(own))
    assert ended.returncode == 0
    queries = load([own])
    metrics = sum(len(query.metrics) for query in queries)
    assert len(queries) == len(load()) + 1
    assert f"{len(queries)} queries with {metrics} metrics are in order\n" in ended.stdout


FAULTS = """\
{folder}/pgvigil.yml:1: unknown key 'listne'; did you mean 'listen'? \
(known here: allow_hosts, auth_modules, catalogue, discovery, listen, max_hosts, targets)
{folder}/pgvigil.yml:3: targets.a.pooler must be true or false, not a number (true when a \
transaction pooler such as PgBouncer stands between; detected when absent)
{folder}/own.yml:1: a lacks the key 'why' (what goes wrong for whom when nobody looks at this)
{folder}/own.yml:4: own_a is a counter: its name must end in _total, as own_a_total
{folder}/gone: cannot be read: No such file or directory; mind its path, owner and mode
5 problems to mend
"""


@pytest.mark.parametrize("command", ["check", "serve", "explain"])
def test_all_faults_are_told_at_once_and_nothing_begins(tmp_path: Path, command: str) -> None:
    (tmp_path / "pgvigil.yml").write_text("listne: x\ntargets:\n  a: {pooler: 1, dsn: host=db1}\n")
    (tmp_path / "own.yml").write_text(
        "a:\n  max_series: 1\n  sql: select 1 as a\n"
        "  metrics: {own_a: {column: a, type: counter, help: A.}}\n"
    )
    words = ["--config", f"{tmp_path}/pgvigil.yml", "--catalogue", f"{tmp_path}/own.yml"]
    ended = run(command, *words, "--catalogue", f"{tmp_path}/gone")
    told = FAULTS.format(folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", told)


def test_one_fault_is_told_in_the_singular() -> None:
    ended = run("check", "--listen", "nowhere")
    assert (ended.returncode, ended.stderr) == (
        2,
        "--listen: must be ADDRESS:PORT or :PORT with a port from 1 to 65535, such as :9187\n"
        "1 problem to mend\n",
    )


@pytest.mark.parametrize(
    "words", [("--dsn", f"host=db1 password={CANARY}"), (f"--dsn=postgresql://u:{CANARY}@db1",)]
)
def test_a_password_on_the_command_line_is_taken_from_it_and_never_shown(
    words: tuple[str, ...],
) -> None:
    ended = run("check", *words, "--log-level", "debug")
    assert (ended.returncode, ended.stderr) == (
        0,
        "pgvigil: the password in --dsn stood in the process list for a moment; "
        "set PGVIGIL_DSN, PGPASSWORD or a password file instead\n",
    )
    assert ended.stdout == f"{in_order()}target db1:5432: db1:5432/postgres\n"


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ("check", {"PGVIGIL_DSN": f"postgresql://u:{CANARY}/x@db1/app"}),
        ("serve", {"PGVIGIL_DSN": f"postgresql://u:%ff{CANARY}@db1/app"}),
        ("explain", {"DATA_SOURCE_NAME": f"host=db1 password='{CANARY}"}),
    ],
)
def test_a_password_that_is_written_wrong_is_never_shown(
    command: str, environment: Mapping[str, str]
) -> None:
    ended = run(command, "--log-level", "debug", **environment)
    assert ended.returncode == 2
    assert "is no connection string that libpq understands" in ended.stderr
    assert CANARY not in ended.stdout + ended.stderr


GRANTS = """\
-- A role for pgvigil: it sees all statistics, and no rows of anybody's tables.
-- Run this as a superuser, then set its password in psql: \\password {role}
CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS
  CONNECTION LIMIT 5;
GRANT pg_monitor TO {role};
"""


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ((), "pgvigil"),
        (("--role", "Watcher"), '"Watcher"'),
        (("--role", 'a "b"; drop'), '"a ""b""; drop"'),
        (("--role", "ärger"), '"ärger"'),
        (("--role", "user"), '"user"'),
    ],
)
def test_grants_prints_a_role_that_is_enough(words: tuple[str, ...], role: str) -> None:
    ended = run("grants", *words)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(GRANTS.replace("{role}", role))
    commands = re.findall(r"^ *(?:CREATE|GRANT|ALTER) .*", ended.stdout, re.MULTILINE)
    assert len(commands) == 8
    assert all(role in command for command in commands)


def test_explain_fails_where_the_server_cannot_be_asked() -> None:
    port = free_port()
    ended = run("explain", PGHOST="127.0.0.1", PGPORT=str(port), PGPASSWORD=CANARY)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"127.0.0.1:{port}/postgres: connection_refused: ")
    assert CANARY not in ended.stderr


def test_explain_knows_the_targets_by_name(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("targets: {a: {dsn: host=db1}, b: {dsn: host=db2}}")
    ended = run("explain", "--config", str(path), "--target", "c")
    told = "no target is called 'c'; there are a, b\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", told)


def test_serve_fails_where_its_address_is_taken() -> None:
    with listen(Address("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        ended = run("serve", "--listen", address)
    assert (ended.returncode, ended.stdout) == (1, "")
    told = json.loads(ended.stderr)
    assert (told["level"], told["event"], told["address"]) == ("error", "cannot listen", address)
    assert told["reason"].startswith("Address already in use")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_and_ends_well_when_told_to(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pgvigil", "serve", "--listen", "127.0.0.1:0"],
        env={**ENVIRONMENT, "PGVIGIL_DSN": f"postgresql://u:{CANARY}@db1.invalid/app"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        begun = json.loads(process.stderr.readline())
        process.send_signal(number)
        ended = process.stderr.read()
    assert begun["event"] == "pgvigil serves"
    assert begun["targets"] == ["db1.invalid:5432/app"]
    assert begun["queries"] == len(load())
    assert CANARY not in str(begun) + ended
    assert (process.returncode, json.loads(ended)["event"]) == (0, "pgvigil ends")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as gone:
        ended = subprocess.run(
            [sys.executable, "-m", "pgvigil", "grants"],
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, "")
