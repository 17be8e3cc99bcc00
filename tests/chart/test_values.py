"""Values become a configuration that pgvigil takes, without a password in it, or are refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pgvigil import catalogue, cli, config
from pgvigil.config import Told
from psycopg import pq

from lab import helm, kubernetes
from lab.cluster import PGVIGIL
from lab.helm import EXAMPLES, HelmError, rendered
from lab.kubernetes import Manifest

CANARY = "canary-7f3a"
ONE: Mapping[str, Any] = {"targets": {"orders": {"connection": {"host": "db1"}}}}
TWO = {"targets": {name: {"connection": {"host": name}} for name in ("orders", "billing")}}
SECRETS = [o.keyword.decode() for o in pq.Conninfo.get_defaults() if o.dispchar == b"*"]
"""libpq's own keywords for what is not to be shown."""


def written(manifests: list[Manifest]) -> dict[str, Any]:
    """The configuration file in the ConfigMap."""
    (text,) = (of["data"]["pgvigil.yml"] for of in manifests if "pgvigil.yml" in of.get("data", {}))
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def unpacked(manifests: list[Manifest], root: Path) -> Path:
    """The configuration file where the pod has it, below a folder."""
    pod = next(kubernetes.pods(manifests))
    kubernetes.mount(pod, manifests, root, CANARY)
    path = root / "etc/pgvigil/pgvigil.yml"
    real = path.resolve()
    real.write_text(
        real.read_text().replace("/etc/pgvigil-catalogue", f"{root}/etc/pgvigil-catalogue")
    )
    return path


def refusal(values: Mapping[str, Any], *words: str) -> str:
    with pytest.raises(HelmError) as caught:
        rendered(values=values, words=words)
    return str(caught.value)


