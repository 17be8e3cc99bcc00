"""Find PostgreSQL's own programs of one major version."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pgvigil.errors import DrillFailed
from pgvigil.scratch import Scratch

_SECONDS = 10


def find(major: int, told: Path | None, scratch: Scratch) -> Path:
    """The directory with `postgres` of a major version, the one told or where it is installed.

    Raises DrillFailed with what was found instead and the remedy.
    """
    seen = []
    for place in [told] if told else _places(major, scratch):
        said = _said(place / "postgres", "--version", scratch)
        if version := re.search(r"\(PostgreSQL\) ((\d+)[.\w]*)", said):
            if int(version[2]) == major:
                return place
            seen.append(f"{place} has {version[1]}")
    found = "; ".join(seen) or (f"there is no postgres in {told}" if told else "none was found")
    raise DrillFailed(
        f"the backup is of PostgreSQL {major}, and starts with no other version: {found}. Install "
        f"the server of that version (on Debian: apt install postgresql-{major}), or say where its "
        "programs are: --bin DIRECTORY"
    )


def _places(major: int, scratch: Scratch) -> Iterator[Path]:
    yield Path(f"/usr/lib/postgresql/{major}/bin")
    yield Path(f"/usr/pgsql-{major}/bin")
    if program := shutil.which("pg_config"):
        yield Path(_said(Path(program), "--bindir", scratch))
    if program := shutil.which("postgres"):
        yield Path(program).resolve().parent
    yield Path("/usr/local/pgsql/bin")


def _said(program: Path, option: str, scratch: Scratch) -> str:
    if not program.is_file():
        return ""
    return scratch.run([program.absolute(), option], time.monotonic() + _SECONDS)[1].strip()
