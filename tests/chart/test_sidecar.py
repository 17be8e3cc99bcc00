"""A chart that depends on ours has the exporter in its own pods."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lab import helm, kubernetes
from lab.helm import rendered
from lab.kubernetes import Manifest

SHOP = Path(__file__).parent / "shop"


@pytest.fixture(scope="module", params=helm.MAJORS)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Renders the chart of a shop, whose dependency Helm itself has fetched from our folder."""
    major, place = request.param, tmp_path_factory.mktemp("shop")
    chart = shutil.copytree(SHOP, place / "shop")
    described = chart / "Chart.yaml"
    ours = described.read_text().replace("../../../helm/pgvigil", str(helm.CHART))
    described.write_text(ours)
    helm.run(major, "dependency", "update", str(chart), environment={"HOME": str(place)})
    assert (chart / "charts").is_dir()

    def render(**values: Any) -> list[Manifest]:
        return rendered(values=values, chart=chart, major=major)

    return render


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (of for of in manifests if of["kind"] == kind)
    return found


def test_the_pod_has_the_exporter_and_its_volumes_beside_its_own(shop: Any) -> None:
    manifests = shop()
    for manifest in manifests:
        assert kubernetes.complaints("1.31", manifest) == []
    assert sorted(of["kind"] for of in manifests) == ["ConfigMap", "StatefulSet"]
    template = only(manifests, "StatefulSet")["spec"]["template"]
    database, exporter = template["spec"]["containers"]
    assert database["name"] == "postgres"
    assert exporter["name"] == "pgvigil"
    assert "env" not in exporter
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert volumes > {mount["name"] for mount in exporter["volumeMounts"]}
    text = template["spec"]["volumes"][1]["projected"]["sources"]
    assert text == [
        {"configMap": {"name": only(manifests, "ConfigMap")["metadata"]["name"]}},
        {
            "secret": {
                "name": "shop-db",
                "items": [{"key": "monitoring-password", "path": "passwords/local"}],
            }
        },
    ]


def test_a_new_configuration_leaves_the_pod_alone(shop: Any) -> None:
    before, after = shop(), shop(pgvigil={"objectives": {"REP-1": {"lag_seconds": {"ticket": 60}}}})
    assert only(before, "ConfigMap") != only(after, "ConfigMap")
    assert only(before, "StatefulSet") == only(after, "StatefulSet")
    _, exporter = only(after, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert "--watch-config" in exporter["args"]


def test_the_values_of_the_other_chart_go_before_ours(shop: Any) -> None:
    manifests = shop(pgvigil={"service": {"port": 9999}, "image": {"tag": "mine"}})
    _, exporter = only(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert exporter["image"].endswith(":mine")
    assert exporter["ports"] == [{"name": "pgvigil", "containerPort": 9999, "protocol": "TCP"}]
    assert exporter["livenessProbe"]["httpGet"]["port"] == "pgvigil"


def test_rules_and_a_monitor_of_the_pods_come_with_it(shop: Any) -> None:
    asked = {key: {"enabled": True} for key in ("podMonitor", "prometheusRule", "dashboards")}
    manifests = shop(pgvigil={"assumeCRDs": True, **asked})
    monitor = only(manifests, "PodMonitor")["spec"]
    template = only(manifests, "StatefulSet")["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    (port,) = template["spec"]["containers"][1]["ports"]
    assert endpoint["port"] == port["name"]
    assert {
        "sourceLabels": ["__meta_kubernetes_pod_name"],
        "targetLabel": "instance",
    } in endpoint["relabelings"]
    assert len([of for of in manifests if of["kind"] == "PrometheusRule"]) > 10


def test_a_condition_switches_it_off(shop: Any) -> None:
    manifests = shop(pgvigil={"enabled": False})
    assert [of["kind"] for of in manifests] == ["StatefulSet"]
    (database,) = manifests[0]["spec"]["template"]["spec"]["containers"]
    assert database["name"] == "postgres"
