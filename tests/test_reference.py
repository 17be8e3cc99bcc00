"""The reference tells of each query and each metric what a reader must know."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pgvigil import reference
from pgvigil.catalogue import Query, load
from pgvigil.own import OWN

PLAIN = """\
waiting:
  why: Orders that wait are customers who call.
  max_series: 3
  labels: [warehouse]
  sql: select warehouse, orders, oldest, sent from shop.orders
  metrics:
    shop_orders: {column: orders, type: gauge, help: Orders that are not sent yet.}
    shop_orders_oldest_seconds: {column: oldest, type: gauge, help: Age of the oldest in seconds.}
    shop_orders_sent_bytes_total: {column: sent, type: counter, help: Bytes sent.}
"""
PLAIN_SECTION = """\
### own.waiting

Orders that wait are customers who call.

Each scrape, once a server. Labels: `warehouse`. At most 3 series.

| metric | type | meaning |
|---|---|---|
| `shop_orders` | gauge | Orders that are not sent yet. |
| `shop_orders_oldest_seconds` | gauge, seconds | Age of the oldest in seconds. |
| `shop_orders_sent_bytes_total` | counter, bytes | Bytes sent. |
"""

RICH = """\
tables:
  why: A table that grows | nobody knows why.
  on: primary
  scope: database
  every: 5m
  opt_in: true
  priority: 8
  needs:
    extension: {shop: "1.2"}
    privilege: [pg_monitor]
    function: ["pg_catalog.pg_ls_waldir()"]
    setting: {track_io_timing: "on"}
  max_series: 400
  labels: [schemaname, relname]
  top: {rows: 25, by: [size, scans], hold: 90m, within: [schemaname], gains: true}
  sql:
    - {until: 15, text: "select schemaname, relname, size, {columns} from old"}
    - {since: 17, text: "select schemaname, relname, size, {columns} from new"}
  metrics:
    own_size_bytes: {column: size, type: gauge, other: sum, help: "Size of <all> | *forks*."}
    own_scans_total:
      {column: scans, type: counter, since: 14, needs: {privilege: [reader]}, help: Scans.}
    own_last_timestamp_seconds: {column: last, type: gauge, until: 14, help: When.}
    own_age_xids: {column: age, type: gauge, since: 15, until: 17, help: Never.}
"""
RICH_SECTION = """\
### own.tables

A table that grows \\| nobody knows why.

Every 5m, in each database, on a primary only. PostgreSQL 13 to 14, 17 to 18. Only where the \
configuration says `enable: [own.tables]`. Needs the extension shop 1.2, the privileges of \
pg_monitor, EXECUTE on `pg_catalog.pg_ls_waldir()`, the setting `track_io_timing = on`. Labels: \
`datname`, `schemaname`, `relname`. At most 400 series. Of the rows stand the first 25 by each of \
`size`, `scans` within each `schemaname`, each for at least 90m; the rest is the row `other`. \
Its counters begin at 0 with the exporter and add up what a row gains. Priority 8.

| metric | type | versions | meaning | standards |
|---|---|---|---|---|
| `own_size_bytes` | gauge, bytes | 13 to 14, 17 to 18 | Size of \\<all> \\| \\*forks\\*. \
On `other`: sum. | STO-1, STO-2 |
| `own_scans_total` | counter | 14, 17 to 18 | Scans. Needs the privileges of reader. |  |
| `own_last_timestamp_seconds` | gauge, seconds since the epoch | 13 | When. |  |
| `own_age_xids` | gauge, transaction ids | none | Never. |  |
"""


def queries(folder: Path, text: str) -> Sequence[Query]:
    """The queries of a file of one's own, without those that ship."""
    path = folder / "own.yml"
    path.write_text(text)
    return [query for query in load([path]) if query.area == "own"]


def page(folder: Path, text: str, used: Mapping[str, Sequence[str]] | None = None) -> str:
    return reference.page(queries(folder, text), used or {})


def test_a_plain_query_is_told_in_few_words(tmp_path: Path) -> None:
    assert PLAIN_SECTION in page(tmp_path, PLAIN)


def test_all_that_a_query_may_say_is_told(tmp_path: Path) -> None:
    told = page(tmp_path, RICH, {"own_size_bytes": ["STO-1", "STO-2"]})
    assert RICH_SECTION in told


def test_the_head_counts_and_leads_to_the_areas(tmp_path: Path) -> None:
    told = page(tmp_path, PLAIN + RICH)
    head = " ".join(told.partition("|")[0].split())
    assert "7 families of metrics come from 2 queries" in head
    assert f"{len(OWN)} tell of the exporter itself" in head
    assert "| [own](#own) | 2 | 7 |" in told
    assert "\n## own\n" in told


def test_the_exporters_own_metrics_stand_with_their_labels_and_standards(tmp_path: Path) -> None:
    told = page(tmp_path, PLAIN, {"pg_up": ["AVL-1"]})
    for own in OWN.values():
        assert f"| `{own.name}` | {own.type}" in told
    assert "| `pg_up` | gauge |  | Whether the server answered in this scrape. | AVL-1 |" in told
    assert "| `pgvigil_query_failures_total` | counter | `query`, `reason` | Runs " in told


@pytest.mark.parametrize("text", [PLAIN, RICH])
def test_every_table_has_as_many_cells_in_each_row(tmp_path: Path, text: str) -> None:
    cells = 0
    for line in page(tmp_path, text).splitlines():
        if not line.startswith("|"):
            cells = 0
            continue
        count = line.replace("\\|", "").count("|")
        assert count == cells or cells == 0, line
        cells = count


def test_the_command_prints_the_page_with_queries_of_ones_own(tmp_path: Path) -> None:
    queries(tmp_path, PLAIN)
    command = [sys.executable, "-m", "pgvigil", "reference"]
    ended = subprocess.run(
        [*command, "--catalogue", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("# The metrics\n")
    assert PLAIN_SECTION in ended.stdout
    assert ended.stderr == ""


def test_the_command_tells_every_fault_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text("waiting: {why: W., max_series: x, sql: select 1}\n")
    command = [sys.executable, "-m", "pgvigil", "reference", "--catalogue", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 3
