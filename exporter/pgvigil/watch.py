"""Tell whether the program itself hangs, whatever the servers do."""

import faulthandler
import sys
from collections.abc import Iterable

from pgvigil.collect import Collector

INTERVALS = 3
"""Scrape intervals for which everything must hang before it is told."""
STANDSTILL = 30.0
"""Seconds after which an event loop that stands still has its stack written."""


def hanging(collectors: Iterable[Collector]) -> str:
    """What hangs, for a person, when nothing else is at work; empty while anything goes on.

    A lane hangs that is past the bound of what it does, which it keeps on its own whatever a server
    does. What has nothing to do is no sign of life, and none of the contrary.
    """
    hung: list[str] = []
    for collector in collectors:
        if not collector.wanted:
            continue
        patience = INTERVALS * collector.interval
        lanes = {"scrape": collector.overdue()}
        if collector.slow.busy:
            lanes["background"] = collector.slow.overdue()
        if any(seconds < patience for seconds in lanes.values()):
            return ""
        hung += [
            f"the {lane} of {collector.target.name} for {seconds:.0f} s"
            for lane, seconds in lanes.items()
        ]
    return ", ".join(hung)


def beat() -> None:
    """The loop turns: unless it does again in time, its stack goes to the standard error, once."""
    faulthandler.dump_traceback_later(STANDSTILL, file=sys.__stderr__ or sys.stderr)


def rest() -> None:
    """The loop need not turn any more."""
    faulthandler.cancel_dump_traceback_later()
