"""What jobs have done is written down on the primary, and read everywhere like all else."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg
import pytest
from pgvigil import grants, record
from psycopg import sql
from psycopg.conninfo import make_conninfo

from lab.catalogue import AskedError, only, rows_of
from lab.cluster import BARE, PGVIGIL
from lab.exporter import Exporter
from lab.postgres import Server

WRITER = 'a$$b$role$"; \\ drop'
"""A name that breaks naive quoting in every way."""

HOSTILE = "pl'a\"ce\\ {x} \n$$;--%s é 漢"


class House(NamedTuple):
    """A primary with a record and a job that may add to it, and its standby."""

    primary: Server
    standby: Server

    def query(self, text: str, user: str = "job") -> list[tuple[object, ...]]:
        """What the primary answers to somebody."""
        login = {"user": user, "password": user}
        with psycopg.connect(self.primary.conninfo(**login), autocommit=True) as connection:
            cursor = connection.execute(text.encode())
            return cursor.fetchall() if cursor.description else []

    def rows(self) -> list[tuple[object, ...]]:
        """What stands in the record, oldest first."""
        return self.primary.execute(
            "select kind, place, ok, size_bytes, tool, note, started, ended from pgvigil.record"
            " order by id"
        )


@pytest.fixture(scope="module", params=[13, 18])
def built(request: pytest.FixtureRequest, module_server: Callable[..., Server]) -> House:
    primary = module_server(request.param)
    standby = primary.standby()
    script = grants.script("pgvigil", ["record"], create=False, record_role=WRITER)
    # Whatever is granted by default, or was by mistake, is taken back.
    primary.execute("alter default privileges grant all on tables to public, pgvigil")
    primary.execute(script)
    writer = sql.Identifier(WRITER)
    primary.execute(sql.SQL("grant all on pgvigil.record to {}").format(writer))
    primary.execute(script)
    primary.execute(sql.SQL("create role job login password 'job' in role {}").format(writer))
    return House(primary, standby)


@pytest.fixture
def house(built: House) -> Iterator[House]:
    yield built
    built.primary.execute("truncate pgvigil.record")


def pgvigil(dsn: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pgvigil", "record", *words],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "PGVIGIL_DSN": dsn},
        capture_output=True,
        text=True,
        timeout=60,
    )


def job_of(house: House, **keywords: str) -> str:
    return house.primary.conninfo(user="job", password="job", **keywords)


def catch_up(house: House) -> None:
    ((position,),) = house.primary.execute("select pg_current_wal_lsn()::text")
    house.standby.wait_until(f"select pg_last_wal_replay_lsn() >= '{position}'", 30)


def test_what_a_job_tells_is_read_on_the_primary_and_the_standby(house: House) -> None:
    words = (
        *("--place", HOSTILE, "--tool", "pgbackrest", "--size", "123456789012"),
        *("--started", "1795200000", "--ended", "2026-11-20T21:00:00+01:00", "--note", "n"),
        *("--recovery-point", "@1795200030.5", "--window-start", "2026-11-01T00:00:00Z"),
    )
    done = pgvigil(job_of(house), "backup", "--ok", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = pgvigil(job_of(house), "backup", "--failed", "--place", HOSTILE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    catch_up(house)

    for server in house:
        row = only(rows_of(server, "backup.records"))
        assert (row["kind"], row["place"], row["ok"]) == ("backup", HOSTILE, False)
        assert row["good_started"] == 1795200000
        assert row["good_ended"] == 1795204800
        assert row["good_duration"] == 4800
        assert row["good_size_bytes"] == 123456789012
        assert row["good_recovery_point"] == 1795200030.5
        assert row["good_window_start"] == 1793491200
        assert (row["started"], row["duration"]) == (None, None)
        assert row["ended"] != row["good_ended"]
        tools = only(rows_of(server, "backup.record_tools"))
        assert tools == {"kind": "backup", "place": HOSTILE, "tool": "", "one": 1}


def test_on_a_standby_the_way_to_the_primary_is_shown(house: House) -> None:
    here = house.standby.conninfo(user="job", password="job")
    refused = pgvigil(here, "backup", "--ok")
    assert refused.returncode == 1
    assert "this is a standby; records are written on the primary" in refused.stderr
    both = make_conninfo(
        here,
        host="127.0.0.1,127.0.0.1",
        port=f"{house.standby.port},{house.primary.port}",
        # Right for reading, and no hindrance here.
        target_session_attrs="prefer-standby",
    )
    assert pgvigil(both, "backup", "--ok").returncode == 0
    assert len(house.rows()) == 1


def test_the_page_has_a_series_for_each_kind_and_place(house: House) -> None:
    for words in (
        ("backup", "--ok", "--place", HOSTILE),
        ("backup", "--ok", "--place", "region-2"),
        ("failover-drill", "--failed"),
    ):
        assert pgvigil(job_of(house), *words).returncode == 0
    environment = {"PGVIGIL_DSN": house.primary.conninfo(**PGVIGIL.login)}
    with Exporter(environment=environment) as exporter:
        page = exporter.scrape()
        while not page.series("pg_record_info"):
            page = exporter.scrape()
    good = page.series("pg_record_last_good_ended_timestamp_seconds", kind="backup")
    assert {dict(labels)["place"] for labels in good} == {HOSTILE, "region-2"}
    assert page.value("pg_record_last_ok", kind="failover_drill", place="") == 0
    assert page.series("pg_record_last_good_ended_timestamp_seconds", kind="failover_drill") == {}
    assert page.series("pg_record_last_ok", kind="attestation") == {}


@pytest.mark.parametrize(
    "text",
    [
        "select * from pgvigil.record",
        "select id from pgvigil.record",
        "update pgvigil.record set ok = true",
        "delete from pgvigil.record",
        "truncate pgvigil.record",
        "insert into pgvigil.record (kind, ok) values ('backup', true) returning id",
        "insert into pgvigil.record (kind, ok, recorded) values ('backup', true, now())",
        "insert into pgvigil.record (kind, ok, recorded_by) values ('backup', true, 'dba')",
        "insert into pgvigil.record overriding system value values (1, 'backup', '', null, now())",
        "select * from pgvigil.newest_records()",
        "drop table pgvigil.record",
        "create table pgvigil.other ()",
        "create trigger t before insert on pgvigil.record execute function now()",
        "alter table pgvigil.record drop constraint record_ended",
        "copy pgvigil.record to stdout",
        "begin; lock table pgvigil.record in access exclusive mode",
        "select nextval('pgvigil.record_id_seq')",
    ],
)
def test_who_may_add_a_row_may_do_nothing_else(house: House, text: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        house.query(text)


def test_who_writes_and_when_is_told_by_the_server(house: House) -> None:
    house.query("insert into pgvigil.record (kind, ok) values ('backup', true)")
    ((by, late, place, tool, note, started),) = house.primary.execute(
        "select recorded_by, clock_timestamp() - recorded < interval '1 minute', place, tool,"
        " note, started from pgvigil.record"
    )
    assert (by, late, place, tool, note, started) == ("job", True, "", "", "", None)


def test_who_watches_may_neither_write_nor_read_notes(house: House) -> None:
    house.query("insert into pgvigil.record (kind, ok, note) values ('backup', true, 'secret')")
    for text in (
        "insert into pgvigil.record (kind, ok) values ('backup', true)",
        "select note from pgvigil.record",
    ):
        with (
            psycopg.connect(house.primary.conninfo(**PGVIGIL.login)) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute(text.encode())
    with pytest.raises(AskedError, match="function"):
        rows_of(house.primary, "backup.records", role=BARE)
    assert "secret" not in str(rows_of(house.primary, "backup.records"))


@pytest.mark.parametrize(
    ("columns", "values", "constraint"),
    [
        ("ended", "now() + interval '11 minutes'", "record_ended"),
        ("ended", "'infinity'", "record_ended"),
        ("ended", "'-infinity'", "record_ended"),
        ("started", "'-infinity'", "record_started"),
        ("started, ended", "now(), now() - interval '1 second'", "record_order"),
        ("recovery_point", "now() + interval '1 day'", "record_recovery_point"),
        ("window_start", "now() + interval '1 day'", "record_window_start"),
        (
            "window_start, recovery_point",
            "now() - interval '1 h', now() - interval '2 h'",
            "record_window_start",
        ),
        ("size_bytes", "-1", "record_size_bytes"),
        ("place", "repeat('é', 101)", "record_place"),
        ("tool", "repeat('x', 61)", "record_tool"),
        ("note", "repeat('x', 1001)", "record_note"),
    ],
)
def test_what_cannot_be_is_refused(
    house: House, columns: str, values: str, constraint: str
) -> None:
    text = f"insert into pgvigil.record (kind, ok, {columns}) values ('backup', true, {values})"
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        house.query(text)
    assert refused.value.diag.constraint_name == constraint
    assert constraint in record.REFUSALS


def test_a_kind_that_nobody_knows_is_refused(house: House) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        house.query("insert into pgvigil.record (kind, ok) values ('other', true)")
    for kind in record.KINDS:
        house.query(f"insert into pgvigil.record (kind, ok) values ('{kind}', true)")
    assert {row["kind"] for row in rows_of(house.primary, "backup.records")} == {*record.KINDS}


class Reading(NamedTuple):
    """What it takes to find the newest rows."""

    scans: int
    """Times that all rows were read."""
    steps: int
    """Times that an index was asked."""
    rows: int
    """Rows that an index has led to."""


def reading(house: House) -> Reading:
    with psycopg.connect(house.primary.conninfo()) as connection:
        connection.execute("select * from pgvigil.newest_records()")
        (told,) = connection.execute(
            "select seq_scan, idx_scan, idx_tup_fetch from pg_stat_xact_user_tables"
            " where relname = 'record'"
        )
        return Reading(*told)


def test_the_newest_of_ten_thousand_rows_are_found_by_index(house: House) -> None:
    house.primary.execute(
        "insert into pgvigil.record (kind, place, ended, ok)"
        " select 'backup', 'place ' || i % 20, now() - i * interval '1 minute', i % 3 <> 0"
        " from generate_series(1, 10000) as i"
    )
    for analyzed in (False, True):
        if analyzed:
            house.primary.execute("analyze pgvigil.record")
        read = reading(house)
        # A step to each place and behind the last, the newest row there and the newest good one.
        assert (read.scans, read.steps <= 5 + 3 * 20) == (0, True)
        assert read.rows <= 3 * 20

    rows = rows_of(house.primary, "backup.records")
    ((newest,),) = house.primary.execute(
        "select array_agg(e order by p) from (select place as p,"
        " extract(epoch from max(ended))::float8 as e from pgvigil.record group by 1) as t"
    )
    by_place = sorted(rows, key=lambda row: str(row["place"]))
    assert [row["ended"] for row in by_place] == pytest.approx(newest)
    ((good,),) = house.primary.execute(
        "select array_agg(e order by p) from (select place as p,"
        " extract(epoch from max(ended))::float8 as e from pgvigil.record where ok group by 1) as t"
    )
    assert [row["good_ended"] for row in by_place] == pytest.approx(good)


def test_a_record_of_a_few_rows_is_read_by_index_too(house: House) -> None:
    house.query("insert into pgvigil.record (kind, ok) values ('backup', true)")
    house.primary.execute("analyze pgvigil.record")
    assert reading(house).scans == 0


def test_of_too_many_places_the_latest_of_each_kind_are_told(house: House) -> None:
    house.primary.execute(
        "insert into pgvigil.record (kind, place, ended, ok)"
        " select 'backup', 'p' || i, now() - i * interval '1 minute', true"
        " from generate_series(1, 900) as i"
        " union all select 'integrity_check', 'p' || i, now(), true"
        " from generate_series(1, 3) as i"
    )
    rows = house.primary.execute("select kind, place from pgvigil.newest_records()")
    assert len(rows) == 300
    assert {place for kind, place in rows if kind == "backup"} == {f"p{i}" for i in range(1, 298)}
    # So those that a page has no room for are the oldest of the kind with the most.
    shown = rows_of(house.primary, "backup.records")
    assert [(row["kind"], row["place"]) for row in shown] == rows[: len(shown)]
    assert len(shown) == 251


def test_places_without_number_are_not_all_looked_at(house: House) -> None:
    house.primary.execute(
        "insert into pgvigil.record (kind, place, ok)"
        " select 'backup', i, true from generate_series(1, 3000) as i"
    )
    read = reading(house)
    assert (read.scans, read.steps <= 5 + 3 * 1001) == (0, True)
    assert read.rows <= 3 * 1001
