"""The demo shows what it promises and leaves nothing behind, however it ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import alertmanager, processes, prometheus, rules
from lab.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
NO_SERVER = "There is no PostgreSQL server for the demo"
LONGEST_SECONDS = 60

Demo = subprocess.Popen[str]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for all that the demo makes, which the servers' account can reach."""
    directory = Path(tempfile.mkdtemp(prefix="pgvigil-demo-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with all that is installed, but for Prometheus and what belongs to it."""
    directory = tmp_path_factory.mktemp("bin")
    for entry in os.environ["PATH"].split(os.pathsep):
        for program in Path(entry).glob("*"):
            link = directory / program.name
            if not (program.name.startswith(("prometheus", "alertmanager")) or link.is_symlink()):
                link.symlink_to(program)
    return str(directory)


@pytest.fixture
def start(place: Path, bare_path: str) -> Iterator[Callable[..., Demo]]:
    """A function that starts the demo with arguments, its parts in `place`."""
    with contextlib.ExitStack() as started:

        def start_one(*arguments: str, path: str = bare_path) -> Demo:
            process = subprocess.Popen(
                [sys.executable, "-m", "demo", *arguments],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(place), "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # Under nohup the tests ignore the end of a terminal, and what they start would.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
            started.enter_context(process)
            started.callback(process.terminate)
            return process

        yield start_one


def test_it_shows_the_pages_the_bad_habits_and_the_alerts_and_leaves_nothing(
    start: Callable[..., Demo], place: Path
) -> None:
    alerting = prometheus.installed() is not None and alertmanager.installed() is not None
    assert alerting or not os.environ.get("CI"), "Prometheus and Alertmanager are not installed"
    port = free_port()
    demo = start("--for", "120s", "--port", str(port), path=os.environ["PATH"])
    output = read_until(demo, "LockWait" if alerting else "restore drill     passed")
    if alerting:
        assert_it_alerts(output)
    demo.send_signal(signal.SIGINT)
    more, code = finish(demo)
    output += more
    assert code == 0, output
    assert f"http://127.0.0.1:{port}/ " in output
    assert f"http://127.0.0.1:{port}/metrics" in output
    assert re.search(r"^  PostgreSQL +up, version \d+\.\d+, primary$", output, re.M)
    assert re.search(r"^  commits +[1-9]\d*\.\d per second in the shop$", output, re.M)
    assert re.search(r"^  sessions +[1-9] active, .*[2-9] idle in transaction$", output, re.M)
    assert re.search(r"^  idle transaction +the oldest is idle for [1-9]\d* s$", output, re.M)
    assert re.search(r"^  blocked +1 session waiting for a lock, for [1-9]\d* s$", output, re.M)
    assert re.search(r"^  standby +1 streaming, [\d,]+ bytes behind$", output, re.M)
    assert re.search(r"^  backup +the last good one \d+ s ago, \d+ MB$", output, re.M)
    assert re.search(r"^  restore drill +passed \d+ s ago: back in \d+\.\d s$", output, re.M)
    assert_nothing_is_left(place)


def assert_it_alerts(output: str) -> None:
    """Look whether the programs that the demo has named do as it says."""
    watching, telling = (
        re.search(rf"^  {name} +(http://127\.0\.0\.1:\d+)/", output, re.M)
        for name in ("Prometheus", "Alertmanager")
    )
    assert watching
    assert telling
    groups = ask(f"{watching[1]}/api/v1/rules")["data"]["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert sorted(rule["name"] for rule in loaded) == sorted(
        rules.FINDING if rule.kind == "finding" else rule.name for rule in rules.load()
    )
    assert [rule for rule in loaded if rule["health"] == "err"] == []
    (target,) = ask(f"{watching[1]}/api/v1/targets")["data"]["activeTargets"]
    assert (target["labels"]["instance"], target["health"]) == ("demo", "up")
    (told,) = ask(f"{watching[1]}/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    assert told["url"].startswith(telling[1])
    assert "webhook" not in ask(f"{telling[1]}/api/v2/status")["config"]["original"]
    assert f"a data source of type Prometheus at {watching[1]}," in output
    assert re.search(r"^  alerts pending +.*BackupPlacesTooFew", output, re.M)


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_in_peace_when_it_is_asked_to(
    number: signal.Signals, start: Callable[..., Demo], place: Path
) -> None:
    demo = start("--port", str(free_port()))
    before = read_until(demo, "What pgvigil sees")
    demo.send_signal(number)
    demo.send_signal(number)
    output, code = finish(demo)
    assert code == 0, before + output
    assert output.endswith("Everything is stopped and removed.\n")
    assert_nothing_is_left(place)


@pytest.mark.parametrize(
    "step", ["pgvigil demo", "prepare", "create the role", "open a shop", "restore it"]
)
def test_it_ends_in_peace_while_it_sets_up(
    step: str, start: Callable[..., Demo], place: Path
) -> None:
    demo = start("--port", str(free_port()))
    read_until(demo, step)
    demo.send_signal(signal.SIGINT)
    output, code = finish(demo)
    assert code == 0, output
    assert "What pgvigil sees" not in output
    assert_nothing_is_left(place)


@pytest.mark.parametrize(
    ("program", "name"),
    [("pgvigil\0serve", "the exporter"), ("postgres\0-D", "PostgreSQL"), ("pgbench", "the load")],
)
def test_it_says_which_part_died(
    program: str, name: str, start: Callable[..., Demo], place: Path
) -> None:
    demo = start("--port", str(free_port()))
    read_until(demo, "What pgvigil sees")
    found = [pid for pid in processes.descendants(demo.pid) if program in command_line(pid)]
    if program == "pgbench" and not found:
        pytest.skip("the server that was found has no pgbench")
    os.kill(min(found), signal.SIGKILL)  # the primary was started before the standby
    output, code = finish(demo)
    assert code == 1, output
    assert re.search(rf"^{name}( and [a-zA-Z ]+)* ended unexpectedly", output, re.M)
    assert_nothing_is_left(place)


def test_it_takes_the_next_port_when_one_is_taken(start: Callable[..., Demo], place: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        output, code = finish(start("--for", "1s", "--port", str(port)))
    assert code == 0, output
    match = re.search(rf"^Port {port} is taken; the exporter took (\d+)\.$", output, re.M)
    assert match is not None
    assert f"http://127.0.0.1:{match[1]}/metrics" in output
    assert re.search(r"^  Prometheus +not found, .*apt install prometheus", output, re.M)
    assert "Alertmanager" not in output
    assert_nothing_is_left(place)


def test_it_cleans_up_when_nobody_reads_it_any_more(
    start: Callable[..., Demo], place: Path
) -> None:
    demo = start("--port", str(free_port()))
    read_until(demo, "What pgvigil sees")
    assert demo.stdout is not None
    demo.stdout.close()
    assert demo.wait(LONGEST_SECONDS) == 1
    assert_nothing_is_left(place)


@pytest.mark.parametrize("arguments", [["--for", "soon"], ["--for", "-1s"], ["--port", "0"]])
def test_it_refuses_what_it_does_not_understand(
    arguments: list[str], start: Callable[..., Demo], place: Path
) -> None:
    output, code = finish(start(*arguments))
    assert code == 2
    assert "usage: python -m demo" in output
    assert_nothing_is_left(place)


def finish(demo: Demo) -> tuple[str, int]:
    output, _ = demo.communicate(timeout=LONGEST_SECONDS)
    skip_without_server(output)
    return output, demo.returncode


def read_until(demo: Demo, text: str) -> str:
    """Read what the demo says up to a text, which need not be at the end of a line."""
    assert demo.stdout is not None
    read = ""
    while text not in read:
        character = demo.stdout.read(1)
        if not character:
            skip_without_server(read)
            pytest.fail(f"the demo ended before it said {text!r}:\n{read}")
        read += character
    return read


def skip_without_server(output: str) -> None:
    if NO_SERVER in output and not os.environ.get("CI"):
        pytest.skip(output)


def command_line(pid: int) -> str:
    return read(pid, "cmdline")


def read(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    return ""


def directory_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/cwd").readlink())
    return ""


def assert_nothing_is_left(place: Path) -> None:
    assert list(place.iterdir()) == []
    end = time.monotonic() + 5  # a killed server's children notice it a moment later
    while (left := still_there(place)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def still_there(place: Path) -> list[str]:
    """The processes that name the directory in their command, their environment or their cwd."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        traces = command_line(pid) + read(pid, "environ") + directory_of(pid)
        if str(place) in traces and processes.alive(pid):
            found.append(command_line(pid))
    return found
