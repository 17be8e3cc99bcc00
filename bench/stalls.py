"""Serves a big page from an event loop of our own and times how long the loop stands still."""

import asyncio
import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import structlog
from pgvigil import catalogue, config, ranking, serve
from pgvigil.collect import Collector
from pgvigil.fleet import Fleet
from pgvigil.target import Target
from psycopg import conninfo

from bench.exporters import Client
from lab.ports import free_port

_TICK_SECONDS = 0.001
_IDLE_SECONDS = 1.0


class Gap(NamedTuple):
    """The longest time between two turns of the loop, in seconds."""

    wall: float
    processor: float
    """The longest that this thread computed in one gap: what is not the machine's doing."""


class Gaps(NamedTuple):
    """What the ticker saw."""

    idle: Gap
    """While nothing was asked: what the machine and the ticker itself cause."""
    scrapes: list[Gap]
    series: int


class _Ticker:
    """Comes back every millisecond and remembers the longest absence."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.restart()
        self._loop.call_soon(self._tick)

    def restart(self) -> None:
        self.longest = Gap(0.0, 0.0)
        self._last = time.perf_counter(), time.thread_time()

    def _tick(self) -> None:
        now = time.perf_counter(), time.thread_time()
        self.longest = Gap(
            max(self.longest.wall, now[0] - self._last[0] - _TICK_SECONDS),
            max(self.longest.processor, now[1] - self._last[1]),
        )
        self._last = now
        self._loop.call_later(_TICK_SECONDS, self._tick)


def longest_gaps(line: str, extra: Path, scrapes: int) -> Gaps:
    """Scrape an exporter in this process from another one, a ticker in its loop."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    return asyncio.run(_longest_gaps(line, extra, scrapes))


async def _longest_gaps(line: str, extra: Path, scrapes: int) -> Gaps:
    connection = {key: str(value) for key, value in conninfo.conninfo_to_dict(line).items()}
    target = Target("bench", connection, max_series=1_000_000)
    collector = Collector(target, catalogue.load([extra]), ranking.layout)
    port = free_port()
    listener = serve.listen(config.Address("127.0.0.1", port))
    stop = asyncio.Event()

    async def stopped() -> None:
        await stop.wait()

    gc.collect()
    gc.freeze()  # as the command does
    serving = asyncio.create_task(
        serve.run(serve.Application(Fleet([collector])), listener, stopped)
    )
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        series = await loop.run_in_executor(client, _series, port)
        ticker = _Ticker()
        await asyncio.sleep(_IDLE_SECONDS)
        idle, found = ticker.longest, []
        for _ in range(scrapes):
            ticker.restart()
            await loop.run_in_executor(client, _series, port)
            found.append(ticker.longest)
    stop.set()
    await serving
    await collector.close()
    gc.unfreeze()
    return Gaps(idle, found, series)


def _series(port: int) -> int:
    """Ask for the page, from a process of its own."""
    client = Client(port)
    series = client.ask("/metrics").series
    client.close()
    return series
