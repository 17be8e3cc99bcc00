"""Names are looked up apart, so that one that hangs holds up nobody else, nor the end."""

import asyncio
import socket
import subprocess
import sys
import time
from threading import Event
from typing import Any

import pytest
from pgvigil import connect
from pgvigil.errors import Down, Unreachable
from pgvigil.target import Target

from lab.ports import free_port


class Resolver:
    """Hangs for names that begin with `slow` until it is let go; knows `nobody` not at all."""

    def __init__(self) -> None:
        self.go = Event()
        self.asked: list[str] = []
        self._real = socket.getaddrinfo

    def __call__(self, host: str, *arguments: Any, **more: Any) -> Any:
        if more.get("flags") == socket.AI_NUMERICHOST:
            return self._real(host, *arguments, **more)
        self.asked.append(host)
        if host.startswith("slow"):
            self.go.wait(60)
        if host == "nobody":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self._real("127.0.0.1", *arguments, **more)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    yield made
    made.go.set()


async def why(host: str, seconds: float) -> Down:
    """Why a host's server cannot be asked, in so many seconds at most."""
    target = Target(host, {"host": host, "port": str(free_port())})
    deadline = asyncio.get_running_loop().time() + seconds
    with pytest.raises(Unreachable) as caught:
        await connect.connect(target, deadline, guarded=True)
    return caught.value.reason


def test_names_that_hang_hold_up_no_other(resolver: Resolver) -> None:
    async def many() -> tuple[list[Down], Down]:
        hanging = [asyncio.create_task(why(f"slow{n}", 1)) for n in range(100)]
        await asyncio.sleep(0)
        quick = await why("quick", 30)
        return await asyncio.gather(*hanging), quick

    hanging, quick = asyncio.run(many())
    assert set(hanging) == {Down.TIMEOUT}
    assert quick is Down.CONNECTION_REFUSED


def test_a_name_that_is_being_looked_up_is_not_asked_for_again(resolver: Resolver) -> None:
    async def twice() -> list[Down]:
        assert await why("slow", 0.1) is Down.TIMEOUT
        waiting = [asyncio.create_task(why("slow", 30)) for _ in range(5)]
        await asyncio.sleep(0.1)
        resolver.go.set()
        return await asyncio.gather(*waiting)

    assert set(asyncio.run(twice())) == {Down.CONNECTION_REFUSED}
    assert resolver.asked == ["slow"]


def test_where_too_many_names_hang_others_wait_for_their_turn(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "_LOOK_UPS", 3)

    async def crowd() -> Down:
        for n in range(3):
            assert await why(f"slow{n}", 0.05) is Down.TIMEOUT
        assert await why("quick", 0.1) is Down.TIMEOUT
        waiting = asyncio.create_task(why("quick", 30))
        await asyncio.sleep(0)
        resolver.go.set()
        return await waiting

    assert asyncio.run(crowd()) is Down.CONNECTION_REFUSED
    assert resolver.asked == ["slow0", "slow1", "slow2", "quick"]


def test_a_name_that_nobody_knows_is_told(resolver: Resolver) -> None:
    assert asyncio.run(why("nobody", 30)) is Down.HOST_UNKNOWN
    assert asyncio.run(why("a" * 64 + ".b", 30)) is Down.CONNECTION_REFUSED


def test_an_address_is_not_looked_up(resolver: Resolver) -> None:
    assert asyncio.run(why("127.0.0.1", 30)) is Down.CONNECTION_REFUSED
    assert asyncio.run(why("::1", 30)) in (Down.CONNECTION_REFUSED, Down.HOST_UNREACHABLE)
    assert resolver.asked == []


def test_a_name_that_hangs_does_not_hold_up_the_end() -> None:
    program = """
import asyncio, socket, threading, time
real = socket.getaddrinfo
def hang(host, *arguments, **more):
    if "flags" in more and more["flags"]:
        return real(host, *arguments, **more)
    time.sleep(60)
socket.getaddrinfo = hang
from pgvigil import connect
async def once():
    try:
        async with asyncio.timeout(0.1):
            await connect.look_up("slow")
    except TimeoutError:
        print("too late")
asyncio.run(once())
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=55)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"too late\n", b"")
    assert time.monotonic() - begun < 50  # as long as the resolver sleeps, with the old way
