"""What was seen in the course of a soak, and the judgement on it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

BUDGET = 3
"""Connections the exporter may have to one target."""
ANSWER_SECONDS = 5.0
"""The longest a statement of the catalogue may run."""
RECOVERY_SECONDS = 15.0
"""How long after the last fault everything is as it was: the exporter tries again at each scrape,
and a server that crashed has to read its log."""


class Sessions(NamedTuple):
    """What a server knows of the exporter's sessions for one target."""

    total: int
    in_transaction: int
    """Those idle in a transaction."""
    longest: float
    """Seconds for which the one that is active longest has been; 0 when none is."""


@dataclass(frozen=True)
class Sample:
    """One look at everything."""

    at: float
    """Seconds since the soak began, as everywhere here."""
    sessions: Mapping[str, Sessions]
    """By target, without those whose server could not be asked."""
    descriptors: int
    threads: int
    resident: int
    """Bytes."""
    processor: float
    """Seconds used since the exporter was started."""
    log: Mapping[str, int]
    """Lines the exporter has written, by level; `trace` counts those that begin a traceback."""


class Scrape(NamedTuple):
    """One answer, or none, to a client that waited for it."""

    at: float
    """When it was asked."""
    target: str
    """Empty for a page that asks no server."""
    seconds: float
    timeout: float
    """What the client would have waited, and has said so."""
    status: int
    """0 when there was no answer."""
    up: bool | None
    """What `pg_up` says; None where it does not stand."""
    reason: str = ""
    """Why the server is down, or why there was no answer."""


@dataclass
class Fault:
    """Something that was broken for a while."""

    kind: str
    where: str
    begun: float
    ended: float = float("inf")
    problem: str = ""
    """Why it could not be done as meant."""

    def near(self, moment: float, after: float) -> bool:
        """Whether a moment lies in it, or at most so many seconds behind it."""
        return self.begun <= moment <= self.ended + after


