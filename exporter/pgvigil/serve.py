"""Answer HTTP: metrics, health, roles, service discovery and the page for people."""

import asyncio
import contextlib
import json
import logging
import math
import re
import socket
import ssl
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config, Sockets

from pgvigil import about, landing, render, tls, verdict, watch
from pgvigil.collect import Collector
from pgvigil.config import Address
from pgvigil.credentials import Credentials, Verdict
from pgvigil.door import Door, Guest, Stage, Why
from pgvigil.errors import Problem
from pgvigil.fleet import Fleet, Turned
from pgvigil.web import Denied, Web

_pack: Any = zlib.compressobj
with contextlib.suppress(ImportError):  # no wheel for this machine: the same, four times slower
    from isal import isal_zlib

    _pack = isal_zlib.compressobj

DEFAULT_TIMEOUT = 10.0
"""Seconds a scrape may take when the request does not say; Prometheus' own default."""
LONGEST_TIMEOUT = 120.0
SEND_TIMEOUT = 30.0
"""Seconds a client may take to read an answer."""
KEEP_ALIVE = 20.0
"""Seconds a connection may wait for a request: longer than the usual scrape interval, so that
Prometheus keeps its own."""
BACKLOG = 512
"""Clients that may wait at the door."""
SWEEP = 5.0
"""Seconds between two looks at who overstays."""
SLICE = 128 * 1024
"""Bytes handed to the connection at once, so that a slow reader holds no more than that."""
ROLE_AGE = 120.0
"""Seconds after which a role seen is no longer told to a load balancer."""
HANDSHAKE = 10.0
"""Seconds a client may take until its connection is encrypted."""
OPEN = ("/livez", "/readyz")
"""What an orchestrator asks without a password; it tells whether the program works, no more."""
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": landing.POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "deny",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""What every answer says to a browser, where the web configuration says nothing else."""

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,255})(:[0-9]{1,5})?")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


Reload = Callable[[], Awaitable[Sequence[Problem]]]
"""Begins to read the configuration anew, and ends with what is wrong with it."""


class Answer(NamedTuple):
    """What goes back to a client."""

    status: int
    media: str
    body: Iterable[bytes]
    headers: Sequence[tuple[bytes, bytes]] = ()


