"""The objects that the chart makes are what Kubernetes, the operator and OpenShift take."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab import helm, kubernetes
from lab.helm import EXAMPLES, rendered
from lab.kubernetes import Manifest

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)

SELECTOR = {
    "app.kubernetes.io/name": "pgvigil",
    "app.kubernetes.io/instance": "watch",
    "app.kubernetes.io/component": "exporter",
}
"""As in the first release. Kubernetes lets nobody change it: an upgrade that did would fail."""

ONE = {"targets": {"orders": {"connection": {"host": "db1"}}}}
EVERYTHING: Mapping[str, Any] = {
    "assumeCRDs": True,
    **{
        key: {"enabled": True}
        for key in (
            *("podMonitor", "scrapeConfig", "prometheusRule"),
            *("networkPolicy", "podDisruptionBudget"),
        )
    },
}


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def selectors(manifests: list[Manifest]) -> Iterator[Mapping[str, str]]:
    """What finds the exporter's pods."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor"):
            yield spec["selector"]["matchLabels"]
        elif manifest["kind"] == "Service":
            yield spec["selector"]
        elif manifest["kind"] == "NetworkPolicy":
            yield spec["podSelector"]["matchLabels"]


@each_example
@pytest.mark.parametrize("major", helm.MAJORS)
def test_helm_has_nothing_to_say_against_an_example(major: int, example: Path) -> None:
    helm.run(major, "lint", "--strict", str(helm.CHART), "--values", str(example))


@each_example
@pytest.mark.parametrize("version", kubernetes.VERSIONS)
def test_an_example_is_what_each_version_of_kubernetes_takes(version: str, example: Path) -> None:
    manifests = rendered(example, words=("--kube-version", version))
    for manifest in manifests:
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        assert kubernetes.complaints(version, manifest) == [], name


@each_example
def test_helm_4_makes_the_same_of_an_example_as_helm_3(example: Path) -> None:
    assert rendered(example, major=4) == rendered(example, major=3)


@pytest.mark.parametrize("version", kubernetes.VERSIONS)
def test_a_fault_in_an_object_is_seen(version: str) -> None:
    manifests = rendered(values={**ONE, **EVERYTHING, "serviceMonitor": {"enabled": True}})
    for kind, *path in (
        ("Deployment", "spec", "selectors"),
        ("Deployment", "spec", "template", "spec", "containers", 0, "volumeMount"),
        ("NetworkPolicy", "spec", "egress", 0, "port"),
        ("ServiceMonitor", "spec", "endpoints", 0, "every"),
        ("PrometheusRule", "spec", "groups", 0, "rules", 0, "alarm"),
    ):
        manifest = next(of for of in manifests if of["kind"] == kind)
        inner: Any = manifest
        for key in path[:-1]:
            inner = inner[key]
        assert kubernetes.complaints(version, manifest) == []
        inner[path[-1]] = "unheard of"
        assert kubernetes.complaints(version, manifest), kind
        del inner[path[-1]]


@pytest.mark.parametrize(
    "values",
    [
        {"commonLabels": {"environment": "production"}},
        {"podLabels": {"app.kubernetes.io/name": "mine", "team": "databases"}},
        {"image": {"tag": "9.9.9"}},
        {"mode": "many"},
        {"mode": "many", "replicas": 7},
        {"service": {"port": 9999}},
        {"webConfig": {"existingSecret": "web", "tls": True}},
    ],
    ids=str,
)
def test_only_names_change_how_pods_are_found(values: Mapping[str, Any]) -> None:
    manifests = rendered(values={**ONE, **EVERYTHING, **values})
    found = list(selectors(manifests))
    assert len(found) == 5
    assert all(selector == SELECTOR for selector in found)
    (pod,) = (pod for pod in kubernetes.pods(manifests) if "kind" not in pod)
    assert pod["metadata"]["labels"].items() >= SELECTOR.items()


