"""Whether WAL reaches the archive is told for every way in which it may not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg import pq

from lab.catalogue import number, only, refusal_of, rows_of
from lab.cluster import BARE
from lab.postgres import Server

FreshServer = Callable[..., Server]

SEGMENT = 16 * 1024 * 1024


def switch(server: Server) -> None:
    """End the WAL file being written, so that there is one to archive."""
    server.execute("select pg_logical_emit_message(false, 'lab', 'x'), pg_switch_wal()")


def ready(server: Server) -> int:
    """The files that wait, as the file system has them."""
    return len(list(Path(server.data, "pg_wal/archive_status").glob("*.ready")))


@pytest.mark.parametrize("major", [13, 18])
def test_an_archiver_is_told_apart_that_fails_works_hangs_or_is_off(
    fresh_server: FreshServer, major: int
) -> None:
    server = fresh_server(major, archive_mode=True, archive_command="false", autovacuum=False)

    switch(server)
    server.wait_until("select failed_count > 0 from pg_stat_archiver")
    row = only(rows_of(server, "backup.archiver"))
    assert (row["active"], row["failing"]) == (True, True)
    assert row["last_archived"] is None
    assert row["unarchived"] is None
    waiting = only(rows_of(server, "backup.archive_status"))
    assert waiting["ready"] == ready(server) >= 1
    assert waiting["ready_bytes"] == ready(server) * SEGMENT
    assert number(waiting, "oldest") > 0

    server.set({"archive_command": "true"})
    server.wait_until(
        "select last_archived_time > last_failed_time from pg_stat_archiver"
        " where not exists (select from pg_ls_archive_statusdir() where name ~ 'ready$')",
        timeout=30,
    )
    row = only(rows_of(server, "backup.archiver"))
    assert (row["active"], row["failing"]) == (True, False)
    assert number(row, "archived_count") >= 1
    assert 0 <= number(row, "unarchived") < SEGMENT
    waiting = only(rows_of(server, "backup.archive_status"))
    assert (waiting["ready"], waiting["ready_bytes"], waiting["oldest"]) == (0, 0, 0)

    # It hangs: no failure is counted, and yet it shows.
    server.set({"archive_command": "sleep 600"})
    for _ in range(3):
        switch(server)
    row = only(rows_of(server, "backup.archiver"))
    assert row["failing"] is False
    assert 3 * SEGMENT <= number(row, "unarchived") < 4 * SEGMENT
    assert only(rows_of(server, "backup.archive_status"))["ready"] == ready(server) == 3

    server.set({"archive_command": "true", "archive_mode": False})
    server.stop("immediate")
    server.start()
    row = only(rows_of(server, "backup.archiver"))
    assert (row["active"], row["failing"], row["unarchived"]) == (False, False, None)


@contextmanager
def base_backup(server: Server) -> Iterator[None]:
    """Have a base backup taken so slowly that it is not over before we are."""
    connection = pq.PGconn.connect(server.conninfo(replication="true").encode())
    assert connection.status == pq.ConnStatus.OK, connection.error_message
    options = "(PROGRESS, MAX_RATE 32)" if server.major >= 15 else "PROGRESS MAX_RATE 32 NOWAIT"
    connection.send_query(f"BASE_BACKUP {options}".encode())
    try:
        server.wait_until("select backup_streamed > 0 from pg_stat_progress_basebackup", timeout=60)
        yield
    finally:
        connection.finish()


@pytest.mark.parametrize("major", [13, 18])
def test_a_base_backup_shows_how_far_it_is(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major)
    assert rows_of(server, "backup.basebackup") == []
    server.execute("checkpoint")

    with base_backup(server):
        row = only(rows_of(server, "backup.basebackup"))

    assert (row["phase"], row["processes"]) == ("streaming database files", 1)
    assert (row["tablespaces"], row["tablespaces_streamed"]) == (1, 0)
    size = sum(p.stat().st_size for p in server.data.rglob("*") if p.is_file())
    assert 0 < number(row, "streamed") < number(row, "expected") < size
    assert number(row, "age") > 0


@pytest.mark.parametrize("major", [17, 18])
def test_the_summarizer_of_wal_follows(fresh_server: FreshServer, major: int) -> None:
    server = fresh_server(major, summarize_wal=True, autovacuum=False)
    server.execute("create table t as select generate_series(1, 1000)")
    server.execute("checkpoint")
    ((redo,),) = server.execute(
        "select pg_wal_lsn_diff(redo_lsn, '0/0') from pg_control_checkpoint()"
    )
    server.wait_until(
        "select summarized_lsn >= (select redo_lsn from pg_control_checkpoint())"
        " from pg_get_wal_summarizer_state()",
        timeout=30,
    )

    row = only(rows_of(server, "backup.wal_summarizer"))

    assert row["up"] is True
    assert number(row, "pending") >= number(row, "summarized") >= float(redo)
    server.set({"summarize_wal": False})
    assert refusal_of(server, "backup.wal_summarizer") is not None


@pytest.mark.parametrize("major", [13, 14])
def test_an_exclusive_backup_that_nobody_ended_is_told(server: Server) -> None:
    none = {"in_backup": False, "started": None}
    assert only(rows_of(server, "backup.exclusive_backup", role=BARE)) == none
    server.execute("select pg_start_backup('lab', true, true)")
    try:
        row = only(rows_of(server, "backup.exclusive_backup", role=BARE))
        ((now,),) = server.execute("select extract(epoch from now())")
    finally:
        server.execute("select pg_stop_backup(true, false)")

    assert row["in_backup"] is True
    assert 0 <= float(now) - number(row, "started") < 60
    assert only(rows_of(server, "backup.exclusive_backup", role=BARE)) == none
