"""Installs programs of PyPI into .cache, as lab/pip/ pins them, beside what the tests run with."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lab import debian
from lab.binaries import account

_PINS = Path(__file__).parent / "pip"


def python() -> Path:
    """Return an interpreter that the servers' account may run: ours, or the system's."""
    user, group = account() if os.getuid() == 0 else (None, None)
    for path in (Path(sys.executable).resolve(), Path("/usr/bin/python3")):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                cwd="/",
                capture_output=True,
                timeout=60,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )
            if done.returncode == 0:
                return path
    raise RuntimeError("no Python 3.11 or newer is open to the servers' account")


def installed(name: str, interpreter: Path) -> Path:
    """Return the folder with what lab/pip/NAME.txt pins, installed now if it is the first time."""
    pins = _PINS / f"{name}.txt"
    place = debian.cache() / name
    wanted = f"{interpreter}\n{pins.read_text()}"
    with (place.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made_of = place / "pins"
        if not (made_of.exists() and made_of.read_text() == wanted):
            shutil.rmtree(place, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install"]
            command += ["--quiet", "--target", str(place), "--require-hashes", "--no-deps"]
            command += ["--requirement", str(pins)]
            command += ["--disable-pip-version-check", "--root-user-action=ignore"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(f"pip: {done.stderr.strip()[-300:]}")
            made_of.write_text(wanted)
    return place
