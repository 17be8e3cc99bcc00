"""Runs the matrix on the next PostgreSQL, and says what its views have otherwise than the last.

`python -m lab.next` takes the server from Debian's experimental suite. It is no part of the tests:
what a version that is not released yet breaks is news, and no fault.
"""

import os
import subprocess
import sys
from pathlib import Path

from lab import columns, debian
from lab.cluster import prepare
from lab.postgres import MAJORS, Server

MAJOR = MAJORS[-1] + 1


def fetch() -> Path:
    """Return the folder with the server's programs; raise RuntimeError when it cannot be had."""
    packages = (f"postgresql-{MAJOR}", f"postgresql-client-{MAJOR}", "libpq5")
    return debian.fetch(
        f"postgres-{MAJOR}",
        ("sid", "experimental"),
        [f"{package}/experimental" for package in packages],
    )


def main() -> int:
    """Run the matrix; the exit code tells only whether there was a server to run it on."""
    try:
        programs = fetch()
    except RuntimeError as error:
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


if __name__ == "__main__":
    sys.exit(main())
