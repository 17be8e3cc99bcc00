"""Keep a program from writing anywhere but in the directories it is given, by Linux' Landlock."""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

# The same on all machines, from linux/landlock.h and the table of system calls.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH, _NO_NEW_PRIVILEGES = 1, 1, 38
_WRITE_FILE, _REFER, _TRUNCATE = 1 << 1, 1 << 13, 1 << 14
_CHANGES = sum(1 << bit for bit in range(4, 13))
"""Removing files and directories, and making any kind of them."""

_library = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Which Landlock the kernel has; 0 when it has none, or not switched on."""
    try:
        return max(0, int(_library.syscall(_CREATE, None, ctypes.c_size_t(0), _ASK_VERSION)))
    except (AttributeError, OSError):
        return 0


def build(writable: Sequence[Path]) -> int | None:
    """A fence around directories, as a descriptor for `enter`; None where the kernel has none."""
    known = version()
    if not known:
        return None
    handled = _WRITE_FILE | _CHANGES
    handled |= _REFER if known >= 2 else 0
    handled |= _TRUNCATE if known >= 3 else 0
    attributes = struct.pack("=Q", handled)
    fence = int(_library.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    if fence < 0:
        return None
    for directory in writable:
        place = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = struct.pack("=Qi", handled, place)
            if _library.syscall(_ADD, fence, _PATH_BENEATH, rule, 0) != 0:
                os.close(fence)
                return None
        finally:
            os.close(place)
    return fence


def enter(fence: int) -> None:
    """Go behind a fence for good, with all programs that are started from here; raises OSError."""
    if (
        _library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0
        or _library.syscall(_RESTRICT, fence, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "the fence cannot be put up")
