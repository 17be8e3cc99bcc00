"""Every statement that ships is harmless, and every metric has a name that Prometheus expects."""

import re
from collections.abc import Sequence

import pytest
from pgvigil.catalogue import COLUMNS, SUPPORTED, Metric, Needs, Query, load
from pgvigil.own import PREFIXES
from pgvigil.target import COMMANDS

from lab.statements import Text, Token, relations, texts, tokens, with_queries

QUERIES = load()
METRICS = [metric for query in QUERIES for metric in query.metrics]

GRAMMAR = {
    # What looks like a call and is a part of the language, so no other schema can replace it.
    *("all", "and", "any", "array", "as", "bit", "by", "case", "cast", "coalesce", "distinct"),
    *("else", "except", "exists", "extract", "filter", "from", "greatest", "having", "in"),
    *("intersect", "is", "join", "lateral", "least", "limit", "materialized", "not", "nullif"),
    *("on", "or", "over", "row", "select", "some", "then", "union", "using", "values", "when"),
    *("where", "with"),
}
FORBIDDEN = {
    *("alter", "call", "copy", "create", "delete", "do", "drop", "grant", "insert", "listen"),
    *("lock", "merge", "notify", "reset", "set", "truncate", "update"),
    *("information_schema", "pg_temp", "regclass"),
}
HARMFUL = re.compile(
    r"pg_(total_|table_|indexes_)?(relation_)?size"
    r"|pg_get_\w*def|pg_get_expr|pg_get_viewdef|pgstat(tuple|index|ginindex|hashindex)\w*"
    r"|set_config|pg_(terminate|cancel)_backend|pg_reload_conf|pg_switch_wal|pg_stat_reset\w*"
    r"|pg_ls_dir|lo_\w+|dblink\w*|nextval|setval|txid_current"
    r"|pg_current_xact_id|pg_advisory\w*|query_to_xml\w*|table_to_xml\w*|pg_sleep\w*"
)
"""Functions that open relations of users, act on the server or use up what it has."""
COSTLY = re.compile(r"pg_(database|tablespace)_size|pg_sequence_last_value")
"""What looks at every file or sequence: for the background only, and not often."""
OWN_SCHEMAS = {"timescaledb": ("timescaledb_information",)}
"""Schemas that an extension makes for itself, whatever schema it was installed into."""
CURIOUS = re.compile(r"pg_read_(binary_)?file")
"""What reads files of the machine: only where the operator asked for it."""


ASKED = [query for query in QUERIES if query.kind == "postgresql"]
TEXTS = [pytest.param(text, id=f"{text.query.name}-{text.major}") for text in texts(ASKED)]


def qualified(before: Sequence[Token], schemas: Sequence[str]) -> bool:
    """Whether what comes after these tokens belongs to one of the schemas."""
    return len(before) > 1 and before[-1].text == "." and before[-2].text in schemas


def schemas_of(query: Query) -> list[str]:
    """The schemas a statement may name: `pgvigil` is that of what `pgvigil grants` makes."""
    needed = {name for needs in query.all_needs for name in needs.extension}
    own = [schema for name in needed for schema in OWN_SCHEMAS.get(name, ())]
    return ["pg_catalog", "pgvigil", *("{" + name + "}" for name in needed), *own]


def unsaid(text: Text) -> list[str]:
    """The relations that a statement reads without a schema, or by one it may not name."""
    schemas, own = schemas_of(text.query), with_queries(text.tokens)
    return [
        found.schema or found.name
        for found in relations(text.tokens)
        if (found.schema not in schemas if found.schema else found.name not in own)
    ]


def unqualified_calls(text: Text) -> list[str]:
    found, schemas = text.tokens, schemas_of(text.query)
    return [
        token.text
        for position, token in enumerate(found[:-1])
        if token.kind in ("word", "quoted")
        and found[position + 1].text == "("
        and token.text not in GRAMMAR
        and not qualified(found[:position], schemas)
        and not (position and found[position - 1].text == "as")  # as alias (column)
    ]


