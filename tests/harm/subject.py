"""Runs any exporter as a process of its own and scrapes it as Prometheus would."""

import contextlib
import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from psycopg.conninfo import conninfo_to_dict

from lab.exporter import Page
from lab.ports import free_port

_START_SECONDS = 20.0
_OWN_VARIABLES = ("PG", "DATA_SOURCE_", "PGVIGIL_")


@dataclass(frozen=True)
class Subject:
    """An exporter that can be started on a server.

    In `command`, `environment` and the text of `queries`, `{port}` stands for where to listen on
    127.0.0.1, `{dsn}` for the connection string, `{uri}` for the same as a URI, `{folder}` for a
    directory of this run.
    """

    name: str
    version: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    path: str = "/metrics"
    queries: tuple[str, str] | None = None
    """The option that takes a user's own queries, and a file of them with `{sql}` in it; the
    statement has a column `number` that is a label and a column `value`."""

    @classmethod
    def told(cls, name: str, command: str, variables: Sequence[str] = ()) -> Self:
        """A subject as a command line describes it; raises ValueError for an odd variable."""
        environment = {}
        for variable in variables:
            key, found, value = variable.partition("=")
            if not found:
                raise ValueError(f"{variable!r} is not NAME=VALUE")
            environment[key] = value
        return cls(name, "", shlex.split(command), environment)


PGVIGIL = Subject(
    "pgvigil",
    "",
    [sys.executable, "-m", "pgvigil", "serve", "--listen", "127.0.0.1:{port}"],
    {"PGVIGIL_DSN": "{dsn}"},
    queries=(
        "--catalogue={folder}/own.yml",
        """own:
  why: Somebody wrote it.
  timeout: 1s
  max_series: 100
  labels: [number]
  sql: |
    {sql}
  metrics: {{pg_own_value: {{column: value, type: gauge, help: A value.}}}}
""",
    ),
)


@dataclass(frozen=True)
class Answer:
    """One scrape: what came back, or why nothing did."""

    begun: float
    """On the monotonic clock, as the end."""
    ended: float
    page: Page | None
    fault: str = ""
    """Empty when there is a page."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.begun

    @property
    def up(self) -> float | None:
        """What the page says of the server; None when it says nothing."""
        found = self.page.series("pg_up") if self.page else {}
        return max(found.values()) if found else None


class Running:
    """A subject's process, and the way to ask it."""

    def __init__(
        self, subject: Subject, conninfo: str, timeout: float, sql: str | None = None
    ) -> None:
        """Start it with `timeout` seconds for each scrape; RuntimeError when it does not listen.

        `sql` is a query of the user's own.
        """
        self.subject = subject
        self.port = free_port()
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="harm-")
        self._log = Path(self._folder.name, "log")
        words = {
            "port": str(self.port),
            "dsn": conninfo,
            "uri": _uri(conninfo),
            "folder": self._folder.name,
        }
        command = [_filled(word, words) for word in subject.command]
        if sql is not None:
            assert subject.queries
            option, text = subject.queries
            Path(self._folder.name, "own.yml").write_text(text.format(sql=sql))
            command.append(_filled(option, words))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(_OWN_VARIABLES)}
        ours = {name: _filled(value, words) for name, value in subject.environment.items()}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**clean, "HOME": self._folder.name, **ours},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + _START_SECONDS
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > end:
                told = self.log[-1000:]
                self.stop()
                raise RuntimeError(f"{subject.name} does not listen: {told}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """All it has written."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def scrape(self, timeout: float | None = None) -> Answer:
        """Ask for the page; who does not have it whole in time has no answer, as in Prometheus."""
        allowed = timeout or self._timeout
        begun = time.monotonic()
        page, fault = None, ""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=allowed)
        with contextlib.closing(connection):
            try:
                page = self._read(connection, begun + allowed, allowed)
            except TimeoutError:
                fault = f"no answer in {allowed:g} s"
            except (OSError, http.client.HTTPException) as error:
                fault = f"{type(error).__name__}: {error}"
            except ValueError as error:
                fault = str(error) if isinstance(error, _Status) else f"it does not parse: {error}"
        return Answer(begun, time.monotonic(), page, fault)

    def _read(self, connection: http.client.HTTPConnection, end: float, allowed: float) -> Page:
        headers = {"Accept": "text/plain", "X-Prometheus-Scrape-Timeout-Seconds": f"{allowed:g}"}
        connection.request("GET", self.subject.path, headers=headers)
        response = connection.getresponse()
        body = bytearray()
        # A slow trickle must not count as an answer in time.
        while chunk := response.read1(65536):
            body += chunk
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if connection.sock is not None:
                connection.sock.settimeout(left)
        if response.status != 200:
            raise _Status(f"HTTP {response.status}: {bytes(body[:120]).decode(errors='replace')}")
        return Page(body.decode(), response.headers.get("Content-Type", "text/plain"))

    def sockets(self, port: int) -> int:
        """How many TCP connections it holds to a port of 127.0.0.1."""
        try:
            text = Path(f"/proc/{self.process.pid}/net/tcp").read_text()
            folder = Path(f"/proc/{self.process.pid}/fd")
            names = {os.readlink(path) for path in folder.iterdir()}
        except OSError:
            return 0
        far = f":{port:04X}"
        rows = (line.split() for line in text.splitlines()[1:])
        return sum(row[2].endswith(far) and f"socket:[{row[9]}]" in names for row in rows)

    def peak_memory(self) -> int:
        """The most bytes of memory that its process ever had in use; 0 when it has ended."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    def stop(self) -> None:
        """End it, kindly first."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._folder.cleanup()

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class _Status(ValueError):
    """The answer is not a 200."""


def _filled(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace("{" + word + "}", value)
    return text


def _uri(conninfo: str) -> str:
    """The lab's logins hold nothing that a URI must escape."""
    of = {key: str(value) for key, value in conninfo_to_dict(conninfo).items()}
    login = of["user"] + (f":{of['password']}" if "password" in of else "")
    return f"postgresql://{login}@{of['host']}:{of['port']}/{of['dbname']}?sslmode=disable"
