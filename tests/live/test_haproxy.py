"""Takes the servers away from a real HAProxy before a real Patroni cluster, seen by our rules."""

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import yaml

from lab import grafana, haproxy, patroni, prometheus
from lab.haproxy import CONNECTION_LIMIT, FRONTEND_LIMIT, HAProxy
from lab.hurry import hurried
from lab.line import Line
from lab.patroni import Pair
from lab.prometheus import Prometheus

ROOT = Path(__file__).parents[2]
SUITES = {"2.6": "bookworm", "3.0": "trixie"}
LAST = "3.0"


class Scene(NamedTuple):
    """A cluster, an HAProxy of each version before it, and the Prometheus that watches them."""

    pair: Pair
    proxies: dict[str, HAProxy]
    watcher: Prometheus
    lines: list[Line]
    """By which the last of them reaches the servers."""


def given(reason: str) -> NoReturn:
    """End the test for want of something: a failure where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    program = prometheus.installed()
    if program is None:
        given("Prometheus is not installed")
    text = (ROOT / "prometheus" / "patroni.yml").read_text()
    try:
        programs = patroni.programs(4)
        found = {version: haproxy.program(suite) for version, suite in SUITES.items()}
    except RuntimeError as error:
        given(f"Patroni or HAProxy cannot be had: {error}")
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(Pair(programs, "orders"))
        lines = [stack.enter_context(Line("127.0.0.1", member.port)) for member in pair.members]
        ports = {member.name: line.port for member, line in zip(pair.members, lines, strict=True)}
        proxies = {
            version: stack.enter_context(HAProxy(path, pair, ports if version == LAST else {}))
            for version, path in found.items()
        }
        for number, proxy in enumerate(proxies.values(), 1):
            assert f"proxy{number}:8405" in text
            text = text.replace(f"proxy{number}:8405", f"127.0.0.1:{proxy.metrics_port}")
        jobs = yaml.safe_load(text)["scrape_configs"]
        rules = hurried(ROOT / "rules" / "haproxy.yml", tmp_path_factory.mktemp("rules"))
        watcher = Prometheus(
            program, [job for job in jobs if job["job_name"] == "haproxy"], [rules], every="500ms"
        )
        stack.enter_context(watcher)
        watcher.wait_until("count(up == 1) == 2")
        yield Scene(pair, proxies, watcher, lines)


def instance(proxy: HAProxy) -> str:
    return f"127.0.0.1:{proxy.metrics_port}"


@pytest.mark.parametrize("version", SUITES)
def test_the_names_that_rules_may_use_are_those_of_a_real_haproxy(
    scene: Scene, version: str
) -> None:
    kept = (Path(__file__).parent / "pages" / f"haproxy-{version}.txt").read_text()
    told = re.findall(r"^# TYPE (\w+ \w+)$", scene.proxies[version].metrics(), re.M)
    assert told == kept.splitlines()


def test_a_proxy_with_a_primary_and_a_replica_raises_no_alert(scene: Scene) -> None:
    scene.watcher.wait_until("count(haproxy_backend_active_servers == 1) == 4")
    assert scene.watcher.alerts() == []


def test_every_panel_of_the_dashboard_has_data(scene: Scene) -> None:
    variables = {"cluster": ".+", "__rate_interval": "5s"}
    for _, expression, _ in grafana.queries(ROOT / "grafana" / "haproxy.json", variables):
        scene.watcher.wait_until(expression)  # a rate wants two scrapes


def test_clients_that_take_every_session_and_wait_are_told(scene: Scene) -> None:
    watcher, proxy = scene.watcher, scene.proxies["2.6"]
    here = {"instance": instance(proxy), "cluster": "orders"}
    with contextlib.ExitStack() as stack:
        clients: list[socket.socket] = [
            stack.enter_context(proxy.connect(proxy.primary_port)) for _ in range(FRONTEND_LIMIT)
        ]
        assert clients
        watcher.wait_for_alert("HaproxyQueueing", severity="ticket", proxy="primary", **here)
        watcher.wait_for_alert("HaproxySessionsNearLimit", proxy="write", **here)
        assert {alert["instance"] for alert in watcher.alerts()} == {here["instance"]}
    watcher.wait_until_resolved()


def test_as_many_connections_as_a_proxy_takes_are_told(scene: Scene) -> None:
    watcher, proxy = scene.watcher, scene.proxies["2.6"]
    here = {"instance": instance(proxy), "cluster": "orders"}
    with contextlib.ExitStack() as stack:
        # They go nowhere, so that neither a frontend nor a server has its fill.
        for _ in range(CONNECTION_LIMIT - 5):
            stack.enter_context(proxy.connect(proxy.metrics_port))
        watcher.wait_for_alert("HaproxyConnectionsNearLimit", severity="ticket", **here)
        assert {alert["instance"] for alert in watcher.alerts()} == {here["instance"]}
    watcher.wait_until_resolved()


def test_a_server_that_passes_its_checks_and_takes_no_connection_is_told(scene: Scene) -> None:
    watcher, proxy = scene.watcher, scene.proxies[LAST]
    over = threading.Event()

    def try_again() -> None:
        with contextlib.ExitStack() as stack:
            while not over.wait(0.5):
                stack.enter_context(proxy.connect(proxy.primary_port))

    for line in scene.lines:
        line.refuse()
    client = threading.Thread(target=try_again)
    client.start()
    here = {"instance": instance(proxy), "cluster": "orders", "proxy": "primary"}
    try:
        watcher.wait_for_alert("HaproxyConnectionErrors", severity="ticket", **here)
        assert {alert["instance"] for alert in watcher.alerts()} == {here["instance"]}
    finally:
        over.set()
        client.join()
        for line in scene.lines:
            line.accept()
    watcher.wait_until_resolved()


def test_a_server_that_fails_its_checks_for_no_role_is_told_with_its_backend(
    scene: Scene,
) -> None:
    watcher, pair = scene.watcher, scene.pair
    standby = pair.other(pair.leader())
    standby.kill()
    for proxy in scene.proxies.values():
        here = {"instance": instance(proxy), "cluster": "orders"}
        watcher.wait_for_alert("HaproxyServerDown", severity="ticket", server=standby.name, **here)
        watcher.wait_for_alert("HaproxyBackendDown", severity="page", proxy="replica", **here)
    told = {alert.get("proxy") or alert.get("server") for alert in watcher.alerts()}
    assert told == {"replica", standby.name}
    standby.start()
    for proxy in scene.proxies.values():
        proxy.wait_until("replica", 1)
    watcher.wait_until_resolved()


def test_a_server_that_comes_and_goes_is_told(scene: Scene) -> None:
    watcher, pair = scene.watcher, scene.pair
    second = pair.other(pair.leader())
    for _ in range(3):
        second.halt()
        for proxy in scene.proxies.values():
            proxy.wait_until("replica", 0)
        second.resume()
        for proxy in scene.proxies.values():
            proxy.wait_until("replica", 1)
    watcher.wait_for_alert("HaproxyServerFlapping", severity="ticket", server=second.name)


def test_a_proxy_that_is_away_is_told_and_pages_when_it_is_the_last(scene: Scene) -> None:
    watcher = scene.watcher
    first, last = scene.proxies.values()
    first.stop()
    watcher.wait_for_alert("HaproxyDown", severity="ticket", instance=instance(first))
    watcher.wait_until_resolved(but="HaproxyDown")
    last.stop()
    watcher.wait_for_alert("HaproxyUnreachable", severity="page", cluster="orders")
