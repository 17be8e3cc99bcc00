"""Ask Patroni's REST API for the members of clusters, so that those who come are watched."""

import asyncio
import json
import re
import ssl
import time
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import structlog

from pgvigil import hosts
from pgvigil.config import Cluster
from pgvigil.connect import look_up
from pgvigil.errors import PgvigilError, printable
from pgvigil.fleet import Fleet, Member

EVERY = 30.0
"""Seconds between two rounds."""
KEEP = 300.0
"""Seconds for which a member is watched that is not told of any more."""
_PATIENCE = 5.0
"""Seconds that an answer may take."""
_MOST = 1 << 20
"""Bytes of an answer that are read."""
_MEMBERS = 100
"""Members of a cluster that are taken."""

_log = structlog.get_logger()


class _FailedError(PgvigilError):
    """A source has told nothing of use; the text says why."""


class Discovery:
    """Tells a fleet of its clusters' members; what was last told holds until it is told anew."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._seen: dict[Cluster, dict[Member, float]] = {}
        """When each was last told of, on the monotonic clock."""
        self._failing: dict[Cluster, str] = {}

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await self.round()
            await asyncio.sleep(EVERY)

    async def round(self) -> None:
        """Ask each source once."""
        clusters = self._fleet.settings.clusters
        self._seen = {of: seen for of, seen in self._seen.items() if of in clusters}
        await asyncio.gather(*map(self._ask, clusters))

    async def _ask(self, cluster: Cluster) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                found = list(_members(cluster, await _get(cluster.url)))
            why = ""
        except TimeoutError:
            why = "no answer in time"
        except OSError as error:
            why = error.strerror or type(error).__name__
        except _FailedError as error:
            why = str(error)
        source = self._fleet.sources.get(cluster.url)
        if source is None:
            return  # a reload has dropped it meanwhile
        if why:
            source.failures += 1
            if self._failing.get(cluster) != why:
                _log.warning("members are not told", source=cluster.url, reason=why)
            self._failing[cluster] = why
            return
        self._failing.pop(cluster, None)
        now = time.monotonic()
        seen = self._seen.setdefault(cluster, {})
        names = {member.name for member in found}
        for member, at in list(seen.items()):
            # One that has moved is told of by its name.
            if now - at > KEEP or member.name in names:
                del seen[member]
        seen |= dict.fromkeys(found, now)
        source.succeeded_at = time.time()
        self._fleet.discovered(cluster.url, sorted(seen))


def _members(cluster: Cluster, told: bytes) -> Iterator[Member]:
    """The members that an answer to `/cluster` tells of; raises _FailedError."""
    try:
        document = json.loads(told)
        scope = cluster.name or document.get("scope") or urlsplit(cluster.url).hostname
        for raw in document["members"][:_MEMBERS]:
            if raw.get("host"):  # one that begins has none yet
                yield _member(cluster, str(scope), raw)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        text = f"the answer is no list of members: {printable(repr(error))[:200]}"
        raise _FailedError(text) from None


def _member(cluster: Cluster, scope: str, raw: Any) -> Member:
    host, port = str(raw["host"]), str(int(raw.get("port") or 5432))
    if hosts.parse(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") is None:
        raise ValueError("host")
    name = re.sub(r"[^A-Za-z0-9_.:-]", "-", f"{scope}-{raw['name']}")[:128]
    return Member(name, cluster.module, host, port)


async def _get(url: str) -> bytes:
    """What `/cluster` is answered with; raises OSError or _FailedError."""
    parts = urlsplit(url)
    host, tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    try:
        addresses = await look_up(host)
    except (OSError, UnicodeError):
        raise _FailedError("the host's name has no address") from None
    reader, writer = await asyncio.open_connection(
        addresses[0],
        port,
        ssl=_authorities() if tls else None,
        server_hostname=host if tls else None,
    )
    try:
        # With 1.0 the answer comes in one piece and ends with the connection.
        lines = ("GET /cluster HTTP/1.0", f"Host: {parts.netloc}", "User-Agent: pgvigil", "", "")
        writer.write("\r\n".join(lines).encode())
        told = bytearray()
        while len(told) <= _MOST and (chunk := await reader.read(65536)):
            told += chunk
    finally:
        writer.close()
    if len(told) > _MOST:
        raise _FailedError(f"the answer is larger than {_MOST >> 20} MB")
    head, _, body = bytes(told).partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", head)
    if not status:
        raise _FailedError("the answer is no HTTP")
    if status[1] != b"200":
        raise _FailedError(f"the answer has the status {status[1].decode()}")
    return body


@cache
def _authorities() -> ssl.SSLContext:
    return ssl.create_default_context()