def forbidden(text: Text) -> list[str]:
    found = text.tokens
    return [
        token.text
        for position, token in enumerate(found)
        if (token.kind == "word" and (token.text in FORBIDDEN or HARMFUL.fullmatch(token.text)))
        or (text.query.every < 60 and COSTLY.fullmatch(token.text))
        or (not text.query.opt_in and CURIOUS.fullmatch(token.text))
        or (token.kind == "cast" and found[position + 1].text.startswith("reg"))
    ]


def stars(text: Text) -> list[int]:
    """Where a star stands for all columns: not a product, and not in count(*)."""
    found = text.tokens
    return [
        position
        for position, token in enumerate(found)
        if token.text == "*"
        and (found[position - 1].text in ("select", ",", ".", "distinct", "all"))
    ]


def test_every_query_that_ships_is_looked_at() -> None:
    looked_at = {text.query.name for text in texts(ASKED)}
    assert looked_at == {query.name for query in QUERIES if query.word == "sql"}


@pytest.mark.parametrize("text", TEXTS)
def test_every_function_is_called_by_its_schema(text: Text) -> None:
    assert unqualified_calls(text) == []


@pytest.mark.parametrize("text", TEXTS)
def test_every_relation_is_read_by_its_schema(text: Text) -> None:
    assert unsaid(text) == []


@pytest.mark.parametrize("text", TEXTS)
def test_no_statement_opens_a_users_relation_or_changes_anything(text: Text) -> None:
    assert forbidden(text) == []


@pytest.mark.parametrize("text", TEXTS)
def test_every_column_is_named(text: Text) -> None:
    assert stars(text) == []


def lint(sql: str) -> set[str]:
    """What the four rules above say of a statement."""
    text = Text(QUERIES[0], 18, tokens(sql))
    rules = {
        "call": bool(unqualified_calls(text)),
        "relation": bool(unsaid(text)),
        "forbidden": bool(forbidden(text)),
        "star": bool(stars(text)),
    }
    return {name for name, broken in rules.items() if broken}


@pytest.mark.parametrize(
    ("sql", "broken"),
    [
        ("select count(*) as c from pg_catalog.pg_locks", {"call"}),
        ("select public.f(1) as c", {"call"}),
        ('select "f"(1) as c', {"call"}),
        ("select 1 as c from pg_locks", {"relation"}),
        ("select 1 as c from public.t", {"relation"}),
        ("select 1 as c from pg_catalog.pg_locks, t", {"relation"}),
        ("select 1 as c from pg_catalog.pg_locks as l join t on true", {"relation"}),
        ("select 1 as c from (pg_catalog.pg_locks as l join t on true)", {"relation"}),
        ("select 1 as c where exists (select from t)", {"relation"}),
        ("select extract(epoch from t) as c", set()),
        ("select a is distinct from b as c from pg_catalog.pg_locks", set()),
        ("with t as (select 1 as a) select a from t", set()),
        ("with t as not materialized (select 1) select from t, lateral (select 1) as x", set()),
        ("select 1 as t from t", {"relation"}),
        ("select a from (values (1)) as v (a) cross join (select 1) as x, t", {"relation"}),
        ("select pg_catalog.pg_database_size(1) as c", {"forbidden"}),
        ("select pg_catalog.pg_total_relation_size(1) as c", {"forbidden"}),
        ("select pg_catalog.pg_relation_size(1) as c", {"forbidden"}),
        ("select pg_catalog.pg_table_size(1) as c", {"forbidden"}),
        ("select pg_catalog.pg_get_indexdef(1) as c", {"forbidden"}),
        ("select pg_catalog.pg_get_expr(a, b) as c from pg_catalog.pg_attrdef", {"forbidden"}),
        ("select 'pg_class'::regclass as c", {"forbidden"}),
        ("select 'pg_class'::pg_catalog.regclass as c", {"forbidden"}),
        ("with t as (delete from pg_catalog.x returning 1) select 1 from t", {"forbidden"}),
        ("set work_mem = 1", {"forbidden"}),
        ("select * from pg_catalog.pg_locks", {"star"}),
        ("select l.* from pg_catalog.pg_locks as l", {"star"}),
        ("select a * 2 as c, pg_catalog.count(*) as d from pg_catalog.pg_locks", set()),
        ("select pg_catalog.pg_size_bytes('1 kB') as c -- pg_table_size(t) from t", set()),
        ("select 'count(*) from t' as c /* select * from t */", set()),
    ],
)
def test_the_rules_find_what_they_are_for(sql: str, broken: set[str]) -> None:
    assert lint(sql) == broken


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_each_supported_version_has_one_variant_that_is_the_last_resort_or_no_metric(
    query: Query,
) -> None:
    for major in SUPPORTED:
        fitting = [v for v in query.variants if v.since <= major < v.until]
        metrics = [m for m in query.metrics if m.fits(major)]
        assert bool(fitting) == bool(metrics), major
        # What stands behind one that needs nothing is never reached.
        assert all(variant.needs != Needs() for variant in fitting[:-1]), major


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_nothing_is_written_for_versions_that_are_not_supported(query: Query) -> None:
    parts = [(part.since, part.until) for part in query.variants]
    for since, until in (*parts, *((metric.since, metric.until) for metric in query.metrics)):
        assert set(range(since, until)) & set(SUPPORTED)
        assert since == 0 or since > SUPPORTED.start
        assert until == 1000 or until < SUPPORTED.stop


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_max_series_has_room_for_a_row_and_one_row_is_not_given_more(query: Query) -> None:
    assert query.max_series >= len(query.metrics)
    if not query.labels and not query.computes:
        assert query.max_series == len(query.metrics)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_query_says_why_and_may_not_run_for_long(query: Query) -> None:
    assert re.fullmatch(r"[A-Z].*[^ ]\.", query.why)
    # A command that asks a bucket far away harms nobody while it waits.
    assert 0 < query.timeout <= (60 if query.kind in COMMANDS else 5)


