"""Shows that no query waits for a lock on a user's relation, whatever lock somebody holds."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest

from lab.catalogue import asking
from lab.cluster import PGVIGIL
from lab.hostile import alter_waiting, every_relation_locked, populate
from lab.postgres import Server

TABLES = (b"parted", b"parted_old_0", b"spelled", b"numbered", b"unsure", b"wide")
"""A partitioned one, a partition, with sequences, with heirs, with a TOAST table."""


def unanswered(server: Server, databases: Sequence[str]) -> dict[str, str]:
    """The queries that failed, by name and database, as our own role and as a superuser."""
    found: dict[str, str] = {}
    for role in (PGVIGIL, None):
        for database in ("postgres", *databases):
            with asking(server, dbname=database, role=role) as asker:
                for name, outcome in asker.ask().items():
                    if outcome.failure:
                        found[f"{name} in {database!r}"] = outcome.failure.detail
    return found


def ours(server: Server, since: int) -> list[str]:
    """The errors in the log that we have caused; the lab's own are meant."""
    return [line for line in server.errors_in_log(since) if " lab ERROR" not in line]


@pytest.mark.parametrize("major", [13, 18])
def test_every_query_answers_while_every_relation_is_locked(
    fresh_server: Callable[..., Server], major: int
) -> None:
    server = fresh_server(major)
    databases = populate(server)
    begin = server.log_position()

    with every_relation_locked(server) as held:
        assert held > 500
        assert unanswered(server, databases) == {}

    assert ours(server, begin) == []


@pytest.mark.parametrize("major", [13, 18])
def test_every_query_answers_while_alters_wait_behind_readers(
    fresh_server: Callable[..., Server], major: int
) -> None:
    server = fresh_server(major)
    databases = populate(server)
    begin = server.log_position()

    with ExitStack() as stack:
        for database in databases:
            for table in TABLES:
                stack.enter_context(alter_waiting(server, database, b"public." + table))
        assert unanswered(server, databases) == {}

    assert ours(server, begin) == []
