"""Puts a folder on a disk of its own that is soon full."""

import errno
import shutil
import subprocess
from pathlib import Path
from typing import Self

_BLOCK = bytes(1 << 16)


class SmallDisk:
    """A file system in memory in the place of a folder, with what was in it.

    Nobody may use the folder when it is put there and when it is taken away.
    """

    def __init__(self, folder: Path, room: int) -> None:
        """`room` is how many bytes there are besides those that the folder holds."""
        self._folder = folder
        self._room = room
        self._filler = folder / "filler"

    def __enter__(self) -> Self:
        """Put it there; raises RuntimeError where we may not."""
        was = self._folder.stat()
        aside = self._folder.with_name(f"{self._folder.name}.aside")
        held = subprocess.run(["du", "-sk", self._folder], check=True, capture_output=True)
        size = int(held.stdout.split()[0]) * 1024 + self._room
        shutil.move(self._folder, aside)
        self._folder.mkdir()
        of = f"size={size},mode={was.st_mode & 0o777:o},uid={was.st_uid},gid={was.st_gid}"
        command = ["mount", "-t", "tmpfs", "-o", of, "small-disk", str(self._folder)]
        try:
            answer = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            answer = subprocess.CompletedProcess(command, 1, "", "there is no mount")
        if answer.returncode != 0:
            self._folder.rmdir()
            shutil.move(aside, self._folder)
            raise RuntimeError(f"a disk cannot be mounted here: {answer.stderr.strip()}")
        subprocess.run(["cp", "-a", f"{aside}/.", self._folder], check=True)
        shutil.rmtree(aside)
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away with all that is on it; the folder is empty then."""
        subprocess.run(["umount", self._folder], check=True)

    def fill(self) -> None:
        """Leave no room."""
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(_BLOCK)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink()
