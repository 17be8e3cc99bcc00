"""Decide which queries fit one server, and say why the others do not."""

import re
from collections import deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from pgvigil.catalogue import COLUMNS, Metric, Needs, Query, Variant

TOP_ROWS = 20_000
"""Rows that a query with `top` may choose from, or one that computes something; what it exposes is
bound by `max_series`."""

RAISES: Mapping[str, frozenset[str]] = {
    # Functions that exist there, may be executed, and raise an error that the customer's log keeps
    # (postgres_exporter #1273, DataDog integrations-core #4770, #6399, #14498, #20356).
    "aurora": frozenset(
        {
            *("pg_last_wal_receive_lsn", "pg_last_wal_replay_lsn", "pg_last_xact_replay_timestamp"),
            *("pg_current_wal_lsn", "pg_current_wal_insert_lsn", "pg_current_wal_flush_lsn"),
            *("pg_walfile_name", "pg_is_wal_replay_paused", "pg_get_wal_replay_pause_state"),
            *("pg_stat_wal_receiver", "pg_stat_get_wal_receiver", "pg_ls_waldir"),
            *("pg_ls_archive_statusdir", "pg_control_checkpoint", "pg_control_recovery"),
        }
    ),
}
"""By managed service, what is not called there."""


_SHARED = 4096


class Reason(StrEnum):
    """Why a query is not sent to a server: the closed list behind `pgvigil_query_skipped`."""

    DISABLED = "disabled"
    VERSION = "version"
    ROLE = "role"
    EXTENSION = "extension"
    PRIVILEGE = "privilege"
    FUNCTION = "function"
    SETTING = "setting"
    PROVIDER = "provider"


class Extension(NamedTuple):
    """An extension as it is installed in the connected database, where we may use its schema."""

    version: str
    schema: str
    """Already quoted where the name asks for it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was true of one server, and of our role on it, when it was last asked."""

    version: int
    """As `server_version_num` writes it: 160004 is 16.4."""
    in_recovery: bool
    user: str = ""
    superuser: bool = False
    database: str = ""
    guarded: bool = True
    """Whether the session's defaults are in force; a pooler may have swallowed them."""
    extensions: Mapping[str, Extension] = field(default_factory=dict)
    privileges: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    settings: Mapping[str, str] = field(default_factory=dict)
    provider: str = ""
    """The managed service it is a part of, where that has a list in RAISES; else empty."""
    kind: str = "postgresql"
    product: str = ""
    """Where the kind is another: its name and version."""
    columns: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Where the kind has no SQL: the columns of each table that it gives, by the table's word."""

    @property
    def major(self) -> int:
        """The major version: 16 for 16.4."""
        return self.version // 10000

    @property
    def server(self) -> str:
        """Name and version for a person: PostgreSQL 16.4."""
        return self.product or f"PostgreSQL {self.major}.{self.version % 10000}"

    @property
    def role(self) -> str:
        """`primary` or `standby`; empty where the kind has no such thing."""
        if self.kind != "postgresql":
            return ""
        return "standby" if self.in_recovery else "primary"


class Wanted(NamedTuple):
    """The facts that a set of queries depends on, beyond those every server is asked."""

    privileges: Sequence[str]
    functions: Sequence[str]
    settings: Sequence[str]
    tables: Sequence[str] = ()
    """The words of the tables, where the kind has no SQL."""


class Refusal(NamedTuple):
    """A query we will not send to a server, and the fact that forbids it."""

    query: Query
    reason: Reason
    detail: str


