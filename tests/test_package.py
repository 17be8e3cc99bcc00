"""The wheel carries what it promises, and works where nothing of the checkout is."""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest

from lab import packages

ROOT = Path(__file__).parents[1]
SENT = ["rules", "dashboards"]
SOURCES = {"rules": sorted((ROOT / "rules").glob("*.yml"))}
SOURCES["dashboards"] = sorted((ROOT / "grafana").glob("*.json"))


def run(*words: object, where: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=where,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the archive of the source."""
    folder = tmp_path_factory.mktemp("dist")
    ended = run("-m", "hatchling", "build", "-d", folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def carried(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if name.startswith("pgvigil/"))


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would, where no checkout is near."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(only(built, "*.whl")) as archive:
        archive.extractall(place)
    return place


def pgvigil(installed: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return run("-m", "pgvigil", *words, where=installed, PYTHONPATH=str(installed))


@pytest.mark.parametrize("kind", SENT)
def test_the_wheel_has_each_file_once_and_as_it_is(kind: str, built: Path) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as archive:
        there = [n for n in archive.namelist() if n.startswith(f"pgvigil/{kind}/")]
        assert len(SOURCES[kind]) == 14
        assert sorted(there) == [f"pgvigil/{kind}/{path.name}" for path in SOURCES[kind]]
        for name in there:
            folder = {"rules": "rules", "dashboards": "grafana"}[kind]
            assert archive.read(name) == (ROOT / folder / PurePosixPath(name).name).read_bytes()


def test_the_archive_of_the_source_makes_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    ended = run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, where=source)
    assert ended.returncode == 0, ended.stderr
    assert carried(only(tmp_path, "*.whl")) == carried(only(built, "*.whl"))


def test_the_package_index_would_take_both(built: Path) -> None:
    place = packages.installed("twine", Path(sys.executable))
    ended = run("-m", "twine", "check", "--strict", *built.iterdir(), PYTHONPATH=str(place))
    assert (ended.returncode, ended.stdout.count("PASSED")) == (0, 2), ended.stdout


def test_the_metadata_say_where_everything_is(built: Path) -> None:
    wheel = only(built, "*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.11"
    urls: Sequence[str] = told.get_all("Project-URL") or []
    assert {url.split(",")[0] for url in urls} == {"Source", "Documentation", "Changelog", "Issues"}


@pytest.mark.parametrize("kind", SENT)
def test_the_installed_program_hands_its_files_out(
    kind: str, installed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / kind
    ended = pgvigil(installed, kind, "--out", folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    written = sorted(folder.iterdir())
    assert [path.name for path in written] == [path.name for path in SOURCES[kind]]
    assert [path.read_bytes() for path in written] == [p.read_bytes() for p in SOURCES[kind]]
    assert ended.stdout.splitlines() == [
        *map(str, written),
        f"14 files of {kind} are in {folder}, 14 of them new",
    ]
    again = pgvigil(installed, kind, "--out", folder)
    assert again.stdout == f"14 files of {kind} are in {folder}, 0 of them new\n"


def test_the_installed_program_has_its_catalogue_and_standards(installed: Path) -> None:
    ended = pgvigil(installed, "reference")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (ROOT / "docs" / "metrics.md").read_text("utf-8")


def test_what_somebody_has_changed_is_left_alone_until_forced(
    installed: Path, tmp_path: Path
) -> None:
    changed, gone = tmp_path / "storage.yml", tmp_path / "backup.yml"
    changed.write_text("mine")
    ended = pgvigil(installed, "rules", "--out", tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"{changed}: is there already and says something else; --force writes over it\n"
        "1 problem to mend\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["storage.yml"]
    assert not gone.exists()
    ended = pgvigil(installed, "rules", "--out", tmp_path, "--force")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert changed.read_bytes() == (ROOT / "rules" / "storage.yml").read_bytes()
    assert len(list(tmp_path.iterdir())) == 14


def test_a_folder_that_cannot_be_made_is_told(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = pgvigil(installed, "dashboards", "--out", tmp_path / "file")
    assert (ended.returncode, ended.stdout) == (2, "")
    told = f"{tmp_path / 'file'}: File exists; mind its owner and mode, or name another\n"
    assert ended.stderr == f"{told}1 problem to mend\n"
