"""Makes rules that can be watched in a test: every duration in them shorter, and nothing else."""

import re
from pathlib import Path

import yaml

FACTOR = 60
"""A minute of the rules becomes a second."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = r"(\d+)([smhd])"
_IN_EXPRESSION = re.compile(rf"(?<=\[){_DURATION}(?=\])|(?<=offset ){_DURATION}\b")


def hurried(rules: Path, directory: Path) -> Path:
    """Write a copy of a file of rules with `for`, ranges and offsets divided by FACTOR."""
    content = yaml.safe_load(rules.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            rule["expr"] = _IN_EXPRESSION.sub(_shorter, rule["expr"])
            if "for" in rule:
                rule["for"] = re.sub(_DURATION, _shorter, rule["for"])
    copy = directory / rules.name
    copy.write_text(yaml.safe_dump(content))
    return copy


def _shorter(found: re.Match[str]) -> str:
    count, unit = (group for group in found.groups() if group is not None)
    return f"{int(count) * _UNITS[unit] * 1000 // FACTOR}ms"
