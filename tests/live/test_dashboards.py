"""Every query of every dashboard has something to show of real servers under load."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from lab import alertmanager, grafana, prometheus, series
from tests.faults.stage import DATABASE, Stage

FILES = [file for file in grafana.files() if file.stem not in series.OTHERS]
MEMBERS = "primary", "standby"
TARGETS = *MEMBERS, "away"

UNSHOWN: Mapping[str, str] = {}
"""Panels for which this stage has nothing to show, and why."""

every = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


class Watched(Stage):
    """A pair with a server beside it that does not answer."""

    def configuration(self) -> dict[str, Any]:
        told = super().configuration()
        told["targets"]["away"] = {"dsn": "host=127.0.0.1 port=1"}
        return told


@pytest.fixture(scope="module", params=[13, 18])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    if prometheus.installed() is None or alertmanager.installed() is None:
        reason = "Prometheus and Alertmanager are not both installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with Watched(request.param) as stage, faults(stage):
        yield stage


@contextlib.contextmanager
def faults(stage: Stage) -> Iterator[None]:
    """Somebody who waits for a lock that somebody else holds, idle in a transaction."""
    reading = contextlib.closing(psycopg.connect(stage.standby.conninfo(dbname=DATABASE)))
    with reading, stage.session() as idle, stage.session() as waiting:
        idle.execute("lock table parked")
        waiting.pgconn.send_query(b"select from parked")
        try:
            yield
        finally:
            waiting.cancel_safe(timeout=5)
            idle.rollback()


def chosen(instance: str) -> dict[str, str]:
    """What Grafana puts into the places of variables."""
    every = {"system_identifier": ".*", "datname": ".*", "datasource": "prometheus"}
    return {**every, "instance": instance, "__rate_interval": "5s", "__range": "1m"}


@every
def test_every_query_has_data(stage: Stage, file: Path) -> None:
    # Each query of some target, and each panel that says nothing else of both members.
    asked = list(grafana.queries(file, chosen("")))
    missing = {(of.panel, at, "any") for at, of in enumerate(asked) if of.panel not in UNSHOWN}
    missing |= {(of.panel, -1, who) for of in asked if not of.empty_when for who in MEMBERS}
    end = time.monotonic() + 60
    while missing and time.monotonic() < end:
        for target in TARGETS:
            for at, of in enumerate(grafana.queries(file, chosen(target))):
                shown = {(of.panel, at, "any"), (of.panel, -1, target)}
                if shown & missing and stage.prometheus.query(of.expression):
                    missing -= shown
    assert missing == set()


@every
def test_every_variable_has_values(stage: Stage, file: Path) -> None:
    for member in MEMBERS:
        for variable in grafana.variables(file):
            values = resolved(stage, variable, chosen(member))
            if variable["name"] == "instance":
                assert set(values) >= set(TARGETS)
            assert values, variable["name"]


def resolved(stage: Stage, variable: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    """The values of a variable, by the two functions of Grafana that ours are written with."""
    text = grafana.replaced(variable["query"]["query"], given)
    if found := re.fullmatch(r"label_values\((.+), (\w+)\)", text):
        return stage.prometheus.values(found[2], found[1])
    found = re.fullmatch(r"query_result\((.+)\)", text)
    assert found
    return [labels[variable["name"]] for labels, _ in stage.prometheus.query(found[1])]


@every
def test_every_annotation_is_a_query_that_prometheus_takes(stage: Stage, file: Path) -> None:
    told = {
        of["name"]: stage.prometheus.query(grafana.replaced(of["expr"], chosen("primary")))
        for of in grafana.annotations(file)
    }
    for name in ("Restarts", "Reloads"):
        moments = {value / 1000 for _, value in told[name]}
        assert moments
        assert all(time.time() - 3600 < moment <= time.time() for moment in moments)
