"""Ask WAL-G for the backups and the WAL in its storage."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, ClassVar

from pgvigil import wal
from pgvigil.command import Command, Part, Row, Version, Words, document

_VERSION = ("--version",)
_BACKUPS = ("backup-list", "--detail", "--json")
_WAL = ("wal-show", "--detailed-json")
_VERSIONS = re.compile(r"wal-g version (v?(\d+)\.(\d+)\S*|\S+)\s.*\bPostgreSQL", re.S)


class WalG(Command):
    """WAL-G's command: one run tells the backups, one the WAL."""

    kind: ClassVar[str] = "wal-g"
    name: ClassVar[str] = "WAL-G for PostgreSQL"
    version_words: ClassVar[Words] = _VERSION

    @classmethod
    def version(cls, told: str) -> Version | None:
        """Which one it is; the builds for other databases are none."""
        if not (found := _VERSIONS.fullmatch(told)):
            return None
        return Version(f"WAL-G {found[1]}", int(found[2] or 0) * 10000 + int(found[3] or 0))

    def line(self, words: Words) -> Sequence[str]:
        """The whole command."""
        return [*self._command, *words]

    def answer(self, words: Words, code: int, told: bytes) -> Any:  # noqa: ARG002
        """The backups, or the timelines."""
        if code:
            raise ValueError("no reason given")
        if not told.strip():
            return []  # nothing at all is what it says of a storage without backups
        answer = document(told)
        if answer is None:
            return []
        if not isinstance(answer, list):
            raise ValueError("no JSON array")
        return answer


def _time(text: str) -> float:
    """Seconds since the epoch; Go writes up to nine digits after the second."""
    return datetime.fromisoformat(text).timestamp()


def _finished(backup: Any) -> float:
    return _time(backup["finish_time"])


def _storage(answer: Sequence[Any]) -> Iterator[Row]:
    yield {
        "backups": len(answer),
        "permanent": sum(bool(backup.get("is_permanent")) for backup in answer),
    }


def _backups(answer: Sequence[Any]) -> Iterator[Row]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for backup in answer:
        kind = "delta" if "_D_" in backup["backup_name"] else "full"
        groups.setdefault((backup.get("storage_name", ""), kind), []).append(backup)
    for (storage, kind), backups in groups.items():
        newest = max(backups, key=_finished)
        yield {
            "storage": storage,
            "type": kind,
            "backups": len(backups),
            "newest": _finished(newest),
            "oldest": min(map(_finished, backups)),
            "duration": _finished(newest) - _time(newest["start_time"]),
            # Older versions do not know the sizes, and the newer ones then say 0.
            "size": newest.get("uncompressed_size") or None,
            "compressed_size": newest.get("compressed_size") or None,
        }


def _timelines(answer: Sequence[Any]) -> Iterator[Row]:
    begun = [
        found
        for timeline in answer
        for backup in timeline.get("backups") or ()
        if (found := wal.segment(backup["wal_file_name"]))
    ]
    newest = max(begun, default=None)
    for timeline in answer:
        missing = [
            found for name in timeline["missing_segments"] or () if (found := wal.segment(name))
        ]
        row: dict[str, object] = {
            "timeline": timeline["id"],
            "segments": timeline["segments_count"],
            "missing": len(missing),
        }
        if newest is not None:
            row["lost"] = sum(found > newest for found in missing)
        for end, name in (("min", "start_segment"), ("max", "end_segment")):
            if found := wal.segment(timeline[name]):
                row[f"{end}_lsn"] = found.begin(wal.SIZE)
        yield row


WalG.parts = {
    "storage": Part(_BACKUPS, ("backups", "permanent"), _storage),
    "backups": Part(
        _BACKUPS,
        (
            *("storage", "type", "backups", "newest", "oldest", "duration"),
            *("size", "compressed_size"),
        ),
        _backups,
    ),
    "timelines": Part(
        _WAL, ("timeline", "segments", "missing", "lost", "min_lsn", "max_lsn"), _timelines
    ),
}
