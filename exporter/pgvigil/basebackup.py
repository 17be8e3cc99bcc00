"""Read a base backup, a directory or its tars, and copy it to where it may be started."""

import hashlib
import json
import os
import re
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pgvigil.errors import DrillFailed
from pgvigil.scratch import heed, outcome

Moved = Callable[[int], None]
"""Is told of bytes as they arrive."""

_CHUNK = 1 << 20
_EMPTIED = {
    *("pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots"),
    *("pg_stat_tmp", "pg_subtrans"),
}
"""What PostgreSQL empties at its start anyway; and slots would hold back WAL for nobody."""
_LEFT_OUT = {"postmaster.opts", "standby.signal", "recovery.signal"}
_LABEL, _MAP, _MANIFEST = "backup_label", "tablespace_map", "backup_manifest"
_TABLESPACES = "pg_tblspc"
_SHUT_DOWN = 1
"""DB_SHUTDOWNED of PostgreSQL's pg_control.h."""
_MOST_MANIFEST = 1 << 30
_UNREAD = (".zst", ".lz4", ".bz2", ".xz")


@dataclass(slots=True)
class BaseBackup:
    """A base backup as it lies there; it is only ever read."""

    place: Path
    tablespaces: Mapping[str, Path] = field(default_factory=dict)
    """Where the backup has those that it holds links to, by their number."""
    major: int | None = None
    """None for tars, which tell it when they are unpacked."""
    size: int = 0
    """Bytes, compressed ones where nothing tells what they become."""
    tars: Sequence[Path] = ()

    def __post_init__(self) -> None:
        """Look what it is; raises DrillFailed when it is none, or a server's own directory."""
        try:
            names = set(os.listdir(self.place))
        except OSError as error:
            raise DrillFailed(f"{self.place}: {error.strerror}") from None
        if "postmaster.pid" in names:
            raise DrillFailed(
                f"{self.place} is a server's own data directory: it has a postmaster.pid; a drill "
                "wants a backup of it"
            )
        if "PG_VERSION" in names:
            self.major = _major(self.place)
            self.size = sum(_size(source) for _, source in self._files())
            return
        tars = {name for name in names if re.fullmatch(r"(base|pg_wal|\d+)\.tar(\.\w+)?", name)}
        if not any(name.startswith("base.tar") for name in tars):
            raise DrillFailed(f"{self.place} is no base backup: it has {_instead(self.place)}")
        if unread := [name for name in sorted(tars) if name.endswith(_UNREAD)]:
            raise DrillFailed(
                f"{self.place / unread[0]}: only .tar and .tar.gz are read; decompress it first"
            )
        # The base first: its map tells of the others.
        self.tars = [self.place / name for name in sorted(tars, key=lambda n: (n[0] != "b", n))]
        told = sum(_entry_size(entry) for entry in _manifest(self.place))
        self.size = max(told, sum(_size(tar) for tar in self.tars))

    def copy(self, data: Path, tablespaces: Path, moved: Moved) -> None:
        """Copy it into directories that are not there yet; raises DrillFailed."""
        try:
            data.mkdir(mode=0o700)
            tablespaces.mkdir(mode=0o700)
            if self.tars:
                self._unpack(data, tablespaces, moved)
            else:
                self._copy(data, tablespaces, moved)
            for name in (*_EMPTIED, "pg_wal", _TABLESPACES):
                (data / name).mkdir(mode=0o700, exist_ok=True)
        except tarfile.TarError as error:
            raise DrillFailed(f"a tar of {self.place} is damaged: {error}") from None
        except EOFError as error:
            raise DrillFailed(f"a tar of {self.place} ends too early: {error}") from None
        except OSError as error:
            raise DrillFailed(f"copying {self.place} failed: {outcome(error)}") from None

    def _copy(self, data: Path, tablespaces: Path, moved: Moved) -> None:
        for name, source in self._files():
            parts = name.split("/")
            target = data / name
            if parts[0] == _TABLESPACES and (self.place / _TABLESPACES / parts[1]).is_symlink():
                target = tablespaces.joinpath(*parts[1:])
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if source.is_dir():
                target.mkdir(mode=0o700, exist_ok=True)
                continue
            # Not through a link: it may lead to where a server lives.
            descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, "rb") as reading:
                _pour(reading, target, moved)

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Each file's and empty directory's name in the data directory, and where it is read."""
        yield from _walk(self.place, "", _EMPTIED | {_TABLESPACES, "pg_wal"} | _LEFT_OUT)
        wal = self.place / "pg_wal"
        if wal.is_dir() and self._inside(wal):
            yield from _walk(wal.resolve(), "pg_wal/", set())
        for entry in sorted((self.place / _TABLESPACES).glob("*")):
            root, name = entry, f"{_TABLESPACES}/{entry.name}"
            if entry.is_symlink():
                root = self.tablespaces.get(entry.name, entry)
                if root == entry and not self._inside(entry):
                    raise DrillFailed(
                        f"{entry} is a link to {os.readlink(entry)}, outside of the backup, where "
                        "a server may work; say where the backup has that tablespace: "
                        f"--tablespace {entry.name}=DIRECTORY"
                    )
            if not root.is_dir():
                raise DrillFailed(f"tablespace {entry.name}: there is no directory {root}")
            yield name, root.resolve()
            yield from _walk(root.resolve(), f"{name}/", set())

    def _inside(self, link: Path) -> bool:
        return link.resolve().is_relative_to(self.place.resolve())

    def _unpack(self, data: Path, tablespaces: Path, moved: Moved) -> None:
        for path in self.tars:
            stem = path.name.partition(".")[0]
            root = {"base": data, "pg_wal": data / "pg_wal"}.get(stem, tablespaces / stem)
            with tarfile.open(path, "r|*") as tar:
                for member in tar:
                    name = os.path.normpath(member.name)
                    if name.startswith(("/", "..")):
                        raise DrillFailed(f"{path}: {member.name!r} would leave the directory")
                    if name.partition("/")[0] in _EMPTIED | _LEFT_OUT:
                        continue
                    target = root / name
                    if member.isdir():
                        target.mkdir(mode=0o700, parents=True, exist_ok=True)
                    elif member.isfile() and (reading := tar.extractfile(member)):
                        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                        _pour(reading, target, moved)
        if (self.place / _MANIFEST).exists():
            with (self.place / _MANIFEST).open("rb") as reading:
                _pour(reading, data / _MANIFEST, moved)


def verify(data: Path) -> int:
    """Hold a copy against the backup's own manifest; the number of files, 0 without a manifest.

    Sizes always, checksums where Python has the algorithm (CRC32C it has not). Raises DrillFailed.
    """
    count = 0
    for entry in _manifest(data):
        heed()
        name = entry.get("Path") or bytes.fromhex(str(entry["Encoded-Path"])).decode(
            errors="surrogateescape"
        )
        path = data / str(name)
        if path.name in _LEFT_OUT:
            continue
        if not path.is_file():
            raise DrillFailed(f"the backup has no {name}, which its manifest names")
        if _size(path) != _entry_size(entry):
            raise DrillFailed(
                f"{name} has {_size(path)} bytes, and {_entry_size(entry)} in the backup's manifest"
            )
        algorithm = str(entry.get("Checksum-Algorithm", "NONE")).lower()
        if algorithm in hashlib.algorithms_available:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, algorithm).hexdigest()
            if digest != entry.get("Checksum"):
                raise DrillFailed(f"{name} is not what it was: its {algorithm} differs from the "
                                  "backup's manifest")  # fmt: skip
        count += 1
    return count


def settle(data: Path, tablespaces: Path) -> None:
    """Lead a copy's tablespaces into the scratch directory, and see that it may be started.

    Raises DrillFailed when it is a copy of a server that ran, which no WAL makes whole.
    """
    label = data / _LABEL
    if not label.is_file() and _state(data) != _SHUT_DOWN:
        raise DrillFailed(
            "there is no backup_label, and the server was not shut down: it is a bare copy of a "
            "running server, which may be damaged anywhere; take it with pg_basebackup or between "
            "pg_backup_start() and pg_backup_stop()"
        )
    links = data / _TABLESPACES
    linked = {link.resolve() for link in links.iterdir() if link.is_symlink()}
    for place in sorted(tablespaces.iterdir()):
        if place.resolve() not in linked:  # pgBackRest has made its own, and has them by name
            (links / place.name).unlink(missing_ok=True)
            (links / place.name).symlink_to(place)
    kept = {link.name: link.resolve() for link in links.iterdir() if link.is_symlink()}
    if outside := [n for n, place in kept.items() if place.parent != tablespaces.resolve()]:
        raise DrillFailed(f"tablespace {outside[0]} lies outside of the scratch directory")
    mapped = data / _MAP
    if not mapped.is_file():
        return
    for line in mapped.read_text(errors="surrogateescape").splitlines():
        number = line.partition(" ")[0]
        if not (links / number).is_dir():
            raise DrillFailed(
                f"the backup has no tablespace {number}, which its map names; "
                f"--tablespace {number}=DIRECTORY says where it is"
            )
    mapped.unlink()
    mapped.write_text("".join(f"{number} {place}\n" for number, place in sorted(kept.items())))


def last_change(data: Path) -> float:
    """When pg_control was last written, in seconds since the epoch; raises DrillFailed."""
    moment: int = _control(data)[1]
    return float(moment)


def _state(data: Path) -> int:
    state: int = _control(data)[0]
    return state


def _control(data: Path) -> tuple[int, int]:
    """The server's state and the moment of pg_control, which has begun so since PostgreSQL 9."""
    try:
        raw = (data / "global" / "pg_control").read_bytes()
        state, moment = struct.unpack_from("=16xi4xq", raw)
    except (OSError, struct.error):
        raise DrillFailed("the backup's global/pg_control cannot be read") from None
    return state, moment


