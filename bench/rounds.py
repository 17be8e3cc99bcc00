"""Scrapes exporters by turns, so that what else the machine does falls on all of them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.exporters import Exporter, Page
from bench.processes import Memory, memory, processor_seconds, processor_seconds_of_tree
from lab.postgres import Server

_SETTLE_SECONDS = 0.05
"""After a burst: connections are closed, their processes reaped, garbage collected."""


@dataclass
class Measured:
    """What the scrapes of one exporter cost; seconds per scrape, one entry per burst."""

    page: Page
    latency: list[float] = field(default_factory=list)
    """One entry per scrape."""
    exporter: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0))

    @property
    def milliseconds(self) -> float:
        """The median latency."""
        return median(self.latency) * 1000

    @property
    def exporter_milliseconds(self) -> float:
        """The exporter's processor time per scrape, the median burst's."""
        return median(self.exporter) * 1000

    @property
    def server_milliseconds(self) -> float:
        """The server's processor time per scrape.

        The mean: what ended backends used is counted in steps of 10 ms, too coarse for one burst.
        """
        return sum(self.server) / len(self.server) * 1000


def interleaved(
    exporters: Sequence[Exporter], server: Server, rounds: int, burst: int, warm: int = 2
) -> dict[str, Measured]:
    """Scrape each in bursts, one exporter after the other, for some rounds."""
    found = {}
    for exporter in exporters:
        for _ in range(warm):
            page = exporter.scrape()
        found[exporter.name] = Measured(page)
    for number in range(rounds):
        # Each goes first as often as last.
        for exporter in exporters if number % 2 else reversed(exporters):
            measured = found[exporter.name]
            time.sleep(_SETTLE_SECONDS)
            begun = processor_seconds(exporter.pid), processor_seconds_of_tree(server.pid)
            measured.latency += [exporter.scrape().seconds for _ in range(burst)]
            time.sleep(_SETTLE_SECONDS)
            ended = processor_seconds(exporter.pid), processor_seconds_of_tree(server.pid)
            measured.exporter.append((ended[0] - begun[0]) / burst)
            measured.server.append((ended[1] - begun[1]) / burst)
    for exporter in exporters:
        found[exporter.name].memory = memory(exporter.pid)
    return found
