"""Turn standards.yml into the standards that pgvigil keeps, or name every fault in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from pgvigil import documents
from pgvigil.errors import Refused

LATENCY = "latency_seconds"
"""The objective that is a limit of histograms."""


class Objective(NamedTuple):
    """A number that rules compare with."""

    standard: str
    name: str
    severity: str
    """What follows beyond it: `page`, `ticket` or `finding`."""
    value: float


@dataclass(frozen=True, slots=True)
class Standard:
    """One thing that is demanded of a database and its care, and what proves it."""

    id: str
    """Such as `AVL-1`; alerts, panels and runbooks are joined by it."""
    title: str
    objective: str
    """What is measured and the number it is held against, for a person to read."""
    evidence: Sequence[str]
    """`metric`, `history`, `record`, `test`: what kind of thing proves it."""
    response: Sequence[str]
    """`page`, `ticket`, `finding`, `report`: what follows when it is not kept."""
    metrics: Sequence[str]
    """Full exposed names, of the catalogue's or the exporter's own."""
    place: str
    line: int
    objectives: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The numbers that rules compare with, by name and by what follows beyond them: `page`,
    `ticket`, `finding`."""
    alerts: Sequence[str] = ()
    findings: Sequence[str] = ()
    """Rules that list where it is not kept, and wake nobody."""


def load(path: Path | None = None) -> tuple[Standard, ...]:
    """The standards in the order of their file: ours, or that at `path`.

    Raises Refused with every problem of the file.
    """
    if path is None:
        document, problems = documents.read(_shipped(), "standards.yml")
    else:
        document, problems = documents.read(path)
    if document is None:
        raise Refused(problems)
    faults, _ = documents.check(document, "standards")
    if problems or faults:
        raise Refused([*problems, *faults])
    return tuple(
        Standard(
            id=name,
            title=raw["title"],
            objective=" ".join(raw["objective"].split()),
            evidence=tuple(raw["evidence"]),
            response=tuple(raw["response"]),
            metrics=tuple(raw["metrics"]),
            place=document.place,
            line=document.lines[(name,)],
            objectives=raw.get("objectives", {}),
            alerts=tuple(raw.get("alerts", ())),
            findings=tuple(raw.get("findings", ())),
        )
        for name, raw in document.data.items()
    )


@cache
def ours() -> Mapping[str, Standard]:
    """Our standards by their ids."""
    return {standard.id: standard for standard in load()}


@cache
def objectives() -> tuple[Objective, ...]:
    """All numbers of our standards."""
    return tuple(
        Objective(standard.id, name, severity, float(value))
        for standard in ours().values()
        for name, by_severity in standard.objectives.items()
        for severity, value in by_severity.items()
    )


def _shipped() -> Path:
    return Path(str(files("pgvigil").joinpath("standards.yml")))
