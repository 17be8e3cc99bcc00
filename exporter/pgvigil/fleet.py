"""Keep the collectors of all targets, while targets come, change and go."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from pgvigil import computed
from pgvigil.catalogue import Query
from pgvigil.collect import Collector
from pgvigil.config import Settings
from pgvigil.plan import Statement, concerning
from pgvigil.render import Layout
from pgvigil.shard import WHOLE, home
from pgvigil.target import Target


class Fleet:
    """The collectors that this process keeps, by the names of their targets."""

    def __init__(self, collectors: Iterable[Collector] = ()) -> None:
        self.collectors: dict[str, Collector] = {c.target.name: c for c in collectors}
        self.shard = WHOLE
        self.loaded_at = time.time()
        """When the configuration in force was read, in seconds since the epoch."""
        self.reloaded = True
        """Whether the configuration was good when it was last read."""
        self._elsewhere: Collection[str] = ()
        """The names of the targets that other shards keep."""
        self._queries: Sequence[Query] = ()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def alone(self) -> bool:
        """Whether one target is all there is, so that one page does for it and ourselves."""
        return len(self.collectors) == 1 and self.shard == WHOLE

    def elsewhere(self, name: str) -> str:
        """Which shard keeps the target of that name; empty when none does, or this one."""
        if name not in self._elsewhere:
            return ""
        return str(self.shard._replace(ordinal=home(name, self.shard.shards)))

    def adopt(self, settings: Settings, queries: Sequence[Query]) -> None:
        """Watch what the settings say from now on.

        A target that is what it was, and is asked the same, keeps its collector with all that this
        one knows and holds. The others' are closed when what runs there has ended.
        """
        if queries == self._queries:
            queries = self._queries  # rather than a second copy of them
        same = _same(self._queries, queries)
        before, self.collectors = self.collectors, {}
        for target in settings.targets:
            known = before.get(target.name)
            if known and known.target == target and same(target.kind):
                self.collectors[target.name] = before.pop(target.name)
            else:
                self.collectors[target.name] = _collector(target, queries)
        self.shard, self._elsewhere, self._queries = settings.shard, settings.elsewhere, queries
        self.loaded_at = time.time()
        for collector in before.values():
            task = asyncio.get_running_loop().create_task(collector.retire())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """End what runs, and all connections."""
        await asyncio.gather(*self._retiring, *(c.close() for c in self.collectors.values()))


def _collector(target: Target, queries: Sequence[Query]) -> Collector:
    return Collector(target, queries, partial(_layout, target))


def _layout(target: Target, statement: Statement, labels: Mapping[str, str]) -> Layout:
    """How the rows of a statement on a target are written down."""
    return computed.layout(statement, {**target.labels, **labels}, target.limits)


def _same(before: Sequence[Query], after: Sequence[Query]) -> Callable[[str], bool]:
    """Whether a kind of targets is asked the same as before."""
    known: dict[str, bool] = {}

    def same(kind: str) -> bool:
        if kind not in known:
            known[kind] = concerning(before, kind) == concerning(after, kind)
        return known[kind]

    return same
