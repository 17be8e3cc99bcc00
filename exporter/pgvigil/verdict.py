"""Tell which standards a target does not keep now, as far as its last scrape alone shows."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

from pgvigil.collect import Collector, Scrape
from pgvigil.render import Family, Sheet, pair
from pgvigil.standards import Objective

NOTHING: Mapping[str, str] = {}


class Measure(NamedTuple):
    """How a number of a scrape is held against an objective, as an alert of rules/ does it."""

    standard: str
    objective: str
    alert: str
    area: str
    """Whose runbook says what to do."""
    metric: str
    what: str
    """What is not as it should be, for a person."""
    labels: Mapping[str, str] = NOTHING
    """Those of the series that count."""
    per: str = ""
    """The metric that it is a share of."""
    below: bool = False
    """Whether less is worse."""
    age: bool = False
    """Whether it is a moment, of which the newest series counts and its age is meant."""
    primary: bool = False
    """Whether it says nothing on a standby."""


_BACKENDS = {"kind": "query"}
_RECORDED = "pg_record_last_good_ended_timestamp_seconds"
_DRILL = {"kind": "restore_verification"}

MEASURES = (
    Measure("INT-2", "fsync", "DurabilityOff", "security", "pg_settings_value",
            "fsync is off: a crash may cost the data", {"name": "fsync"}, below=True),
    Measure("INT-2", "full_page_writes", "DurabilityOff", "security", "pg_settings_value",
            "full_page_writes is off: a crash may cost the data", {"name": "full_page_writes"},
            below=True),
    Measure("RES-1", "used_ratio", "ConnectionsNearLimit", "activity", "pg_connections_used",
            "connections are in use", per="pg_connections_usable"),
    Measure("RES-2", "wait_seconds", "PoolerClientsWait", "pooler",
            "pgbouncer_pools_maxwait_seconds",
            "somebody waits for a connection of the pool"),
    Measure("QRY-7", "wait_seconds", "LockWait", "activity", "pg_locks_longest_wait_seconds",
            "somebody waits for a lock"),
    Measure("QRY-6", "idle_seconds", "IdleInTransaction", "activity",
            "pg_stat_activity_oldest_idle_in_transaction_seconds",
            "a transaction is left open idle", _BACKENDS),
    Measure("QRY-5", "active_seconds", "LongQuery", "activity",
            "pg_stat_activity_oldest_query_seconds",
            "a query runs", _BACKENDS),
    Measure("MNT-3", "used_ratio", "TransactionIdWraparound", "maintenance",
            "pg_database_datfrozenxid_used_ratio", "transaction ids are used up",
            primary=True),
    Measure("MNT-4", "prepared_seconds", "PreparedTransactionOld", "maintenance",
            "pg_prepared_xacts_oldest_seconds", "a transaction is left prepared", primary=True),
    Measure("SCH-1", "used_ratio", "SequenceRunsOut", "schema", "pg_sequences_used_ratio",
            "a sequence is used up"),
    Measure("SEC-1", "unencrypted_sessions", "SessionsUnencrypted", "security",
            "pg_stat_ssl_remote_unencrypted_sessions",
            "sessions come over the network without TLS"),
    Measure("BAK-2", "backup_age_seconds", "BackupTooOld", "backup", _RECORDED,
            "the last good backup is old", {"kind": "backup"}, age=True, primary=True),
    Measure("BAK-4", "verification_age_seconds", "RestoreUnverified", "backup", _RECORDED,
            "the last restore that was checked is old", _DRILL, age=True, primary=True),
    Measure("BAK-5", "recovery_seconds", "RestoreSlow", "backup",
            "pg_record_last_good_duration_seconds",
            "the last restore took long", _DRILL, primary=True),
)  # fmt: skip
"""What takes one comparison of one scrape; the numbers are those of the target's objectives.

