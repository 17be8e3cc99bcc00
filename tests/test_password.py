"""A command is asked for a password as seldom as will do, and nothing it writes is ever shown."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from pgvigil import password
from pgvigil.errors import Down, Unreachable
from pgvigil.target import Target

CANARY = "kanarienvogel"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file with a line for each time that a script was run."""
    path = tmp_path / "asked"
    path.touch()
    return path


def script(asked: Path, text: str) -> str:
    path = asked.with_name("script")
    path.write_text(f"#!/bin/sh\necho >> {asked}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def target(*command: str, lifetime: float = 600.0, **connection: str) -> Target:
    return Target("main", connection, password_command=command, password_lifetime=lifetime)


def told(*targets: Target) -> list[Mapping[str, str]]:
    """The keywords for each, which are asked for at once."""

    async def ask() -> list[Mapping[str, str]]:
        return list(await asyncio.gather(*map(password.parameters, targets)))

    return asyncio.run(ask())


def failure(of: Target) -> str:
    with pytest.raises(Unreachable) as failed:
        told(of)
    assert failed.value.reason is Down.PASSWORD_COMMAND
    assert CANARY not in str(failed.value)
    return failed.value.detail


def runs(asked: Path) -> int:
    return len(asked.read_text().splitlines())


def test_the_first_line_is_the_password_and_serves_until_it_is_old(asked: Path) -> None:
    command = script(asked, r"printf ' p w\r\nmore\n'")
    for _ in range(3):
        assert told(target(command, host="db1")) == [{"host": "db1", "password": " p w"}]
    assert runs(asked) == 1
    old = target(command, host="db2", lifetime=0.0)
    assert told(old) == told(old) == [{"host": "db2", "password": " p w"}]
    assert runs(asked) == 3


def test_who_asks_while_it_runs_waits_for_the_same_answer(asked: Path) -> None:
    command = script(asked, "sleep 0.2; echo $PGHOST")
    one, two = target(command, host="db1"), target(command, host="db2")
    answers = told(one, two, one, two, one)
    assert [answer["password"] for answer in answers] == ["db1", "db2", "db1", "db2", "db1"]
    assert runs(asked) == 2


def test_who_gives_up_leaves_the_answer_to_the_next(asked: Path) -> None:
    go = asked.with_name("go")
    command = target(script(asked, f"until test -e {go}; do sleep 0.01; done; echo one"))

    async def ask() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await password.parameters(command)
        go.touch()
        assert await password.parameters(command) == {"password": "one"}

    asyncio.run(ask())
    assert runs(asked) == 1


def test_it_is_told_where_and_as_whom_and_no_secret(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", CANARY)
    monkeypatch.setenv("PGVIGIL_DSN", f"password={CANARY}")
    monkeypatch.setenv("PGPORT", "5433")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    command = script(asked, f"env > {asked.with_name('env')}; echo x")
    told(target(command, host="db1", user="watcher", dbname="app"))
    env = asked.with_name("env").read_text()
    assert {"PGHOST=db1", "PGPORT=5433", "PGUSER=watcher", "AWS_REGION=eu-1"} <= set(
        env.splitlines()
    )
    assert CANARY not in env


def test_no_shell_reads_its_words(asked: Path) -> None:
    command = script(asked, 'echo "$1"')
    assert told(target(command, "$(id); `id` $HOME")) == [{"password": "$(id); `id` $HOME"}]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"echo {CANARY}; echo {CANARY} >&2; exit 3", "ended with 3; run it by hand to see why"),
        (f"echo {CANARY}; kill -9 $$", "ended with -9; run it by hand to see why"),
        (f"echo; echo {CANARY}", "HOLDS"),
        ("", "HOLDS"),
        (rf"printf '{CANARY}\000\n'", "HOLDS"),
        (rf"printf '{CANARY}\377\n'", "UTF-8"),
        (f"yes {CANARY}", "answered with more than 64 kB"),
    ],
)
def test_what_is_no_password_is_told_without_a_word_of_it(
    asked: Path, text: str, what: str
) -> None:
    command = script(asked, text)
    sentences = {
        "HOLDS": f"the first line that {command} wrote holds no password",
        "UTF-8": f"the first line that {command} wrote is not UTF-8 text",
    }
    assert failure(target(command)) == sentences.get(what, f"{command} {what}")
    failure(target(command))
    assert runs(asked) == 2


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    said = "cannot be run: No such file or directory; mind its path and mode"
    assert failure(target(f"{tmp_path}/none")) == f"{tmp_path}/none {said}"
    said = "cannot be run: Permission denied; mind its path and mode"
    assert failure(target(str(tmp_path))) == f"{tmp_path} {said}"


def test_a_command_that_hangs_is_killed_with_what_it_has_started(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(password, "PATIENCE", 0.5)
    children = asked.with_name("children")
    command = script(asked, f"sleep 600 & echo $! $$ > {children}; wait")
    assert failure(target(command)) == f"{command} did not end within 0.5 s and was killed"
    for pid in children.read_text().split():
        # A child that nobody has waited for yet is a zombie, which runs no more.
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z" or not _runs(int(pid))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_after_a_refused_login_it_is_asked_anew_at_most_once_in_a_while(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = target(script(asked, f"wc -l < {asked}"))
    (given,) = told(command)
    assert not password.refused(command, given)
    monkeypatch.setattr(password, "PAUSE", 0.0)
    assert password.refused(command, given)
    (anew,) = told(command)
    assert (given["password"], anew["password"]) == ("1", "2")
    monkeypatch.undo()
    # Who was refused with the old one meanwhile shall take what is there.
    assert password.refused(command, given)
    assert not password.refused(command, anew)
    assert told(command) == [anew]
    assert not password.refused(Target("plain", {"password": "x"}), {"password": "x"})
