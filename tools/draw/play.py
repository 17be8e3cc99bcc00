"""What the dashboards are shown of: a busy pair that is well, and a morning on which it is not."""

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

import psycopg

from lab.exporter import Exporter
from tests.faults.stage import DATABASE, Stage, printed

SCHEMA = """
create table customers (id int primary key, name text, city text);
insert into customers
select n, 'customer ' || n, 'city ' || n % 50 from generate_series(1, 20000) n;
create table items
(id int primary key, customer int references customers, cents int, at timestamptz);
insert into items select n, 1 + n % 20000, n % 9000, now() from generate_series(1, 100000) n;
create index items_customer on items (customer);
create table visits
(id bigint generated always as identity primary key, customer int, seen int default 0);
insert into visits (customer) select n from generate_series(1, 2000) n;
analyze
"""

WORK = (
    ("select name from customers where id = %s", 12),
    ("select sum(cents) from items where customer = %s", 8),
    ("update visits set seen = seen + 1 where id = %s", 5),
    ("insert into orders (note) values ('order ' || %s)", 3),
    ("select city, count(*) from customers where id > %s group by city order by 2 desc limit 5", 4),
    ("select c.city, sum(i.cents) from items i join customers c on c.id = i.customer"
     " where c.id %% 100 = %s %% 100 group by c.city", 4),
)  # fmt: skip
"""Statements with one number each, and how often each is sent beside the others."""

CLIENTS = 4


class Clients:
    """People who buy something: sessions that send WORK, sometimes more and sometimes less."""

    def __init__(self, conninfo: str, count: int = CLIENTS) -> None:
        self._conninfo = conninfo
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        chance = random.Random()
        statements, weights = zip(*WORK, strict=True)
        while not self._over.is_set():
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(self._conninfo, autocommit=True, connect_timeout=5) as session,
            ):
                for turn in itertools.count():
                    if self._over.wait(0.02 + 0.02 * (turn // 200 % 3)):
                        break
                    (statement,) = chance.choices(statements, weights)
                    session.execute(statement, [chance.randint(1, 2000)])
            self._over.wait(0.2)


class Shop(Stage):
    """A pair of servers under a load that is worth a picture."""

    def furnish(self) -> None:
        """Put up the shop and what a careful administrator has."""
        for statement in SCHEMA.split(";"):
            self.execute(statement)
        self.execute(printed("grants", "--bloat", "--sequences"))
        self.primary.execute(printed("grants", "--security"))
        self.primary.execute(
            "insert into pgvigil.record (kind, place, started, ended, ok, size_bytes, window_start)"
            " values ('backup', 'here', now() - interval '20 s', now(), true, 83e6,"
            " now() - interval '8 days')"
        )
        self._stack.enter_context(Clients(self.primary.conninfo(dbname=DATABASE)))
        self._stack.enter_context(self._reader())

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        """Somebody who reads from the standby."""
        over = threading.Event()

        def read() -> None:
            with contextlib.suppress(psycopg.Error):
                conninfo = self.standby.conninfo(dbname=DATABASE)
                with psycopg.connect(conninfo, autocommit=True) as session:
                    while not over.wait(0.1):
                        session.execute("select count(*) from items where customer < 500")

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def configuration(self) -> dict[str, Any]:
        """Let the texts of statements be told, and the cluster have a name."""
        told = super().configuration()
        for of in told["targets"].values():
            of["enable"] = ["queries.texts"]
            of["objectives"] |= {"STO-1": {"capacity_bytes": {"page": 1e9, "ticket": 1e9}}}
            of.setdefault("labels", {})["cluster"] = "shop"
        return told

    def _exporter(self, port: int | None = None) -> Exporter:
        exporter = super()._exporter(port)
        own = {"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"instance": "exporter"}}
        self.jobs = [{"job_name": "own", "static_configs": [own]}]
        return exporter

    @contextlib.contextmanager
    def monday(self) -> Iterator[None]:
        """Somebody locks a table and is idle, clients wait for it, and the standby is away."""
        conninfo = self.primary.conninfo(dbname=DATABASE)
        with contextlib.ExitStack() as stack:
            # They wait for the lock, so it must go before they are waited for.
            stack.enter_context(Clients(conninfo, 12))
            lunch = stack.enter_context(self.session())
            lunch.execute("lock table visits in share mode")
            self.standby.stop()
            stack.callback(self.standby.start)
            yield
