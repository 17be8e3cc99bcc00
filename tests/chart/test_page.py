"""What docs/kubernetes.md shows is what Helm, Kubernetes and Prometheus take."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lab import helm, kubernetes
from lab.helm import rendered
from lab.kubernetes_api import CORE, OPERATOR, Api
from lab.rules import ROOT

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
FENCES = re.findall(r"^```(\w[\w ]*)\n(.*?)^```", PAGE, re.M | re.S)


def fences(kind: str) -> list[str]:
    found = [text for given, text in FENCES if given == kind]
    assert found, f"the page shows no {kind}"
    return found


def commands(kind: str) -> list[list[str]]:
    lines = [line for text in fences(kind) for line in text.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line))[0] == "helm"]


def test_every_fence_is_of_a_kind_that_is_tried() -> None:
    tried = {"sh", "sh cluster", "yaml values", "yaml pod", "yaml prometheus"}
    # tests/chart/shop is the chart that these two stand in.
    tried |= {"yaml dependency", "yaml template"}
    assert {kind for kind, _ in FENCES} == tried
    shop = "".join(path.read_text() for path in (ROOT / "tests/chart/shop").rglob("*.yaml"))
    for line in fences("yaml template")[0].splitlines():
        assert line.strip() in shop


@pytest.mark.parametrize("text", fences("yaml values"))
def test_helm_takes_the_values_of_the_page(text: str, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(text)
    for manifest in rendered(path):
        assert kubernetes.complaints(kubernetes.VERSIONS[0], manifest) == []


@pytest.mark.parametrize("words", commands("sh"), ids=" ".join)
def test_a_command_of_the_page_works(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "kind: Deployment" in helm.run(3, *words, "--kube-version", kubernetes.VERSIONS[-1])


@pytest.mark.parametrize("words", commands("sh cluster"), ids=" ".join)
def test_an_install_of_the_page_works_as_far_as_nothing_has_to_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "test":
        return  # tests/chart/test_running.py runs what it would
    monkeypatch.chdir(ROOT)
    with Api({**CORE, **OPERATOR}, "1.31", tmp_path) as api:
        environment = {"KUBECONFIG": str(api.settings), "HOME": str(tmp_path)}
        helm.run(3, *words, "--disable-openapi-validation", environment=environment)
        assert "Deployment" in api.kinds()


def test_the_sidecar_by_hand_is_a_pod_with_the_container_of_the_chart() -> None:
    pod = yaml.safe_load(fences("yaml pod")[0])
    for version in kubernetes.VERSIONS:
        assert kubernetes.complaints(version, pod) == []
    _, shown = pod["spec"]["containers"]
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    assert shown["image"] == f"{values['image']['repository']}:0.1.0"
    assert shown["resources"] == values["resources"]
    assert values["securityContext"].items() <= shown["securityContext"].items()
    (text,) = (text for text in fences("yaml values") if "mode: sidecar" in text)
    config = rendered(values={**yaml.safe_load(text), "podMonitor": {"enabled": False}})[0]
    assert "passwords/local" in config["data"]["pgvigil.yml"]


def test_prometheus_takes_the_configuration_of_the_page(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    path = tmp_path / "prometheus.yml"
    path.write_text(fences("yaml prometheus")[0])
    done = subprocess.run([program, "check", "config", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
