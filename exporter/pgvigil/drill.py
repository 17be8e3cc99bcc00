"""Restore a backup beside everything else, and say whether it is one."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TextIO

from pgvigil import basebackup, checks, programs, wal
from pgvigil.errors import DrillFailed
from pgvigil.record import NOTE_LENGTH, Record
from pgvigil.recovery import Restored
from pgvigil.scratch import Scratch, breakable, servers_of_ours

_SPARE = 64 << 20
"""Bytes of room that are wanted besides the backup's size, for WAL."""


class Progress(Protocol):
    """Is told how far a drill has come."""

    def step(self, text: str) -> None:
        """A new part of it begins."""

    def at(self, text: str) -> None:
        """How far the part is; may be called very often."""


class Shown:
    """Progress on a stream: one line that changes on a terminal, else a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changes = stream.isatty()
        self._pause = 0.2 if self._changes else 10.0
        self._begin = time.monotonic()
        self._next = 0.0

    def step(self, text: str) -> None:
        """A new part begins."""
        self._show(text, "\n")

    def at(self, text: str) -> None:
        """How far it is, shown when some time has passed."""
        if time.monotonic() >= self._next:
            self._show(f"  {text}", "" if self._changes else "\n")

    def _show(self, text: str, end: str) -> None:
        line = f"{time.monotonic() - self._begin:8.1f} s  {text}"
        self._stream.write(f"\r\033[K{line[:120]}{end}" if self._changes else f"{line}{end}")
        self._stream.flush()
        self._next = time.monotonic() + self._pause


class Source(Protocol):
    """Where a backup comes from."""

    @property
    def name(self) -> str:
        """What it is, for a person."""

    @property
    def place(self) -> str:
        """Where it lies, for the record: one of few."""

    @property
    def tool(self) -> str:
        """What made it, for the record."""

    def prepare(self, scratch: Scratch, deadline: float) -> None:
        """Look at it, without writing anywhere but into scratch; raises DrillFailed."""

    @property
    def major(self) -> int | None:
        """PostgreSQL's version, when it is known before it is restored."""

    @property
    def size(self) -> int:
        """Bytes."""

    def restore(self, scratch: Scratch, deadline: float, progress: Progress) -> None:
        """Put it into the scratch directory; raises DrillFailed."""

    def restore_command(self, scratch: Scratch) -> str:
        """How PostgreSQL gets its WAL; raises DrillFailed."""

    def archived(self) -> Sequence[wal.Segment]:
        """The WAL files that are there to be recovered from, as far as that is known."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a drill shall do."""

    source: Source
    scratch: Path
    keep: bool = False
    programs: Path | None = None
    superuser: str = "postgres"
    target: Mapping[str, str] = field(default_factory=dict)
    """recovery_target settings; none for all the WAL there is."""
    settings: Mapping[str, str] = field(default_factory=dict)
    queries: Sequence[str] = ()
    database: str = "postgres"
    seconds: float = 86400.0


@dataclass(slots=True)
class Report:
    """What a drill came to."""

    source: str
    tool: str
    place: str
    started: datetime
    ended: datetime | None = None
    """When the server accepted connections, or the drill failed before."""
    ok: bool = False
    major: int | None = None
    size_bytes: int = 0
    restore_seconds: float = 0.0
    recovery_seconds: float = 0.0
    check_seconds: float = 0.0
    wal_files: int = 0
    recovery_point: datetime | None = None
    recovery_point_at_least: bool = False
    """Whether the point is only known to be this one or later: no transaction was replayed."""
    manifest_files: int = 0
    databases: int = 0
    relations: int = 0
    tables: int = 0
    indexes: int = 0
    queries: int = 0
    data_checksums: bool = False
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kept: str | None = None

    @property
    def seconds(self) -> float:
        """From the beginning until the server accepted connections."""
        return self.restore_seconds + self.recovery_seconds


