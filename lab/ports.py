"""Chooses TCP ports on the loopback address for the components that the lab starts."""

import random
import socket
import threading
from collections import deque

# Below 32768, where Linux starts to give ports to outgoing connections: a port in that range
# can be taken by somebody's connection between our look and the component's bind.
_CANDIDATES = range(20000, 32000)

# What was given out is not given again soon: some who get a port bind it seconds later.
_given: deque[int] = deque(maxlen=1000)
_lock = threading.Lock()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now, or raise OSError."""
    for _ in range(100):
        port = random.choice(_CANDIDATES)
        with _lock, socket.socket() as candidate:
            if port in _given:
                continue
            # As servers do it: connections that linger after their end do not occupy the port.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given.append(port)
            return port
    raise OSError(f"no free port found between {_CANDIDATES.start} and {_CANDIDATES.stop}")
