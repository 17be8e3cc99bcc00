"""Makes a small shop database and treats it as busy and careless applications do."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import psycopg

from lab.binaries import Process
from lab.postgres import Server

HBA = (
    "local shop shop trust",
    "local replication postgres trust",
    "host all all 127.0.0.1/32 scram-sha-256",
)
"""Without a password one gets in only over the Unix socket, which is closed to other users."""

ORDERS_PER_SECOND = 50
"""Something to see, and so little that a laptop stays quiet."""

_SCHEMA = """
create table items (item int primary key, stock int not null, sold int not null default 0);
create table orders (
  id bigint generated always as identity primary key,
  item int not null references items,
  amount int not null,
  ordered timestamptz not null default now()
);
insert into items (item, stock) select item, 1000 from generate_series(1, 1000) as item;
"""

# Item 1 is left to those who fight for it in `misbehave`.
_ORDER = """\
begin;
insert into orders (item, amount) values (2 + floor(random() * 999)::int, 1);
update items set sold = sold + 1 where item = (select 2 + floor(random() * 999)::int);
commit;
"""

_A_VERY_LONG_TIME = 10_000_000
"""In seconds; pgbench knows no endless run."""


class Load(Protocol):
    """Applications that order all the time."""

    @property
    def running(self) -> bool:
        """Whether they still do."""

    def stop(self) -> None:
        """End them and return when they are gone."""


def create(server: Server) -> None:
    """Create the database, which belongs to a role of the same name."""
    server.execute("create role shop login")
    server.execute("create database shop owner shop")
    with _connect(server, "schema") as connection:
        connection.execute(_SCHEMA)


@contextlib.contextmanager
def misbehave(server: Server) -> Iterator[None]:
    """Have a transaction left idle, a lock held, and somebody who waits for it."""
    with (
        contextlib.closing(_connect(server, "report")) as report,
        contextlib.closing(_connect(server, "stocktaking")) as stocktaking,
        contextlib.closing(_connect(server, "checkout")) as checkout,
    ):
        # Somebody looked and never committed: vacuum keeps all that is deleted since.
        report.execute("set transaction isolation level repeatable read")
        report.execute("select count(*) from orders")
        # Somebody changed an item and went for lunch.
        stocktaking.execute("update items set stock = 7 where item = 1")
        # Somebody wants to buy it. The answer never comes, so it is not waited for.
        checkout.pgconn.send_query(b"update items set stock = stock - 1 where item = 1")
        checkout.pgconn.flush()
        server.wait_until("select exists (select from pg_locks where not granted)")
        yield


def start_load(server: Server) -> Load:
    """Start pgbench, or a loop of our own where the installation has none."""
    script = server.directory / "order.sql"
    script.write_text(_ORDER)
    script.chmod(0o644)
    where = ["--host", str(server.directory), "--port", str(server.port), "--username", "shop"]
    command = ["pgbench", *where, "--no-vacuum", "--file", str(script), "--client", "2"]
    command += ["--rate", str(ORDERS_PER_SECOND), "--time", str(_A_VERY_LONG_TIME), "shop"]
    try:
        log = server.directory / "pgbench.log"
        return _Pgbench(server.binaries.spawn(command, server.directory, log))
    except FileNotFoundError:
        return _Loop(_connect(server, "orders"))


class _Pgbench:
    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def running(self) -> bool:
        return self._process.running()

    def stop(self) -> None:
        if self.running:
            os.kill(self._process.pid, signal.SIGTERM)
        self._process.discard()


class _Loop:
    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._connection), contextlib.suppress(psycopg.OperationalError):
            self._connection.autocommit = True
            due = time.monotonic()
            while not self._stopping.wait(max(0, due - time.monotonic())):
                self._connection.execute(_ORDER)
                due += 1 / ORDERS_PER_SECOND


def _connect(server: Server, application: str) -> psycopg.Connection:
    return psycopg.connect(
        host=str(server.directory),
        port=server.port,
        user="shop",
        dbname="shop",
        application_name=application,
    )
