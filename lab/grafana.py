"""Reads from a dashboard what it asks of Prometheus."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One query of one panel, as Grafana would send it."""

    panel: str
    expression: str


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """All panels that are no rows."""
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries(dashboard: Path, variables: Mapping[str, str]) -> Iterator[Asked]:
    """Each query of each panel, its variables replaced."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(f"${name}", value)
            yield Asked(panel["title"], expression)
