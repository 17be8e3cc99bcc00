"""A PgBouncer before the primary, which is watched as the target `pooler`."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lab import pgbouncer
from lab.pgbouncer import CLIENT, STATS
from lab.ports import free_port
from tests.faults.pieces import Piece

if TYPE_CHECKING:
    from tests.faults.stage import Stage

SUITE = "sid"
"""The one of Debian 12 tells nothing of users' limits."""

SETTINGS = """
pool_mode = transaction
default_pool_size = 5
max_client_conn = 30
max_db_connections = 20
max_user_connections = 20
"""


class Pooler(Piece):
    """A PgBouncer that can be killed and started anew."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self._port = free_port()
        self._program = pgbouncer.fetched(SUITE)
        self._running = contextlib.ExitStack()
        self.start()

    def start(self, settings: str = SETTINGS) -> None:
        """Start it where it was."""
        started = pgbouncer.running(
            self._stage.primary, settings, self._program, self._port, as_role=CLIENT
        )
        self.proxy = self._running.enter_context(started)

    def stop(self) -> None:
        """Kill it."""
        self._running.close()

    def configure(self, configuration: dict[str, Any]) -> None:
        """It is a target with the same objectives."""
        targets = configuration["targets"]
        targets["pooler"] = {
            "kind": "pgbouncer",
            "connection": {**self.proxy.login(STATS), "dbname": "pgbouncer"},
            "objectives": targets["primary"]["objectives"],
        }


@contextlib.contextmanager
def pooler(stage: "Stage") -> Iterator[Piece]:
    """One that runs until the end."""
    piece = Pooler(stage)
    try:
        yield piece
    finally:
        piece.stop()
