"""What Barman and WAL-G answer becomes rows, whatever it is, within its bounds.

The documents of WAL-G have the shape that its sources give them; those of Barman have what a real
one said, where tests/live/test_barman.py cannot have it say so.
"""

import asyncio
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pgvigil import catalogue, command
from pgvigil.barman import Barman
from pgvigil.command import Command
from pgvigil.errors import Down, Unreachable
from pgvigil.plan import Wanted
from pgvigil.repository import Repository
from pgvigil.source import Answers, Ask, Rows
from pgvigil.target import Target
from pgvigil.walg import WalG

from lab import processes

VERSIONS: Mapping[type[Command], str] = {
    Repository: "pgBackRest 2.99",
    Barman: "3.19.1 Barman by EnterpriseDB (www.enterprisedb.com)",
    WalG: "wal-g version v3.0.5\t5d3a5b4\t2025.01.13_11:10:33\tPostgreSQL",
}
TOOLS = pytest.mark.parametrize("tool", VERSIONS, ids=lambda tool: tool.kind)

Row = dict[str, str | None]


class Told:
    """What came of some words: rows, or the reason why there are none; and what still runs."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Row]] = {}
        self.failures: dict[int, str] = {}
        self.details: dict[int, str] = {}
        self.left: set[int] = set()

    def take(self, position: int, rows: Rows) -> None:
        names = [(rows.fname(at) or b"").decode() for at in range(rows.nfields)]
        self.rows[position] = [
            {
                name: value.decode() if (value := rows.get_value(row, at)) is not None else None
                for at, name in enumerate(names)
            }
            for row in range(rows.ntuples)
        ]

    def end(self, position: int, failure: Any, _seconds: float) -> None:
        if failure is not None:
            self.failures[position] = failure.reason
            self.details[position] = failure.detail


Asked = Callable[..., Told]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """Ask a tool whose program is a script that does as told; `log` counts how often it ran."""

    def ask(
        tool: type[Command], does: str, *words: str, seconds: float = 30, version: str = ""
    ) -> Told:
        script = tmp_path / "tool"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$*" in *version) echo {shlex.quote(version or VERSIONS[tool])}; exit;; esac\n'
            f'echo "$*" >> {tmp_path}/log\n{does}\n'
        )
        script.chmod(0o755)
        told = Told()
        before = set(processes.descendants(os.getpid()))

        async def run() -> None:
            target = Target("tool", {}, kind=tool.kind, command=[str(script), "--config=x"])
            loop = asyncio.get_running_loop()
            end = loop.time() + 60
            source = await tool.open(target, Wanted((), (), ()), end)
            asks = [Ask(f"word {word}", seconds) for word in words]
            await source.ask(asks, Answers(told.take, told.end), end)
            source.close()
            # What was killed is gone a moment later, and the loop must live to see it.
            while left := set(processes.descendants(os.getpid())) - before:
                if loop.time() > end:
                    break
                await asyncio.sleep(0.001)
            told.left = left
            await asyncio.sleep(0.02)

        asyncio.run(run())
        return told

    return ask


def said(document: object) -> str:
    return f"cat <<'END'\n{json.dumps(document)}\nEND"


def seconds(text: str) -> str:
    return str(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def a_backup(name: str, start: str, finish: str, **more: object) -> dict[str, object]:
    """One of wal-g's list, as BackupDetail and ExtendedMetadataDto give it."""
    return {
        "backup_name": name,
        "time": f"{finish}.5Z",
        "wal_file_name": name[5:29],
        "storage_name": "default",
        "start_time": f"{start}.123456789Z",
        "finish_time": f"{finish}.25Z",
        "date_fmt": "%Y-%m-%dT%H:%M:%S.%fZ",
        "hostname": "db1",
        "data_dir": "/var/lib/postgresql/18/main",
        "pg_version": 180000,
        "start_lsn": 33554472,
        "finish_lsn": 50331648,
        "is_permanent": False,
        "system_identifier": 7710682265107398340,
        "uncompressed_size": 1000,
        "compressed_size": 100,
        **more,
    }


