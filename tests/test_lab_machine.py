"""The lab fills and slows down disks of its own, and has the kernel kill for memory."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import strain
from lab.disk import Disk

LIMITS = Path("/sys/fs/cgroup/blkio/blkio.throttle.read_iops_device")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "held").write_bytes(bytes(1 << 20))
    try:
        with Disk(folder, 32 << 20, files=1000) as disk:
            yield disk
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert list(folder.iterdir()) == []


def test_a_disk_is_filled_by_bytes_or_by_files_and_freed(disk: Disk) -> None:
    assert (disk.folder / "held").stat().st_size == 1 << 20
    before = os.statvfs(disk.folder)
    disk.fill(0.9)
    state = os.statvfs(disk.folder)
    assert 1 - state.f_bavail / state.f_blocks == pytest.approx(0.9, abs=0.01)
    disk.free()
    disk.fill_with_files(0.9)
    state = os.statvfs(disk.folder)
    assert 1 - state.f_ffree / state.f_files == pytest.approx(0.9, abs=0.01)
    disk.free()
    assert os.statvfs(disk.folder).f_ffree == before.f_ffree


@pytest.mark.skipif(not LIMITS.exists(), reason="needs control groups of version 1")
def test_a_slow_disk_reads_no_more_often_than_it_may(disk: Disk) -> None:
    os.sync()
    disk.slow_down(read_iops=20)
    disk.forget(disk.folder / "held")
    begun = time.monotonic()
    with (disk.folder / "held").open("rb", buffering=0) as file:
        for place in range(10):
            os.pread(file.fileno(), 4096, place * 65536)
    assert time.monotonic() - begun > 0.25


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_the_kernel_tells_that_it_killed_one() -> None:
    before = _killed()
    strain.have_one_killed()
    assert _killed() > before


def _killed() -> int:
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
