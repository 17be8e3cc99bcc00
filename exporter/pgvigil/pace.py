"""Have what can wait give way while the program cannot keep up."""

import asyncio
import random

TURN = 0.05
"""Seconds that a turn of the event loop takes when it is late: each answer waits for many."""

LONGEST = 30.0
"""Seconds for which somebody gives way at most, so that all come to their turn."""


async def give_way() -> bool:
    """Return when the event loop keeps up, or after `LONGEST`; whether it was late."""
    clock = asyncio.get_running_loop().time
    end = clock() + LONGEST
    late = False
    while (begun := clock()) < end:
        await asyncio.sleep(0)
        if clock() - begun < TURN:
            break
        late = True
        # Not all at once again.
        await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311  (not a secret)
    return late
