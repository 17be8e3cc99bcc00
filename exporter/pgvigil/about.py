"""Write what the exporter has to say of a target, and of how it was asked."""

import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby
from math import inf
from weakref import WeakKeyDictionary

from pgvigil import __version__, maintenance
from pgvigil.collect import Collector, Scrape
from pgvigil.errors import Down
from pgvigil.fleet import Fleet
from pgvigil.own import OWN, PREFIXES
from pgvigil.render import Family, Headers, Sheet, bucket_limit, headers, number, pair
from pgvigil.slow import Result, shown
from pgvigil.standards import LATENCY, Objective
from pgvigil.web import Denied, Web

Labels = tuple[tuple[str, str], ...]
"""Names and values."""

_slow_pages: WeakKeyDictionary[Collector, tuple[Sequence[Result], list[Family]]] = (
    WeakKeyDictionary()
)
"""What the slow lane's results came to at the last scrape; they seldom change between two."""

_expectations: WeakKeyDictionary[Collector, tuple[Family, Family]] = WeakKeyDictionary()

_Memo = dict[str, tuple[tuple[object, ...], Family]]
_memos: WeakKeyDictionary[Collector, _Memo] = WeakKeyDictionary()
"""What was said of each target's queries at its last scrape, which is mostly the same again."""


def families(collector: Collector, scrape: Scrape) -> Iterator[Family]:
    """Everything a target's page says of the target, and of how it was asked."""
    labels = _constant(collector)
    prefix = PREFIXES[collector.target.kind]
    yield _family(f"{prefix}_up", labels, [(b"", scrape.up)])
    yield _family(
        f"{prefix}_down_reason",
        labels,
        [(_pairs(("reason", reason)), scrape.down is reason) for reason in Down],
    )
    for sheet in scrape.sheets.values():
        assert isinstance(sheet, Sheet)
        yield from sheet.families
    if scrape.up:
        yield from _slow_families(collector, scrape)
        yield from _of_queries(collector, scrape)
        yield from _of_databases(collector)
        expiry = collector.slow.certificate_expiry
        yield _family(
            "pgvigil_server_certificate_expiry_timestamp_seconds",
            labels,
            [(b"", expiry)] if expiry is not None else [],
        )
    yield from _of_targets([(labels, collector, scrape)])
    yield from _expected(collector)


def overview(collectors: Iterable[Collector]) -> Iterator[Family]:
    """What the page of an exporter with several targets says of each, as last known."""
    known = [(_named(c), c, c.last or Scrape()) for c in collectors]
    yield _family(
        "pgvigil_target_up",
        (),
        [(_pairs(("target", c.target.name)), scrape.up) for _, c, scrape in known],
    )
    yield from _of_targets(known)


def ourselves(fleet: Fleet) -> Iterator[Family]:
    """What is running here, and whether it could be told anew what to do."""
    labels = _pairs(("version", __version__), ("python", platform.python_version()))
    yield _family("pgvigil_build_info", (), [(labels, 1)])
    shard = _pairs(("shard", str(fleet.shard.ordinal)), ("shards", str(fleet.shard.shards)))
    yield _family("pgvigil_targets", (), [(shard, len(fleet.collectors))])
    yield _family("pgvigil_hosts", (), [(b"", len(fleet.hosts))])
    sources = [(_pairs(("source", url)), of) for url, of in fleet.sources.items()]
    for name, values in (
        ("pgvigil_discovery_targets", [(pairs, len(of.members)) for pairs, of in sources]),
        ("pgvigil_discovery_failures_total", [(pairs, of.failures) for pairs, of in sources]),
        (
            "pgvigil_discovery_last_success_timestamp_seconds",
            [(pairs, round(of.succeeded_at, 3)) for pairs, of in sources],
        ),
    ):
        yield _family(name, (), values)
    yield _family("pgvigil_config_last_reload_successful", (), [(b"", fleet.reloaded)])
    yield _family(
        "pgvigil_config_last_reload_success_timestamp_seconds",
        (),
        [(b"", round(fleet.loaded_at, 3))],
    )


def entrance(web: Web) -> Iterator[Family]:
    """Who was let in here, and by what."""
    yield _family("pgvigil_web_config_current", (), [(b"", web.current)])
    yield _family("pgvigil_web_config_failures_total", (), [(b"", web.failures)])
    expiry = web.context.expiry if web.context else None
    if expiry is not None:
        yield _family("pgvigil_web_certificate_expiry_timestamp_seconds", (), [(b"", expiry)])
    denied = [(_pairs(("reason", why)), web.denied[why]) for why in Denied]
    yield _family("pgvigil_web_denied_total", (), denied)


