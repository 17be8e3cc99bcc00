"""Runs expensive queries beside the scrapes: in each database, and without harm to any."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pgvigil import catalogue
from pgvigil.plan import concerning

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

FreshServer = Callable[..., Server]

SHIPPED = concerning(catalogue.load(), "postgresql")

OWN = """
size:
  why: Somebody wants to know.
  every: 1s
  max_series: 100
  labels: [name]
  sql: select datname as name, datconnlimit as size from pg_catalog.pg_database
  metrics: {own_size: {column: size, type: gauge, help: Size.}}
relations:
  why: Somebody wants to know.
  every: 1s
  scope: database
  max_series: 1
  sql: select pg_catalog.count(*) as relations from pg_catalog.pg_class
  metrics: {own_relations: {column: relations, type: gauge, help: Relations.}}
"""


def exporter_of(directory: Path, server: Server, own: str = OWN, **target: Any) -> Exporter:
    """An exporter that asks the queries of `own` alone, besides the fresh ones."""
    (directory / "own.yml").write_text(own)
    connection = {"host": "127.0.0.1", "port": server.port, "dbname": "postgres", **PGVIGIL.login}
    target["disable"] = [*target.get("disable", ()), *(q.name for q in SHIPPED if q.every)]
    only = {"targets": {"main": {"connection": connection, **target}}, "catalogue": ["own.yml"]}
    path = directory / "pgvigil.yml"
    path.write_text(json.dumps(only))  # JSON is YAML
    return Exporter("--config", str(path))


def page_where(
    exporter: Exporter, condition: Callable[[Page], object], seconds: float = 30
) -> Page:
    """The first page that fulfils a condition; scrapes go on meanwhile."""
    end = time.monotonic() + seconds
    while True:
        page = exporter.scrape()
        if condition(page):
            return page
        assert time.monotonic() < end, f"it did not come about:\n{exporter.log}"
        time.sleep(0.1)


def databases(page: Page, name: str = "own_relations") -> set[str]:
    return {dict(labels)["datname"] for labels in page.series(name)}


@pytest.fixture
def server(fresh_server: FreshServer) -> Server:
    """A server with the databases one to three, besides postgres."""
    server = fresh_server(17)
    for name in ("one", "two", "three"):
        server.execute(f"create database {name}")
    return server


ALL = {"postgres", "one", "two", "three"}


def test_each_database_is_visited_and_what_it_has_carries_its_name(
    server: Server, tmp_path: Path
) -> None:
    with exporter_of(tmp_path, server) as exporter:
        page = page_where(exporter, lambda page: databases(page) == ALL)
        for name in ALL:
            (expected,) = server.execute("select count(*) from pg_class", database=name)[0]
            assert page.value("own_relations", datname=name) == expected
            assert page.value("pgvigil_database_up", datname=name) == 1
        assert page.value("pgvigil_databases", state="visited") == 4
        assert page.value("pgvigil_query_rows", query="own.relations") == 4
        assert page.value("pgvigil_query_series", query="own.relations") == 4
        assert page.value("pgvigil_query_age_seconds", query="own.relations") < 5
        assert page.failed() == set()
    assert server.errors_in_log() == []


def test_a_new_database_is_found_and_a_dropped_one_leaves_nothing(
    server: Server, tmp_path: Path
) -> None:
    with exporter_of(tmp_path, server) as exporter:
        page_where(exporter, lambda page: databases(page) == ALL)
        server.execute("create database four")
        page_where(exporter, lambda page: databases(page) == ALL | {"four"})
        server.execute("drop database one")
        server.execute("alter database two rename to zwei")
        left = {"postgres", "zwei", "three", "four"}
        page = page_where(exporter, lambda page: databases(page) == left)
        assert databases(page, "pgvigil_database_up") == left


BUSY = "".join(
    f"""
busy{number}:
  why: It keeps the database busy nearly all the time.
  every: 1s
  scope: database
  max_series: 1
  sql: select 1 as busy from pg_catalog.pg_sleep(0.4)
  metrics: {{own_busy{number}: {{column: busy, type: gauge, help: One.}}}}
