"""Strains the machine that we run on, in ways that others on it hardly feel."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")

_MEGABYTE = 1 << 20


@contextlib.contextmanager
def modest() -> Iterator[Callable[[int], None]]:
    """Processes that are named to it by their ids want processors, and get what others leave.

    They must be about to end when it ends. Raises OSError where we may make no control group.
    """
    first = (_GROUPS / "cpu").is_dir()
    group = _GROUPS / ("cpu/pgvigil-modest" if first else "pgvigil-modest")
    group.mkdir()
    try:
        (group / ("cpu.shares" if first else "cpu.weight")).write_text("2")

        def restrain(pid: int) -> None:
            (group / "cgroup.procs").write_text(str(pid))

        yield restrain
    finally:
        end = time.monotonic() + 30
        while (group / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        group.rmdir()


@contextlib.contextmanager
def memory_taken(size: int) -> Iterator[None]:
    """Somebody holds so many bytes."""
    held = b"x" * size
    yield
    del held


def memory_available() -> tuple[int, int]:
    """The bytes that programs could still get, and those that there are."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {name: int(words.split()[0]) * 1024 for name, words in (x.split(":") for x in lines)}
    return sizes["MemAvailable"], sizes["MemTotal"]


def have_one_killed() -> None:
    """Let the kernel kill a process of ours that takes more memory than it may.

    Raises OSError where we may make no control group, RuntimeError when nobody was killed.
    """
    first = (_GROUPS / "memory").is_dir()
    group = _GROUPS / ("memory/pgvigil-lab" if first else "pgvigil-lab")
    group.mkdir()
    try:
        limit = "memory.limit_in_bytes" if first else "memory.max"
        (group / limit).write_text(str(32 * _MEGABYTE))
        take = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()));"
        take += f" held = b'x' * {256 * _MEGABYTE}"
        done = subprocess.run([sys.executable, "-c", take], capture_output=True, timeout=60)
        if done.returncode != -9:
            raise RuntimeError(f"nobody was killed: {done.returncode} {done.stderr.decode()}")
    finally:
        group.rmdir()