@pytest.mark.parametrize(
    "example",
    [path for path in EXAMPLES if path.stem not in ("legacy-values", "sidecar-values")],
    ids=lambda path: path.stem,
)
def test_pgvigil_takes_the_configuration_of_an_example(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = yaml.safe_load(example.read_text())["targets"]
    path = unpacked(rendered(example), tmp_path)
    assert cli.main(["check", "--config", str(path)]) == 0
    told = capsys.readouterr().out
    assert all(f"target {name}: " in told for name in given)
    for target in config.settle(Told(config=path), {}).targets:
        wanted = given[target.name].get("existingSecret") and CANARY
        wanted = given[target.name].get("password", wanted)
        assert target.parameters().get("password") == wanted


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_pgvigil_knows_every_option_of_an_example(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    known = capsys.readouterr().out
    for pod in kubernetes.pods(rendered(example, values={"reload": True})):
        for word in pod["spec"]["containers"][0].get("args", ())[1:]:
            assert f"{word.partition('=')[0]} " in known or f"[{word}]" in known


def test_own_queries_are_a_part_of_the_catalogue(tmp_path: Path) -> None:
    path = unpacked(rendered(helm.CHART / "ci" / "plain-values.yaml"), tmp_path)
    settings = config.settle(Told(config=path), {})
    assert "orders.waiting" in {query.name for query in catalogue.load(settings.catalogue)}


def test_objectives_hold_for_every_target_that_has_none_of_its_own(tmp_path: Path) -> None:
    own = {"REP-1": {"lag_seconds": {"ticket": 5}}}
    everywhere = {"REP-1": {"lag_seconds": {"ticket": 60, "page": 600}}}
    targets = {
        "one": {"connection": {"host": "db1"}},
        "two": {"connection": {"host": "db2"}, "objectives": own},
    }
    manifests = rendered(values={"mode": "many", "targets": targets, "objectives": everywhere})
    found = {
        target.name: {(of.standard, of.severity): of.value for of in target.objectives}
        for target in config.settle(Told(config=unpacked(manifests, tmp_path)), {}).targets
    }
    assert found == {
        "one": {("REP-1", "ticket"): 60, ("REP-1", "page"): 600},
        "two": {("REP-1", "ticket"): 5, ("REP-1", "page"): 600},
    }


@pytest.mark.parametrize("major", helm.MAJORS)
def test_values_of_any_kind_reach_pgvigil_as_they_are(major: int) -> None:
    """Helm writes the YAML of one library, and pgvigil reads that of another."""
    words = ["yes", "on", "y", "null", "~", "=", "<<", "1e6", "0x1F", "0o7", "010", "1_000", ".inf"]
    words += ["12:30:45", "02:00", "2026-12-01", "2026-12-01T22:00:00Z", "", " ", "a: b", "# no"]
    words += ["{{ $labels }}", "two\nlines\n", "é\u2028", "'\"\\", "-", "?", "!tag", "&a", "*a"]
    target = {
        "connection": {"host": "db1", "port": 5432, "application_name": "yes"},
        "labels": {f"label_{number}": word for number, word in enumerate(words)},
        "objectives": {"A": {"b": {"page": 1_000_000, "ticket": 0.0001, "finding": 123456789012}}},
        "maintenance": [{"days": ["sunday"], "at": "02:00", "hours": 2}],
        "pooler": True,
    }
    (found,) = written(rendered(values={"targets": {"orders": target}}, major=major))[
        "targets"
    ].values()
    assert found == target


def test_a_password_in_the_values_is_in_a_secret_and_nowhere_else(tmp_path: Path) -> None:
    password = f"{CANARY} {PGVIGIL.password}"
    values = {"targets": {"orders": {"connection": {"host": "db1"}, "password": password}}}
    manifests = rendered(values=values)
    holding = [of["kind"] for of in manifests if CANARY in json.dumps(of)]
    assert holding == ["Secret"]
    (target,) = config.settle(Told(config=unpacked(manifests, tmp_path)), {}).targets
    assert target.parameters()["password"] == password


@pytest.mark.parametrize("keyword", SECRETS)
def test_every_secret_that_libpq_knows_is_refused_in_a_config_map(keyword: str) -> None:
    for target in (
        {"connection": {"host": "db1", keyword: CANARY}},
        {"dsn": f"host=db1 {keyword}={CANARY}"},
        {"dsn": f"host=db1 {keyword} = '{CANARY}'"},
        {"dsn": f"postgresql://db1/postgres?{keyword}={CANARY}"},
        {"dsn": f"postgresql://db1/postgres?{keyword.replace('s', '%73')}={CANARY}"},
    ):
        told = refusal({"targets": {"orders": target}})
        assert "targets.orders." in told
        assert "Secret" in told
        assert CANARY not in told


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"targets": {"orders": {"dsn": f"postgresql://u:{CANARY}@db1"}}}, "targets.orders.dsn"),
        ({"targets": {"orders": {"dsn": f"postgresql://:{CANARY}@db1"}}}, "targets.orders.dsn"),
        ({"targets": {"orders": {"dsn": f"postgres://u:{CANARY}/x@db1"}}}, "targets.orders.dsn"),
        (
            {"targets": {"orders": {"connection": {"dbname": f"postgresql://u:{CANARY}@db1"}}}},
            "targets.orders.connection.dbname",
        ),
        (
            {
                "targets": {
                    "orders": {
                        "kind": "pgbackrest",
                        "command": ["a", f"--repo1-cipher-pass={CANARY}"],
                    }
                }
            },
            "targets.orders.command[1]",
        ),
        ({**ONE, "config": {"modules": {"a": {"password": CANARY}}}}, "config.modules.a.password"),
        ({**ONE, "extraEnv": [{"name": "PGPASSWORD", "value": CANARY}]}, "extraEnv[0]"),
        ({**ONE, "extraEnv": [{"name": "DATA_SOURCE_PASS", "value": CANARY}]}, "extraEnv[0]"),
        (
            {**ONE, "extraEnv": [{"name": "PGVIGIL_DSN", "value": f"postgresql://u:{CANARY}@db"}]},
            "extraEnv[0].value",
        ),
        ({**ONE, "extraArgs": [f"--dsn=postgresql://u:{CANARY}@db"]}, "extraArgs[0]"),
    ],
)
def test_a_password_that_everybody_could_read_is_refused(
    values: Mapping[str, Any], place: str
) -> None:
    told = refusal(values)
    assert f"{place}:" in told
    assert "Secret" in told
    assert CANARY not in told


