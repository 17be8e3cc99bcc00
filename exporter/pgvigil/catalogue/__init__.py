"""Turn the YAML files of the catalogue into queries, or name every fault in them."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pgvigil import documents
from pgvigil.errors import Problem, Refused

SUPPORTED = range(13, 19)
"""The major versions of PostgreSQL that the catalogue is proven on."""

COLUMNS = "{columns}"
"""Stands in a query's text for the value columns that exist on a server's version."""

WORDS: Mapping[str, str] = {
    "sql": "postgresql",
    "show": "pgbouncer",
    "info": "pgbackrest",
    "barman": "barman",
    "walg": "wal-g",
}
"""The key that says what a query asks, with the kind of targets that understand it."""

DEFAULT_TIMEOUT = 1.0
"""Seconds a statement may run when its query does not say."""

# What has no other end ends with the text: to look for it again and again would take hours.
_COMMENT = re.compile(r"--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*(?:'|\Z)", re.S)
_FIRST_WORD = re.compile(r"[\s(]*(select|with|values)\b", re.I)
_AREA = re.compile(r"[A-Za-z0-9_-]+")
_OURS = re.compile(
    r"pgvigil_|process_|python_|(pg|pgbouncer|pgbackrest|barman|walg)_(up|down_reason)(_total)?\Z"
)
_SUFFIXES = {"counter": ("_created",), "histogram": ("_bucket", "_sum", "_count", "_created")}
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


COMPUTES: Mapping[str, Mapping[str, str]] = {
    "executor_time": {
        **dict.fromkeys(("estimate", "lower", "upper"), "histogram"),
        **dict.fromkeys(("undecided", "unresolved", "recreated", "evicted", "missed"), "counter"),
    },
    "running_statements": {"now": "gauge", "seen": "counter"},
    "logged_statements": {"took": "histogram", "skipped": "counter"},
}
"""What can be computed from a query's rows: the columns that metrics may name, with their types."""

_LABELS: Mapping[str, list[str]] = {"logged_statements": []}
"""What is not told by database."""


@dataclass(frozen=True, slots=True)
class Needs:
    """The facts that must hold on a server for a query, or for one of its metrics."""

    extension: Mapping[str, str] = field(default_factory=dict)
    privilege: Sequence[str] = ()
    function: Sequence[str] = ()
    setting: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of series: a column of a query under its exposed name."""

    name: str
    column: str
    type: str
    """`gauge` or `counter`; `histogram` for what a query with `computes` gives."""
    help: str
    value: str
    """The SQL expression `{columns}` computes; the column's own name unless the file says more."""
    since: int
    until: int
    needs: Needs = Needs()
    """What it needs beyond its query; where that is missing, the others stand."""
    other: str = ""
    """`sum`, `max` or `min`: what a gauge is on the other row of a top query; empty for none."""

    def fits(self, major: int) -> bool:
        """Whether servers of this major version have it."""
        return self.since <= major < self.until


@dataclass(frozen=True, slots=True)
class Variant:
    """The text of a query for a half-open range of major versions, where its needs are met."""

    since: int
    until: int
    text: str
    needs: Needs = Needs()


@dataclass(frozen=True, slots=True)
class Top:
    """Which rows of many stand on their own; what is left becomes rows named other."""

    rows: int
    """How many each order brings in."""
    by: Sequence[str]
    """Columns: a counter's by its increase since the last run, another's by value."""
    hold: float
    """Seconds that a row stays after it came in, so that the set of series is stable."""
    within: Sequence[str]
    """Labels that the other rows keep."""
    gains: bool = False
    """Whether counters begin at 0 with the exporter and add up what a row gains."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question to a server, and the metrics its answer becomes."""

    name: str
    """`area.query`, unique over all files."""
    why: str
    role: str
    """`primary`, `standby` or `any`."""
    needs: Needs
    timeout: float
    """Seconds."""
    max_series: int
    labels: Sequence[str]
    variants: Sequence[Variant]
    metrics: Sequence[Metric]
    place: str
    line: int
    every: float = 0.0
    """Seconds between two runs in the background; 0 for a query that runs with each scrape."""
    scope: str = "server"
    """`server`, or `database` for a query that is asked in each database."""
    top: Top | None = None
    computes: str = ""
    """What is computed from its rows and those of the runs before; empty for none."""
    limits: Sequence[float] = ()
    """The limits, in seconds, that what it computes is told by."""
    opt_in: bool = False
    """Whether it runs only where the configuration enables it."""
    priority: int = 5
    """What gives way first when a page grows too large: 9 first, 1 last."""
    word: str = "sql"
    """The key that said what it asks, one of WORDS."""

    @property
    def kind(self) -> str:
        """The kind of targets that it is for."""
        return WORDS[self.word]

    @property
    def all_needs(self) -> list[Needs]:
        """Its own, and those of its texts and metrics."""
        return [self.needs, *(v.needs for v in self.variants), *(m.needs for m in self.metrics)]

    @property
    def area(self) -> str:
        """The one word its file, rules, dashboard and runbook share."""
        return self.name.partition(".")[0]


