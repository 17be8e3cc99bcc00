"""The list of what pgvigil is made of names what is installed, with the hashes that are pinned."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from tools import sbom

ROOT = Path(__file__).parents[1]
RUN = (ROOT / "requirements/run.txt").read_text("utf-8")


def test_every_pinned_library_stands_in_it_once_with_all_its_hashes() -> None:
    made = sbom.components(RUN)
    names = [part["name"] for part in made]
    assert len(names) == len(set(names)) == len(re.findall(r"^\S+==", RUN, re.M))
    hashes = [file["hashes"][0]["content"] for part in made for file in part["externalReferences"]]
    assert sorted(hashes) == sorted(re.findall(r"sha256:(\w+)", RUN))
    assert all(part["externalReferences"] for part in made)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[\[<>=; ]", text)[0] for text in project["dependencies"]}
    assert declared <= set(names)


def test_only_what_depends_on_the_machine_is_optional() -> None:
    scopes = {part["name"]: part["scope"] for part in sbom.components(RUN)}
    assert scopes["psycopg"] == scopes["pyyaml"] == "required"
    assert scopes["isal"] == "optional"


def test_it_is_of_this_version_and_the_same_each_time() -> None:
    made = sbom.bill(RUN)
    assert made["metadata"]["component"]["version"] == metadata.version("pgvigil")
    assert made["components"] == sbom.components(RUN)
    assert made == sbom.bill(RUN)
