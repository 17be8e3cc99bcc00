"""Dashboards are what Grafana's own types allow."""

import json
import os
from pathlib import Path

import pytest

from lab import grafana
from tools.draw import typed


def faults(*dashboards: Path) -> list[str]:
    """Those of dashboards; without a compiler a test is skipped, and fails where one must be."""
    try:
        return typed.faults(dashboards)
    except RuntimeError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


def test_dashboards_are_what_the_types_allow_and_what_is_misspelt_is_told(tmp_path: Path) -> None:
    wrong = json.loads((grafana.DASHBOARDS / "fleet.json").read_text())
    panels = [panel for panel in wrong["panels"] if panel["type"] == "timeseries"]
    panels[0]["options"]["legend"]["displayMode"] = "tabular"
    panels[1]["fieldConfig"]["defaults"]["custom"]["fillOpacities"] = 5
    wrong["panels"][0]["colapsed"] = False
    copy = tmp_path / "wrong.json"
    copy.write_text(json.dumps(wrong, indent=1))

    found = faults(*grafana.files(), copy)

    lines = copy.read_text().splitlines()
    told = {lines[int(of.split(":")[1]) - 1].split('"')[1] for of in found}
    assert all(of.startswith("wrong.json:") for of in found), found
    assert told >= {"displayMode", "fillOpacities", "colapsed"}, found
