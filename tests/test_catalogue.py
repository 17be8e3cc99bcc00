"""The catalogue's files become queries, or every fault in them is told at once."""

from pathlib import Path

import pytest
from pgvigil import catalogue, documents
from pgvigil.catalogue import Metric, Needs, Query, Variant
from pgvigil.errors import Refused

GOOD = """\
answers:
  why: Somebody wants to know.
  max_series: 10
  labels: [who]
  sql: select 'all' as who, 42 as answer
  metrics:
    own_answer: {column: answer, type: gauge, help: What it is.}
"""


def written(folder: Path, text: str, name: str = "own.yml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def faults(*paths: Path) -> list[str]:
    with pytest.raises(Refused) as refused:
        catalogue.load(paths)
    return [str(problem).replace(f"{paths[0].parent}/", "") for problem in refused.value.problems]


def faults_of(folder: Path, text: str) -> list[str]:
    return faults(written(folder, text))


def own(*paths: Path) -> list[Query]:
    return list(catalogue.load(paths)[len(catalogue.load()) :])


def test_a_query_for_a_pgbouncer_says_show_in_the_place_of_sql(tmp_path: Path) -> None:
    (query,) = own(
        written(
            tmp_path,
            """\
sockets:
  why: W.
  every: 5m
  max_series: 1
  show: mem
  metrics: {own_bytes: {column: memtotal, type: gauge, help: B.}}
""",
        )
    )
    assert (query.kind, query.word, query.variants[0].text) == ("pgbouncer", "show", "mem")


def test_what_belongs_to_sql_is_refused_without_it(tmp_path: Path) -> None:
    text = """\
nothing:
  why: W.
  max_series: 1
  metrics: {own_a: {column: a, type: gauge, help: A.}}
both:
  why: W.
  max_series: 1
  sql: select 1 as a
  show: pools
  metrics: {own_b: {column: a, type: gauge, help: A.}}
strange:
  why: W.
  on: primary
  timeout: 1s
  needs: {privilege: [pg_monitor]}
  max_series: 1
  show: pools
  metrics:
    own_c:
      column: a
      value: a + 1
      since: 14
      type: gauge
      help: A.
unknown:
  why: W.
  max_series: 1
  show: everything
  metrics: {own_d: {column: a, type: gauge, help: A.}}
taken:
  why: W.
  max_series: 1
  show: pools
  metrics: {pgbouncer_up: {column: a, type: gauge, help: A.}}
"""
    words = ", ".join(documents.schema("catalogue")["$defs"]["query"]["properties"]["show"]["enum"])
    belongs = "belongs to a query with sql; drop it"
    assert faults_of(tmp_path, text) == [
        f"own.yml:28: unknown.show must be one of {words}",
        "own.yml:1: nothing: says nothing to ask; write sql, show for a PgBouncer, info "
        "for pgBackRest, barman or walg",
        "own.yml:9: both: has sql and show; write one of them",
        f"own.yml:13: strange: on {belongs}",
        f"own.yml:14: strange: timeout {belongs}",
        f"own.yml:15: strange: needs {belongs}",
        f"own.yml:21: strange: value {belongs}",
        f"own.yml:22: strange: since {belongs}",
        "own.yml:34: pgbouncer_up is a name of the exporter's own; choose another",
    ]


def test_what_ships_is_in_order_and_named_by_area() -> None:
    queries = catalogue.load()
    assert {"availability", "replication", "activity"} <= {query.area for query in queries}
    assert all(query.place == f"catalogue/{query.area}.yml" for query in queries)


def test_a_query_of_ones_own_is_read_whole(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """\
# A comment.
answers:
  why: |
    Somebody wants to know.
  on: standby
  needs:
    extension: {pg_stat_statements: "1.8"}
    privilege: [pg_monitor]
    function: ["pg_catalog.pg_ls_waldir()"]
    setting: {wal_level: logical}
  timeout: 250ms
  max_series: 10
  labels: [who]
  sql:
    - until: 14
      text: select who, {columns} from pg_catalog.old
    - since: 14
      text: select who, {columns} from pg_catalog.new
  metrics:
    own_answers_total:
      column: answers
      type: counter
      value: answers / 1000
      help: |
        What
        it is.
    own_late: {column: late, type: gauge, help: New., since: 16, until: 18}
""",
    )
    assert own(path) == [
        Query(
            name="own.answers",
            why="Somebody wants to know.",
            role="standby",
            needs=Needs(
                extension={"pg_stat_statements": "1.8"},
                privilege=["pg_monitor"],
                function=["pg_catalog.pg_ls_waldir()"],
                setting={"wal_level": "logical"},
            ),
            timeout=0.25,
            max_series=10,
            labels=("who",),
            variants=(
                Variant(0, 14, "select who, {columns} from pg_catalog.old"),
                Variant(14, 1000, "select who, {columns} from pg_catalog.new"),
            ),
            metrics=(
                Metric(
                    "own_answers_total",
                    "answers",
                    "counter",
                    "What it is.",
                    "answers / 1000",
                    0,
                    1000,
                ),
                Metric("own_late", "late", "gauge", "New.", "late", 16, 18),
            ),
            place=str(path),
            line=2,
        )
    ]


def test_what_a_query_leaves_out_has_a_default(tmp_path: Path) -> None:
    (query,) = own(written(tmp_path, GOOD))
    assert (query.role, query.needs, query.timeout) == ("any", Needs(), 1.0)
    assert query.variants == (Variant(0, 1000, "select 'all' as who, 42 as answer"),)


def test_a_folder_gives_its_yaml_files_in_order(tmp_path: Path) -> None:
    written(tmp_path, GOOD.replace("own_", "b_"), "b.yaml")
    written(tmp_path, GOOD.replace("own_", "a_"), "a.yml")
    written(tmp_path, "not: read", "notes.txt")
    assert [query.name for query in own(tmp_path)] == ["a.answers", "b.answers"]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    assert faults(folder) == ["queries: holds no .yml or .yaml file"]


def test_a_folder_that_is_called_like_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yml").mkdir()
    told = [f"{tmp_path}/folder.yml: is a directory; name a file"]
    with pytest.raises(Refused) as refused:
        catalogue.load([tmp_path])
    assert [str(problem) for problem in refused.value.problems] == told


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    told = "gone.yml: cannot be read: No such file or directory; mind its path, owner and mode"
    assert faults(tmp_path / "gone.yml") == [told]


def test_an_unknown_key_is_refused_at_each_level(tmp_path: Path) -> None:
    text = GOOD.replace("max_series", "cost: 1\n  max_series").replace("help:", "hepl: x, help:")
    text = text.replace("  labels", "  needs: {roles: [x]}\n  labels")
    assert faults_of(tmp_path, text) == [
        "own.yml:3: unknown key 'cost' (known here: barman, computes, every, info, labels, limits, "
        "max_series, metrics, needs, on, opt_in, priority, scope, show, sql, timeout, top, walg, "
        "why)",
        "own.yml:9: unknown key 'hepl'; did you mean 'help'? (known here: column, help, needs, "
        "other, since, type, until, value)",
        "own.yml:5: unknown key 'roles' (known here: extension, function, privilege, setting)",
    ]


def test_a_missing_key_is_refused_with_what_it_is_for(tmp_path: Path) -> None:
    text = "answers:\n  sql: select 1 as a\n  metrics:\n    own_a: {type: gauge, help: A.}"
    assert faults_of(tmp_path, text) == [
        "own.yml:1: answers lacks the key 'why' "
        "(what goes wrong for whom when nobody looks at this)",
        "own.yml:1: answers lacks the key 'max_series' "
        "(the most series one run may give; more are dropped and counted)",
        "own.yml:4: answers.metrics.own_a lacks the key 'column' "
        "(the column of the result that holds the value)",
    ]


def test_a_query_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    told = ["own.yml:8: the key 'answers' stands twice; the first is in line 1; remove one"]
    assert faults_of(tmp_path, GOOD + GOOD) == told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "max_series: 10",
            'max_series: "10"',
            "3: answers.max_series must be a whole number, not text "
            "(the most series one run may give; more are dropped and counted)",
        ),
        (
            "max_series: 10",
            "max_series: 0",
            "3: answers.max_series must be at least 1 "
            "(the most series one run may give; more are dropped and counted)",
        ),
        (
            "labels: [who]",
            "labels: who",
            "4: answers.labels must be a list, not text (the columns that become labels)",
        ),
        (
            "labels: [who]",
            "labels: [__who]",
            "4: answers.labels.0 is not of the right form "
            "(a legal Prometheus label name that is a column of the result)",
        ),
        ("labels: [who]", "labels: [who, who]", None),
        (
            "  labels",
            "  on: master\n  labels",
            "4: answers.on must be one of primary, standby, any",
        ),
        (
            "  labels",
            "  timeout: 1m\n  labels",
            "4: answers.timeout is not of the right form "
            "(statement_timeout of this query, such as 250ms or 2s; 1s when absent)",
        ),
        (
            "type: gauge",
            "type: summary",
            "7: answers.metrics.own_answer.type must be one of gauge, counter, histogram",
        ),
        (
            "own_answer:",
            "own-answer:",
            "7: 'own-answer' is not a legal name here (a metric's name: letters, digits, _ and :)",
        ),
        (
            "own_answer:",
            "9lives:",
            "7: '9lives' is not a legal name here (a metric's name: letters, digits, _ and :)",
        ),
        (
            "answers:",
            "Answers:",
            "1: 'Answers' is not a legal name here "
            "(a query's name: lower case letters, digits and _)",
        ),
    ],
)
def test_what_breaks_the_form_is_refused(
    tmp_path: Path, old: str, new: str, told: str | None
) -> None:
    told = told or "4: answers.labels names the same thing twice; remove one"
    assert faults_of(tmp_path, GOOD.replace(old, new)) == [f"own.yml:{told}"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "type: gauge",
            "type: counter",
            "7: own_answer is a counter: its name must end in _total, as own_answer_total",
        ),
        (
            "own_answer:",
            "own_answer_total:",
            "7: own_answer_total is a gauge: only a counter's name may end in _total; rename it",
        ),
        (
            "as answer",
            "as answr",
            "5: answers: own_answer is declared from the column 'answer', which this statement "
            "does not have; select it by that name, or narrow since/until",
        ),
        (
            "as answer",
            "as answr -- answer",
            "5: answers: own_answer is declared from the column 'answer', which this statement "
            "does not have; select it by that name, or narrow since/until",
        ),
        (
            "as who",
            "as whom",
            "5: answers: the label 'who' is no column of this statement; select it by that name",
        ),
        (
            "select 'all'",
            "update 'all'",
            "5: answers: a statement must be one SELECT (or WITH ... SELECT, or VALUES)",
        ),
        (
            "as answer",
            "as answer; drop table t",
            "5: answers: a text must be one statement; remove the semicolon",
        ),
        (
            "help:",
            "since: 16, until: 16, help:",
            "7: own_answer: since 16 is not before until 16; mend one of them",
        ),
        (
            "sql: select 'all' as who, 42 as answer",
            "sql: [{since: 15, until: 14, text: \"select 'all' as who, 42 as answer\"}]",
            "5: answers: since 15 is not before until 14; mend one of them",
        ),
        (
            "help:",
            "value: answer / 2, help:",
            "7: own_answer has a value, but the statement has no {columns} to put it in; write "
            "{columns} among the statement's columns, or leave the value out",
        ),
        (
            "labels: [who]",
            "labels: [who, answer]",
            "1: answers: answer: a label and a value at once; drop one of them",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert faults_of(tmp_path, GOOD.replace(old, new)) == [f"own.yml:{told}"]


COMPUTING = """\
slow:
  why: Somebody waits.
  every: 5s
  max_series: 100
  labels: [datname]
  computes: running_statements
  limits: [0.5, 1]
  sql: select 'a' as key, 'b' as datname, 1 as age
  metrics:
    own_running: {column: now, type: gauge, help: Statements that run.}
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  every: 5s\n", "", "from one run to the next; say how often with every"),
        ("  limits: [0.5, 1]\n", "", "is told by limits; name them in seconds"),
        ("[0.5, 1]", "[0]", "seconds, above 0"),
        ("[datname]", "[usename]", "the labels of running_statements are [datname]"),
        ("column: now", "column: later", "'later', which is none of now, seen"),
        ("type: gauge", "type: histogram", "own_running is a gauge, as its column is 'now'"),
        ("  computes: running_statements\n", "", "limits belong to a query that computes"),
        ("running_statements", "wonders", "must be one of executor_time, running_statements"),
        ("running_statements", "logged_statements", "the labels of logged_statements are []"),
        ("  limits", "  scope: database\n  limits", "of the whole server; drop top and scope"),
    ],
)
def test_what_computes_something_must_say_of_what(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    catalogue.load([written(tmp_path, COMPUTING)])
    found = faults_of(tmp_path, COMPUTING.replace(old, new))
    assert any(told in fault for fault in found), found


def test_only_what_computes_gives_a_histogram(tmp_path: Path) -> None:
    found = faults_of(tmp_path, GOOD.replace("type: gauge", "type: histogram"))
    assert any("which only a query that computes one gives" in fault for fault in found), found


@pytest.mark.parametrize(
    "text",
    [
        "select ';' as who, 1 as answer",
        "select 'a' as who /* one; two */, 1 as answer -- three;",
        "(select 'a' as who, 1 as answer)",
        "with x as (select 1 as answer) select 'a' as who, answer from x",
        "/* first */ select 'a' as who, 1 as answer",
    ],
)
def test_what_only_looks_wrong_is_accepted(tmp_path: Path, text: str) -> None:
    sql = "sql: |\n    " + text
    path = written(tmp_path, GOOD.replace("sql: select 'all' as who, 42 as answer", sql))
    assert [query.variants[0].text for query in own(path)] == [text]


@pytest.mark.parametrize(
    "name", ["pg_up", "pg_down_reason", "pgvigil_answer", "process_cpu_seconds", "python_info"]
)
def test_a_name_of_the_exporters_own_is_refused(tmp_path: Path, name: str) -> None:
    told = [f"own.yml:7: {name} is a name of the exporter's own; choose another"]
    assert faults_of(tmp_path, GOOD.replace("own_answer", name)) == told


def test_a_metric_that_ships_cannot_be_taken_over(tmp_path: Path) -> None:
    owner = next(query for query in catalogue.load() if query.name == "availability.state")
    told = (
        f"own.yml:1: pg_in_recovery clashes with pg_in_recovery of availability.state at "
        f"catalogue/availability.yml:{owner.line}; one query gives a metric, choose another name"
    )
    assert faults_of(tmp_path, GOOD.replace("own_answer", "pg_in_recovery")) == [told]


def test_a_gauge_and_a_counter_cannot_share_a_family(tmp_path: Path) -> None:
    more = "    own_answer_total: {column: answer, type: counter, help: All.}\n"
    told = (
        "own.yml:1: own_answer_total clashes with own_answer of own.answers at own.yml:1; "
        "one query gives a metric, choose another name"
    )
    assert faults_of(tmp_path, GOOD + more) == [told]


def test_two_files_cannot_have_a_query_of_the_same_name(tmp_path: Path) -> None:
    first = written(tmp_path, GOOD)
    second = written(tmp_path, "\n" + GOOD.replace("own_", "other_"), "own.yaml")
    told = "own.yaml:2: the query own.answers stands already at own.yml:1; rename it"
    assert faults(first, second) == [told]


def test_all_faults_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    first = written(
        tmp_path,
        """\
answers:
  why: Somebody wants to know.
  cost: 1
  max_series: ten
  sql: select 42 as anwser
  metrics:
    own_answer: {column: answer, type: counter, help: What it is.}
    own-answer: {column: answer, type: gauge, help: What it is.}
    own_answer: {column: answer, type: gauge, help: What it is.}
""",
    )
    second = written(tmp_path, "a: [\n", "broken.yml")
    third = tmp_path / "gone.yml"
    assert faults(first, second, third) == [
        "own.yml:9: the key 'own_answer' stands twice; the first is in line 7; remove one",
        "own.yml:3: unknown key 'cost' (known here: barman, computes, every, info, labels, limits, "
        "max_series, metrics, needs, on, opt_in, priority, scope, show, sql, timeout, top, walg, "
        "why)",
        "own.yml:4: answers.max_series must be a whole number, not text "
        "(the most series one run may give; more are dropped and counted)",
        "own.yml:8: 'own-answer' is not a legal name here "
        "(a metric's name: letters, digits, _ and :)",
        "own.yml:5: answers: own_answer is declared from the column 'answer', which this statement "
        "does not have; select it by that name, or narrow since/until",
        "own.yml:7: own_answer is a counter: its name must end in _total, as own_answer_total",
        "broken.yml:2: is not YAML: did not find expected node content; mind the indent, and put "
        "text with special characters in quotes",
        "gone.yml: cannot be read: No such file or directory; mind its path, owner and mode",
    ]
