"""Runs pint, which holds rules against what a Prometheus really has."""

import shutil
import subprocess
from pathlib import Path

from lab import golang

_MODULE = Path(__file__).parent / "go" / "pint"
_PACKAGE = "github.com/cloudflare/pint"

_SETTINGS = """
prometheus "lab" {{
  uri     = "http://127.0.0.1:{port}"
  timeout = "60s"
}}
parser {{
  include = [".*[.]yml"]
  exclude = [".*/tests/.*"]
}}
checks {{
  # Much is told only when there is something to tell of: a slot, a subscription, a fault. Whether
  # the exporter knows each metric and label is for tests/contracts/test_rules.py.
  # Groups of one file that build on each other are evaluated as often as each needs.
  disabled = ["promql/series", "rule/dependency"]
}}
"""


def program() -> Path | str:
    """An installed pint, or one that is built now, or the reason why there is none."""
    place = shutil.which("pint")
    return Path(place) if place else golang.built(_MODULE, _PACKAGE, "cmd/pint")


def complaints(pint: Path, port: int, rules: Path, folder: Path) -> str:
    """What pint says of a folder of rules and of what the Prometheus on a port has; '' is good."""
    settings = folder / "pint.hcl"
    settings.write_text(_SETTINGS.format(port=port))
    words = ["--no-color", "--log-level=error", "--config", str(settings), "lint"]
    done = subprocess.run(
        [pint, *words, "--min-severity=info", "--fail-on=info", str(rules)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr if done.returncode else ""