@dataclass
class Course:
    """All that was seen."""

    dead: frozenset[str]
    """Targets that never answer."""
    samples: list[Sample] = field(default_factory=list)
    scrapes: list[Scrape] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    refused_drops: list[str] = field(default_factory=list)
    """What DROP DATABASE said when the exporter's sessions stood in its way."""
    exit_code: int | None = None
    """The exporter's own, at the end."""

    @property
    def first_quiet(self) -> Sequence[Sample]:
        """The second half of what was seen before the first fault: all is connected by then."""
        end = min((fault.begun for fault in self.faults), default=float("inf"))
        quiet = [sample for sample in self.samples if sample.at < end]
        return quiet[len(quiet) // 2 :]

    @property
    def last_quiet(self) -> Sequence[Sample]:
        """What was seen when all had had the time to recover from the last fault."""
        end = max((fault.ended for fault in self.faults), default=0.0)
        return [sample for sample in self.samples if sample.at > end + RECOVERY_SECONDS]


class Finding(NamedTuple):
    """One rule, and what became of it."""

    rule: str
    seen: str
    kept: bool


def judge(course: Course) -> list[Finding]:
    """All rules on one course."""
    return [finding for rule in _RULES for finding in rule(course)]


def _connections(course: Course) -> Iterator[Finding]:
    counts = Counter[str]()
    for sample in course.samples:
        for target, sessions in sample.sessions.items():
            counts[target] = max(counts[target], sessions.total)
    most = max(counts.values(), default=0)
    seen = ", ".join(f"{target} {count}" for target, count in sorted(counts.items()))
    yield Finding(f"never more than {BUDGET} connections to a target", seen, most <= BUDGET)
    end = Counter[str]()
    for sample in course.last_quiet:
        for target, sessions in sample.sessions.items():
            end[target] = max(end[target], sessions.total)
    # A target that no sample knows at the end was not seen, which proves nothing.
    kept = end.keys() == counts.keys() and max(end.values(), default=0) <= BUDGET
    seen = ", ".join(f"{target} {count}" for target, count in sorted(end.items())) or "nothing"
    yield Finding("and not after the faults", seen, kept)


def _transactions(course: Course) -> Iterator[Finding]:
    idle = [
        (sample.at, target)
        for sample in course.samples
        for target, sessions in sample.sessions.items()
        if sessions.in_transaction
    ]
    seen = f"{len(idle)} times" + (f", first {idle[0][1]} at {idle[0][0]:.0f} s" if idle else "")
    yield Finding("no session idle in a transaction", seen, not idle)


def _statements(course: Course) -> Iterator[Finding]:
    # A server that is halted, or has just been, counts the time it slept.
    halts = [fault for fault in course.faults if fault.kind == "pause"]
    bound = ANSWER_SECONDS + 2
    longest = max(
        (
            sessions.longest
            for sample in course.samples
            if not any(halt.near(sample.at, after=3) for halt in halts)
            for sessions in sample.sessions.values()
        ),
        default=0.0,
    )
    rule = f"no statement active for more than {bound:.0f} s on a server that runs"
    yield Finding(rule, f"{longest:.1f} s", longest <= bound)


def _returned(course: Course) -> Iterator[Finding]:
    # The threads that look up names are made when they are first needed and stay.
    rooms: Mapping[str, tuple[int, Callable[[Sample], int]]] = {
        "descriptors": (5, lambda sample: sample.descriptors),
        "threads": (6, lambda sample: sample.threads),
    }
    for what, (room, number) in rooms.items():
        rule = f"{what} are back to what they were, {room} more at most"
        before, after = ([number(s) for s in q] for q in (course.first_quiet, course.last_quiet))
        if not before or not after:
            yield Finding(rule, "no quiet time was seen", kept=False)
            continue
        first, last = median(before), median(after)
        yield Finding(rule, f"{first:.0f} before, {last:.0f} after", last <= first + room)


def _memory(course: Course) -> Iterator[Finding]:
    fifth = len(course.samples) // 5
    rule = "memory: median of the last fifth at most 1.1 times that of the second, and 5 MB"
    if not fifth:
        yield Finding(rule, "too few samples", kept=False)
        return
    resident = [sample.resident / 1e6 for sample in course.samples]
    early, late = median(resident[fifth : 2 * fifth]), median(resident[-fifth:])
    seen = f"{early:.1f} MB, then {late:.1f} MB; most {max(resident):.1f} MB"
    yield Finding(rule, seen, late <= 1.1 * early + 5)


def _log(course: Course) -> Iterator[Finding]:
    log = course.samples[-1].log if course.samples else {}
    bad = sum(log.get(level, 0) for level in ("error", "critical", "trace", "unreadable"))
    seen = ", ".join(f"{level} {count}" for level, count in sorted(log.items())) or "nothing"
    yield Finding("no error of its own in its log", seen, not bad)


def _answers(course: Course) -> Iterator[Finding]:
    failed = [scrape for scrape in course.scrapes if scrape.status != 200]
    late = [scrape for scrape in course.scrapes if scrape.seconds > scrape.timeout]
    seen = f"{len(course.scrapes):,} scrapes, {len(failed)} failed, {len(late)} late"
    if worst := failed or late:
        first = worst[0]
        seen += f"; first {first.target} at {first.at:.0f} s: {first.status} {first.reason}"
        seen += f" after {first.seconds:.2f} s"
    kept = bool(course.scrapes) and not failed and not late
    yield Finding("each scrape is answered with 200 before its timeout", seen, kept)


def _truth(course: Course) -> Iterator[Finding]:
    end = max((fault.ended for fault in course.faults), default=0.0) + RECOVERY_SECONDS
    wrong = Counter[str]()
    right = Counter[str]()
    for scrape in course.scrapes:
        if scrape.target and scrape.at > end and scrape.up is not None:
            counter = right if scrape.up == (scrape.target not in course.dead) else wrong
            counter[scrape.target] += 1
    seen = f"{right.total()} scrapes right"
    if wrong:
        seen += ", wrong: " + ", ".join(f"{name} {n}" for name, n in sorted(wrong.items()))
    lies = sum(scrape.up is True for scrape in course.scrapes if scrape.target in course.dead)
    kept = bool(right) and not wrong and not lies
    yield Finding("after the faults every live target is up, a dead one never", seen, kept)


def _drops(course: Course) -> Iterator[Finding]:
    seen = f"{len(course.refused_drops)} refused"
    seen += f": {course.refused_drops[0]}" if course.refused_drops else ""
    yield Finding("DROP DATABASE is never refused", seen, not course.refused_drops)


def _end(course: Course) -> Iterator[Finding]:
    yield Finding(
        "it lives until SIGTERM and ends with 0", str(course.exit_code), course.exit_code == 0
    )


_RULES: Sequence[Callable[[Course], Iterator[Finding]]] = (
    _connections,
    _transactions,
    _statements,
    _returned,
    _memory,
    _log,
    _answers,
    _truth,
    _drops,
    _end,
)
