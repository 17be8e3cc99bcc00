"""Breaks real Patroni clusters of two versions, and has a real Prometheus see it by our rules."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import yaml

from lab import grafana, patroni, prometheus
from lab.cluster import PGVIGIL
from lab.exporter import Exporter
from lab.hurry import hurried
from lab.patroni import Member, Pair, Programs
from lab.prometheus import Prometheus

ROOT = Path(__file__).parents[2]
SCOPES = {3: "billing", 4: "orders"}
PATIENT = {"scrape_interval": "2500ms", "scrape_timeout": "2500ms"}
"""Patroni asks a PostgreSQL that is away a second time before it answers, up to 1.8 s later."""


class Scene(NamedTuple):
    """A cluster of each version, and the Prometheus that watches both."""

    billing: Pair
    orders: Pair
    watcher: Prometheus
    exporters: dict[str, Exporter]
    """Those of `orders`, by member."""

    @property
    def pairs(self) -> tuple[Pair, Pair]:
        return self.billing, self.orders


def given(reason: str) -> NoReturn:
    """End the test for want of something: a failure where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def scrape_configuration(pair: Pair, ports: dict[str, int]) -> list[dict[str, Any]]:
    """The example that we ship, with nothing changed but where everything is and how often."""
    text = (ROOT / "prometheus" / "patroni.yml").read_text().replace("orders", pair.scope)
    for address, port in ports.items():
        assert address in text
        text = text.replace(f'"{address}"', f'"127.0.0.1:{port}"')
    jobs: list[dict[str, Any]] = yaml.safe_load(text)["scrape_configs"]
    return [
        job | (PATIENT if job["job_name"] == "patroni" else {})
        for job in jobs
        if "127.0.0.1" in str(job)
    ]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    program = prometheus.installed()
    if program is None:
        given("Prometheus is not installed")
    try:
        programs = [patroni.programs(major) for major in SCOPES]
    except RuntimeError as error:
        given(f"Patroni cannot be had: {error}")
    jobs: dict[str, dict[str, Any]] = {}
    exporters: dict[str, Exporter] = {}
    with contextlib.ExitStack() as stack:

        def started(of: Programs, scope: str) -> Pair:
            return stack.enter_context(Pair(of, scope))

        with ThreadPoolExecutor() as pool:
            billing, orders = pool.map(started, programs, SCOPES.values())
        for pair in (billing, orders):
            ports = {f"{member.name}:8008": member.rest_port for member in pair.members}
            for member in pair.members:
                dsn = member.conninfo(**PGVIGIL.login)
                exporter = stack.enter_context(Exporter(environment={"PGVIGIL_DSN": dsn}))
                ports[f"{member.name}:9187"] = exporter.port
                exporters |= {member.name: exporter} if pair is orders else {}
            for job in scrape_configuration(pair, ports):
                known = jobs.setdefault(job["job_name"], job)
                if known is not job:
                    known["static_configs"] += job["static_configs"]
        rules = hurried(ROOT / "rules" / "patroni.yml", tmp_path_factory.mktemp("rules"))
        watcher = Prometheus(program, list(jobs.values()), [rules], every="500ms")
        stack.enter_context(watcher)
        watcher.wait_until("count(up == 1) == 8")
        try:
            yield Scene(billing, orders, watcher, exporters)
        finally:
            for exporter in exporters.values():
                exporter.stop()


def test_the_members_that_patroni_tells_of_are_watched(scene: Scene, tmp_path: Path) -> None:
    document = {
        "auth_modules": {"reader": {"connection": {**PGVIGIL.login, "dbname": "postgres"}}},
        "discovery": {
            "patroni": [
                {
                    "url": f"http://127.0.0.1:{member.rest_port}",
                    "auth_module": "reader",
                    "cluster": pair.scope,
                }
                for pair in scene.pairs
                for member in pair.members
            ]
        },
    }
    (tmp_path / "pgvigil.yml").write_text(json.dumps(document))
    with Exporter("--config", f"{tmp_path}/pgvigil.yml") as exporter:
        end = time.monotonic() + 60
        while exporter.scrape().value("pgvigil_targets") < 4:
            assert time.monotonic() < end, exporter.log
            time.sleep(0.1)
        for pair in scene.pairs:
            roles = [
                exporter.scrape(f"{pair.scope}-{member.name}").value("pg_in_recovery")
                for member in pair.members
            ]
            assert sorted(roles) == [0, 1]
        failures = exporter.scrape().series("pgvigil_discovery_failures_total")
        assert list(failures.values()) == [0] * 4


