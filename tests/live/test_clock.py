"""The exporter's own clock may jump: what it tells is of the server, and its ages stay ages."""

import os
import time
from collections.abc import Callable, Iterator

import pytest

from lab.clock import Clock
from lab.cluster import PGVIGIL
from lab.exporter import Exporter
from lab.postgres import Server

HOUR = 3600

OWN_AGES = (
    "pgvigil_query_age_seconds",
    "pgvigil_database_visit_age_seconds",
    "pgvigil_scrape_duration_seconds",
    "pgvigil_connect_duration_seconds",
)


@pytest.fixture
def clock() -> Iterator[Clock]:
    try:
        found = Clock()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with found:
        yield found


def test_a_clock_that_jumps_makes_no_age_absurd_and_costs_no_connection(
    fresh_server: Callable[..., Server], clock: Clock
) -> None:
    server = fresh_server(18)
    environment = {"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login), **clock.environment}
    sessions = "select array_agg(pid order by pid) from pg_stat_activity where usename = 'pgvigil'"
    with Exporter(environment=environment) as exporter:
        end = time.monotonic() + 30
        while not all(exporter.scrape().series(name) for name in OWN_AGES):
            assert time.monotonic() < end, exporter.log
            time.sleep(0.1)
        first = server.execute(sessions)[0][0][0]
        for hours in (1, -1, 0):
            clock.move(hours * HOUR)
            primary = exporter.get("/primary")
            seen = int(primary.body.split()[-3])
            assert primary.status == 200
            assert 0 <= seen < 60
            page = exporter.scrape()
            assert page.value("pg_up") == 1
            started = server.execute("select extract(epoch from pg_postmaster_start_time())")
            told = page.value("pg_postmaster_start_timestamp_seconds")
            assert told == pytest.approx(float(started[0][0]), abs=0.01)
            for name in OWN_AGES:
                assert all(0 <= age < 60 for age in page.series(name).values()), (name, hours)
        assert first in server.execute(sessions)[0][0]