def _major(data: Path) -> int:
    try:
        return int((data / "PG_VERSION").read_text().strip())
    except (OSError, ValueError):
        raise DrillFailed(f"{data / 'PG_VERSION'} names no major version of PostgreSQL") from None


major = _major


def _instead(place: Path) -> str:
    """What a directory has that is not a base backup, in few words."""
    for name in ("data", "pgdata"):
        if (place / name / "PG_VERSION").exists():
            return f"neither PG_VERSION nor base.tar, but {place / name} has one"
    return "neither PG_VERSION nor base.tar" if any(place.iterdir()) else "nothing in it"


def _walk(root: Path, prefix: str, without: set[str]) -> Iterator[tuple[str, Path]]:
    """Files and directories below a root, links and sockets left out; raises DrillFailed."""
    try:
        with os.scandir(root) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DrillFailed(f"{root}: {error.strerror}") from None
    for entry in entries:
        if entry.name in without:
            continue
        path, name = Path(entry.path), prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield name, path
            yield from _walk(path, f"{name}/", set())
        elif entry.is_file(follow_symlinks=False):
            yield name, path


def _pour(reading: IO[bytes], target: Path, moved: Moved) -> None:
    with target.open("xb") as writing:
        while chunk := reading.read(_CHUNK):
            writing.write(chunk)
            heed()
            moved(len(chunk))


def _size(path: Path) -> int:
    status = path.stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _manifest(place: Path) -> list[dict[str, object]]:
    """The files of a backup_manifest; none when there is none. Raises DrillFailed."""
    path = place / _MANIFEST
    try:
        if path.stat().st_size > _MOST_MANIFEST:
            return []
        files = json.loads(path.read_bytes())["Files"]
        return [entry for entry in files if isinstance(entry, dict)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise DrillFailed(f"{path} cannot be read as a backup's manifest") from None


def _entry_size(entry: Mapping[str, object]) -> int:
    return int(str(entry["Size"]))
