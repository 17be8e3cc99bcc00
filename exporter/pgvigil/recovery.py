"""Start a restored server on a private socket and wait until its recovery has ended."""

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pgvigil import wal
from pgvigil.errors import DrillFailed, printable
from pgvigil.scratch import Scratch, heed

PORT = 5432
"""It names the socket only."""
_LONGEST_SOCKET = 103
"""Bytes of a Unix socket's path that every system takes; Linux takes four more."""
_PAUSE = 0.05

_CLOSED: Mapping[str, str] = {
    # Nobody comes in but through a socket in our directory.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "ssl": "off",
    "max_wal_senders": "0",
    "hot_standby": "off",
    # It is a copy and must not act as what it was copied from: archive, take another's place at a
    # publisher, run jobs of pg_cron or TimescaleDB, or what somebody wants done at each login.
    "archive_mode": "off",
    "archive_command": "",
    "archive_cleanup_command": "",
    "recovery_end_command": "",
    "primary_conninfo": "",
    "primary_slot_name": "",
    "max_logical_replication_workers": "0",
    "max_worker_processes": "0",
    "autovacuum": "off",
    # What it says comes to us, in words that we know.
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_line_prefix": "%m [%p] ",
    "log_min_messages": "warning",
    "log_statement": "none",
    "lc_messages": "C",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "dynamic_shared_memory_type": "mmap",
    "huge_pages": "off",
    "cluster_name": "pgvigil drill",
    "recovery_target_timeline": "latest",
    "recovery_target_action": "promote",
}
_EASY: Mapping[str, str] = {"shared_buffers": "128MB", "max_prepared_transactions": "1000"}
"""What `settings` of the operator may change."""
_NEWER: Mapping[str, tuple[int, str]] = {
    "event_triggers": (17, "off"),
    "archive_library": (15, ""),
    "log_startup_progress_interval": (15, "1s"),
}

_LINE = re.compile(r"(LOG|FATAL|PANIC|ERROR|HINT|WARNING):  (.*)")
_UNLOADABLE = re.compile(
    r'FATAL:  could not (?:access file "(?P<name>[^"]+)"|load library "(?P<path>[^"]+)")'
)


@dataclass(slots=True)
class Recovered:
    """How far a recovery has come."""

    wal_files: int = 0
    consistent: bool = False
    position: str = ""
    full: bool = False
    """Whether somebody found no space on the disk."""
    problems: list[str] = field(default_factory=list)
    """What the server said of severity WARNING and above."""


