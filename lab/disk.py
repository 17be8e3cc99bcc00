"""Makes disks of their own, which may be small, nearly full or slow."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

_LIMITS = Path("/sys/fs/cgroup/blkio")
"""Where the kernel is told how fast a device may be, for all processes."""


class Disk:
    """An ext4 file system on a loop device, in the place of a folder and with what was in it.

    Nobody may use the folder when it is put there and when it is taken away.
    """

    def __init__(self, folder: Path, size: int, files: int | None = None) -> None:
        """`size` is in bytes; `files` is how many files there may be, when it matters."""
        self.folder = folder
        self._size = size
        self._files = files
        self._image = folder.with_name(f"{folder.name}.image")
        self._limited: set[str] = set()

    def __enter__(self) -> Self:
        """Put it there; raises RuntimeError where we may not."""
        was = self.folder.stat()
        aside = self.folder.with_name(f"{self.folder.name}.aside")
        with self._image.open("wb") as image:
            image.truncate(self._size)
        inodes = [] if self._files is None else ["-N", str(self._files)]
        _run("mkfs.ext4", "-q", "-F", "-m", "0", *inodes, str(self._image))
        shutil.move(self.folder, aside)
        self.folder.mkdir()
        try:
            _run("mount", "-o", "loop", str(self._image), str(self.folder))
        except RuntimeError:
            self.folder.rmdir()
            shutil.move(aside, self.folder)
            raise
        (self.folder / "lost+found").rmdir()
        os.chown(self.folder, was.st_uid, was.st_gid)
        self.folder.chmod(was.st_mode & 0o777)
        _run("cp", "-a", f"{aside}/.", str(self.folder))
        shutil.rmtree(aside)
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away with all that is on it; the folder is empty then."""
        self.hasten()
        _run("umount", str(self.folder))
        self._image.unlink()

    def slow_down(self, **limits: int) -> None:
        """Hold it to so many of `read_iops`, `write_iops`, `read_bps` or `write_bps` a second.

        It no longer reads ahead, either, so that each read is one. Raises OSError where the kernel
        has no control groups of version 1.
        """
        _run("blockdev", "--setra", "0", self._device())
        for name, limit in limits.items():
            self._limited.add(name)
            self._limit(name, limit)

    def hasten(self) -> None:
        """Let it be as fast as it is."""
        for name in self._limited:
            self._limit(name, 0)
        self._limited.clear()

    def fill(self, share: float) -> None:
        """Leave so much of the room used, by a file of ours."""
        state = os.statvfs(self.folder)
        free = state.f_bavail - (1 - share) * state.f_blocks
        with (self.folder / "filler").open("ab") as filler:
            filler.write(bytes(max(0, int(free * state.f_frsize))))

    def fill_with_files(self, share: float) -> None:
        """Leave so many of the files used that there may be, by empty ones of ours."""
        state = os.statvfs(self.folder)
        (self.folder / "files").mkdir()
        for number in range(int(state.f_ffree - (1 - share) * state.f_files)):
            (self.folder / "files" / str(number)).touch()

    def free(self) -> None:
        """Remove what we have filled it with."""
        (self.folder / "filler").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "files", ignore_errors=True)

    def forget(self, file: Path) -> None:
        """Have a file of it read from the disk again."""
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _device(self) -> str:
        return _run("losetup", "-j", str(self._image)).partition(":")[0]

    def _limit(self, name: str, limit: int) -> None:
        number = os.stat(self._device()).st_rdev
        told = f"{os.major(number)}:{os.minor(number)} {limit}\n"
        (_LIMITS / f"blkio.throttle.{name}_device").write_text(told)


def _run(*command: str) -> str:
    """What a program said; raises RuntimeError with its complaint when it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"there is no {command[0]}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout
