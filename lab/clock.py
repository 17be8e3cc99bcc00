"""Gives programs a clock that is moved while they run."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_PLACES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")


class Clock:
    """The time of day that programs started with `environment` see; others see the true one.

    Only programs that ask the C library can be deceived. Intervals go on as before: the monotonic
    clock is left alone.
    """

    def __init__(self) -> None:
        """Raises RuntimeError where libfaketime is not installed."""
        library = _library()
        if library is None:
            raise RuntimeError("libfaketime is not installed")
        self._folder = tempfile.TemporaryDirectory(prefix="clock-")
        self._file = Path(self._folder.name, "offset")
        Path(self._folder.name).chmod(0o755)  # servers run as another account
        self.move(0)
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def move(self, seconds: float) -> None:
        """Have it differ from the true time by so much, at once."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+f}\n")
        fresh.replace(self._file)  # never half written: it is read at each look at the clock


def _library() -> Path | None:
    for place in _PLACES:
        for found in Path(place).glob("**/faketime/libfaketime.so.1"):
            return found
    return None
