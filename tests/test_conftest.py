"""A run of the tests leaves no server behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import processes

ROOT = Path(__file__).parents[1]

WAITS = """
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("major", [18])
def test_it_is_told_where_the_server_is(fresh_server, major, request):
    Path(__file__).with_suffix(".pid").write_text(str(fresh_server(major).pid))
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass  # it does not end in time
"""


@pytest.mark.parametrize("words", [("-n", "0"), ("-n", "2", "--dist", "loadfile")], ids=len)
def test_a_run_that_is_killed_leaves_no_server(tmp_path: Path, words: tuple[str, ...]) -> None:
    test, told = tmp_path / "test_it.py", tmp_path / "test_it.pid"
    patient = (
        WAITS if "--dist" in words else WAITS[: WAITS.index("    while")] + "    time.sleep(60)"
    )
    test.write_text(patient)
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    begun = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), *words),
            *("--confcutdir", str(tmp_path), str(test)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )
    try:
        end = time.monotonic() + 60
        while not (told.exists() and (text := told.read_text())):
            assert begun.poll() is None, begun.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)
        assert processes.alive(int(text))
        begun.send_signal(signal.SIGTERM)
        said, _ = begun.communicate(timeout=60)
        end = time.monotonic() + 10
        while processes.alive(int(text)):
            assert time.monotonic() < end, said
            time.sleep(0.1)
    finally:
        if begun.poll() is None:
            os.killpg(begun.pid, signal.SIGKILL)
            begun.communicate()
