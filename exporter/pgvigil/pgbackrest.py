"""Ask pgBackRest what its repositories have, and have it restore from them."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgvigil import wal
from pgvigil.drill import Progress
from pgvigil.errors import DrillFailed, printable
from pgvigil.scratch import Scratch

_PERCENT = re.compile(rb"(\d+(?:\.\d+)?)%")
_TAIL = 4096


@dataclass(slots=True)
class PgBackRest:
    """The newest backup of a stanza, or the newest before a moment."""

    stanza: str
    repository: int | None = None
    config: Path | None = None
    target: Mapping[str, str] = field(default_factory=dict)
    """recovery_target settings."""
    command: str = "pgbackrest"
    _backup: Mapping[str, Any] = field(default_factory=dict)
    _version: int | None = None
    _segments: Sequence[wal.Segment] = ()

    @property
    def name(self) -> str:
        """The stanza, and the repository where one is told."""
        return f"{self.stanza}{f' of repository {self.repository}' if self.repository else ''}"

    @property
    def place(self) -> str:
        """The repository, where one is told."""
        return f"repo{self.repository}" if self.repository else ""

    @property
    def tool(self) -> str:
        """What made the backup."""
        return "pgBackRest"

    def prepare(self, scratch: Scratch, deadline: float) -> None:
        """Ask for the stanza's backups; raises DrillFailed when there is none that is whole."""
        code, text = scratch.run(self._words("info", "--output=json"), deadline)
        begin = text.find("[{")
        try:
            (stanza,) = json.loads(text[begin:] if code == 0 and begin >= 0 else "[]")
        except ValueError:
            last = (text.strip().splitlines() or ["nothing"])[-1]
            raise DrillFailed(f"pgbackrest info ended with {code}: {printable(last)}") from None
        whole = [
            backup
            for backup in stanza.get("backup", ())
            if not backup.get("error")
            and self.repository in (None, backup["database"].get("repo-key"))
        ]
        if not whole:
            raise DrillFailed(
                f"stanza {self.name} has no backup without an error; pgBackRest says: "
                f"{printable(str(stanza.get('status', {}).get('message')))}"
            )
        self._backup = whole[-1]
        of = self._backup["database"]
        for database in stanza.get("db", ()):
            if (database["id"], database.get("repo-key")) == (of["id"], of.get("repo-key")):
                self._version = int(float(database["version"]))
        self._segments = [
            found
            for archive in stanza.get("archive", ())
            if archive["database"] == of and (found := wal.segment(archive.get("max") or ""))
        ]

    @property
    def major(self) -> int | None:
        """The major version of the newest backup's server."""
        return self._version

    @property
    def size(self) -> int:
        """Bytes of the newest backup when it is restored."""
        return int(self._backup["info"]["size"])

    def restore(self, scratch: Scratch, deadline: float, progress: Progress) -> None:
        """Have it restored, tablespaces and links inside; raises DrillFailed."""
        scratch.data.mkdir(mode=0o700)
        scratch.tablespaces.mkdir(mode=0o700)
        words = self._words(
            "restore",
            f"--pg1-path={scratch.data}",
            f"--tablespace-map-all={scratch.tablespaces}",
            "--archive-mode=off",
            f"--lock-path={scratch.temporary}",
            "--log-level-console=detail",
            *self._type(),
        )

        def look(output: Path) -> None:
            with output.open("rb") as file:
                file.seek(max(0, output.stat().st_size - _TAIL))
                if found := _PERCENT.findall(file.read()):
                    progress.at(f"{found[-1].decode()} % restored")

        code, text = scratch.run(words, deadline, look)
        if code != 0:
            said = [line for line in text.splitlines() if "ERROR" in line] or text.splitlines()
            why = printable(" ".join((said or ["nothing"])[0].split()))
            raise DrillFailed(f"pgbackrest restore ended with {code}: {why}")

    def restore_command(self, scratch: Scratch) -> str:
        """How PostgreSQL has it bring a WAL file, without the spool of the live server."""
        words = self._words("archive-get", f"--pg1-path={scratch.data}", "--no-archive-async")
        return f"{shlex.join(words).replace('%', '%%')} %f %p"

    def archived(self) -> Sequence[wal.Segment]:
        """The newest WAL file of the archive."""
        return self._segments

    def _words(self, command: str, *options: str) -> list[str]:
        words = [self.command, f"--stanza={self.stanza}", "--log-level-file=off"]
        if self.config is not None:
            words.append(f"--config={self.config.resolve()}")
        if self.repository is not None:
            words.append(f"--repo={self.repository}")
        return [*words, *options, command]

    def _type(self) -> list[str]:
        if moment := self.target.get("recovery_target_time"):
            return ["--type=time", f"--target={moment}"]
        return ["--type=immediate"] if self.target else ["--type=default"]