FULL = "base_000000010000000000000002"
DELTA = "base_000000010000000000000006_D_000000010000000000000002"
BACKUPS = [
    a_backup(FULL, "2026-11-14T01:00:00", "2026-11-14T01:10:00", is_permanent=True),
    a_backup(f"{FULL[:-1]}4", "2026-11-15T01:00:00", "2026-11-15T01:20:00", compressed_size=0),
    a_backup(DELTA, "2026-11-16T01:00:00", "2026-11-16T01:01:00", storage_name="far"),
]


def test_the_backups_of_wal_g_are_told_by_storage_and_type(asked: Asked, tmp_path: Path) -> None:
    told = asked(WalG, said(BACKUPS), "storage", "backups")
    assert told.failures == {}
    assert told.rows[0] == [{"backups": "3", "permanent": "1"}]
    full, delta = told.rows[1]
    assert full == {
        "storage": "default",
        "type": "full",
        "backups": "2",
        "newest": seconds("2026-11-15T01:20:00.25"),
        "oldest": seconds("2026-11-14T01:10:00.25"),
        "duration": full["duration"],
        "size": "1000",
        "compressed_size": None,
    }
    assert float(full["duration"] or 0) == pytest.approx(1200.126544)
    assert (delta["storage"], delta["type"], delta["backups"]) == ("far", "delta", "1")
    # One answer does for both, and the program's own options come first.
    assert (tmp_path / "log").read_text() == "--config=x backup-list --detail --json\n"


def test_a_storage_of_wal_g_without_a_backup_has_none(asked: Asked) -> None:
    for nothing in ("echo INFO: No backups found >&2", "echo '[]'", "echo null"):
        told = asked(WalG, nothing, "storage", "backups", "timelines")
        assert told.failures == {}
        assert told.rows == {0: [{"backups": "0", "permanent": "0"}], 1: [], 2: []}


def a_timeline(number: int, first: str, last: str, missing: Sequence[str] = ()) -> dict[str, Any]:
    """One of wal-show's, as TimelineInfo gives it."""
    names = [f"{number:08X}{log}" for log in (first, last)]
    return {
        "id": number,
        "parent_id": number - 1,
        "switch_point_lsn": 0,
        "start_segment": names[0],
        "end_segment": names[1],
        "segments_count": 7,
        "missing_segments": [f"{number:08X}{log}" for log in missing],
        "segment_range_size": 8,
        "status": "LOST_SEGMENTS" if missing else "OK",
    }


def test_only_what_the_newest_backup_of_wal_g_needs_is_lost(asked: Asked) -> None:
    gaps = ["0000000000000003", "0000000000000008", "00000001000000FF"]
    first = a_timeline(1, "0000000000000002", "0000000100000003", gaps)
    first["backups"] = BACKUPS
    # The third timeline left the second before its last files.
    second = a_timeline(2, "0000000100000003", "0000000100000009", ["0000000100000005"])
    told = asked(WalG, said([first, second]), "timelines")
    assert told.rows[0] == [
        {
            "timeline": "1",
            "segments": "7",
            "missing": "3",
            "lost": "2",
            "min_lsn": str(2 << 24),
            "max_lsn": str((1 << 32) + (3 << 24)),
        },
        {
            "timeline": "2",
            "segments": "7",
            "missing": "1",
            "lost": "1",
            "min_lsn": str((1 << 32) + (3 << 24)),
            "max_lsn": str((1 << 32) + (9 << 24)),
        },
    ]
    without = asked(WalG, said([second | {"missing_segments": None}]), "timelines")
    assert [(row["missing"], row["lost"]) for row in without.rows[0]] == [("0", None)]


BARMAN: dict[str, Any] = {
    "_WARNING": ["something"],
    "main": [
        {
            "backup_id": f"2026111{day}T010000",
            "backup_type": kind,
            "end_time": "Sat Nov 14 01:00:00 2026",
            "end_time_timestamp": str(1000 * day),
            "retention_status": "-",
            "size": "1",
            "size_bytes": 100 + day,
            "status": status,
            "wal_size": "1",
            "wal_size_bytes": day,
        }
        for day, kind, status in (
            (1, "full", "DONE"),
            (2, "full", "DONE"),
            (3, "incremental", "DONE"),
            (4, "full", "WAITING_FOR_WALS"),
        )
    ]
    + [{"backup_id": "20261115T010000", "backup_type": "full", "status": "FAILED"}],
    "other": [],
    "-f": [],
}


