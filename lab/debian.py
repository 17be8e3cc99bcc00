"""Fetches programs from any suite of Debian into .cache, beside what is installed.

It asks for no root and no chroot: the programs run with the suite's own libc and libraries.
"""

import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

CACHE = (Path(__file__).resolve().parents[1] / ".cache").resolve()

_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_FOLLOWED = re.compile(r"lib(?!gdal|sfcgal|elogind)|zlib|postgresql-(client-)?\d")
"""Which dependencies are fetched: what programs are linked with, not what packages are set up by.

GDAL and SFCGAL bring most of what PostGIS asks for, and only its extensions for rasters and solids
load them. elogind's library takes the place of systemd's, which is there.
"""

_TIMEOUT_SECONDS = 300

SERVER = "usr/lib/postgresql/*/bin"
"""Where a package has the programs of a PostgreSQL server."""


def fetch(
    name: str, suites: Sequence[str], packages: Sequence[str], programs: str = SERVER
) -> Path:
    """Return the folder with the programs, kept in .cache under a name.

    The packages, which may say `package/suite`, bring the libraries they depend on; `programs` is
    the one folder of theirs whose programs shall run. Raises RuntimeError when this is not a Debian
    with apt and its keys, or something cannot be fetched.
    """
    place = cache()
    tree = place / name
    wanted = f"{' '.join(suites)}: {' '.join(packages)}: {programs}\n"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made_of = tree / "packages"
        if not (made_of.exists() and made_of.read_text() == wanted):
            with tempfile.TemporaryDirectory(dir=place, prefix=f"{name}-") as directory:
                work = Path(directory)
                _download(work, suites, packages)
                unpacked = work / "unpacked"
                for package in sorted(work.glob("*.deb")):
                    _run(["dpkg-deb", "-x", str(package), str(unpacked)], work)
                _set_up(unpacked, tree, programs)
                (unpacked / "packages").write_text(wanted)
                shutil.rmtree(tree, ignore_errors=True)
                unpacked.rename(tree)
    return next(tree.glob(programs))


def mirror() -> str:
    """The address of the archive that this machine's apt asks; RuntimeError where there is none."""
    if not (shutil.which("apt-get") and _SOURCES.exists()):
        raise RuntimeError("this is not a Debian with apt")
    found = re.search(r"^URIs:\s*(\S+)", _SOURCES.read_text(), re.M)
    if not found or not _KEYS.exists():
        raise RuntimeError("apt's sources or keys are not where they were looked for")
    return found[1]


def cache() -> Path:
    """The checkout's .cache, or a folder of ours where temporary files go.

    Servers that root starts run as another account, which may not look into every checkout; and
    what is unpacked knows its own place, so that it cannot be copied for them.
    """
    if all(folder.stat().st_mode & stat.S_IXOTH for folder in CACHE.parents):
        CACHE.mkdir(exist_ok=True)
        return CACHE
    place = Path(tempfile.gettempdir()) / f"pgvigil-{os.getuid()}"
    place.mkdir(mode=0o755, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise RuntimeError(f"{place} belongs to somebody else")
    return place


def _download(work: Path, suites: Sequence[str], packages: Sequence[str]) -> None:
    """Fetch the packages with apt's own lists and state kept apart from the system's."""
    address = mirror()
    for part in ("lists/partial", "cache/archives/partial", "sources", "preferences"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources" / "suites.sources").write_text(
        f"Types: deb\nComponents: main\nURIs: {address}\nSuites: {' '.join(suites)}\n"
        f"Signed-By: {_KEYS}\n"
    )
    (work / "apt.conf").write_text(
        'Dir::Etc::sourcelist "/dev/null";\n'
        f'Dir::Etc::sourceparts "{work}/sources";\n'
        f'Dir::Etc::preferencesparts "{work}/preferences";\n'
        f'Dir::State::lists "{work}/lists";\nDir::State::status "{work}/status";\n'
        f'Dir::Cache "{work}/cache";\nAPT::Sandbox::User "root";\n'
        'Acquire::Languages "none";\nAcquire::Retries "3";\n'
    )
    _run(["apt-get", "update", "-qq"], work)
    _run(["apt-get", "download", "-qq", *_with_libraries(work, packages)], work)


def _with_libraries(work: Path, packages: Sequence[str]) -> list[str]:
    """Return the packages and, directly or not, the libraries they depend on."""
    needs: dict[str, list[str]] = {}
    needed: list[str] = []
    # A package's name, below it what it depends on; below a name in <>, who provides it.
    told = _run(["apt-cache", "depends", "--recurse", "--important", *packages], work)
    for line in told.splitlines():
        if not line.startswith((" ", "|")):
            needed = needs.setdefault(line, [])
        elif match := re.fullmatch(r"[ |]+(?:(?:Pre)?Depends: )?([^<\s]\S*)", line):
            needed.append(match[1])
    found = {package.partition("/")[0]: package for package in packages}
    waiting = list(found)
    while waiting:
        for name in needs.get(waiting.pop(), []):
            if name not in found and _FOLLOWED.match(name):
                found[name] = name
                waiting.append(name)
    return sorted(found.values())


def _set_up(unpacked: Path, tree: Path, programs: str) -> None:
    """Do what the packages' scripts would, and make the programs run from where they will lie.

    A script in each program's place runs it with its own libc and libraries, under its own name,
    by which PostgreSQL finds what belongs to it. What is no program for the loader, such as a
    script, stays in its place.
    """
    if (old := unpacked / "lib").is_dir():  # before trixie some libraries still went there
        shutil.copytree(old, unpacked / "usr" / "lib", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(old)
    for control in unpacked.glob("usr/share/postgresql/*/extension/postgis*-3.control"):
        control.with_name(control.name.replace("-3.", ".")).symlink_to(control.name)
    loader = next(unpacked.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*"))
    libraries = tree / loader.parent.relative_to(unpacked)
    folder = next(unpacked.glob(programs))
    wrapped = folder.rename(folder.with_name("wrapped"))
    folder.mkdir()
    for program in list(wrapped.iterdir()):
        script = folder / program.name
        if program.is_symlink() or program.read_bytes()[:4] != b"\x7fELF":
            program.rename(script)
            continue
        script.write_text(
            f"#!/bin/sh\nexec {libraries / loader.name} --library-path {libraries} "
            f"--argv0 {tree / script.relative_to(unpacked)} "
            f'{tree / program.relative_to(unpacked)} "$@"\n'
        )
        script.chmod(0o755)


def _run(command: Sequence[str], work: Path) -> str:
    """Return what a command printed; raise RuntimeError with its complaint when it failed."""
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env={**os.environ, "LC_ALL": "C", "APT_CONFIG": f"{work}/apt.conf"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took more than {_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: {done.stderr.strip()[-300:]}")
    return done.stdout
