"""Run a command as if nobody stood between, and tell how it ended."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_BY_SIGNAL = 128
"""Exit codes as shells give them; the signal's number is added."""

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SHARED = (signal.SIGINT, signal.SIGQUIT)
"""What a terminal sends to both of us: the command ends by it, and we live to tell."""


class Ended(NamedTuple):
    """How a command has ended."""

    code: int
    """As a shell would give it."""
    seconds: float
    note: str
    """Why it failed; empty where it did not."""
    began: bool = True
    """False where it could not be run at all."""


def run(command: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """Run a command with our own input, outputs and open files, and await its end.

    From then on signals that would end us are of no effect: what is left to do takes no time.
    """
    began = time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    for number in (*_FORWARDED, *_SHARED):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            forwards = number in _FORWARDED
            signal.signal(number, forward if forwards else lambda _number, _frame: None)
    try:
        # A lock that a caller holds by an open file must stay with the command.
        process = subprocess.Popen(command, env=environment, close_fds=False)  # noqa: S603
    except OSError as error:
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        note = f"{command[0]}: {error.strerror}"
        return Ended(code, time.monotonic() - began, note, began=False)
    for waiting in early:
        process.send_signal(waiting)
    code = process.wait()
    seconds = time.monotonic() - began
    if code < 0:
        return Ended(_BY_SIGNAL - code, seconds, f"ended by signal {-code}")
    return Ended(code, seconds, f"exit code {code}" if code else "")
