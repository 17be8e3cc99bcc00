"""The page of all metrics, and the page of what the catalogue reads, say what is so."""

import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from pgvigil import catalogue, cli, grants
from pgvigil.catalogue import Query
from pgvigil.own import OWN, SCRAPE
from pgvigil.target import COMMANDS

from lab.authority import Authority
from lab.cluster import PGVIGIL
from lab.exporter import Exporter
from lab.postgres import Server

ROOT = Path(__file__).parents[2]
QUERIES = {query.name: query for query in catalogue.load()}
DECISION = ROOT / "docs/decisions/0004-what-the-catalogue-reads.md"

ODD_QUERIES = """\
lacks:
  why: So that a metric is skipped.
  max_series: 2
  sql: select {columns}
  metrics:
    own_d: {column: d, value: "1", type: gauge, help: D.}
    own_e: {column: e, value: "1", type: gauge, help: E., needs: {extension: {none: "1"}}}
fails:
  why: So that failures show.
  max_series: 1
  sql: select 1 / 0 as a
  metrics: {own_a: {column: a, type: gauge, help: A.}}
drops:
  why: So that what is dropped shows.
  max_series: 2
  labels: [x]
  sql: select 'x' as x, b from pg_catalog.generate_series(1, 2) as b
  metrics: {own_b: {column: b, type: gauge, help: B.}}
"""


def test_the_page_of_standards_is_what_their_file_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["reference", "--standards"]) == 0
    written = (ROOT / "docs/standards.md").read_text("utf-8")
    assert written == capsys.readouterr().out, "run `make docs`"


def test_the_page_of_metrics_is_what_the_catalogue_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["reference"]) == 0
    written = (ROOT / "docs/metrics.md").read_text("utf-8")
    assert written == capsys.readouterr().out, "run `make docs`"


def own_families(
    exporter: Exporter, path: str, *, within: float, visited: bool = True
) -> dict[str, tuple[str, str, set[frozenset[str]]]]:
    """The kind, the help and the sets of label names of each family that no query gives.

    A target's page is asked until its databases were visited, where they are.
    """
    end = time.monotonic() + within
    body = exporter.get(path).body.decode()
    while visited and "probe" in path and "\npgvigil_database_visit_age_seconds{" not in body:
        assert time.monotonic() < end, "no database was visited"
        time.sleep(0.1)
        body = exporter.get(path).body.decode()
    about = dict(re.findall(r"^# HELP (\S+) (.*)$", body, re.M))
    kinds = dict(re.findall(r"^# TYPE (\S+) (.*)$", body, re.M))
    of_queries = {metric.name for query in QUERIES.values() for metric in query.metrics}
    return {
        name: (kinds[name], about[name], label_names(body, name))
        for name in kinds
        if name not in of_queries and not name.startswith("own_")
    }


def label_names(body: str, name: str) -> set[frozenset[str]]:
    blocks = re.findall(rf"^{name}(?:\{{(.*)\}})? \S+$", body, re.M)
    return {frozenset(re.findall(r'(\w+)="(?:[^"\\]|\\.)*"', block)) for block in blocks}


