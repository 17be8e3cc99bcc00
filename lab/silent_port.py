"""Listens on a TCP port where connections succeed and nothing is ever said."""

import contextlib
import socket
from collections.abc import Iterator

from lab.ports import free_port


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """Yield the port, on 127.0.0.1.

    Nobody takes the connections from the queue where the kernel completes them: what clients
    send is acknowledged and never read.
    """
    port = free_port()
    with socket.create_server(("127.0.0.1", port), backlog=1024):
        yield port
