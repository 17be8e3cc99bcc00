"""Breaks things, sees the alerts come and go, and writes down how long it took."""

import argparse
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.report import machine
from lab.binaries import find
from tests.faults import report
from tests.faults.fault import Fault, Result, play
from tests.faults.matrix import FAULTS
from tests.faults.stage import Stage


def main() -> int:
    """Play; the exit code tells whether all was as it shall be."""
    told = _parser().parse_args()
    if told.page and told.only:
        print("--page wants all faults, so it does not go with --only", file=sys.stderr)
        return 2
    faults = [fault for fault in FAULTS if re.search(told.only, fault.name)]
    majors = [int(word) for word in told.major.split(",")]
    begun = time.monotonic()
    with ThreadPoolExecutor(len(majors)) as pool:
        played = dict(zip(majors, pool.map(lambda m: _played(m, faults), majors), strict=True))
    broken = sum(bool(result.broken) for of in played.values() for result in of.values())
    print(f"{time.monotonic() - begun:.0f} s, {broken} not as they shall be")
    if told.page:
        versions = ", ".join(find(major).version for major in majors)
        facts = machine()
        report.write(
            told.page,
            f"PostgreSQL {versions}; {facts['system']}, {facts['processor']}, "
            f"{facts['cores']} cores; {time.monotonic() - begun:.0f} seconds in all.",
            played,
        )
    return int(broken > 0)


def _played(major: int, faults: list[Fault]) -> dict[str, Result]:
    """What was seen of each fault that can be played on a major version."""
    played: dict[str, Result] = {}
    fitting = [fault for fault in faults if fault.since <= major < fault.until]
    for scene in dict.fromkeys(fault.scene for fault in fitting):
        with Stage(major, scene) as stage:
            stage.settle()
            for fault in (fault for fault in fitting if fault.scene == scene):
                begun = time.monotonic()
                played[fault.name] = result = play(fault, stage)
                took = time.monotonic() - begun
                print(f"{major}, {took:3.0f} s: {report.line(fault.name, result)}", flush=True)
    return played


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="faults with this in the name"
    )
    parser.add_argument("--major", default="13,18", help="versions of PostgreSQL (default 13,18)")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