class Application:
    """The ASGI application over the collectors of all targets, for those who come by a door."""

    def __init__(
        self,
        fleet: Fleet,
        door: Door | None = None,
        reload: Reload | None = None,
        web: Web | None = None,
    ) -> None:
        """`reload` is None where nobody may ask for one."""
        self._fleet = fleet
        self._door = door
        self._begin_reload = reload
        self.web = web
        self._credentials = Credentials()
        self._drains: set[asyncio.Task[None]] = set()
        self._routes: Mapping[str, Callable[[_Request], Awaitable[Answer]]] = {
            "/": self._landing,
            "/metrics": self._metrics,
            "/probe": self._probe,
            "/sd": self._discovery,
            "/livez": self._alive,
            "/readyz": self._ready,
            "/primary": lambda request: self._role(request, "primary"),
            "/replica": lambda request: self._role(request, "standby"),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or follow the server's start and end."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before it is accepted: 403
            return
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        guest = self._door.guest(scope.get("client")) if self._door else None
        if guest:
            guest.reach(Stage.ASKING)
        try:
            await self._serve(scope, receive, send, guest)
        finally:
            if guest:
                guest.reach(Stage.WAITING)
                if guest.leaving and scope.get("http_version") == "2":  # knows no last answer
                    guest.hear_no_more()

    async def _serve(self, scope: Scope, receive: Receive, send: Send, guest: Guest | None) -> None:
        request = _Request(scope)
        multiplexed = scope.get("http_version") == "2"
        if request.body or multiplexed:  # which announces no body
            # Nobody looks at it, but unread it would stop the connection for good.
            drain = asyncio.get_running_loop().create_task(_drain(receive))
            self._drains.add(drain)
            drain.add_done_callback(self._drains.discard)

        def gone() -> bool:
            return self._door is not None and (guest is None or guest.gone)

        # With more requests on the way, a client may be gone before this one is looked at.
        answer = _NOBODY if gone() else await self._answer(scope, request)
        if self._door and guest:
            self._door.answering(guest)
        answer = _NOBODY if gone() else answer
        last = not multiplexed and (
            gone() or (guest is not None and (guest.ended or guest.leaving))
        )
        # Whoever reads too slowly is put out by the door, not by a timeout here: hypercorn forgets
        # a connection for good when it is left in the middle of an answer. With HTTP/2 it is the
        # other way round, and nothing else ends its waiting for a client that takes no more.
        limit = None
        if multiplexed:
            limit = 0.0 if gone() or (guest and guest.ended) else SEND_TIMEOUT
        try:
            async with asyncio.timeout(limit) as patience:
                if multiplexed and guest:
                    guest.waiting.add(patience)
                await _send(
                    answer, request, send, head=scope["method"] == "HEAD", last=last, gone=gone
                )
        except TimeoutError:
            if self._door and guest:
                self._door.put_out(guest, Why.SLOW)
        finally:
            if guest:
                guest.waiting.discard(patience)

    async def _answer(self, scope: Scope, request: "_Request") -> Answer:
        if self.web and (denied := await self._denial(self.web, scope, request)):
            return denied
        route = self._routes.get(scope["path"])
        if scope["path"] == "/-/reload" and not request.body:
            return await self._reload(scope["method"])
        if scope["method"] not in ("GET", "HEAD"):
            return _plain(405, "only GET and HEAD are answered here", (b"allow", b"GET, HEAD"))
        if request.body:
            return _plain(413, "a request has no body here")
        if route is None:
            return _plain(404, f"nothing is here; there are {' '.join(self._routes)}")
        return await route(request)

    async def _reload(self, method: str) -> Answer:
        if method != "POST":
            return _plain(405, "only POST reloads", (b"allow", b"POST"))
        if self._begin_reload is None:
            # Whoever reaches the port could keep us busy with it.
            return _plain(403, "reloading over HTTP is off; --web-reload allows it, or send SIGHUP")
        if problems := await asyncio.shield(self._begin_reload()):
            return _plain(500, "\n".join(["nothing is changed:", *map(str, problems)]))
        return _plain(200, f"reloaded: {len(self._fleet.collectors)} targets")

    async def _denial(self, web: Web, scope: Scope, request: "_Request") -> Answer | None:
        """What is said to somebody who may not come in."""
        rules = web.look()
        if scope.get("http_version") == "2" and not rules.http2:
            return _plain(505, "HTTP/2 is off here")
        if scope["path"] in OPEN:
            return None
        if not web.within_pace():
            web.deny(Denied.RATE)
            return _plain(429, "too many requests")
        if not rules.users:
            return None
        verdict = await self._credentials.judge(rules.users, request.header(b"authorization"))
        if verdict is Verdict.GOOD:
            return None
        if verdict is Verdict.BUSY:
            web.deny(Denied.BUSY)
            return _plain(503, "too many passwords are being looked at", (b"retry-after", b"1"))
        web.deny(Denied.CREDENTIALS)
        challenge = b'Basic realm="pgvigil", charset="UTF-8"'
        return _plain(401, "a user and a password are needed", (b"www-authenticate", challenge))

    async def _metrics(self, request: "_Request") -> Answer:
        if self._fleet.alone:
            (collector,) = self._fleet.collectors.values()
            return await self._scrape(request, collector)
        overview = about.overview(self._fleet.everyone())
        return _metrics_answer([*self._ourselves(), *overview], request)

    async def _probe(self, request: "_Request") -> Answer:
        collector = self._chosen(request)
        if collector is None:
            named = request.query("target") or "", request.query("auth_module")
            made = self._fleet.host(*named)
            if made is None:
                return self._unknown(request, "no such target; /probe?target=NAME knows ")
            if isinstance(made, Turned):
                return _plain(made.status, made.text)
            collector = made
        return await self._scrape(request, collector)

    async def _scrape(self, request: "_Request", collector: Collector) -> Answer:
        deadline = asyncio.get_running_loop().time() + request.budget()
        scrape = await collector.scrape(deadline)
        verdict.note(collector, scrape)
        # The exporter itself stands on one page: this one, if it is the only one.
        alone = self._fleet.alone
        ourselves = self._ourselves() if alone else ()
        families = [*about.families(collector, scrape), *ourselves]
        return _metrics_answer(families, request, process=alone)

    def _ourselves(self) -> Iterator[render.Family]:
        yield from about.ourselves(self._fleet)
        if self.web:
            yield from about.entrance(self.web)

    async def _discovery(self, request: "_Request") -> Answer:
        host = request.header(b"host") or "localhost"
        if not _HOST.fullmatch(host):
            return _plain(400, "the Host header names no host")
        scheme = {"__scheme__": "https"} if self.web and self.web.rules.tls else {}
        groups = [
            {
                "targets": [host],
                "labels": {
                    **scheme,
                    "__metrics_path__": "/probe",
                    "__param_target": n,
                    "instance": n,
                },
            }
            for n in self._fleet.collectors
        ]
        return Answer(200, "application/json", [json.dumps(groups).encode()])

    async def _alive(self, _: "_Request") -> Answer:
        # A database's state would be somebody else's; and a loop that stands still says nothing.
        hung = watch.hanging(self._fleet.everyone())
        if hung and self.web and self.web.rules.users:
            hung = "the page for people says what"  # which names a target, to who may know
        return _plain(503, f"everything hangs: {hung}") if hung else _plain(200, "ok")

    async def _ready(self, _: "_Request") -> Answer:
        return _plain(200, "ok")  # the configuration was loaded, else this would not run

    async def _role(self, request: "_Request", role: str) -> Answer:
        collector = self._chosen(request)
        if collector is None:
            return self._unknown(request, "name one of ?target=")
        if collector.target.kind != "postgresql":
            return _plain(404, f"a {collector.target.kind} has no role")
        facts, last = collector.facts, collector.last
        age = time.time() - collector.facts_at
        if not facts or not last or not last.up or age > ROLE_AGE:
            return _plain(503, "unknown: no recent scrape has seen this server's role")
        status = 200 if facts.role == role else 503
        return _plain(status, f"{facts.role}, seen {age:.0f} s ago")

    async def _landing(self, request: "_Request") -> Answer:
        collectors = list(self._fleet.everyone())
        if name := request.query("target"):
            collectors = [of for of in collectors if of.target.name == name]
            if not collectors:
                return self._unknown(request, "no such target; /?target=NAME knows ")
        page = await landing.page(collectors, several=not self._fleet.alone)
        return Answer(200, "text/html; charset=utf-8", (piece.encode() for piece in page))

    def _unknown(self, request: "_Request", text: str) -> Answer:
        if shard := self._fleet.elsewhere(request.query("target") or ""):
            return _plain(404, f"this is shard {self._fleet.shard}; the target is with {shard}")
        return _plain(404, f"{text}{', '.join(self._fleet.collectors)}")

    def close(self) -> None:
        """Look at no password any more."""
        self._credentials.close()

    def _chosen(self, request: "_Request") -> Collector | None:
        name = request.query("target")
        if name is None and self._fleet.alone:
            return next(iter(self._fleet.everyone()))
        return self._fleet.collectors.get(name or "")


class _Request:
    """The parts of a request that matter here."""

    def __init__(self, scope: Scope) -> None:
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self._query = parse_qs(scope["query_string"].decode("latin-1"))

    def header(self, name: bytes) -> str:
        return b",".join(value for key, value in self._headers if key == name).decode("latin-1")

    def query(self, name: str) -> str | None:
        values = self._query.get(name)
        return values[0] if values else None

    @property
    def body(self) -> bool:
        """Whether a body follows."""
        length = self.header(b"content-length")
        return length not in ("", "0") or bool(self.header(b"transfer-encoding"))

    def budget(self) -> float:
        """Seconds this scrape may take: Prometheus' timeout, less what the way back costs."""
        try:
            timeout = float(self.header(b"x-prometheus-scrape-timeout-seconds"))
        except ValueError:
            timeout = DEFAULT_TIMEOUT
        if not math.isfinite(timeout) or timeout <= 0:
            timeout = DEFAULT_TIMEOUT
        timeout = min(timeout, LONGEST_TIMEOUT)
        return timeout - min(0.5, timeout * 0.2)

    @property
    def openmetrics(self) -> bool:
        """Whether the client would rather have OpenMetrics than the text format."""
        best = {False: 0.0, True: 0.0}
        for item in self.header(b"accept").split(","):
            media, *rest = (part.strip().lower() for part in item.split(";"))
            options = dict(part.split("=", 1) for part in rest if "=" in part)
            quality = _quality(options.get("q", "1"))
            if media == "application/openmetrics-text":
                if options.get("version", "1.0.0") == "1.0.0":
                    best[True] = max(best[True], quality)
            elif media in ("text/plain", "text/*", "*/*"):
                best[False] = max(best[False], quality)
        return best[True] > 0 and best[True] >= best[False]

    @property
    def gzip(self) -> bool:
        """Whether the client takes gzip."""
        for item in self.header(b"accept-encoding").lower().split(","):
            coding, _, option = item.strip().partition(";")
            if coding.strip() == "gzip":
                return _quality(option.strip().removeprefix("q=") or "1") > 0
        return False


def _quality(text: str) -> float:
    return float(text) if re.fullmatch(r"[01](\.\d{0,3})?", text) else 0.0


def _plain(status: int, text: str, *headers: tuple[bytes, bytes]) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", [f"{text}\n".encode()], headers)


_NOBODY = _plain(503, "the client has gone")


def _metrics_answer(
    families: Iterable[render.Family], request: _Request, *, process: bool = True
) -> Answer:
    openmetrics = request.openmetrics
    media = render.OPENMETRICS if openmetrics else render.TEXT
    return Answer(200, media, render.write(families, openmetrics=openmetrics, process=process))


async def _drain(receive: Receive) -> None:
    """Take a body for nothing, until the request is over."""
    while (await receive())["type"] == "http.request":
        pass


async def _send(
    answer: Answer,
    request: _Request,
    send: Send,
    *,
    head: bool,
    last: bool,
    gone: Callable[[], bool],
) -> None:
    """Send an answer, or its `head` alone; after the `last` the connection ends."""
    compressed = request.gzip and answer.media.startswith(("text/", "application/openmetrics"))
    slices = _slices(answer.body)
    if compressed:
        slices = _gzipped(slices)
    first, second = next(slices, b""), next(slices, None)
    headers = [
        (b"content-type", answer.media.encode()),
        (b"vary", b"accept, accept-encoding"),
        *answer.headers,
    ]
    if last:
        headers.append((b"connection", b"close"))
    if compressed:
        headers.append((b"content-encoding", b"gzip"))
    if second is None:
        headers.append((b"content-length", b"%d" % len(first)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if head:
        await send({"type": "http.response.body", "body": b""})
        return
    await send({"type": "http.response.body", "body": first, "more_body": second is not None})
    while second is not None:
        await asyncio.sleep(0)  # a big page must not hold up the other scrapes
        if gone():
            await send({"type": "http.response.body", "body": b""})
            return
        following = next(slices, None)
        last = following is None
        await send({"type": "http.response.body", "body": second, "more_body": not last})
        second = following


def _slices(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about SLICE."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= SLICE:
            joined = b"".join(held)
            yield from (joined[start : start + SLICE] for start in range(0, size, SLICE))
            held, size = [], 0
    if held:
        yield b"".join(held)


def _gzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # Level 1: of the rest, time grows much faster than the answer shrinks.
    packer = _pack(1, zlib.DEFLATED, 31)
    for chunk in chunks:
        if packed := packer.compress(chunk):
            yield packed
    yield packer.flush()


def listen(address: Address) -> Door:
    """Where clients come in; raises OSError.

    An empty host takes IPv4 and, where it exists, IPv6.
    """
    limits = {
        # hypercorn ends it kindly a moment before.
        Stage.NEW: KEEP_ALIVE + SWEEP,
        Stage.WAITING: KEEP_ALIVE + SWEEP,
        Stage.ANSWERING: SEND_TIMEOUT,
        Stage.ASKING: LONGEST_TIMEOUT + SWEEP,
    }
    return Door(_listener(address), limits)


def _listener(address: Address) -> socket.socket:
    if address.host:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", address.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        except OSError:
            pass  # the kernel knows IPv6, this machine's network does not
    return socket.create_server(("", address.port), backlog=BACKLOG)


class _Config(Config):
    """hypercorn's, with a socket and an encryption of ours."""

    def __init__(self, door: Door, web: Web | None) -> None:
        super().__init__()
        self._door = door
        self._web = web
        self._made: tuple[object, list[tuple[bytes, bytes]]] | None = None

    @property
    def ssl_enabled(self) -> bool:
        return self._web is not None and self._web.rules.tls is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return tls.changing(self._web.secure) if self._web and self.ssl_enabled else None

    def create_sockets(self) -> Sockets:
        return Sockets([self._door], [], []) if self.ssl_enabled else Sockets([], [self._door], [])

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Of every answer, hypercorn's own to what it cannot read included."""
        told = self._web.rules.headers if self._web else {}
        if self._made is None or self._made[0] is not told:
            headers = {**HEADERS, **told}
            self._made = told, [(k.lower().encode(), v.encode()) for k, v in headers.items() if v]
        return [*super().response_headers(protocol), *self._made[1]]


async def run(application: Application, door: Door, stop: Callable[[], Awaitable[None]]) -> None:
    """Serve until `stop` returns, then let requests in flight end."""
    web = application.web
    if web:
        web.changed = door.renew
    config = _Config(door, web)
    config.accesslog = None
    # Of a client that hangs up it would tell with each slice that was still on its way.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # Its words go the way of ours; what it says below a warning we have said already.
    config.errorlog = logging.getLogger("hypercorn")
    config.errorlog.setLevel(logging.WARNING)
    config.alpn_protocols = ["http/1.1"]
    config.include_server_header = False
    config.h11_max_incomplete_size = 16 * 1024
    config.h2_max_concurrent_streams = 4
    config.backlog = BACKLOG
    config.ssl_handshake_timeout = HANDSHAKE
    config.keep_alive_timeout = KEEP_ALIVE
    config.graceful_timeout = DEFAULT_TIMEOUT + 5
    config.shutdown_timeout = DEFAULT_TIMEOUT + 5
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(partial(_broken, door))
    sweeping = loop.create_task(_sweep(door))
    try:
        await hypercorn_serve(
            application,  # type: ignore[arg-type]  # its types ask for TypedDicts; these are mappings
            config,
            mode="asgi",
            shutdown_trigger=stop,
        )
    finally:
        sweeping.cancel()
        application.close()
        watch.rest()


def _broken(door: Door, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody waited for; of a connection it is the client's doing, and worth no traceback."""
    error = context.get("exception")
    of_a_connection = "client_connected_cb" in context.get("message", "")
    if not of_a_connection:
        loop.default_exception_handler(context)
    elif not isinstance(error, OSError):  # it hung up, or encrypted something else
        door.broke(error)


async def _sweep(door: Door) -> None:
    while True:
        watch.beat()
        await asyncio.sleep(SWEEP)
        door.sweep()
