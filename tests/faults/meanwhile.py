"""Has somebody work for as long as a fault lasts."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def meanwhile(over: threading.Event, *works: Callable[[], None]) -> Iterator[None]:
    """Run each in a thread of its own; at the end `over` is set, and all have ended."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
