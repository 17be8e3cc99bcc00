"""What the chart brings along, and what an install makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from lab import grafana, helm, rules
from lab.helm import rendered
from lab.kubernetes_api import CORE, OPERATOR, Api

ORDERS = {"connection": {"host": "db1"}, "existingSecret": {"name": "orders"}}
EVERYTHING = {
    "targets": {"orders": ORDERS},
    **{key: {"enabled": True} for key in ("serviceMonitor", "prometheusRule", "dashboards")},
}

LARGEST = 1024 * 1024
"""Bytes of a ConfigMap or a Secret."""
APPLIED = 256 * 1024
"""Bytes of all annotations: the whole object is among them after `kubectl apply` by the client."""


def installed(api: Api, major: int, values: dict[str, Any]) -> str:
    chosen = [
        word
        for key, value in values.items()
        for word in ("--set-json", f"{key}={json.dumps(value)}")
    ]
    words = ["install", "watch", str(helm.CHART), "--namespace", "monitoring", *chosen]
    words += ["--disable-openapi-validation"]  # nothing here tells of it; test_objects.py does that
    folder = str(api.settings.parent)
    environment = {"KUBECONFIG": str(api.settings), "HOME": folder}
    return helm.run(major, *words, environment=environment)


@pytest.mark.parametrize("major", helm.MAJORS)
def test_a_release_with_everything_is_installed_and_fits_into_helms_own_record(
    major: int, tmp_path: Path
) -> None:
    with Api({**CORE, **OPERATOR}, "1.31", tmp_path) as api:
        installed(api, major, EVERYTHING)
        wanted = rendered(values={**EVERYTHING, "assumeCRDs": True})
        tests = {"Pod"}
        assert api.kinds() == sorted(of["kind"] for of in wanted if of["kind"] not in tests)
        assert api.releases
        assert max(map(len, api.releases.values())) < LARGEST * 0.7


@pytest.mark.parametrize("major", helm.MAJORS)
def test_nothing_is_installed_where_the_operator_is_asked_for_and_missing(
    major: int, tmp_path: Path
) -> None:
    with Api(CORE, "1.31", tmp_path) as api:
        with pytest.raises(helm.HelmError, match="Install the CRDs of prometheus-operator first"):
            installed(api, major, EVERYTHING)
        assert api.objects == {}
        installed(api, major, {"targets": EVERYTHING["targets"]})
        assert "Deployment" in api.kinds()


@pytest.mark.parametrize("major", helm.MAJORS)
def test_the_notes_warn_of_a_password_in_the_values_and_do_not_show_it(
    major: int, tmp_path: Path
) -> None:
    canary = "canary-7f3a"
    target = {"connection": {"host": "db1"}, "password": canary}
    with Api(CORE, "1.31", tmp_path) as api:
        warned = installed(api, major, {"targets": {"orders": target}})
    with Api(CORE, "1.31", tmp_path) as api:
        silent = installed(api, major, {"targets": EVERYTHING["targets"]})
    assert "WARNING: the values hold the password of orders" in warned
    assert canary not in warned
    assert "WARNING" not in silent


def test_the_archive_has_what_is_loaded_and_not_what_it_is_made_of(tmp_path: Path) -> None:
    found = {file.removeprefix("pgvigil/") for file in helm.packaged(tmp_path)}
    assert {file for file in found if file.startswith(("rules/", "dashboards/"))} == {
        *(f"rules/{file.name}" for file in rules.RULES.glob("*.yml")),
        *(f"dashboards/{file.name}" for file in grafana.files()),
    }
    others = {
        file for file in found if not file.startswith(("rules/", "dashboards/", "templates/"))
    }
    assert others == {
        *("Chart.yaml", "values.yaml", "values.schema.json", "README.md"),
    }


def test_a_packaged_chart_makes_the_same(tmp_path: Path) -> None:
    list(helm.packaged(tmp_path))
    values = {**EVERYTHING, "assumeCRDs": True}
    assert rendered(values=values, chart=tmp_path / "unpacked" / "pgvigil") == rendered(
        values=values
    )


def test_every_dashboard_is_a_config_map_as_it_is_and_not_too_large() -> None:
    found = [
        of
        for of in rendered(values={**EVERYTHING, "assumeCRDs": True})
        if "-dashboard-" in of["metadata"]["name"]
    ]
    held: dict[str, Any] = {}
    for manifest in found:
        assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert manifest["metadata"]["annotations"] == {"grafana_folder": "PostgreSQL"}
        # Twice: once for itself, once for the annotation.
        assert 2 * len(json.dumps(manifest)) < LARGEST
        assert len(json.dumps(manifest)) < APPLIED
        held |= manifest["data"]
    assert held == {f"pgvigil-{file.name}": file.read_text() for file in grafana.files()}


def test_dashboards_go_where_grafana_looks_for_them() -> None:
    chosen = {"enabled": True, "namespace": "grafana", "label": "load", "labelValue": "yes"}
    chosen |= {"folderAnnotation": "folder", "folder": "Databases", "disabled": ["patroni"]}
    manifests = rendered(values={"targets": EVERYTHING["targets"], "dashboards": chosen})
    found = [of for of in manifests if of["metadata"]["labels"].get("load") == "yes"]
    assert len(found) == len(grafana.files()) - 1
    for manifest in found:
        assert manifest["metadata"]["namespace"] == "grafana"
        assert manifest["metadata"]["annotations"] == {"folder": "Databases"}
    bare = {"enabled": True, "folderAnnotation": ""}
    manifests = rendered(values={"targets": EVERYTHING["targets"], "dashboards": bare})
    assert not any(
        "annotations" in of["metadata"]
        for of in manifests
        if "-dashboard-" in of["metadata"]["name"]
    )


def test_no_object_is_too_large_for_kubectl_apply() -> None:
    for manifest in rendered(values={**EVERYTHING, "assumeCRDs": True}):
        assert len(json.dumps(manifest)) < APPLIED, manifest["metadata"]["name"]
