"""Reads what a real Barman says of its servers, well and ill, through the exporter."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.barman import RELEASES, Barman
from lab.exporter import Page
from lab.postgres import Server
from lab.tool import as_account, exported

QUERIES = ("backup.barman_backups", "backup.barman_runs", "backup.barman_checks")


@pytest.fixture(scope="module", params=zip((13, 15), RELEASES, strict=True), ids=RELEASES)
def barman(request: pytest.FixtureRequest, module_server: Callable[..., Server]) -> Barman:
    """Each release, for a server that it knows; in CI it must be had."""
    major, release = request.param
    try:
        return Barman(module_server(major, autovacuum=False), release)
    except RuntimeError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def seen(barman: Barman, directory: Path, *words: str) -> Page:
    with exported(directory, "barman", *as_account(barman.words()), *words) as page:
        return page(*QUERIES)


def have_a_backup(barman: Barman) -> None:
    if not list_backups(barman):
        barman.backup()


def list_backups(barman: Barman) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(
        barman.run("--format", "json", "list-backups", "main")
    )["main"]
    return listed


def test_a_server_without_a_backup_is_told_and_then_all_of_its_first(
    barman: Barman, tmp_path: Path
) -> None:
    before = seen(barman, tmp_path)
    assert before.failed() == set()
    assert before.value("barman_up") == 1
    assert before.value("barman_server_backups", server="main") == 0
    assert before.series("barman_backup_backups") == {}
    assert before.series("barman_server_newest_backup_duration_seconds") == {}

    barman.backup()
    (backup,) = list_backups(barman)
    run = json.loads(barman.run("--format", "json", "show-backup", "main", "latest"))["main"]
    times = run["base_backup_information"]
    after = seen(barman, tmp_path)
    assert after.failed() == set()
    for name, value in {
        "barman_server_backups": 1,
        "barman_server_waiting_backups": 0,
        "barman_server_failed_backups": 0,
        "barman_server_newest_backup_duration_seconds": int(times["end_time_timestamp"])
        - int(times["begin_time_timestamp"]),
    }.items():
        assert after.value(name, server="main") == value, name
    kind = "full" if barman.release == "3.19" else ""  # which the older one does not tell
    for name, value in {
        "backups": 1,
        "newest_end_timestamp_seconds": int(backup["end_time_timestamp"]),
        "oldest_end_timestamp_seconds": int(backup["end_time_timestamp"]),
        "newest_size_bytes": backup["size_bytes"],
        "newest_wal_size_bytes": backup["wal_size_bytes"],
    }.items():
        assert after.value(f"barman_backup_{name}", server="main", type=kind) == value, name
    checks = after.series("barman_check_ok")
    assert len(checks) == len(json.loads(barman.run("--format", "json", "check", "main"))["main"])
    assert set(checks.values()) == {1}


def test_a_backup_that_failed_is_counted_apart(barman: Barman, tmp_path: Path) -> None:
    have_a_backup(barman)
    info = max((barman.config.parent / "home" / "main").rglob("*backup.info"))
    kept = info.read_text()
    try:
        info.write_text(kept.replace("status=DONE", "status=FAILED"))
        shown = seen(barman, tmp_path)
        assert {"FAILED"} == {backup["status"] for backup in list_backups(barman)}
    finally:
        info.write_text(kept)
    assert shown.value("barman_server_failed_backups", server="main") == 1
    assert shown.value("barman_check_ok", server="main", check="failed_backups") == 0
    assert shown.value("barman_server_backups", server="main") == 0
    assert shown.series("barman_backup_newest_end_timestamp_seconds") == {}


def test_a_server_that_is_down_fails_its_checks_and_keeps_its_backups(
    barman: Barman, tmp_path: Path
) -> None:
    have_a_backup(barman)
    barman.server.stop()
    try:
        shown = seen(barman, tmp_path)
    finally:
        barman.server.start()
    assert shown.failed() == set()
    assert shown.value("barman_check_ok", server="main", check="postgresql") == 0
    assert shown.value("barman_server_backups", server="main") >= 1


def test_a_configuration_that_is_wrong_fails_with_barmans_words(
    barman: Barman, tmp_path: Path
) -> None:
    (tmp_path / "barman.conf").write_text("[barman]\nbarman_user = nobody-at-all\n")
    shown = seen(barman, tmp_path, "-c", f"{tmp_path}/barman.conf")
    assert shown.value("barman_up") == 1
    assert shown.failed() == {*QUERIES, "backup.barman_servers"}
    assert shown.series("barman_server_backups") == {}
