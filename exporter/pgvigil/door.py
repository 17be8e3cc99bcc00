"""Let clients in, so many at once and for so long, and put out those who only hold the place."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import IntEnum, StrEnum
from typing import Any

import structlog

MOST = 512
"""Connections at once; fewer where the process may open few files. Who comes then takes the place
of somebody of the biggest crowd: of all who do the same, the one who has done it for the longest.
"""
ANSWERS = 64
"""Answers on their way to their readers at once; each may hold a page of several megabytes."""
WORDS = 24 * 1024
"""Bytes a client may say until it is answered; its headers are a part of that."""
GRACE = 2.0
"""Seconds for which an answer may be on its way though there are more than ANSWERS."""
_OTHERS = 64
"""Descriptors left to what is no client, such as the connections to servers."""
_MOUTHFUL = 4096
"""Bytes that are taken of a client at once."""
_LOOKS = 10
"""Turns of the event loop within which a request that has come is seen to be one."""
_QUIET = 60.0
"""Seconds between two words to the log about clients that were put out."""

_log = structlog.get_logger()


class Stage(IntEnum):
    """What a connection is doing."""

    NEW = 0
    """It has not asked anything yet, or is in the middle of its first headers."""
    WAITING = 1
    """Between two requests."""
    ANSWERING = 2
    """The answer is on its way."""
    ASKING = 3
    """The answer is being made."""


class Why(StrEnum):
    """Why a client was put out."""

    IDLE = "idle"
    """It sent no request, or never the end of one."""
    SLOW = "slow"
    """It did not read its answer."""
    LONG = "long"
    """It said too much at once."""
    FULL = "full"
    """Others needed the place."""
    ODD = "odd"
    """It said what no client says."""


class Guest(socket.socket):
    """A client's connection."""

    stage = Stage.NEW
    since = 0.0
    """When it came to this stage, on the monotonic clock."""
    out = False
    """Whether it was put out, and is not closed yet."""
    ended = False
    """Whether the client will ask nothing more."""
    leaving = False
    """Whether the connection ends with the next answer."""
    _said = 0
    _looks = 0
    _door: "Door | None" = None

    def entered(self, door: "Door") -> None:
        """It has come in by a door."""
        self._door = door
        self.waiting: set[asyncio.Timeout] = set()
        """What ends with the connection."""
        self.reach(Stage.NEW)

    @property
    def gone(self) -> bool:
        """Whether an answer would be for nobody."""
        return self.out or self.fileno() < 0

    def reach(self, stage: Stage) -> None:
        """It comes to another stage."""
        self.stage, self.since = stage, time.monotonic()
        if stage is Stage.WAITING:
            self._said = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """What the client says next, a little at a time; ConnectionResetError when it is put out.

        A body in pieces of a byte costs its reader a thousand times what it costs the sender.
        """
        words = b"" if self.out else super().recv(min(size, _MOUTHFUL), flags)
        self._heard(len(words))
        return words

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """The same for what is encrypted, into a buffer."""
        most = min(size or _MOUTHFUL, _MOUTHFUL, len(buffer))
        heard = 0 if self.out else super().recv_into(buffer, most, flags)
        self._heard(heard)
        return heard

    def _heard(self, size: int) -> None:
        self._said += size
        if self._said > WORDS and self._door:
            self._door.put_out(self, Why.LONG)
        if self.out:
            raise ConnectionResetError
        if not size:
            self._end()

    def _end(self) -> None:
        """The client says no more: there may be an answer due to it, or not."""
        self.ended = True
        if self.stage > Stage.WAITING:
            if self.waiting:
                raise ConnectionResetError
            return
        # What it said is perhaps a request that is just being read: look again in a moment.
        self._looks += 1
        if self._said and self._looks < _LOOKS:
            raise BlockingIOError
        # hypercorn would keep the descriptor for as long as a connection may be idle.
        raise ConnectionResetError

    def hear_no_more(self) -> None:
        """Have the connection end as if the client had ended it."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close it, and leave."""
        super().close()
        if door := self._door:
            self._door = None
            for patience in self.waiting:
                with contextlib.suppress(RuntimeError):  # it has ended just now
                    patience.reschedule(0.0)
            door.left(self)


