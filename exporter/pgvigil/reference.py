"""Write the reference of all metrics as one Markdown page."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby

from pgvigil.catalogue import SUPPORTED, Metric, Needs, Query
from pgvigil.own import DATABASES, EXPECTED, OWN, PROCESS, QUERIES, SCRAPE, WEB, Own

_HEAD = """\
# The metrics

`make docs` writes this page from the catalogue, a test compares the two, and
`pgvigil reference --catalogue PATH` adds your own queries to it. {ours} families of metrics come
from {queries} queries, {own} tell of the exporter itself.

Each query stands with what goes wrong when nobody looks at it, then when and where it runs, what it
needs, its labels, and the most series that one run may give. A table has a column only for what
differs:

- **type**: counter or gauge, and the unit that the name's suffix says.
- **versions**: the major versions of PostgreSQL that have it; {first} to {last} where nothing is
  said. What a version of PgBouncer does not show is left out there.
- **standards**: which of our standards it proves, by the ids of `exporter/pgvigil/standards.yml`.

*Each scrape* means asked when Prometheus asks; *every 5m* means asked in the background, and a
scrape serves what was last found. *In each database* puts the database's name into the label
`datname`. A query that needs what a server or the exporter's role does not have is not sent there,
and costs only its own metrics: `pgvigil explain` tells which. A value that is NULL gives no sample.
Constant labels of a target stand on all its series.
"""


_COMMANDS: Mapping[tuple[str, str], str] = {
    ("pgbackrest", ""): "pgbackrest info",
    ("barman", ""): "barman list-backups all",
    ("barman", "runs"): "barman show-backup",
    ("barman", "checks"): "barman check all",
    ("wal-g", ""): "wal-g backup-list --detail",
    ("wal-g", "timelines"): "wal-g wal-show",
}
"""What programs are asked, by their kind and the query's word."""

_OWN_PARTS = (
    (
        "The target and its scrapes",
        "On the target's page. With several targets they stand once more on `/metrics`, with the "
        "label `target`, as last known; `pgvigil_target_up` stands only there.",
        SCRAPE,
    ),
    (
        "What is expected",
        "On the target's page, also while the server is away.",
        EXPECTED,
    ),
    ("The queries", "On the target's page, while the server answers.", QUERIES),
    (
        "The databases",
        "On the target's page, once a query that runs in each database has been due.",
        DATABASES,
    ),
    ("The web configuration", "On `/metrics`, where there is one: securing.md.", WEB),
    ("The process", "On `/metrics`.", PROCESS),
)

_ORDINARY = 5
"""The priority that is not worth a word."""

_UNITS = {
    "_timestamp_seconds": "seconds since the epoch",
    "_start_time_seconds": "seconds since the epoch",
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_ratio": "ratio",
    "_multixacts": "multixact ids",
    "_xids": "transaction ids",
}
"""What a name without its `_total` may end in, the longer first."""


def page(queries: Sequence[Query], used: Mapping[str, Sequence[str]]) -> str:
    """The whole page; `used` gives the ids of the standards that a metric proves."""
    ordered = sorted(queries, key=lambda query: query.area)  # stable: a file's order stays
    areas = [(area, list(of)) for area, of in groupby(ordered, key=lambda query: query.area)]
    lines = [
        _HEAD.format(
            ours=sum(len(query.metrics) for query in queries),
            queries=len(queries),
            own=len(OWN),
            first=SUPPORTED[0],
            last=SUPPORTED[-1],
        )
    ]
    lines += ["| area | queries | families |", "|---|--:|--:|"]
    for area, of in areas:
        lines.append(f"| [{area}](#{area}) | {len(of)} | {sum(len(q.metrics) for q in of)} |")
    lines.append(f"| [the exporter itself](#the-exporter-itself) | | {len(OWN)} |")
    for area, of in areas:
        lines += ["", f"## {area}"]
        for query in of:
            lines += ["", *_query(query, used)]
    lines += ["", "## The exporter itself"]
    for title, text, metrics in _OWN_PARTS:
        lines += ["", f"### {title}", "", text, "", *_own_table(metrics, used)]
    return "\n".join(lines) + "\n"


def _query(query: Query, used: Mapping[str, Sequence[str]]) -> Iterator[str]:
    every = _versions(query)
    yield f"### {query.name}"
    yield ""
    yield _plain(query.why)
    yield ""
    yield " ".join(f"{fact}." for fact in _facts(query, every))
    yield ""
    metrics = query.metrics
    versions = [_versions(query, metric) for metric in metrics]
    standards = [", ".join(used.get(metric.name, ())) for metric in metrics]
    columns = {
        "metric": [f"`{metric.name}`" for metric in metrics],
        "type": [_type(metric.name, metric.type) for metric in metrics],
        "versions": [_ranges(of) for of in versions] if set(versions) - {every} else [],
        "meaning": [_meaning(metric) for metric in metrics],
        "standards": standards if any(standards) else [],
    }
    yield from _table(columns)