def test_a_backup_of_barman_counts_when_it_has_its_wal(asked: Asked, tmp_path: Path) -> None:
    told = asked(Barman, said(BARMAN), "servers", "backups")
    assert told.failures == {}
    assert told.rows[0] == [
        {"server": "main", "done": "3", "waiting": "1", "failed": "1"},
        {"server": "other", "done": "0", "waiting": "0", "failed": "0"},
        {"server": "-f", "done": "0", "waiting": "0", "failed": "0"},
    ]
    full, incremental = told.rows[1]
    assert (full["backups"], full["newest"], full["oldest"]) == ("2", "2000", "1000")
    assert (full["size"], full["wal_size"]) == ("102", "2")
    assert (incremental["type"], incremental["newest"]) == ("incremental", "3000")
    assert (tmp_path / "log").read_text() == "--config=x --format json list-backups all\n"


def test_how_long_a_backup_of_barman_took_is_asked_once(asked: Asked, tmp_path: Path) -> None:
    times = {"begin_time_timestamp": "2900", "end_time_timestamp": "3000"}
    shown = said({"main": {"base_backup_information": times}})
    does = f'case "$*" in *show-backup*) {shown}\n;; *) {said(BARMAN)}\n;; esac'
    told = asked(Barman, does, "runs", "runs")
    assert told.rows == {0: [{"server": "main", "duration": "100"}]} | {1: told.rows[0]}
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [
        "--config=x --format json list-backups all",
        "--config=x --format json show-backup main 20261113T010000",
    ]


def test_a_backup_that_is_gone_meanwhile_costs_its_duration_alone(asked: Asked) -> None:
    does = f'case "$*" in *show-backup*) echo "{{}}"; exit 1;; *) {said(BARMAN)}\n;; esac'
    told = asked(Barman, does, "servers", "runs")
    assert (told.failures, told.rows[1]) == ({}, [])


def test_a_check_of_barman_that_fails_is_an_answer(asked: Asked) -> None:
    checks = {"ssh": {"hint": "", "status": "OK"}, "wal_level": {"hint": "x", "status": "FAILED"}}
    told = asked(Barman, said({"main": checks}) + "\nexit 1", "checks")
    assert told.rows[0] == [
        {"server": "main", "check": "ssh", "ok": "1"},
        {"server": "main", "check": "wal_level", "ok": "0"},
    ]
    error = said({"_ERROR": ["No server available"]}) + "\nexit 1"
    for word in ("checks", "servers"):
        told = asked(Barman, error, word)
        assert told.failures == {0: "command"}
        assert told.details[0].endswith(" ended with 1: No server available")


