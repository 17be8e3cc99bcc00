"""Runs real Prometheus servers: the one that is installed, and where Debian has it a newer one."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

from lab.ports import free_port

CACHE = Path(__file__).parent.parent / ".cache" / "prometheus"
SUITE = "sid"
"""The Debian suite whose package is unpacked beside the system, when apt can fetch it."""


@dataclass(frozen=True)
class Installed:
    """A Prometheus program."""

    program: Path
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))


def installed() -> Installed | None:
    """The Prometheus on PATH."""
    program = shutil.which("prometheus")
    return _examined(Path(program)) if program else None


def newer() -> Installed | str:
    """A Prometheus 3 from Debian's packages, unpacked into the cache; or why there is none."""
    program = CACHE / "usr" / "bin" / "prometheus"
    if not program.exists() and (fault := _unpack()):
        return fault
    return _examined(program) or "the unpacked program does not run here"


def _examined(program: Path) -> Installed | None:
    try:
        told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    version = re.search(r"version (\d+)\.(\d+)\.(\d+)", told.stdout + told.stderr)
    return Installed(program, tuple(map(int, version.groups()))) if version else None


def _unpack() -> str | None:
    """Fetch the package with apt's own lists and state kept apart from the system's."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if not (shutil.which("apt-get") and sources.exists()):
        return "this is not a Debian with apt"
    mirror = re.search(r"^URIs:\s*(\S+)", sources.read_text(), re.M)
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not mirror or not keys.exists():
        return "apt's sources or keys are not where they were looked for"
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        work.chmod(0o755)
        for part in ("lists/partial", "cache/archives/partial", "sources", "preferences"):
            (work / part).mkdir(parents=True)
        (work / "status").touch()
        (work / "sources" / "suite.sources").write_text(
            f"Types: deb\nURIs: {mirror[1]}\nSuites: {SUITE}\nComponents: main\nSigned-By: {keys}\n"
        )
        (work / "apt.conf").write_text(
            'Dir::Etc::sourcelist "/dev/null";\n'
            f'Dir::Etc::sourceparts "{work}/sources";\n'
            f'Dir::Etc::preferencesparts "{work}/preferences";\n'
            f'Dir::State::lists "{work}/lists";\nDir::State::status "{work}/status";\n'
            f'Dir::Cache "{work}/cache";\nAPT::Sandbox::User "root";\n'
        )
        environment = {**os.environ, "APT_CONFIG": f"{work}/apt.conf"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "download", "-qq", "prometheus"]):
            done = subprocess.run(
                command, cwd=work, env=environment, capture_output=True, text=True, timeout=300
            )
            if done.returncode:
                return f"{' '.join(command)}: {done.stderr.strip()[-300:]}"
        package = next(work.glob("prometheus_*.deb"))
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", package, CACHE], check=True)
    return None


class Prometheus:
    """A Prometheus of its own on a free port, scraping each second what it was told."""

    def __init__(
        self,
        program: Installed,
        jobs: Sequence[Mapping[str, Any]],
        rules: Sequence[Path] = (),
        every: str = "1s",
        alertmanager: int | None = None,
    ) -> None:
        """Start it and return when it is ready; rules run as often as it scrapes.

        `alertmanager` is the port of the one that it tells.
        """
        self.version = program.version
        self.port = free_port()
        self._directory = tempfile.TemporaryDirectory(prefix="pgvigil-prometheus-")
        path = Path(self._directory.name)
        told = [f"127.0.0.1:{alertmanager}"] if alertmanager else []
        (path / "prometheus.yml").write_text(
            json.dumps(  # JSON is YAML
                {
                    "alerting": {"alertmanagers": [{"static_configs": [{"targets": told}]}]},
                    "global": {
                        "scrape_interval": every,
                        "scrape_timeout": every,
                        "evaluation_interval": every,
                    },
                    "rule_files": [str(path) for path in rules],
                    "scrape_configs": list(jobs),
                }
            )
        )
        with (path / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program.program,
                    f"--config.file={path}/prometheus.yml",
                    f"--storage.tsdb.path={path}/data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            for _ in _patience("Prometheus is not ready"):
                try:
                    self._ask("/-/ready")
                    break
                except (urllib.error.URLError, ConnectionError):
                    if self.process.poll() is not None:
                        raise RuntimeError(self.log) from None
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        """Return the running server; it is stopped and removed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)
        self._directory.cleanup()

    @property
    def log(self) -> str:
        """What it has written."""
        return Path(self._directory.name, "log").read_text(errors="replace")

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series of an instant query, asked as Grafana asks."""
        form = urlencode({"query": expression}).encode()
        answer = json.loads(self._ask("/api/v1/query", form))
        return [(found["metric"], float(found["value"][1])) for found in answer["data"]["result"]]

    def values(self, label: str, selector: str) -> list[str]:
        """The values of a label on the series that a selector finds."""
        found: list[str] = json.loads(
            self._ask(f"/api/v1/label/{label}/values?match[]={quote(selector)}")
        )["data"]
        return found

    def wait_until(self, expression: str) -> None:
        """Return when a query gives something; the first scrape comes some seconds after start."""
        for _ in _patience(f"Prometheus never saw {expression}"):
            if self.query(expression):
                return

    def rules(self) -> list[dict[str, Any]]:
        """What Prometheus says of each rule: its name, health and last error."""
        groups = json.loads(self._ask("/api/v1/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def alerts(self) -> list[dict[str, str]]:
        """The labels of each alert that fires."""
        found = json.loads(self._ask("/api/v1/alerts"))["data"]["alerts"]
        return [alert["labels"] for alert in found if alert["state"] == "firing"]

    def wait_for_alert(self, name: str, **labels: str) -> dict[str, str]:
        """Return the labels of an alert that has these as soon as it fires."""
        for _ in _patience(f"{name} {labels} never fired"):
            for alert in self.alerts():
                if alert["alertname"] == name and labels.items() <= alert.items():
                    return alert
        raise AssertionError

    def wait_until_resolved(self, *names: str, but: str = "") -> None:
        """Return when no alert of these names fires; without names, none but the one excepted."""
        end = time.monotonic() + 60
        while firing := [
            alert
            for alert in self.alerts()
            if alert["alertname"] in (names or {alert["alertname"]} - {but})
        ]:
            if time.monotonic() > end:
                raise RuntimeError(f"still firing: {firing}")
            time.sleep(0.1)

    def targets(self) -> list[dict[str, Any]]:
        """What Prometheus says of each target it scrapes."""
        found: list[dict[str, Any]] = json.loads(self._ask("/api/v1/targets"))["data"][
            "activeTargets"
        ]
        return found

    def _ask(self, path: str, form: bytes | None = None) -> str:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, form, timeout=30) as answer:
            text: str = answer.read().decode()
            return text


def _patience(complaint: str) -> Iterator[None]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        yield
        time.sleep(0.1)
    raise RuntimeError(complaint)
