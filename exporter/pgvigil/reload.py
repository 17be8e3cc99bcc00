"""Read configuration and catalogue anew while everything runs, and take them if they are good."""

import asyncio
import contextlib
import glob
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from pgvigil.catalogue import Query
from pgvigil.config import Settings
from pgvigil.errors import Problem, Refused
from pgvigil.fleet import Fleet

LOOK = 30.0
"""Seconds between two looks at whether a file has changed."""

Loaded = tuple[Settings, tuple[Query, ...]]
State = tuple[tuple[str, int, int, int], ...]
"""Of each file: its path, inode, size and when it was changed."""

_log = structlog.get_logger()


class Reloader:
    """Has the configuration read, and the fleet take it; what is bad leaves all as it is."""

    def __init__(
        self, read: Callable[[], Awaitable[Loaded]], fleet: Fleet, settings: Settings
    ) -> None:
        """`read` raises Refused; `settings` are those in force."""
        self._read = read
        self._fleet = fleet
        self._settings = settings
        self._one = asyncio.Lock()
        self._next: asyncio.Task[Sequence[Problem]] | None = None
        self._running: set[asyncio.Task[Sequence[Problem]]] = set()

    def begin(self) -> "asyncio.Task[Sequence[Problem]]":
        """A reload that reads what stands in the files now; it ends with the problems.

        There is one at a time, and one that waits for it, which does for all who come meanwhile.
        """
        if self._next is None:
            task = self._next = asyncio.get_running_loop().create_task(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return self._next

    async def watch(self, *, always: bool, every: float = LOOK) -> None:
        """Begin a reload whenever a file has changed; for ever.

        Unless it is `always` so, only while the configuration has targets discovered in files.
        """
        known = self._state()
        while True:
            await asyncio.sleep(every)
            if not always and not self._settings.patterns:
                continue
            if (state := self._state()) != known:
                known = state
                await asyncio.shield(self.begin())

    async def close(self) -> None:
        """End what runs."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self) -> Sequence[Problem]:
        async with self._one:
            self._next = None
            try:
                settings, queries = await self._read()
            except Refused as error:
                self._fleet.reloaded = False
                for problem in error.problems:
                    _log.error("the configuration is not taken", problem=str(problem))
                return error.problems
            if settings.listen != self._settings.listen:
                _log.warning(
                    "listen is not changed by a reload; start anew for it",
                    address=str(self._settings.listen),
                    wanted=str(settings.listen),
                )
                settings = replace(settings, listen=self._settings.listen)
            self._settings = settings
            self._fleet.adopt(settings, queries)
            self._fleet.reloaded = True
            _log.info("reloaded", targets=len(settings.targets), queries=len(queries))
            return ()

    def _state(self) -> State:
        """What the files of the configuration look like now."""
        paths = {*self._settings.files, *self._settings.catalogue}
        for folder in self._settings.catalogue:
            with contextlib.suppress(OSError):  # it is a file, or is gone
                paths.update(folder.iterdir())
        for pattern in self._settings.patterns:
            paths.update(map(Path, glob.glob(pattern)))
        return tuple(sorted(_look(path) for path in paths))


def _look(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()  # of what a link leads to, which is how ConfigMaps change
    except OSError:
        return str(path), 0, 0, 0
    return str(path), found.st_ino, found.st_size, found.st_mtime_ns
