"""Runs the matrix on the next PostgreSQL, and says what its views have otherwise than the last.

`python -m lab.next` takes the server from Debian's experimental suite. It is no part of the tests:
what a version that is not released yet breaks is news, and no fault.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import columns
from lab.cluster import prepare
from lab.postgres import MAJORS, Server

MAJOR = MAJORS[-1] + 1
CACHE = Path(__file__).resolve().parents[1] / ".cache" / f"postgres-{MAJOR}"

_LIBRARIES = (
    *("libc6", "libcap-ng0", "libcap2", "libaudit1", "libcom-err2", "libgcc-s1", "libicu78"),
    *("libgssapi-krb5-2", "libk5crypto3", "libkeyutils1", "libkrb5-3", "libkrb5support0"),
    *("libldap2", "liblz4-1", "libnuma1", "libpam0g", "libpcre2-8-0", "libsasl2-2", "libselinux1"),
    *("libssl3t64", "libstdc++6", "libsystemd0", "liburing2", "libuuid1", "libxml2-16"),
    *("libxslt1.1", "libxxhash0", "libzstd1", "zlib1g"),
)
"""What the server is linked with: sid's own, since it is built against a newer libc than ours."""

_PACKAGES = (
    f"postgresql-{MAJOR}/experimental",
    f"postgresql-client-{MAJOR}/experimental",
    "libpq5/experimental",
    *_LIBRARIES,
)


def fetch() -> Path:
    """Return the folder with the server's programs; raise RuntimeError when it cannot be had."""
    programs = CACHE / "usr/lib/postgresql" / str(MAJOR) / "bin"
    if (programs / "postgres").exists():
        return programs
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if not (shutil.which("apt-get") and sources.exists()):
        raise RuntimeError("this is not a Debian with apt")
    mirror = re.search(r"^URIs:\s*(\S+)", sources.read_text(), re.M)
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not mirror or not keys.exists():
        raise RuntimeError("apt's sources or keys are not where they were looked for")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        work.chmod(0o755)
        _download(work, f"URIs: {mirror[1]}\nSuites: sid experimental\nSigned-By: {keys}\n")
        unpacked = work / "unpacked"
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        shutil.rmtree(CACHE, ignore_errors=True)
        shutil.copytree(unpacked, CACHE, symlinks=True)
    _wrap(programs)
    return programs


def main() -> int:
    """Run the matrix; the exit code tells only whether there was a server to run it on."""
    try:
        programs = fetch()
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"PostgreSQL {MAJOR} cannot be had: {error}", file=sys.stderr)
        return 1
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    os.environ["PGVIGIL_TEST_SOURCES"] = "installed"
    with Server(MAJOR) as server:
        prepare(server)
        print(f"== what PostgreSQL {server.binaries.version} has otherwise than {MAJOR - 1} ==")
        for line in columns.differences(columns.snapshot(MAJOR - 1), columns.of(server)):
            print(f"  {line}")
    print(f"== the matrix on PostgreSQL {MAJOR} ==", flush=True)
    matrix = ("tests/live/test_catalogue.py", "-q", "-k", "every_", *sys.argv[1:])
    subprocess.run(
        [sys.executable, "-m", "pytest", *matrix],
        env={**os.environ, "PGVIGIL_TEST_MAJORS": str(MAJOR)},
    )
    return 0


def _download(work: Path, suites: str) -> None:
    """Fetch the packages with apt's own lists and state kept apart from the system's."""
    for part in ("lists/partial", "cache/archives/partial", "sources", "preferences"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources" / "suites.sources").write_text(f"Types: deb\nComponents: main\n{suites}")
    (work / "apt.conf").write_text(
        'Dir::Etc::sourcelist "/dev/null";\n'
        f'Dir::Etc::sourceparts "{work}/sources";\n'
        f'Dir::Etc::preferencesparts "{work}/preferences";\n'
        f'Dir::State::lists "{work}/lists";\nDir::State::status "{work}/status";\n'
        f'Dir::Cache "{work}/cache";\nAPT::Sandbox::User "root";\n'
    )
    environment = {**os.environ, "APT_CONFIG": f"{work}/apt.conf"}
    for command in (["update", "-qq"], ["download", "-qq", *_PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]}: {done.stderr.strip()[-300:]}")


def _wrap(programs: Path) -> None:
    """Put a script in each program's place that runs it with its own libc and libraries.

    Under its own name, by which PostgreSQL finds what belongs to it.
    """
    libraries = CACHE / "usr/lib/x86_64-linux-gnu"
    wrapped = programs.with_name("wrapped")
    programs.rename(wrapped)
    programs.mkdir()
    for program in wrapped.iterdir():
        script = programs / program.name
        script.write_text(
            f"#!/bin/sh\nexec {libraries}/ld-linux-x86-64.so.2 --library-path {libraries} "
            f'--argv0 {script} {program} "$@"\n'
        )
        script.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