def test_a_name_of_ones_own_is_the_name_of_everything() -> None:
    names = {"fullnameOverride": "watcher", "nameOverride": "exporter"}
    manifests = rendered(values={**ONE, **EVERYTHING, **names})
    assert all(of["metadata"]["name"].startswith("watcher") for of in manifests)
    wanted = {**SELECTOR, "app.kubernetes.io/name": "exporter"}
    assert all(selector == wanted for selector in selectors(manifests))


def test_a_long_name_leaves_room_for_what_is_added_to_it() -> None:
    manifests = rendered(values={**ONE, "mode": "many"}, release="a-release-" * 5 + "abc")
    workload, service = one(manifests, "StatefulSet"), one(manifests, "Service")
    # A pod's name and hash are labels, too: at most 63 characters.
    assert len(workload["metadata"]["name"]) <= 52
    assert len(service["metadata"]["name"]) <= 63
    assert workload["spec"]["serviceName"] == service["metadata"]["name"]


def test_the_pod_of_the_test_is_no_exporter() -> None:
    manifests = rendered(values=ONE)
    labels = one(manifests, "Pod")["metadata"]["labels"]
    assert not SELECTOR.items() <= labels.items()


@each_example
def test_every_pod_is_restricted(example: Path) -> None:
    manifests = rendered(example)
    for pod in kubernetes.pods(manifests):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        for volume in spec.get("volumes", ()):
            assert volume.keys() & {"configMap", "secret", "projected"}, volume


@each_example
def test_a_user_is_named_only_by_who_asks_for_it(example: Path) -> None:
    manifests = rendered(example)
    named = {
        key
        for pod in kubernetes.pods(manifests)
        for context in (pod["spec"], *pod["spec"]["containers"])
        for key in context["securityContext"].keys() & {"runAsUser", "runAsGroup", "fsGroup"}
    }
    locked = {"runAsUser", "runAsGroup", "fsGroup"} if example.stem == "locked-values" else set()
    assert named == locked


