"""Keep the collectors of all targets, while targets come, change and go."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from pgvigil import computed, hosts
from pgvigil.catalogue import Query
from pgvigil.collect import Collector
from pgvigil.config import Address, Settings
from pgvigil.plan import Statement, concerning
from pgvigil.render import Layout
from pgvigil.shard import Shard, home
from pgvigil.target import Target

IDLE = 600.0
"""Seconds after its last scrape for which a host is kept that a request has named."""
SWEEP = 10.0
"""Seconds between two looks at who is idle."""
_DEFAULT_PORT = "5432"


class Turned(NamedTuple):
    """Why a request gets no collector for the host that it names."""

    status: int
    text: str


class Member(NamedTuple):
    """A target that was discovered."""

    name: str
    module: str
    host: str
    port: str


@dataclass(slots=True)
class Source:
    """What discovers targets, and how that went."""

    members: Sequence[Member] = ()
    failures: int = 0
    succeeded_at: float = 0.0
    """Seconds since the epoch; 0 for never."""


class Fleet:
    """The collectors that this process keeps."""

    def __init__(self, collectors: Iterable[Collector] = ()) -> None:
        self.collectors: dict[str, Collector] = {c.target.name: c for c in collectors}
        """Of targets that are listed or discovered, by their names."""
        self.hosts: dict[str, Collector] = {}
        """Of hosts that requests have named, by the names of their targets."""
        self.sources: dict[str, Source] = {}
        """By the address of what discovers targets."""
        self.settings = Settings(Address("", 0), (), ())
        self.loaded_at = time.time()
        """When the configuration in force was read, in seconds since the epoch."""
        self.reloaded = True
        """Whether the configuration was good when it was last read."""
        self._elsewhere: set[str] = set()
        """The names of the targets that other shards keep."""
        self._queries: Sequence[Query] = ()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def shard(self) -> Shard:
        """Which part of the targets is ours."""
        return self.settings.shard

    @property
    def alone(self) -> bool:
        """Whether one target is all there is, so that one page does for it and ourselves."""
        several = self.shard.shards > 1 or self.settings.open_ended
        return len(self.collectors) == 1 and not several

    def everyone(self) -> Iterator[Collector]:
        """All collectors."""
        yield from self.collectors.values()
        yield from self.hosts.values()

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
        self.settings, self._queries = settings, queries
        self.sources = {of.url: self.sources.get(of.url, Source()) for of in settings.clusters}
        self._arrange(same)
        for name, collector in list(self.hosts.items()):
            place = hosts.parse(name.partition("@")[2])
            module = name.partition("@")[0]
            kept = place and settings.allowed and settings.allowed.named(place.host)
            kept = kept and module in settings.modules and same(collector.target.kind)
            if not (kept and place and self._of_host(place, module) == collector.target):
                self._retire(self.hosts.pop(name))
        self.loaded_at = time.time()

    def discovered(self, url: str, members: Sequence[Member]) -> None:
        """A source has told its members."""
        if url in self.sources:  # else a reload has dropped it meanwhile
            self.sources[url].members = members
            self._arrange(lambda _: True)

    def host(self, text: str, module: str | None) -> Collector | Turned | None:
        """The collector of the host that a request names; None where it names none.

        It is kept as long as it is scraped.
        """
        settings, place = self.settings, hosts.parse(text)
        if settings.allowed is None or place is None:
            return None
        if module is None or module not in settings.modules:
            known = ", ".join(settings.modules)
            return Turned(400, f"auth_module must be one of the configuration: {known}")
        if not settings.allowed.named(place.host):
            return Turned(403, "allow_hosts does not have this host")
        target = self._of_host(place, module)
        if target.name not in self.hosts:
            if len(self.hosts) >= settings.max_hosts:
                text = f"{settings.max_hosts} hosts are watched already, and max_hosts is no more"
                return Turned(503, text)
            self.hosts[target.name] = _collector(target, self._queries)
        return self.hosts[target.name]

    def sweep(self) -> None:
        """Leave the hosts that nobody scrapes any more."""
        for name, collector in list(self.hosts.items()):
            if collector.idle > IDLE:
                self._retire(self.hosts.pop(name))

    async def keep(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(SWEEP)
            self.sweep()

    async def close(self) -> None:
        """End what runs, and all connections."""
        await asyncio.gather(*self._retiring, *(c.close() for c in self.everyone()))

    def _arrange(self, same: Callable[[str], bool]) -> None:
        """Have a collector for each target that is listed or discovered, and is ours."""
        wanted = {target.name: target for target in self.settings.targets}
        self._elsewhere = set(self.settings.elsewhere)
        # Of several that tell of one member, the one that did so last is right.
        for source in sorted(self.sources.values(), key=lambda of: -of.succeeded_at):
            for member in source.members:
                module = self.settings.modules.get(member.module)
                if module is None or member.name in wanted or member.name in self._elsewhere:
                    continue  # what is listed goes before what is discovered
                if self.shard.keeps(member.name):
                    wanted[member.name] = _made(module, member.name, member.host, member.port)
                else:
                    self._elsewhere.add(member.name)
        before, self.collectors = self.collectors, {}
        for name, target in wanted.items():
            known = before.get(name)
            if known and known.target == target and same(target.kind):
                self.collectors[name] = before.pop(name)
            else:
                self.collectors[name] = _collector(target, self._queries)
        for collector in before.values():
            self._retire(collector)

    def _of_host(self, place: hosts.Place, module: str) -> Target:
        of = self.settings.modules[module]
        port = place.port or of.connection.get("port", _DEFAULT_PORT)
        dbname = {"dbname": place.dbname} if place.dbname else {}
        where = f"[{place.host}]" if ":" in place.host else place.host
        name = f"{module}@{where}:{port}" + (f"/{place.dbname}" if place.dbname else "")
        return replace(_made(of, name, place.host, port, **dbname), allowed=self.settings.allowed)

    def _retire(self, collector: Collector) -> None:
        task = asyncio.get_running_loop().create_task(collector.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def _made(module: Target, name: str, host: str, port: str, **more: str) -> Target:
    connection = {**module.connection, "host": host, "port": port, **more}
    return replace(module, name=name, connection=connection)


def _collector(target: Target, queries: Sequence[Query]) -> Collector:
    return Collector(target, queries, partial(_layout, target.labels, target.limits))


def _layout(
    known: Mapping[str, str],
    limits: Sequence[float],
    statement: Statement,
    labels: Mapping[str, str],
) -> Layout:
    """How the rows of a statement on a target with these labels and limits are written down."""
    return computed.layout(statement, {**known, **labels}, limits)


def _same(before: Sequence[Query], after: Sequence[Query]) -> Callable[[str], bool]:
    """Whether a kind of targets is asked the same as before."""
    known: dict[str, bool] = {}

    def same(kind: str) -> bool:
        if kind not in known:
            known[kind] = concerning(before, kind) == concerning(after, kind)
        return known[kind]

    return same
