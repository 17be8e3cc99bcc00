"""Breaks things, sees the alerts come and go, and writes down how long it took."""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.report import machine
from lab import prometheus
from lab.binaries import find
from lab.prometheus import Installed
from tests.faults import report
from tests.faults.fault import Fault, Result, play
from tests.faults.matrix import FAULTS
from tests.faults.stage import Stage

ALONE = {"machine"}
"""Scenes that take the machine's processors, beside which nothing else is played."""

MOST = 20
"""Faults that are played on one stage at most, so that several can be played at once."""


class Act(NamedTuple):
    """Faults that are played on one stage, one after the other."""

    major: int
    scene: str
    faults: Sequence[Fault]
    program: Installed
    """The Prometheus that watches."""


def main() -> int:
    """Play; the exit code tells whether all was as it shall be."""
    told = _parser().parse_args()
    if told.page and told.only:
        print("--page wants all faults, so it does not go with --only", file=sys.stderr)
        return 2
    faults = [fault for fault in FAULTS if re.search(told.only, fault.name)]
    majors = [int(word) for word in told.major.split(",")]
    program = _prometheus(told.newer)
    begun = time.monotonic()
    played: dict[int, dict[str, Result]] = {major: {} for major in majors}
    acts = [act for major in majors for act in _acts(major, faults, program)]
    acts.sort(key=lambda act: -len(act.faults))
    for alone in (False, True):
        with ThreadPoolExecutor(1 if alone else told.stages) as pool:
            chosen = [act for act in acts if (act.scene in ALONE) == alone]
            for act, results in zip(chosen, pool.map(_played, chosen), strict=True):
                played[act.major] |= results
    broken = sum(bool(result.broken) for of in played.values() for result in of.values())
    print(f"{time.monotonic() - begun:.0f} s, {broken} not as they shall be")
    if told.page:
        versions = ", ".join(find(major).version for major in majors)
        facts = machine()
        report.write(
            told.page,
            f"PostgreSQL {versions}; {facts['system']}, {facts['processor']}, "
            f"{facts['cores']} cores; Prometheus {program.name}; "
            f"{time.monotonic() - begun:.0f} seconds in all.",
            played,
        )
    return int(broken > 0)


def _acts(major: int, faults: Sequence[Fault], program: Installed) -> Iterator[Act]:
    """What is played on a major version, in parts that can be played side by side."""
    fitting = [fault for fault in faults if fault.since <= major < fault.until]
    for scene in dict.fromkeys(fault.scene for fault in fitting):
        of = [fault for fault in fitting if fault.scene == scene]
        for first in range(0, len(of), MOST):
            yield Act(major, scene, of[first : first + MOST], program)


def _played(act: Act) -> dict[str, Result]:
    """What was seen of each fault of a part."""
    played: dict[str, Result] = {}
    stage = Stage(act.major, act.scene)
    stage.program = act.program
    with stage:
        stage.settle()
        for fault in act.faults:
            begun = time.monotonic()
            played[fault.name] = result = play(fault, stage)
            took = time.monotonic() - begun
            print(f"{act.major}, {took:3.0f} s: {report.line(fault.name, result)}", flush=True)
    return played


def _prometheus(newer: bool) -> Installed:
    found = prometheus.newer() if newer else prometheus.installed()
    if not isinstance(found, Installed):
        raise SystemExit(f"no Prometheus: {found or 'none is installed'}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="faults with this in the name"
    )
    parser.add_argument("--major", default="13,18", help="versions of PostgreSQL (default 13,18)")
    parser.add_argument(
        "--stages", type=int, default=3, help="how many are played at once (default 3)"
    )
    parser.add_argument(
        "--newer", action="store_true", help="with Debian's newest Prometheus, fetched once"
    )
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