@TOOLS
@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("echo nonsense", "command"),
        ('echo \'{"main": [{"backup_\'', "command"),
        ("echo 1", "command"),
        ("printf '%0100000d' 0 | tr 0 '['", "command"),
        ("echo ERROR: broken >&2; exit 5", "command"),
        ("echo '[]' ; exit 5", "command"),
        ("sleep 600", "timeout"),
        ("yes x >&2", "timeout"),
        ("yes x", "size"),
    ],
    ids=["none", "cut", "number", "deep", "error", "code", "hung", "words", "endless"],
)
def test_what_is_no_answer_fails_with_a_reason_and_is_ended(
    asked: Asked, tool: type[Command], does: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_MOST", 1 << 20)
    bound = 0.5 if reason == "timeout" else 30
    words = [word for word in tool.parts if tool.parts[word].words != ("show-backup",)]
    told = asked(tool, does, *words, seconds=bound)
    assert told.rows == {}
    assert set(told.failures.values()) == {reason}, told.details
    assert len(told.failures) == len(words)
    assert told.left == set()


def test_a_tool_that_complains_at_length_is_not_held_up(asked: Asked) -> None:
    told = asked(WalG, "yes DEBUG | head -c 300000 >&2\necho '[]'", "backups", seconds=20)
    assert (told.failures, told.rows) == ({}, {0: []})


STRANGE: list[Any] = [
    *(None, 1, "x", [], {}, [None], ["x"], [[]], [{}], {"a": None}, {"a": "x"}, {"a": [{}]}),
    *({"a": {"b": None}}, {"a": {"b": []}}, {"a": 1}, [{"backup_name": 1}]),
    [a_backup(FULL, "never", "never")],
    [a_backup(FULL, "2026-11-14T01:00:00", "2026-11-14T01:10:00", storage_name=["x"])],
    [{**a_timeline(1, "0", "0"), "missing_segments": [1]}],
    [{"name": "main", "status": {"code": 0}, "backup": [{"timestamp": 1}]}],
    {"a": [{"status": "DONE", "end_time_timestamp": "x", "backup_id": "y"}]},
    {"a": [{"status": "DONE", "end_time_timestamp": float("inf"), "backup_id": "y"}]},
]


@TOOLS
def test_an_answer_of_another_shape_never_ends_more_than_its_query(
    asked: Asked, tool: type[Command]
) -> None:
    failed = 0
    for document in STRANGE:
        told = asked(tool, said(document), *tool.parts)
        assert set(told.failures.values()) <= {"shape", "command"}
        assert len(told.rows) + len(told.failures) == len(tool.parts)
        failed += len(told.failures)
    assert failed > len(STRANGE)


def test_ten_thousand_backups_with_strange_names_are_a_few_rows(asked: Asked) -> None:
    names = ('a"b\nc', "\x1b[31m", "ü" * 5000, "{{}}", "'; drop", " ")
    backups: list[dict[str, Any]] = [
        {**BARMAN["main"][0], "backup_id": f"{number}\n"} for number in range(2000)
    ]
    told = asked(Barman, said(dict.fromkeys(names, backups)), "servers", "backups")
    assert told.failures == {}
    assert [row["server"] for row in told.rows[0]] == list(names)
    assert {row["backups"] for row in told.rows[1]} == {"2000"}
    many = [a_backup(FULL, "2026-11-14T01:00:00", "2026-11-14T01:10:00")] * 10_000
    assert [row["backups"] for row in asked(WalG, said(many), "backups").rows[0]] == ["10000"]


@TOOLS
def test_a_program_that_is_another_is_of_the_wrong_kind(asked: Asked, tool: type[Command]) -> None:
    others = [text for of, text in VERSIONS.items() if of is not tool]
    mysql = "wal-g version v3.0.5\t5d3a5b4\t2025.01.13_11:10:33\tMySQL"
    for version in (*others, mysql, "version 1", "{}"):
        with pytest.raises(Unreachable) as caught:
            asked(tool, "exit 0", version=version)
        assert caught.value.reason == Down.WRONG_KIND


def test_a_version_of_any_age_is_known() -> None:
    for tool, text, number in (
        (Barman, "2.12 Barman by EnterpriseDB (www.enterprisedb.com)", 20012),
        (Barman, "3.4.0 Barman by EnterpriseDB (www.enterprisedb.com)", 30004),
        (WalG, "wal-g version v1.1\t4ad8b3d\t2021.08.01_07:33:52\tPostgreSQL", 10001),
        (WalG, "wal-g version devel\tdevel\tdevel\tPostgreSQL", 0),
        (Repository, "pgBackRest 2.45", 20045),
        (Repository, "pgBackRest 2.60dev", 20060),
    ):
        version = tool.version(text)
        assert version
        assert version.number == number


@TOOLS
def test_each_word_of_the_catalogue_is_answered_with_the_columns_it_asks(
    tool: type[Command],
) -> None:
    queries = [query for query in catalogue.load() if query.kind == tool.kind]
    assert {query.variants[0].text for query in queries} == tool.parts.keys()
    for query in queries:
        asked = {*query.labels, *(metric.column for metric in query.metrics)}
        assert asked == set(tool.parts[query.variants[0].text].columns), query.name
