"""Makes what is seen over minutes seen in seconds: the same, with every duration shorter."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

FACTOR = 60
"""A minute becomes a second."""

FOR_FLOOR = 1.0
"""Seconds; what must hold for some time holds for as long at least."""

OBJECTIVE_FLOOR = 1.0
"""Seconds."""

RANGE_FLOOR = 4.0
"""Seconds; a range holds four scrapes at least, and they come every second."""

EVERY_FLOOR = 2.0
"""Seconds; what runs in the background runs no more often."""

PASSING = (30.0, 1800.0)
"""Seconds; an objective of as many is waited for, a shorter or a longer one is not."""

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}
_STEP = re.compile(r"(\d+)(ms|[smhdwy])")
_DURATION = r"(?:\d+(?:ms|[smhdwy]))+"
_RANGE = re.compile(rf"\[\s*({_DURATION})\s*(:\s*)?({_DURATION})?\s*\]")
_OFFSET = re.compile(rf"(\boffset\s+)({_DURATION})")
_PAUSES = {"slow.py": ("REFRESH", "KEEP", "_RETRY", "_IDLE", "_HANDSHAKE"), "lane.py": ("QUIET",)}
"""What the exporter waits for by itself: constants of its modules, in seconds."""
_EVERY = re.compile(r"\bevery: ?(\d+[smh])\b")


def hurried(
    rules: Path,
    directory: Path,
    least: float = FOR_FLOOR,
    factor: float = FACTOR,
    window: float = RANGE_FLOOR,
) -> Path:
    """Write a copy of a file of rules with `for`, intervals, ranges and offsets divided.

    `least` is the shortest `for` and `window` the shortest range, in seconds.
    """
    content = yaml.safe_load(rules.read_text())
    for group in content["groups"]:
        if "interval" in group:
            group["interval"] = _shorter(group["interval"], FOR_FLOOR, factor)
        for rule in group["rules"]:
            rule["expr"] = _expression(str(rule["expr"]), factor, window)
            if "for" in rule:
                rule["for"] = _shorter(rule["for"], least, factor)
    copy = directory / rules.name
    copy.write_text(yaml.safe_dump(content))
    return copy


def objectives(
    given: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Those objectives that pass while one waits, divided by FACTOR: by standard and name."""
    shorter: dict[str, dict[str, dict[str, float]]] = {}
    low, high = PASSING
    for standard, names in given.items():
        for name, by_severity in names.items():
            for severity, value in by_severity.items():
                if name.endswith("_seconds") and low <= value <= high:
                    of = shorter.setdefault(standard, {}).setdefault(name, {})
                    of[severity] = max(OBJECTIVE_FLOOR, value / FACTOR)
    return shorter


def package(source: Path, directory: Path) -> Path:
    """Copy the exporter's package with each `every` and each pause of minutes divided by FACTOR.

    Returns the folder to import it from; raises ValueError when a pause is not where it was.
    """
    copy = directory / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (copy / "catalogue").glob("*.yml"):
        file.write_text(_EVERY.sub(_more_often, file.read_text()))
    for module, names in _PAUSES.items():
        text = (copy / module).read_text()
        for name in names:
            text, found = re.subn(rf"^{name} = ([\d.]+)$", _sooner(name), text, flags=re.M)
            if found != 1:
                raise ValueError(f"{module} has no number called {name}")
        (copy / module).write_text(text)
    return directory


def _expression(expression: str, factor: float, window: float) -> str:
    shorter = _RANGE.sub(lambda found: _range(found, factor, window), expression)
    return _OFFSET.sub(lambda found: found[1] + _shorter(found[2], 0, factor), shorter)


def _range(found: re.Match[str], factor: float, least: float) -> str:
    window, colon, step = found.groups()
    finer = _shorter(step, 1.0, factor) if step else ""
    return f"[{_shorter(window, least, factor)}{':' if colon else ''}{finer}]"


def _shorter(duration: str, floor: float, factor: float) -> str:
    seconds = sum(int(count) * _UNITS[unit] for count, unit in _STEP.findall(duration))
    # What is nothing stays nothing.
    return f"{round(max(min(floor, seconds), seconds / factor) * 1000)}ms"


def _more_often(found: re.Match[str]) -> str:
    ((count, unit),) = _STEP.findall(found[1])
    seconds = max(EVERY_FLOOR, int(count) * _UNITS[unit] / FACTOR)
    return f"every: {round(seconds)}s"


def _sooner(name: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{name} = {max(EVERY_FLOOR, float(found[1]) / FACTOR)}"
