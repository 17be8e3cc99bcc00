"""Only what hangs in the program itself makes /livez fail, and a scrape that hangs is given up."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
from pgvigil import catalogue, collect, landing, serve, watch
from pgvigil.collect import Collector
from pgvigil.fleet import Fleet
from pgvigil.plan import Facts
from pgvigil.render import Layout
from pgvigil.serve import Application
from pgvigil.session import Session
from pgvigil.target import Target
from psycopg.conninfo import conninfo_to_dict

from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter
from lab.ports import free_port
from lab.silent_port import silent_port

Made = TypeVar("Made")


class Clock:
    """The running loop's clock, which can be put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._real = loop.time
        self.ahead = 0.0
        monkeypatch.setattr(loop, "time", lambda: self._real() + self.ahead)


async def hang(*_: object, **__: object) -> Any:
    """Never return, whoever cancels."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if _let_go:
                raise


_let_go: list[bool] = []


def run(test: Coroutine[Any, Any, Made]) -> Made:
    """Run a test's coroutine, and let go what hangs at its end, so that its loop can end."""
    _let_go.clear()

    async def with_an_end() -> Made:
        try:
            return await test
        finally:
            _let_go.append(True)

    return asyncio.run(with_an_end())


def parameters(dsn: str) -> dict[str, str]:
    return {key: str(value) for key, value in conninfo_to_dict(dsn).items()}


def collector_of(name: str = "main", port: int | None = None) -> Collector:
    target = Target(name, {"host": "127.0.0.1", "port": str(port or free_port())})
    return Collector(target, (), Layout)


async def ended(*collectors: Collector) -> None:
    _let_go.append(True)
    await asyncio.gather(*(collector.close() for collector in collectors))


async def scrape(collector: Collector, seconds: float = 0.02) -> collect.Scrape:
    return await collector.scrape(asyncio.get_running_loop().time() + seconds)


def test_the_interval_is_the_longest_of_the_last_gaps_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def intervals() -> list[float]:
        clock, collector = Clock(monkeypatch), collector_of()
        seen = [collector.interval]
        for gap in (0, 1, 15, 60, 5, 5, 5, 1000):
            clock.ahead += gap
            await scrape(collector)
            seen.append(round(collector.interval))
        return seen

    assert run(intervals()) == [10, 10, 10, 15, 60, 60, 60, 10, 300]


@pytest.mark.parametrize("swallows", [False, True])
def test_a_scrape_that_hangs_is_given_up_and_the_next_one_is_normal(
    swallows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hung_and_after() -> None:
        collector = collector_of()
        monkeypatch.setattr(collect, "GRACE", 0.05)
        if not swallows:
            _let_go.append(True)
        with patch.object(Session, "open", hang):
            first = await scrape(collector)
            assert (first.up, first.down) == (False, "timeout")
            await asyncio.sleep(0.1)
        second = await scrape(collector, 10)
        assert second.down == "connection_refused"
        assert (collector.abandoned, collector.scrapes, collector.joined) == (1, 1, 0)
        assert collector.overdue() == 0
        await ended(collector)

    run(hung_and_after())


def test_a_request_joins_a_scrape_that_is_not_overdue() -> None:
    async def joined() -> None:
        collector = collector_of()
        _let_go.append(True)
        with patch.object(Session, "open", hang):
            await scrape(collector)
            await scrape(collector)  # past the deadline, and within the grace
        assert (collector.abandoned, collector.joined) == (0, 1)
        await collector.close()

    run(joined())


@pytest.mark.parametrize("major", [17])
def test_what_hangs_in_a_session_loses_it_and_the_next_scrape_has_another(
    cluster: Cluster,
) -> None:
    """The server counts: no connection of the hung scrape is left."""

    async def hung_and_after() -> None:
        dsn = cluster.primary.conninfo(**PGVIGIL.login, application_name="hung")
        collector = Collector(Target("main", parameters(dsn)), (), Layout)
        assert (await scrape(collector, 10)).up
        with patch.object(Session, "ask", hang), patch.object(collect, "GRACE", 0.05):
            assert not (await scrape(collector)).up
            await asyncio.sleep(0.1)
        assert (await scrape(collector, 10)).up
        assert (collector.abandoned, collector.connects, collector.connections) == (1, 2, 1)
        await asyncio.sleep(0.1)  # then its connection is cut
        query = "select count(*) = 1 from pg_stat_activity where application_name = 'hung'"
        await asyncio.to_thread(cluster.primary.wait_until, query)
        assert (await scrape(collector, 10)).up
        await ended(collector)

    run(hung_and_after())


def status(application: Application) -> Callable[[], Any]:
    async def asked() -> tuple[int, str]:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "GET", "path": "/livez", "query_string": b""}
        await application({**scope, "headers": []}, hang, send)
        return messages[0]["status"], messages[1]["body"].decode()

    return asked


