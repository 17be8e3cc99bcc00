"""Asks an exporter as Prometheus does, and as nobody should."""

import contextlib
import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from bench.soaking.course import Scrape

_UP = re.compile(rb"^pg_up ([01])$", re.M)
_REASON = re.compile(rb'^pg_down_reason\{reason="(\w+)"\} 1$', re.M)


class Clients:
    """Threads that ask until they are told to stop."""

    def __init__(self, port: int, clock: Callable[[], float], found: list[Scrape]) -> None:
        self._port = port
        self._clock = clock
        self._found = found
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def polite(self, targets: Sequence[str], every: float, timeout: float) -> None:
        """Ask for one target after the other over a kept connection, each so often."""
        self._start(lambda: self._polite(targets, every, timeout))

    def hang_up(self, targets: Sequence[str], chance: random.Random) -> None:
        """Ask, and go before the answer has come, with FIN or RST."""
        self._start(lambda: self._hang_up(targets, chance))

    def half_close(self, targets: Sequence[str], chance: random.Random) -> None:
        """Ask, say that nothing more follows, and read the answer all the same."""
        self._start(lambda: self._half_close(targets, chance))

    def read_slowly(self, targets: Sequence[str], chance: random.Random) -> None:
        """Ask, and read a little at a time until nothing more comes or all patience ends."""
        self._start(lambda: self._read_slowly(targets, chance))

    def stop(self) -> None:
        """Let those who wait for an answer have it, then end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _polite(self, targets: Sequence[str], every: float, timeout: float) -> None:
        connection: http.client.HTTPConnection | None = None
        due = time.monotonic()
        while True:
            for target in targets:
                if self._stop.wait(max(0.0, due - time.monotonic())):
                    return
                # Who is behind does not make up for it: Prometheus leaves scrapes out as well.
                due = max(due + every / len(targets), time.monotonic())
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
                scrape = self._ask(connection, target, timeout)
                if not scrape.status:
                    connection = None
                self._found.append(scrape)

    def _ask(self, connection: http.client.HTTPConnection, target: str, timeout: float) -> Scrape:
        headers = {
            "Accept": "text/plain",
            "X-Prometheus-Scrape-Timeout-Seconds": str(timeout),
        }
        at, begun = self._clock(), time.monotonic()
        try:
            connection.request("GET", _path(target), headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            seconds = time.monotonic() - begun
            return Scrape(at, target, seconds, timeout, 0, None, type(error).__name__)
        seconds = time.monotonic() - begun
        up, reason = _UP.search(body), _REASON.search(body)
        return Scrape(
            at,
            target,
            seconds,
            timeout,
            answer.status,
            up[1] == b"1" if up else None,
            reason[1].decode() if reason else "",
        )

    def _hang_up(self, targets: Sequence[str], chance: random.Random) -> None:
        while not self._stop.wait(chance.uniform(0.2, 2)):
            with self._asked(chance.choice(targets)) as client:
                self._stop.wait(chance.uniform(0, 0.1))
                if chance.random() < 0.5:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def _half_close(self, targets: Sequence[str], chance: random.Random) -> None:
        while not self._stop.wait(chance.uniform(1, 4)):
            with self._asked(chance.choice(targets)) as client:
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536) and not self._stop.is_set():
                    pass

    def _read_slowly(self, targets: Sequence[str], chance: random.Random) -> None:
        while not self._stop.wait(chance.uniform(1, 4)):
            end = time.monotonic() + chance.uniform(1, 45)
            with self._asked(chance.choice(targets), buffer=4096) as client:
                while time.monotonic() < end and client.recv(1024):
                    if self._stop.wait(0.25):
                        return

    @contextlib.contextmanager
    def _asked(self, target: str, buffer: int = 0) -> Iterator[socket.socket]:
        with socket.socket() as client, contextlib.suppress(OSError):
            if buffer:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            client.settimeout(30)
            client.connect(("127.0.0.1", self._port))
            client.sendall(f"GET {_path(target)} HTTP/1.1\r\nHost: soak\r\n\r\n".encode())
            yield client


def _path(target: str) -> str:
    return f"/probe?target={target}" if target else "/metrics"