def test_no_metric_stands_in_two_queries() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))


UNITS = {
    "_timestamp_seconds": r"seconds since the epoch",
    "_seconds": r"\bseconds?\b",
    "_seconds_total": r"\bseconds?\b",
    "_bytes": r"\bbytes?\b",
    "_bytes_total": r"\bbytes?\b",
    "_ratio": r"\b(ratio|share|fraction)\b",
    "_xids": r"\btransactions?\b",
    "_pages": r"\bpages?\b",
    "_rows": r"\brows?\b",
    "_files": r"\bfiles?\b",
    "_info": r"\balways 1\b",
}
"""What a metric's help says, by how its name ends."""


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_names_begin_with_the_kind_of_target_that_they_tell_of(query: Query) -> None:
    prefix = PREFIXES[query.kind]
    assert [m.name for m in query.metrics if not m.name.startswith(f"{prefix}_")] == []


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_is_of_prometheus_making(metric: Metric) -> None:
    name = metric.name
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert (metric.type == "counter") is name.endswith("_total")
    # promtool's linter keeps these for histograms and summaries, and wants base units.
    assert not name.endswith(("_count", "_sum", "_bucket"))
    words = name.split("_")
    short = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
    kinds = {"gauge", "counter", "histogram", "summary"}
    other = {"milliseconds", "microseconds", "minutes", "hours", "days", "kilobytes", "percent"}
    assert not (short | kinds | other) & set(words)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_help_says_what_the_name_promises(metric: Metric) -> None:
    fitting = [wanted for end, wanted in UNITS.items() if metric.name.endswith(end)]
    for wanted in fitting:
        assert re.search(wanted, metric.help, re.I)
    assert re.fullmatch(r"[A-Z0-9].*\.", metric.help)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_labels_are_in_snake_case_and_none_is_kept_for_others(query: Query) -> None:
    for label in query.labels:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", label)
    kept = {"le", "quantile", "job", "instance", "query", "reason", "target"}
    assert kept.isdisjoint(query.labels)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_an_info_metric_is_a_constant_one(query: Query) -> None:
    for metric in query.metrics:
        if metric.name.endswith("_info"):
            if query.kind != "postgresql":
                assert metric.column == "info"  # which every table has
                continue
            for variant in query.variants:
                assert COLUMNS not in variant.text
                assert re.search(rf"\b1 as {metric.column}\b", variant.text)