def agreed(scene: Scene, pair: Pair) -> tuple[Member, int]:
    """Who leads and on which timeline, when Patroni, PostgreSQL and both in Prometheus agree."""
    leader = pair.leader()
    timeline: int = leader.status()["timeline"]
    where = f'cluster="{pair.scope}", member="{leader.name}"'
    scene.watcher.wait_until(
        f"cluster_member:pg_timeline_id:leader{{{where}}} == {timeline}"
        f" and on () count(cluster_member:pg_timeline_id:leader{{cluster='{pair.scope}'}}) == 1"
        f" and on () sum(pg_in_recovery{{cluster='{pair.scope}'}} == bool 0) == 1"
        f" and on () pg_in_recovery{{{where}}} == 0"
        f' and on () patroni_primary{{scope="{pair.scope}", {where}}} == 1'
        f' and on () cluster_scope:patroni_postgres_timeline:max{{scope="{pair.scope}"}}'
        f" == {timeline}"
    )
    return leader, timeline


def fired(watcher: Prometheus, name: str, scope: str, since: float) -> None:
    """Wait for an alert that tells of an event, and may be over when one comes to look."""
    alert = f'alertname="{name}", alertstate="firing", severity="ticket", scope="{scope}"'
    watcher.wait_until(f"count_over_time(ALERTS{{{alert}}}[{time.monotonic() - since:.0f}s])")


@pytest.mark.parametrize(("major", "version"), [(3, "3.0"), (4, "4.1")])
def test_the_names_that_rules_may_use_are_those_of_a_real_patroni(
    scene: Scene, major: int, version: str
) -> None:
    (pair,) = (pair for pair in scene.pairs if pair.scope == SCOPES[major])
    kept = (Path(__file__).parent / "pages" / f"patroni-{version}.txt").read_text()
    for member in pair.members:
        told = re.findall(r"^# TYPE (\w+ \w+)$", member.get("/metrics"), re.M)
        assert told == kept.splitlines()


def test_a_cluster_that_is_well_raises_no_alert(scene: Scene) -> None:
    for pair in scene.pairs:
        agreed(scene, pair)
    assert scene.watcher.alerts() == []


def test_every_panel_of_the_dashboard_has_data(scene: Scene) -> None:
    variables = {"cluster": ".+", "__rate_interval": "10s", "__range": "1m"}
    for _, expression, _ in grafana.queries(ROOT / "grafana" / "patroni.json", variables):
        scene.watcher.wait_until(expression)  # a rate wants two scrapes


def test_a_pause_and_all_that_waits_for_somebody_are_told(scene: Scene) -> None:
    watcher, pair = scene.watcher, scene.orders
    leader = pair.leader()
    standby = pair.other(leader)
    here = {"cluster": "orders", "scope": "orders"}
    there = {**here, "member": standby.name}
    leader.configure(pause=True, postgresql={"parameters": {"track_activity_query_size": 2048}})
    standby.execute("select pg_wal_replay_pause()")
    leader.execute("create table moved as select 1")
    # It shall neither replay nor receive.
    leader.execute("alter role replicator nologin")
    leader.execute("select pg_terminate_backend(pid) from pg_stat_replication")

    watcher.wait_for_alert("PatroniReplayPaused", severity="ticket", **there)
    watcher.wait_for_alert("PatroniStandbyNotStreaming", severity="ticket", **there)
    watcher.wait_for_alert("PatroniStandbyBehind", severity="ticket", **there)
    watcher.wait_for_alert("PatroniStandbyFarBehind", severity="page", **there)

    standby.spoil()
    watcher.wait_for_alert("PatroniPostgresNotRunning", severity="ticket", **there)
    watcher.wait_for_alert("PatroniNoStandby", severity="page", **here)
    watcher.wait_for_alert("PatroniPaused", severity="ticket", **here)
    watcher.wait_for_alert("PatroniPendingRestart", severity="ticket", **here, member=leader.name)
    assert {alert["cluster"] for alert in watcher.alerts()} == {"orders"}

    standby.mend()
    leader.execute("alter role replicator login")
    leader.configure(pause=None)
    leader.restart_postgres()
    pair.wait_until_streaming()
    watcher.wait_until_resolved()


