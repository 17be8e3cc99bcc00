"""Practises restores of real base backups, sound ones and such that were damaged on purpose."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from pgvigil import grants

from lab import basebackup, processes
from lab.postgres import Server
from lab.small_disk import SmallDisk

ROWS = 2000
MAJORS = [13, 18]


@dataclass
class Scene:
    """A server that runs, a base backup of it and its archive, beside one another."""

    server: Server
    archive: Path
    backup: Path
    moments: list[datetime]
    """After each of three rows that were written later, each in a WAL file of its own."""
    space: Path
    """Where the server has a tablespace, and the number of that."""
    number: str

    def copy(self, name: str) -> Path:
        """A copy of the backup that a test may break."""
        place = self.server.directory / name
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run(["cp", "-a", self.backup, place], check=True)
        return place


@pytest.fixture(scope="module")
def scenes(module_server: Callable[..., Server]) -> Callable[[int], Scene]:
    made: dict[int, Scene] = {}

    def scene(major: int) -> Scene:
        if major not in made:
            made[major] = prepare(module_server, major)
        return made[major]

    return scene


@pytest.fixture
def scene(scenes: Callable[[int], Scene], major: int) -> Scene:
    return scenes(major)


def prepare(start: Callable[..., Server], major: int) -> Scene:
    server = start(major, initdb_options=["--data-checksums"], autovacuum=False)
    archive = basebackup.archive(server)
    server.restart()
    space = server.directory / "space"
    space.mkdir()
    basebackup.own(space)
    server.execute("create database shop")
    server.execute(f"create tablespace space location '{space}'")
    server.execute(
        "create table ledger (id int primary key, text text);"
        f"insert into ledger select g, repeat('x', 100) from generate_series(1, {ROWS}) as g;"
        "create table apart (id int) tablespace space; insert into apart values (1);"
        "create table cut as select 1 as one; create table gone as select 1 as one;"
        "create unlogged table fleeting as select 1 as one"
    )
    basebackup.take(server, server.directory / "backup")
    moments = []
    for row in range(3):
        server.execute(f"insert into ledger values ({ROWS + 1 + row}, 'after the backup')")
        moments.append(server.execute("select clock_timestamp()")[0][0])
        basebackup.archive_all(server)
    ((number,),) = server.execute("select oid::text from pg_tablespace where spcname = 'space'")
    return Scene(server, archive, server.directory / "backup", moments, space, number)


class Drill:
    """A drill that was run as people run it."""

    def __init__(self, scene: Scene, *words: str | Path, backup: Path | None = None) -> None:
        """`words` come after the backup and its programs."""
        self.scratch = scene.server.directory / "scratch"
        self.scratch.mkdir(exist_ok=True)
        basebackup.own(self.scratch)
        given = [
            "--set",
            "fsync=off",
            "--from",
            backup or scene.backup,
            "--bin",
            programs(scene),
            *account(),
            *words,
        ]
        if "--scratch" not in words:
            given += ["--scratch", self.scratch]
        if "--place" not in words:
            given.append("--no-record")
        if not {"--wal", "--restore-command"} & set(words):
            given += ["--wal", scene.archive]
        if "--tablespace" not in words:
            given += ["--tablespace", f"{scene.number}={scene.space}"]
        dsn = scene.server.conninfo(user="pgvigil_job", password="job")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgvigil", "drill", "restore", "--json", *given],
            env={**os.environ, "PGVIGIL_DSN": dsn},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> "Drill":
        """Wait for its end; nothing may be left of it."""
        self.stdout, self.stderr = self.process.communicate(timeout=90)
        self.code = self.process.returncode
        self.report: dict[str, Any] = json.loads(self.stdout) if self.stdout else {}
        assert "Traceback" not in self.stderr, self.stderr
        assert self.left() == []
        return self

    def left(self) -> list[str]:
        """What is in the scratch directory."""
        return os.listdir(self.scratch)

    @property
    def faults(self) -> str:
        """What it found wrong."""
        assert self.code == 1, self.stderr
        assert self.report["ok"] is False
        return "\n".join(self.report["faults"])


def account() -> list[str]:
    return ["--as", "nobody"] if os.getuid() == 0 else []


def programs(scene: Scene) -> Path:
    place = getattr(scene.server.binaries, "directory", None)
    if place is None:
        pytest.skip("the server's programs are in a container")
    return Path(place)


def drill(scene: Scene, *words: str | Path, backup: Path | None = None) -> Drill:
    return Drill(scene, *words, backup=backup).end()


def fingerprint(*places: Path) -> dict[str, tuple[int, str]]:
    """Each file's time and content."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for place in places
        for path in place.rglob("*")
        if path.is_file()
    }


