"""Runs real Helm, which is built once, on the chart."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lab import golang
from lab.kubernetes import VERSIONS, Manifest

CHART = Path(__file__).parents[1] / "helm" / "pgvigil"
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))

MAJORS = (3, 4)
"""Of Helm."""
_MODULE = Path(__file__).parent / "go" / "helm"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where there is one: a release is a megabyte."""


class HelmError(Exception):
    """What Helm said when it refused."""


def program(major: int) -> Path | str:
    """A Helm of a major version that is built now if it is the first time, or why there is none."""
    return golang.built(_MODULE, f"helm.sh/helm/v{major}", "cmd/helm")


def run(major: int, *words: str, environment: Mapping[str, str] | None = None) -> str:
    """What Helm prints; raises HelmError with what it says when it fails."""
    helm = program(major)
    if isinstance(helm, str):
        raise HelmError(helm)
    done = subprocess.run(
        [helm, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **(environment or {})},
    )
    if done.returncode:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def rendered(
    *files: Path,
    values: Mapping[str, Any] | None = None,
    major: int = 3,
    release: str = "watch",
    chart: Path = CHART,
    words: Sequence[str] = (),
) -> list[Manifest]:
    """The objects that a chart makes of files with values and of values by themselves."""
    given = json.dumps(values or {})
    text = _rendered(major, release, str(chart), tuple(map(str, files)), given, tuple(words))
    found: list[Manifest] = json.loads(text)
    return found


@cache
def _rendered(
    major: int, release: str, chart: str, files: Sequence[str], values: str, words: Sequence[str]
) -> str:
    chosen = [word for file in files for word in ("--values", file)]
    for key, value in json.loads(values).items():
        chosen += ["--set-json", f"{key}={json.dumps(value)}"]
    # Built by `go install`, Helm takes a Kubernetes for granted that is older than any chart wants.
    version = [] if "--kube-version" in words else ["--kube-version", VERSIONS[-1]]
    command = ["template", release, chart, "--namespace", "monitoring", *version, *chosen, *words]
    # As JSON, which is read in no time.
    return json.dumps([found for found in yaml.load_all(run(major, *command), _LOADER) if found])


def packaged(folder: Path) -> Iterator[str]:
    """The files of the chart's archive, made in a folder."""
    run(3, "package", str(CHART), "--destination", str(folder))
    (archive,) = folder.glob("*.tgz")
    target = folder / "unpacked"
    shutil.unpack_archive(archive, target, filter="data")
    yield from (str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
