"""What the page tells of the archive, for each way in which WAL reaches it or does not."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from lab.catalogue import number, only, rows_of
from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.postgres import Server

SEGMENT = 1024 * 1024
WAITING = 3
"""WAL files that are finished once the archiver stands as it shall."""

WORKS, FAILS, NONE = "true", "false", ""
HANGS = "while test ! -e ../let_go; do sleep 0.02; done"
"""Until somebody makes that file; then it has succeeded."""


class Pair(NamedTuple):
    """A primary and its standby."""

    primary: Server
    standby: Server


@pytest.fixture(scope="module", params=[13, 18])
def pair(request: pytest.FixtureRequest, module_server: Callable[..., Server]) -> Pair:
    primary = module_server(
        request.param,
        initdb_options=["--wal-segsize=1"],
        autovacuum=False,
        archive_command=WORKS,
        wal_retrieve_retry_interval="100ms",
    )
    return Pair(primary, primary.standby())


@dataclass(frozen=True)
class Cell:
    """An archiver, and what the page says of it."""

    command: str
    mode: str = "on"
    where: str = "primary"
    succeeded_before: bool = True
    """Whether a file was archived since the statistics were reset."""
    off_at_last: bool = False
    """Whether archive_mode is turned off when all that has happened."""

    active: int = 1
    failing: int = 0
    destination: int = 1
    unarchived: tuple[int, int] | None = (WAITING, WAITING + 1)
    """In WAL files, from and below; None where it is not told."""
    ready: tuple[int, int] = (WAITING, WAITING + 1)
    """Files, from and below."""


NOTHING = (0, 1)
CELLS = {
    "fine": Cell(WORKS, unarchived=NOTHING, ready=NOTHING),
    "failing": Cell(FAILS, failing=1),
    "failing, and never has succeeded": Cell(
        FAILS, succeeded_before=False, failing=1, unarchived=None
    ),
    "hung": Cell(HANGS),
    # As after a crash, which loses the statistics: the ready files alone tell.
    "hung, and never has succeeded": Cell(HANGS, succeeded_before=False, unarchived=None),
    "without a command": Cell(NONE, destination=0),
    "without a command, and never has succeeded": Cell(
        NONE, succeeded_before=False, destination=0, unarchived=None
    ),
    "off": Cell(WORKS, off_at_last=True, active=0, destination=0, unarchived=None, ready=NOTHING),
    # The failure stays in the statistics and does not count; a server that stops ends a file more.
    "off, after it failed": Cell(
        FAILS,
        off_at_last=True,
        active=0,
        destination=0,
        unarchived=None,
        ready=(WAITING, WAITING + 2),
    ),
    "on, at a standby": Cell(
        FAILS, where="standby", succeeded_before=False, active=0, unarchived=None, ready=NOTHING
    ),
    "always, at a primary, failing": Cell(FAILS, mode="always", failing=1),
    "always, at a standby, fine": Cell(
        WORKS, mode="always", where="standby", unarchived=NOTHING, ready=NOTHING
    ),
    "always, at a standby, failing": Cell(FAILS, mode="always", where="standby", failing=1),
    "always, at a standby, hung": Cell(HANGS, mode="always", where="standby"),
    "always, at a standby, never has succeeded": Cell(
        FAILS, mode="always", where="standby", succeeded_before=False, failing=1, unarchived=None
    ),
}


def finish_files(pair: Pair, count: int) -> None:
    """End a number of WAL files, and have the standby know."""
    for _ in range(count):
        pair.primary.execute("select pg_logical_emit_message(false, 'lab', 'x'), pg_switch_wal()")
    # A standby sees that a file has ended when it gets something of the next.
    pair.primary.execute("select pg_logical_emit_message(true, 'lab', 'x')")
    ((now,),) = pair.primary.execute("select pg_current_wal_flush_lsn()")
    pair.standby.wait_until(f"select pg_last_wal_receive_lsn() >= '{now}'", 30)


def ready(server: Server) -> int:
    """The files that wait, as the file system has them."""
    return len(list(Path(server.data, "pg_wal/archive_status").glob("*.ready")))


def turn(server: Server, mode: str) -> None:
    """Give the archiver a mode; the server starts anew where it has another."""
    if server.execute("select current_setting('archive_mode')") != [(mode,)]:
        server.set({"archive_mode": mode})
        server.restart()


def archive_all(pair: Pair, server: Server) -> None:
    """Have the archiver work and nothing wait for it."""
    server.set({"archive_command": WORKS})
    Path(server.directory, "let_go").touch()
    end = time.monotonic() + 60
    while ready(server):
        assert time.monotonic() < end, server.log()[-2000:]
        finish_files(pair, 1)  # wakes an archiver that has given up for a minute
        time.sleep(0.1)
    Path(server.directory, "let_go").unlink()


@pytest.fixture
def made(pair: Pair, cell: Cell) -> Iterator[Server]:
    """The server of a cell, brought to where it shall be."""
    server: Server = getattr(pair, cell.where)
    turn(server, cell.mode)
    if server is pair.primary:
        pair.standby.wait_until("select exists (select from pg_stat_wal_receiver)", 30)
    archive_all(pair, server)
    server.execute("select pg_stat_reset_shared('archiver')")
    server.wait_until("select archived_count = 0 from pg_stat_archiver")
    if cell.succeeded_before:
        finish_files(pair, 1)
        server.wait_until("select archived_count > 0 from pg_stat_archiver", 30)
    server.set({"archive_command": cell.command})
    finish_files(pair, WAITING)
    if cell.failing or (cell.off_at_last and cell.command == FAILS):
        server.wait_until("select failed_count > 0 from pg_stat_archiver", 30)
    if cell.command == WORKS:
        server.wait_until(f"select archived_count > {WAITING} from pg_stat_archiver", 30)
    if cell.off_at_last:
        turn(server, "off")
    yield server
    Path(server.directory, "let_go").touch()


LONG = 1000
"""Seconds by which a file is made to look older than it is."""


def written(server: Server) -> int:
    """When WAL was last written, in seconds since the epoch."""
    files = [*Path(server.data, "pg_wal").glob("0*[0-9A-F]")]
    return max(int(file.stat().st_mtime) for file in files if len(file.name) == 24)


def status_files(server: Server, state: str) -> list[Path]:
    """The files that say of WAL that it is ready or done, the oldest first."""
    found = Path(server.data, "pg_wal/archive_status").glob(f"*.{state}")
    return sorted(file for file in found if len(file.stem) == 24)


def backdate(server: Server) -> float:
    """When the newest WAL that is archived ends, in seconds since the epoch.

    The files that tell are made to look older, for else that would be now.
    """
    then = time.time() - LONG
    for file in status_files(server, "ready")[:1] or status_files(server, "done"):
        os.utime(file, (then, then))
    return then


def look(server: Server) -> Page:
    """The page with what the background has found by now."""
    disable = "storage schema maintenance security extensions settings queries resources activity"
    environment = {"PGVIGIL_DSN": server.conninfo(**PGVIGIL.login), "PGVIGIL_DISABLE": disable}
    wanted = {"pg_archiving_ready_files", "pg_archiving_destination_set"}
    if server.execute(
        "select current_setting('archive_mode') = 'always' or"
        " current_setting('archive_mode') = 'on' and not pg_is_in_recovery()"
    )[0][0]:
        wanted.add("pg_archiving_recoverable_age_seconds")
    with Exporter(environment=environment) as exporter:
        end = time.monotonic() + 30
        while not wanted <= (page := exporter.scrape()).names:
            assert time.monotonic() < end, page.body
            time.sleep(0.05)
        return page


def value(page: Page, name: str) -> float | None:
    """What the page tells, None where it does not."""
    return page.value(name) if page.series(name) else None


@pytest.mark.parametrize("cell", CELLS.values(), ids=[*CELLS])
def test_an_archiver_is_told_as_it_is(made: Server, cell: Cell) -> None:
    saved = backdate(made) if cell.active else None
    before = written(made)
    page = look(made)
    after = written(made)
    ((archived, failed, last_archived, last_failed),) = made.execute(
        "select archived_count, failed_count, extract(epoch from last_archived_time),"
        " extract(epoch from last_failed_time) from pg_stat_archiver"
    )
    waiting = ready(made)

    assert value(page, "pg_archiving_active") == cell.active
    assert value(page, "pg_archiving_failing") == cell.failing
    assert value(page, "pg_archiving_destination_set") == cell.destination
    assert value(page, "pg_settings_archive_mode") == (not cell.off_at_last)

    # What is ready on disk says the same for every mode, whatever the statistics have forgotten.
    low, high = cell.ready
    assert low <= waiting < high
    assert value(page, "pg_archiving_ready_files") == waiting
    assert value(page, "pg_archiving_ready_bytes") == waiting * SEGMENT
    oldest = value(page, "pg_archiving_ready_oldest_seconds")
    if cell.active:
        assert oldest is not None
        assert (oldest >= LONG) == (oldest > 0) == (waiting > 0)
    else:  # nobody waits for what is still there
        assert oldest is None

    lost = value(page, "pg_archiving_recoverable_age_seconds")
    if saved is None:
        assert lost is None
    else:
        assert lost is not None
        assert before - saved - 1 <= lost <= after - saved + 1

    unarchived = value(page, "pg_archiving_unarchived_bytes")
    if cell.unarchived is None:
        assert unarchived is None
    else:
        low, high = cell.unarchived
        assert unarchived is not None
        assert low * SEGMENT <= unarchived < high * SEGMENT

    assert value(page, "pg_stat_archiver_archived_count_total") == archived
    assert (value(page, "pg_stat_archiver_failed_count_total") == 0) == (failed == 0)
    told = value(page, "pg_stat_archiver_last_archived_timestamp_seconds")
    assert told == (None if last_archived is None else pytest.approx(float(last_archived)))
    assert (last_archived is None) == (not cell.succeeded_before)
    told = value(page, "pg_stat_archiver_last_failed_timestamp_seconds")
    assert (told is None) == (last_failed is None)


def age(server: Server) -> float:
    return number(only(rows_of(server, "backup.recoverable")), "age")


def wait_until_all_is_archived(server: Server) -> None:
    server.wait_until(
        "select not exists (select from pg_ls_archive_statusdir() where name ~ 'ready$')", 30
    )


def test_what_would_be_lost_grows_only_while_something_is_written(pair: Pair) -> None:
    server = pair.primary
    turn(server, "on")
    archive_all(pair, server)
    server.set({"archive_command": HANGS})
    try:
        finish_files(pair, 2)
        saved = backdate(server)
        before, stood = written(server), age(server)
        # What is last written may be so a second before the files are made older.
        last = written(server)
        assert before - saved - 1 <= stood <= last - saved + 1
        while time.time() < last + 2.5:
            time.sleep(0.1)
        later = age(server)
        if written(server) == before:  # and not by the server on its own account
            assert later == stood
        server.execute("select pg_logical_emit_message(true, 'lab', 'x')")
        assert age(server) >= stood + 2
    finally:
        archive_all(pair, server)
    finish_files(pair, 1)
    wait_until_all_is_archived(server)
    assert age(server) < LONG


def test_what_a_checkpoint_has_removed_is_known_from_the_statistics(pair: Pair) -> None:
    server = pair.primary
    turn(server, "on")
    archive_all(pair, server)
    finish_files(pair, 1)
    wait_until_all_is_archived(server)
    newest = status_files(server, "done")[-1].stem
    server.wait_until(f"select last_archived_wal = '{newest}' from pg_stat_archiver")
    for file in status_files(server, "done"):
        file.unlink()  # as a checkpoint does when nobody needs the file any more

    since = "select extract(epoch from last_archived_time)::float8 from pg_stat_archiver"
    ((archived,),) = server.execute(since)
    ahead = time.time() + LONG
    file = max(Path(server.data, "pg_wal").glob("0*[0-9A-F]"), key=lambda f: f.stat().st_mtime)
    os.utime(file, (ahead, ahead))
    assert age(server) == pytest.approx(ahead - archived, abs=2)

    server.execute("select pg_stat_reset_shared('archiver')")
    server.wait_until("select archived_count = 0 from pg_stat_archiver")
    ((reset,),) = server.execute(since.replace("last_archived_time", "stats_reset"))
    assert age(server) == pytest.approx(ahead - reset, abs=2)
    os.utime(file)
