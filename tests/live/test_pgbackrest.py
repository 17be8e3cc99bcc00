"""Practises restores with a real pgBackRest of two repositories, sound and damaged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import basebackup, pgbackrest
from lab.pgbackrest import PgBackRest
from lab.postgres import Server


@dataclass
class Scene:
    """A server and the pgBackRest that keeps its backups in the first of two repositories."""

    server: Server
    tool: PgBackRest

    def drill(self, *words: str | Path) -> tuple[int, dict[str, Any], str]:
        """Run a drill; its exit code, its report and its progress."""
        scratch = self.server.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        basebackup.own(scratch)
        done = subprocess.run(
            [sys.executable, "-m", "pgvigil", "drill", "restore", "--json", "--no-record"]
            + ["--pgbackrest", pgbackrest.STANZA, "--pgbackrest-config", str(self.tool.config)]
            + ["--bin", str(getattr(self.server.binaries, "directory", ""))]
            + ["--scratch", str(scratch), "--set", "fsync=off", *map(str, words)]
            + (["--as", "nobody"] if os.getuid() == 0 else []),
            env={**os.environ, "PATH": f"{Path(self.tool.program).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert os.listdir(scratch) == []
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.fixture(scope="module", params=[(13, "installed"), (18, "sid")], ids=lambda p: str(p[1]))
def scene(request: pytest.FixtureRequest, module_server: Callable[..., Server]) -> Scene:
    major, source = request.param
    try:
        program = pgbackrest.program(source)
    except RuntimeError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    server = module_server(major, autovacuum=False)
    if not hasattr(server.binaries, "directory"):
        pytest.skip("the server's programs are in a container")
    tool = PgBackRest(server, program)
    tool.run("stanza-create")
    space = server.directory / "space"
    space.mkdir()
    basebackup.own(space)
    server.execute(f"create tablespace space location '{space}'")
    server.execute("create table apart (id int) tablespace space; insert into apart values (1)")
    tool.backup("full")
    for row in (2, 3):
        server.execute(f"insert into apart values ({row})")
        basebackup.archive_all(server)
    return Scene(server, tool)


def test_the_newest_backup_of_a_stanza_is_restored_with_its_tablespaces(scene: Scene) -> None:
    before = sorted(p for p in scene.tool.config.parent.rglob("*"))
    query = "select count(*) = 3 from public.apart"
    code, report, progress = scene.drill("--query", query)
    assert code == 0, report or progress
    assert report["tool"] == "pgBackRest"
    assert report["size_bytes"] > 20 << 20
    assert report["wal_files"] >= 3
    assert sorted(p for p in scene.tool.config.parent.rglob("*")) == before
    assert scene.server.execute("select count(*) from apart") == [(3,)]


def test_a_repository_without_a_backup_fails_the_drill(scene: Scene) -> None:
    code, report, _ = scene.drill("--repo", "2")
    assert code == 1
    assert "no backup without an error; pgBackRest says: no valid backups" in str(report["faults"])
    assert report["place"] == "repo2"


def test_a_repository_that_has_lost_wal_or_a_file_fails_the_drill(scene: Scene) -> None:
    repository = scene.tool.repository(1)
    segments = sorted(p for p in repository.glob("archive/main/*-1/*/*.gz") if len(p.name) > 40)
    lost = segments[-2]
    # Without --repo it would come from the second, which has the same WAL.
    aside = lost.rename(lost.with_suffix(".aside"))
    code, report, _ = scene.drill("--repo", "1")
    assert code == 1
    assert f"before WAL file {segments[-1].name[:24]}, which the arch" in str(report["faults"])
    aside.rename(lost)

    (broken,) = repository.glob("backup/main/*F/pg_data/base/1/1259.gz")
    kept = broken.read_bytes()
    broken.write_bytes(kept[:100] + b"damage" + kept[106:])
    code, report, _ = scene.drill("--repo", "1")
    broken.write_bytes(kept)
    assert code == 1
    assert "pgbackrest restore ended with" in str(report["faults"])


def test_a_configuration_that_is_not_there_is_told(scene: Scene) -> None:
    code, report, _ = scene.drill("--pgbackrest-config", "/nowhere/pgbackrest.conf")
    assert code == 1
    assert "pgbackrest info ended with" in str(report["faults"])
