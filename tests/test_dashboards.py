"""Dashboards ask for what there is, in any Grafana, and say what they show."""

import json
import re
from pathlib import Path

import pytest

from lab import grafana

ROOT = Path(__file__).parents[1]
DASHBOARDS = sorted((ROOT / "grafana").glob("*.json"))


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_works_with_any_data_source_and_cluster(file: Path) -> None:
    content = json.loads(file.read_text())
    assert content["uid"] == f"pgvigil-{file.stem}"
    variables = {variable["name"]: variable for variable in content["templating"]["list"]}
    assert set(variables) == {"datasource", "cluster"}
    assert variables["datasource"]["type"] == "datasource"
    for panel in grafana.panels(file):
        for asking in (panel, *panel["targets"]):
            assert asking["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_panel_says_what_it_shows_in_which_unit_and_keeps_to_the_cluster(file: Path) -> None:
    panels = grafana.panels(file)
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            selectors = re.findall(r"\{([^}]*)\}", target["expr"])
            assert selectors, target
            assert all('cluster=~"$cluster"' in selector for selector in selectors), target
            assert "{{" in target["legendFormat"], target


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_do_not_lie_on_each_other(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in grafana.panels(file):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
