"""Ask pgBackRest for what its repositories have, by running its command."""

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from pgvigil.certificate import Peer
from pgvigil.config import Target
from pgvigil.errors import Down, QueryFailed, Unreachable, printable
from pgvigil.plan import Facts, Wanted
from pgvigil.source import NO_ANSWERS, Answers, Ask, Table
from pgvigil.surroundings import environment

_QUIET = ("--log-level-console=off", "--log-level-file=off")
_MOST = 64 << 20
"""Bytes of an answer that are read."""
_MOST_WORDS = 4096
"""Bytes of a complaint that are read."""
_FRESH = 5.0
"""Seconds for which an answer serves all that is asked of it."""
_SEGMENT = 16 << 20
"""Bytes of a WAL file, unless initdb was told otherwise; an archive does not say."""

Row = Mapping[str, object]


class Repository:
    """pgBackRest's command, which is run anew for each round of questions, never twice at once."""

    def __init__(self, command: Sequence[str], facts: Facts) -> None:
        self.opened = time.monotonic()
        self._command = command
        self._facts = facts
        self._answer: list[Any] = []
        self._answered = float("-inf")
        self._running: asyncio.subprocess.Process | None = None
        self._closed = False

    @classmethod
    async def open(cls, target: Target, wanted: Wanted, deadline: float) -> Self:  # noqa: ARG003
        """One whose command answers, or Unreachable with the reason; done before `deadline`."""
        command = target.command or ("pgbackrest",)
        facts = Facts(
            version=0,
            in_recovery=False,
            user="",
            database="",
            kind="pgbackrest",
            columns={word: frozenset(columns) for word, (columns, _) in _TABLES.items()},
        )
        made = cls(command, facts)
        try:
            async with asyncio.timeout_at(deadline):
                code, told, complaint = await made._run("version")
        except TimeoutError:
            raise Unreachable(Down.TIMEOUT, f"{command[0]} version did not end in time") from None
        except OSError as error:
            raise Unreachable(
                Down.OTHER, f"{command[0]} cannot be run: {error.strerror}; mind command"
            ) from None
        version = re.fullmatch(r"pgBackRest (\d+)\.(\d+)\S*", told.decode(errors="replace").strip())
        if code or not version:
            raise Unreachable(
                Down.WRONG_KIND,
                f"{command[0]} version ended with {code}: {complaint or 'it is no pgBackRest'}",
            )
        made._facts = Facts(
            version=int(version[1]) * 10000 + int(version[2]),
            in_recovery=False,
            user="",
            database="",
            kind="pgbackrest",
            product=version[0],
            columns=facts.columns,
        )
        return made

    @property
    def closed(self) -> bool:
        """Whether it is of no further use."""
        return self._closed

    @property
    def known(self) -> bool:
        """Its facts are told when it is opened."""
        return True

    @property
    def tls(self) -> bool:
        """There is no connection."""
        return False

    @property
    def peer(self) -> Peer | None:
        """Nobody shows a certificate."""
        return None

    async def facts(self, deadline: float) -> Facts:
        """The facts alone."""
        return await self.ask((), NO_ANSWERS, deadline)

    async def ask(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> Facts:
        """Run `info` once for all that is asked; raises TimeoutError at `deadline`."""
        begun = time.perf_counter()
        failure = None
        if asks:
            seconds = min(ask.timeout for ask in asks)
            try:
                async with asyncio.timeout_at(deadline):
                    failure = await self._learn(seconds)
            except BaseException:
                self.close()
                raise
        for position, ask in enumerate(asks):
            if failure is None:
                columns, rows = _TABLES[ask.text.removeprefix("info ")]
                failing = None
                try:
                    table = [[row.get(name) for name in columns] for row in rows(self._answer)]
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    failing = QueryFailed("shape", f"info has another shape than known: {error!r}")
                else:
                    answers.rows(position, Table(columns, table))  # type: ignore[arg-type]
            else:
                failing = failure
            answers.end(position, failing, time.perf_counter() - begun)
            begun = time.perf_counter()
        return self._facts

    def still_there(self) -> bool:
        """Whether it can be asked."""
        return not self._closed

    def close(self) -> None:
        """End it, with the command that may run."""
        self._closed = True
        if self._running is not None:
            _kill(self._running)

    abandon = close
    cut = close

    async def _learn(self, seconds: float) -> QueryFailed | None:
        """Have the answer of `info`, unless it is fresh; what is wrong with it."""
        if time.monotonic() - self._answered < _FRESH:
            return None
        try:
            async with asyncio.timeout(seconds):
                code, told, complaint = await self._run("info", "--output=json")
        except TimeoutError:
            return QueryFailed("timeout", f"info did not end within {seconds:g} s and was killed")
        except OSError as error:
            return QueryFailed("command", f"it cannot be run: {error.strerror}")
        if len(told) > _MOST:
            return QueryFailed("size", f"info answered with more than {_MOST >> 20} MB")
        try:
            answer = json.loads(told) if code == 0 else None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, list):
            return QueryFailed("command", f"info ended with {code}: {complaint or 'no JSON'}")
        self._answer, self._answered = answer, time.monotonic()
        return None

    async def _run(self, *words: str) -> tuple[int, bytes, str]:
        """The exit code, what it answered and what it complained of; killed when we are left."""
        command = [*self._command, *_QUIET]
        if words == ("version",):  # which takes no options, not even those that all others take
            while command[1:] and command[-1].startswith("--"):
                command.pop()
        process = await asyncio.create_subprocess_exec(
            *(*command, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._running = process
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            told, complaint = await asyncio.gather(
                _read(process.stdout, _MOST + 1), _read(process.stderr, _MOST_WORDS)
            )
            if len(told) > _MOST:
                return 0, told, ""
            code = await process.wait()
        finally:
            self._running = None
            _kill(process)
        lines = [line for line in complaint.decode(errors="replace").splitlines() if line.strip()]
        first = next((line for line in lines if "ERROR" in line), lines[0] if lines else "")
        return code, told, printable(" ".join(first.split()))


async def _read(stream: asyncio.StreamReader, most: int) -> bytes:
    """What comes, up to a bound; what is above it is left."""
    found = bytearray()
    while len(found) < most and (chunk := await stream.read(min(65536, most - len(found)))):
        found += chunk
    return bytes(found)


def _kill(process: asyncio.subprocess.Process) -> None:
    """End it and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


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
                if found := re.fullmatch(
                    r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})", archive[end] or ""
                ):
                    timeline, log, part = (int(word, 16) for word in found.groups())
                    row[f"{end}_timeline"] = timeline
                    row[f"{end}_lsn"] = (log << 32) + part * _SEGMENT
            yield row


def _stopped(backup: Any) -> int:
    return int(backup["timestamp"]["stop"])


_TABLES: Mapping[str, tuple[Sequence[str], Callable[[Sequence[Any]], Iterator[Row]]]] = {
    "stanzas": (("stanza", "status", "held", "size", "complete"), _stanzas),
    "repositories": (("stanza", "repo", "status", "encrypted"), _repositories),
    "backups": (
        (
            *("stanza", "repo", "type", "backups", "erroneous", "newest", "oldest", "duration"),
            *("size", "delta", "repository_size", "repository_delta"),
        ),
        _backups,
    ),
    "archives": (
        ("stanza", "repo", "min_timeline", "max_timeline", "min_lsn", "max_lsn"),
        _archives,
    ),
}
"""What the word of a query is answered with: columns, and rows of what `info` has answered."""
