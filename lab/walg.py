"""Answers as WAL-G does, by what its sources say, for it cannot be had here."""

import json
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path

VERSION = "wal-g version v3.0.5\t5d3a5b4\t2025.01.13_11:10:33\tPostgreSQL"
NIGHTS = 8


def stand_in(program: Path) -> None:
    """Write a program that tells of a storage with a full backup a week ago and deltas since."""
    backups = [_backup(night) for night in range(NIGHTS)]
    timeline = {
        "id": 1,
        "parent_id": 0,
        "switch_point_lsn": 0,
        "start_segment": _segment(0),
        "end_segment": _segment(NIGHTS),
        "segments_count": 16 * NIGHTS + 1,
        "missing_segments": [],
        "backups": backups,
        "segment_range_size": 16 * NIGHTS + 1,
        "status": "OK",
    }
    program.write_text(
        f'#!/bin/sh\ncase "$*" in\n--version) printf "%b" {shlex.quote(VERSION)};;\n'
        f"backup-list*) cat <<'END'\n{json.dumps(backups)}\nEND\n;;\n"
        f"*) cat <<'END'\n{json.dumps([timeline])}\nEND\n;;\nesac\n"
    )
    program.chmod(0o755)


def _segment(night: int) -> str:
    return f"00000001{0:08X}{16 * night + 2:08X}"


def _backup(night: int) -> dict[str, object]:
    begun = datetime.now(UTC) - timedelta(days=NIGHTS - 1 - night, minutes=20)
    took = timedelta(minutes=3 if night else 12)
    size = 40_000_000 if night else 900_000_000
    return {
        "backup_name": f"base_{_segment(night)}" + (f"_D_{_segment(night - 1)}" if night else ""),
        "time": f"{begun + took:%Y-%m-%dT%H:%M:%SZ}",
        "wal_file_name": _segment(night),
        "storage_name": "default",
        "start_time": f"{begun:%Y-%m-%dT%H:%M:%SZ}",
        "finish_time": f"{begun + took:%Y-%m-%dT%H:%M:%SZ}",
        "is_permanent": False,
        "uncompressed_size": size,
        "compressed_size": size // 4,
    }
