"""Builds programs of the Go world at the versions that a module of ours pins."""

import os
import re
import shutil
import subprocess
from pathlib import Path

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "go"


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
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        return "Go is not installed"
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


def _mod(module: Path) -> str:
    return (module / "go.mod").read_text()
