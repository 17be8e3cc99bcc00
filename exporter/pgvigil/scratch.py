"""Hold a directory and the processes that work in it, both gone as soon as we are."""

import contextlib
import errno
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from pgvigil import fence
from pgvigil.errors import DrillFailed
from pgvigil.surroundings import environment

_PATIENCE = 20.0
"""Seconds that a process has to end before it is killed."""
_MOST_OUTPUT = 64 << 20
"""Bytes of a command's answer that are read."""


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Told:
    """Whether we were told to end, and whether that may break off what is being done."""

    to_end = False
    breaks = False


def listen() -> None:
    """From now on take Ctrl-C and `kill` for a wish to clean up and end.

    The wish waits until `heed`: broken off just anywhere, Python's subprocess may keep a lock for
    ever, or lose a process that it has started.
    """

    def tell(*_: object) -> None:
        _Told.to_end = True
        if _Told.breaks:
            raise KeyboardInterrupt

    for number in _ENDING:
        signal.signal(number, tell)


def heed() -> None:
    """Raise KeyboardInterrupt if we were told to end."""
    if _Told.to_end:
        raise KeyboardInterrupt


@contextlib.contextmanager
def breakable() -> Iterator[None]:
    """Let the wish to end break off what waits long for an answer."""
    heed()
    _Told.breaks = True
    try:
        yield
    finally:
        _Told.breaks = False


@contextlib.contextmanager
def account(name: str | None) -> Iterator[None]:
    """Be another account in the block, where root is asked to; PostgreSQL does not run as root.

    Raises DrillFailed when we are root and have no account, or are not root and are given one.
    """
    if os.getuid() != 0:
        if name is not None and name != pwd.getpwuid(os.getuid()).pw_name:
            raise DrillFailed(f"only root can become {name}; run it as {name}, without --as")
        yield
        return
    if name is None:
        raise DrillFailed(
            "PostgreSQL does not run as root; say as whom, such as --as postgres, or run it so"
        )
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise DrillFailed(f"--as {name}: there is no such account") from None
    if entry.pw_uid == 0:
        raise DrillFailed(f"--as {name}: that is root, and PostgreSQL does not run as root")
    groups = os.getgroups()
    os.initgroups(name, entry.pw_gid)
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


class Scratch:
    """A directory of ours; at the end its processes are ended and it is removed.

    A process beside us sees to the removal, also when we are killed without a word.
    """

    def __init__(self, parent: Path, *, keep: bool = False) -> None:
        """Make it in a directory that exists; with `keep` it stays. Raises DrillFailed."""
        try:
            self.directory = Path(tempfile.mkdtemp(prefix="drill-", dir=parent)).resolve()
        except OSError as error:
            raise DrillFailed(f"{parent}: no scratch directory can be made: {error.strerror}; "
                              "--scratch names another place") from None  # fmt: skip
        self.data = self.directory / "data"
        self.tablespaces = self.directory / "tablespaces"
        self.temporary = self.directory / "tmp"
        self._fence: int | None = None
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        reading, self._pipe = os.pipe()
        self._guardian = os.fork()
        if self._guardian == 0:
            _guard(reading, self._pipe, None if keep else self.directory)
        os.close(reading)
        self.temporary.mkdir(mode=0o700)
        # What is restored may want to write where the live server lives: WAL that makes a
        # tablespace is replayed where it was made, and empties the directory first.
        self._fence = fence.build([self.directory, Path("/dev")])

    @property
    def fenced(self) -> bool:
        """Whether the kernel keeps what runs here from writing anywhere else."""
        return self._fence is not None

    def __enter__(self) -> Self:
        """Nothing more is to be done."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes and wait until the directory is removed."""
        try:
            for process in list(self._running.values()):
                self.end(process)
        finally:
            if self._fence is not None:
                os.close(self._fence)
            os.close(self._pipe)
            os.waitpid(self._guardian, 0)

    def free(self) -> int:
        """How many bytes fit in there."""
        return shutil.disk_usage(self.directory).free

    def spawn(self, command: Sequence[str | Path], output: Path) -> subprocess.Popen[bytes]:
        """Start a program in the directory, what it says going to the end of a file.

        It finds our environment without what tells of the servers that we watch.
        """
        lowered = os.geteuid() != os.getuid()
        with output.open("ab") as file:
            try:
                process = subprocess.Popen(  # noqa: S603
                    command,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**environment(), "TMPDIR": str(self.temporary)},
                    preexec_fn=None if self._fence is None else partial(fence.enter, self._fence),
                    start_new_session=True,
                    user=os.geteuid() if lowered else None,
                    group=os.getegid() if lowered else None,
                )
            except (OSError, subprocess.SubprocessError) as error:
                reason = getattr(error, "strerror", None) or error
                raise DrillFailed(f"{command[0]} cannot be run: {reason}") from None
        self._running[process.pid] = process
        os.write(self._pipe, b"+%d\n" % process.pid)
        return process

    def end(
        self, process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGQUIT
    ) -> None:
        """End a process and what it has started, if they still run."""
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                _kill_group(process.pid, signal.SIGKILL)
                process.wait()
        _kill_group(process.pid, signal.SIGKILL)
        if self._running.pop(process.pid, None):
            os.write(self._pipe, b"-%d\n" % process.pid)

    def run(
        self,
        command: Sequence[str | Path],
        deadline: float,
        while_waiting: Callable[[Path], None] | None = None,
    ) -> tuple[int, str]:
        """The exit code of a program and what it said, at most until a moment of time.monotonic().

        `while_waiting` is called with the file it writes to. Raises DrillFailed.
        """
        output = self.directory / f"output-{Path(command[0]).name}-{time.monotonic_ns()}"
        process = self.spawn(command, output)
        try:
            while True:
                try:
                    code = process.wait(0.1)
                    break
                except subprocess.TimeoutExpired:
                    heed()
                    if time.monotonic() > deadline:
                        raise DrillFailed(f"{command[0]} did not end in time") from None
                    if while_waiting:
                        while_waiting(output)
        finally:
            self.end(process)
        with output.open("rb") as file:
            return code, file.read(_MOST_OUTPUT).decode(errors="replace")


def outcome(error: OSError) -> str:
    """What a failed call on a file means for a drill."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the scratch directory's disk is full; --scratch names another place"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def servers_of_ours() -> list[int]:
    """The PostgreSQL servers that run on this machine under our account, by process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.stat().st_uid != os.geteuid():
                continue
            name = (entry / "comm").read_text().strip()
            if name in ("postgres", "postmaster"):
                found.append(int(entry.name))
    return sorted(found)


def _kill_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _guard(reading: int, writing: int, remove: Path | None) -> None:
    """Wait for the drill's end, then end what it has left running and remove the directory."""
    try:
        os.setsid()  # Ctrl-C is for the others
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        os.close(writing)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        if os.geteuid() != os.getuid():
            user, group = os.geteuid(), os.getegid()
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
        running: set[int] = set()
        with open(reading, "rb") as pipe:
            for line in pipe:
                change = running.add if line.startswith(b"+") else running.discard
                change(int(line[1:]))
        for pid in running:
            _kill_group(pid, signal.SIGQUIT)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and any(map(_runs, running)):
            time.sleep(0.05)
        for pid in running:
            _kill_group(pid, signal.SIGKILL)
        if remove is not None:
            shutil.rmtree(remove, ignore_errors=True)
    finally:
        os._exit(0)


def _runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True
