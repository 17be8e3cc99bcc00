"""Runs the measurements by name and shows what they found."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import big, dead, fleet, image, latency, many, memory, peer, render, rtt, scrape, server
from bench.report import Report, Value, machine
from bench.run import Run
from bench.servers import Servers
from lab.binaries import UnavailableError, find

MEASUREMENTS: Mapping[str, Callable[[Run], Report]] = {
    "scrape": scrape.measure,
    "rtt": rtt.measure,
    "server": server.measure,
    "render": render.measure,
    "memory": memory.measure,
    "fleet": fleet.measure,
    "dead": dead.measure,
    "many": many.measure,
    "big": big.measure,
    "latency": latency.measure,
    "image": image.measure,
}
_RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Measure; the exit code tells whether it could be done, not whether targets are met."""
    told = _parser().parse_args()
    begun = time.monotonic()
    found = peer.find()
    facts = machine() | {"commit": _commit()}
    try:
        binaries = find(told.major)
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    facts["postgresql"] = f"{binaries.version} ({binaries.source})"
    if isinstance(found, str):
        print(f"no postgres_exporter: {found}; pgvigil runs alone and ratios are missing")
    else:
        facts["postgres_exporter"] = f"{found.version}, {found.source}"
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    run = Run(Servers(told.major), None if isinstance(found, str) else found, told.quick)
    targets = []
    try:
        for name in told.only:
            clock = time.monotonic()
            report = MEASUREMENTS[name](run)
            path = report.write(_RESULTS, facts)
            took = time.monotonic() - clock
            print(
                f"\n{report.text()}\n{took:.0f} s, {path.relative_to(_RESULTS.parents[1])}",
                flush=True,
            )
            targets += report.targets
    finally:
        run.servers.destroy()
    print(f"\n== all targets, {time.monotonic() - begun:.0f} s ==")
    print("\n".join(target.text() for target in targets))
    return 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(MEASUREMENTS):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} not among {', '.join(MEASUREMENTS)}"
        )
    return names


def _commit() -> Value:
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--only",
        type=_names,
        default=list(MEASUREMENTS),
        metavar="NAMES",
        help=f"some of {','.join(MEASUREMENTS)}",
    )
    parser.add_argument("--quick", action="store_true", help="a third of the repetitions")
    parser.add_argument("--major", type=int, default=18, help="version of PostgreSQL (default 18)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
