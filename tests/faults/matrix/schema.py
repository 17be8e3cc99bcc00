"""What tables and sequences come to with time."""

import contextlib
from collections.abc import Iterator
from functools import partial

from lab.cluster import PGVIGIL
from tests.faults.fault import Alert, Fault
from tests.faults.stage import DATABASE, Stage

HIGHEST = 32767
"""Of the numbers that a column of two bytes holds."""


@contextlib.contextmanager
def _numbers_used(stage: Stage, share: float) -> Iterator[None]:
    """A table's key was made too small."""
    stage.execute(
        "create table numbered (id smallint generated always as identity primary key);"
        f"grant select on sequence numbered_id_seq to {PGVIGIL.name};"
        f"select setval('numbered_id_seq', {int(share * HIGHEST)}); analyze numbered"
    )
    yield
    stage.execute("alter table numbered alter id type bigint")
    stage.prometheus.wait_until('absent(pg_sequences_used_ratio{sequencename="numbered_id_seq"})')
    stage.execute("drop table numbered")


@contextlib.contextmanager
def _partition_missing(stage: Stage) -> Iterator[None]:
    """Nobody has made the partition that comes after today's."""
    ((today, tomorrow, later),) = stage.execute(
        "select current_date - 1, current_date + 2, current_date + 30"
    )
    stage.execute(
        "create table monthly (at timestamptz primary key) partition by range (at);"
        "create table monthly_now partition of monthly"
        f" for values from ('{today}') to ('{tomorrow}');"
        "analyze monthly"
    )
    yield
    stage.execute(
        "create table monthly_next partition of monthly"
        f" for values from ('{tomorrow}') to ('{later}')"
    )
    stage.prometheus.wait_until('pg_partitioned_table_next_missing{relname="monthly"} == 0')
    stage.execute("drop table monthly")


@contextlib.contextmanager
def _default_filled(stage: Stage) -> Iterator[None]:
    """Rows come for which there is no partition of their own."""
    stage.execute(
        "create table regional (region text primary key) partition by list (region);"
        "create table regional_other partition of regional default;"
        "insert into regional values ('north'), ('south'); analyze regional"
    )
    yield
    stage.execute("delete from regional")
    stage.execute("vacuum analyze regional")
    stage.prometheus.wait_until('pg_partitioned_table_default_rows{relname="regional"} == 0')
    stage.execute("drop table regional")


_OF_SHOP = (("datname", DATABASE),)

FAULTS = (
    Fault(
        "a sequence has used up four fifths of its numbers",
        partial(_numbers_used, share=0.8),
        (Alert("SequenceRunsOut", "ticket", "primary", _OF_SHOP),),
    ),
    Fault(
        "a sequence has used up nearly all of its numbers",
        partial(_numbers_used, share=0.95),
        (Alert("SequenceRunsOut", "page", "primary", _OF_SHOP),),
        also=("SequenceRunsOut",),
    ),
    Fault(
        "nobody makes the next partition",
        _partition_missing,
        (Alert("PartitionMissing", "ticket", "primary", (*_OF_SHOP, ("relname", "monthly"))),),
    ),
    Fault(
        "rows come for which there is no partition",
        _default_filled,
        (Alert("DefaultPartitionFills", "ticket", "primary", _OF_SHOP),),
    ),
)
