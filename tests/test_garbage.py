"""What stays is not looked at again and again, and what is garbage goes in the end."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from pgvigil import garbage


class Thing:
    """Something that only the collector can free, once nobody has it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_garbage_goes_and_what_is_there_is_looked_at_no_more() -> None:
    lost, kept = weakref.ref(Thing()), Thing()
    before = gc.get_freeze_count()
    garbage.settle()
    assert lost() is None
    assert gc.get_freeze_count() > before
    assert not any(of is kept for of in gc.get_objects())


def test_what_was_kept_and_became_garbage_goes_when_all_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "SETTLES", 0.0)
    monkeypatch.setattr(garbage, "ROUNDS", 2)
    thing: Thing | None = Thing()
    seen, gone = weakref.ref(thing), asyncio.Event()
    weakref.finalize(thing, gone.set)
    garbage.settle()
    thing = None
    garbage.settle()
    assert seen() is not None  # the price of not looking

    async def wait() -> None:
        keeping = asyncio.create_task(garbage.keep())
        await asyncio.wait_for(gone.wait(), 30)
        keeping.cancel()

    asyncio.run(wait())
    assert seen() is None