def table_file(scene: Scene, table: str, backup: Path) -> Path:
    ((name,),) = scene.server.execute(f"select pg_relation_filepath('{table}')")
    return backup / str(name)


@pytest.mark.parametrize("major", MAJORS)
def test_a_sound_backup_passes_and_nothing_of_the_source_is_touched(scene: Scene) -> None:
    before = fingerprint(scene.backup, scene.archive, scene.space)
    begin = scene.server.log_position()

    done = drill(scene, "--query", f"select count(*) = {ROWS + 3} from public.ledger")

    assert done.code == 0, done.report["faults"]
    report = done.report
    # The last commit that was archived, as the server itself has its time.
    recovered = datetime.fromisoformat(report["recovery_point"])
    assert scene.moments[1] < recovered < scene.moments[2]
    assert report["recovery_point_at_least"] is False
    assert report["wal_files"] >= 4
    assert (report["databases"], report["queries"], report["data_checksums"]) == (3, 1, True)
    assert report["tables"] > 100
    assert report["indexes"] > 200
    assert report["seconds"] > 0
    assert fingerprint(scene.backup, scene.archive, scene.space) == before
    assert scene.server.errors_in_log(begin) == []


@pytest.mark.parametrize(("major", "row"), [(13, 0), (18, 1)])
def test_recovery_ends_at_the_moment_that_was_asked_for(scene: Scene, row: int) -> None:
    query = f"select max(id) = {ROWS + 1 + row} from public.ledger"
    done = drill(scene, "--target-time", scene.moments[row].isoformat(), "--query", query)
    assert done.code == 0, done.report["faults"]
    assert datetime.fromisoformat(done.report["recovery_point"]) < scene.moments[row]


@pytest.mark.parametrize("major", [18])
def test_an_immediate_end_tells_the_least_point_it_has_recovered(scene: Scene) -> None:
    done = drill(scene, "--immediate", "--query", f"select max(id) = {ROWS} from public.ledger")
    assert done.code == 0, done.report["faults"]
    assert datetime.fromisoformat(done.report["recovery_point"]) < scene.moments[0]
    assert done.report["recovery_point_at_least"] is True


@pytest.mark.parametrize("major", [13])
def test_a_moment_after_the_last_wal_cannot_be_reached(scene: Scene) -> None:
    done = drill(scene, "--target-time", "2100-01-01T00:00:00Z")
    assert "before configured recovery target was reached" in done.faults


@pytest.mark.parametrize(("major", "harm"), [(13, "missing"), (18, "damaged"), (18, "missing")])
def test_wal_that_has_a_gap_is_told_though_recovery_ends_in_peace(scene: Scene, harm: str) -> None:
    archive = scene.server.directory / f"gap-{harm}"
    shutil.copytree(scene.archive, archive)
    archive.chmod(0o755)
    names = sorted(p.name for p in archive.iterdir() if len(p.name) == 24)
    broken = archive / names[-2]
    if harm == "missing":
        broken.unlink()
    else:
        broken.write_bytes(bytes(broken.stat().st_size))
    for path in archive.iterdir():
        path.chmod(0o644)

    done = drill(scene, "--wal", archive)

    assert f"before WAL file {names[-1]}, which the archive has" in done.faults
    assert datetime.fromisoformat(done.report["recovery_point"]) < scene.moments[1]


@pytest.mark.parametrize("major", [18])
def test_a_backup_without_its_wal_is_none(scene: Scene) -> None:
    done = drill(scene, "--restore-command", "false")
    assert "WAL is missing" in done.faults


@pytest.mark.parametrize(("major", "table"), [(13, "ledger"), (18, "ledger"), (18, "ledger_pkey")])
def test_a_damaged_page_is_found(scene: Scene, table: str) -> None:
    backup = scene.copy("damaged")
    with table_file(scene, table, backup).open("r+b") as file:
        file.seek(3 * 8192 + 4000)
        file.write(b"damage" * 20)
    done = drill(scene, backup=backup)
    assert f"postgres: public.{table}: " in done.faults


