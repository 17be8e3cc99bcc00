"""Open a way to a target, whatever kind it is of."""

from collections.abc import Mapping

from pgvigil.barman import Barman
from pgvigil.pgbouncer import Console
from pgvigil.plan import Wanted
from pgvigil.repository import Repository
from pgvigil.session import Session
from pgvigil.source import Source
from pgvigil.target import Target
from pgvigil.walg import WalG

KINDS: Mapping[str, type[Source]] = {
    "postgresql": Session,
    "pgbouncer": Console,
    "pgbackrest": Repository,
    "barman": Barman,
    "wal-g": WalG,
}
"""What a configuration may say under `kind`, and what asks such a target."""


async def open_source(target: Target, wanted: Wanted, deadline: float) -> Source:
    """A new way to `target`, or Unreachable with the reason; done before `deadline`.

    `deadline` is a time of the running loop's clock.
    """
    return await KINDS[target.kind].open(target, wanted, deadline)
