"""Asks an exporter for many pages at their moments, over kept connections, as Prometheus does."""

import asyncio
import gzip
import multiprocessing
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple, Self

from bench.exporters import HEADERS

TIMEOUT = 10.0
"""Seconds that Prometheus waits for a scrape when nobody says otherwise."""

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.I)
_LAST_CHUNK = b"0\r\n\r\n"


class Job(NamedTuple):
    """A page to ask for."""

    due: float
    """Seconds after the beginning."""
    path: str
    kind: str
    """Who asks."""


class Asked(NamedTuple):
    """What became of a job."""

    kind: str
    path: str
    late: float
    """Seconds from when it was due to its answer."""
    overslept: float
    """The part of it that passed before it was sent: ours, not the exporter's."""
    fault: str
    """Why the answer is no good; empty for a good one."""
    size: int
    """Bytes of the answer, as it came."""


class Askers:
    """They ask in a process of their own, so that their work is nobody's here."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        """Return them; their process ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def ask(self, jobs: Sequence[Job]) -> "Future[list[Asked]]":
        """Have all jobs done, from now on."""
        return self._process.submit(_ask, self._port, jobs)


def _ask(port: int, jobs: Sequence[Job]) -> list[Asked]:
    return asyncio.run(_ask_all(port, jobs))


async def _ask_all(port: int, jobs: Sequence[Job]) -> list[Asked]:
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    idle: list[_Connection] = []
    found: list[Asked] = []
    running: set[asyncio.Task[None]] = set()

    async def do(job: Job) -> None:
        overslept = time.perf_counter() - begun - job.due
        fault, answer = "", b""
        try:
            async with asyncio.timeout(TIMEOUT):
                # The one that was used last, so that there are no more than are needed.
                used = idle.pop() if idle else None
                connection = used or await _connected(port)
                try:
                    answer = await connection.ask(job.path)
                except ConnectionResetError:
                    if not used:
                        raise
                    # Both ends may let go of an idle one at the same moment; then Prometheus, too,
                    # asks again.
                    connection = await _connected(port)
                    answer = await connection.ask(job.path)
                idle.append(connection)
        except TimeoutError:
            fault = "no answer in time"
        except OSError as error:
            fault = repr(error)
        late = time.perf_counter() - begun - job.due
        fault = fault or _fault(answer, job)
        found.append(Asked(job.kind, job.path, late, overslept, fault, len(answer)))

    for job in sorted(jobs):
        await asyncio.sleep(max(0.0, begun + job.due - time.perf_counter()))
        idle = [connection for connection in idle if not connection.closed]
        task = loop.create_task(do(job))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running)
    for connection in idle:
        connection.close()
    return found


async def _connected(port: int) -> "_Connection":
    _, connection = await asyncio.get_running_loop().create_connection(
        _Connection, "127.0.0.1", port
    )
    return connection


class _Connection(asyncio.Protocol):
    """A kept connection over which one page at a time is asked for."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport
        self._heard = bytearray()
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        """It is closed."""
        self.closed = True
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the exporter hung up"))

    def data_received(self, data: bytes) -> None:
        """Some more of the answer has come."""
        self._heard += data
        if self._answer and not self._answer.done() and _is_complete(self._heard):
            self._answer.set_result(bytes(self._heard))
            self._heard.clear()

    async def ask(self, path: str) -> bytes:
        """The answer as it came; raises OSError, and TimeoutError leaves nothing to use."""
        headers = {
            "Host": "exporter",
            **HEADERS,
            "X-Prometheus-Scrape-Timeout-Seconds": f"{TIMEOUT:g}",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()


def _is_complete(heard: bytearray) -> bool:
    end = heard.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = _LENGTH.search(heard, 0, end)
    if length:
        return len(heard) >= end + 4 + int(length[1])
    return heard.endswith(_LAST_CHUNK) and _dechunked(bytes(heard[end + 4 :])) is not None


def _dechunked(body: bytes) -> bytes | None:
    """The content of a body in chunks; None when it is not complete."""
    parts: list[bytes] = []
    at = 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return None


def _fault(answer: bytes, job: Job) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        return head.partition(b"\r\n")[0].decode(errors="replace")
    if not job.path.startswith("/probe"):
        return ""
    if b"chunked" in head:
        body = _dechunked(body) or b""
    page = gzip.decompress(body) if b"content-encoding: gzip" in head else body
    if b"\npg_up 1\n" in page:
        return ""
    reasons = re.findall(r'^pg_down_reason\{reason="(\w+)"\} 1', page.decode(), re.M)
    return f"pg_up is not 1 {reasons}"
