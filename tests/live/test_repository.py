"""Reads what a real pgBackRest says of its repositories, well and ill, through the exporter."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import basebackup, pgbackrest, processes
from lab.exporter import Exporter
from lab.pgbackrest import PgBackRest
from lab.postgres import Server
from lab.tool import as_account, exported


def program(source: str) -> str:
    """pgBackRest from somewhere, or the test is skipped; in CI it must be had."""
    try:
        return pgbackrest.program(source)
    except RuntimeError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[(13, "installed"), (18, "sid")], ids=lambda p: str(p[1]))
def tool(request: pytest.FixtureRequest, module_server: Callable[..., Server]) -> PgBackRest:
    major, source = request.param
    found = program(source)
    made = PgBackRest(module_server(major, autovacuum=False), found)
    made.run("stanza-create")
    made.server.execute("create table t as select generate_series(1, 1000) as one")
    for kind in ("full", "diff", "incr"):
        made.backup(kind)
    basebackup.archive_all(made.server)
    return made


def command(tool: PgBackRest) -> list[str]:
    """How the exporter runs it; newer ones refuse to be run by root."""
    return as_account([tool.program, f"--config={tool.config}"])


def test_all_that_info_tells_is_told(tool: PgBackRest, tmp_path: Path) -> None:
    (told,) = json.loads(tool.run("--output=json", "info"))
    with exported(tmp_path, "pgbackrest", *command(tool)) as page:
        shown = page("backup.pgbackrest_archives")
    assert shown.failed() == set()
    assert shown.value("pgbackrest_up") == 1
    assert shown.value("pgbackrest_stanza_status", stanza="main") == told["status"]["code"] == 4
    assert shown.value("pgbackrest_stanza_backup_running", stanza="main") == 0
    # The second place has all the WAL and not one backup.
    assert shown.value("pgbackrest_repo_status", stanza="main", repo="1") == 0
    assert shown.value("pgbackrest_repo_status", stanza="main", repo="2") == 2
    assert [backup["type"] for backup in told["backup"]] == ["full", "diff", "incr"]
    for backup in told["backup"]:
        labels = {"stanza": "main", "repo": "1", "type": backup["type"]}
        for name, value in {
            "backups": 1,
            "erroneous": 0,
            "newest_stop_timestamp_seconds": backup["timestamp"]["stop"],
            "oldest_stop_timestamp_seconds": backup["timestamp"]["stop"],
            "newest_duration_seconds": backup["timestamp"]["stop"] - backup["timestamp"]["start"],
            "newest_size_bytes": backup["info"]["size"],
            "newest_delta_bytes": backup["info"]["delta"],
            "newest_repo_delta_bytes": backup["info"]["repository"]["delta"],
        }.items():
            assert shown.value(f"pgbackrest_backup_{name}", **labels) == value, name
    archived = tool.server.execute("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint")[
        0
    ][0]
    newest = shown.value("pgbackrest_archive_max_lsn_bytes", stanza="main", repo="2")
    assert newest is not None
    assert 0 <= archived - newest <= 3 * (16 << 20)
    assert len(shown.series("pgbackrest_archive_max_lsn_bytes")) == 2


def test_a_stanza_that_no_repository_has_is_told(tool: PgBackRest, tmp_path: Path) -> None:
    with exported(tmp_path, "pgbackrest", *command(tool), "--stanza=other") as page:
        shown = page("backup.pgbackrest_stanzas")
    assert shown.value("pgbackrest_up") == 1
    assert shown.value("pgbackrest_stanza_status", stanza="other") == 1
    assert shown.series("pgbackrest_backup_backups") == {}


def test_a_repository_that_cannot_be_read_is_told_apart(tool: PgBackRest, tmp_path: Path) -> None:
    place = tool.repository(1) / "backup" / "main"
    kept = {path: path.read_bytes() for path in place.glob("backup.info*")}
    for path in kept:
        path.write_bytes(b"damage")
    try:
        with exported(tmp_path, "pgbackrest", *command(tool)) as page:
            shown = page("backup.pgbackrest_stanzas")
        assert shown.value("pgbackrest_repo_status", stanza="main", repo="1") == 99
        assert shown.value("pgbackrest_repo_status", stanza="main", repo="2") == 2
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_a_command_that_is_missing_or_another_is_down(tmp_path: Path) -> None:
    for words, reason in ((["/nowhere/pgbackrest"], "other"), (["true"], "wrong_kind")):
        with (
            exported(tmp_path, "pgbackrest", *words),
            Exporter("--config", f"{tmp_path}/pgvigil.yml") as exporter,
        ):
            shown = exporter.scrape()
        assert shown.value("pgbackrest_up") == 0
        assert shown.value("pgbackrest_down_reason", reason=reason) == 1


@pytest.mark.parametrize(
    ("does", "success"),
    [
        ("sleep 600", 0),
        ("yes x", 0),
        ("echo '{'", 0),
        ("echo '[1]'", 0),
        ("echo ERROR: broken >&2; exit 5", 0),
        ("echo '[]'", 1),
    ],
)
def test_a_command_that_does_anything_else_fails_alone(
    tmp_path: Path, does: str, success: int
) -> None:
    script = tmp_path / "pgbackrest"
    script.write_text(
        '#!/bin/sh\ncase "$*" in version) echo pgBackRest 2.99; exit;; esac\n' + does + "\n"
    )
    script.chmod(0o755)
    own = tmp_path / "own.yml"
    own.write_text(
        "quick: {why: It is quick., every: 1s, timeout: 500ms, max_series: 9, labels: [stanza],"
        " info: stanzas, metrics: {pgbackrest_own: {column: status, type: gauge, help: Status.}}}\n"
    )
    path = tmp_path / "pgvigil.yml"
    path.write_text(
        json.dumps(
            {
                "catalogue": ["own.yml"],
                "targets": {
                    "repo": {
                        "kind": "pgbackrest",
                        "command": [str(script)],
                        "enable": ["own.quick"],
                        "disable": ["backup"],
                    }
                },
            }
        )
    )
    with Exporter("--config", str(path)) as exporter:
        end = time.monotonic() + 30
        key = frozenset({("query", "own.quick")})
        while (told := exporter.scrape().series("pgvigil_query_success").get(key)) is None:
            assert time.monotonic() < end, exporter.log
            time.sleep(0.1)
        assert told == success, exporter.log
        assert exporter.scrape().value("pgbackrest_up") == 1
        # Whatever it does, it is ended: at most the one that runs now is there.
        assert len(processes.descendants(exporter.process.pid)) <= 2
