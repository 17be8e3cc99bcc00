"""Have the garbage collector look at what is young, and seldom at what has stayed."""

import asyncio
import gc

SETTLES = 60.0
"""Seconds after which what is there is taken to stay."""

_YOUNG = 20_000
"""Objects that are made before the youngest are looked at: a scrape makes and drops thousands."""

_YOUNGEST = 0

ROUNDS = 60
"""After so many of them everything is looked at once, for what has stayed may have become garbage:
a target that is gone, a connection that was open for long."""


async def keep() -> None:
    """Look after it until the program ends.

    A pass over everything that some hundred targets hold takes a good part of a second, in which
    nobody is answered, and by itself it comes every few minutes. So each minute only the youngest
    are looked at; what became garbage later waits for the hour.
    """
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])
    while True:
        for _ in range(ROUNDS):
            await asyncio.sleep(SETTLES)
            settle(_YOUNGEST)
        gc.unfreeze()
        settle()


def settle(generation: int = 2) -> None:
    """Collect what is garbage, up to the given generation, and look at the rest no more."""
    gc.collect(generation)
    gc.freeze()