def test_livez_fails_when_all_that_is_scraped_has_hung_for_three_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def told() -> None:
        clock = Clock(monkeypatch)
        one, two, idle = collector_of("one"), collector_of("two"), collector_of("idle")
        livez = status(Application(Fleet([one, two, idle])))
        with patch.object(Session, "open", hang):
            await asyncio.gather(scrape(one), scrape(two))
            for _ in range(3):  # a request every 20 seconds
                clock.ahead += 20
                assert (await livez())[0] == 200
                await asyncio.gather(scrape(one), scrape(two))
            clock.ahead += 20
            code, text = await livez()
            assert code == 503
            assert text.startswith("everything hangs: the scrape of one for 7")
            assert "the scrape of two for 7" in text
            assert "idle" not in text
            page = await landing.page([one, two, idle], several=True)
            assert "Everything hangs" in "".join(page)
        assert (await scrape(one, 10)).down == "connection_refused"
        assert await livez() == (200, "ok\n")  # one of them goes on
        clock.ahead += 61  # nobody scrapes any more
        assert await livez() == (200, "ok\n")
        await ended(one, two)

    run(told())


def test_a_background_at_work_within_its_bounds_is_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def told() -> None:
        clock, collector = Clock(monkeypatch), collector_of()
        slow = collector.slow
        livez = status(Application(Fleet([collector])))
        with patch.object(Session, "open", hang):
            await scrape(collector)
            for _ in range(4):
                clock.ahead += 20
                await scrape(collector)
            assert (await livez())[0] == 503
            task = slow._task = asyncio.create_task(asyncio.sleep(60))
            slow._deadline(5)
            assert (await livez())[0] == 200
            clock.ahead += 9  # its bound, and as much again for what stands between two bounds
            assert slow.overdue() == 0
            for _ in range(3):
                clock.ahead += 20
                await scrape(collector)
                assert (await livez())[0] == 200
            clock.ahead += 20
            await scrape(collector)
            code, text = await livez()
            assert code == 503
            assert "the background of main for 7" in text
        task.cancel()
        await ended(collector)

    run(told())


@pytest.mark.parametrize("major", [17])
def test_a_background_that_waits_for_its_time_is_not_at_work(cluster: Cluster) -> None:
    async def seen() -> None:
        dsn = cluster.primary.conninfo(**PGVIGIL.login)
        collector = Collector(Target("main", parameters(dsn)), catalogue.load(), Layout)
        assert (await scrape(collector, 30)).up
        assert isinstance(collector.facts, Facts)
        busy = []
        for _ in range(1200):
            busy.append(collector.slow.busy)
            if True in busy and not busy[-1]:
                break
            assert collector.slow.overdue() == 0
            await asyncio.sleep(0.05)
        assert busy[-1] is False
        await collector.close()

    run(seen())


def test_two_hundred_targets_that_never_answer_do_not_make_livez_fail(tmp_path: Path) -> None:
    with silent_port() as port:
        targets = {f"hole{n}": {"dsn": f"host=127.0.0.1 port={port} user=x"} for n in range(200)}
        path = tmp_path / "pgvigil.yml"
        path.write_text(json.dumps({"targets": targets}))

        async def ask(path: str) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", exporter.port)
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                "X-Prometheus-Scrape-Timeout-Seconds: 1\r\n\r\n".encode()
            )
            answer = await reader.read()
            writer.close()
            return answer

        async def rounds() -> None:
            for _ in range(3):
                asked = [asyncio.create_task(ask(f"/probe?target={name}")) for name in targets]
                while not all(task.done() for task in asked):
                    assert (await ask("/livez")).startswith(b"HTTP/1.1 200 ")
                    await asyncio.sleep(0.1)
                for task in asked:
                    assert b'\npg_down_reason{reason="timeout"} 1\n' in task.result()
                    assert b"\npgvigil_scrapes_abandoned_total 0\n" in task.result()

        with Exporter("--config", str(path)) as exporter:
            asyncio.run(rounds())


def test_a_loop_that_stands_still_has_its_stack_written_once() -> None:
    program = """
import asyncio, time
from pgvigil import watch
watch.STANDSTILL = 0.2
def stuck_here():
    time.sleep(1)
async def turn():
    watch.beat()
    await asyncio.sleep(0)
    stuck_here()
    watch.beat()
    watch.rest()
    time.sleep(0.5)
asyncio.run(turn())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stderr.count("in stuck_here") == 1
    assert done.stderr.count("Timeout") == 1
    assert watch.STANDSTILL > 2 * serve.SWEEP