@pytest.mark.parametrize("major", [18])
def test_the_exporters_own_metrics_are_what_its_pages_hold(server: Server, tmp_path: Path) -> None:
    there = {"host": "127.0.0.1", "port": server.port, "dbname": "postgres", **PGVIGIL.login}
    nowhere = {"host": "127.0.0.1", "port": 1}
    targets = {
        "there": {"connection": there, "declared": {"role": "primary"}},
        "small": {"connection": there, "max_series": 100},
        "nowhere": {"connection": nowhere},
        "pooler": {"kind": "pgbouncer", "connection": nowhere},
        **{kind: {"kind": kind, "command": [f"/nowhere/{kind}"]} for kind in COMMANDS},
    }
    document = {
        "targets": targets,
        "auth_modules": {"reader": {"connection": {"user": "pgvigil"}}},
        "discovery": {"patroni": [{"url": "http://127.0.0.1:1", "auth_module": "reader"}]},
    }
    (tmp_path / "pgvigil.yml").write_text(json.dumps(document))  # JSON is YAML
    (tmp_path / "own.yml").write_text(ODD_QUERIES)

    authority = Authority(tmp_path)
    authority.sign("served", "IP:127.0.0.1")
    served = {"tls_server_config": {"cert_file": "served.pem", "key_file": "served.key"}}
    (tmp_path / "web.yml").write_text(json.dumps(served))

    words = ["--config", f"{tmp_path}/pgvigil.yml", "--catalogue", f"{tmp_path}/own.yml"]
    words += ("--web-config", f"{tmp_path}/web.yml")
    with Exporter(*words, tls=authority.client()) as exporter:
        target, small, overview = (
            own_families(exporter, path, within=20)
            for path in ("/probe?target=there", "/probe?target=small", "/metrics")
        )
        others = [
            own_families(exporter, f"/probe?target={name}", within=0, visited=False)
            for name in ("pooler", *COMMANDS)
        ]

    wanted = dict(OWN)
    if not server.tls:
        del wanted["pgvigil_server_certificate_expiry_timestamp_seconds"]
    pages = (target, small, *others, overview)
    assert {name for page in pages for name in page} == wanted.keys()
    for page in pages:
        added = {"target"} if page is overview else set[str]()
        for name, (kind, about, labels) in page.items():
            own = wanted[name]
            extra = added if own in SCRAPE else set()
            assert (kind, about) == (own.type, own.help), name
            assert labels == {frozenset({*own.labels, *extra})}, name


TITLES = (
    "The server's views",
    "Functions beside the views",
    "Beside pg_exporter",
    "What nobody else read",
    "What the peers have together",
)


def rows_of(title: str) -> Mapping[str, str]:
    """The rows below a heading of the decision page: the first cell, and the second."""
    section = DECISION.read_text("utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \|", section, re.M)
    assert len(rows) == len(dict(rows)), "a row stands twice"
    return dict(rows)


def named(text: str) -> list[str]:
    """The queries a cell names."""
    return re.findall(r"`([a-z_]+\.[a-z_]+)`", text)


def reading(names: Iterable[str]) -> set[str]:
    """The queries whose text names one of these relations or functions of pg_catalog."""
    found = re.compile(rf"\bpg_catalog\.({'|'.join(names)})\b")
    return {name for name, query in QUERIES.items() if found.search(text_of(query))}


def text_of(query: Query) -> str:
    """All that a query has the server run, the functions that `pgvigil grants` makes included."""
    texts = [variant.text for variant in query.variants]
    texts += [metric.value for metric in query.metrics]
    if any(function.startswith("pgvigil.") for function in query.needs.function):
        texts.append(grants.script(grants.DEFAULT_ROLE, grants.PARTS, create=True))
    return "\n".join(texts)


def made_of(view: str, definitions: Mapping[str, str]) -> set[str]:
    """A view and all relations and functions that it stands on."""
    names, new = {view}, {view}
    while new:
        new = {n for of in new for n in re.findall(r"\bpg_\w+", definitions.get(of, ""))} - names
        names |= new
    return names


@pytest.mark.parametrize("major", [18])
def test_every_view_of_the_server_is_read_or_has_its_reason(server: Server) -> None:
    definitions = dict(
        server.execute("select viewname, definition from pg_views where schemaname = 'pg_catalog'")
    )
    rows = rows_of("The server's views")
    assert rows.keys() == definitions.keys()
    faults = []
    for view, text in rows.items():
        queries, readers = set(named(text)), reading([view])
        if strange := queries - reading(made_of(view, definitions)):
            faults.append(f"{view} is not read by {strange}")
        if readers and not queries & readers:
            faults.append(f"{view} is read by {readers}")
    assert faults == []


@pytest.mark.parametrize("title", TITLES)
def test_a_query_that_the_decision_names_exists(title: str) -> None:
    rows = rows_of(title)
    assert rows
    assert [name for text in rows.values() for name in named(text) if name not in QUERIES] == []


def test_every_namespace_of_the_widest_peer_has_its_row() -> None:
    assert len(rows_of("Beside pg_exporter")) == 59