def test_what_the_values_say_of_pods_stands_in_them() -> None:
    said: dict[str, Any] = {
        "priorityClassName": "monitoring",
        "nodeSelector": {"kubernetes.io/arch": "arm64"},
        "tolerations": [{"key": "monitoring", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "imagePullSecrets": [{"name": "registry"}],
        "terminationGracePeriodSeconds": 7,
    }
    container: dict[str, Any] = {
        "extraEnv": [{"name": "PGOPTIONS", "value": "-c jit=off"}],
        "extraEnvFrom": [{"secretRef": {"name": "variables"}}],
        "extraArgs": ["--log-level=debug"],
        "extraVolumes": [{"name": "db-ca", "configMap": {"name": "db-ca"}}],
        "extraVolumeMounts": [{"name": "db-ca", "mountPath": "/etc/db-ca"}],
        "livenessProbe": {"tcpSocket": {"port": "http"}},
    }
    (pod,) = kubernetes.pods(
        of for of in rendered(values={**ONE, **said, **container}) if of["kind"] == "Deployment"
    )
    spec = pod["spec"]
    assert spec.items() >= said.items()
    (found,) = spec["containers"]
    assert found["env"] == container["extraEnv"]
    assert found["envFrom"] == container["extraEnvFrom"]
    assert "--log-level=debug" in found["args"]
    assert container["extraVolumes"][0] in spec["volumes"]
    assert container["extraVolumeMounts"][0] in found["volumeMounts"]
    assert found["livenessProbe"] == container["livenessProbe"]
    assert found["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_constraints_on_the_spread_count_these_pods_unless_they_say_others() -> None:
    own = {"topologyKey": "zone", "maxSkew": 1, "labelSelector": {"matchLabels": {"a": "b"}}}
    plain = {"topologyKey": "zone", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"}
    manifests = rendered(values={**ONE, "topologySpreadConstraints": [own, plain]})
    spec = one(manifests, "Deployment")["spec"]["template"]["spec"]
    assert spec["topologySpreadConstraints"] == [
        own,
        {**plain, "labelSelector": {"matchLabels": SELECTOR}},
    ]


def test_a_changed_configuration_replaces_the_pods_or_is_taken_by_them() -> None:
    def pod(**values: Any) -> Any:
        return one(rendered(values={**ONE, **values}), "Deployment")["spec"]["template"]

    changes: list[dict[str, Any]]
    changes = [{}, {"objectives": {"A": {}}}, {"catalogue": {"files": {"own.yml": "{}"}}}]
    assert pod() == pod(podDisruptionBudget={"enabled": True})
    sums = {pod(**change)["metadata"]["annotations"]["checksum/config"] for change in changes}
    assert len(sums) == 3
    assert pod(reload=True) == pod(reload=True, objectives={"A": {}})
    assert "--watch-config" in pod(reload=True)["spec"]["containers"][0]["args"]
    assert "--watch-config" not in pod()["spec"]["containers"][0]["args"]


def test_a_policy_opens_the_ports_of_the_databases_and_nothing_else() -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}]
    targets = {
        "one": {"connection": {"host": "db1,db2", "port": "5433,5434"}},
        "two": {"connection": {"host": "db3"}},
        "pool": {"kind": "pgbouncer", "connection": {"host": "pool", "port": 6432}},
        "again": {"connection": {"host": "db4", "port": 5432}},
    }
    policy = {"enabled": True, "to": peers, "from": [{"podSelector": {}}]}
    manifests = rendered(values={"mode": "many", "targets": targets, "networkPolicy": policy})
    spec = one(manifests, "NetworkPolicy")["spec"]
    names, databases = spec["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert {port["port"] for port in databases["ports"]} == {5432, 5433, 5434, 6432}
    assert databases["to"] == peers
    (entry,) = spec["ingress"]
    first, test = entry["from"]
    assert first == {"podSelector": {}}
    labels = one(manifests, "Pod")["metadata"]["labels"]
    assert test["podSelector"]["matchLabels"].items() <= labels.items()


def test_monitors_name_a_target_as_the_configuration_does() -> None:
    values = {**ONE, "assumeCRDs": True, "serviceMonitor": {"enabled": True}}
    manifests = rendered(values={**values, "podMonitor": {"enabled": True}})
    (endpoint,) = one(manifests, "ServiceMonitor")["spec"]["endpoints"]
    (same,) = one(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint == same
    assert endpoint["relabelings"] == [
        {"targetLabel": "job", "replacement": "postgresql"},
        {"targetLabel": "instance", "replacement": "orders"},
    ]
    (port,) = one(manifests, "Service")["spec"]["ports"]
    assert port["name"] == endpoint["port"]
    selector = one(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= one(manifests, "Service")["metadata"]["labels"].items()


def test_each_replica_is_asked_for_its_targets_by_a_name_that_it_keeps() -> None:
    manifests = rendered(values={**ONE, **EVERYTHING, "mode": "many", "replicas": 3})
    found = one(manifests, "ScrapeConfig")["spec"]["httpSDConfigs"]
    workload, service = one(manifests, "StatefulSet"), one(manifests, "Service")
    assert [of["url"] for of in found] == [
        f"http://{workload['metadata']['name']}-{number}"
        f".{service['metadata']['name']}.monitoring.svc:9187/sd"
        for number in range(3)
    ]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert workload["spec"]["podManagementPolicy"] == "Parallel"


def test_credentials_and_tls_are_those_of_scraping_and_of_discovery() -> None:
    chosen = {"enabled": True, "interval": "15s", "tlsConfig": {"serverName": "pgvigil"}}
    chosen["basicAuth"] = {"username": {"name": "scraper", "key": "user"}}
    web = {"existingSecret": "web", "tls": True}
    manifests = rendered(
        values={**ONE, "assumeCRDs": True, "scrapeConfig": chosen, "webConfig": web}
    )
    spec = one(manifests, "ScrapeConfig")["spec"]
    (discovery,) = spec["httpSDConfigs"]
    assert discovery["url"].startswith("https://")
    assert spec["scheme"] == "HTTPS"
    assert spec["scrapeInterval"] == "15s"
    for place in (spec, discovery):
        assert place["tlsConfig"] == chosen["tlsConfig"]
        assert place["basicAuth"] == chosen["basicAuth"]
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert "--web-config=/etc/pgvigil-web/web-config.yml" in container["args"]
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
