"""Plays the scenarios with some exporters and shows who bears what."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from pgvigil import __version__

from bench.report import machine
from lab.binaries import find as find_postgres
from tests.harm import peers, report
from tests.harm.scenarios import SCENARIOS
from tests.harm.scene import Scenario, Scene, Verdict
from tests.harm.subject import PGVIGIL, Subject

_OURS = dataclasses.replace(PGVIGIL, version=__version__)


def main() -> int:
    """Play; the exit code tells whether ours broke no rule."""
    told = _parser().parse_args()
    subjects = [_OURS]
    if told.command:
        subjects = [Subject.told(told.name, told.command, told.set)]
    elif told.peers:
        found, missing = peers.find()
        subjects += found
        for reason in missing:
            print(f"without {reason}")
    scenarios = [scenario for scenario in SCENARIOS if told.only in scenario.name]
    played: dict[tuple[str, str], Verdict | str | None] = {}
    begun = time.monotonic()
    for number, scenario in enumerate(scenarios, 1):
        print(f"\n{number} of {len(scenarios)}, {time.monotonic() - begun:.0f} s: {scenario.name}")
        for subject in subjects:
            result = _played(scenario, subject, told.timeout, told.major)
            played[scenario.name, subject.name] = result
            words = report.line(result) if isinstance(result, Verdict) else result
            print(f"  {subject.name} {words or 'has no such thing'}", flush=True)
    if told.page:
        machines = {
            k: str(v) for k, v in machine().items() if k in ("system", "processor", "cores")
        }
        facts = {
            "PostgreSQL": find_postgres(told.major).version,
            "timeout of a scrape": f"{told.timeout:g} s",
            **machines,
        }
        report.write(told.page, facts, scenarios, subjects, played)
    ours = [played[scenario.name, subjects[0].name] for scenario in scenarios]
    return int(any(not isinstance(of, Verdict) or of.broken for of in ours))


def _played(
    scenario: Scenario, subject: Subject, timeout: float, major: int
) -> Verdict | str | None:
    """The verdict; else why it could not be played, or None where the subject has no such thing."""
    if scenario.sql and not subject.queries:
        return None
    try:
        with Scene(scenario, subject, timeout, major) as scene:
            return scene.play()
    except RuntimeError as error:
        return f"could not be played: {error}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.harm", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="scenarios with this in the name"
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a scrape may take")
    parser.add_argument("--major", type=int, default=18, help="version of PostgreSQL (default 18)")
    parser.add_argument("--peers", action="store_true", help="with the other exporters as well")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    other = parser.add_argument_group("any exporter instead")
    other.add_argument("--name", default="other", help="what to call it")
    other.add_argument("--command", help="how to start it, with {port} and {dsn} or {uri} in it")
    other.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="its environment"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
