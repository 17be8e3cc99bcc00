"""What can wait gives way to a program that is late, and not for ever."""

import asyncio
import time

import pytest
from pgvigil import pace


async def work(seconds: float) -> None:
    """Take the whole event loop, again and again, for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(2 * pace.TURN)  # noqa: ASYNC251  it is to stand in everybody's way
        await asyncio.sleep(0)


def test_nobody_gives_way_where_nothing_else_is_to_do() -> None:
    assert asyncio.run(pace.give_way()) is False


def test_who_gives_way_goes_on_when_the_work_is_done() -> None:
    async def both() -> tuple[bool, bool]:
        working = asyncio.create_task(work(1.0))
        late = await pace.give_way()
        return late, working.done()

    assert asyncio.run(both()) == (True, True)


def test_who_gives_way_goes_on_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LONGEST", 1.0)

    async def both() -> tuple[bool, bool]:
        working = asyncio.create_task(work(30.0))
        late = await pace.give_way()
        ended = working.done()
        working.cancel()
        return late, ended

    assert asyncio.run(both()) == (True, False)