def load(extra: Iterable[Path] = ()) -> tuple[Query, ...]:
    """All queries: ours and those of the `extra` files and folders.

    Raises Refused with every problem of every file.
    """
    problems: list[Problem] = []
    queries: list[Query] = []
    for path, ours in (*_shipped(), *_given(extra, problems)):
        if not _AREA.fullmatch(path.stem):
            text = "the file's name is its queries' area; make it of letters, digits, _ and -"
            problems.append(Problem(str(path), None, text))
            continue
        document, faults = documents.read(path, f"catalogue/{path.name}" if ours else None)
        problems += faults
        if document is None:
            continue
        faults, sound = documents.check(document, "catalogue")
        problems += faults
        for query in _queries(document, sound, path.stem):
            problems += _faults(document, query)
            queries.append(query)
    problems += _clashes(queries)
    if problems:
        raise Refused(dict.fromkeys(problems))
    return tuple(queries)


def _shipped() -> Iterator[tuple[Path, bool]]:
    for path in sorted(Path(str(files("pgvigil.catalogue"))).glob("*.yml")):
        yield path, True


def _given(extra: Iterable[Path], problems: list[Problem]) -> Iterator[tuple[Path, bool]]:
    for path in extra:
        if not os.path.isdir(path):  # pathlib's raises for a name that is too long
            yield path, False
            continue
        try:
            found = sorted(child for child in path.iterdir() if child.suffix in (".yml", ".yaml"))
        except OSError as error:
            text = f"cannot be read: {error.strerror}; mind its owner and mode"
            problems.append(Problem(str(path), None, text))
            continue
        if not found:
            problems.append(Problem(str(path), None, "holds no .yml or .yaml file"))
        yield from ((child, False) for child in found)


def _queries(document: documents.Document, sound: Any, area: str) -> Iterator[Query]:
    """The queries of a document; of one with faults, what can be told of it all the same."""
    for name, raw in (sound or {}).items():
        word = next((word for word in WORDS if word in raw), "sql")
        sql = raw.get(word, [])
        parts = sql if isinstance(sql, list) else [{"text": sql}]
        yield Query(
            name=f"{area}.{name}",
            why=raw.get("why", "").strip(),
            role=raw.get("on", "any"),
            needs=Needs(**raw.get("needs", {})),
            timeout=_seconds(raw.get("timeout", f"{DEFAULT_TIMEOUT:.0f}s")),
            max_series=raw.get("max_series", 1),
            labels=tuple(raw.get("labels", ())),
            variants=tuple(
                Variant(*_range(part), part["text"].strip(), Needs(**part.get("needs", {})))
                for part in parts
                if "text" in part
            ),
            metrics=tuple(
                _metric(name, of)
                for name, of in raw.get("metrics", {}).items()
                if {"column", "type", "help"} <= of.keys()
            ),
            place=document.place,
            line=document.lines[(name,)],
            every=_seconds(raw.get("every", "0s")),
            scope=raw.get("scope", "server"),
            top=_top(raw["top"]) if {"rows", "by"} <= raw.get("top", {}).keys() else None,
            computes=raw.get("computes", ""),
            limits=tuple(map(float, raw.get("limits", ()))),
            opt_in=raw.get("opt_in", False),
            priority=raw.get("priority", 5),
            word=word,
        )


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)(ms|s|m|h)", text)
    assert found  # the schema holds the pattern
    return int(found[1]) * _UNITS[found[2]]


