"""Shows what a measurement found as tables and verdicts, and keeps it as JSON."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from psycopg import pq

Value = str | float | None
"""A cell; None where nothing could be measured."""

_LIBRARIES = ("psycopg", "prometheus-client", "hypercorn", "isal", "structlog", "PyYAML")


@dataclass
class Table:
    """Rows under one heading."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Value]] = field(default_factory=list)

    def text(self) -> str:
        """The table in columns for a terminal: words to the left, numbers to the right."""
        cells = [list(self.columns), *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        words = [
            all(isinstance(row[at], str) for row in self.rows) for at in range(len(self.columns))
        ]
        lines = [
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(row, widths, words, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])


@dataclass(frozen=True)
class Target:
    """A claim with its limit and what was measured; None when it could not be."""

    claim: str
    limit: float
    measured: float | None
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the claim holds in this run."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def text(self) -> str:
        """One line with the verdict at its end."""
        sign = ">=" if self.at_least else "<="
        verdict = {True: "met", False: "MISSED", None: "unknown"}[self.met]
        return (
            f"target {self.claim} {sign} {self.limit:g}{self.unit}"
            f" : measured {_shown(self.measured)}{self.unit}, {verdict}"
        )


@dataclass
class Report:
    """What one measurement found."""

    name: str
    notes: list[str] = field(default_factory=list)
    """What exactly was measured, and what to mind when reading it."""
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def text(self) -> str:
        """Everything for a terminal."""
        parts = [table.text() for table in self.tables]
        parts += ["\n".join(self.notes)] if self.notes else []
        parts += ["\n".join(target.text() for target in self.targets)] if self.targets else []
        return f"== {self.name} ==\n" + "\n\n".join(parts)

    def write(self, folder: Path, facts: dict[str, Value]) -> Path:
        """Write everything as JSON and return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content = {
            "measurement": self.name,
            "machine": facts,
            "notes": self.notes,
            "tables": [
                {
                    "title": table.title,
                    "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
                }
                for table in self.tables
            ],
            "targets": [
                {
                    "claim": target.claim,
                    "limit": target.limit,
                    "at_least": target.at_least,
                    "unit": target.unit.strip(),
                    "measured": target.measured,
                    "met": target.met,
                }
                for target in self.targets
            ],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def machine() -> dict[str, Value]:
    """Return the facts that figures depend on."""
    libpq = pq.version()
    facts: dict[str, Value] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pgvigil": metadata_version("pgvigil"),
        "libpq": f"{libpq // 10000}.{libpq % 10000}",
    }
    return facts | {name: metadata_version(name) for name in _LIBRARIES}


def metadata_version(name: str) -> str | None:
    """Return the version of an installed distribution, if it is one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Return ours over theirs where both are known."""
    return ours / theirs if ours is not None and theirs else None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _shown(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