def run(order: Order, progress: Progress) -> Report:
    """Do it; whatever is wrong with the backup is in the report. Leaves nothing behind."""
    report = Report(order.source.name, order.source.tool, order.source.place, datetime.now(UTC))
    deadline = time.monotonic() + order.seconds
    try:
        with Scratch(order.scratch, keep=order.keep) as scratch:
            report.kept = str(scratch.directory) if order.keep else None
            try:
                _drill(order, scratch, deadline, report, progress)
            finally:
                progress.step("cleaning up")
    except DrillFailed as error:
        report.faults.append(str(error))
    report.ended = report.ended or datetime.now(UTC)
    report.ok = not report.faults
    return report


def _drill(
    order: Order, scratch: Scratch, deadline: float, report: Report, progress: Progress
) -> None:
    source, begin = order.source, time.monotonic()
    source.prepare(scratch, deadline)
    report.size_bytes, report.major = source.size, source.major
    if source.major is not None:
        programs.find(source.major, order.programs, scratch)  # better now than after the copying
    _see_that_nothing_is_hurt(scratch)
    if scratch.free() < source.size + _SPARE:
        raise DrillFailed(
            f"{order.scratch} has {shown(scratch.free())} free, and the backup needs "
            f"{shown(source.size + _SPARE)}; --scratch names another place"
        )
    archive = source.archived()
    progress.step(f"restoring {source.name}")
    try:
        source.restore(scratch, deadline, progress)
    finally:
        report.restore_seconds = time.monotonic() - begin
    report.major = basebackup.major(scratch.data)
    found = programs.find(report.major, order.programs, scratch)
    report.manifest_files = basebackup.verify(scratch.data)
    basebackup.settle(scratch.data, scratch.tablespaces)
    at_least = basebackup.last_change(scratch.data)
    report.restore_seconds = time.monotonic() - begin

    begin = time.monotonic()
    server = Restored(
        scratch,
        found,
        report.major,
        source.restore_command(scratch),
        order.target,
        order.settings,
    )
    progress.step(f"starting PostgreSQL {report.major} and recovering")
    try:
        server.start(deadline, progress.at)
    finally:
        report.wal_files = server.recovered.wal_files
        report.warnings += server.warnings
        report.recovery_seconds = time.monotonic() - begin
        report.ended = datetime.now(UTC)

    progress.step("checking")
    begin = time.monotonic()
    asked = checks.Server(server.socket, order.superuser, report.major, deadline)
    replayed, size = checks.recovered(asked)
    report.recovery_point_at_least = replayed is None
    report.recovery_point = (replayed or datetime.fromtimestamp(at_least, UTC)).astimezone(UTC)
    if not order.target and (lost := server.lost(size, list(archive))):
        reached = report.recovery_point.isoformat(" ", "seconds")
        report.faults.append(
            f"recovery ended at {reached}, before WAL file {lost}, which the archive has: one "
            "before it is missing or damaged"
        )
    try:
        with breakable():
            findings = checks.look(asked, order.queries, order.database, progress.at)
    finally:
        report.check_seconds = time.monotonic() - begin
    for torn in checks.torn(scratch.data, findings.block_size):
        findings.fault(torn)
    for name in ("databases", "relations", "tables", "indexes", "queries", "data_checksums"):
        setattr(report, name, getattr(findings, name))
    report.faults += findings.faults
    if findings.more_faults:
        report.faults.append(f"and {findings.more_faults} more")
    report.warnings += findings.warnings


def _see_that_nothing_is_hurt(scratch: Scratch) -> None:
    """Without the kernel's fence, be sure that no server's files are ours to write."""
    if not scratch.fenced and (running := servers_of_ours()):
        raise DrillFailed(
            "this kernel has no Landlock, and PostgreSQL runs under this account (process "
            f"{running[0]}): WAL that makes a tablespace would be replayed into that server's "
            "files. Run the drill as another account, or on another machine"
        )


