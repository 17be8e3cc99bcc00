"""All rules run on what a real exporter tells, of one target and of several."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import hurry, pint, prometheus, rules
from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter
from lab.prometheus import Prometheus

KNOWN = "instance:pgvigil_target:known"


@contextlib.contextmanager
def watched(cluster: Cluster, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus with all rules, of a fleet with a target that is away, and of one alone."""
    program = prometheus.installed()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Prometheus is not installed")
    labels = {"cluster": "orders", "target": "a label of somebody's own"}
    servers = {"first": cluster.primary, "second": cluster.standby}
    targets: dict[str, dict[str, object]] = {
        name: {"dsn": server.conninfo(**PGVIGIL.login), "labels": labels}
        for name, server in servers.items()
    }
    targets["away"] = {"dsn": "host=127.0.0.1 port=1"}
    (tmp_path / "pgvigil.yml").write_text(json.dumps({"targets": targets}))  # JSON is YAML
    copies = [hurry.hurried(file, tmp_path) for file in rules.files()]
    with (
        Exporter("--config", f"{tmp_path}/pgvigil.yml") as fleet,
        Exporter(environment={"PGVIGIL_DSN": cluster.primary.conninfo(**PGVIGIL.login)}) as alone,
    ):
        jobs = [
            {
                "job_name": "fleet",
                "http_sd_configs": [{"url": f"http://127.0.0.1:{fleet.port}/sd"}],
            },
            {"job_name": "own", "static_configs": [{"targets": [f"127.0.0.1:{fleet.port}"]}]},
            {"job_name": "alone", "static_configs": [{"targets": [f"127.0.0.1:{alone.port}"]}]},
        ]
        with Prometheus(program, jobs, copies) as watcher:
            watcher.wait_for_alert("DatabaseDown", instance="away", job="fleet")
            watcher.wait_until("job_system:pgvigil_target:count{job='fleet'} == 2")
            yield watcher


@pytest.mark.parametrize("major", [13, 18])
def test_every_rule_runs_on_one_target_and_on_a_fleet(cluster: Cluster, tmp_path: Path) -> None:
    with watched(cluster, tmp_path) as watcher:
        end = time.monotonic() + 60
        while unknown := [r["name"] for r in watcher.rules() if r["health"] == "unknown"]:
            assert time.monotonic() < end, unknown
            time.sleep(0.2)
        faults = {r["name"]: r["lastError"] for r in watcher.rules() if r["health"] != "ok"}
        known = {(of["job"], of.get("system_identifier")) for of, _ in watcher.query(KNOWN)}
        down = [a["instance"] for a in watcher.alerts() if a["alertname"] == "DatabaseDown"]
        pages = {a["alertname"] for a in watcher.alerts() if a["severity"] == "page"}
    (identifier,) = cluster.primary.execute(
        "select system_identifier::text from pg_control_system()"
    )
    assert faults == {}
    assert known == {("fleet", *identifier), ("alone", *identifier), ("fleet", None), ("own", None)}
    assert down == ["away"]
    assert {name for name in pages if name in AVAILABILITY} == {"DatabaseDown"}


@pytest.mark.parametrize("major", [18])
def test_pint_has_no_complaint(cluster: Cluster, tmp_path: Path) -> None:
    program = pint.program()
    if isinstance(program, str):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no pint: {program}")
    with watched(cluster, tmp_path) as watcher:
        assert pint.complaints(program, watcher.port, rules.ROOT / "rules", tmp_path) == ""
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        (wrong / "rules.yml").write_text(WRONG)
        complaints = pint.complaints(program, watcher.port, wrong, tmp_path)
    assert "promql/vector_matching" in complaints  # it does see that a rule cannot fire


WRONG = """
groups:
  - name: of others
    rules:
      - {alert: Full, expr: sum by (instance) (pg_up) > pg_settings_max_connections}
"""
"""A join without on(), as public collections have them."""

AVAILABILITY = {rule.name for rule in rules.load() if rule.area in ("availability", "exporter")}
"""The alerts of which nothing but the target that is away may page."""
