"""Stands between a client and a server as a line that freezes, breaks and loses bytes when told."""

import contextlib
import selectors
import socket
import struct
import threading
from typing import Self

from lab.ports import free_port

_CHUNK_BYTES = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _End:
    """One side of a connection."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.peer = self
        self.waiting = b""
        """What the peer has said and this end has not been sent yet."""
        self.left: int | None = None
        """How many bytes this end, a client, may still be sent; None when there is no limit."""
        self.ended = False
        """Whether it has said its last."""

    @property
    def interest(self) -> int:
        """What to wait for: nothing is taken from an end before its peer has what came last."""
        reads = not self.ended and not self.peer.waiting
        return selectors.EVENT_READ * reads | selectors.EVENT_WRITE * bool(self.waiting)


class Line:
    """A TCP proxy in a thread of its own; what a method does is done when it returns.

    It shares the interpreter with whom it serves: a client in the same process that waits inside
    libpq (`PGconn.get_result`) waits for ever, as psycopg keeps the interpreter's lock meanwhile.
    """

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        """Carry each client to upstream over a connection of its own, from `with` on."""
        self.port = free_port()
        self._sent = 0
        self._upstream = upstream_host, upstream_port
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._listener: socket.socket | None = None
        self._clients: set[_End] = set()
        self._after: int | None = None
        self._frozen = self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"line {self.port}", daemon=True)

    def __enter__(self) -> Self:
        """Listen; raises OSError when the port is taken."""
        self._selector.register(self._woken, selectors.EVENT_READ)
        self.accept()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self.refuse()
        with self._lock:
            self._closed = True
        self._wake.send(b"!")
        self._thread.join()
        for each in (self._selector, self._wake, self._woken):
            each.close()

    @property
    def sent(self) -> int:
        """How many bytes of upstream's the clients have been handed."""
        with self._lock:  # a client may have them before they are counted
            return self._sent

    @property
    def connections(self) -> int:
        """How many clients are served, without those in the kernel's queue."""
        with self._lock:
            return len(self._clients)

    def freeze(self) -> None:
        """Hold all bytes; the kernel takes who connects, and nobody is served."""
        with self._lock:
            self._frozen = True
        self._wake.send(b"!")

    def thaw(self) -> None:
        """Hand on what was held, and serve who waits."""
        with self._lock:
            self._frozen = False
        self._wake.send(b"!")

    def cut(self) -> None:
        """Reset all connections, those in the kernel's queue as well."""
        with self._lock:
            for client in list(self._clients):
                self._drop(client)
            with contextlib.suppress(BlockingIOError):
                while self._listener is not None:
                    _reset(self._listener.accept()[0])

    def refuse(self) -> None:
        """Close the listening socket; connections that are served live on."""
        with self._lock:
            if self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None

    def accept(self) -> None:
        """Listen again on the same port; raises OSError when somebody else has taken it."""
        with self._lock:
            if self._listener is None:
                self._listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
                self._listener.setblocking(False)
                self._selector.register(self._listener, selectors.EVENT_READ)

    def swallow(self, after: int | None) -> None:
        """Hand each client, new ones as well, so many bytes more and lose all that follow.

        None ends it, but who has been kept from a byte by then hears no other on that connection.
        """
        with self._lock:
            self._after = after
            for client in self._clients:
                if client.left != 0:
                    client.left = after

    def _run(self) -> None:
        while not self._closed:
            if self._frozen:
                self._woken.recv(_CHUNK_BYTES)
                continue
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    if self._frozen or self._closed:
                        break
                    if key.fileobj is self._woken:
                        self._woken.recv(_CHUNK_BYTES)
                    elif key.fileobj is self._listener:
                        self._serve(self._listener)
                    elif isinstance(key.data, _End) and key.data.link.fileno() >= 0:
                        self._carry(key.data)

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            client, server = _End(listener.accept()[0]), _End(socket.socket())
            client.peer, server.peer, client.left = server, client, self._after
            self._clients.add(client)
            for end in (client, server):
                end.link.setblocking(False)
                end.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.link.connect_ex(self._upstream)  # that it is refused shows when we read
            self._wait_for(client, server)

    def _carry(self, end: _End) -> None:
        """Send an end what waits for it, and its peer what it says."""
        try:
            self._send(end)
            if not end.ended and not end.peer.waiting:
                self._take(end)
                self._send(end.peer)
        except EOFError:
            self._drop(end, reset=False)
        except OSError:
            self._drop(end)
        else:
            self._wait_for(end, end.peer)

    def _take(self, end: _End) -> None:
        """Read from an end; raises EOFError when both have said their last."""
        peer = end.peer
        try:
            said = end.link.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            if peer.left != 0:
                raise
            said = b""  # who hears nothing does not hear of that, either
        if said and peer.left is not None:
            peer.waiting = said[: peer.left]
            peer.left -= len(peer.waiting)
        elif said:
            peer.waiting = said
        else:
            end.ended = True
            if peer.left != 0:
                peer.link.shutdown(socket.SHUT_WR)
            if peer.ended:
                raise EOFError

    def _send(self, end: _End) -> None:
        try:
            sent = end.link.send(end.waiting) if end.waiting else 0
        except BlockingIOError:
            return
        except ConnectionError:
            if end.peer.left != 0:
                raise
            sent = len(end.waiting)  # the server is gone, and its client must not know
        end.waiting = end.waiting[sent:]
        self._sent += sent * (end in self._clients)

    def _wait_for(self, *ends: _End) -> None:
        for end in ends:
            known = end.link in self._selector.get_map()
            if known and not end.interest:
                self._selector.unregister(end.link)
            elif known:
                self._selector.modify(end.link, end.interest, end)
            elif end.interest:
                self._selector.register(end.link, end.interest, end)

    def _drop(self, end: _End, reset: bool = True) -> None:
        for each in (end, end.peer):
            if each.link in self._selector.get_map():
                self._selector.unregister(each.link)
            self._clients.discard(each)
            _reset(each.link) if reset else each.link.close()


def _reset(link: socket.socket) -> None:
    """Close it with RST instead of FIN."""
    with contextlib.suppress(OSError):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    link.close()
