"""Builds programs of the Go world at the versions that a module of ours pins."""

import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "go"
_MISSING = "Go is not installed"


def version(module: Path, package: str) -> str:
    """The version of a package that a folder's go.mod pins; raises ValueError when it has none."""
    found = re.search(rf"^(?:require )?\s*{re.escape(package)} v(\S+)", _mod(module), re.M)
    if found is None:
        raise ValueError(f"{module / 'go.mod'} names no version of {package}")
    return found[1]


def built(module: Path, package: str, command: str) -> Path | str:
    """A program of a package, built once, or the reason why there is none.

    `command` is its folder within the package, of which the last name is the program's.
    """
    name = Path(command).name
    program = _CACHE / f"{name}-{version(module, package)}"
    if program.exists():
        return program
    go = _go()
    if go is None:
        return _MISSING
    _CACHE.mkdir(parents=True, exist_ok=True)
    with Path(f"{program}.lock").open("w") as lock:
        # Several processes run tests.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return program if program.exists() else _build(go, module, package, command, program)


def _build(go: str, module: Path, package: str, command: str, program: Path) -> Path | str:
    print(f"building {program.name}, once", flush=True)
    # As their own releases are built: without C, so that no compiler for it is needed.
    words = [go, "build", "-trimpath", "-buildvcs=false", "-o", str(program)]
    result = subprocess.run(
        [*words, f"{package}/{command}"],
        cwd=module,
        env={**os.environ, "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        return f"go build failed: {result.stderr.strip()[-300:]}"
    return program


def source(module: Path, package: str) -> Path | str:
    """The files of a package that a module requires, fetched once, or why they cannot be had."""
    go = _go()
    if go is None:
        return _MISSING
    result = subprocess.run(
        [go, "mod", "download", "-json", package], cwd=module, capture_output=True, text=True
    )
    told = json.loads(result.stdout or "{}")
    if result.returncode != 0 or "Dir" not in told:
        return f"go mod download failed: {told.get('Error') or result.stderr.strip()[-300:]}"
    return Path(told["Dir"])


def _go() -> str | None:
    return shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")


def _mod(module: Path) -> str:
    return (module / "go.mod").read_text()