def _expected(collector: Collector) -> Iterator[Family]:
    """What is expected of the target; the same again until the program ends, but for windows."""
    labels, target = _constant(collector), collector.target
    known = _expectations.get(collector)
    if known is None:
        names = [(_pairs(("kind", kind), ("name", name)), 1.0) for kind, name in target.declared]
        known = _expectations[collector] = (
            _objectives(labels, (*target.objectives,)),
            _family("pgvigil_declared", labels, names),
        )
    yield from known
    under_way = maintenance.under_way(target.maintenance)
    yield _family("pgvigil_maintenance", labels, [(b"", under_way)])


@lru_cache(maxsize=256)
def _objectives(labels: Labels, objectives: tuple[Objective, ...]) -> Family:
    """What each standard demands; some 30 kB that most targets of a fleet share."""
    keys = OWN["pgvigil_objective"].labels
    told = [(_pairs(*zip(keys, (*of[:3], _limit(of)), strict=True)), of.value) for of in objectives]
    return _family("pgvigil_objective", labels, told)


def _limit(objective: Objective) -> str:
    """The limit as histograms spell it, of one that they tell of; an empty label is none."""
    return bucket_limit(objective.value) if objective.name == LATENCY else ""


def _constant(collector: Collector) -> Labels:
    return tuple(collector.target.labels.items())


def _named(collector: Collector) -> Labels:
    """The constant labels, and the target's name in the place of one that is called so."""
    return (
        *(p for p in _constant(collector) if p[0] != "target"),
        ("target", collector.target.name),
    )


def _slow_families(collector: Collector, scrape: Scrape) -> list[Family]:
    """The families of the slow lane's results, each in one piece over all databases."""
    results, merged = _slow_pages.get(collector, ((), []))
    same = len(results) == len(scrape.results)
    if not same or any(a is not b for a, b in zip(results, scrape.results, strict=True)):
        merged = []
        for _, group in groupby(scrape.results, key=lambda result: result.statement.query.name):
            merged += _merged([*group])
        _slow_pages[collector] = scrape.results, merged
    return merged


def _merged(results: Sequence[Result]) -> Iterable[Family]:
    """The families of one query; those without a sample are left out."""
    merged: dict[Headers, Family] = {}
    for result in results:
        assert isinstance(result.sheet, Sheet)
        if len(results) == 1:
            return result.sheet.families
        for family in result.sheet.families:
            if family.chunks:
                found = merged.setdefault(family.headers, Family(family.headers))
                found.chunks += family.chunks
    return merged.values()


def _of_targets(known: Sequence[tuple[Labels, Collector, Scrape]]) -> Iterator[Family]:
    for name, values in (
        ("pgvigil_scrape_duration_seconds", (s.seconds for _, _, s in known)),
        ("pgvigil_scrapes_total", (c.scrapes for _, c, _ in known)),
        ("pgvigil_scrapes_joined_total", (c.joined for _, c, _ in known)),
        ("pgvigil_scrape_overruns_total", (c.overruns for _, c, _ in known)),
        ("pgvigil_scrapes_abandoned_total", (c.abandoned for _, c, _ in known)),
        ("pgvigil_background_delays_total", (c.slow.put_off for _, c, _ in known)),
        ("pgvigil_connections", (c.connections for _, c, _ in known)),
        ("pgvigil_connects_total", (c.connects for _, c, _ in known)),
        ("pgvigil_connect_duration_seconds", (c.connect_seconds for _, c, _ in known)),
        ("pgvigil_superuser", (int(bool(c.facts and c.facts.superuser)) for _, c, _ in known)),
    ):
        family = Family(_family(name, (), []).headers)
        for (labels, _, _), value in zip(known, values, strict=True):
            family.chunks += _family(name, labels, [(b"", value)]).chunks
        yield family


