"""Breaks things, sees the alerts come and go, and writes down how long it took."""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.report import machine
from lab import processes, prometheus
from lab.binaries import find
from lab.prometheus import Installed
from tests.faults import kept, report
from tests.faults.fault import Fault, play
from tests.faults.matrix import FAULTS
from tests.faults.stage import ROOT, Stage

KEPT = ROOT / ".cache" / "faults.jsonl"
"""What was seen, one line for each fault; a run of all faults begins it anew."""

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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ended)
    majors = [int(word) for word in told.major.split(",")]
    program = _prometheus(told.newer)
    known = {fault.name: fault for fault in FAULTS}
    KEPT.parent.mkdir(exist_ok=True)
    if not (told.only or told.missing):
        KEPT.unlink(missing_ok=True)
    before = kept.load(KEPT, majors, known)
    begun = time.monotonic()
    acts = [
        act
        for major in majors
        for act in _acts(
            major,
            [
                fault
                for fault in FAULTS
                if re.search(told.only, fault.name)
                and fault.since <= major < fault.until
                and not (told.missing and kept.good(fault, before[major].get(fault.name)))
            ],
            program,
        )
    ]
    acts.sort(key=lambda act: -len(act.faults))
    broken = 0
    for alone in (False, True):
        with ThreadPoolExecutor(1 if alone else told.stages) as pool:
            chosen = [act for act in acts if (act.scene in ALONE) == alone]
            broken += sum(pool.map(_played, chosen))
    print(f"{time.monotonic() - begun:.0f} s, {broken} not as they shall be")
    if told.page:
        versions = ", ".join(find(major).version for major in majors)
        facts = machine()
        report.write(
            told.page,
            f"PostgreSQL {versions}; {facts['system']}, {facts['processor']}, "
            f"{facts['cores']} cores; Prometheus {program.name}.",
            kept.load(KEPT, majors, known),
        )
    return int(broken > 0)


def _acts(major: int, faults: Sequence[Fault], program: Installed) -> Iterator[Act]:
    """What is played on a major version, in parts that can be played side by side."""
    for scene in dict.fromkeys(fault.scene for fault in faults):
        of = [fault for fault in faults if fault.scene == scene]
        for first in range(0, len(of), MOST):
            yield Act(major, scene, of[first : first + MOST], program)


def _played(act: Act) -> int:
    """How many faults of a part were not told as they shall be."""
    broken = 0
    stage = Stage(act.major, act.scene)
    stage.program = act.program
    with stage:
        stage.settle()
        for fault in act.faults:
            begun = time.monotonic()
            result = play(fault, stage)
            kept.add(KEPT, act.major, fault, result)
            broken += not kept.good(fault, result)
            took = time.monotonic() - begun
            print(f"{act.major}, {took:3.0f} s: {report.line(fault.name, result)}", flush=True)
    return broken


def _ended(number: int, _: object) -> None:
    """Take all stages down at once: their threads would not hear of it."""
    for pid in processes.descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(128 + number)


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
    parser.add_argument(
        "--missing", action="store_true", help="those that were not told as they shall be"
    )
    parser.add_argument("--major", default="13,18", help="versions of PostgreSQL (default 13,18)")
    parser.add_argument(
        "--stages", type=int, default=3, help="how many are played at once (default 3)"
    )
    parser.add_argument(
        "--newer", action="store_true", help="with Debian's newest Prometheus, fetched once"
    )
    parser.add_argument("--page", type=Path, help="write what was seen last into this page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
