"""The chart's version, schema and README say what is so."""

from pathlib import Path

import pgvigil
import pytest
import yaml

from lab import grafana, rules
from tools import chart


@pytest.mark.parametrize(("path", "text"), list(chart.files()), ids=["schema", "readme"])
def test_what_is_made_of_the_values_is_current(path: Path, text: str) -> None:
    assert path.read_text() == text, "run `make docs`"


def test_the_chart_is_of_the_exporters_version() -> None:
    told = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert told["appVersion"] == pgvigil.__version__
    assert told["version"] == pgvigil.__version__


def test_rules_and_dashboards_of_the_chart_are_the_only_ones() -> None:
    for name, place in (("rules", rules.RULES), ("dashboards", grafana.DASHBOARDS)):
        link = chart.CHART / name
        assert link.is_symlink()
        assert link.resolve() == place


def test_every_value_is_described() -> None:
    assert all(value.about.endswith((".", "`")) for value in chart.values())


def test_each_example_says_what_it_is_for() -> None:
    examples = list((chart.CHART / "ci").glob("*.yaml"))
    assert examples
    for path in examples:
        assert path.name.endswith("-values.yaml")
        assert path.read_text().startswith("# ")
