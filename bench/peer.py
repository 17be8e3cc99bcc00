"""Builds the peers at the versions that are pinned here, or finds an installed one."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import golang

_MODULE = Path(__file__).parent / "peers"
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "peers"
_PACKAGE = "github.com/prometheus-community/postgres_exporter"
_INSTALLED = ("postgres_exporter", "prometheus-postgres-exporter")
_CRATE = "pg_exporter"
_CRATE_VERSION = "0.22.2"


@dataclass(frozen=True)
class Peer:
    """An exporter that can be run."""

    program: Path
    version: str
    source: str


def find() -> Peer | str:
    """Return the pinned peer, else an installed one, else the reason why there is none."""
    built = _build()
    if isinstance(built, Peer):
        return built
    for name in _INSTALLED:
        if place := shutil.which(name):
            return Peer(Path(place), _asked(place), f"{place} ({built})")
    return f"{built}, and neither {' nor '.join(_INSTALLED)} is on the PATH"


def _build() -> Peer | str:
    program = golang.built(_MODULE, _PACKAGE, "cmd/postgres_exporter")
    if isinstance(program, str):
        return program
    return Peer(program, golang.version(_MODULE, _PACKAGE), "built from peers/go.mod")


def find_pg_exporter() -> Peer | str:
    """Return nbari's pg_exporter at its pinned version, or the reason why there is none."""
    root = _CACHE / f"{_CRATE}-{_CRATE_VERSION}"
    program = root / "bin" / _CRATE
    if not program.exists():
        cargo = shutil.which("cargo")
        if cargo is None:
            return "Rust's cargo is not installed"
        print(f"building {_CRATE} {_CRATE_VERSION}, once; it takes minutes", flush=True)
        command = [cargo, "install", _CRATE, "--version", _CRATE_VERSION, "--root", str(root)]
        # A registry that holds back the newest releases may lack one of those it was locked to.
        for words in ([*command, "--locked"], command):
            result = subprocess.run(words, capture_output=True, text=True)
            if result.returncode == 0:
                break
        else:
            return f"cargo install failed: {result.stderr.strip()[-300:]}"
    return Peer(program, _CRATE_VERSION, "built from crates.io")


def _asked(program: str) -> str:
    """An installed program's word for its version; older ones print it to stderr."""
    answer = subprocess.run([program, "--version"], capture_output=True, text=True)
    found = re.search(r"version (\S+)", answer.stdout + answer.stderr)
    return found[1] if found else "unknown"
