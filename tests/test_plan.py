"""A plan sends a server what fits it and says of the rest which fact forbids it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from pgvigil.catalogue import Metric, Needs, Query, Top, Variant
from pgvigil.plan import (
    TOP_ROWS,
    Extension,
    Facts,
    Plan,
    Reason,
    Refusal,
    Statement,
    Wanted,
    disabled,
    make_plan,
    wanted,
)

PRIMARY_16 = Facts(version=160004, in_recovery=False, user="pgvigil", database="postgres")
STANDBY_16 = Facts(version=160004, in_recovery=True, user="pgvigil", database="postgres")


def metric(name: str, column: str, since: int = 0, until: int = 1000, value: str = "") -> Metric:
    return Metric(name, column, "gauge", "What it is.", value or column, since, until)


LAG = metric("pg_lag_seconds", "lag")


def query(
    *variants: Variant,
    role: str = "any",
    needs: Needs = Needs(),  # noqa: B008  (frozen)
    max_series: int = 10,
    metrics: tuple[Metric, ...] = (LAG,),
) -> Query:
    return Query(
        name="replication.lag",
        why="Somebody wants to know.",
        role=role,
        needs=needs,
        timeout=1.0,
        max_series=max_series,
        labels=(),
        variants=variants or (Variant(0, 1000, "select 1 as lag"),),
        metrics=metrics,
        place="catalogue/replication.yml",
        line=1,
    )


def test_the_same_server_gets_the_same_plan_and_another_one_its_own() -> None:
    asked, other = query(), query(role="standby")
    plan = make_plan([asked], PRIMARY_16)
    assert make_plan([asked], replace(PRIMARY_16)) is plan
    assert make_plan([asked], STANDBY_16) is not plan
    assert make_plan([other], PRIMARY_16) != plan
    assert make_plan([asked], PRIMARY_16, {asked.name}) != plan


def refusal(asked: Query, facts: Facts) -> tuple[Reason, str]:
    plan = make_plan([asked], facts)
    assert plan.statements == ()
    (refused,) = plan.refusals
    assert refused.query == asked
    return refused.reason, refused.detail


def text_of(asked: Query, facts: Facts = PRIMARY_16) -> str:
    (statement,) = make_plan([asked], facts).statements
    return statement.text


def test_a_query_that_fits_becomes_a_statement_with_the_servers_own_bound_on_rows() -> None:
    asked = query()
    statement = Statement(
        asked, "select * from (\nselect 1 as lag\n) as bounded limit 11", asked.metrics
    )
    assert make_plan([asked], PRIMARY_16) == Plan((statement,), ())


def test_a_query_without_a_variant_for_this_version_is_refused_with_its_reason() -> None:
    asked = query(Variant(17, 1000, "select 1 as lag"))
    assert make_plan([asked], PRIMARY_16) == Plan(
        (), (Refusal(asked, Reason.VERSION, "nothing for PostgreSQL 16"),)
    )


def test_a_query_without_a_metric_for_this_version_is_refused_with_its_reason() -> None:
    asked = query(metrics=(metric("pg_new", "new", since=17), metric("pg_old", "old", until=16)))
    assert refusal(asked, PRIMARY_16) == (Reason.VERSION, "nothing for PostgreSQL 16")


def test_a_query_for_standbys_is_refused_on_a_primary() -> None:
    asked = query(role="standby")
    told = (Reason.ROLE, "runs on a standby, this is a primary")
    assert refusal(asked, PRIMARY_16) == told
    assert make_plan([asked], STANDBY_16).refusals == ()


def test_a_query_for_primaries_is_refused_on_a_standby() -> None:
    asked = query(role="primary")
    told = (Reason.ROLE, "runs on a primary, this is a standby")
    assert refusal(asked, STANDBY_16) == told
    assert make_plan([asked], PRIMARY_16).refusals == ()


def test_a_query_whose_extension_is_missing_is_refused_with_the_database() -> None:
    asked = query(needs=Needs(extension={"pg_stat_statements": "1.8"}))
    told = (
        Reason.EXTENSION,
        "pg_stat_statements is not installed in postgres, or pgvigil may not use its schema",
    )
    assert refusal(asked, PRIMARY_16) == told


@pytest.mark.parametrize("version", ["1.7", "1", "0.9", "1.7.9"])
def test_a_query_whose_extension_is_too_old_is_refused_with_both_versions(version: str) -> None:
    asked = query(needs=Needs(extension={"pg_stat_statements": "1.8"}))
    facts = Facts(160004, False, extensions={"pg_stat_statements": Extension(version, "public")})
    told = (Reason.EXTENSION, f"pg_stat_statements is {version}; 1.8 is needed")
    assert refusal(asked, facts) == told


@pytest.mark.parametrize("version", ["1.8", "1.8.0", "1.10", "2", "1.9dev"])
def test_versions_of_an_extension_are_compared_as_numbers(version: str) -> None:
    asked = query(needs=Needs(extension={"pg_stat_statements": "1.8"}))
    facts = Facts(160004, False, extensions={"pg_stat_statements": Extension(version, "public")})
    assert make_plan([asked], facts).refusals == ()


def test_a_query_whose_privilege_is_missing_is_refused_with_the_role() -> None:
    asked = query(needs=Needs(privilege=("pg_monitor", "pg_read_all_stats")))
    facts = Facts(160004, False, user="bare", privileges=frozenset({"pg_monitor"}))
    told = (Reason.PRIVILEGE, "bare lacks the privileges of pg_read_all_stats")
    assert refusal(asked, facts) == told


def test_a_query_whose_function_may_not_be_called_is_refused() -> None:
    asked = query(needs=Needs(function=("pg_catalog.pg_ls_waldir()",)))
    told = (
        Reason.FUNCTION,
        "pgvigil may not execute pg_catalog.pg_ls_waldir(), or it does not exist",
    )
    assert refusal(asked, PRIMARY_16) == told


@pytest.mark.parametrize(
    ("settings", "detail"),
    [({"wal_level": "replica"}, "replica"), ({}, "None")],
)
def test_a_query_whose_setting_differs_is_refused(settings: dict[str, str], detail: str) -> None:
    asked = query(needs=Needs(setting={"wal_level": "logical"}))
    facts = Facts(160004, False, settings=settings)
    assert refusal(asked, facts) == (Reason.SETTING, f"wal_level is {detail}, not logical")


def test_a_query_whose_needs_are_all_met_runs() -> None:
    asked = query(
        role="standby",
        needs=Needs(
            extension={"pg_stat_statements": "1.8"},
            privilege=("pg_monitor",),
            function=("pg_catalog.pg_ls_waldir()",),
            setting={"wal_level": "logical"},
        ),
    )
    facts = Facts(
        version=180000,
        in_recovery=True,
        extensions={
            "pg_stat_statements": Extension("1.12", "public"),
            "other": Extension("1", "x"),
        },
        privileges=frozenset({"pg_monitor", "pg_checkpoint"}),
        functions=frozenset({"pg_catalog.pg_ls_waldir()"}),
        settings={"wal_level": "logical", "other": "x"},
    )
    plan = make_plan([asked], facts)
    assert [statement.query for statement in plan.statements] == [asked]
    assert plan.refusals == ()


def test_only_the_first_obstacle_is_told() -> None:
    asked = query(
        Variant(17, 1000, "select 1 as lag"), role="standby", needs=Needs(privilege=("pg_monitor",))
    )
    assert refusal(asked, PRIMARY_16)[0] is Reason.VERSION


def test_queries_keep_their_order() -> None:
    queries = [query(role=role) for role in ("any", "standby", "primary", "standby")]
    plan = make_plan(queries, PRIMARY_16)
    assert [s.query for s in plan.statements] == [queries[0], queries[2]]
    assert [r.query for r in plan.refusals] == [queries[1], queries[3]]


@pytest.mark.parametrize(
    ("version", "word"), [(130023, "old"), (169999, "old"), (170000, "new"), (190000, "new")]
)
def test_a_range_of_versions_holds_its_beginning_and_not_its_end(version: int, word: str) -> None:
    asked = query(Variant(13, 17, "select 'old' as lag"), Variant(17, 1000, "select 'new' as lag"))
    text = text_of(asked, Facts(version=version, in_recovery=False))
    assert text == f"select * from (\nselect '{word}' as lag\n) as bounded limit 11"


def test_the_first_variant_that_fits_is_taken() -> None:
    asked = query(Variant(0, 1000, "select 1 as lag"), Variant(16, 17, "select 2 as lag"))
    assert "select 1 as lag" in text_of(asked)


def test_columns_are_those_of_the_metrics_that_the_version_has() -> None:
    asked = query(
        Variant(0, 1000, "select datname, {columns} from pg_catalog.pg_stat_database"),
        metrics=(
            metric("pg_old", "old", until=16),
            metric("pg_now", "now"),
            metric("pg_seconds", "time", value="time / 1000"),
            metric("pg_same", "now"),
            metric("pg_new", "new", since=17),
        ),
        max_series=30,
    )
    (statement,) = make_plan([asked], PRIMARY_16).statements
    assert [m.name for m in statement.metrics] == ["pg_now", "pg_seconds", "pg_same"]
    assert statement.max_rows == 10
    assert statement.text == (
        "select * from (\n"
        "select datname, now,\n"
        "  time / 1000 as time from pg_catalog.pg_stat_database\n"
        ") as bounded limit 11"
    )


def test_the_schema_of_an_extension_is_filled_in_as_the_server_quotes_it() -> None:
    asked = query(
        Variant(0, 1000, "select 1 as lag from {pg_stat_statements}.pg_stat_statements"),
        needs=Needs(extension={"pg_stat_statements": "1.8"}),
    )
    facts = Facts(160004, False, extensions={"pg_stat_statements": Extension("1.10", '"My x"')})
    assert text_of(asked, facts) == (
        'select * from (\nselect 1 as lag from "My x".pg_stat_statements\n) as bounded limit 11'
    )


@pytest.mark.parametrize(("max_series", "rows"), [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)])
def test_max_series_bounds_the_rows_by_the_number_of_metrics(max_series: int, rows: int) -> None:
    asked = query(metrics=(LAG, metric("pg_other", "lag")), max_series=max_series)
    (statement,) = make_plan([asked], PRIMARY_16).statements
    assert statement.max_rows == rows
    assert statement.text.endswith(f"\n) as bounded limit {rows + 1}")


def test_what_queries_want_to_know_is_told_once_and_in_order() -> None:
    queries = [
        query(needs=Needs(privilege=("pg_monitor", "a"), setting={"wal_level": "logical"})),
        query(needs=Needs(privilege=("pg_monitor",), function=("pg_catalog.f()",))),
        query(needs=Needs(extension={"pg_stat_statements": "1.8"}, setting={"fsync": "on"})),
    ]
    assert wanted(queries) == Wanted(
        privileges=["a", "pg_monitor"],
        functions=["pg_catalog.f()"],
        settings=["fsync", "wal_level"],
        tables=[],
    )


def test_a_version_number_tells_its_major_version() -> None:
    assert [Facts(v, in_recovery=False).major for v in (130023, 160004, 180000)] == [13, 16, 18]


BLOCKS = query(
    Variant(0, 1000, "select {columns} from pg_catalog.pg_stat_database"),
    metrics=(
        metric("pg_plain", "plain"),
        replace(metric("pg_lsn", "lsn", value="pg_catalog.pg_current_wal_lsn()"), type="gauge"),
        replace(metric("pg_held", "held"), needs=Needs(privilege=("pg_monitor",))),
    ),
)


def test_a_metric_that_lacks_something_is_left_out_and_named() -> None:
    plan = make_plan([BLOCKS], PRIMARY_16)
    (statement,) = plan.statements
    assert [m.name for m in statement.metrics] == ["pg_plain", "pg_lsn"]
    assert "held" not in statement.text
    (loss,) = plan.losses
    assert (loss.metric.name, loss.reason) == ("pg_held", Reason.PRIVILEGE)
    assert loss.detail == "pgvigil lacks the privileges of pg_monitor"
    held = replace(PRIMARY_16, privileges=frozenset({"pg_monitor"}))
    assert make_plan([BLOCKS], held).losses == ()


def test_what_raises_on_a_managed_service_is_not_called_there() -> None:
    aurora = replace(PRIMARY_16, provider="aurora", privileges=frozenset({"pg_monitor"}))
    plan = make_plan([BLOCKS], aurora)
    assert [m.name for s in plan.statements for m in s.metrics] == ["pg_plain", "pg_held"]
    assert [loss.reason for loss in plan.losses] == [Reason.PROVIDER]
    whole = query(Variant(0, 1000, "select 1 as lag from pg_catalog.pg_ls_waldir()"))
    told = (Reason.PROVIDER, "pg_ls_waldir raises an error on aurora")
    assert refusal(whole, aurora) == told
    assert make_plan([whole], replace(PRIMARY_16, provider="rds")).refusals == ()


def test_a_query_that_loses_all_its_metrics_is_refused_for_the_first() -> None:
    metrics = (replace(LAG, needs=Needs(function=("pg_catalog.f()",))),)
    asked = query(Variant(0, 1000, "select {columns}"), metrics=metrics)
    told = (Reason.FUNCTION, "pgvigil may not execute pg_catalog.f(), or it does not exist")
    assert refusal(asked, PRIMARY_16) == told


def test_of_several_texts_the_first_whose_needs_are_met_is_used() -> None:
    newer = Needs(extension={"pg_stat_statements": "1.11"})
    asked = query(
        Variant(0, 1000, "select 2 as lag from {pg_stat_statements}.x", newer),
        Variant(0, 1000, "select 1 as lag"),
    )
    assert "select 1 as lag" in text_of(asked)
    old = replace(PRIMARY_16, extensions={"pg_stat_statements": Extension("1.10", "s")})
    assert "select 1 as lag" in text_of(asked, old)
    new = replace(PRIMARY_16, extensions={"pg_stat_statements": Extension("1.12", "s")})
    assert "select 2 as lag from s.x" in text_of(asked, new)
    alone = query(asked.variants[0])
    assert refusal(alone, PRIMARY_16)[0] is Reason.EXTENSION
    assert refusal(alone, old)[0] is Reason.EXTENSION


@pytest.mark.parametrize(
    ("opt_in", "enable", "disable", "runs"),
    [
        (False, (), (), True),
        (True, (), (), False),
        (True, ("replication",), (), True),
        (True, ("replication.lag",), ("replication",), True),
        (False, (), ("replication",), False),
        (False, (), ("replication.lag",), False),
        (False, ("replication",), ("replication.lag",), False),
        (False, ("replication.lag",), ("replication.lag",), False),
        (False, ("other",), ("another.lag",), True),
    ],
)
def test_what_an_operator_enables_runs_and_what_he_disables_does_not(
    opt_in: bool, enable: Sequence[str], disable: Sequence[str], runs: bool
) -> None:
    asked = replace(query(), opt_in=opt_in)
    off = disabled([asked], enable, disable)
    plan = make_plan([asked], PRIMARY_16, off)
    assert bool(plan.statements) is runs
    assert [r.reason for r in plan.refusals] == ([] if runs else [Reason.DISABLED])


def test_a_query_that_chooses_rows_may_read_many() -> None:
    asked = replace(query(max_series=10), labels=("a",), top=Top(3, ("lag",), 60.0, ()))
    assert text_of(asked).endswith(f"limit {TOP_ROWS}")


POOLER = Facts(
    11800,
    in_recovery=False,
    kind="pgbouncer",
    product="PgBouncer 1.18.0",
    columns={"pools": frozenset({"database", "cl_waiting"}), "lists": frozenset()},
)


def shown(word: str, *columns: str, labels: Sequence[str] = ()) -> Query:
    metrics = tuple(metric(f"pgbouncer_{column}", column) for column in columns)
    asked = query(Variant(0, 1000, word), metrics=metrics)
    return replace(asked, word="show", labels=labels)


def test_what_a_pooler_shows_is_asked_by_its_word() -> None:
    plan = make_plan([shown("pools", "cl_waiting", labels=["database"])], POOLER)
    assert [statement.text for statement in plan.statements] == ["show pools"]
    assert (plan.refusals, plan.losses) == ((), ())


def test_a_column_that_a_pooler_does_not_show_costs_its_metric_alone() -> None:
    plan = make_plan([shown("pools", "cl_waiting", "cl_new")], POOLER)
    assert [m.column for statement in plan.statements for m in statement.metrics] == ["cl_waiting"]
    assert [(loss.metric.column, loss.reason, loss.detail) for loss in plan.losses] == [
        ("cl_new", Reason.VERSION, "cl_new is not among the pools of PgBouncer 1.18.0")
    ]


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        (shown("state", "paused"), "PgBouncer 1.18.0 has no state"),
        (shown("lists", "pools"), "pools is not among the lists of PgBouncer 1.18.0"),
        (
            shown("pools", "cl_waiting", labels=["user"]),
            "user is not among the pools of PgBouncer 1.18.0",
        ),
    ],
)
def test_what_a_pooler_does_not_show_at_all_is_refused(asked: Query, detail: str) -> None:
    plan = make_plan([asked], POOLER)
    assert plan.statements == ()
    assert [(refusal.reason, refusal.detail) for refusal in plan.refusals] == [
        (Reason.VERSION, detail)
    ]


def test_a_query_for_another_kind_of_server_is_no_refusal() -> None:
    asked = [query(), shown("pools", "cl_waiting")]
    (of_server,), (of_pooler,) = (
        make_plan(asked, facts).statements for facts in (PRIMARY_16, POOLER)
    )
    assert (of_server.query.word, of_pooler.query.word) == ("sql", "show")
    assert [make_plan(asked, facts).refusals for facts in (PRIMARY_16, POOLER)] == [(), ()]


def test_a_pooler_has_no_role_and_its_tables_are_asked_for() -> None:
    assert (PRIMARY_16.role, STANDBY_16.role, POOLER.role) == ("primary", "standby", "")
    asked = [shown("stats", "a"), shown("pools", "a"), shown("pools", "b"), query()]
    assert wanted(asked).tables == ["pools", "stats"]
