"""Chooses TCP ports on the loopback address for the components that the lab starts.

It also knows the machine's other address.
"""

import os
import random
import socket
import threading
from collections import deque
from contextlib import closing

# Below 32768, where Linux starts to give ports to outgoing connections: a port in that range
# can be taken by somebody's connection between our look and the component's bind.
_CANDIDATES = range(20000, 32000)

# What was given out is not given again soon, nor by another process: some who get a port bind it
# seconds later. Each of the newest is held by a socket of its name, which no other can have and
# which goes with the process.
_given: deque[int] = deque()
_HELD = 200
_lock = threading.Lock()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now, or raise OSError."""
    for _ in range(100):
        port = random.choice(_CANDIDATES)
        with _lock, socket.socket() as candidate:
            # As servers do it: connections that linger after their end do not occupy the port.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                name.bind(f"\0pgvigil-port-{port}")
                candidate.bind(("127.0.0.1", port))
            except OSError:
                name.close()
                continue
            _given.append(name.detach())
            if len(_given) > _HELD:
                os.close(_given.popleft())
            return port
    raise OSError(f"no free port found between {_CANDIDATES.start} and {_CANDIDATES.stop}")


def own_address() -> str | None:
    """Return this machine's address on a network, or None when it has only the loopback."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        name: str = probe.getsockname()[0]
        return None if name.startswith("127.") else name
