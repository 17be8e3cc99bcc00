"""Reads from a dashboard what it asks of Prometheus."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARDS = Path(__file__).parents[1] / "grafana"

_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")


class Asked(NamedTuple):
    """One query of one panel, as Grafana would send it."""

    panel: str
    expression: str
    empty_when: str
    """When the panel has nothing to show though all works; empty where it always has."""


def files() -> list[Path]:
    """All dashboards."""
    return sorted(DASHBOARDS.glob("*.json"))


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """All panels that are no rows."""
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def variables(dashboard: Path) -> list[dict[str, Any]]:
    """All variables whose values Prometheus tells."""
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["templating"]["list"]
    return [variable for variable in found if variable["type"] == "query"]


def annotations(dashboard: Path) -> list[dict[str, Any]]:
    """All that marks moments on the panels."""
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["annotations"]["list"]
    return found


def queries(dashboard: Path, variables: Mapping[str, str]) -> Iterator[Asked]:
    """Each query of each panel, its variables replaced."""
    for panel in panels(dashboard):
        empty_when = panel["fieldConfig"]["defaults"].get("noValue", "")
        for target in panel["targets"]:
            yield Asked(panel["title"], replaced(target["expr"], variables), empty_when)


def replaced(expression: str, variables: Mapping[str, str]) -> str:
    """An expression with what was chosen; raises KeyError for a variable that is not there."""
    return _VARIABLE.sub(lambda found: variables[found[1] or found[2]], expression)
