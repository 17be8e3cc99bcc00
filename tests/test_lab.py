"""The lab's servers, proxy and port do what the other tests rely on."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

from lab import processes
from lab.clock import Clock
from lab.cluster import BARE, PGVIGIL, READER, Cluster, Role
from lab.delay_proxy import DelayProxy, delayed
from lab.line import Line
from lab.postgres import Server, ServerError
from lab.silent_port import silent_port
from lab.small_disk import SmallDisk

FreshServer = Callable[..., Server]


def test_a_server_of_each_major_version_answers(major: int, server: Server) -> None:
    with psycopg.connect(server.conninfo()) as connection:
        assert connection.info.server_version // 10000 == major
    assert server.binaries.version.startswith(f"{major}.")


def test_what_the_primary_writes_arrives_on_the_standby(cluster: Cluster) -> None:
    name = f"arrived_{os.getpid()}"
    cluster.primary.execute(f"create database {name}")
    there = f"select exists (select from pg_database where datname = '{name}')"
    cluster.standby.wait_until(there)
    assert cluster.standby.execute("select pg_is_in_recovery()") == [(True,)]
    cluster.primary.execute(f"drop database {name}")


def test_the_standby_holds_its_slot(cluster: Cluster) -> None:
    query = "select slot_name, active from pg_replication_slots"
    assert cluster.primary.execute(query) == [("standby", True)]
    assert cluster.standby.execute(query) == []


@pytest.mark.parametrize("sslmode", ["disable", "require", "verify-full"])
def test_clients_choose_between_tls_and_plain(server: Server, sslmode: str) -> None:
    if not server.binaries.tls:
        pytest.skip(f"the {server.binaries.source} build has no TLS")
    conninfo = server.conninfo(sslmode=sslmode, sslrootcert=str(server.certificate))
    with psycopg.connect(conninfo) as connection:
        query = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
        assert connection.execute(query).fetchone() == (sslmode != "disable",)


@pytest.mark.parametrize("role", [PGVIGIL, READER, BARE], ids=lambda role: role.name)
@pytest.mark.parametrize("major", [17])
def test_each_role_logs_in_by_its_password_alone(server: Server, role: Role) -> None:
    with psycopg.connect(server.conninfo(**role.login)) as connection:
        assert connection.execute("select current_user").fetchone() == (role.name,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(server.conninfo(user=role.name, password="wrong"))


@pytest.mark.parametrize("major", [17])
def test_the_monitoring_role_has_five_connections(server: Server) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(5):
            connections.enter_context(psycopg.connect(server.conninfo(**PGVIGIL.login)))
        with pytest.raises(psycopg.OperationalError, match="too many connections"):
            psycopg.connect(server.conninfo(**PGVIGIL.login))


def test_a_crashed_server_recovers_what_was_committed(
    major: int, fresh_server: FreshServer
) -> None:
    server = fresh_server(major)
    server.execute("create table kept (value int); insert into kept values (1)")
    victims = [server.pid, *processes.descendants(server.pid)]
    server.crash()
    assert not any(processes.alive(pid) for pid in victims)
    server.start()
    assert server.execute("select value from kept") == [(1,)]
    assert "was not properly shut down" in server.log()
    assert server.errors_in_log() == []


def test_a_paused_server_keeps_connections_and_says_nothing(fresh_server: FreshServer) -> None:
    server = fresh_server()
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        server.pause()
        connection.pgconn.send_query(b"select 1")
        connection.pgconn.flush()
        time.sleep(0.2)
        connection.pgconn.consume_input()
        assert connection.pgconn.is_busy()
        server.resume()
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.get_value(0, 0) == b"1"
        assert connection.pgconn.get_result() is None


def test_a_promoted_standby_takes_writes(fresh_server: FreshServer) -> None:
    standby = fresh_server().standby()
    standby.promote()
    standby.execute("create table written ()")


def test_settings_and_access_change_while_the_server_runs(fresh_server: FreshServer) -> None:
    server = fresh_server(work_mem="1MB")
    assert server.execute("show work_mem") == [("1MB",)]
    server.set({"work_mem": "2MB"})
    assert server.execute("show work_mem") == [("2MB",)]
    server.set_hba(["host all all 127.0.0.1/32 reject"])
    with pytest.raises(psycopg.OperationalError, match="rejects connection"):
        psycopg.connect(server.conninfo())
    server.set_hba(None)
    psycopg.connect(server.conninfo()).close()


def test_errors_are_read_from_the_log_by_their_own_severity(fresh_server: FreshServer) -> None:
    server = fresh_server(log_statement="all")
    server.execute("select 'ERROR:  quoted'")
    before = server.log_position()
    assert server.errors_in_log() == []
    with pytest.raises(psycopg.errors.DivisionByZero):
        server.execute("select 1 / 0")
    [line] = server.errors_in_log(since=before)
    assert line.endswith("ERROR:  division by zero")


def test_a_server_that_cannot_start_says_why(fresh_server: FreshServer) -> None:
    server = fresh_server()
    server.stop()
    server.set({"shared_buffers": "nonsense"})
    with pytest.raises(ServerError, match="invalid value for parameter"):
        server.start()


def test_a_destroyed_server_leaves_nothing_behind(fresh_server: FreshServer) -> None:
    server = fresh_server()
    standby = server.standby()
    directories, pids = [server.directory, standby.directory], [server.pid, standby.pid]
    segments = _memory_segments()
    server.crash()
    server.destroy()
    assert not any(directory.exists() for directory in directories)
    assert not any(processes.alive(pid) for pid in pids)
    assert len(segments - _memory_segments()) >= 2


def _memory_segments() -> set[str]:
    """The identifiers of all System V shared memory of this machine."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {line.split()[1] for line in lines}