def _top(raw: Mapping[str, Any]) -> Top:
    hold = _seconds(raw.get("hold", "1h"))
    within = tuple(raw.get("within", ()))
    return Top(raw["rows"], tuple(raw["by"]), hold, within, raw.get("gains", False))


def _metric(name: str, raw: Mapping[str, Any]) -> Metric:
    return Metric(
        name=name,
        column=raw["column"],
        type=raw["type"],
        help=" ".join(raw["help"].split()),
        value=raw.get("value", raw["column"]),
        since=_range(raw)[0],
        until=_range(raw)[1],
        needs=Needs(**raw.get("needs", {})),
        other=raw.get("other", ""),
    )


def _range(raw: Mapping[str, Any]) -> tuple[int, int]:
    return raw.get("since", 0), raw.get("until", 1000)


def _faults(document: documents.Document, query: Query) -> Iterator[Problem]:
    """What the schema cannot say about one query."""
    here = query.name.partition(".")[2]
    for keys, text in _word_faults(document, here):
        yield document.problem(keys, f"{here}: {text}")
    for position, variant in enumerate(query.variants):
        at: documents.Keys = (here, "sql", position) if len(query.variants) > 1 else (here, "sql")
        if variant.since >= variant.until:
            text = f"since {variant.since} is not before until {variant.until}; mend one of them"
            yield document.problem(at, f"{here}: {text}")
        for text in _text_faults(query, variant):
            yield document.problem(at, f"{here}: {text}")
    for metric in query.metrics:
        at = (here, "metrics", metric.name)
        for text in _metric_faults(query, metric):
            yield document.problem(at, text)
    for text in _lane_faults(query):
        yield document.problem((here,), f"{here}: {text}")
    if clash := {m.column for m in query.metrics} & set(query.labels):
        text = f"{here}: {', '.join(sorted(clash))}: a label and a value at once; drop one of them"
        yield document.problem((here,), text)


def _word_faults(document: documents.Document, here: str) -> Iterator[tuple[documents.Keys, str]]:
    """What is wrong with the words a query is asked by, and where."""
    said = [word for word in WORDS if (here, word) in document.lines]
    if not said:
        text = "write sql, show for a PgBouncer, info for pgBackRest, barman or walg"
        yield (here,), f"says nothing to ask; {text}"
    if len(said) > 1:
        yield (here, said[1]), f"has {said[0]} and {said[1]}; write one of them"
    if said == ["sql"] or not said:
        return
    for keys in document.lines:
        if keys[:1] == (here,) and keys[1:2] == ("metrics",):
            strange = keys[3:] in (("value",), ("needs",), ("since",), ("until",))
        else:
            strange = keys[:1] == (here,) and keys[1:] in _OF_SQL
            # A command takes the time it takes; a console has none to give.
            strange = strange and (said == ["show"] or keys[1:] != ("timeout",))
        if strange:
            yield keys, f"{keys[-1]} belongs to a query with sql; drop it"


_OF_SQL = {(key,) for key in ("on", "needs", "scope", "timeout", "computes", "limits")}
"""The keys of a query that mean nothing without SQL."""


def _lane_faults(query: Query) -> Iterator[str]:
    """What is wrong with where and when a query runs, and with how its rows are chosen."""
    if query.scope == "database":
        if not query.every:
            yield "scope database opens a connection to each database; say how often with every"
        if "datname" in query.labels:
            yield "scope database adds the label datname by itself; drop it from the labels"
    yield from _computing_faults(query)
    if query.top is None:
        if named := [metric.name for metric in query.metrics if metric.other]:
            yield f"{named[0]} says other, which belongs to a query with top; drop it"
        return
    if not query.labels:
        yield "top chooses among rows by their labels, and there are none; add labels"
    if strange := [name for name in query.top.within if name not in query.labels]:
        yield f"top.within names {strange[0]!r}, which is no label of this query"
    if query.labels and set(query.labels) == set(query.top.within):
        yield "top.within holds every label, so that nothing is left to choose; drop the last"


