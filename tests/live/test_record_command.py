"""`pgvigil record` writes down what a job did, and never stands in the job's way."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from pgvigil import grants, record
from pgvigil.errors import Unreachable
from pgvigil.record import Record
from pgvigil.target import Target

from lab.ports import free_port
from lab.postgres import Server
from lab.silent_port import silent_port

CANARY = "CANARY"
CLEAN = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATA_SOURCE"))},
    "PYTHONPATH": ":".join(sys.path),
}
Row = tuple[str, bool, str, str]


@pytest.fixture(scope="module")
def built(module_server: Callable[..., Server]) -> Server:
    server = module_server(18)
    server.execute(grants.script("pgvigil", ["record"], create=False))
    server.execute(
        f"create role job login password '{CANARY}' in role pgvigil_record;"
        "alter role job set default_transaction_read_only = on;"
        "alter role job set search_path = nowhere"
    )
    return server


@pytest.fixture
def server(built: Server) -> Iterator[Server]:
    yield built
    built.execute("truncate pgvigil.record")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pgvigil", "record", *words]


def pgvigil(server: Server | None, *words: str, **environment: str) -> "Ended":
    dsn = {"PGVIGIL_DSN": server.conninfo(user="job", password=CANARY)} if server else {}
    return subprocess.run(
        command(*words),
        env={**CLEAN, **dsn, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


Ended = subprocess.CompletedProcess[str]


def rows(server: Server) -> list[Row]:
    """Kind, outcome, tool and note of all that is written down."""
    return server.execute("select kind, ok, tool, note from pgvigil.record order by id")


@pytest.mark.parametrize(
    ("script", "code", "note"),
    [
        ("exit 0", 0, ""),
        ("exit 3", 3, "exit code 3"),
        ("kill -KILL $$", 137, "ended by signal 9"),
    ],
)
def test_a_job_is_run_and_its_outcome_written_down(
    server: Server, script: str, code: int, note: str
) -> None:
    ended = pgvigil(server, "backup", "--run", "--", "sh", "-c", f"echo a -- b; {script}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "a -- b\n", "")
    assert rows(server) == [("backup", code == 0, "sh", note)]


def test_how_long_a_job_took_is_told_whatever_its_clock_says(server: Server) -> None:
    ended = pgvigil(server, "backup", "--run", "--tool", "t", "--", "sleep", "0.3")
    assert ended.returncode == 0
    ((seconds, age),) = server.execute(
        "select extract(epoch from ended - started), extract(epoch from now() - ended)"
        " from pgvigil.record"
    )
    assert 0.3 <= seconds < 60
    assert 0 <= age < 60


def test_the_clock_of_a_job_may_be_some_minutes_ahead(server: Server) -> None:
    ((began,),) = server.execute("select extract(epoch from now())::bigint + 300")
    assert pgvigil(server, "backup", "--ok", "--started", str(began)).returncode == 0
    assert server.execute("select started = ended from pgvigil.record") == [(True,)]
    refused = pgvigil(server, "backup", "--ok", "--started", str(began + 600))
    assert refused.returncode == 1
    assert "in the future, by the server's clock" in refused.stderr
    assert len(rows(server)) == 1


@pytest.mark.parametrize(
    ("name", "code", "note"),
    [("nowhere", 127, "No such file or directory"), ("plain", 126, "Permission denied")],
)
def test_a_job_that_cannot_be_run_has_failed(
    server: Server, tmp_path: Path, name: str, code: int, note: str
) -> None:
    (tmp_path / "plain").touch()
    ended = pgvigil(server, "backup", "--run", "--", str(tmp_path / name))
    told = f"{tmp_path / name}: {note}"
    assert (ended.returncode, ended.stderr) == (code, f"pgvigil: {told}\n")
    assert rows(server) == [("backup", False, name, told)]


def hangs_up() -> None:
    """Be ended by the end of a terminal, which the tests ignore under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ignores_hang_ups() -> None:
    """Be as under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_job_which_may_end_in_its_own_way(
    server: Server, sent: signal.Signals
) -> None:
    script = f"trap 'exit 7' {sent.name[3:]}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        command("backup", "--run", "--", "sh", "-c", script),
        env={**CLEAN, "PGVIGIL_DSN": server.conninfo(user="job", password=CANARY)},
        stdout=subprocess.PIPE,
        preexec_fn=hangs_up,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(sent)
        assert process.wait(60) == 7
    assert rows(server) == [("backup", False, "sh", "exit code 7")]


def test_a_job_under_nohup_outlives_its_terminal(server: Server) -> None:
    with subprocess.Popen(
        command("backup", "--run", "--", "sh", "-c", "echo ready; read word; exit 4"),
        env={**CLEAN, "PGVIGIL_DSN": server.conninfo(user="job", password=CANARY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=ignores_hang_ups,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGHUP)
        assert process.stdin
        process.stdin.write(b"on\n")
        process.stdin.flush()
        assert process.wait(60) == 4
    assert rows(server) == [("backup", False, "sh", "exit code 4")]


def test_a_job_that_is_interrupted_at_the_terminal_has_failed(server: Server) -> None:
    with subprocess.Popen(
        command("backup", "--run", "--", "sh", "-c", "echo ready; exec sleep 60"),
        env={**CLEAN, "PGVIGIL_DSN": server.conninfo(user="job", password=CANARY)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert rows(server) == [("backup", False, "sh", "ended by signal 2")]


def test_a_job_has_its_own_input_environment_and_open_files(server: Server) -> None:
    reading, writing = os.pipe()
    script = f"cat; echo ${{PGDATABASE-none}}; echo locked > /dev/fd/{writing}; printf '\\377' >&2"
    done = subprocess.run(
        command("backup", "--run", "--", "sh", "-c", script),
        env={**CLEAN, "PGVIGIL_DSN": server.conninfo(user="job", password=CANARY)},
        input=b"\0given\n",
        capture_output=True,
        pass_fds=[writing],
        timeout=60,
    )
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b"locked\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\0given\nnone\n", b"\xff")


def test_a_password_moves_out_of_the_process_list_and_the_jobs_words_stay(server: Server) -> None:
    dsn = server.conninfo(user="job", password=CANARY)
    job = ("sh", "-c", 'echo "$@"; cat /proc/$PPID/cmdline', "sh", "--dsn", "x", "--dsn=y")
    ended = pgvigil(None, "backup", "--dsn", dsn, "--run", "--", *job)
    assert ended.returncode == 0
    assert ended.stdout.startswith("--dsn x --dsn=y\n")
    assert CANARY not in ended.stdout + ended.stderr
    assert len(rows(server)) == 1


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_as_it_does_though_no_server_can_be_reached(code: int) -> None:
    nobody = f"host=127.0.0.1 port={free_port()} password={CANARY}"
    words = ("backup", "--run", "--", "sh", "-c", f"echo done; exit {code}")
    ended = pgvigil(None, *words, PGVIGIL_DSN=nobody)
    assert (ended.returncode, ended.stdout) == (code, "done\n")
    assert "Connection refused" in ended.stderr
    assert ended.stderr.endswith("pgvigil: the backup was NOT recorded\n")
    assert CANARY not in ended.stderr


def test_a_wrong_configuration_keeps_no_job_from_running(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("targets: {a: {dns: host=db1}}")
    ended = pgvigil(None, "backup", "--config", str(path), "--run", "--", "sh", "-c", "exit 5")
    assert ended.returncode == 5
    assert f"{path}:1: " in ended.stderr
    assert ended.stderr.endswith("pgvigil: the backup was NOT recorded\n")
    refused = pgvigil(None, "backup", "--config", str(path), "--ok")
    assert refused.returncode == 2


def test_of_several_targets_one_is_named(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    here = {"dsn": server.conninfo(user="job", password=CANARY)}
    path.write_text(json.dumps({"targets": {"a": here, "b": {"dsn": "host=db1"}}}))
    refused = pgvigil(None, "backup", "--ok", "--config", str(path))
    assert (refused.returncode, rows(server)) == (2, [])
    assert "--target: must be one of the configuration: a, b" in refused.stderr
    done = pgvigil(None, "backup", "--ok", "--config", str(path), "--target", "a")
    assert (done.returncode, len(rows(server))) == (0, 1)


def test_what_is_missing_on_the_server_is_told_with_the_remedy(server: Server) -> None:
    server.execute("create role stranger login password 's'")
    server.execute("create database empty")
    try:
        for keywords, remedy in (
            ({"user": "stranger", "password": "s"}, "grant it pgvigil_record"),
            ({"dbname": "empty"}, "run what `pgvigil grants --record` prints"),
        ):
            ended = pgvigil(None, "backup", "--ok", PGVIGIL_DSN=server.conninfo(**keywords))
            assert ended.returncode == 1
            assert remedy in ended.stderr
    finally:
        server.execute("drop database empty")
        server.execute("drop role stranger")


def test_a_locked_table_holds_nobody_up_for_long(server: Server) -> None:
    with psycopg.connect(server.conninfo()) as holder:
        holder.execute("lock table pgvigil.record in share mode")
        ended = pgvigil(server, "backup", "--run", "--", "true")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "lock timeout" in ended.stderr
    assert rows(server) == []


def test_a_missing_synchronous_standby_holds_nobody_up(server: Server) -> None:
    server.set({"synchronous_standby_names": "nowhere"})
    try:
        ended = pgvigil(server, "backup", "--ok")
    finally:
        server.set({"synchronous_standby_names": None})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(rows(server)) == 1


def test_a_silent_server_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PATIENCE", 0.3)
    with silent_port() as port:
        target = Target("t", {"host": "127.0.0.1", "port": str(port)})
        with pytest.raises(Unreachable, match="timeout"):
            asyncio.run(record.write(target, Record("backup", ok=True)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("backup",), "one of the arguments --ok --failed --run is required"),
        (("backup", "--ok", "--failed"), "not allowed with"),
        (("dinner", "--ok"), "invalid choice: 'dinner'"),
        (("backup", "--run"), "--run wants a command behind --"),
        (("backup", "--ok", "--", "touch", "ran"), "--run wants a command behind --"),
        (("backup", "--run", "--started", "1", "--", "touch", "ran"), "--run knows itself"),
        (("backup", "--ok", "--ended", "2026-11-21T02:00:00"), "a time with its zone"),
        (("backup", "--ok", "--ended", "99999999999999999"), "seconds since the epoch"),
        (("backup", "--ok", "--size", "1.5GB"), "a whole number of bytes"),
        (("backup", "--ok", "--size", "-1"), "--size"),
        (("backup", "--ok", "--place", "x" * 101), "has 101 characters, and may have 100"),
        (("backup", "--ok", "--place", "\udcff"), "is no UTF-8 text"),
        (("backup", "--ok", f"password={CANARY}"), "not shown"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = pgvigil(None, *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert told in ended.stderr
    assert CANARY not in ended.stderr
    assert [*tmp_path.iterdir()] == []
