"""What Patroni tells becomes targets; what it does not tell leaves those that are there."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from pgvigil import discovery, fleet
from pgvigil.config import Address, Cluster, Settings
from pgvigil.discovery import Discovery
from pgvigil.fleet import Fleet, Turned
from pgvigil.hosts import Allowed, allowed
from pgvigil.shard import Shard, home
from pgvigil.target import Target
from structlog.testing import capture_logs

MODULE = Target("reader", {"user": "pgvigil"}, labels={"team": "a"})


def settings(*clusters: Cluster, **more: object) -> Settings:
    return Settings(
        Address("", 9187),
        more.pop("targets", ()),  # type: ignore[arg-type]
        (),
        modules={"reader": MODULE},
        clusters=clusters,
        **more,  # type: ignore[arg-type]
    )


def member(name: str, host: str = "127.0.0.1", port: object = 1) -> dict[str, object]:
    return {"name": name, "role": "replica", "host": host, "port": port}


def told(*members: Mapping[str, object], **more: str) -> bytes:
    body = json.dumps({"members": members, **more}).encode()
    return b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + body


class Patroni:
    """Answers whatever it is asked with the same bytes."""

    def __init__(self) -> None:
        self.answer = b""
        self.asked = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        writer.close()


@asynccontextmanager
async def patroni() -> AsyncIterator[tuple[Patroni, str]]:
    one = Patroni()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    async with server:
        yield one, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_members_come_move_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        async with patroni() as (source, url):
            one = Fleet()
            one.adopt(settings(Cluster(url, "reader", "")), ())
            asking = Discovery(one)
            source.answer = told(member("a"), member("b"), member("c d"), scope="main")
            await asking.round()
            assert source.asked.startswith(b"GET /cluster HTTP/1.0\r\nHost: 127.0.0.1:")
            assert list(one.collectors) == ["main-a", "main-b", "main-c-d"]
            first = one.collectors["main-a"]
            assert first.target == Target(
                "main-a",
                {"user": "pgvigil", "host": "127.0.0.1", "port": "1"},
                labels={"team": "a"},
            )
            source.answer = told(member("a"), member("b", port=2), scope="main")
            await asking.round()
            assert one.collectors["main-a"] is first
            assert one.collectors["main-b"].target.connection["port"] == "2"
            # One that is not told of any more may have lost its agent alone.
            assert list(one.collectors) == ["main-a", "main-b", "main-c-d"]
            monkeypatch.setattr(discovery, "KEEP", -1.0)
            await asking.round()
            assert list(one.collectors) == ["main-a", "main-b"]
            assert one.sources[url].failures == 0
            assert one.sources[url].succeeded_at > 0
            await one.close()

    asyncio.run(look())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "the answer is no HTTP"),
        (b"HTTP/1.0 503 x\r\n\r\n{}", "the answer has the status 503"),
        (b"HTTP/1.1 200 OK\r\n\r\n[", "the answer is no list of members: JSONDecodeError("),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", "the answer is no list of members: TypeError("),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "the answer is no list of members: KeyError('members')"),
        (told(member("x", host="a,b")), "the answer is no list of members: ValueError('host')"),
        (told(member("x", port="x")), "the answer is no list of members: ValueError("),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000, "the answer is no list of members: Recurs"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b" " * (2 << 20), "the answer is larger than 1 MB"),
    ],
)
def test_what_is_no_answer_leaves_the_members_that_are_there(answer: bytes, why: str) -> None:
    async def look() -> None:
        async with patroni() as (source, url):
            one = Fleet()
            one.adopt(settings(Cluster(url, "reader", "orders")), ())
            asking = Discovery(one)
            source.answer = told(member("a"))
            await asking.round()
            source.answer = answer
            with capture_logs() as lines:
                await asking.round()
                await asking.round()
            assert [line["reason"][: len(why)] for line in lines] == [why]
            assert list(one.collectors) == ["orders-a"]
            assert one.sources[url].failures == 2
            source.answer = told(member("b"))
            await asking.round()
            assert list(one.collectors) == ["orders-a", "orders-b"]
            await one.close()

    asyncio.run(look())


def test_a_source_that_is_away_or_says_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_PATIENCE", 0.2)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until who asks has gone
        writer.close()
        gone.set()

    gone = asyncio.Event()

    async def look() -> None:
        async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            urls = (f"http://127.0.0.1:{port}", "http://127.0.0.1:1", "http://nowhere.invalid:1")
            one = Fleet()
            one.adopt(settings(*(Cluster(url, "reader", "") for url in urls)), ())
            with capture_logs() as lines:
                await Discovery(one).round()
            assert {line["source"]: line["reason"] for line in lines} == {
                urls[0]: "no answer in time",
                urls[1]: "Connect call failed ('127.0.0.1', 1)",
                urls[2]: "the host's name has no address",
            }
            assert [one.sources[url].failures for url in urls] == [1, 1, 1]
            await gone.wait()

    asyncio.run(look())


def test_members_are_shared_out_and_give_way_to_what_is_listed() -> None:
    names = [f"main-{n}" for n in range(9)]
    mine = [name for name in names if home(name, 2) == 1]

    async def look() -> None:
        async with patroni() as (source, url):
            one = Fleet()
            listed = Target(mine[0], {"host": "listed"})
            here = settings(Cluster(url, "reader", ""), shard=Shard(1, 2), targets=[listed])
            one.adopt(here, ())
            source.answer = told(*(member(str(n)) for n in range(9)), scope="main")
            await Discovery(one).round()
            assert sorted(one.collectors) == mine
            assert one.collectors[mine[0]].target is listed
            for name in names:
                assert one.elsewhere(name) == ("" if name in mine else "0/2")
            one.adopt(settings(), ())
            assert one.collectors == {}
            await one.close()

    asyncio.run(look())


async def asked(of: Fleet, text: str, module: str | None = "reader") -> str:
    """The name of the target, after a scrape, or the status."""
    made = of.host(text, module)
    if made is None:
        return "none"
    if isinstance(made, Turned):
        return str(made.status)
    await made.scrape(asyncio.get_running_loop().time() + 5)
    return made.target.name


def permitted(*texts: str) -> Allowed:
    found, faults = allowed(texts)
    assert not faults
    return found


def test_hosts_are_kept_while_they_are_scraped_and_there_are_only_so_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def look() -> None:
        one = Fleet()
        one.adopt(settings(allowed=permitted("127.0.0.0/8"), max_hosts=2), ())
        assert await asked(one, "127.0.0.1:1") == "reader@127.0.0.1:1"
        assert await asked(one, "127.0.0.1:1/app") == "reader@127.0.0.1:1/app"
        assert [await asked(one, f"127.0.0.{n}:1") for n in (1, 2)] == ["reader@127.0.0.1:1", "503"]
        one.sweep()
        assert len(one.hosts) == 2
        monkeypatch.setattr(fleet, "IDLE", -1.0)
        one.sweep()
        assert not one.hosts
        assert await asked(one, "127.0.0.2") == "reader@127.0.0.2:5432"
        await one.close()

    asyncio.run(look())


def test_a_reload_leaves_the_hosts_that_it_does_not_allow() -> None:
    async def look() -> None:
        one = Fleet()
        one.adopt(settings(allowed=permitted("127.0.0.0/8", "::1")), ())
        names = [await asked(one, text) for text in ("127.0.0.1:1", "[::1]:1")]
        assert names == ["reader@127.0.0.1:1", "reader@[::1]:1"]
        before = dict(one.hosts)
        one.adopt(settings(allowed=permitted("127.0.0.0/8", "::1")), ())
        assert one.hosts == before
        one.adopt(settings(allowed=permitted("127.0.0.0/8", "::1"), max_hosts=1), ())
        assert one.hosts == before
        one.adopt(settings(allowed=permitted("::1")), ())
        assert not one.hosts
        assert await asked(one, "127.0.0.1:1") == "403"
        one.adopt(settings(), ())
        assert not one.hosts
        assert await asked(one, "127.0.0.1:1") == "none"
        await one.close()

    asyncio.run(look())
