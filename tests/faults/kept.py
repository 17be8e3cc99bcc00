"""Keeps what was seen of each fault, so that a long matrix can be played in parts."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.faults.fault import Fault, Result, Told

Played = Mapping[int, Mapping[str, Result]]
"""By major version and the fault's name."""

_lock = threading.Lock()


def add(file: Path, major: int, fault: Fault, result: Result) -> None:
    """Write a result behind those that are there; of one fault the last counts."""
    told = {fault.expected.index(of): [told.came, told.went] for of, told in result.told.items()}
    line = {"major": major, "fault": fault.name, "told": told, "broken": result.broken}
    with _lock, file.open("a") as kept:
        kept.write(json.dumps(line) + "\n")


def load(file: Path, majors: list[int], faults: Mapping[str, Fault]) -> Played:
    """What was seen of faults that there still are, as they are now."""
    played: dict[int, dict[str, Result]] = {major: {} for major in majors}
    for line in file.read_text().splitlines() if file.exists() else ():
        of = json.loads(line)
        fault = faults.get(of["fault"])
        if (
            of["major"] in played
            and fault
            and len(fault.expected) > max(map(int, of["told"] or [0]))
        ):
            told = {fault.expected[int(n)]: Told(*seconds) for n, seconds in of["told"].items()}
            played[of["major"]][fault.name] = Result(told, of["broken"])
    return played


def good(fault: Fault, result: Result | None) -> bool:
    """Whether all that was expected came and nothing else."""
    return result is not None and not result.broken and len(result.told) == len(fault.expected)