async def _round_trips(port: int, count: int) -> list[float]:
    """Seconds that each of some one-byte echoes took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    for _ in range(count):
        began = time.perf_counter()
        writer.write(b"?")
        await reader.readexactly(1)
        took.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()
    return took


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


def test_the_proxy_delays_each_round_trip_by_what_was_asked() -> None:
    async def measure() -> list[float]:
        async with await asyncio.start_server(_echo, "127.0.0.1", 0) as upstream:
            port = upstream.sockets[0].getsockname()[1]
            async with DelayProxy("127.0.0.1", port, round_trip=0.05) as proxy:
                return await _round_trips(proxy.port, 5)

    took = asyncio.run(measure())
    assert all(seconds >= 0.05 for seconds in took)
    assert min(took) < 0.06


def test_the_proxy_keeps_order_and_bandwidth() -> None:
    sent = os.urandom(16 * 1024 * 1024)

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    async def measure() -> tuple[bytes, float]:
        async with await asyncio.start_server(_echo, "127.0.0.1", 0) as upstream:
            port = upstream.sockets[0].getsockname()[1]
            async with DelayProxy("127.0.0.1", port, round_trip=0.2) as proxy:
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                began = time.perf_counter()
                _, echoed = await asyncio.gather(send(writer), reader.read())
                took = time.perf_counter() - began
                writer.close()
                return echoed, took

    echoed, took = asyncio.run(measure())
    assert echoed == sent
    # Chunk after chunk, each waiting for the one before, would take 256 times 0.2 seconds.
    assert took < 5


@pytest.mark.parametrize("major", [17])
def test_a_server_can_be_moved_away_by_a_proxy_process(server: Server) -> None:
    with (
        delayed("127.0.0.1", server.port, round_trip=0.1) as port,
        psycopg.connect(server.conninfo(port=port), autocommit=True) as connection,
    ):
        began = time.perf_counter()
        connection.execute("select 1")
        assert 0.1 <= time.perf_counter() - began < 0.2


def test_a_silent_port_accepts_and_says_nothing() -> None:
    with silent_port() as port, socket.create_connection(("127.0.0.1", port), 1) as client:
        client.sendall(b"anybody there?")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


class Echo:
    """A server that says again what it hears, to each client until its end or `quit`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    @staticmethod
    def _serve(client: socket.socket) -> None:
        with client, contextlib.suppress(ConnectionError):
            while (chunk := client.recv(65536)) and chunk != b"quit":
                client.sendall(chunk)


@pytest.fixture
def line() -> Iterator[Line]:
    """A line to an echo."""
    echo = Echo()
    with contextlib.closing(echo), Line("127.0.0.1", echo.port) as line:
        yield line


def _connected(line: Line, timeout: float = 30) -> socket.socket:
    """A client that has been served once."""
    client = socket.create_connection(("127.0.0.1", line.port), timeout)
    client.sendall(b"hello")
    assert _heard(client, 5) == b"hello"
    return client


def _heard(client: socket.socket, count: int) -> bytes:
    heard = b""
    while len(heard) < count and (chunk := client.recv(count - len(heard))):
        heard += chunk
    return heard


