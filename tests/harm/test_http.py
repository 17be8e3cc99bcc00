"""Clients that attack over HTTP harm nobody: scrapes go on, and nothing of them stays behind."""

import contextlib
import http.client
import json
import resource
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter

SERIES = 40_000
MANY = f"""
many:
  why: Its page is too big for any buffer on the way.
  max_series: {SERIES}
  labels: [word]
  sql: select repeat('x', 60) || n as word, n from pg_catalog.generate_series(1, {SERIES}) as n
  metrics: {{pg_own_many: {{column: n, type: gauge, help: A number.}}}}
"""
PATIENCE = 42.0
"""Seconds after which no attacker may hold a connection: 30 to read an answer, 20 to ask, and the
look at who overstays, with room for a machine that is busy."""

ASK = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTH = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
WEBSOCKET = (
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
H2C = (
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
)


def hung_up(client: socket.socket, seconds: float, *, reading: bool = True) -> bool:
    """Wait until the other end hangs up; what it says before is read, or left where it is."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP | (select.POLLIN if reading else 0))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _, events in poll.poll(100):
            if events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return True
            if reading and not client.recv(65536):
                return True
            if not reading and events & select.POLLRDHUP:
                return True
    return False


Attack = Callable[[socket.socket], None]
"""Returns, or raises OSError, when the other end has hung up; TimeoutError when it does not."""


def says(words: bytes, *, reading: bool = True) -> Attack:
    """Say something, then nothing."""

    def attack(client: socket.socket) -> None:
        client.sendall(words)
        if not hung_up(client, PATIENCE, reading=reading):
            raise TimeoutError

    return attack


def drips(start: bytes, drop: bytes) -> Attack:
    """Say a little now and then, so that it never ends."""

    def attack(client: socket.socket) -> None:
        client.sendall(start)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            client.sendall(drop)
            if hung_up(client, 1):
                return
        raise TimeoutError

    return attack


def pours(start: bytes, drop: bytes) -> Attack:
    """Say as much as the other end takes, without an end."""

    def attack(client: socket.socket) -> None:
        client.sendall(start)
        client.settimeout(0.5)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                client.sendall(drop)
        raise TimeoutError

    return attack


def sips(client: socket.socket) -> None:
    """Ask for the page, and read a byte each second."""
    client.sendall(ASK)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if hung_up(client, 1, reading=False):
            return
        client.recv(1)
    raise TimeoutError


def speaks_tls(client: socket.socket) -> None:
    context = ssl.create_default_context()
    client.settimeout(PATIENCE)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(client, server_hostname="x")


def half_closes(client: socket.socket) -> None:
    """Ask, and say that nothing more comes: the whole answer is due."""
    client.sendall(ASK)
    client.shutdown(socket.SHUT_WR)
    client.settimeout(PATIENCE)
    with http.client.HTTPResponse(client) as response:
        response.begin()
        assert response.status == 200
        assert response.read().count(b"\npg_own_many{") == SERIES
    if not hung_up(client, PATIENCE):
        raise TimeoutError


CHUNKED = b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n"
ATTACKS: dict[str, tuple[int, Attack]] = {
    "never reads": (20, says(ASK, reading=False)),
    "never reads what it asked a thousand times": (5, says(ASK * 1000, reading=False)),
    "never reads small answers": (5, says(HEALTH * 20_000, reading=False)),
    "reads a byte a second": (10, sips),
    "drips headers": (10, drips(b"GET /metrics HTTP/1.1\r\n", b"X: y\r\n")),
    "drips a header": (5, drips(b"GET /metrics HTTP/1.1\r\nX: ", b"y")),
    "drips headers after a request": (5, drips(HEALTH + b"GET / HTTP/1.1\r\n", b"X: y\r\n")),
    "drips a body": (5, drips(CHUNKED, b"1\r\nx\r\n")),
    "drips a body that is posted": (5, drips(CHUNKED.replace(b"GET", b"POST"), b"1\r\nx\r\n")),
    "pours headers": (5, pours(b"GET /metrics HTTP/1.1\r\n", b"X: y\r\n" * 5000)),
    "pours a header": (5, pours(b"GET /metrics HTTP/1.1\r\nX: ", b"y" * 65536)),
    "pours an address": (5, pours(b"GET /", b"y" * 65536)),
    "pours a body": (5, pours(LONG + b"\r\n", b"y" * 65536)),
    "pours a body of small pieces": (5, pours(CHUNKED, b"1\r\nx\r\n" * 10_000)),
    "pours a body that is expected": (
        5,
        pours(LONG + b"Expect: 100-continue\r\n\r\n", b"y" * 65536),
    ),
    "pours nothing": (5, pours(b"", b"\0" * 65536)),
    "pours empty lines": (5, pours(b"", b"\r\n" * 30_000)),
    "speaks HTTP/0.9": (5, says(b"GET /metrics\r\n")),
    "speaks HTTP/2": (5, says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")),
    "would rather speak HTTP/2": (5, says(H2C)),
    "speaks WebSocket": (5, says(WEBSOCKET)),
    "speaks no WebSocket": (5, says(WEBSOCKET.replace(b"Key", b"Quay"))),
    "speaks TLS": (5, speaks_tls),
    "half closes": (5, half_closes),
    "is idle": (300, says(b"")),
}


def attack(port: int, play: Attack) -> float:
    """Attack, and return the seconds until the other end hung up; infinity where it does not."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        begun = time.monotonic()
        try:
            play(client)
        except TimeoutError:
            return float("inf")
        except ConnectionError:
            pass
        return time.monotonic() - begun


def hangs_up_at_every_stage(port: int, stop: Event) -> int:
    """Hang up again and again, politely or not, after all that a client may say and read."""
    count = 0
    while not stop.wait(0.02):
        for said in (b"", b"GET", ASK[:-2], ASK, ASK * 3, CHUNKED + b"5\r\nab", WEBSOCKET, H2C):
            for politely in (True, False):
                with socket.create_connection(("127.0.0.1", port)) as client:
                    if not politely:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    client.sendall(said)
                    if count % 3 == 0 and said.startswith(ASK):
                        with contextlib.suppress(ConnectionError):
                            client.recv(1000)
                count += 1
    return count


def descriptors(exporter: Exporter) -> int:
    return len(list(Path(f"/proc/{exporter.process.pid}/fd").iterdir()))


def resident(exporter: Exporter) -> int:
    """Bytes."""
    pages = Path(f"/proc/{exporter.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def log_lines(exporter: Exporter) -> list[dict[str, object]]:
    """What was logged; a line that is no JSON, as of a traceback, fails."""
    return [json.loads(line) for line in exporter.log.splitlines()]


@pytest.fixture
def exporter(cluster: Cluster, tmp_path: Path) -> Iterator[Exporter]:
    """One with a page of four megabytes."""
    queries, targets = tmp_path / "own.yml", tmp_path / "pgvigil.yml"
    queries.write_text(MANY)
    target = {"dsn": cluster.primary.conninfo(**PGVIGIL.login), "max_series": 2 * SERIES}
    targets.write_text(json.dumps({"targets": {"main": target}}))
    with Exporter("--config", str(targets), "--catalogue", str(queries)) as started:
        for _ in range(3):
            started.scrape()
        yield started


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.1)


@pytest.mark.parametrize("major", [17])
def test_attackers_of_every_kind_at_once_harm_no_scrape_and_leave_nothing_behind(
    exporter: Exporter,
) -> None:
    before, memory, lines = descriptors(exporter), resident(exporter), len(log_lines(exporter))
    plays = [(kind, play) for kind, (count, play) in ATTACKS.items() for _ in range(count)]
    stop = Event()
    most = 0
    with ThreadPoolExecutor(len(plays) + 1) as pool:
        hanging_up = pool.submit(hangs_up_at_every_stage, exporter.port, stop)
        attacks = [(kind, pool.submit(attack, exporter.port, play)) for kind, play in plays]
        try:
            scrapes = 0
            while not all(future.done() for _, future in attacks):
                response = exporter.get("/metrics", timeout=10)
                assert response.status == 200
                assert b"\npg_up 1\n" in response.body
                assert response.body.count(b"\npg_own_many{") == SERIES
                assert exporter.get("/livez", timeout=10).status == 200
                scrapes += 1
                most = max(most, resident(exporter))
                time.sleep(0.5)
        finally:
            stop.set()
        assert hanging_up.result() > 100
    lived: dict[str, float] = {}
    for kind, future in attacks:
        lived[kind] = max(lived.get(kind, 0.0), future.result())
    assert max(lived.values()) < PATIENCE, lived
    assert scrapes > 10
    # A page of four megabytes lives as long as it is read; without a bound this would be five
    # gigabytes.
    assert most < memory + 600e6
    # The background may have two connections by now that it had not before.
    wait_until(lambda: descriptors(exporter) <= before + 2, 40)
    exporter.process.terminate()  # whoever was forgotten would hold it up, and show in its log
    assert exporter.process.wait(30) == 0
    new = log_lines(exporter)[lines:]
    assert [line for line in new if line["level"] == "error"] == []
    assert len(new) < 10
    assert any("put out" in str(line["event"]) for line in new)


@pytest.mark.parametrize("major", [17])
def test_without_a_descriptor_left_scrapes_go_on_and_newcomers_are_let_in(
    exporter: Exporter,
) -> None:
    kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=10)

    def scrape() -> bytes:
        kept.request("GET", "/metrics")
        return kept.getresponse().read()

    with contextlib.closing(kept), contextlib.ExitStack() as idle:
        assert b"\npg_up 1\n" in scrape()
        opened = kept.sock
        limit = descriptors(exporter) + 5
        resource.prlimit(exporter.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        for _ in range(100):
            idle.enter_context(socket.create_connection(("127.0.0.1", exporter.port)))
        wait_until(lambda: descriptors(exporter) == limit, 10)
        for _ in range(3):
            assert b"\npg_up 1\n" in scrape()
            assert exporter.scrape().value("pg_up") == 1
        assert kept.sock is opened
    wait_until(lambda: descriptors(exporter) < limit, 10)
    assert exporter.scrape().value("pg_up") == 1
    lines = log_lines(exporter)
    assert [line for line in lines if line["level"] == "error"] == []
    assert len(lines) < 20


@pytest.mark.parametrize("major", [17])
def test_of_too_many_connections_the_oldest_that_never_asked_makes_room(
    exporter: Exporter,
) -> None:
    before = descriptors(exporter)
    clients = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(600)]
    try:
        assert exporter.scrape().value("pg_up") == 1
        wait_until(lambda: descriptors(exporter) <= before + 520, 10)
        assert hung_up(clients[0], 10)
        assert not hung_up(clients[-1], 0.2)
    finally:
        for client in clients:
            client.close()
