"""Starts the exporter as users do, as a process, and reads what it serves."""

import base64
import contextlib
import http.client
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text

from lab.ports import free_port

_OWN_VARIABLES = ("PG", "DATA_SOURCE_", "PGVIGIL_")


class Response(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class Page:
    """The samples of one scrape, as prometheus_client's parser reads them."""

    def __init__(self, body: str, media: str) -> None:
        """Raise ValueError when the body is not of the format that the media type names."""
        self.body = body
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        parse = openmetrics if media.startswith("application/openmetrics-text") else text
        for family in parse(body):
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                if key in self.samples:
                    raise ValueError(f"the series stands twice: {key}")
                self.samples[key] = sample.value

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {name for name, _ in self.samples}

    def series(self, name: str, /, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
        """The samples of a metric that have these labels, by all their labels."""
        wanted = labels.items()
        return {
            have: value
            for (metric, have), value in self.samples.items()
            if metric == name and wanted <= have
        }

    def value(self, name: str, /, **labels: str) -> float:
        """The value of the one series that fits; raises LookupError when there is not just one."""
        found = self.series(name, **labels)
        if len(found) != 1:
            raise LookupError(f"{name}{labels}: {len(found)} series")
        return next(iter(found.values()))

    @property
    def reason(self) -> str | None:
        """Why the server is down, or None."""
        holds = [dict(k)["reason"] for k, v in self.series("pg_down_reason").items() if v == 1]
        return holds[0] if holds else None

    def failed(self) -> set[str]:
        """The queries whose last run failed."""
        return {dict(k)["query"] for k, v in self.series("pgvigil_query_success").items() if not v}


class Exporter:
    """A `pgvigil serve` on a free port of 127.0.0.1, started with nothing but what is given."""

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        through: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        login: tuple[str, str] | None = None,
    ) -> None:
        """Start it and return when it listens; RuntimeError with its log when it ends instead.

        `port` is a free one when not told. `through` is a program that starts it. With `tls` it is
        asked over HTTPS, with `login` by a user and a password.
        """
        self.port = port or free_port()
        self.tls = tls
        self.login = login
        self._directory = tempfile.TemporaryDirectory(prefix="pgvigil-exporter-")
        self._log = Path(self._directory.name, "log")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(_OWN_VARIABLES)}
        self.command = [*through, sys.executable, "-m", "pgvigil", "serve"]
        self.command += ["--listen", f"127.0.0.1:{self.port}", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env={**clean, "HOME": self._directory.name, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def __enter__(self) -> Self:
        """Return the running exporter; it is stopped at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """All it has written to its standard output and error."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
        method: str = "GET",
    ) -> Response:
        """Ask for a path over a connection of its own."""
        connection = self.connection(timeout)
        told = dict(headers or {})
        if self.login:
            word = base64.b64encode(":".join(self.login).encode()).decode()
            told.setdefault("Authorization", f"Basic {word}")
        with contextlib.closing(connection):
            connection.request(method, path, headers=told)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Response(response.status, names, response.read())

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        """A new connection to it, for many requests."""
        if self.tls:
            return http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=timeout, context=self.tls
            )
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def scrape(
        self, target: str | None = None, *, accept: str = "text/plain", timeout: float = 10
    ) -> Page:
        """Scrape as Prometheus does: it tells its timeout and gives up then; the answer is 200."""
        headers = {"Accept": accept, "X-Prometheus-Scrape-Timeout-Seconds": str(timeout)}
        path = "/metrics" if target is None else f"/probe?target={target}"
        response = self.get(path, headers, timeout)
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {response.body[:200]!r}")
        return Page(response.body.decode(), response.headers["content-type"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self._directory.cleanup()
        return code

    def _wait_until_it_listens(self) -> None:
        for _ in self._patience():
            if self.process.poll() is not None:
                raise RuntimeError(f"the exporter ended with {self.process.returncode}: {self.log}")
            with contextlib.suppress(ConnectionRefusedError):
                self.get("/livez")
                return

    def _patience(self) -> Iterator[None]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            yield
            time.sleep(0.02)
        raise RuntimeError(f"the exporter does not listen: {self.log}")
