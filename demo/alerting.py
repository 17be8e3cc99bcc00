"""Runs Prometheus with our rules, and Alertmanager with our example, where they are installed."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml

from demo import summary
from demo.program import Program, ProgramError, free_port
from lab import alertmanager, prometheus
from lab.binaries import account

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS_PORT = 9090
ALERTMANAGER_PORT = 9093
INSTANCE = "demo"
"""What the exporter's target is called on the dashboards and in the alerts."""

_EVERY = "5s"
"""Oftener than anybody would scrape a server of his own: here people wait for it."""
_NAMED = 5

_NOT_FOUND = (
    "not found, so no alerts are shown: apt install prometheus prometheus-alertmanager "
    "brings it (docs/alerting.md)"
)


@dataclass(frozen=True)
class Alerting:
    """What runs, or why nothing does."""

    programs: tuple[Program, ...] = ()
    """Prometheus, and Alertmanager where there is one."""
    missing: str = _NOT_FOUND

    def rows(self) -> list[tuple[str, str]]:
        """What is where, in lines of a name and what is to be said."""
        if not self.programs:
            return [("Prometheus", self.missing)]
        prometheus, *others = (f"http://127.0.0.1:{program.port}" for program in self.programs)
        return [
            ("Prometheus", f"{prometheus}/alerts, with all of rules/"),
            *[("Alertmanager", f"{other}/, which sends to nobody") for other in others],
            ("Grafana", f"yours: a data source of type Prometheus at {prometheus},"),
            ("", "and grafana/*.json to import, or grafana/provisioning (docs/dashboards.md)"),
        ]

    def describe(self) -> list[str]:
        """Which alerts fire and which are about to, a line for each; none without Prometheus."""
        if not self.programs:
            return []
        try:
            answer = json.loads(summary.fetch(self.programs[0].port, "/api/v1/alerts"))
        except (OSError, HTTPException) as error:
            return [summary.line("alerts", f"unknown: Prometheus does not answer ({error})")]
        found = [(alert["state"], alert["labels"]) for alert in answer["data"]["alerts"]]
        return [
            summary.line(f"alerts {state}", _named([of for now, of in found if now == state]))
            for state in ("firing", "pending")
        ]


def start(directory: Path, exporter: Program, undo: ExitStack) -> Alerting:
    """Start what is installed, with all it writes in the directory; `undo` ends it."""
    found = prometheus.installed()
    if found is None:
        return Alerting()
    place = directory / "prometheus"
    place.mkdir()
    shutil.copytree(ROOT / "rules", place / "rules", ignore=shutil.ignore_patterns("tests"))
    programs = []
    try:
        told = []
        if program := alertmanager.installed():
            told = [_alertmanager(program, place, undo)]
        programs = [_prometheus(found.program, place, exporter, told, undo), *told]
        for one in programs:
            one.wait()
    except (OSError, ProgramError) as error:
        for one in programs:
            one.stop()
        return Alerting(missing=f"not started: {error}")
    return Alerting(tuple(programs))


def _prometheus(
    program: Path, place: Path, exporter: Program, told: list[Program], undo: ExitStack
) -> Program:
    scraped = {"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"instance": INSTANCE}}
    alertmanagers = [{"targets": [f"127.0.0.1:{one.port}" for one in told]}]
    configuration = {
        "global": {"scrape_interval": _EVERY, "evaluation_interval": _EVERY},
        "rule_files": [f"{place}/rules/*.yml"],
        "alerting": {"alertmanagers": [{"static_configs": alertmanagers}]},
        "scrape_configs": [{"job_name": "postgresql", "static_configs": [scraped]}],
    }
    return _start("Prometheus", program, place, configuration, "tsdb.", PROMETHEUS_PORT, undo)


def _alertmanager(program: Path, place: Path, undo: ExitStack) -> Program:
    """Our example, its receivers without a destination."""
    configuration = yaml.safe_load((ROOT / "alertmanager" / "alertmanager.yml").read_text())
    configuration["receivers"] = [{"name": of["name"]} for of in configuration["receivers"]]
    options = ("--cluster.listen-address=",)
    return _start(
        "Alertmanager", program, place, configuration, "", ALERTMANAGER_PORT, undo, *options
    )


def _start(
    name: str,
    program: Path,
    place: Path,
    configuration: Mapping[str, Any],
    storage: str,
    wanted: int,
    undo: ExitStack,
    *options: str,
) -> Program:
    path, data, port = place / f"{name}.yml", place / name, free_port(wanted)
    path.write_text(json.dumps(configuration))  # JSON is YAML
    data.mkdir()
    user: tuple[int | None, int | None] = None, None
    if os.getuid() == 0:
        user = account()
        for made in (place, data):
            os.chown(made, *account())
    running = Program(
        name,
        [
            program,
            f"--config.file={path}",
            f"--storage.{storage}path={data}",
            f"--web.listen-address=127.0.0.1:{port}",
            *options,
        ],
        port,
        "/-/ready",
        place / f"{name}.log",
        account=user,
    )
    undo.callback(running.stop)
    return running


def _named(alerts: list[Mapping[str, str]]) -> str:
    """What they are called, those first that wake somebody."""
    pages, tickets = (
        {labels["alertname"] for labels in alerts if labels.get("severity") == severity}
        for severity in ("page", "ticket")
    )
    names = [f"{name} (page)" for name in sorted(pages)] + sorted(tickets - pages)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) + more) or "none"