class Loss(NamedTuple):
    """A metric that a query cannot give on a server, and the fact that forbids it."""

    metric: Metric
    query: Query
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Statement:
    """A query as one server gets it: its text for that version, and the metrics that has."""

    query: Query
    text: str
    metrics: Sequence[Metric]

    @property
    def max_rows(self) -> int:
        """The rows that `max_series` leaves room for."""
        return max(1, self.query.max_series // len(self.metrics))


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs on one server, and what does not."""

    statements: Sequence[Statement]
    refusals: Sequence[Refusal]
    losses: Sequence[Loss] = ()
    """What is missing from the statements."""


def wanted(queries: Iterable[Query]) -> Wanted:
    """The facts to ask each server for, so that these queries can be planned there."""
    queries = list(queries)
    needs = [needs for query in queries for needs in query.all_needs]
    return Wanted(
        sorted({name for need in needs for name in need.privilege}),
        sorted({name for need in needs for name in need.function}),
        sorted({name for need in needs for name in need.setting}),
        sorted({query.variants[0].text for query in queries if query.kind != "postgresql"}),
    )


def disabled(
    queries: Iterable[Query], enable: Collection[str], disable: Collection[str]
) -> set[str]:
    """The names of the queries that an operator does not want.

    `enable` and `disable` hold names of areas and of queries; the name of a query goes before that
    of its area.
    """

    def off(query: Query) -> bool:
        for name in (query.name, query.area):
            if name in disable:
                return True
            if name in enable:
                return False
        return query.opt_in

    return {query.name for query in queries if off(query)}


def concerning(queries: Iterable[Query], kind: str) -> list[Query]:
    """The queries for servers of a kind."""
    return [query for query in queries if query.kind == kind]


def make_plan(queries: Iterable[Query], facts: Facts, off: Container[str] = ()) -> Plan:
    """Sort queries into those that fit a server and those that do not; asks nobody.

    `off` holds the names of those that nobody wants. What is for servers of another kind is none
    of its business. The same plan comes back for the same, as most servers of a fleet are.
    """
    queries = list(queries)
    for known in _plans:
        if known.facts == facts and known.off == off and known.queries == queries:
            return known.plan
    plan = _make_plan(queries, facts, off)
    _plans.append(_Known(queries, facts, off, plan))
    return plan


def _make_plan(queries: Iterable[Query], facts: Facts, off: Container[str]) -> Plan:
    statements: list[Statement] = []
    refusals: list[Refusal] = []
    losses: list[Loss] = []
    for query in concerning(queries, facts.kind):
        if query.name in off:
            detail = f"enable: [{query.name}] runs it" if query.opt_in else "disabled"
            refusals.append(Refusal(query, Reason.DISABLED, detail))
            continue
        variant = _variant(query, facts)
        metrics = tuple(metric for metric in query.metrics if metric.fits(facts.major))
        refusal = next(_obstacles(query, facts, variant, metrics), None)
        if refusal or not variant:
            refusals.append(Refusal(query, *(refusal or (Reason.VERSION, ""))))
            continue
        lost = [
            Loss(metric, query, *obstacle)
            for metric in metrics
            if (obstacle := next(_lacks_for(metric, query, facts), None))
        ]
        metrics = tuple(m for m in metrics if m not in [loss.metric for loss in lost])
        if not metrics:
            refusals.append(Refusal(query, lost[0].reason, lost[0].detail))
            continue
        losses += lost
        statements.append(_statement(query, facts, variant, metrics))
    return Plan(tuple(statements), tuple(refusals), tuple(losses))


class _Known(NamedTuple):
    """A plan, and what it was made of."""

    queries: Sequence[Query]
    facts: Facts
    off: Container[str]
    plan: Plan


_plans: deque[_Known] = deque(maxlen=32)
"""The last that were made; each takes some milliseconds."""

_shared: dict[str, Statement] = {}
"""By their texts: in a fleet most servers get the same, and each is some kilobytes."""


def _statement(
    query: Query, facts: Facts, variant: Variant, metrics: Sequence[Metric]
) -> Statement:
    statement = Statement(query, _text(query, facts, variant, metrics), metrics)
    if len(_shared) > _SHARED:
        _shared.clear()  # servers come and go, and so do their versions
    shared = _shared.setdefault(statement.text, statement)
    return shared if shared == statement else statement


def _variant(query: Query, facts: Facts) -> Variant | None:
    """The first text that fits the server; of those for its version at least the last."""
    fitting = [v for v in query.variants if v.since <= facts.major < v.until]
    met = (v for v in fitting if not any(_lacks(v.needs, v.text, facts)))
    return next(met, fitting[-1] if fitting else None)


def _obstacles(
    query: Query, facts: Facts, variant: Variant | None, metrics: Sequence[Metric]
) -> Iterator[tuple[Reason, str]]:
    if query.kind != "postgresql":
        yield from _lacks_columns(query, query.labels, facts)
        return
    if not variant or not metrics:
        yield Reason.VERSION, f"nothing for PostgreSQL {facts.major}"
        return
    if query.role not in ("any", facts.role):
        yield Reason.ROLE, f"runs on a {query.role}, this is a {facts.role}"
    yield from _lacks(query.needs, variant.text, facts)
    yield from _lacks(variant.needs, "", facts)


def _lacks_for(metric: Metric, query: Query, facts: Facts) -> Iterator[tuple[Reason, str]]:
    """What a metric does not find on a server."""
    if query.kind == "postgresql":
        return _lacks(metric.needs, metric.value, facts)
    return _lacks_columns(query, [metric.column], facts)


def _lacks_columns(
    query: Query, names: Sequence[str], facts: Facts
) -> Iterator[tuple[Reason, str]]:
    """What a table does not have, of a server that has no SQL."""
    table = query.variants[0].text
    columns = facts.columns.get(table)
    if columns is None:
        yield Reason.VERSION, f"{facts.server} has no {table}"
    for name in names:
        if columns is not None and name not in columns:
            yield Reason.VERSION, f"{name} is not among the {table} of {facts.server}"


def _lacks(needs: Needs, text: str, facts: Facts) -> Iterator[tuple[Reason, str]]:
    """What these needs, and a text of SQL, do not find on a server."""
    for name, least in needs.extension.items():
        extension = facts.extensions.get(name)
        if extension is None:
            why = f"or {facts.user} may not use its schema"
            yield Reason.EXTENSION, f"{name} is not installed in {facts.database}, {why}"
        elif _numbers(extension.version) < _numbers(least):
            yield Reason.EXTENSION, f"{name} is {extension.version}; {least} is needed"
    for name in needs.privilege:
        if name not in facts.privileges:
            yield Reason.PRIVILEGE, f"{facts.user} lacks the privileges of {name}"
    for name in needs.function:
        if name not in facts.functions:
            yield Reason.FUNCTION, f"{facts.user} may not execute {name}, or it does not exist"
    for name, value in needs.setting.items():
        if facts.settings.get(name) != value:
            yield Reason.SETTING, f"{name} is {facts.settings.get(name)}, not {value}"
    if raising := RAISES.get(facts.provider):
        for name in sorted(raising.intersection(re.findall(r"\w+", text))):
            yield Reason.PROVIDER, f"{name} raises an error on {facts.provider}"


def _text(query: Query, facts: Facts, variant: Variant, metrics: Sequence[Metric]) -> str:
    """The statement with its columns and schemas filled in, and the server's own bound on rows.

    The bound is one above ours, so that we can tell a result that was cut from one that fits.
    """
    if query.kind != "postgresql":
        return f"{query.word} {variant.text}"
    columns = dict.fromkeys(
        m.column if m.value == m.column else f"{m.value} as {m.column}" for m in metrics
    )
    text = variant.text.replace(COLUMNS, ",\n  ".join(columns))
    for needs in (query.needs, variant.needs, *(metric.needs for metric in metrics)):
        for name in needs.extension:
            text = text.replace("{" + name + "}", facts.extensions[name].schema)
    many = query.top or query.computes
    bound = TOP_ROWS if many else max(1, query.max_series // len(metrics)) + 1
    return f"select * from (\n{text}\n) as bounded limit {bound}"  # noqa: S608


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
