"""Somebody holds locks that an exporter would like to have."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg

from tests.harm.scene import Scenario, Scene


@contextmanager
def _user_table_locked(scene: Scene) -> Iterator[None]:
    with psycopg.connect(scene.server.conninfo()) as session:
        session.execute("lock table orders in access exclusive mode")
        yield


@contextmanager
def _alter_waiting(scene: Scene) -> Iterator[None]:
    """A reader holds the table, and an ALTER TABLE waits behind it: who comes later waits too."""
    with (
        psycopg.connect(scene.server.conninfo()) as reader,
        closing(psycopg.connect(scene.server.conninfo(), autocommit=True)) as writer,
    ):
        reader.execute("select count(*) from orders")
        writer.pgconn.send_query(b"alter table orders add column later int")
        scene.server.wait_until("select exists (select from pg_locks where not granted)")
        yield
        writer.cancel()


@contextmanager
def _ddl_open(scene: Scene) -> Iterator[None]:
    """A migration of 200 tables, not committed: many rows of the catalog and many locks."""
    with psycopg.connect(scene.server.conninfo()) as session:
        for number in range(200):
            session.execute(
                f"create table migrated_{number} (n serial primary key, note text unique)"
            )
        session.execute("alter table orders add column added int default 1")
        session.execute("truncate customers")
        session.execute("create index on orders (note)")
        yield
        session.rollback()


@contextmanager
def _vacuum_full_of_catalog(scene: Scene) -> Iterator[None]:
    """The lock that VACUUM FULL pg_class takes, held: almost nothing can be looked up."""
    with psycopg.connect(scene.server.conninfo()) as session:
        session.execute("lock table pg_catalog.pg_statistic in access exclusive mode")
        session.execute("lock table pg_catalog.pg_depend in access exclusive mode")
        yield


SCENARIOS = (
    Scenario("a user table is locked", _user_table_locked),
    Scenario("an ALTER TABLE waits behind a reader", _alter_waiting),
    Scenario("a migration with 200 new tables stays open", _ddl_open),
    Scenario("catalogs are locked", _vacuum_full_of_catalog, provoked="lock timeout"),
)
