"""What comes of a schema and of its disks when nobody looks after them."""

import contextlib
import threading
from collections.abc import Iterator

import psycopg
from psycopg import errors

from lab.cluster import PGVIGIL
from tests.faults.meanwhile import meanwhile
from tests.faults.stage import DATABASE, Stage
from tools.draw.clients import Clients, Work

SCHEMA = f"""
create table events (
  id bigint generated always as identity primary key, customer int references customers,
  kind int, at timestamptz default now(), note text);
insert into events (customer, kind, note)
select 1 + n % 20000, n % 7, 'event ' || n from generate_series(1, 400000) n;
create index events_at on events (at, id);
create index events_kind on events (kind, customer);
create index events_kind_customer on events (kind, customer, id);
create table addresses (mail text);
insert into addresses select 'somebody@example.com' from generate_series(1, 2000);
create publication everything for table addresses;
create table stock (id int primary key, held int) with (autovacuum_enabled = off);
insert into stock select n, n from generate_series(1, 300000) n;
delete from stock where id % 4 <> 0;
create table drafts (id int primary key, note text) with (autovacuum_enabled = off);
insert into drafts select n, 'draft' from generate_series(1, 5000) n;
create table invoices (at date not null) partition by range (at);
create table invoices_now partition of invoices
for values from ('2020-01-01') to ('tomorrow');
create table invoices_rest partition of invoices default;
insert into invoices select current_date + n from generate_series(2, 40) n;
create table visitors (at date not null) partition by range (at);
create table visitors_old partition of visitors for values from ('2020-01-01') to ('2021-01-01');
create table tickets (id smallint generated always as identity primary key);
create table letters (id int generated always as identity primary key);
grant select on sequence tickets_id_seq, letters_id_seq to {PGVIGIL.name};
select setval('tickets_id_seq', 31500);
select setval('letters_id_seq', 1400000000);
alter table items add constraint items_cents check (cents >= 0) not valid;
create trigger customers_same before update on customers
for each row execute function suppress_redundant_updates_trigger();
alter table customers disable trigger customers_same
"""

WORK: Work = (
    ("select count(*) from events where note = 'event ' || %s", 2),
    ("select note from (select * from events order by md5(note)) as e offset %s limit 1", 1),
    ("insert into events (customer, kind, note) select %s, 0, repeat('x', 200)"
     " from generate_series(1, 500)", 2),
    ("update visits set seen = seen + 1 where id <> %s", 1),
    ("update drafts set note = note || 'x' where id <> %s", 1),
)  # fmt: skip
"""Each reads, sorts or writes much."""

SLOWLY = "-c vacuum_cost_delay=100 -c vacuum_cost_limit=1 -c vacuum_cost_page_hit=100"
SORTING = (
    "declare sorted cursor for select n, repeat('x', 100) from generate_series(1, 300000) as n"
    " order by n desc"
)
SEEN = (
    'pg_table_bloat_bytes{relname="stock"}',
    'pg_index_duplicate_size_bytes{indexrelname="events_kind"}',
    'pg_ls_waldir_bytes{instance="primary"} > 6e7',
)
"""What the exporter is the last to see."""


@contextlib.contextmanager
def neglect(stage: Stage) -> Iterator[None]:
    """Indexes that serve nobody, keys that end, bloat, and a slot, a sort and a log that grow."""
    for statement in SCHEMA.split(";"):
        stage.execute(statement)
    with contextlib.suppress(errors.UniqueViolation):
        stage.execute("create unique index concurrently addresses_mail on addresses (mail)")
    if stage.major > 13:
        _detach_by_half(stage)
    stage.execute("vacuum analyze stock")
    stage.execute("analyze events, addresses, invoices, tickets, letters")
    stage.primary.set({"max_wal_size": "32MB", "wal_keep_size": 0, "work_mem": "64kB"})
    stage.execute("select pg_create_physical_replication_slot('forgotten', true)")
    conninfo = stage.primary.conninfo(dbname=DATABASE)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        sorting, old, vacuuming = (
            enter(stage.session()),
            enter(stage.session()),
            enter(stage.session(options=SLOWLY)),
        )
        sorting.execute(SORTING)
        sorting.execute("fetch sorted")
        # What it may still see, vacuum leaves where it is.
        old.execute("set transaction isolation level repeatable read")
        old.execute("select")
        vacuuming.autocommit = True
        vacuuming.pgconn.send_query(b"vacuum (disable_page_skipping) events")
        stack.callback(vacuuming.cancel_safe, timeout=5)
        enter(Clients(conninfo, WORK, 1))
        over = threading.Event()
        enter(meanwhile(over, lambda: _talk(stage, over)))
        for series in SEEN:
            stage.prometheus.wait_until(series)
        yield


def _detach_by_half(stage: Stage) -> None:
    """Somebody detaches a partition, another one reads it, and the first gives up."""
    with stage.session() as reading, contextlib.suppress(errors.QueryCanceled):
        reading.execute("select from visitors")
        login = stage.primary.conninfo(dbname=DATABASE, options="-c statement_timeout=2s")
        with contextlib.closing(psycopg.connect(login, autocommit=True)) as detaching:
            detaching.execute("alter table visitors detach partition visitors_old concurrently")


def _talk(stage: Stage, over: threading.Event) -> None:
    """Write much into the log, and WAL that nobody needs."""
    while not over.wait(1):
        stage.execute("do $$ begin raise log '%', repeat('x', 200000); end $$")
        stage.execute("select pg_logical_emit_message(false, 'neglect', repeat('x', 4000000))")