def shown(size: int) -> str:
    """Bytes for a person."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1024 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def lines(report: Report) -> Iterator[str]:
    """The report for a person."""
    yield f"drill {'PASSED' if report.ok else 'FAILED'}: {report.source}"
    for fault in report.faults:
        yield f"  wrong      {fault}"
    for warning in report.warnings:
        yield f"  note       {warning}"
    if report.major:
        yield f"  backup     PostgreSQL {report.major}, {shown(report.size_bytes)}"
    if report.recovery_point:
        behind = (report.started - report.recovery_point).total_seconds()
        least = "at least " if report.recovery_point_at_least else ""
        yield (
            f"  recovered  {least}up to {report.recovery_point.isoformat(' ', 'seconds')}, "
            f"{max(0, behind):.0f} s before the drill; "
            f"{report.wal_files} WAL files from the archive"
        )
        yield (
            f"  took       {report.seconds:.1f} s until it accepted connections "
            f"({report.restore_seconds:.1f} s to restore, {report.recovery_seconds:.1f} s to "
            f"recover), {report.check_seconds:.1f} s to check"
        )
        sums = "with" if report.data_checksums else "without"
        yield (
            f"  checked    {report.databases} databases, {report.tables} tables, "
            f"{report.indexes} indexes, {report.queries} queries of yours, {sums} data checksums"
        )
    if report.manifest_files:
        yield f"  manifest   {report.manifest_files} files are as the backup's manifest says"
    if report.kept:
        yield f"  kept       {report.kept}"


def document(report: Report) -> dict[str, object]:
    """The report for a program: times in ISO 8601, sizes in bytes."""
    told = asdict(report)
    told["seconds"] = report.seconds
    return {
        key: value.isoformat() if isinstance(value, datetime) else value
        for key, value in told.items()
    }


def record(report: Report, place: str) -> Record:
    """The row that the record gets: how long it took until the server accepted connections."""
    note = (
        "; ".join(report.faults) or f"{report.tables} tables and {report.indexes} indexes checked"
    )
    return Record(
        "restore_verification",
        report.ok,
        place or report.place,
        lasted=report.seconds,
        size_bytes=report.size_bytes,
        recovery_point=report.recovery_point,
        tool=report.tool,
        note=note[:NOTE_LENGTH],
    )


@dataclass(slots=True)
class Directory:
    """A base backup in a directory, with its WAL in another or none."""

    directory: Path
    archive: Path | None = None
    command: str | None = None
    """The operator's own restore_command."""
    tablespaces: Mapping[str, Path] = field(default_factory=dict)
    _backup: basebackup.BaseBackup | None = None

    @property
    def name(self) -> str:
        """The directory."""
        return str(self.directory)

    @property
    def tool(self) -> str:
        """Nobody knows what made it."""
        return "base backup"

    @property
    def place(self) -> str:
        """A path would be another each time."""
        return ""

    def prepare(self, scratch: Scratch, deadline: float) -> None:  # noqa: ARG002
        """Look what is there; raises DrillFailed."""
        self._backup = basebackup.BaseBackup(self.directory, self.tablespaces)

    @property
    def _known(self) -> basebackup.BaseBackup:
        assert self._backup is not None
        return self._backup

    @property
    def major(self) -> int | None:
        """None for tars."""
        return self._known.major

    @property
    def size(self) -> int:
        """Bytes."""
        return self._known.size

    def restore(self, scratch: Scratch, deadline: float, progress: Progress) -> None:
        """Copy it; raises DrillFailed."""
        _copy(self._known, scratch, deadline, progress.at)

    def restore_command(self, scratch: Scratch) -> str:
        """The operator's own, one for the archive, or one that finds nothing."""
        if self.command is not None:
            return self.command
        if self.archive is None:
            return "false"
        return wal.restore_command(self.archive, scratch.directory / "restore-wal")

    def archived(self) -> Sequence[wal.Segment]:
        """What the archive's directory has."""
        return list(wal.archived(self.archive)) if self.archive else []


def _copy(
    backup: basebackup.BaseBackup, scratch: Scratch, deadline: float, tell: Callable[[str], None]
) -> None:
    copied = 0

    def moved(count: int) -> None:
        nonlocal copied
        copied += count
        if time.monotonic() > deadline:
            raise DrillFailed(f"copying did not end in time, after {shown(copied)}")
        tell(f"{shown(copied)} of {shown(backup.size)} copied")

    backup.copy(scratch.data, scratch.tablespaces, moved)
