"""Shows what the catalogue's queries cost a server with many tables: pages read, never time."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest
from pgvigil import catalogue
from pgvigil.connect import GUARDS

from lab.binaries import UnavailableError
from lab.catalogue import asking
from lab.cluster import PGVIGIL, prepare
from lab.hostile import many_tables
from lab.postgres import Server

SLOW = {query.name for query in catalogue.load() if query.every}
TABLES = 10_000
RELATIONS = 3 * TABLES
"""With their indexes; TOAST tables and their indexes come on top."""


class Cost(NamedTuple):
    """What one statement took the server, as EXPLAIN tells it."""

    pages: int
    rows: int
    milliseconds: float


@pytest.fixture(scope="module")
def big() -> Iterator[Server]:
    """A server with the database `many`."""
    try:
        server = Server(18, settings={"autovacuum": False, "max_wal_size": "4GB"})
    except UnavailableError as error:
        pytest.skip(str(error))
    with server:
        prepare(server)
        many_tables(server, TABLES)
        yield server


def costs(server: Server, database: str) -> dict[str, Cost]:
    """The cost of each query in a database, under the guards but for the time it may take."""
    with asking(server, dbname=database) as asker:
        statements = asker.plan.statements
    escaped = {key: value.replace(" ", r"\ ") for key, value in GUARDS.items()}
    options = " ".join(f"-c {key}={value}" for key, value in escaped.items())
    way = server.conninfo(dbname=database, **PGVIGIL.login)
    found = {}
    with psycopg.connect(way, autocommit=True, options=options) as connection:
        for statement in statements:
            # Once before, so that the catalogue's caches are filled as in a session that is kept.
            connection.execute(statement.text.encode())
            text = f"explain (analyze, buffers, timing off, format json) {statement.text}"
            ((told,),) = connection.execute(text.encode()).fetchall()
            plan = told[0]["Plan"]
            pages = sum(plan[key] for key in ("Shared Hit Blocks", "Shared Read Blocks"))
            took = told[0]["Execution Time"]
            found[statement.query.name] = Cost(pages, plan["Actual Rows"], took)
    return found


def test_a_query_in_the_background_reads_few_pages_for_each_table(big: Server) -> None:
    slow = {name: cost for name, cost in costs(big, "many").items() if name in SLOW}

    for name, cost in sorted(slow.items(), key=lambda item: -item[1].milliseconds):
        line = f"{name:40} {cost.milliseconds:8.1f} ms {cost.pages:9,} pages {cost.rows:8,} rows"
        sys.stdout.write(f"{line}\n")
    assert {n: cost for n, cost in slow.items() if cost.pages > 5 * RELATIONS} == {}


def test_a_query_of_each_scrape_does_not_feel_how_many_tables_there_are(big: Server) -> None:
    small, many = costs(big, "postgres"), costs(big, "many")
    fresh = (small.keys() & many.keys()) - SLOW
    assert fresh

    grown = {
        name: (small[name], many[name])
        for name in fresh
        if many[name].rows > small[name].rows + 5 or many[name].pages > small[name].pages + 50
    }
    assert grown == {}
