"""Runs exporters as processes and asks them as Prometheus does."""

import contextlib
import gzip
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.peer import Peer
from lab.ports import free_port

HEADERS = {
    # What Prometheus 3 sends when nobody configures it otherwise.
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "Accept-Encoding": "gzip",
    "User-Agent": "Prometheus/3.5.0",
}
_START_SECONDS = 60.0


class Page(NamedTuple):
    """One answer."""

    seconds: float
    """From the first byte sent to the last one received."""
    status: int
    media: str
    wire: bytes
    """The body as it came, compressed or not."""
    compressed: bool

    @property
    def body(self) -> bytes:
        """The text itself."""
        return gzip.decompress(self.wire) if self.compressed else self.wire

    @property
    def series(self) -> int:
        """How many samples the text holds."""
        return sum(1 for line in self.body.splitlines() if line and not line.startswith(b"#"))


class Client:
    """One kept connection to an exporter."""

    def __init__(self, port: int, timeout: float = 30) -> None:
        """Tell it that Prometheus waits for `timeout` seconds."""
        self._headers = {**HEADERS, "X-Prometheus-Scrape-Timeout-Seconds": f"{timeout:g}"}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, path: str) -> Page:
        """Ask for a page; raises OSError or HTTPException."""
        begun = time.perf_counter()
        self._connection.request("GET", path, headers=self._headers)
        answer = self._connection.getresponse()
        wire = answer.read()
        return Page(
            time.perf_counter() - begun,
            answer.status,
            answer.headers.get("Content-Type", ""),
            wire,
            answer.headers.get("Content-Encoding") == "gzip",
        )

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Exporter:
    """A running exporter and our connection to it."""

    def __init__(self, name: str, pid: int, port: int) -> None:
        self.name = name
        self.pid = pid
        self.port = port
        self._client = Client(port)

    def scrape(self, path: str = "/metrics") -> Page:
        """Ask for a page and raise RuntimeError when it is not whole."""
        page = self._client.ask(path)
        if page.status != 200:
            raise RuntimeError(f"{self.name} answered {page.status}: {page.body[:300]!r}")
        return page


OURS = "pgvigil"
PEER = "postgres_exporter"


@contextlib.contextmanager
def pgvigil(
    dsn: str | None, *words: str, catalogue: Path | None = None, name: str = OURS
) -> Iterator[Exporter]:
    """Run pgvigil of this checkout, on one server unless the words name a configuration.

    With a catalogue of its own it has the peer's number of series, which it would not show unasked.
    """
    port = free_port()
    command = [sys.executable, "-m", "pgvigil", "serve", f"--listen=127.0.0.1:{port}", *words]
    with tempfile.TemporaryDirectory() as folder:
        if catalogue:
            path = Path(folder, "pgvigil.yml")
            target = {"dsn": dsn, "max_series": 1_000_000}
            path.write_text(json.dumps({"targets": {"bench": target}}))  # JSON is YAML
            command += [f"--config={path}", f"--catalogue={catalogue}"]
        variables = {"PGVIGIL_DSN": dsn} if dsn and not catalogue else {}
        with _running(name, command, port, variables) as exporter:
            yield exporter


@contextlib.contextmanager
def postgres_exporter(peer: Peer, dsn: str | None, *words: str) -> Iterator[Exporter]:
    """Run the peer with its default collectors."""
    port = free_port()
    command = [str(peer.program), f"--web.listen-address=127.0.0.1:{port}", *words]
    with _running(PEER, command, port, {"DATA_SOURCE_NAME": dsn} if dsn else {}) as exporter:
        yield exporter


@contextlib.contextmanager
def _running(
    name: str, command: Sequence[str], port: int, variables: Mapping[str, str]
) -> Iterator[Exporter]:
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("PG", "DATA_SOURCE"))
    }
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, env={**inherited, **variables}, stdout=log, stderr=log
        ) as process,
    ):
        try:
            end = time.monotonic() + _START_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{name} did not start: {log.read().decode()[-1000:]}")
                time.sleep(0.02)
            yield Exporter(name, process.pid, port)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
