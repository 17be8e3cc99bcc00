"""What the chart writes is run as Kubernetes would: the exporter, its replicas, and the test."""

import contextlib
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import yaml

from lab import kubernetes, ports, prometheus
from lab.authority import Authority
from lab.cluster import PGVIGIL, READER, Role
from lab.exporter import Exporter
from lab.helm import CHART, rendered
from lab.kubernetes import Manifest
from lab.postgres import Server
from lab.prometheus import Prometheus

NAMES = ("orders", "billing", "stock", "users", "pool-a", "pool-b")

pytestmark = pytest.mark.parametrize("major", [18])


def given(example: str, server: Server) -> dict[str, Any]:
    """The values of an example, its targets with the address of a real server."""
    values: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{example}-values.yaml").read_text())
    for target in values["targets"].values():
        target["connection"] = {"host": "127.0.0.1", "port": server.port, "user": "pgvigil"}
    return values


@contextlib.contextmanager
def running(
    manifests: list[Manifest],
    root: Path,
    name: str = "",
    role: Role = PGVIGIL,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Exporter]:
    """The exporter of a pod of that name, with the files, arguments and environment of its own."""
    pod = next(kubernetes.pods(manifests))
    kubernetes.mount(pod, manifests, root, role.password)
    (container,) = pod["spec"]["containers"]
    command, *words = container["args"]
    assert command == "serve"
    port = ports.free_port()
    # Nothing here may write to /etc, and ports of others are in use.
    for path in (root / "etc").rglob("*.yml"):
        text = path.read_text().replace('"/etc/', f'"{root}/etc/')
        path.resolve().write_text(text.replace(":9187", f"127.0.0.1:{port}"))
    words = [word.replace("/etc/", f"{root}/etc/") for word in words]
    environment = {
        told["name"]: told["value"].replace("$(POD_NAME)", name)
        for told in container.get("env", ())
        if "value" in told
    }
    with Exporter(*words, environment=environment, port=port, tls=tls) as exporter:
        yield exporter


@pytest.mark.parametrize("example", ["one", "plain"])
def test_the_exporter_of_an_example_watches_a_real_server(
    example: str, server: Server, tmp_path: Path
) -> None:
    # The password of the example with a plain one is the role's own.
    with running(rendered(values=given(example, server)), tmp_path) as exporter:
        page = exporter.scrape()
        assert page.value("pg_up") == 1
        assert page.failed() == set()
        if example == "one":
            asked = {"standard": "REP-1", "objective": "lag_seconds"}
            assert page.value("pgvigil_objective", **asked, severity="page") == 600
            assert page.value("pg_up", cluster="orders") == 1
        else:
            assert page.value("shop_orders_waiting") > 0


def test_prometheus_finds_each_target_with_one_of_the_replicas(
    server: Server, tmp_path: Path
) -> None:
    program = prometheus.installed()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Prometheus is not installed")
    # So many targets on one server are more connections than pgvigil's role may have.
    connection = {"host": "127.0.0.1", "port": server.port, "user": READER.name}
    target = {"connection": connection, "existingSecret": {"name": "monitoring"}}
    values = {
        "mode": "many",
        "replicas": 3,
        "targets": dict.fromkeys(NAMES, target),
        "assumeCRDs": True,
        "scrapeConfig": {"enabled": True},
    }
    manifests = rendered(values=values)
    (asked,) = (of["spec"] for of in manifests if of["kind"] == "ScrapeConfig")
    with contextlib.ExitStack() as stack:
        replicas: dict[str, Exporter] = {}
        for number in range(3):
            name = f"watch-pgvigil-{number}"
            replicas[name] = stack.enter_context(running(manifests, tmp_path / name, name, READER))
        shares = [json.loads(of.get("/sd").body) for of in replicas.values()]
        kept = sorted(found["labels"]["instance"] for share in shares for found in share)
        assert kept == sorted(NAMES)
        watching = stack.enter_context(Prometheus(program, [job(asked, replicas)]))
        for name in NAMES:
            watching.wait_until(f'pg_up{{job="postgresql", instance="{name}"}} == 1')
        assert len(watching.query("pg_up")) == len(NAMES)


def job(asked: Mapping[str, Any], replicas: Mapping[str, Exporter]) -> dict[str, Any]:
    """The operator's job for a ScrapeConfig, its replicas at the ports where they really listen."""
    found = []
    for discovery in asked["httpSDConfigs"]:
        name = discovery["url"].removeprefix("http://").partition(".")[0]
        found.append({"url": f"http://127.0.0.1:{replicas[name].port}/sd"})
    words = {"targetLabel": "target_label", "replacement": "replacement"}
    return {
        "job_name": "scrapeConfig/monitoring/watch-pgvigil",
        "http_sd_configs": [{**of, "refresh_interval": "1s"} for of in found],
        "relabel_configs": [
            {words[key]: value for key, value in of.items()} for of in asked["relabelings"]
        ],
    }


def asked(manifests: list[Manifest], port: int) -> "subprocess.CompletedProcess[str]":
    """What the test of a release says of an exporter; it does not wait before it asks again."""
    (pod,) = (of for of in manifests if of["kind"] == "Pod")
    python, option, code, *words = pod["spec"]["containers"][0]["command"]
    assert (python, option) == ("python3", "-c")
    impatient = f"import time; time.sleep = lambda _: None\n{code}"
    name = "watch-pgvigil.monitoring.svc:9187"
    urls = [word.replace(name, f"127.0.0.1:{port}") for word in words]
    command = [sys.executable, "-c", impatient, *urls]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_test_of_a_release_passes_while_it_answers_and_fails_when_it_does_not(
    server: Server, tmp_path: Path
) -> None:
    manifests = rendered(values=given("one", server))
    with running(manifests, tmp_path) as exporter:
        done = asked(manifests, exporter.port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"http://127.0.0.1:{exporter.port}/readyz 200",
        f"http://127.0.0.1:{exporter.port}/metrics 200",
    ]
    assert asked(manifests, exporter.port).returncode == 1


def test_locked_doors_let_the_probes_in_and_nobody_else_without_a_password(
    server: Server, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server", "IP:127.0.0.1")
    users = {"prometheus": bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()}
    web = {
        # Relative paths, and so within the same Secret.
        "tls_server_config": {"cert_file": "tls.crt", "key_file": "tls.key"},
        "basic_auth_users": users,
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "web"},
        "stringData": {
            "web-config.yml": json.dumps(web),
            "tls.crt": pair.certificate.read_text(),
            "tls.key": pair.key.read_text(),
        },
    }
    locked = {"webConfig": {"existingSecret": "web", "tls": True}}
    manifests = rendered(values={**given("one", server), **locked})
    tls = authority.client()
    with running([*manifests, secret], tmp_path / "pod", tls=tls) as exporter:
        (container,) = next(kubernetes.pods(manifests))["spec"]["containers"]
        for probe in (container["livenessProbe"], container["readinessProbe"]):
            assert probe["httpGet"]["scheme"] == "HTTPS"
            assert exporter.get(probe["httpGet"]["path"]).status == 200
        assert exporter.get("/metrics").status == 401
        done = asked(manifests, exporter.port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"https://127.0.0.1:{exporter.port}/metrics 401"