"""
    for number in range(12)
)


def test_a_database_can_be_dropped_while_it_is_visited(server: Server, tmp_path: Path) -> None:
    for name in ("two", "three"):
        server.execute(f"drop database {name}")
    with exporter_of(tmp_path, server, BUSY) as exporter:
        page_where(exporter, lambda page: "one" in databases(page, "own_busy0"))
        there = "select count(*) from pg_stat_activity where datname = 'one'"
        server.wait_until(f"select ({there}) = 1")
        server.execute("drop database one")  # without FORCE, it gives up after five seconds
        page = page_where(exporter, lambda page: "one" not in databases(page, "own_busy0"))
        # It was dropped while it was left for a moment, and could not be entered again.
        assert page.value("pgvigil_connections") == 2


def test_there_are_never_more_than_three_connections_and_none_stays_in_a_database(
    server: Server, tmp_path: Path
) -> None:
    for number in range(20):
        server.execute(f"create database more{number}")
    seen: list[tuple[int, int]] = []
    stop = threading.Event()

    def look() -> None:
        query = (
            "select count(*), count(*) filter (where datname <> 'postgres' and "
            "clock_timestamp() - backend_start > '5 s') "
            "from pg_stat_activity where usename = 'pgvigil'"
        )
        while not stop.wait(0.02):
            seen.append(server.execute(query)[0])

    with exporter_of(tmp_path, server) as exporter:
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            page = page_where(exporter, lambda page: len(databases(page)) == 24)
            page_where(exporter, lambda p: p.value("pgvigil_query_seconds_total", query="own.size"))
            assert page.value("pgvigil_connections") <= 3
        finally:
            stop.set()
            watcher.join()
    assert max(total for total, _ in seen) == 3
    assert max(stayed for _, stayed in seen) == 0


FAILS = """
ratio:
  why: It fails in one database.
  every: 1s
  scope: database
  max_series: 1
  sql: select 1 / (pg_catalog.current_database() <> 'two')::int as ratio
  metrics: {own_ratio: {column: ratio, type: gauge, help: Ratio.}}
"""


def test_a_query_that_fails_in_one_database_stands_in_the_others(
    server: Server, tmp_path: Path
) -> None:
    with exporter_of(tmp_path, server, OWN + FAILS) as exporter:
        page_where(exporter, lambda page: databases(page) == ALL)
        page = page_where(exporter, lambda page: databases(page, "own_ratio") == ALL - {"two"})
        assert page.failed() == {"own.ratio"}
        key = {"query": "own.ratio", "reason": "division_by_zero"}
        assert page.value("pgvigil_query_failures_total", **key) >= 1


def test_a_database_that_lets_nobody_in_is_named_and_costs_only_itself(
    fresh_server: FreshServer, tmp_path: Path
) -> None:
    server = fresh_server(17, hba=["host locked pgvigil all reject", "host all all all trust"])
    for name in ("locked", "open", "shut", "closed"):
        server.execute(f"create database {name}")
    server.execute("revoke connect on database shut from public")
    server.execute("alter database closed connection limit 0")
    with exporter_of(tmp_path, server) as exporter:
        page = page_where(exporter, lambda page: databases(page) == {"postgres", "open"})
        page = page_where(
            exporter, lambda page: page.series("pgvigil_database_up", datname="locked")
        )
        assert page.value("pgvigil_database_up", datname="locked") == 0
        assert page.value("pgvigil_databases", state="failing") == 1
        # What may not be entered is not tried.
        assert databases(page, "pgvigil_database_up") == {"postgres", "open", "locked"}
        assert "invalid_authorization_specification" in exporter.get("/").body.decode()


def test_a_database_that_was_open_and_may_not_be_entered_any_more_is_named(
    server: Server, tmp_path: Path
) -> None:
    server.execute("create database shut")
    server.execute("revoke connect on database shut from public")
    with exporter_of(tmp_path, server) as exporter:
        page_where(exporter, lambda page: databases(page) == ALL)
        server.execute("revoke connect on database two from public")
        page = page_where(exporter, lambda page: databases(page) == ALL - {"two"})
        assert page.value("pgvigil_database_up", datname="two") == 0
        assert page.value("pgvigil_database_up", datname="one") == 1
        assert databases(page, "pgvigil_database_up") == ALL, "that of others was never ours"
        assert page.value("pgvigil_databases", state="failing") == 1
        assert "CONNECT was revoked" in exporter.get("/").body.decode()
        seen = server.log_position()
        server.execute("create database four")
        page_where(exporter, lambda page: "four" in databases(page))
        assert "permission denied" not in server.log(seen), "it is not tried"
        server.execute("drop database four")
        server.execute("grant connect on database two to public")
        page = page_where(exporter, lambda page: databases(page) == ALL)
        assert page.value("pgvigil_database_up", datname="two") == 1
        server.execute("revoke connect on database two from public")
        page_where(exporter, lambda page: not page.value("pgvigil_database_up", datname="two"))
        server.execute("drop database two")
        page_where(exporter, lambda page: databases(page, "pgvigil_database_up") == ALL - {"two"})


def test_what_a_grant_adds_to_a_query_is_asked_at_once(server: Server, tmp_path: Path) -> None:
    own = """
