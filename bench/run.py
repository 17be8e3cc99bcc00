"""Carries what all measurements of one run share."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import exporters
from bench.exporters import Exporter
from bench.peer import Peer
from bench.servers import Servers

EVERY_TABLE = Path(__file__).parent / "catalogues" / "every_table.yml"
"""The peer's statistics of each table, for ours: the same statements, as many series."""

SETTINGS = EVERY_TABLE.with_name("settings.yml")
"""The numeric settings, of which the peer's page of a plain server mostly consists."""


@dataclass(frozen=True)
class Run:
    """What a measurement may use."""

    servers: Servers
    peer: Peer | None
    quick: bool

    def times(self, full: int) -> int:
        """How often to repeat what a full run does so many times."""
        return max(2, full // 3) if self.quick else full

    @contextlib.contextmanager
    def both(self, dsn: str, catalogue: Path | None = None) -> Iterator[list[Exporter]]:
        """Run ours, and the peer if there is one, on the same server."""
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(exporters.pgvigil(dsn, catalogue=catalogue))]
            if self.peer:
                running.append(stack.enter_context(exporters.postgres_exporter(self.peer, dsn)))
            yield running