def _of_queries(collector: Collector, scrape: Scrape) -> Iterator[Family]:
    labels, memo = _constant(collector), _memos.setdefault(collector, {})
    running = collector.running()
    tallies = [
        (name, _query(name), tally)
        for name, tally in collector.ledger.tallies.items()
        if name in running  # not what ran while the server had another role
    ]
    series = {name: sheet.series for name, sheet in scrape.sheets.items()}
    oldest: dict[str, float] = {}
    for result in scrape.results:
        name = result.statement.query.name
        series[name] = series.get(name, 0) + result.sheet.series
        if result.at < oldest.get(name, inf):
            oldest[name] = result.at
    now = time.monotonic()
    # Many are asked at once, and so are of one age.
    ages = {at: round(now - at, 3) for at in {*oldest.values()}}

    def family(name: str, samples: Sequence[tuple[bytes, float]]) -> Family:
        known, said = memo.get(name), tuple[object, ...](chain.from_iterable(samples))
        if known is None or known[0] != said:
            known = memo[name] = said, _family(name, labels, samples)
        return known[1]

    def by_query(values: Mapping[str, float]) -> list[tuple[bytes, float]]:
        return [(_query(query), value) for query, value in values.items()]

    yield family("pgvigil_query_success", [(pairs, int(t.succeeded)) for _, pairs, t in tallies])
    yield _family(
        "pgvigil_query_seconds_total",
        labels,
        [(pairs, round(t.seconds, 9)) for _, pairs, t in tallies],
    )
    yield family("pgvigil_query_rows", [(pairs, sum(t.rows.values())) for _, pairs, t in tallies])
    yield family("pgvigil_query_series", by_query(series))
    yield family("pgvigil_query_series_left_out", by_query(scrape.left_out))
    known_ages = by_query({name: ages[at] for name, at in oldest.items()})
    yield _family("pgvigil_query_age_seconds", labels, known_ages)
    for name, counts in (
        ("pgvigil_query_failures_total", [(n, t.failures) for n, _, t in tallies if t.failures]),
        (
            "pgvigil_query_dropped_samples_total",
            [(n, t.dropped) for n, _, t in tallies if t.dropped],
        ),
    ):
        samples = [
            (_pairs(("query", query), ("reason", reason)), count)
            for query, by_reason in counts
            for reason, count in by_reason.items()
        ]
        yield family(name, samples)
    skipped = sorted({(query.name, reason) for query, reason, _ in collector.refusals()})
    yield family(
        "pgvigil_query_skipped",
        [(_pairs(("query", query), ("reason", reason)), 1) for query, reason in skipped],
    )
    yield family(
        "pgvigil_metric_skipped",
        [
            (_pairs(("metric", loss.metric.name), ("reason", loss.reason)), 1)
            for loss in collector.losses()
        ],
    )


def _of_databases(collector: Collector) -> Iterator[Family]:
    """How the databases were visited, for the queries that run in each."""
    labels, slow = _constant(collector), collector.slow
    if not slow.databases:
        return
    now = time.monotonic()
    places = [(_pairs(("datname", shown(name))), p) for name, p in slow.databases.items()]
    states = {
        "visited": sum(place.visited > 0 for _, place in places),
        "failing": sum(place.down is not None for _, place in places),
        "late": len(slow.late()),
        "left_out": len(slow.left_out),
    }
    yield _family(
        "pgvigil_databases",
        labels,
        [(_pairs(("state", state)), count) for state, count in states.items()],
    )
    yield _family(
        "pgvigil_database_up",
        labels,
        [(pairs, int(p.down is None)) for pairs, p in places if p.visited or p.down],
    )
    yield _family(
        "pgvigil_database_visit_age_seconds",
        labels,
        [(pairs, now - place.visited) for pairs, place in places if place.visited],
    )


def _family(name: str, constant: Labels, samples: Sequence[tuple[bytes, float]]) -> Family:
    """A metric of our own with its samples: labels as `_pairs` has them, and a value."""
    of = OWN[name]
    opening, closing = _frame(name, constant)
    lines = [opening + pairs + closing + number(value).encode() for pairs, value in samples]
    return Family(headers(name, of.type, of.help), [b"".join(lines)] if lines else [])


@lru_cache(maxsize=8192)
def _frame(name: str, constant: Labels) -> tuple[bytes, bytes]:
    """What stands before and behind the labels that a metric of our own has of itself.

    A constant label gives way to one of the metric's.
    """
    own = OWN[name].labels
    fixed = b",".join(pair(key, value) for key, value in constant if key not in own)
    start = b"\n" + name.encode()
    if not fixed and not own:
        return start, b" "
    return start + b"{" + fixed + (b"," if fixed and own else b""), b"} "


@lru_cache(maxsize=16384)
def _query(name: str) -> bytes:
    """The label of a query as it stands in a block."""
    return pair("query", name)


@lru_cache(maxsize=16384)
def _pairs(*labels: tuple[str, str]) -> bytes:
    """Labels as they stand in a block; the same come again with each scrape, of any target."""
    return b",".join(pair(name, value) for name, value in labels)
