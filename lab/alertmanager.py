"""Runs a real Alertmanager, and takes what it sends to people."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from lab.ports import free_port

_GROUPING = {"group_wait": "100ms", "group_interval": "1s"}
"""In the place of the seconds and minutes for which alerts are gathered."""


def installed() -> Path | None:
    """The Alertmanager on PATH, as Debian calls it or as its makers do."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    return Path(program) if program else None


class Notice(NamedTuple):
    """One alert in one notification, as it came in."""

    at: float
    """By `time.monotonic`."""
    receiver: str
    status: str
    """`firing` or `resolved`."""
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def name(self) -> str:
        """What the alert is called."""
        return self.labels["alertname"]


class Inbox:
    """A webhook on a free port that keeps all that comes in, oldest first."""

    def __init__(self) -> None:
        """Listen from now on."""
        self.notices: list[Notice] = []
        notices = self.notices

        class _Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                now = time.monotonic()
                told = json.loads(body)
                notices.extend(
                    Notice(
                        now,
                        told["receiver"],
                        alert["status"],
                        alert["labels"],
                        alert["annotations"],
                    )
                    for alert in told["alerts"]
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where to send to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Alertmanager:
    """An Alertmanager of its own on a free port; whatever it would send goes to its inbox."""

    def __init__(self, program: Path, configuration: Path) -> None:
        """Start it and return when it is ready.

        Of the configuration, the receivers become the inbox and gathering takes a second; routes,
        inhibition and silences by time stay.
        """
        self.port = free_port()
        self._stack = contextlib.ExitStack()
        try:
            self._start(program, configuration)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, program: Path, configuration: Path) -> None:
        path = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pgvigil-am-")))
        self.inbox = Inbox()
        self._stack.callback(self.inbox.close)
        told = _delivered_to(self.inbox.url, yaml.safe_load(configuration.read_text()))
        for template in configuration.parent.glob("*.tmpl"):
            shutil.copy(template, path)
        (path / "alertmanager.yml").write_text(yaml.safe_dump(told))
        with (path / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={path}/alertmanager.yml",
                    f"--storage.path={path}/data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--cluster.listen-address=",
                ],
                stdout=log,
                stderr=log,
            )
        self._stack.callback(self._stop)
        end = time.monotonic() + 60
        while True:
            try:
                self._get("/-/ready")
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((path / "log").read_text()) from None
                time.sleep(0.05)
            else:
                return

    def __enter__(self) -> Self:
        """Return the running program; it is stopped and removed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def alerts(self) -> list[dict[str, str]]:
        """The labels of each alert that it holds, whether it is sent or held back."""
        found = json.loads(self._get("/api/v2/alerts"))
        return [alert["labels"] for alert in found]

    def held_back(self) -> list[dict[str, str]]:
        """The labels of each alert that another or a silence holds back."""
        found = json.loads(self._get("/api/v2/alerts?active=false"))
        return [alert["labels"] for alert in found]

    def fire(self, alerts: Sequence[Mapping[str, str]]) -> None:
        """Say, in the place of a Prometheus, that alerts with these labels fire."""
        body = json.dumps([{"labels": labels} for labels in alerts]).encode()
        self._get("/api/v2/alerts", body)

    def _stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def _get(self, path: str, body: bytes | None = None) -> str:
        """What it answers; a body is sent as JSON."""
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text: str = answer.read().decode()
            return text


def _delivered_to(url: str, configuration: dict[str, Any]) -> dict[str, Any]:
    hook = {"url": url, "send_resolved": True}
    configuration["receivers"] = [
        # Who is told nothing has a name only.
        {"name": receiver["name"], **({"webhook_configs": [hook]} if len(receiver) > 1 else {})}
        for receiver in configuration["receivers"]
    ]
    routes = [configuration["route"]]
    for route in routes:  # the list grows while it is walked
        route.update(
            _GROUPING if route is routes[0] else {k: v for k, v in _GROUPING.items() if k in route}
        )
        routes += route.get("routes", ())
    return configuration
