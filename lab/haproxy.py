"""Puts a real HAProxy before a Patroni cluster, which asks each member for its role."""

import csv
import io
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from lab import debian
from lab.binaries import account
from lab.patroni import Pair
from lab.ports import free_port

CONNECTION_LIMIT = 200
FRONTEND_LIMIT = 20
SERVER_LIMIT = 15


def program(suite: str) -> Path:
    """Fetch the HAProxy of a suite of Debian; raise RuntimeError when it cannot be had."""
    return debian.fetch(f"haproxy-{suite}", [suite], ["haproxy"], "usr/sbin") / "haproxy"


class HAProxy:
    """An HAProxy with the backends `primary` and `replica`, and its own metrics."""

    def __init__(
        self, program: Path, pair: Pair, ports: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Start it and return when it has checked its servers for the first time.

        `ports` are those by which it reaches members, by name, where they are not their own.
        """
        self._ports = {member.name: member.port for member in pair.members} | dict(ports)
        self.primary_port, self.replica_port, self.metrics_port = (free_port() for _ in range(3))
        self._directory = tempfile.TemporaryDirectory(prefix="pgvigil-haproxy-")
        self._log = Path(self._directory.name, "log")
        Path(self._directory.name).chmod(0o755)
        configuration = Path(self._directory.name, "haproxy.cfg")
        configuration.write_text(self._configured(pair))
        user, group = account() if os.getuid() == 0 else (None, None)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "-db", "-f", configuration],
                stdin=subprocess.DEVNULL,
                # HAProxy goes back to where it began, and its account may not enter every checkout.
                cwd=self._directory.name,
                stdout=log,
                stderr=log,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )
        try:
            self.wait_until("primary", 1)
            self.wait_until("replica", 1)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        """Return the running HAProxy; it is stopped at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._directory.cleanup()

    def stop(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def metrics(self) -> str:
        """The page that Prometheus scrapes."""
        return self._get("/metrics")

    def wait_until(self, backend: str, servers: int) -> None:
        """Return when a backend has so many servers that are up."""
        end = time.monotonic() + 30
        while (up := self._servers(backend)) != servers:
            if time.monotonic() > end or self._process.poll() is not None:
                log = self._log.read_text(errors="replace")
                raise RuntimeError(f"{backend} has {up} servers, not {servers}\n{log[-2000:]}")
            time.sleep(0.05)

    def connect(self, port: int) -> socket.socket:
        """A client's connection, which says nothing."""
        return socket.create_connection(("127.0.0.1", port), timeout=10)

    def _servers(self, backend: str) -> int | None:
        try:
            rows = csv.DictReader(io.StringIO(self._get("/stats;csv").removeprefix("# ")))
        except OSError:
            return None
        states = [
            row["status"]
            for row in rows
            if row["pxname"] == backend and row["svname"] not in ("FRONTEND", "BACKEND")
        ]
        # "UP 1/3" is a server that is up and fails its checks, "no check" one that has had none.
        return len([state for state in states if state.startswith("UP")])

    def _get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def _configured(self, pair: Pair) -> str:
        def backend(role: str) -> str:
            servers = "".join(
                f"  server {member.name} 127.0.0.1:{self._ports[member.name]}"
                f" maxconn {SERVER_LIMIT} check port {member.rest_port}\n"
                for member in pair.members
            )
            return (
                f"backend {role}\n  option httpchk OPTIONS /{role}\n"
                "  http-check expect status 200\n"
                "  default-server inter 200ms fall 2 rise 1 on-marked-down shutdown-sessions\n"
                f"{servers}"
            )

        return (
            f"global\n  maxconn {CONNECTION_LIMIT}\n"
            "defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 60s\n"
            "  timeout server 60s\n  timeout queue 60s\n  timeout check 500ms\n"
            f"frontend write\n  bind 127.0.0.1:{self.primary_port}\n  maxconn {FRONTEND_LIMIT}\n"
            "  default_backend primary\n"
            f"frontend read\n  bind 127.0.0.1:{self.replica_port}\n  default_backend replica\n"
            f"{backend('primary')}{backend('replica')}"
            f"frontend metrics\n  mode http\n  bind 127.0.0.1:{self.metrics_port}\n"
            "  http-request use-service prometheus-exporter if { path /metrics }\n"
            "  stats enable\n  stats uri /stats\n"
        )
