"""Ask Barman for the backups of its servers, and for what it checks of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pgvigil.command import Command, Part, Row, Version, Words, document
from pgvigil.errors import QueryFailed

_JSON = ("--format", "json")
_VERSION = ("--version",)
_LIST = ("list-backups", "all")
_CHECK = ("check", "all")
_SHOW = ("show-backup",)
_VERSIONS = re.compile(r"(\d+)\.(\d+)\S* Barman by EnterpriseDB\b")
_SAID = ("_DEBUG", "_INFO", "_WARNING", "_ERROR", "_EXCEPTION")
"""The keys of an answer that are no servers, but what Barman says besides."""


class Barman(Command):
    """Barman's command: one run tells all backups, one what it checks, one how a backup went."""

    kind: ClassVar[str] = "barman"
    name: ClassVar[str] = "Barman"
    version_words: ClassVar[Words] = _VERSION

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__(command)
        self._shown: Mapping[tuple[str, str], Any] = {}
        """By server and backup, what is known of the newest: it does not change any more."""

    @classmethod
    def version(cls, told: str) -> Version | None:
        """Which one it is."""
        if not (found := _VERSIONS.match(told)):
            return None
        number = int(found[1]) * 10000 + int(found[2])
        return Version(f"Barman {found[0].partition(' ')[0]}", number)

    def line(self, words: Words) -> Sequence[str]:
        """The whole command."""
        return [*self._command, *(() if words == _VERSION else _JSON), *words]

    def answer(self, words: Words, code: int, told: bytes) -> Any:
        """What it tells by server."""
        answer = document(told)
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
        servers = {name: of for name, of in answer.items() if name not in _SAID}
        # It ends with 1 when a check of one server fails, which is an answer all the same.
        if code and (words != _CHECK or not servers):
            said = answer.get("_EXCEPTION") or answer.get("_ERROR")
            raise ValueError(str(said[0]) if isinstance(said, list) else "no reason given")
        return servers

    async def _fetch(self, words: Words) -> Any:
        if words != _SHOW:
            return await super()._fetch(words)
        known = {}
        for server, backups in (await self._have(_LIST)).items():
            newest = _newest(backups)
            if newest is None or server.startswith("-"):
                continue
            key = server, newest["backup_id"]
            if (found := self._shown.get(key)) is None:
                # One that was deleted meanwhile costs nobody else's.
                try:
                    found = (await super()._fetch((*_SHOW, *key))).get(server)
                except QueryFailed:
                    continue
            known[key] = found
        self._shown = known
        return {server: of for (server, _), of in known.items()}


def _ended(backup: Any) -> int:
    return int(backup["end_time_timestamp"])


def _newest(backups: Any) -> Any:
    """Of those that can be restored: one that still waits for WAL cannot."""
    return max((b for b in backups if b["status"] == "DONE"), key=_ended, default=None)


def _servers(answer: Mapping[str, Any]) -> Iterator[Row]:
    for server, backups in answer.items():
        statuses = [backup["status"] for backup in backups]
        yield {
            "server": server,
            "done": statuses.count("DONE"),
            "waiting": statuses.count("WAITING_FOR_WALS"),
            "failed": statuses.count("FAILED"),
        }


def _backups(answer: Mapping[str, Any]) -> Iterator[Row]:
    for server, backups in answer.items():
        groups: dict[str, list[Any]] = {}
        for backup in backups:
            if backup["status"] == "DONE":
                groups.setdefault(backup.get("backup_type", ""), []).append(backup)
        for kind, done in groups.items():
            newest = max(done, key=_ended)
            yield {
                "server": server,
                "type": kind,
                "backups": len(done),
                "newest": _ended(newest),
                "oldest": min(map(_ended, done)),
                "size": newest.get("size_bytes"),
                "wal_size": newest.get("wal_size_bytes"),
            }


def _runs(answer: Mapping[str, Any]) -> Iterator[Row]:
    for server, backup in answer.items():
        run = backup["base_backup_information"]
        yield {
            "server": server,
            "duration": int(run["end_time_timestamp"]) - int(run["begin_time_timestamp"]),
        }


def _checks(answer: Mapping[str, Any]) -> Iterator[Row]:
    for server, checks in answer.items():
        for check, result in checks.items():
            yield {"server": server, "check": check, "ok": int(result["status"] == "OK")}


Barman.parts = {
    "servers": Part(_LIST, ("server", "done", "waiting", "failed"), _servers),
    "backups": Part(
        _LIST, ("server", "type", "backups", "newest", "oldest", "size", "wal_size"), _backups
    ),
    "runs": Part(_SHOW, ("server", "duration"), _runs),
    "checks": Part(_CHECK, ("server", "check", "ok"), _checks),
}
