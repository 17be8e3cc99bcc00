"""The systemd unit is sound, and leaves the exporter what it needs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter

UNIT = Path(__file__).parents[2] / "packaging" / "systemd" / "pgvigil.service"
PROTECTED = (
    "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0;"
    " os.execv(sys.argv[1], sys.argv[1:])"
)
"""Starts a program as MemoryDenyWriteExecute= does: PR_SET_MDWE, of Linux 6.3."""


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = [name for name in ("systemd-analyze", "strace") if shutil.which(name) is None]
    if missing:
        if os.environ.get("CI"):
            pytest.fail(f"{missing} cannot be found")
        pytest.skip(f"{missing} cannot be found")


def systemd(*words: object) -> "subprocess.CompletedProcess[str]":
    command = ["systemd-analyze", *map(str, words)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PAGER": "cat", "SYSTEMD_COLORS": "0"},
    )


def test_systemd_takes_every_line_of_the_unit(tmp_path: Path) -> None:
    installed = tmp_path / UNIT.name
    installed.write_text(UNIT.read_text().replace("/usr/bin/pgvigil", sys.executable))
    ended = systemd("verify", installed)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    installed.write_text(installed.read_text().replace("ProtectHome=yes", "ProtectHome=perhaps"))
    assert "protect home" in systemd("verify", installed).stderr


def test_systemd_finds_little_that_the_service_could_do(tmp_path: Path) -> None:
    judged = ("security", "--offline=yes", "--threshold=15")
    assert systemd(*judged, UNIT).returncode == 0
    open_to_all = tmp_path / UNIT.name
    open_to_all.write_text(UNIT.read_text().replace("CapabilityBoundingSet=\n", ""))
    assert systemd(*judged, open_to_all).returncode != 0


def allowed() -> set[str]:
    """The calls that the unit's filters leave."""

    def of(group: str) -> Iterator[str]:
        for line in systemd("syscall-filter", group).stdout.splitlines():
            word = line.strip()
            if word.startswith("@") and word != group:
                yield from of(word)
            elif re.fullmatch(r"[a-z0-9_]+", word):
                yield word

    calls: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.+)$", UNIT.read_text(), re.M):
        names = {name for group in line.lstrip("~").split() for name in of(group)}
        calls = calls - names if line.startswith("~") else calls | names
    return calls


@pytest.mark.parametrize("major", [18])
def test_the_exporter_calls_nothing_that_the_unit_forbids(
    cluster: Cluster, major: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    watched = ("strace", "-D", "--follow-forks", "--quiet=all", f"--output={trace}")
    dsn = cluster.primary.conninfo(**PGVIGIL.login)
    with Exporter(
        environment={"PGVIGIL_DSN": dsn}, through=(*watched, sys.executable, "-c", PROTECTED)
    ) as exporter:
        page = exporter.scrape()
    assert page.value("pg_up") == 1
    assert page.failed() == set()
    called = set(re.findall(r"^(?:\d+ +)?([a-z0-9_]+)\(", trace.read_text(), re.M))
    assert {"socket", "epoll_wait"} <= called
    assert called - allowed() == set()
