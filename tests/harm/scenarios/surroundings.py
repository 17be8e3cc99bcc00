"""What a server stands on gives way: its clock, its disk."""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg

from lab.clock import Clock
from lab.small_disk import SmallDisk
from tests.harm.scene import Scenario, Scene, UnplayableError

HOUR = 3600

_AGE = re.compile(
    "^pg_(?!settings).*(age|oldest|longest|lag|duration|delay|silence)(_\\w+)?_seconds$"
)
_NO_AGE = re.compile("timestamp|_total$|_bucket$|_sum$")
_ABSURD = 2 * HOUR
"""Seconds of age that nothing on a server of a few minutes can have, even by a clock that is an
hour off."""

_SPARE = 24 << 20
"""Bytes of a small disk that are free at first: what a server writes in a minute of peace."""


def _movable_clock(scene: Scene) -> None:
    try:
        clock = scene.keep(Clock())
    except RuntimeError as error:
        raise UnplayableError(str(error)) from None
    if scene.server.binaries.source == "docker":
        raise UnplayableError("a container does not have libfaketime")
    scene.notes["clock"] = clock
    scene.server.environment |= clock.environment
    scene.server.restart()


@contextmanager
def _clock_moved(scene: Scene) -> Iterator[None]:
    """An hour forward, and back beyond where it was; somebody sits in a transaction meanwhile."""
    clock = scene.notes["clock"]
    with (
        psycopg.connect(scene.server.conninfo()) as holder,
        closing(psycopg.connect(scene.server.conninfo(), autocommit=True)) as waiter,
    ):
        holder.execute("lock table orders in access exclusive mode")
        waiter.pgconn.send_query(b"select count(*) from orders")
        scene.server.wait_until("select exists (select from pg_locks where not granted)")
        for hours in (1, -1, 0, 1):
            clock.move(hours * HOUR)
            scene.scrape()
        clock.move(-HOUR)
        yield
        clock.move(0)
        waiter.cancel()


def _ages(scene: Scene) -> Iterable[str]:
    for answer in scene.during:
        for (name, _), age in answer.page.samples.items() if answer.page else ():
            if _AGE.search(name) and not _NO_AGE.search(name) and not 0 <= age < _ABSURD:
                yield f"{name} is {age:.0f}"


@contextmanager
def _on_small_disk(scene: Scene, folder: Path) -> Iterator[None]:
    """A folder of the stopped server moves to a small disk; at the end all is lost."""
    with SmallDisk(folder, _SPARE) as disk:
        scene.notes["disk"] = disk
        try:
            yield
        finally:
            if scene.server.running:
                scene.server.stop("immediate")


def _move_to_small_disk(scene: Scene, folder: Path) -> None:
    try:
        scene.keep(_on_small_disk(scene, folder))
    except RuntimeError as error:
        raise UnplayableError(str(error)) from None
    scene.server.start()


def _small_data(scene: Scene) -> None:
    """All but WAL, without which no server stays up."""
    scene.server.execute("create table filler (note text)")
    scene.server.stop()
    wal, elsewhere = scene.server.data / "pg_wal", scene.server.directory / "wal"
    wal.rename(elsewhere)
    wal.symlink_to(elsewhere)
    _move_to_small_disk(scene, scene.server.data)


def _small_wal(scene: Scene) -> None:
    scene.server.execute("create table filler (note text)")
    scene.server.stop()
    _move_to_small_disk(scene, scene.server.data / "pg_wal")


@contextmanager
def _data_full(scene: Scene) -> Iterator[None]:
    disk = scene.notes["disk"]
    disk.fill()
    _write_until_it_fails(scene)
    yield
    _write_until_it_fails(scene)
    disk.free()


@contextmanager
def _wal_full(scene: Scene) -> Iterator[None]:
    """Who writes brings the server down, and it does not come up again."""
    disk = scene.notes["disk"]
    disk.fill()
    _write_until_it_fails(scene)
    end = time.monotonic() + 60
    while scene.server.running:
        assert time.monotonic() < end, "the server goes on without a disk"
        time.sleep(0.05)
    yield
    disk.free()
    scene.server.start()


def _write_until_it_fails(scene: Scene) -> None:
    rows = "insert into filler select repeat('x', 1000) from generate_series(1, 5000)"
    with suppress(psycopg.errors.DiskFull):
        for _ in range(100):
            scene.server.execute(rows)
        raise AssertionError("the disk is not full")


def _spilled(scene: Scene) -> Iterable[str]:
    for line in scene.log_of_role():
        if "temporary file" in line:
            yield f"it sorts on a full disk: {line[-120:]}"


SCENARIOS = (
    Scenario(
        "the server's clock jumps an hour forward and back",
        _clock_moved,
        before=_movable_clock,
        truth=_ages,
    ),
    Scenario(
        "the server's disk is full",
        _data_full,
        before=_small_data,
        truth=_spilled,
        settings={"log_temp_files": 0},
    ),
    Scenario(
        "the disk of the server's WAL is full",
        _wal_full,
        "down",
        before=_small_wal,
        provoked="the database system is",
        # A crash loses the statistics, and what has not happened since is not told.
        concerned=lambda series: series[0].startswith("pg_stat_io_"),
    ),
)
