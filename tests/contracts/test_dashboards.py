"""Dashboards are made of their sources, ask for what there is, and say what they show."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pgvigil import standards
from pgvigil.errors import Refused
from pgvigil.standards import Standard

from lab import grafana, rules, series
from lab.rules import Objective, Rule
from tools import dashboards

FILES = grafana.files()
OWN_VARIABLES = {"__rate_interval", "__range", "__url_time_range"}
"""What Grafana gives to every dashboard."""

CLUSTERS = "cluster:", "job_system_identifier:", "job_system:", "major:"
"""With what the names of series begin that belong to no one server."""

every = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def content(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def variables(file: Path) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in content(file)["templating"]["list"]}


def asked(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], Rule]]:
    """Each panel with each of its queries, also read as a rule."""
    chosen = dict.fromkeys([*variables(file), *OWN_VARIABLES], "5m")
    for panel in grafana.panels(file):
        for target in panel["targets"]:
            text = grafana.replaced(target["expr"], chosen)
            yield panel, target, rules.make(file.stem, {"record": "panel", "expr": text})


def read(rule: Rule) -> set[str]:
    """The series that an expression reads, also by way of what is recorded."""
    found, new = set[str](), {selector.name for selector in rule.selectors()}
    while new - found:
        found |= new
        new = {
            selector.name
            for other in rules.load()
            if other.kind == "record" and other.name in new
            for selector in other.selectors()
        }
    return found


@every
def test_a_dashboard_is_what_its_source_makes(file: Path) -> None:
    source = dashboards.SOURCES / f"{file.stem}.yml"
    assert file.read_text() == dashboards.build(source), "run `make dashboards`"


def test_every_source_has_its_dashboard() -> None:
    sources = {file.stem for file in dashboards.SOURCES.glob("*.yml")}
    assert sources == {file.stem for file in FILES}


def test_every_json_that_grafana_finds_in_the_folder_is_a_dashboard() -> None:
    # Its file provider looks into the folders within, too, and complains of whatever else is there.
    assert sorted(grafana.DASHBOARDS.rglob("*.json")) == FILES
    assert all(content(file).keys() >= {"uid", "title", "panels"} for file in FILES)


@every
def test_a_dashboard_works_with_any_data_source(file: Path) -> None:
    board = content(file)
    assert board["uid"] == f"pgvigil-{file.stem}"
    assert file.stat().st_size < 500_000
    given = variables(file)
    assert given["datasource"]["type"] == "datasource"
    asking = [*grafana.panels(file), *board["annotations"]["list"]]
    asking += [target for panel in grafana.panels(file) for target in panel["targets"]]
    asking += [variable for name, variable in given.items() if name != "datasource"]
    for one in asking:
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@every
def test_every_variable_is_given_and_used(file: Path) -> None:
    given = variables(file)
    texts = [target["expr"] for _, target, _ in asked(file)]
    texts += [variable.get("definition", "") for variable in given.values()]
    texts += [note["expr"] for note in content(file)["annotations"]["list"]]
    used = {name for text in texts for name in re.findall(r"\$\{?(\w+)", text)}
    assert used - OWN_VARIABLES | {"datasource"} == set(given)


@every
def test_all_servers_are_those_that_the_variable_lists(file: Path) -> None:
    # A value for all of them would choose those of other clusters, too, and what is no server.
    assert "allValue" not in variables(file).get("instance", {})


@every
def test_a_panel_says_what_it_shows_and_in_which_unit(file: Path) -> None:
    panels = grafana.panels(file)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert all(legends), panel["title"]


@every
def test_ids_are_not_rounded_and_empty_cells_stay_empty(file: Path) -> None:
    for panel in grafana.panels(file):
        if panel["type"] != "table":
            continue
        overrides = panel["fieldConfig"]["overrides"]
        told = [
            (of["matcher"]["options"], item["id"], item["value"])
            for of in overrides
            for item in of["properties"]
        ]
        assert ("/.*/", "noValue", "") in told
        (shown,) = (of for of in panel["transformations"] if of["id"] == "organize")
        for name, heading in shown["options"]["renameByName"].items():
            if not name.startswith("Value"):
                assert (heading, "unit", "string") in told, panel["title"]


@every
def test_there_is_room_for_the_titles_of_small_panels(file: Path) -> None:
    # At 1440 pixels Grafana's font takes 7.5 a letter, a column 59, the border and the icon 50.
    for panel in grafana.panels(file):
        room = (panel["gridPos"]["w"] * 59 - 50) / 7.5
        assert len(panel["title"]) <= room, panel["title"]


@every
def test_there_is_room_for_each_column_of_a_table(file: Path) -> None:
    # As above; a column narrower than 75 pixels has no room for its heading.
    for panel in grafana.panels(file):
        if panel["type"] == "table":
            (shown,) = (of["options"] for of in panel["transformations"] if of["id"] == "organize")
            columns = shown["renameByName"].keys() - shown["excludeByName"].keys()
            assert 75 * len(columns) <= panel["gridPos"]["w"] * 59 - 20, panel["title"]


@every
def test_panels_fill_the_width_of_the_page(file: Path) -> None:
    widths: dict[int, int] = {}
    for panel in content(file)["panels"]:
        place = panel["gridPos"]
        widths[place["y"]] = widths.get(place["y"], 0) + place["w"]
    assert set(widths.values()) == {24}


@every
def test_each_number_that_is_drawn_has_a_line_of_its_colour(file: Path) -> None:
    for panel in grafana.panels(file):
        drawn = [of for of in panel["targets"] if "pgvigil_objective{" in of["expr"]]
        lines = [of["legendFormat"] for of in drawn if of["expr"].startswith("min by (severity) (")]
        named = {of["matcher"]["options"] for of in panel["fieldConfig"]["overrides"]}
        assert len(set(lines)) == len(lines), panel["title"]
        for line in lines:
            for severity in dashboards.COLORS:
                assert line.replace("{{severity}}", severity) in named, panel["title"]


@every
def test_panels_do_not_lie_on_each_other(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    panels = content(file)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


@every
def test_a_panel_asks_for_series_and_labels_that_exist(file: Path) -> None:
    faults = []
    known = {**series.labels(), **series.alerts()}
    foreign = series.others(file.stem) if file.stem in series.OTHERS else set()
    for panel, target, rule in asked(file):
        selectors = [s for s in rule.selectors() if s.name and s.name not in foreign]
        faults += [f"{panel['title']}: no {s.name}" for s in selectors if s.name not in known]
        if foreign:
            continue
        labels = series.TARGET.union(rule.replaced(), *(known.get(s.name, ()) for s in selectors))
        named = {*rule.grouped(), *re.findall(r"{{(\w+)}}", target["legendFormat"])}
        faults += [f"{panel['title']}: nothing has the label {label}" for label in named - labels]
        faults += [
            f"{panel['title']}: {selector.name} has no label {label}"
            for selector in selectors
            for label, _, _ in selector.matchers
            if label not in known.get(selector.name, set()) | series.TARGET
        ]
    assert faults == []


@every
def test_a_panel_keeps_to_the_servers_that_were_chosen(file: Path) -> None:
    chosen = "cluster" if file.stem in series.OTHERS else "instance"
    for panel, _, rule in asked(file):
        for selector in rule.selectors():
            wanted = "system_identifier" if selector.name.startswith(CLUSTERS) else chosen
            matched = {label for label, _, _ in selector.matchers}
            assert matched & {wanted, "system_identifier"}, (panel["title"], selector)


@every
def test_the_numbers_that_are_drawn_are_those_of_the_standards(file: Path) -> None:
    known = {Objective(*of[:3])[:2] for of in standards.objectives()}
    drawn = {objective[:2] for _, _, rule in asked(file) for objective in rule.objectives()}
    assert {of for of in drawn - known if all(of)} == set()


@every
def test_a_link_leads_to_a_dashboard_or_a_page_that_exists(file: Path) -> None:
    text = file.read_text()
    assert set(re.findall(r"/d/pgvigil-(\w+)", text)) <= {file.stem for file in FILES}
    for page in re.findall(rf"{dashboards.DOCS}/([\w/]+\.md)", text):
        assert (rules.ROOT / "docs" / page).exists()


@pytest.mark.parametrize("rule", [r for r in rules.load() if r.kind == "alert"], ids=str)
def test_an_alert_leads_to_a_dashboard_that_knows_its_variable(rule: Rule) -> None:
    found = re.match(r"/d/pgvigil-(\w+)\?var-(\w+)=", rule.annotations["dashboard_url"])
    assert found
    assert found[2] in variables(grafana.DASHBOARDS / f"{found[1]}.json")


@every
def test_a_panel_of_a_standard_shows_what_decides_on_it(file: Path) -> None:
    told: dict[str, set[str]] = {}
    for panel, _, rule in asked(file):
        for id_ in re.findall(r"Standard ([A-Z]{3}-\d+):", panel["description"]):
            told.setdefault(f"{id_} {panel['title']}", set()).update(read(rule))
    for place, names in told.items():
        (standard,) = (s for s in standards.load() if s.id == place.split()[0])
        bare = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names} | names
        assert bare & {*standard.metrics, rules.FINDING, "ALERTS"}, place


def test_a_fault_of_a_source_is_told_with_its_line(tmp_path: Path) -> None:
    source = tmp_path / "wrong.yml"
    source.write_text(
        "title: Wrong\nabout: It.\nvariables: []\nrows:\n  - title: One\n    panel: []\n"
    )
    with pytest.raises(Refused, match=r"wrong\.yml:5: Additional properties .*'panel'"):
        dashboards.build(source)


SHOWN = {
    id_
    for file in FILES
    for panel in grafana.panels(file)
    for id_ in re.findall(r"Standard ([A-Z]{3}-\d+):", panel["description"])
}


@pytest.mark.parametrize("standard", standards.load(), ids=lambda standard: standard.id)
def test_every_standard_has_a_panel(standard: Standard) -> None:
    assert standard.id in SHOWN or standard.evidence == ("test",)
