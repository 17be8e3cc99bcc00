"""Answers PostgreSQL's protocol with what a real server answered once, so that it costs little.

It is no server: nothing is looked up, planned or counted, so that its answers never change; it
knows no password, no encryption and no cancel request, and sends no notice. What it has not been
asked before it asks the real server, which stands still for everybody until the answer is there.
"""

import argparse
import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_ENCRYPTION = (80877103, 80877104)
"""The codes of SSLRequest and GSSENCRequest."""
_CANCEL = 80877102
_TERMINATE = b"X"
_ENDS = b"SQ"
"""Sync and Query: what was sent until then is answered."""
_READY, _ERROR = b"Z", b"E"


class StrangeError(Exception):
    """A client or the server said what is not known here."""


def _messages(data: bytes, *, whole: bool = True) -> Iterator[tuple[bytes, bytes, int]]:
    """The messages in some bytes: type, content, and where each ends.

    Raises StrangeError when the last one is not `whole` though it should be.
    """
    at = 0
    while at + 5 <= len(data):
        end = at + 1 + int.from_bytes(data[at + 1 : at + 5])
        if end > len(data):
            break
        yield data[at : at + 1], data[at + 5 : end], end
        at = end
    if whole and at != len(data):
        raise StrangeError("a message is cut off")


def _message(kind: bytes, content: bytes = b"") -> bytes:
    return kind + struct.pack("!I", 4 + len(content)) + content


@dataclass(frozen=True)
class _Told:
    """What the server said to one statement."""

    described: bytes
    """The answer to Describe."""
    executed: bytes
    """That to Execute: rows and the end of the command, or an error."""
    failed: bool