What needs history or several servers, only Prometheus can tell.
"""

_NAMES = {name for of in MEASURES for name in (of.metric, of.per) if name}
_HEADS = {f"# HELP {name} ".encode(): name for name in _NAMES}
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
_SEVERITIES = ("page", "ticket")


class Broken(NamedTuple):
    """A standard that is not kept."""

    measure: Measure
    severity: str
    value: float
    """Also of an age, in seconds."""
    objective: float
    where: str
    """The database, pool or whatever tells the series from others; may be empty."""


class Verdict(NamedTuple):
    """What one scrape tells."""

    kept: frozenset[str]
    """The ids of standards that were looked at and are kept, as far as it shows."""
    broken: Sequence[Broken]


class _Number(NamedTuple):
    """The worst series of a measure."""

    measure: Measure
    value: float
    """Of an age, the moment."""
    where: str


@dataclass(slots=True)
class _Seen:
    """What is judged of a target's last scrape."""

    families: Mapping[str, Family]
    """Those that nobody has read yet."""
    numbers: Sequence[_Number] = ()

    def read(self) -> Sequence[_Number]:
        """The numbers; they are read once, for a page may show thousands of targets."""
        if families := self.families:
            # Of ages the newest series counts.
            worst = (
                (measure, (min if measure.below else max)(values))
                for measure in MEASURES
                if (values := list(_values(measure, families)))
            )
            self.numbers = [_Number(measure, *of) for measure, of in worst]
            self.families = {}
        return self.numbers


_seen: WeakKeyDictionary[Collector, _Seen] = WeakKeyDictionary()

_asked: WeakKeyDictionary[Collector, frozenset[str]] = WeakKeyDictionary()
"""The queries of each target that bring it."""


def note(collector: Collector, scrape: Scrape) -> None:
    """Keep what a later look at the target needs of a scrape."""
    asked = _asked.get(collector)
    if asked is None:
        asked = _asked[collector] = frozenset(
            query.name
            for query in collector.queries
            if any(metric.name in _NAMES for metric in query.metrics)
        )
    sheets = [sheet for name, sheet in scrape.sheets.items() if name in asked]
    sheets += [of.sheet for of in scrape.results if of.statement.query.name in asked]
    found: dict[str, Family] = {}
    for sheet in sheets if scrape.up else ():
        assert isinstance(sheet, Sheet)
        for family in sheet.families:
            head = family.headers.text
            if name := _HEADS.get(head[: head.index(b" ", len(b"# HELP ")) + 1]):
                whole = found.setdefault(name, Family(family.headers))
                whole.chunks += family.chunks
    _seen[collector] = _Seen(found)


def judge(collector: Collector) -> Verdict:
    """Hold the last scrape against the target's objectives; worst first."""
    broken: list[Broken] = []
    looked: set[str] = set()
    seen, objectives = _seen.get(collector), _by_name((*collector.target.objectives,))
    for measure, value, where in seen.read() if seen else ():
        if measure.primary and collector.facts and collector.facts.in_recovery:
            continue
        looked.add(measure.standard)
        if measure.age:
            value = time.time() - value
        limits = objectives.get((measure.standard, measure.objective), {})
        for severity in _SEVERITIES:
            limit = limits.get(severity)
            if limit is not None and (value < limit if measure.below else value > limit):
                broken.append(Broken(measure, severity, value, limit, where))
                break
    broken.sort(key=lambda of: _SEVERITIES.index(of.severity))
    kept = looked - {of.measure.standard for of in broken}
    return Verdict(frozenset(kept), broken)


@lru_cache(maxsize=256)
def _by_name(objectives: tuple[Objective, ...]) -> Mapping[tuple[str, str], Mapping[str, float]]:
    """The numbers by severity, by standard and name; most targets of a fleet have the same."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for standard, name, severity, value in objectives:
        found.setdefault((standard, name), {})[severity] = value
    return found


def _values(measure: Measure, families: Mapping[str, Family]) -> Iterator[tuple[float, str]]:
    """The numbers of the series that count, each with what tells it from the others."""
    scale = [value for value, _ in _samples(families.get(measure.per), NOTHING)]
    for value, labels in _samples(families.get(measure.metric), measure.labels):
        if measure.per:
            if len(scale) != 1 or not scale[0] > 0:
                continue
            value /= scale[0]
        names = "database" if "database" in labels else "datname", "sequencename"
        yield value, " ".join(filter(None, (labels.get(name) for name in names)))


def _samples(
    family: Family | None, wanted: Mapping[str, str]
) -> Iterator[tuple[float, Mapping[str, str]]]:
    """The samples that have the wanted labels."""
    if not family:
        return
    # Of the settings' hundreds of lines one is meant, and reading them all takes long.
    sought = next((pair(name, value) for name, value in wanted.items()), b" ")
    text, at = b"".join(family.chunks), 0
    while (at := text.find(sought, at)) >= 0:
        begin, at = text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)
        at = len(text) if at < 0 else at
        block, _, value = text[begin:at].decode().rpartition(" ")
        labels = {name: _ESCAPED.sub(_plain, of) for name, of in _LABEL.findall(block)}
        if wanted.items() <= labels.items():
            yield float(value), labels


def _plain(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]
