"""Stands between a client and a server on loopback as a line of a given round-trip time would."""

import argparse
import asyncio
import contextlib
import selectors
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.ports import free_port

_CHUNK_BYTES = 65536

# What one direction may hold back: at 64 KiB a chunk far more than a line of this delay carries,
# yet an end to what memory a reader that never reads can cost.
_CHUNKS_UNDER_WAY = 4096


class DelayProxy:
    """A TCP proxy in this event loop that hands on every byte half a round trip later.

    Bytes keep their order, and chunks travel one behind the other, so the delay costs time and no
    bandwidth. The event loop's timer adds up to a millisecond each way, less when the proxy is a
    process of its own. The handshake of TCP itself is not delayed: the kernel answers it before
    the proxy knows.
    """

    def __init__(
        self, upstream_host: str, upstream_port: int, round_trip: float, port: int | None = None
    ) -> None:
        """Delay by `round_trip` seconds both ways together; listen on a free port by default."""
        self.port = port or free_port()
        self._upstream = upstream_host, upstream_port
        self._delay = round_trip / 2
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Listen; raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening and cut all connections."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._connections.add(task)
        writers = [writer]
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            writers.append(up_writer)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._carry(reader, up_writer))
                directions.create_task(self._carry(up_reader, writer))
        except* OSError:
            pass  # one side is gone; closing the other tells it so
        finally:
            self._connections.discard(task)
            for each in writers:
                each.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction to its end."""
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_UNDER_WAY)

        async def take() -> None:
            chunk = b"any"
            while chunk:
                chunk = await reader.read(_CHUNK_BYTES)
                await under_way.put((clock() + self._delay, chunk))

        async def hand_on() -> None:
            while True:
                due, chunk = await under_way.get()
                if (early := due - clock()) > 0:
                    await asyncio.sleep(early)
                if not chunk:
                    break
                writer.write(chunk)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

        async with asyncio.TaskGroup() as ends:
            ends.create_task(take())
            ends.create_task(hand_on())


@contextlib.contextmanager
def delayed(host: str, port: int, round_trip: float) -> Iterator[int]:
    """Run the proxy as a process of its own and yield the port it listens on.

    For clients that block, and for measurements it must not take part in. Raises RuntimeError
    when it does not come up.
    """
    listen = free_port()
    command = [sys.executable, "-m", "lab.delay_proxy", f"--listen={listen}"]
    command += [f"--upstream={host}:{port}", f"--rtt={round_trip}"]
    root = Path(__file__).resolve().parents[1]  # where -m finds the lab
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError(f"the proxy to {host}:{port} did not come up")
            yield listen
        finally:
            process.terminate()


async def _run(listen: int, upstream: str, round_trip: float) -> None:
    host, _, port = upstream.rpartition(":")
    async with DelayProxy(host, int(port), round_trip, listen) as proxy:
        print(f"127.0.0.1:{proxy.port} is {upstream}, {round_trip:g} seconds away", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Run the proxy until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m lab.delay_proxy", description=__doc__)
    parser.add_argument("--listen", type=int, required=True, metavar="PORT")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt", type=float, required=True, metavar="SECONDS")
    arguments = parser.parse_args()
    # select() waits to the microsecond where asyncio's usual selector rounds up to milliseconds.
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(
            loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
        ) as runner,
    ):
        runner.run(_run(arguments.listen, arguments.upstream, arguments.rtt))


if __name__ == "__main__":
    main()