@pytest.mark.parametrize(
    "target",
    [
        {"dsn": "postgresql://pgvigil@db1:5432,db2:5433/postgres?sslmode=require"},
        {"dsn": "postgresql://db1:5432/postgres"},
        {"dsn": "postgresql://[::1]:5432/postgres?passfile=/etc/pass"},
        {"connection": {"host": "db1", "passfile": "/run/pass", "require_auth": "password"}},
        {"connection": {"host": "db1"}, "labels": {"team": "secret keepers"}},
    ],
    ids=str,
)
def test_what_holds_no_password_is_taken(target: Mapping[str, Any]) -> None:
    assert written(rendered(values={"targets": {"orders": target}}))["targets"]["orders"] == target


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "targets: whom shall it watch? Name a target"),
        ({"mode": "many"}, "targets: whom shall they watch?"),
        (TWO, "mode: it is one, and there are 2 targets; say `mode: many`"),
        ({"mode": "lots", **ONE}, "mode"),
        ({"modes": "one", **ONE}, "modes"),
        ({"targets": {"orders": {"hots": "db1"}}}, "hots"),
        ({"targets": {"or ders": {"dsn": "host=db1"}}}, "or ders"),
        ({"targets": {"orders": {"existingSecret": {"key": "a"}}}}, "name"),
        ({"serviceMonitor": {"enabeld": True}, **ONE}, "enabeld"),
        ({"replicas": 0, **TWO}, "replicas"),
        (
            {"targets": {"orders": {"password": "a", "existingSecret": {"name": "b"}}}},
            "targets.orders: has more than one of existingSecret, password and password_file",
        ),
        (
            {"targets": {"a:b": {"dsn": "host=db1", "password": "a"}}},
            "no key of a Secret has a colon",
        ),
        (
            {"objectives": {"REP-1": {}}, "extraArgs": ["--dsn=host=a"]},
            "objectives: they belong to targets",
        ),
        (
            {**ONE, "catalogue": {"files": {"a.yml": ""}, "existingConfigMap": "a"}},
            "catalogue: has both files and existingConfigMap",
        ),
        ({**ONE, "catalogue": {"files": {"a.txt": ""}}}, "a.txt"),
        ({**ONE, "config": {"listen": ":1"}}, "config.listen: say it as service.port"),
        ({**ONE, "config": {"targets": {}}}, "config.targets: say it as targets"),
        ({**TWO, "mode": "many", "probe": {"enabled": True}}, "probe: a Probe does not know"),
        (
            {"targets": {"orders": {"dsn": "host=db1"}}, "networkPolicy": {"enabled": True}},
            "networkPolicy.ports: say which, for targets.orders has them in its dsn",
        ),
        (
            {**ONE, "mode": "sidecar", "networkPolicy": {"enabled": True}},
            "networkPolicy: not in mode sidecar",
        ),
        (
            {**ONE, "mode": "sidecar", "podMonitor": {"enabled": True}},
            "podMonitor.selector: name the labels",
        ),
        (
            {
                **ONE,
                "assumeCRDs": True,
                "prometheusRule": {"enabled": True, "disabledAlerts": ["No"]},
            },
            "prometheusRule.disabledAlerts: no alert is called No",
        ),
        (
            {
                **ONE,
                "assumeCRDs": True,
                "prometheusRule": {"enabled": True, "disabledAreas": ["no"]},
            },
            "prometheusRule.disabledAreas: there is no no; there are activity, availability",
        ),
        (
            {**ONE, "dashboards": {"enabled": True, "disabled": ["no"]}},
            "dashboards.disabled: there is no no",
        ),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused_with_the_reason(
    values: Mapping[str, Any], told: str
) -> None:
    assert told in refusal(values)


@pytest.mark.parametrize(
    ("key", "api"),
    [
        ("serviceMonitor", "monitoring.coreos.com/v1/ServiceMonitor"),
        ("podMonitor", "monitoring.coreos.com/v1/PodMonitor"),
        ("probe", "monitoring.coreos.com/v1/Probe"),
        ("scrapeConfig", "monitoring.coreos.com/v1alpha1/ScrapeConfig"),
        ("prometheusRule", "monitoring.coreos.com/v1/PrometheusRule"),
    ],
)
def test_objects_of_the_operator_are_made_where_the_cluster_knows_them(key: str, api: str) -> None:
    values = {**ONE, key: {"enabled": True}}
    told = refusal(values)
    assert f"{key}: this cluster does not know {api}" in told
    kind = api.rpartition("/")[2]
    assert kind in {of["kind"] for of in rendered(values=values, words=("--api-versions", api))}
    assert kind in {of["kind"] for of in rendered(values={**values, "assumeCRDs": True})}
    assert kind not in {of["kind"] for of in rendered(values=ONE, words=("--api-versions", api))}


def test_nothing_of_the_operator_is_made_unasked() -> None:
    kinds = [of["kind"] for of in rendered(values=ONE)]
    assert sorted(kinds) == ["ConfigMap", "Deployment", "Pod", "Service", "ServiceAccount"]