@pytest.mark.parametrize("major", [13])
def test_an_index_that_is_in_no_order_is_found_by_amcheck(
    fresh_server: Callable[..., Server], major: int
) -> None:
    server = fresh_server(major)
    archive = basebackup.archive(server)
    server.restart()
    # Built by one order and searched by another, as a new C library would: no checksum tells.
    server.execute(
        "create table sorted (id int); insert into sorted select generate_series(1, 9);"
        "create function reversed(int, int) returns int language sql immutable"
        " as 'select $2 - $1';"
        "create operator class strange for type int using btree as"
        " operator 1 <, operator 2 <=, operator 3 =, operator 4 >=, operator 5 >,"
        " function 1 btint4cmp(int, int);"
        "create index strange_id on sorted (id strange);"
        "update pg_amproc set amproc = 'public.reversed(int,int)'::regprocedure"
        " where amprocfamily = (select oid from pg_opfamily where opfname = 'strange')"
    )
    basebackup.take(server, server.directory / "backup")
    basebackup.archive_all(server)
    scene = Scene(server, archive, server.directory / "backup", [], Path("/"), "1")
    faults = drill(scene).faults
    assert "postgres: public.strange_id: item order invariant violated" in faults


@pytest.mark.parametrize("major", [13])
def test_a_file_that_is_cut_or_gone_is_found(scene: Scene) -> None:
    backup = scene.copy("cut")
    cut = table_file(scene, "cut", backup)
    os.truncate(cut, 8000)
    table_file(scene, "gone", backup).unlink()
    done = drill(scene, backup=backup)
    assert f"base/{cut.parent.name}/{cut.name} ends within a page" in done.faults
    assert "postgres: public.gone: could not open file" in done.faults


@pytest.mark.parametrize("major", [18])
def test_the_backups_own_manifest_is_held_against_it(scene: Scene) -> None:
    backup = scene.copy("manifest")
    ledger = table_file(scene, "ledger", backup)
    name = str(ledger.relative_to(backup))
    digest = hashlib.sha256(ledger.read_bytes()).hexdigest()
    entry = {
        "Path": name,
        "Size": ledger.stat().st_size,
        "Checksum-Algorithm": "SHA256",
        "Checksum": digest,
    }
    manifest = backup / "backup_manifest"
    manifest.write_text(json.dumps({"Files": [entry]}))
    done = drill(scene, backup=backup)
    assert (done.code, done.report["manifest_files"]) == (0, 1), done.report
    with ledger.open("r+b") as file:
        file.write(b"damage")
    assert f"{name} is not what it was" in drill(scene, backup=backup).faults
    os.truncate(ledger, 8192)
    assert f"{name} has 8192 bytes, and {entry['Size']} in" in drill(scene, backup=backup).faults
    ledger.unlink()
    assert f"the backup has no {name}" in drill(scene, backup=backup).faults


