"""Reads from the kernel what processor time and memory other processes have used."""

import re
import time
from pathlib import Path
from typing import NamedTuple

from lab.processes import descendants

_TICKS_PER_SECOND = 100
"""What /proc counts in, on every Linux there is."""


class Memory(NamedTuple):
    """The resident memory of a process, in bytes."""

    resident: int
    private: int
    """What no other process shares: mostly the heap."""
    peak: int


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process with all its threads, exact to nanoseconds.

    Raises OSError when there is no such process.
    """
    # clock_getcpuclockid(3) makes this very number; Python does not wrap it.
    return time.clock_gettime((~pid << 3) | 2)


def processor_seconds_of_tree(pid: int) -> float:
    """Return the processor time of a process and all its children, those that ended as well."""
    total = processor_seconds(pid)
    for child in descendants(pid):
        try:
            total += processor_seconds(child)
        except OSError:
            continue  # it has ended and is counted with the reaped ones
    # The second field, the program's name in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return total + (int(fields[13]) + int(fields[14])) / _TICKS_PER_SECOND


def memory(pid: int) -> Memory:
    """Return what a process holds in memory now, and the most it ever held."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|RssAnon|VmHWM):\s+(\d+) kB$", text, re.M))
    resident, private, peak = (int(found[key]) * 1024 for key in ("VmRSS", "RssAnon", "VmHWM"))
    return Memory(resident, private, peak)
