"""Plays the scenarios with some exporters and shows who bears what."""

import argparse
import sys
import time

from tests.harm.scenarios import SCENARIOS
from tests.harm.scene import Scene
from tests.harm.subject import PGVIGIL, Subject


def main() -> int:
    """Play; the exit code tells whether it could be done, not what came of it."""
    told = _parser().parse_args()
    subject = Subject.told(told.name, told.command, told.set) if told.command else PGVIGIL
    for scenario in SCENARIOS:
        if told.only not in scenario.name:
            continue
        begun = time.monotonic()
        with Scene(scenario, subject, told.timeout, told.major) as scene:
            verdict = scene.play()
        print(
            f"{scenario.name}: {'passes' if not verdict.broken else ''} "
            f"slowest {verdict.slowest:.2f} s, kept {verdict.kept}, {verdict.sessions} sessions, "
            f"{time.monotonic() - begun:.0f} s in all"
        )
        for rule, seen in verdict.broken.items():
            print(f"  {rule}: {seen}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.harm", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="scenarios with this in the name"
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a scrape may take")
    parser.add_argument("--major", type=int, default=18, help="version of PostgreSQL (default 18)")
    parser.add_argument("--name", default="other")
    parser.add_argument("--command", help="how to start another exporter, with {port} {dsn} {uri}")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