size:
  why: Somebody wants to know.
  every: 1h
  max_series: 2
  sql: select {columns}
  metrics:
    own_always: {column: always, value: "1", type: gauge, help: One.}
    own_granted:
      needs: {privilege: [pg_signal_backend]}
      column: granted
      value: "2"
      type: gauge
      help: Two.
"""
    with exporter_of(tmp_path, server, own) as exporter:
        page = page_where(exporter, lambda page: page.series("own_always"))
        assert not page.series("own_granted")
        server.execute("grant pg_signal_backend to pgvigil")
        page_where(exporter, lambda page: page.series("own_granted"))
        server.execute("revoke pg_signal_backend from pgvigil")
        page_where(exporter, lambda page: not page.series("own_granted"))


def test_databases_are_chosen_by_name_and_by_number(server: Server, tmp_path: Path) -> None:
    server.execute("create table wide as select generate_series(1, 200000) as n", database="three")
    chosen: dict[str, Any] = {
        "include_databases": ["one|t.*"],
        "exclude_databases": ["two"],
        "max_databases": 1,
    }
    with exporter_of(tmp_path, server, **chosen) as exporter:
        page = page_where(exporter, lambda page: databases(page))
        assert databases(page) == {"three"}, "the biggest goes first"
        assert page.value("pgvigil_databases", state="left_out") == 1


def test_a_page_keeps_within_its_bound_by_priority(server: Server, tmp_path: Path) -> None:
    many = """
many:
  why: Somebody wants to know.
  every: 1s
  priority: {priority}
  max_series: 5000
  labels: [n]
  sql: select n, 1 as one from pg_catalog.generate_series(1, {count}) as n
  metrics: {{own_{name}: {{column: one, type: gauge, help: One.}}}}
"""
    own = many.format(priority=9, count=2000, name="last").replace("many:", "last:")
    own += many.format(priority=1, count=3000, name="first").replace("many:", "first:")
    with exporter_of(tmp_path, server, OWN + own, max_series=4500) as exporter:
        page = page_where(
            exporter,
            lambda p: p.series("pgvigil_query_series_left_out") and databases(p) == ALL,
        )
        page = page_where(exporter, lambda page: len(page.series("own_first")) == 3000)
        assert page.series("own_last") == {}
        assert page.value("pgvigil_query_series_left_out", query="own.last") == 2000
        series = page.series("pgvigil_query_series").values()
        assert sum(series) <= 4500
        assert databases(page) == ALL


def test_a_server_that_is_down_shows_nothing_of_before(server: Server, tmp_path: Path) -> None:
    with exporter_of(tmp_path, server) as exporter:
        page_where(exporter, lambda page: databases(page) == ALL)
        server.stop("immediate")
        page = exporter.scrape()
        assert page.value("pg_up") == 0
        assert not page.series("own_relations")
        assert not page.series("own_size")
        server.start()
        page_where(exporter, lambda page: databases(page) == ALL and page.series("own_size"))


ROLES = """
primary:
  why: Somebody wants to know.
  on: primary
  every: 1h
  scope: database
  max_series: 1
  sql: select 1 as one
  metrics: {own_primary: {column: one, type: gauge, help: One.}}
standby:
  why: Somebody wants to know.
  on: standby
  every: 1h
  max_series: 1
  sql: select 1 as one
  metrics: {own_standby: {column: one, type: gauge, help: One.}}