def _assert_silent(client: socket.socket) -> None:
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(30)


def test_a_line_carries_all_bytes_both_ways_and_counts_them(line: Line) -> None:
    sent = os.urandom(8 * 1024 * 1024)
    with _connected(line) as client:
        assert line.connections == 1
        writing = threading.Thread(target=client.sendall, args=[sent])
        writing.start()
        assert _heard(client, len(sent)) == sent
        writing.join()
        assert line.sent == 5 + len(sent)


def test_a_line_hands_on_the_end_of_either_side(line: Line) -> None:
    with _connected(line) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert _heard(client, 100) == b"last words"
    end = time.monotonic() + 30
    while line.connections and time.monotonic() < end:
        time.sleep(0.01)
    assert line.connections == 0


def test_a_frozen_line_holds_bytes_and_connections_until_it_thaws(line: Line) -> None:
    with _connected(line) as client:
        line.freeze()
        client.sendall(b"held")
        with socket.create_connection(("127.0.0.1", line.port), 30) as late:
            late.sendall(b"late")
            _assert_silent(client)
            _assert_silent(late)
            assert line.connections == 1
            line.thaw()
            assert _heard(client, 4) == b"held"
            assert _heard(late, 4) == b"late"


def test_a_cut_line_resets_who_is_served_and_who_waits(line: Line) -> None:
    with _connected(line) as client:
        line.freeze()
        with socket.create_connection(("127.0.0.1", line.port), 30) as late:
            line.cut()
            assert line.connections == 0
            for each in (client, late):
                with pytest.raises(ConnectionResetError):
                    each.recv(1)
    line.thaw()
    _connected(line).close()


def test_a_line_that_refuses_serves_who_is_there_and_accepts_again(line: Line) -> None:
    with _connected(line) as client:
        line.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", line.port), 30)
        client.sendall(b"still")
        assert _heard(client, 5) == b"still"
        line.accept()
        _connected(line).close()


def test_a_line_swallows_what_follows_so_many_bytes(line: Line) -> None:
    with _connected(line) as client:
        line.swallow(after=3)
        client.sendall(b"half")
        assert _heard(client, 3) == b"hal"
        with socket.create_connection(("127.0.0.1", line.port), 30) as other:
            other.sendall(b"fresh")
            assert _heard(other, 3) == b"fre"
        client.sendall(b"quit")  # that the server ends is lost as well
        line.swallow(None)
        _connected(line).close()
        _assert_silent(client)


def test_a_line_to_nobody_resets_its_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with (
        Line("127.0.0.1", port) as line,
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", line.port), 30) as client,
    ):
        client.recv(1)


@pytest.mark.parametrize("major", [17])
def test_a_line_carries_a_session_that_outlives_its_freezing(server: Server) -> None:
    with (
        Line("127.0.0.1", server.port) as line,
        psycopg.connect(server.conninfo(port=line.port), autocommit=True) as connection,
    ):
        line.freeze()
        thawing = threading.Timer(0.2, line.thaw)
        thawing.start()
        assert connection.execute("select 1").fetchone() == (1,)
        thawing.join()
        line.cut()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")


def test_a_clock_moves_for_whoever_is_given_it(fresh_server: FreshServer) -> None:
    try:
        clock = Clock()
    except RuntimeError as error:
        _lacking(error)
    told = "select extract(epoch from clock_timestamp())::float8"
    server = fresh_server(17)
    if server.binaries.source == "docker":
        pytest.skip("a container does not have libfaketime")
    with clock:
        server.environment |= clock.environment
        server.restart()
        for hours in (0, 1, -1):
            clock.move(hours * 3600)
            assert server.execute(told)[0][0] - time.time() == pytest.approx(hours * 3600, abs=60)


def test_a_small_disk_is_full_and_has_room_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "held").write_text("held")
    try:
        with SmallDisk(folder, 1 << 20) as disk:
            assert (folder / "held").read_text() == "held"
            disk.fill()
            with pytest.raises(OSError, match="No space left"):
                (folder / "more").write_bytes(bytes(1 << 16))
            disk.free()
            (folder / "more").write_bytes(bytes(1 << 16))
    except RuntimeError as error:
        _lacking(error)
    assert list(folder.iterdir()) == []


def _lacking(error: RuntimeError) -> NoReturn:
    """Skip where a machine lacks what the lab needs; fail where CI is set."""
    if os.environ.get("CI"):
        raise error
    pytest.skip(str(error))
