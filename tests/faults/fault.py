"""What a fault is, and how it is played: broken, told, mended, and told to be over."""

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import psycopg

from lab.alertmanager import Notice
from lab.postgres import ServerError
from tests.faults.stage import Stage

Labels = tuple[tuple[str, str], ...]

OWN = frozenset(
    {"CostlyStatement", "HbaChanged", "SchemaChanged", "SettingsChanged", "SlowStatement"}
)
"""Findings that tell of a fault's own doing, as most change something by statements that cost."""


@dataclass(frozen=True)
class Alert:
    """An alert that shall arrive."""

    name: str
    severity: str
    """`page` or `ticket`."""
    instance: str = ""
    """The target that it shall be told of: `primary` or `standby`; any, or none, when empty."""
    labels: Labels = ()
    """Others that it shall have."""

    def fits(self, notice: Notice) -> bool:
        """Whether it is this that has arrived."""
        wanted = {"severity": self.severity, **dict(self.labels)}
        if self.instance:
            wanted["instance"] = self.instance
        return notice.name == self.name and wanted.items() <= notice.labels.items()


@dataclass(frozen=True)
class Fault:
    """Something that breaks, and what shall be told of it.

    `make` is entered when all is well; leaving it mends.
    """

    name: str
    """A sentence, as the table shows it."""
    make: Callable[[Stage], AbstractContextManager[None]]
    alerts: tuple[Alert, ...] = ()
    findings: Collection[str] = ()
    also: Collection[str] = ()
    """Alerts and findings that may come with it, because the fault is what they tell of, too."""
    lingers: Collection[str] = ()
    """Alerts and findings that go on for minutes after it and are not waited for."""
    scene: str = "pair"
    """Where it takes place, of SCENES."""
    since: int = 13
    until: int = 99
    """The major versions on which it can be played, half-open."""

    @property
    def expected(self) -> tuple[Alert | str, ...]:
        """The alerts, and the names of the findings."""
        return (*self.alerts, *self.findings)


@dataclass(frozen=True)
class Told:
    """When something that was expected came and went, in seconds after the fault and its end."""

    came: float
    went: float


@dataclass
class Result:
    """What was seen of a fault."""

    told: dict[Alert | str, Told] = field(default_factory=dict)
    """By alert, or by the name of a finding."""
    broken: list[str] = field(default_factory=list)
    """What was not as it shall be."""


def named(expected: Alert | str) -> str:
    """An alert, or a finding, as people read it."""
    if isinstance(expected, str):
        return f"finding `{expected}`"
    return f"`{expected.name}`, {expected.severity}"


def play(fault: Fault, stage: Stage) -> Result:
    """Break, wait, mend, wait; what goes wrong stands in the result."""
    result = Result()
    # What the fault before has left is not this one's.
    before = stage.held()
    # A finding of always may be away while a fault's target is, and come again later.
    found_before = stage.findings() | {*stage.usual}
    left = before | found_before | OWN | set(fault.lingers)
    begun = time.monotonic()
    came: dict[Alert | str, float] = {}
    found: set[str] = set()
    try:
        with fault.make(stage):
            made = time.monotonic()
            try:
                _wait_for_all(fault, stage, begun, came, found)
            except TimeoutError as error:  # it is mended all the same, or the next ones suffer
                result.broken.append(str(error))
        mended = time.monotonic()
        for expected, at in came.items():
            went = _wait_until_gone(expected, fault, stage, at)
            result.told[expected] = Told(max(0.0, at - made), max(0.0, went - mended))
        stage.wait(
            lambda: not (stage.held() | stage.findings()) - left,
            lambda: f"still there: {sorted((stage.held() | stage.findings()) - left)}",
        )
    except (TimeoutError, RuntimeError, ServerError, psycopg.Error) as error:
        result.broken.append(str(error).strip())
    strangers = found - found_before - OWN - {*fault.findings, *fault.also}
    result.broken += [f"found too: {stranger}" for stranger in sorted(strangers)]
    result.broken += _bystanders(fault, stage, begun, before)
    return result


def _wait_for_all(
    fault: Fault,
    stage: Stage,
    begun: float,
    came: dict[Alert | str, float],
    found: set[str],
) -> None:
    """Return when all that is expected has come; when each did is kept, and what else is found."""

    def all_came() -> bool:
        for notice in stage.arrived(begun):
            for alert in fault.alerts:
                if notice.status == "firing" and alert.fits(notice):
                    came.setdefault(alert, notice.at)
        found.update(stage.findings())
        for name in found & set(fault.findings):
            came.setdefault(name, time.monotonic())
        return len(came) == len(fault.expected)

    def missing() -> str:
        names = [named(wanted) for wanted in fault.expected if wanted not in came]
        others = sorted({f"{n.name}/{n.labels.get('severity')}" for n in stage.arrived(begun)})
        return f"never came: {', '.join(names)}; what came: {', '.join(others) or 'nothing'}"

    stage.wait(all_came, missing)


def _wait_until_gone(expected: Alert | str, fault: Fault, stage: Stage, came: float) -> float:
    """When it was told that it is over, or was seen to be.

    A ticket that ends while its page still fires is held back, and nobody is told of its end.
    """
    if isinstance(expected, str):
        return stage.wait(
            lambda: expected not in stage.findings(), lambda: f"still found: {expected}"
        )
    quiet = expected.severity == "ticket" and any(
        other.severity == "page" for other in fault.alerts
    )

    def gone() -> bool:
        if quiet and expected.name not in stage.held():
            return True
        return bool(_ends(expected, stage, came))

    seen = stage.wait(gone, lambda: f"never resolved: {named(expected)}")
    return min([seen, *_ends(expected, stage, came)])


def _ends(expected: Alert, stage: Stage, came: float) -> list[float]:
    return [
        notice.at
        for notice in stage.arrived(came)
        if notice.status == "resolved" and expected.fits(notice)
    ]


def _bystanders(fault: Fault, stage: Stage, begun: float, before: Collection[str]) -> list[str]:
    """What came that nobody has said may come."""
    known = {(alert.name, alert.severity) for alert in fault.alerts}
    strangers = {
        f"{notice.name}, {_told_apart(notice)}"
        for notice in stage.arrived(begun)
        if notice.status == "firing"
        and notice.name not in {*fault.also, *before, *stage.scene.around}
        and (notice.name, notice.labels.get("severity")) not in known
    }
    return [f"came too: {stranger}" for stranger in sorted(strangers)]


def _told_apart(notice: Notice) -> str:
    same = ("alertname", "alert_type", "area", "job", "standard")
    return " ".join(value for label, value in notice.labels.items() if label not in same)