@pytest.mark.parametrize("major", [18])
@pytest.mark.parametrize("packing", ["w:", "w:gz"])
def test_a_backup_in_tars_is_unpacked(scene: Scene, packing: Literal["w:", "w:gz"]) -> None:
    packed = ".gz" if packing == "w:gz" else ""
    place = scene.server.directory / f"tars{packed}"
    place.mkdir()
    links = scene.backup / "pg_tblspc"
    with tarfile.open(place / f"base.tar{packed}", packing) as tar:
        for path in scene.backup.iterdir():
            if path != links:
                tar.add(path, path.name)
        tar.add(links, "pg_tblspc", recursive=False)
    with tarfile.open(place / f"{scene.number}.tar{packed}", packing) as tar:
        tar.add(scene.space, ".")
    done = drill(scene, "--query", "select count(*) = 1 from public.apart", backup=place)
    assert done.code == 0, done.report["faults"]

    path = place / f"base.tar{packed}"
    os.truncate(path, path.stat().st_size // 2)
    faults = drill(scene, backup=place).faults
    assert f"a tar of {place} " in faults


@pytest.mark.parametrize("major", [13])
def test_what_is_no_base_backup_is_not_started(scene: Scene) -> None:
    backup = scene.copy("unlabelled")
    (backup / "backup_label").unlink()
    assert "there is no backup_label" in drill(scene, backup=backup).faults

    empty = scene.server.directory / "empty"
    empty.mkdir(exist_ok=True)
    assert "is no base backup: it has nothing in it" in drill(scene, backup=empty).faults

    gone = scene.server.directory / "gone"
    assert f"{gone}: No such file" in drill(scene, backup=gone).faults

    live = drill(scene, backup=scene.server.data).faults
    assert f"{scene.server.data} is a server's own data directory" in live


@pytest.mark.parametrize("major", [18])
def test_links_out_of_the_backup_are_not_followed(scene: Scene) -> None:
    done = drill(scene, "--tablespace", "1=/nowhere")
    assert f"is a link to {scene.space}, outside of the backup" in done.faults

    backup = scene.copy("linked")
    shutil.rmtree(backup / "pg_wal")
    (backup / "pg_wal").symlink_to(scene.server.data / "pg_wal")
    (backup / "server.key").symlink_to("/etc/shadow")
    done = drill(scene, "--restore-command", "false", backup=backup)
    assert "WAL is missing" in done.faults


@pytest.mark.parametrize("major", [13])
def test_programs_of_another_version_are_refused_with_the_remedy(
    scene: Scene, scenes: Callable[[int], Scene]
) -> None:
    other = programs(scenes(18))
    faults = drill(scene, "--bin", other).faults
    assert f"the backup is of PostgreSQL 13, and starts with no other version: {other}" in faults
    assert "postgresql-13" in faults


@pytest.mark.parametrize("major", [18])
def test_the_outcome_is_written_into_the_record(scene: Scene) -> None:
    server = scene.server
    server.execute(grants.script("pgvigil", ["record"], create=False))
    server.execute("create role pgvigil_job login password 'job' in role pgvigil_record")
    try:
        passed = drill(scene, "--place", "nas")
        failed = drill(scene, "--place", "nas", "--query", "select 'no'")
        assert (passed.code, failed.code) == (0, 1), passed.stderr
        rows = server.execute(
            "select kind, place, ok, tool, size_bytes, recovery_point,"
            " extract(epoch from ended - started)::float, note from pgvigil.record order by ended"
        )
        moment = datetime.fromisoformat(passed.report["recovery_point"])
        for row, done in zip(rows, (passed, failed), strict=True):
            *said, size, point, seconds, _ = row
            assert said == ["restore_verification", "nas", done.code == 0, "base backup"]
            assert size == done.report["size_bytes"] > 20 << 20
            assert point == moment
            assert seconds == pytest.approx(done.report["seconds"], abs=0.001)
        assert rows[1][-1] == """postgres: query "select 'no'" returned 'no', and not true"""
    finally:
        server.execute("drop schema pgvigil cascade; drop role pgvigil_job")

    lost = drill(scene, "--place", "nas")
    assert (lost.code, lost.report["ok"]) == (1, True)
    assert "the restore_verification was NOT recorded" in lost.stderr


@pytest.mark.parametrize("major", [18])
def test_a_query_that_is_not_true_fails_the_drill(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "own.sql"
    path.write_text("create temporary table t as select 1; select count(*) = 1 from t")
    assert drill(scene, "--query", path).code == 0
    faults = drill(
        scene,
        *("--query", "select false", "--query", "select 1 / 0", "--query", "select 1"),
        *("--query", "select true where false", "--query", "select pg_terminate_backend(1)"),
        *("--database", "shop"),
    ).faults.splitlines()
    assert faults == [
        "shop: query 'select false' returned False, and not true",
        "shop: query 'select 1 / 0': division by zero",
        "shop: query 'select 1' returned 1, and not true",
        "shop: query 'select true where false' returned no row, and not true",
        "shop: query 'select pg_terminate_backend(1)' returned False, and not true",
    ]


@pytest.mark.parametrize("major", [13, 18])
def test_what_acts_by_itself_does_not_act_in_the_copy(scene: Scene) -> None:
    """Its settings stay behind: what they name would work on what the live server works on."""
    backup = scene.copy("acting")
    witness = scene.server.directory / "witness"
    with (backup / "postgresql.auto.conf").open("a") as file:
        file.write(
            f"recovery_end_command = 'touch {witness}'\narchive_cleanup_command = 'touch {witness}'"
            "\nlisten_addresses = '*'\nshared_preload_libraries = 'no_such_library'\n"
        )
    done = drill(
        scene,
        *("--query", "select current_setting('listen_addresses') = ''"),
        *("--query", "select current_setting('archive_mode') = 'off'"),
        *("--query", "select current_setting('max_logical_replication_workers') = '0'"),
        *("--query", "select current_setting('max_worker_processes') = '0'"),
        *("--query", "select count(*) = 0 from pg_replication_slots"),
        backup=backup,
    )
    assert done.code == 0, done.report["faults"]
    assert not witness.exists()
    assert "no_such_library, which is not installed here" in str(done.report["warnings"])


@pytest.mark.parametrize("major", [13])
def test_a_tablespace_that_wal_makes_is_not_made_where_the_live_server_has_it(
    fresh_server: Callable[..., Server], major: int
) -> None:
    server = fresh_server(major)
    archive = basebackup.archive(server)
    server.restart()
    basebackup.take(server, server.directory / "backup")
    space = server.directory / "space"
    space.mkdir()
    basebackup.own(space)
    server.execute(f"create tablespace late location '{space}'")
    server.execute("create table apart (id int) tablespace late; insert into apart values (1)")
    server.execute("checkpoint")
    basebackup.archive_all(server)
    before = fingerprint(space)
    assert before
    scene = Scene(server, archive, server.directory / "backup", [], space, "1")

    done = drill(scene)

    # PostgreSQL would empty the directory first, which the kernel does not let it do.
    assert "is replayed at the tablespace's own path only" in done.faults
    assert fingerprint(space) == before
    assert server.execute("select * from apart") == [(1,)]


@pytest.fixture
def disk(scene: Scene) -> Callable[[int], SmallDisk]:
    """Makes a small disk at a place where drills can be held."""

    def make(room: int) -> SmallDisk:
        place = scene.server.directory / "small"
        place.mkdir(exist_ok=True)
        basebackup.own(place)
        disk = SmallDisk(place, room)
        try:
            return disk.__enter__()
        except RuntimeError as error:
            pytest.skip(str(error))

    return make


@pytest.mark.parametrize("major", [18])
def test_a_disk_that_is_too_small_is_told_before_anything_is_copied(
    scene: Scene, disk: Callable[[int], SmallDisk]
) -> None:
    small = disk(20 << 20)
    try:
        done = drill(scene, "--scratch", scene.server.directory / "small")
        assert "--scratch names another place" in done.faults
        assert done.report["restore_seconds"] == 0
        assert os.listdir(scene.server.directory / "small") == []
    finally:
        small.__exit__()


@pytest.mark.parametrize("major", [18])
def test_a_disk_that_fills_up_is_told(scene: Scene, disk: Callable[[int], SmallDisk]) -> None:
    small = disk(150 << 20)
    place = scene.server.directory / "small"
    wait = scene.server.directory / "wait"
    wait.touch()
    command = f"while [ -e {wait} ]; do sleep 0.1; done; cp {scene.archive}/%f %p"
    try:
        run = Drill(scene, "--scratch", place, "--restore-command", command)
        wait_until(lambda: bool(list(place.glob("*/log-*"))))
        small.fill()
        wait.unlink()
        assert "disk is full; --scratch names another place" in run.end().faults
        assert os.listdir(place) == ["filler"]
    finally:
        small.__exit__()


@pytest.mark.parametrize("major", [18])
@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (signal.SIGTERM, "starting"),
        (signal.SIGKILL, "starting"),
        (signal.SIGINT, "checking"),
        (signal.SIGKILL, "checking"),
    ],
)
def test_a_drill_that_is_killed_leaves_nothing_behind(
    scene: Scene, number: signal.Signals, phase: str
) -> None:
    words = ("--query", "select pg_sleep(60) is not null", "--restore-command", "sleep 60")
    run = Drill(scene, *(words[:2] if phase == "checking" else words))
    assert run.process.stderr is not None
    for line in run.process.stderr:
        if phase in line:
            break
    assert run.left()
    if phase == "checking":
        wait_until(lambda: len(processes.descendants(run.process.pid)) > 3)
    started = processes.descendants(run.process.pid)
    run.process.send_signal(number)
    run.process.wait(30)
    wait_until(lambda: run.left() == [])
    wait_until(lambda: not any(processes.alive(pid) for pid in started))
    assert run.process.returncode == (1 if number != signal.SIGKILL else -number)
    run.process.communicate()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
