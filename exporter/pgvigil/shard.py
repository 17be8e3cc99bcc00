"""Share the targets out over several processes, each of which keeps its part."""

import hashlib
import re
from typing import NamedTuple

MOST = 1000
"""Processes that may share the targets."""

_SHARD = re.compile(r"(?:[^/\s]+-)?(?P<index>[0-9]{1,4})/(?P<count>[0-9]{1,4})", re.ASCII)


class Shard(NamedTuple):
    """One of `shards` processes; the first has the ordinal 0."""

    ordinal: int
    shards: int

    def keeps(self, name: str) -> bool:
        """Whether the target of that name is this one's."""
        return self.shards == 1 or home(name, self.shards) == self.ordinal

    def __str__(self) -> str:
        return f"{self.ordinal}/{self.shards}"


WHOLE = Shard(0, 1)
"""The only one, which keeps everything."""


def parse(text: str) -> Shard | None:
    """`I/N`, or `NAME/N` where NAME ends in `-I`; None when it is neither."""
    found = _SHARD.fullmatch(text)
    if not found or not int(found["index"]) < int(found["count"]) <= MOST:
        return None
    return Shard(int(found["index"]), int(found["count"]))


def home(name: str, count: int) -> int:
    """Which of `count` shards keeps the target of that name.

    It is the one whose index and the name have the highest SHA-256, so that one shard more moves
    no target but those it takes itself.
    """
    return max(range(count), key=lambda index: hashlib.sha256(f"{index}/{name}".encode()).digest())