class Door(socket.socket):
    """A listening socket that knows who came in by it.

    `limits` has the seconds that each stage may take; `sweep` puts out who overstays them.
    """

    def __init__(self, listener: socket.socket, limits: Mapping[Stage, float]) -> None:
        """Take over a listening socket."""
        super().__init__(fileno=listener.detach())
        self.setblocking(False)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = min(MOST, max(8, (most - _OTHERS) // 2))
        """Connections at once."""
        self.dropped: Counter[Why] = Counter()
        """Clients that were put out, by reason."""
        self._limits = limits
        self._guests: dict[Any, Guest] = {}
        self._spare = self._reserved()
        self._told_at = float("-inf")
        self._told: Counter[Why] = Counter()

    def __len__(self) -> int:
        """The connections that are open now."""
        return len(self._guests)

    def __bool__(self) -> bool:
        return True

    def accept(self) -> tuple[Guest, Any]:
        """The next client; BlockingIOError where there is none, or no descriptor for it just now.

        asyncio would answer a lack of descriptors with a traceback for each place of the backlog,
        every second.
        """
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if self._spare is None:
                if not any(guest.out for guest in self._guests.values()):
                    self._make_room()
                raise BlockingIOError from None
            # The newcomer may be Prometheus: it gets the spare one, and somebody else gives his.
            os.close(self._spare)
            self._spare = None
            accepted, address = super().accept()
            self._make_room()
        guest = Guest(fileno=accepted.detach())
        if sum(1 for _ in self._inside()) >= self.most:
            self._make_room()
        guest.entered(self)
        self._guests[address[:2]] = guest
        return guest, address

    def guest(self, address: object) -> Guest | None:
        """Who came from there."""
        return self._guests.get(tuple(address)) if isinstance(address, tuple | list) else None

    def left(self, guest: Guest) -> None:
        """A connection was closed."""
        for address in [address for address, known in self._guests.items() if known is guest]:
            del self._guests[address]
        if self._spare is None:
            self._spare = self._reserved()

    def answering(self, guest: Guest) -> None:
        """An answer sets out; who has been reading his for the longest leaves where many do."""
        guest.reach(Stage.ANSWERING)
        reading = [g for g in self._inside() if g.stage is Stage.ANSWERING]
        if len(reading) > ANSWERS:
            slowest = min(reading, key=lambda guest: guest.since)
            if time.monotonic() - slowest.since > GRACE:
                self.put_out(slowest, Why.SLOW)

    def renew(self) -> None:
        """Have everybody come in anew: who asks nothing at once, the others once answered."""
        for guest in [*self._inside()]:
            guest.leaving = True
            if guest.stage is Stage.WAITING:
                guest.hear_no_more()

    def sweep(self) -> None:
        """Put out who overstays, and tell the log about it now and then."""
        now = time.monotonic()
        for guest in [*self._guests.values()]:
            if now - guest.since > self._limits[guest.stage]:
                self.put_out(guest, Why.IDLE if guest.stage <= Stage.WAITING else Why.SLOW)
        self._tell()

    def put_out(self, guest: Guest, why: Why) -> None:
        """End a connection whatever is still to be sent; its descriptor follows in a moment."""
        if guest.out:
            return
        guest.out = True
        self.dropped[why] += 1
        # A close would wait until the client has read what it does not read. After this, asyncio
        # learns with its next read or write that it is over, and closes it.
        with contextlib.suppress(OSError):
            # Else the kernel would go on offering what it has taken over.
            guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            guest.shutdown(socket.SHUT_RDWR)
        self._tell()

    def broke(self, error: object) -> None:
        """A connection ended by what its client said, in a way that nobody has thought of."""
        _log.debug("a connection broke", error=repr(error))
        self.dropped[Why.ODD] += 1
        self._tell()

    def close(self) -> None:
        """Listen no more."""
        super().close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _make_room(self) -> None:
        crowds = Counter(guest.stage for guest in self._inside())
        if crowds:
            crowd = crowds.most_common(1)[0][0]
            oldest = min(
                (guest for guest in self._inside() if guest.stage is crowd),
                key=lambda guest: guest.since,
            )
            self.put_out(oldest, Why.FULL)

    def _inside(self) -> Iterator[Guest]:
        return (guest for guest in self._guests.values() if not guest.out)

    def _reserved(self) -> int | None:
        with contextlib.suppress(OSError):
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return None

    def _tell(self) -> None:
        now = time.monotonic()
        new = self.dropped - self._told
        if new and now - self._told_at >= _QUIET:
            self._told_at, self._told = now, self.dropped.copy()
            counts = {str(why): count for why, count in new.items()}
            _log.warning("clients that held a connection without use were put out", **counts)
