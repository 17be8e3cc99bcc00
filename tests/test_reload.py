"""The configuration is read anew beside the work, once at a time, and taken only when good."""

import asyncio
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pgvigil import apart
from pgvigil.config import Address, Settings
from pgvigil.errors import Problem, Refused
from pgvigil.fleet import Fleet
from pgvigil.reload import Loaded, Reloader
from pgvigil.target import Target
from structlog.testing import capture_logs

WRONG = Problem("pgvigil.yml", 3, "what it says")


def settings(*names: str, **more: object) -> Settings:
    targets = [Target(name, {"host": "127.0.0.1", "port": "1"}) for name in names]
    return Settings(Address("", 9187), targets, (), **more)  # type: ignore[arg-type]


async def reading(loaded: Settings) -> Loaded:
    return loaded, ()


def fail() -> None:
    raise Refused([WRONG])


def test_work_apart_gives_its_result_or_its_problems_while_a_loop_runs() -> None:
    assert asyncio.run(apart.again(lambda: "x" * 1_000_000, 60)) == "x" * 1_000_000
    with pytest.raises(Refused) as refused:
        asyncio.run(apart.again(fail, 60))
    assert refused.value.problems == (WRONG,)


def test_work_apart_that_dies_is_refused() -> None:
    with pytest.raises(Refused, match="the process that reads it died"):
        asyncio.run(apart.again(lambda: os._exit(3), 60))


def test_work_apart_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    def slow() -> None:
        (tmp_path / "child").write_text(str(os.getpid()))
        time.sleep(600)

    with pytest.raises(Refused, match=r"it was not read within 0\.5 s"):
        asyncio.run(apart.again(slow, 0.5))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


def test_work_apart_holds_no_connection_of_ours(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    begun, end = tmp_path / "begun", tmp_path / "end"

    def wait() -> None:
        begun.touch()
        while not end.exists():
            time.sleep(0.01)

    async def close_meanwhile() -> None:
        work = asyncio.create_task(apart.again(wait, 60))
        while not begun.exists():  # noqa: ASYNC110  (another process)
            await asyncio.sleep(0.01)
        theirs.close()
        async with asyncio.timeout(30):
            assert await asyncio.get_running_loop().sock_recv(ours, 1) == b""
        assert not work.done()
        end.touch()
        await work

    with ours:
        asyncio.run(close_meanwhile())


def test_a_target_that_is_what_it_was_keeps_its_collector() -> None:
    async def reload() -> None:
        fleet = Fleet()
        fleet.adopt(settings("one", "two", "three"), ())
        before = dict(fleet.collectors)
        after = settings("four", "two", "one")
        after.targets[2].connection["port"] = "2"  # type: ignore[index]
        assert await Reloader(lambda: reading(after), fleet, settings()).begin() == ()
        assert list(fleet.collectors) == ["four", "two", "one"]
        assert fleet.collectors["two"] is before["two"]
        assert fleet.collectors["one"] is not before["one"]
        await fleet.close()

    asyncio.run(reload())


def test_what_is_bad_leaves_all_as_it_is() -> None:
    async def refuse() -> Loaded:
        raise Refused([WRONG])

    async def reload() -> None:
        fleet = Fleet()
        fleet.adopt(settings("one"), ())
        fleet.loaded_at = 1.0
        before = dict(fleet.collectors)
        assert await Reloader(refuse, fleet, settings()).begin() == (WRONG,)
        assert (fleet.collectors, fleet.reloaded, fleet.loaded_at) == (before, False, 1.0)
        assert await Reloader(lambda: reading(settings("two")), fleet, settings()).begin() == ()
        assert (list(fleet.collectors), fleet.reloaded) == (["two"], True)
        assert fleet.loaded_at > 1.0
        await fleet.close()

    asyncio.run(reload())


def test_a_new_address_is_not_taken_and_said_so() -> None:
    async def reload() -> None:
        reloader = Reloader(lambda: reading(after), Fleet(), settings())
        with capture_logs() as lines:
            assert await reloader.begin() == ()
            assert await reloader.begin() == ()
        assert [line for line in lines if line["log_level"] == "warning"] == 2 * [
            {
                "event": "listen is not changed by a reload; start anew for it",
                "log_level": "warning",
                "address": ":9187",
                "wanted": ":9188",
            }
        ]

    after = replace(settings(), listen=Address("", 9188))
    asyncio.run(reload())


def test_reloads_come_one_after_the_other_and_one_does_for_all_who_wait() -> None:
    at_work, most, reads = 0, 0, 0

    async def read() -> Loaded:
        nonlocal at_work, most, reads
        reads += 1
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.01)
        at_work -= 1
        return settings(), ()

    async def reload() -> None:
        reloader = Reloader(read, Fleet(), settings())
        first = reloader.begin()
        await asyncio.sleep(0)
        others = [reloader.begin() for _ in range(5)]
        assert first not in others
        await asyncio.gather(first, *others)

    asyncio.run(reload())
    assert (reads, most) == (2, 1)


def test_a_file_that_changes_is_seen_though_only_a_link_leads_to_it(tmp_path: Path) -> None:
    # Kubernetes puts a new folder beside the old one and lets a link lead to it.
    for version in ("v1", "v2"):
        (tmp_path / version / "queries").mkdir(parents=True)
        (tmp_path / version / "pgvigil.yml").write_text("same")
    link = tmp_path / "data"
    link.symlink_to("v1")
    reads = 0
    watched = settings(files=(link / "pgvigil.yml",))
    watched = Settings(watched.listen, (), [link / "queries"], files=watched.files)

    async def read() -> Loaded:
        nonlocal reads
        reads += 1
        return watched, ()

    async def until(number: int) -> None:
        async with asyncio.timeout(30):
            while reads < number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def change() -> None:
        reloader = Reloader(read, Fleet(), watched)
        watching = asyncio.create_task(reloader.watch(always=True, every=0.01))
        await asyncio.sleep(0.05)
        assert reads == 0
        (tmp_path / "new").symlink_to("v2")
        (tmp_path / "new").rename(link)
        await until(1)
        (link / "queries" / "own.yml").touch()
        await until(2)
        link.unlink()
        await until(3)
        watching.cancel()
        await reloader.close()

    asyncio.run(change())