def test_a_store_that_is_away_is_told_whether_the_leader_may_stay_or_not(scene: Scene) -> None:
    watcher = scene.watcher
    before = {pair.scope: agreed(scene, pair) for pair in scene.pairs}
    scene.orders.enable_failsafe()
    for pair in scene.pairs:
        pair.etcd.stop()
    for pair in scene.pairs:
        for member in pair.members:
            where = {"cluster": pair.scope, "member": member.name}
            watcher.wait_for_alert("PatroniStoreUnseen", severity="ticket", **where)
    watcher.wait_for_alert("PatroniNoLeader", severity="page", scope="billing")
    watcher.wait_for_alert("PatroniFailsafe", severity="page", scope="orders")
    assert scene.orders.leader() is before["orders"][0]
    for pair in scene.pairs:
        pair.etcd.start()
    for pair in scene.pairs:
        pair.wait_until_streaming()
    # A leader that stepped down comes back by a promotion; one that stayed does not.
    timelines = [agreed(scene, pair)[1] - before[pair.scope][1] for pair in scene.pairs]
    assert timelines == [1, 0]
    watcher.wait_until_resolved("PatroniStoreUnseen", "PatroniNoLeader", "PatroniFailsafe")


def test_a_killed_leader_is_missed_until_another_leads_and_it_is_back(scene: Scene) -> None:
    watcher = scene.watcher
    before = {pair.scope: agreed(scene, pair) for pair in scene.pairs}
    killed = time.monotonic()
    for leader, _ in before.values():
        leader.kill()
    for pair in scene.pairs:
        here = {"cluster": pair.scope, "scope": pair.scope}
        watcher.wait_for_alert("PatroniNoLeader", severity="page", **here)
        dead = before[pair.scope][0].name
        watcher.wait_for_alert("PatroniMemberDown", cluster=pair.scope, member=dead)
    for pair in scene.pairs:
        old, timeline = before[pair.scope]
        pair.wait_for_leader()
        assert agreed(scene, pair) == (pair.other(old), timeline + 1)
        fired(watcher, "PatroniFailover", pair.scope, killed)
    if before["billing"][1] > 1:  # the second promotion, after the one of the store's outage
        fired(watcher, "PatroniFlapping", "billing", killed)
    watcher.wait_until_resolved("PatroniNoLeader")
    for pair in scene.pairs:
        watcher.wait_for_alert("PatroniNoStandby", severity="page", scope=pair.scope)
        watcher.wait_for_alert("PatroniMembersMissing", severity="ticket", scope=pair.scope)
    for pair in scene.pairs:
        before[pair.scope][0].start()
    for pair in scene.pairs:
        pair.wait_until_streaming()
        agreed(scene, pair)
    watcher.wait_until_resolved(but="PatroniFlapping")


def test_an_exporter_that_asks_another_server_than_its_label_says_is_told(scene: Scene) -> None:
    watcher, pair = scene.watcher, scene.orders
    leader, _ = agreed(scene, pair)
    exporter = scene.exporters[leader.name]

    def ask(member: Member) -> None:
        scene.exporters[leader.name].stop()
        dsn = member.conninfo(**PGVIGIL.login)
        moved = Exporter(environment={"PGVIGIL_DSN": dsn}, port=exporter.port)
        scene.exporters[leader.name] = moved

    ask(pair.other(leader))
    watcher.wait_for_alert(
        "PatroniDisagrees", severity="ticket", cluster="orders", member=leader.name
    )
    ask(leader)
    watcher.wait_until_resolved("PatroniDisagrees")


def test_two_leaders_and_then_none_that_answers_are_told(scene: Scene) -> None:
    watcher, pair = scene.watcher, scene.orders
    leader, _ = agreed(scene, pair)
    second = pair.other(leader)
    leader.configure(pause=True)
    pair.wait_until_paused()
    second.execute("select pg_promote()")  # behind Patroni's back
    watcher.wait_for_alert("PatroniSeveralLeaders", severity="page", scope="orders")
    second.kill()
    watcher.wait_until_resolved("PatroniSeveralLeaders")
    leader.kill()
    watcher.wait_for_alert("PatroniUnreachable", severity="page", cluster="orders")
    assert {alert["cluster"] for alert in watcher.alerts()} == {"orders"}