def _own_table(metrics: Sequence[Own], used: Mapping[str, Sequence[str]]) -> Iterator[str]:
    labels = [_names(metric.labels) for metric in metrics]
    standards = [", ".join(used.get(metric.name, ())) for metric in metrics]
    columns = {
        "metric": [f"`{metric.name}`" for metric in metrics],
        "type": [_type(metric.name, metric.type) for metric in metrics],
        "labels": labels if any(labels) else [],
        "meaning": [_plain(metric.help) for metric in metrics],
        "standards": standards if any(standards) else [],
    }
    yield from _table(columns)


def _table(columns: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A table of the columns that hold something."""
    kept = {title: cells for title, cells in columns.items() if cells}
    yield f"| {' | '.join(kept)} |"
    yield "|---" * len(kept) + "|"
    for row in zip(*kept.values(), strict=True):
        yield f"| {' | '.join(row)} |"


def _facts(query: Query, versions: Collection[int]) -> Iterator[str]:
    """When and where a query runs, what it needs and how much it may give."""
    when = f"every {_duration(query.every)}" if query.every else "each scrape"
    where = "in each database" if query.scope == "database" else "once a server"
    on = {"primary": ", on a primary only", "standby": ", on a standby only"}.get(query.role, "")
    yield f"{when.capitalize()}, {where}{on}"
    if query.kind == "pgbouncer":
        yield f"By `SHOW {query.variants[0].text.upper()}` of a PgBouncer's console"
    word = query.variants[0].text
    if command := _COMMANDS.get((query.kind, word)) or _COMMANDS.get((query.kind, "")):
        yield f"By `{command}`"
    if len(versions) != len(SUPPORTED):
        yield f"PostgreSQL {_ranges(versions)}"
    if query.opt_in:
        yield f"Only where the configuration says `enable: [{query.name}]`"
    needs = list(_needs(query.needs))
    ways = [", ".join(_needs(variant.needs)) for variant in query.variants]
    if all(ways):
        needs.append(" or ".join(ways))
    if needs:
        yield f"Needs {', '.join(needs)}"
    if labels := _names(_labels(query)):
        yield f"Labels: {labels}"
    yield f"At most {query.max_series} series"
    if top := query.top:
        within = f" within each {_names(top.within)}" if top.within else ""
        yield (
            f"Of the rows stand the first {top.rows} by each of {_names(top.by)}{within}, each for "
            f"at least {_duration(top.hold)}; the rest is the row `other`"
        )
        if top.gains:
            yield "Its counters begin at 0 with the exporter and add up what a row gains"
    if query.priority != _ORDINARY:
        yield f"Priority {query.priority}"


def _labels(query: Query) -> Sequence[str]:
    return ("datname", *query.labels) if query.scope == "database" else query.labels


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _needs(needs: Needs) -> Iterator[str]:
    for name, version in needs.extension.items():
        yield f"the extension {name} {version}"
    for role in needs.privilege:
        yield f"the privileges of {role}"
    for function in needs.function:
        yield f"EXECUTE on `{function}`"
    for name, value in needs.setting.items():
        yield f"the setting `{name} = {value}`"


def _meaning(metric: Metric) -> str:
    text = _plain(metric.help)
    if needs := list(_needs(metric.needs)):
        text += f" Needs {', '.join(needs)}."
    if metric.other:
        text += f" On `other`: {metric.other}."
    return text


def _type(name: str, kind: str) -> str:
    bare = name.removesuffix("_total")
    unit = next((unit for suffix, unit in _UNITS.items() if bare.endswith(suffix)), "")
    return f"{kind}, {unit}" if unit else kind


def _versions(query: Query, metric: Metric | None = None) -> tuple[int, ...]:
    """The supported versions on which a query runs, or gives the metric."""
    return tuple(
        major
        for major in SUPPORTED
        if any(variant.since <= major < variant.until for variant in query.variants)
        and (metric.fits(major) if metric else any(m.fits(major) for m in query.metrics))
    )


def _ranges(versions: Collection[int]) -> str:
    """Versions for a person: `13 to 15, 18`."""
    starts = [major for major in versions if major - 1 not in versions]
    ends = [major for major in versions if major + 1 not in versions]
    spans = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans) or "none"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    text = " ".join(text.split())
    for sign in "\\|*<`":
        text = text.replace(sign, f"\\{sign}")
    return text
