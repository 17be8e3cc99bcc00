"""Ask pgBackRest for what its repositories have."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pgvigil import wal
from pgvigil.command import Command, Part, Row, Version, Words, document

_QUIET = ("--log-level-console=off", "--log-level-file=off")
_VERSION = ("version",)
_INFO = ("info", "--output=json")
_VERSIONS = re.compile(r"pgBackRest (\d+)\.(\d+)\S*")


class Repository(Command):
    """pgBackRest's command: `info` answers all that is asked."""

    kind: ClassVar[str] = "pgbackrest"
    name: ClassVar[str] = "pgBackRest"
    version_words: ClassVar[Words] = _VERSION

    @classmethod
    def version(cls, told: str) -> Version | None:
        """Which one it is."""
        found = _VERSIONS.fullmatch(told)
        return Version(found[0], int(found[1]) * 10000 + int(found[2])) if found else None

    def line(self, words: Words) -> Sequence[str]:
        """The whole command, quiet but for its answer."""
        command = [*self._command, *_QUIET]
        if words == _VERSION:  # which takes no options, not even those that all others take
            while command[1:] and command[-1].startswith("--"):
                command.pop()
        return [*command, *words]

    def answer(self, words: Words, code: int, told: bytes) -> Any:  # noqa: ARG002
        """The stanzas."""
        answer = document(told) if code == 0 else None
        if not isinstance(answer, list):
            raise ValueError("no JSON")
        return answer


def _stanzas(answer: Sequence[Any]) -> Iterator[Row]:
    for stanza in answer:
        status = stanza["status"]
        lock = status.get("lock", {}).get("backup", {})
        yield {
            "stanza": stanza["name"],
            "status": status["code"],
            "held": int(bool(lock.get("held"))),
            "size": lock.get("size"),
            "complete": lock.get("size-cplt"),
        }


def _repositories(answer: Sequence[Any]) -> Iterator[Row]:
    for stanza in answer:
        for repo in stanza.get("repo", ()):
            yield {
                "stanza": stanza["name"],
                "repo": repo["key"],
                "status": repo["status"]["code"],
                "encrypted": int(repo.get("cipher", "none") != "none"),
            }


def _backups(answer: Sequence[Any]) -> Iterator[Row]:
    for stanza in answer:
        groups: dict[tuple[int, str], list[Any]] = {}
        for backup in stanza.get("backup", ()):
            key = backup["database"].get("repo-key", 1), backup["type"]
            groups.setdefault(key, []).append(backup)
        for (repo, kind), backups in groups.items():
            good = [backup for backup in backups if not backup.get("error")]
            newest = max(good, key=_stopped, default=None)
            row = {
                "stanza": stanza["name"],
                "repo": repo,
                "type": kind,
                "backups": len(backups),
                "erroneous": len(backups) - len(good),
            }
            if newest is not None:
                size = newest["info"]
                row |= {
                    "newest": _stopped(newest),
                    "oldest": min(map(_stopped, good)),
                    "duration": _stopped(newest) - newest["timestamp"]["start"],
                    "size": size.get("size"),
                    "delta": size.get("delta"),
                    "repository_size": size.get("repository", {}).get("size"),
                    "repository_delta": size.get("repository", {}).get("delta"),
                }
            yield row


def _archives(answer: Sequence[Any]) -> Iterator[Row]:
    for stanza in answer:
        newest: dict[int, Any] = {}
        for archive in stanza.get("archive", ()):
            repo = archive["database"].get("repo-key", 1)
            known = newest.get(repo)
            # After an upgrade there is one of each version: the newest has the highest number.
            if known is None or known["database"]["id"] < archive["database"]["id"]:
                newest[repo] = archive
        for repo, archive in newest.items():
            row: dict[str, object] = {"stanza": stanza["name"], "repo": repo}
            for end in ("min", "max"):
                if found := wal.segment(archive[end] or ""):
                    row[f"{end}_timeline"] = found.timeline
                    row[f"{end}_lsn"] = found.begin(wal.SIZE)
            yield row


def _stopped(backup: Any) -> int:
    return int(backup["timestamp"]["stop"])


Repository.parts = {
    "stanzas": Part(_INFO, ("stanza", "status", "held", "size", "complete"), _stanzas),
    "repositories": Part(_INFO, ("stanza", "repo", "status", "encrypted"), _repositories),
    "backups": Part(
        _INFO,
        (
            *("stanza", "repo", "type", "backups", "erroneous", "newest", "oldest", "duration"),
            *("size", "delta", "repository_size", "repository_delta"),
        ),
        _backups,
    ),
    "archives": Part(
        _INFO, ("stanza", "repo", "min_timeline", "max_timeline", "min_lsn", "max_lsn"), _archives
    ),
}
