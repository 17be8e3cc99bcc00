"""What the slow lane serves, and for how long, and when it rests."""

import asyncio
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
from pgvigil import pace, slow
from pgvigil.catalogue import Query
from pgvigil.collect import Collector
from pgvigil.lane import Ledger
from pgvigil.plan import Plan, Reason, Refusal
from pgvigil.render import Layout
from pgvigil.slow import Place, Result, SlowLane
from pgvigil.target import Target

from lab.cluster import PGVIGIL
from lab.postgres import Server
from lab.results import statement

EVERY = statement("pg_a")
MINUTE = 60.0


def query(every: float, name: str = "area.query", scope: str = "server") -> Query:
    return replace(EVERY.query, every=every, name=name, scope=scope)


def lane(*queries: Query) -> SlowLane:
    return SlowLane(Target("main"), queries, (), Ledger("main"), Layout)


@pytest.mark.parametrize(
    ("every", "kept"), [(10.0, 5 * MINUTE), (5 * MINUTE, 15 * MINUTE), (60 * MINUTE, 180 * MINUTE)]
)
def test_a_result_is_served_for_three_runs_and_at_least_five_minutes(
    every: float, kept: float
) -> None:
    of = query(every)
    made = lane(of)
    sheet = Layout(EVERY, {}).sheet()
    made.server.results[of.name] = Result(replace(EVERY, query=of), sheet, 1000.0)
    with patch("pgvigil.slow.time.monotonic") as clock:
        clock.return_value = 1000.0 + kept
        assert [result.sheet for result in made.results()] == [sheet]
        clock.return_value = 1000.1 + kept
        assert list(made.results()) == []


def test_the_results_of_a_query_stand_together_whatever_the_order_of_places() -> None:
    first, second = query(60, "area.first", "database"), query(60, "area.second", "database")
    made = lane(first, second)
    now = time.monotonic()
    for name in ("big", "small"):
        place = made.databases[name] = Place(name)
        for of in (second, first):
            found = replace(EVERY, query=of)
            place.results[of.name] = Result(found, Layout(found, {}).sheet(), now)
    names = [result.statement.query.name for result in made.results()]
    assert names == ["area.first"] * 2 + ["area.second"] * 2


def test_a_database_is_late_when_its_visit_is_overdue() -> None:
    made = lane(query(60, scope="database"))
    now = time.monotonic()
    made.databases = {
        "punctual": Place("punctual", {"area.query": now + 1}),
        "nearly": Place("nearly", {"area.query": now - 5}),
        "late": Place("late", {"area.query": now - 30}),
    }
    assert made.late() == ["late"]


def test_a_name_that_is_no_utf8_is_shown_as_far_as_it_goes() -> None:
    assert slow.shown(b"caf\xe9".decode(errors="surrogateescape")) == "caf\N{REPLACEMENT CHARACTER}"
    assert slow.shown("caf\xe9") == "caf\xe9"


@pytest.mark.parametrize("major", [17])
def test_who_is_not_scraped_asks_nothing_and_goes_on_when_scraped_again(server: Server) -> None:
    text = "select 1 as pg_a"
    of = replace(query(0.1), variants=(replace(EVERY.query.variants[0], text=text),))
    connection = {"host": "127.0.0.1", "port": str(server.port), "dbname": "postgres"}
    target = Target("main", {**connection, **PGVIGIL.login})

    async def follow() -> None:
        collector = Collector(target, (of,), Layout)
        loop = asyncio.get_running_loop()

        async def scraped() -> list[Result]:
            scrape = await collector.scrape(loop.time() + 5)
            assert scrape.up
            return list(scrape.results)

        async def until(done: bool) -> None:
            async with asyncio.timeout(20):
                while (collector.slow.connections == 0) != done:  # noqa: ASYNC110  (nobody tells)
                    await asyncio.sleep(0.02)

        await scraped()
        await until(done=False)
        await until(done=True)  # the lane has left
        runs = len(await scraped())
        assert runs == 1, "what it found is still young"
        await until(done=False)
        assert not list(collector.refusals())
        await collector.close()

    before = len(server.execute("select from pg_stat_activity where usename = 'pgvigil'"))
    with patch.object(slow, "PATIENCE", 0.5):
        asyncio.run(follow())
    server.wait_until(f"select count(*) = {before} from pg_stat_activity where usename = 'pgvigil'")


@pytest.mark.parametrize("major", [17])
def test_a_visit_is_put_off_while_the_program_cannot_keep_up_and_comes_in_the_end(
    server: Server,
) -> None:
    of = replace(query(60), variants=(replace(EVERY.query.variants[0], text="select 1 as pg_a"),))
    connection = {"host": "127.0.0.1", "port": str(server.port), "dbname": "postgres"}
    late = asyncio.Event()
    asked: list[int] = []

    async def give_way() -> bool:
        asked.append(1)
        await late.wait()
        return True

    async def follow() -> None:
        collector = Collector(Target("main", {**connection, **PGVIGIL.login}), (of,), Layout)
        loop = asyncio.get_running_loop()
        await collector.scrape(loop.time() + 5)
        async with asyncio.timeout(20):
            while not asked:  # noqa: ASYNC110  (nobody tells)
                await asyncio.sleep(0.02)
            assert not collector.slow.busy, "who waits does not hang"
            assert not list(collector.slow.results())
            late.set()
            while not list(collector.slow.results()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert collector.slow.put_off == len(asked)
        await collector.close()

    with patch.object(pace, "give_way", give_way):
        asyncio.run(follow())


def test_a_query_for_databases_that_no_database_can_run_is_told() -> None:
    of = query(60, scope="database")
    made = lane(of)
    refusal = Refusal(of, Reason.EXTENSION, "citus is not installed in the database x")
    place = made.databases["x"] = Place("x")
    place.plan = Plan((), (refusal,))
    assert list(made.refusals()) == [refusal]
    assert made.running() == set()


def test_a_query_that_some_database_runs_is_not_skipped() -> None:
    of = query(60, scope="database")
    made = lane(of)
    refusal = Refusal(of, Reason.EXTENSION, "citus is not installed in x")
    for name, plan in (("x", Plan((), (refusal,))), ("y", Plan((replace(EVERY, query=of),), ()))):
        made.databases[name] = Place(name, plan=plan)
    assert list(made.refusals()) == []
    assert made.running() == {of.name}
