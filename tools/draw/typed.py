"""Holds dashboards against the types that Grafana has of them: `python -m tools.draw.typed`."""

import fcntl
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab import debian, grafana

MODEL = Path(__file__).parent / "model"
HEAD = "import type {Board} from './board'; export const board: Board = "
"""Stands before the JSON in its first line, so that lines keep their numbers."""


def faults(dashboards: Sequence[Path]) -> list[str]:
    """What of them the types forbid, each with file and line.

    Raises RuntimeError where the compiler or the types cannot be had.
    """
    place = _installed()
    with tempfile.TemporaryDirectory(dir=place) as directory:
        for name in ("board.ts", "tsconfig.json"):
            shutil.copy(MODEL / name, directory)
        for file in dashboards:
            Path(directory, f"{file.stem}.ts").write_text(HEAD + file.read_text())
        compiler = place / "node_modules" / "typescript" / "bin" / "tsc"
        done = subprocess.run(
            ["node", compiler, "--pretty", "false"], cwd=directory, capture_output=True, text=True
        )
    found = re.findall(r"^(\S+)\.ts\((\d+),\d+\): error \w+: (.*)$", done.stdout, re.M)
    if done.returncode and not found:
        raise RuntimeError(f"tsc: {(done.stdout + done.stderr)[-1000:]}")
    return [f"{name}.json:{line}: {what}" for name, line, what in found]


def _installed() -> Path:
    """The folder with what `model/package-lock.json` pins, installed the first time."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise RuntimeError("npm is not installed")
    place = debian.cache() / "grafana-model"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (MODEL / "package-lock.json").read_bytes()
        installed = place / "installed.json"
        if not (installed.exists() and installed.read_bytes() == wanted):
            for name in ("package.json", "package-lock.json"):
                shutil.copy(MODEL / name, place)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"npm ci: {done.stderr.strip()[-300:]}")
            installed.write_bytes(wanted)
    return place


def main() -> int:
    """Tell the faults of all; the exit code tells whether there are any."""
    found = faults(grafana.files())
    print("\n".join(found) or "every dashboard is what Grafana's types allow")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
