"""Runs the programs that are shown beside the servers, each with a log of its own."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

from demo import summary

_PATIENCE_SECONDS = 20.0
_LAST_PORT = 65535


class ProgramError(Exception):
    """A program does not run; the text ends with its last words."""


class Program:
    """A process that serves a page on 127.0.0.1 when it is ready."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        port: int,
        ready: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        account: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """Start it; `ready` is the path of the page, `account` whose process it is, if not ours."""
        self.name, self.port, self.log_path = name, port, log
        self._ready = ready
        user, group = account
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # Out of reach of the terminal's Ctrl-C: it is ended in its turn.
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Return when it serves; raise ProgramError when it ends or takes too long."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while self.running and time.monotonic() < end:
            with contextlib.suppress(OSError, HTTPException):
                summary.fetch(self.port, self._ready)
                return
            time.sleep(0.05)
        raise ProgramError(f"{self.name} does not serve; {last_words(self.log_path)}")

    def stop(self) -> None:
        """End it and return when it is gone."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port(wanted: int) -> int:
    """Return the port, or the next above it that nobody listens on; raise OSError for none."""
    for port in range(wanted, _LAST_PORT + 1):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                return port
    raise OSError(f"no port from {wanted} up to {_LAST_PORT} is free")


def last_words(log: Path) -> str:
    """Return the end of a log, for a message about its program."""
    lines = log.read_text(errors="replace").splitlines()[-10:] if log.exists() else []
    return "its log ends with:\n" + "\n".join(lines) if lines else "its log is empty"