class _Model:
    """A connection to the real server, opened as the first client of its kind opened its own."""

    def __init__(self, port: int, startup: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._told: dict[tuple[bytes, bytes], _Told] = {}
        """By statement and parameters."""
        self.greeting = self._exchange(startup)
        """What a client hears until it may ask."""
        self.begin = _State({})
        """What each connection begins with."""
        self._states: dict[frozenset[tuple[bytes, bytes]], _State] = {frozenset(): self.begin}

    def answer(self, state: "_State", segment: bytes) -> "tuple[bytes, _State]":
        """What comes back for all until a sync, and the state after it."""
        if segment.startswith(b"Q"):
            return self._exchange(segment), state
        names = dict(state.names)
        asked = _bound(segment, names)
        if any(one not in self._told for one in asked):
            self._ask(asked)
        after = self._states.setdefault(frozenset(names.items()), _State(names))
        return self._reply(segment, [self._told[one] for one in asked]), after

    def _ask(self, asked: list[tuple[bytes, bytes]]) -> None:
        """Ask all at once, as they may lean on each other, and keep what is told."""
        parts = (
            _message(b"P", b"\0" + text + b"\0\0\0")
            + _message(b"B", b"\0\0" + values)
            + _message(b"D", b"P\0")
            + _message(b"E", b"\0\0\0\0\0")
            for text, values in asked
        )
        said = self._exchange(b"".join(parts) + _message(b"S"))
        described, executed, at = b"", b"", 0
        told: list[_Told] = []
        for kind, content, _ in _messages(said):
            if kind in (b"T", b"n"):
                described = _message(kind, content)
            elif kind in (b"D", b"C", _ERROR):
                executed += _message(kind, content)
            if kind in (b"C", _ERROR):
                told.append(_Told(described, executed, kind == _ERROR))
                described, executed, at = b"", b"", at + 1
        self._told |= dict(zip(asked, told, strict=False))
        # What stands behind an error was skipped, and will be again.
        self._told |= dict.fromkeys(asked[at:], _Told(b"", b"", failed=True))

    def _reply(self, segment: bytes, told: list[_Told]) -> bytes:
        following = iter(told)
        answers: list[bytes] = []
        now = _Told(b"", b"", failed=False)
        for kind, _, _ in _messages(segment):
            if kind == b"S":
                answers.append(_message(_READY, b"I"))
            elif now.failed:
                continue
            elif kind == b"B":
                now = next(following)
                answers.append(now.executed if now.failed else _message(b"2"))
            else:
                known = {b"P": _message(b"1"), b"D": now.described, b"E": now.executed, b"H": b""}
                if kind not in known:
                    raise StrangeError(f"a message {kind!r}")
                answers.append(known[kind])
        return b"".join(answers)

    def _exchange(self, data: bytes) -> bytes:
        """Send, and return all up to the sign that the server is ready."""
        self._socket.sendall(data)
        said = b""
        while not said.endswith(_message(_READY, b"I")):
            more = self._socket.recv(65536)
            if not more:
                raise StrangeError(f"the server hung up after {said[-200:]!r}")
            said += more
        return said


@dataclass
class _State:
    """What a connection has prepared, and what is answered then."""

    names: Mapping[bytes, bytes]
    answers: "dict[bytes, tuple[bytes, _State]]" = field(default_factory=dict)
    """By the bytes up to a sync: the answer, and the state after it."""


def _bound(segment: bytes, names: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The statements that a segment runs, each with its parameters; `names` learns new ones."""
    found: list[tuple[bytes, bytes]] = []
    for kind, content, _ in _messages(segment):
        if kind == b"P":
            name, text, _types = content.split(b"\0", 2)
            names[name] = text
        elif kind == b"B":
            _portal, name, values = content.split(b"\0", 2)
            found.append((names[name], values))
    names.pop(b"", None)  # the next one without a name takes its place
    return found


class _Client(asyncio.Protocol):
    """One connection of an exporter."""

    def __init__(self, models: dict[bytes, _Model], port: int) -> None:
        self._models = models
        self._port = port
        self._heard = b""
        self._model: _Model | None = None
        self._state = _State({})
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # asyncio does so for sockets that name their protocol, which an accepted one does not.
        line = transport.get_extra_info("socket")
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Answer what is complete; a client that is not understood is left."""
        self._heard += data
        try:
            if self._model is None:
                self._greet()
            else:
                self._answer(self._model)
        except (StrangeError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
            self._transport.abort()

    def _greet(self) -> None:
        if len(self._heard) < 8:
            return
        size, code = struct.unpack("!II", self._heard[:8])
        if len(self._heard) < size:
            return
        startup, self._heard = self._heard[:size], self._heard[size:]
        if code in _ENCRYPTION:
            self._transport.write(b"N")
        elif code == _CANCEL:
            self._transport.close()
        else:
            if startup not in self._models:
                self._models[startup] = _Model(self._port, startup)
            self._model = self._models[startup]
            self._state = self._model.begin
            self._transport.write(self._model.greeting)

    def _answer(self, model: _Model) -> None:
        begun = done = 0
        for kind, _, end in _messages(self._heard, whole=False):
            if kind == _TERMINATE:
                self._transport.close()
                return
            if kind in _ENDS:
                segment, begun = self._heard[begun:end], end
                known = self._state.answers.get(segment)
                if known is None:
                    known = self._state.answers[segment] = model.answer(self._state, segment)
                reply, self._state = known
                # One by one, as a server that works on them would.
                self._transport.write(reply)
                done = end
        self._heard = self._heard[done:]


async def _serve(listener: socket.socket, port: int) -> None:
    models: dict[bytes, _Model] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Client(models, port), sock=listener)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Listen on a free port, which is printed, until somebody ends the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.standin", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="the real server's")
    told = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(listener, told.port))


@dataclass(frozen=True)
class StandIn:
    """A stand-in that runs as a process of its own."""

    pid: int
    port: int


@contextlib.contextmanager
def running(port: int) -> Iterator[StandIn]:
    """Run a stand-in of the server that listens on a port of this machine."""
    command = [sys.executable, "-m", "bench.standin", f"--port={port}"]
    root = Path(__file__).resolve().parents[1]  # where -m finds the bench
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield StandIn(process.pid, int(process.stdout.readline()))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
