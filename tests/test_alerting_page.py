"""What docs/alerting.md shows is what the programs take."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pgvigil import config
from pgvigil.config import Told

from lab.rules import ROOT

PAGE = (ROOT / "docs" / "alerting.md").read_text()
FENCES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
TARGETS = [fence for fence in FENCES if fence.startswith("targets:")]


@pytest.mark.parametrize("position", range(len(TARGETS)))
def test_the_exporter_takes_the_targets_of_the_page(position: int, tmp_path: Path) -> None:
    shown = yaml.safe_load(TARGETS[position])
    for target in shown["targets"].values():
        target["dsn"] = "host=127.0.0.1"
    path = tmp_path / "pgvigil.yml"
    path.write_text(json.dumps(shown))  # JSON is YAML
    (target,) = config.settle(Told(path), {}).targets
    assert target.maintenance or target.objectives


def test_prometheus_takes_the_configuration_of_the_page(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    path = tmp_path / "prometheus.yml"
    path.write_text(FENCES[0])
    done = subprocess.run([program, "check", "config", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_shows_windows_and_numbers() -> None:
    assert len(TARGETS) == 2