def _computing_faults(query: Query) -> Iterator[str]:
    """What is wrong with a query from whose rows something is computed."""
    if not query.computes:
        if query.limits:
            yield "limits belong to a query that computes something; drop them, or say what"
        if named := [metric.name for metric in query.metrics if metric.type == "histogram"]:
            yield f"{named[0]} is a histogram, which only a query that computes one gives"
        return
    known = COMPUTES[query.computes]
    if not query.every:
        yield f"{query.computes} is computed from one run to the next; say how often with every"
    if query.top or query.scope == "database":
        yield f"{query.computes} is computed of the whole server; drop top and scope"
    if list(query.labels) != (labels := _LABELS.get(query.computes, ["datname"])):
        yield f"the labels of {query.computes} are [{', '.join(labels)}]"
    if not query.limits:
        yield f"{query.computes} is told by limits; name them in seconds, such as [0.1, 1]"
    if strange := [metric for metric in query.metrics if metric.column not in known]:
        names = ", ".join(known)
        yield f"{strange[0].name} names {strange[0].column!r}, which is none of {names}"
    for metric in query.metrics:
        if metric.column in known and metric.type != known[metric.column]:
            yield f"{metric.name} is a {known[metric.column]}, as its column is {metric.column!r}"


def _text_faults(query: Query, variant: Variant) -> Iterator[str]:
    if query.kind != "postgresql":
        return  # the schema knows the words; which columns there are shows when it is asked
    bare = _COMMENT.sub(" ", variant.text)
    if not _FIRST_WORD.match(bare):
        yield "a statement must be one SELECT (or WITH ... SELECT, or VALUES)"
    if ";" in bare:
        yield "a text must be one statement; remove the semicolon"
    words = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", bare))
    columns = {metric.column for metric in query.metrics} if COLUMNS in bare else set()
    for column in query.top.by if query.top else ():
        if column not in words | columns:
            yield f"top.by names {column!r}, which is no column of this statement; select it"
    for label in query.labels:
        if label not in words:
            yield f"the label {label!r} is no column of this statement; select it by that name"
    if COLUMNS not in bare and not query.computes:
        for metric in query.metrics:
            meets = metric.since < variant.until and variant.since < metric.until
            if meets and metric.column not in words:
                yield (
                    f"{metric.name} is declared from the column {metric.column!r}, which this "
                    f"statement does not have; select it by that name, or narrow since/until"
                )


def _metric_faults(query: Query, metric: Metric) -> Iterator[str]:
    counts = metric.name.endswith("_total")
    name = metric.name
    if metric.type == "counter" and not counts:
        yield f"{name} is a counter: its name must end in _total, as {name}_total"
    if metric.type == "gauge" and counts:
        yield f"{name} is a gauge: only a counter's name may end in _total; rename it"
    if _OURS.match(name):
        yield f"{name} is a name of the exporter's own; choose another"
    if metric.other and metric.type == "counter":
        yield f"{name} is a counter: those add up on the other row by themselves; drop other"
    fixed = query.word == "sql" and not all(COLUMNS in v.text for v in query.variants)
    if metric.needs != Needs() and fixed:
        yield f"{name} has needs, but the statement has no {COLUMNS} that could leave it out"
    if metric.since >= metric.until:
        yield f"{name}: since {metric.since} is not before until {metric.until}; mend one of them"
    if metric.value != metric.column and fixed:
        yield (
            f"{name} has a value, but the statement has no {COLUMNS} to put it in; write {COLUMNS} "
            f"among the statement's columns, or leave the value out"
        )


def _clashes(queries: Sequence[Query]) -> Iterator[Problem]:
    """Names that two files, or two queries, claim."""
    by_name: dict[str, Query] = {}
    by_family: dict[str, tuple[Query, Metric]] = {}
    for query in queries:
        first = by_name.setdefault(query.name, query)
        if first is not query:
            text = f"the query {query.name} stands already at {first.place}:{first.line}; rename it"
            yield Problem(query.place, query.line, text)
            continue
        for metric in query.metrics:
            # OpenMetrics calls the family of a counter by its name without _total, and keeps the
            # name with _created for when that began; a histogram's samples have names of their own.
            family = metric.name.removesuffix("_total")
            more = _SUFFIXES.get(metric.type, ())
            names = (family, *(f"{family}{suffix}" for suffix in more))
            claims = [by_family.setdefault(name, (query, metric)) for name in names]
            if clash := next((claim for claim in claims if claim[1] is not metric), None):
                owner, other = clash
                text = (
                    f"{metric.name} clashes with {other.name} of {owner.name} at "
                    f"{owner.place}:{owner.line}; one query gives a metric, choose another name"
                )
                yield Problem(query.place, query.line, text)
