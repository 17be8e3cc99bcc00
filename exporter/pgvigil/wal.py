"""Know WAL files by their names, and which of them an archive has."""

import os
import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pgvigil.errors import DrillFailed

SIZE = 16 << 20
"""Bytes of a WAL file, unless initdb was told otherwise; an archive does not say."""

_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(\.gz)?")


class Segment(NamedTuple):
    """One WAL file."""

    timeline: int
    log: int
    part: int

    def begin(self, size: int) -> int:
        """Its first byte's position, with files of this size."""
        return (self.log << 32) + self.part * size

    def __str__(self) -> str:
        return f"{self.timeline:08X}{self.log:08X}{self.part:08X}"


def segment(name: str) -> Segment | None:
    """The WAL file of a name, packed with gzip or not; None when it is none."""
    found = _NAME.fullmatch(name)
    return Segment(*(int(part, 16) for part in found.groups()[:3])) if found else None


def at(timeline: int, position: int, size: int) -> Segment:
    """The WAL file that has the byte before a position."""
    log, offset = divmod(position - 1, 1 << 32)
    return Segment(timeline, log, offset // size)


def archived(archive: Path) -> Iterator[Segment]:
    """The WAL files of an archive; raises DrillFailed when it cannot be read.

    A server's own pg_wal has files of the future, whose content is of the past: those are left out.
    """
    try:
        names = os.listdir(archive)
    except OSError as error:
        raise DrillFailed(f"{archive}: {error.strerror}") from None
    for name in names:
        if (found := segment(name)) and (name.endswith(".gz") or _filled(archive / name, found)):
            yield found


def _filled(path: Path, found: Segment) -> bool:
    """Whether the first page is the one that the name promises (XLogPageHeaderData)."""
    try:
        with path.open("rb") as file:
            (position,) = struct.unpack("=8xQ", file.read(16))
            size = os.fstat(file.fileno()).st_size
    except (OSError, struct.error):
        return True  # it is there, and PostgreSQL shall say what is wrong with it
    return bool(position == found.begin(size))


def restore_command(archive: Path, script: Path) -> str:
    """Write a script that brings one file from an archive, and say how PostgreSQL calls it."""
    place = shlex.quote(str(archive.resolve()))
    script.write_text(
        "#!/bin/sh\n"
        f"archive={place}\n"
        'if [ -f "$archive/$1" ]; then exec cp -- "$archive/$1" "$2"; fi\n'
        'if [ -f "$archive/$1.gz" ]; then exec gzip -dc -- "$archive/$1.gz" >"$2"; fi\n'
        "exit 1\n"
    )
    script.chmod(0o700)
    return f"{shlex.quote(str(script)).replace('%', '%%')} %f %p"