"""


def test_after_a_promotion_the_results_are_those_of_a_primary(
    fresh_server: FreshServer, tmp_path: Path
) -> None:
    primary = fresh_server(17)
    standby = primary.standby()
    with exporter_of(tmp_path, standby, ROLES) as exporter:
        page = page_where(exporter, lambda page: page.series("own_standby"))
        assert not page.series("own_primary")
        standby.promote()
        page = page_where(exporter, lambda page: page.series("own_primary"))
        assert not page.series("own_standby")


OF_A_VERSION = """
of_a_version:
  why: Somebody wants to know.
  every: 1s
  max_series: 1
  sql:
    - until: 17
      text: select 17 / (17 - current_setting('server_version_num')::int / 10000) as one
    - since: 17
      text: select 1 as one
  metrics: {own_one: {column: one, type: gauge, help: One.}}
"""


def test_a_server_of_another_version_is_asked_nothing_before_a_scrape_has_seen_it(
    fresh_server: FreshServer, tmp_path: Path
) -> None:
    old, new = fresh_server(16), fresh_server(17)
    new.stop()
    with exporter_of(tmp_path, old, OF_A_VERSION) as exporter:
        page_where(exporter, lambda page: page.series("own_one"))
        new.port = old.port
        new.set({})  # writes the port down
        begin = new.log_position()
        old.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'pgvigil'"
        )
        old.stop("immediate")
        new.start()
        # The background comes again by itself, within a minute.
        new.wait_until(
            "select exists (select from pg_stat_activity where usename = 'pgvigil')", timeout=90
        )
        time.sleep(2)
        assert new.errors_in_log(begin) == []
        page_where(exporter, lambda page: page.series("own_one"))
        assert new.errors_in_log(begin) == []


def test_what_runs_where_is_explained(server: Server, tmp_path: Path) -> None:
    own = OWN + ROLES
    with exporter_of(tmp_path, server, own, disable=["own.size"]) as exporter:
        page = page_where(exporter, lambda page: databases(page) == ALL)
        assert page.value("pgvigil_query_skipped", query="own.size", reason="disabled") == 1
        assert page.value("pgvigil_query_skipped", query="own.standby", reason="role") == 1
        assert not page.series("own_size")


def test_the_end_of_the_servers_certificate_is_told_where_there_is_tls(
    fresh_server: FreshServer, tmp_path: Path
) -> None:
    server = fresh_server(18, tls=True)
    name = "pgvigil_server_certificate_expiry_timestamp_seconds"
    plain = {**PGVIGIL.login, "sslmode": "disable"}
    with Exporter(environment={"PGVIGIL_DSN": server.conninfo(**plain)}) as exporter:
        page_where(exporter, lambda page: page.series("pgvigil_query_age_seconds"))
        assert not exporter.scrape().series(name)
    with exporter_of(tmp_path, server) as exporter:
        page = page_where(exporter, lambda page: page.series(name))
        assert page.value(name) > time.time()


def test_hundreds_of_databases_are_visited_in_time_or_said_to_be_late(
    fresh_server: FreshServer, tmp_path: Path
) -> None:
    server = fresh_server(17)
    for number in range(300):
        server.execute(f"create database many{number}")
    pooled = "select count(*) from pg_stat_activity where usename = 'pgvigil'"

    in_time = OWN.replace("every: 1s", "every: 2m")
    with exporter_of(tmp_path, server, in_time) as exporter:
        page_where(exporter, lambda page: len(databases(page)) == 301, 60)
        ages = exporter.scrape().series("pgvigil_database_visit_age_seconds")
        assert len(ages) == 301
        assert max(ages.values()) < 120
        page = exporter.scrape()
        assert page.value("pgvigil_databases", state="late") == 0
        assert server.execute(pooled)[0][0] <= 3

    # Nobody could visit them all in a second.
    slow = OWN + BUSY.replace("0.4", "0.1")
    with exporter_of(tmp_path, server, slow) as exporter:
        page_where(
            exporter, lambda p: sum(p.series("pgvigil_databases", state="late").values()) > 100, 60
        )
        assert server.execute(pooled)[0][0] <= 3
        assert b", late" in exporter.get("/").body


def test_nobody_asks_for_a_database_that_was_dropped_since_its_last_visit(
    server: Server, tmp_path: Path
) -> None:
    with exporter_of(tmp_path, server, OWN.replace("1s", "3s")) as exporter:
        page_where(exporter, lambda page: databases(page) == ALL)
        for name in ("one", "two", "three"):
            server.execute(f"drop database {name}")
        page_where(exporter, lambda page: databases(page) == {"postgres"})
        time.sleep(1)  # for those whose visit is due about now
    assert "does not exist" not in server.log()
