"""Run a program bounded in size, without a shell, and leave nothing of it behind."""

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process, SubprocessStreamProtocol
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MOST_WORDS = 4096
"""Bytes of a complaint that are read."""


_FAREWELL = 1.0
"""Seconds that a program which was killed is waited for."""


class Ended(NamedTuple):
    """What came of a run."""

    code: int
    told: bytes
    """Its standard output, or one byte more than was to be read: then it was killed."""
    complaint: str
    """What it wrote to its standard error, as far as it was read."""


class Runner:
    """Runs a program again and again, never twice at once."""

    def __init__(self, most: int) -> None:
        """Of each answer, `most` bytes are read."""
        self._most = most
        self._process: Process | None = None

    async def run(self, line: Sequence[str], environment: Mapping[str, str]) -> Ended:
        """Run it to its end; killed when we are left. Raises OSError."""
        loop = asyncio.get_running_loop()
        # As create_subprocess_exec does, but with the transport at hand: only its close ends what
        # nobody reads any more.
        transport, protocol = await loop.subprocess_exec(
            lambda: SubprocessStreamProtocol(limit=65536, loop=loop),
            *line,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._process = process = Process(transport, protocol, loop)
        assert process.stdout is not None
        assert process.stderr is not None
        # What it complains of is read all the time: a full pipe would hold it up.
        complaining = asyncio.ensure_future(_read(process.stderr, _MOST_WORDS, drain=True))
        try:
            told = await _read(process.stdout, self._most + 1)
            if len(told) > self._most:
                return Ended(0, told, "")
            code = await process.wait()
            _kill(process)  # what it has left behind may hold the pipe open
            complaint = await complaining
        finally:
            self._process = None
            _kill(process)
            complaining.cancel()
            try:
                async with asyncio.timeout(_FAREWELL):
                    await process.wait()
            except TimeoutError:
                pass  # it is stuck in the kernel, and ends when it comes back
            finally:
                transport.close()
        return Ended(code, told, complaint.decode(errors="replace"))

    def kill(self) -> None:
        """End what runs, if anything does."""
        if self._process is not None:
            _kill(self._process)


async def _read(stream: asyncio.StreamReader, most: int, *, drain: bool = False) -> bytes:
    """What comes, up to a bound; what is above it is left, or thrown away until the end."""
    found = bytearray()
    while len(found) < most and (chunk := await stream.read(min(65536, most - len(found)))):
        found += chunk
    while drain and await stream.read(65536):
        pass
    return bytes(found)


def _kill(process: Process) -> None:
    """End it and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