@dataclass(slots=True)
class Restored:
    """A restored server that runs in a scratch directory."""

    scratch: Scratch
    programs: Path
    major: int
    restore_command: str
    target: Mapping[str, str]
    """recovery_target settings."""
    settings: Mapping[str, str]
    """The operator's own."""
    warnings: list[str] = field(default_factory=list)
    recovered: Recovered = field(default_factory=Recovered)

    @property
    def socket(self) -> Path:
        """The directory with its socket."""
        return self.scratch.directory

    def start(self, deadline: float, tell: Callable[[str], None]) -> None:
        """Start it and return when recovery has ended and it accepts us; raises DrillFailed."""
        if len(os.fsencode(self.socket / f".s.PGSQL.{PORT}")) > _LONGEST_SOCKET:
            raise DrillFailed(
                f"{self.socket} is too long a path for a socket; --scratch names a shorter one"
            )
        preloaded = self._preloaded(deadline)
        self._take_over()
        while (unloadable := self._try(preloaded, deadline, tell)) is not None:
            if unloadable not in preloaded:
                raise DrillFailed(f"the server does not start: it cannot load {unloadable}")
            preloaded.remove(unloadable)
            self.warnings.append(
                f"shared_preload_libraries has {printable(unloadable)}, which is not installed here"
            )

    def _preloaded(self, deadline: float) -> list[str]:
        """What the backup's own configuration would load, as far as it lies in the backup."""
        if "shared_preload_libraries" in self.settings:
            text = self.settings["shared_preload_libraries"]
        elif not (self.scratch.data / "postgresql.conf").is_file():
            self.warnings.append(
                "the backup has no postgresql.conf, so that no library is preloaded; "
                "--set shared_preload_libraries=... names what the databases need"
            )
            return []
        else:
            command = ["-D", str(self.scratch.data), "-C", "shared_preload_libraries"]
            code, text = self.scratch.run([self.programs / "postgres", *command], deadline)
            if code != 0:
                last = (text.strip().splitlines() or ["nothing"])[-1]
                self.warnings.append(
                    "the backup's postgresql.conf cannot be read, so that no library is preloaded: "
                    + printable(last)
                )
                return []
        return [name.strip().strip('"') for name in text.strip().split(",") if name.strip()]

    def _take_over(self) -> None:
        """Take the backup's own settings out of force."""
        data = self.scratch.data
        for name in ("postgresql.auto.conf", "standby.signal", "recovery.conf"):
            (data / name).unlink(missing_ok=True)
        (data / "postgresql.auto.conf").write_text("")
        (data / "recovery.signal").write_text("")
        (self.scratch.directory / "hba.conf").write_text("local all all trust\n")
        (self.scratch.directory / "ident.conf").write_text("")

    def _try(
        self, preloaded: list[str], deadline: float, tell: Callable[[str], None]
    ) -> str | None:
        """Start it; the name of a library that it cannot load, or None when it is ready."""
        directory, data = self.scratch.directory, self.scratch.data
        newer = {k: value for k, (since, value) in _NEWER.items() if self.major >= since}
        settings = {
            **_EASY,
            **self.settings,
            "shared_preload_libraries": ",".join(f'"{name}"' for name in preloaded),
            **_CLOSED,
            **newer,
            "data_directory": str(data),
            "hba_file": str(directory / "hba.conf"),
            "ident_file": str(directory / "ident.conf"),
            "unix_socket_directories": f'"{self.socket}"',
            "port": str(PORT),
            "restore_command": self.restore_command,
            **self.target,
        }
        config = directory / "postgresql.conf"
        config.write_text("".join(f"{name} = {_quoted(v)}\n" for name, v in settings.items()))
        log = directory / f"log-{time.monotonic_ns()}"
        server = self.scratch.spawn(
            [self.programs / "postgres", "-D", data, "-c", f"config_file={config}"], log
        )
        follow = _Log(log, self.recovered)
        begin = time.monotonic()
        while True:
            ended = server.poll() is not None
            follow.read()
            if ended:
                self.scratch.end(server)
                break
            if _ready(data, server.pid):
                return None
            heed()
            if time.monotonic() > deadline:
                raise DrillFailed(f"recovery did not end in time; {self._state()}")
            tell(f"{self._state()}, {time.monotonic() - begin:.0f} s")
            time.sleep(_PAUSE)
        if found := _UNLOADABLE.search(log.read_text(errors="replace")):
            return found["name"] or Path(found["path"]).stem
        raise DrillFailed(self._why())

    def _state(self) -> str:
        now = self.recovered
        where = f" up to {now.position}" if now.position else ""
        state = "consistent" if now.consistent else "not consistent yet"
        return f"{now.wal_files} WAL files replayed{where}, {state}"

    def _why(self) -> str:
        """Why the server has ended, in its own words."""
        said = [line for line in self.recovered.problems if not line.startswith("WARNING")]
        last = next((line for line in said if line.startswith(("FATAL", "PANIC"))), None)
        text = last or (said[-1] if said else "it said nothing")
        if self.recovered.full:
            text += " (the scratch directory's disk is full; --scratch names another place)"
        if "pg_tblspc" in text or "tablespace" in text:
            text += (
                " (WAL that makes a tablespace is replayed at the tablespace's own path only, "
                "where a drill does not write: take a newer backup, or recover with --immediate)"
            )
        if "WAL ends" in text or "checkpoint record" in text or "before configured" in text:
            text += f" ({self._state()}: WAL is missing)"
        return f"recovery failed: {text}"

    def lost(self, size: int, archive: list[wal.Segment]) -> wal.Segment | None:
        """The first WAL file of the archive that was not reached, though it is on the way.

        PostgreSQL ends recovery at the first file that is missing or damaged, and says nothing.
        """
        timeline, position = self._switched()
        if not position:
            return None
        reached = wal.at(timeline, position, size)
        beyond = [
            one
            for one in archive
            if one.timeline == timeline and one.begin(size) > reached.begin(size)
        ]
        return min(beyond, default=None)

    def _switched(self) -> tuple[int, int]:
        """The timeline that was recovered and the position where it was left."""
        histories = sorted((self.scratch.data / "pg_wal").glob("????????.history"))
        for line in reversed(histories[-1].read_text().splitlines() if histories else []):
            if found := re.match(r"\s*(\d+)\s+([0-9A-F]+)/([0-9A-F]+)", line):
                return int(found[1]), (int(found[2], 16) << 32) + int(found[3], 16)
        return 0, 0


class _Log:
    """Reads what the server says while it is being said."""

    def __init__(self, path: Path, into: Recovered) -> None:
        self._path, self._into, self._begin = path, into, 0

    def read(self) -> None:
        """Take what has come since the last time."""
        with self._path.open("rb") as file:
            file.seek(self._begin)
            text = file.read(1 << 20)
        whole = text[: text.rfind(b"\n") + 1]
        self._into.full = self._into.full or b"No space left on device" in whole
        self._begin += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if found := _LINE.search(line):
                self._take(found[1], printable(found[2]))

    def _take(self, severity: str, text: str) -> None:
        into = self._into
        if severity != "LOG":
            into.problems = [*into.problems[-50:], f"{severity}: {text}"]
        elif found := re.search(r'restored log file "([0-9A-F]{24})"', text):
            into.wal_files += 1
            into.position = into.position or found[1]
        elif text.startswith("consistent recovery state reached"):
            into.consistent = True
        if found := re.search(
            r"(?:redo done at|current LSN:|redo starts at) ([0-9A-F]+/\w+)", text
        ):
            into.position = found[1]


def _ready(data: Path, pid: int) -> bool:
    """Whether the server says of itself that it is ready, in the eighth line of its lock file."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
