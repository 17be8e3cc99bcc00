"""What the dashboards are shown of: a busy pair that is well, and a morning on which it is not."""

import contextlib
import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from lab import pgbouncer, walg
from lab.barman import Barman
from lab.exporter import Exporter
from lab.pgbouncer import CLIENT, STATS
from lab.postgres import Server
from lab.tool import as_account
from tests.faults.pieces.repository import Repository
from tests.faults.stage import DATABASE, Stage, printed
from tools.draw.clients import Clients, Work
from tools.draw.neglect import neglect

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

WORK: Work = (
    ("select name from customers where id = %s", 12),
    ("select sum(cents) from items where customer = %s", 8),
    ("update visits set seen = seen + 1 where id = %s", 5),
    ("insert into orders (note) values ('order ' || %s)", 3),
    ("select city, count(*) from customers where id > %s group by city order by 2 desc limit 5", 4),
    ("select c.city, sum(i.cents) from items i join customers c on c.id = i.customer"
     " where c.id %% 100 = %s %% 100 group by c.city", 4),
)  # fmt: skip
POOLED: Work = (("select pg_sleep(0.00001 * %s)", 1),)
REPORTS: Work = (("select pg_sleep(0.003 * %s)", 1),)
"""What is sent through the pooler, and by those who want a report on Monday."""

POOLER = """
pool_mode = transaction
default_pool_size = 5
max_client_conn = 30
max_db_connections = 10
"""

CLIENTS = 4

SLOW = ("schema", "storage")
"""Dashboards of what goes wrong over weeks."""

BARMAN = 15
"""The newest PostgreSQL of which the lab has what Barman needs."""


class Shop(Stage):
    """A pair of servers under a load that is worth a picture, and a PgBouncer."""

    def __init__(self, major: int, saved: bool) -> None:
        """`saved` has pgBackRest, Barman and a stand-in for WAL-G beside them."""
        super().__init__(major)
        self._saved = saved
        self.scene = self.scene._replace(settings={"logging_collector": True})

    def furnish(self) -> None:
        """Put up the shop and what a careful administrator has."""
        for statement in SCHEMA.split(";"):
            self.execute(statement)
        self.execute(printed("grants", "--bloat", "--sequences"))
        self.primary.execute(printed("grants", "--security", "--host"))
        self.primary.execute(
            "insert into pgvigil.record (kind, place, started, ended, ok, size_bytes, window_start)"
            " values ('backup', 'here', now() - interval '20 s', now(), true, 83e6,"
            " now() - interval '8 days')"
        )
        enter = self._stack.enter_context
        enter(Clients(self.primary.conninfo(dbname=DATABASE), WORK, CLIENTS))
        enter(self._reader())
        program = pgbouncer.fetched("sid")
        self._pooler = enter(pgbouncer.running(self.primary, POOLER, program, as_role=CLIENT))
        enter(self._callers(POOLED, CLIENTS))
        if self._saved:
            self._save()

    def _callers(self, work: Work, count: int) -> Clients:
        """Some who come through the pooler."""
        return Clients(make_conninfo("", **self._pooler.login()), work, count)

    def _save(self) -> None:
        """Have each tool take its backups."""
        self._repository = Repository(self, age=26 * 3600)
        self._repository.tool.backup("diff")
        self._repository.tool.backup("incr")
        self.mind_archive_timeout()
        self._elsewhere = Server(BARMAN)
        self._stack.callback(self._elsewhere.destroy)
        self._elsewhere.start()
        self._barman = Barman(self._elsewhere, "3.19")
        self._barman.backup()
        walg.stand_in(self.directory / "wal-g")

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
        targets = told["targets"]
        for of in targets.values():
            of["enable"] = ["host", "queries.texts"]
            of["objectives"] |= {
                "STO-1": {"capacity_bytes": {"page": 1e9, "ticket": 1e9}},
                # What nobody used for a week was not used for a minute here.
                "IDX-1": {"statistics_seconds": {"finding": 60}},
            }
        console = {**self._pooler.login(STATS), "dbname": "pgbouncer"}
        others = {"pooler": {"kind": "pgbouncer", "connection": console}}
        if self._saved:
            self._repository.configure(told)
            barman = as_account(self._barman.words())
            others["barman"] = {"kind": "barman", "command": barman}
            others["wal-g"] = {"kind": "wal-g", "command": [str(self.directory / "wal-g")]}
        for name, of in others.items():
            targets[name] = {"objectives": targets["primary"]["objectives"], **of}
        for of in targets.values():
            of.setdefault("labels", {})["cluster"] = "shop"
        return told

    def _exporter(self, port: int | None = None) -> Exporter:
        exporter = super()._exporter(port)
        own = {"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"instance": "exporter"}}
        self.jobs = [{"job_name": "own", "static_configs": [own]}]
        return exporter

    def faults(
        self, words: Collection[str]
    ) -> Iterator[tuple[AbstractContextManager[None], set[str]]]:
        """What comes over it, one after the other, and the dashboards that shall tell of it."""
        slow = {*words} & {*SLOW}
        if {*words} - slow:
            yield self.monday(), {*words} - slow
        if slow:
            yield neglect(self), slow

    @contextlib.contextmanager
    def monday(self) -> Iterator[None]:
        """Somebody locks a table and is idle, clients wait for it, and the standby is away.

        WAL is not archived any more, a backup has failed, and the pooler has too few connections.
        """
        conninfo = self.primary.conninfo(dbname=DATABASE)
        self.record("backup", age="1 second", ok=False)
        self.primary.set({"archive_command": "false"})
        with contextlib.ExitStack() as stack:
            # They wait for the lock, so it must go before they are waited for.
            stack.enter_context(Clients(conninfo, WORK, 12))
            stack.enter_context(self._callers(REPORTS, 12))
            if self._saved:
                self._elsewhere.stop()
                second = self._repository.tool.repository(2)
                gone = second.rename(second.with_name("gone"))
                stack.callback(gone.rename, second)
            lunch = stack.enter_context(self.session())
            lunch.execute("lock table visits in share mode")
            self.standby.stop()
            stack.callback(self.standby.start)
            yield
