"""What compose/ brings up is closed and whole, as far as that shows without its images."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import debian
from lab.exporter import Exporter
from lab.postgres import Server

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose" / "compose.yaml"
LOADED = {"shared_preload_libraries": "pg_stat_statements"}
ONCE = {"passwords"}
"""What ends when its work is done."""


def missing(what: str) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@cache
def docker_compose() -> list[str]:
    """The words by which Docker Compose is called: the one that is installed, or Debian's."""
    if shutil.which("docker"):
        told = subprocess.run(["docker", "compose", "version"], capture_output=True)
        if told.returncode == 0:
            return ["docker", "compose"]
    folder = "usr/libexec/docker/cli-plugins"
    programs = debian.fetch("compose", ("trixie",), ("docker-compose",), folder)
    return [str(programs / "docker-compose")]


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The file as Docker Compose understands it."""
    try:
        words = docker_compose()
    except RuntimeError as error:
        missing(str(error))
    command = [*words, "--file", str(COMPOSE), "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    understood: dict[str, Any] = json.loads(done.stdout)
    return understood


@pytest.fixture(scope="module")
def services(composed: Mapping[str, Any]) -> dict[str, Any]:
    return dict(composed["services"])


def test_it_has_all_that_a_person_would_look_at(services: Mapping[str, Any]) -> None:
    assert services.keys() - ONCE == {
        *("postgres", "exporter", "prometheus", "alertmanager", "grafana")
    }


def test_nothing_is_published_beyond_this_machine(services: Mapping[str, Any]) -> None:
    published = {
        name: [port["host_ip"] for port in of["ports"]]
        for name, of in services.items()
        if "ports" in of
    }
    shown = "exporter", "prometheus", "alertmanager", "grafana"
    assert published == {name: ["127.0.0.1"] for name in shown}


def test_the_database_stands_where_only_the_exporter_gets_to(composed: Mapping[str, Any]) -> None:
    assert composed["networks"]["inner"]["internal"] is True
    inside = {n for n, of in composed["services"].items() if "inner" in of.get("networks", {})}
    assert inside == {"postgres", "exporter"}
    assert list(composed["services"]["postgres"]["networks"]) == ["inner"]
    assert composed["services"]["passwords"]["network_mode"] == "none"


def test_every_container_is_closed_and_pinned_and_looked_after(
    services: Mapping[str, Any],
) -> None:
    for name, of in services.items():
        assert of["read_only"], name
        assert of["cap_drop"] == ["ALL"], name
        assert of["security_opt"] == ["no-new-privileges:true"], name
        assert "build" in of or re.search(r":v?\d+\.\d+", of["image"]), name
        assert name in ONCE or "build" in of or of["healthcheck"]["test"], name
        for mount in of.get("volumes", ()):
            assert mount["type"] == "volume" or mount["read_only"], (name, mount)
    assert services["exporter"]["build"]["context"] == str(ROOT)
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()


def test_whatever_is_mounted_exists(services: Mapping[str, Any]) -> None:
    sources = [
        Path(mount["source"])
        for of in services.values()
        for mount in of.get("volumes", ())
        if mount["type"] == "bind"
    ]
    assert sources
    assert [source for source in sources if not source.exists()] == []


def test_no_password_stands_in_it(services: Mapping[str, Any]) -> None:
    told = {
        f"{name} {key}": value
        for name, of in services.items()
        for key, value in (of.get("environment") or {}).items()
        if "PASS" in key
    }
    assert set(told.values()) <= {"/passwords", "/passwords/postgres", "/passwords/pgvigil"}
    assert len(told) == 3


def test_grafana_finds_prometheus_and_the_dashboards(services: Mapping[str, Any]) -> None:
    grafana = services["grafana"]
    mounts = {
        mount["target"]: Path(mount["source"])
        for mount in grafana["volumes"]
        if mount["type"] == "bind"
    }
    base = "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(mounts[f"{base}/datasources/pgvigil.yml"].read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["httpMethod"] == "POST", "All names every server"
    assert services["prometheus"]["ports"][0]["target"] == 9090
    (provider,) = yaml.safe_load(mounts[f"{base}/dashboards/pgvigil.yml"].read_text())["providers"]
    place = provider["options"]["path"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == place
    assert (mounts[place] / home.name).exists()


def test_prometheus_takes_its_configuration_with_all_rules(
    services: Mapping[str, Any], tmp_path: Path
) -> None:
    if shutil.which("promtool") is None:
        missing("promtool is not installed")
    mounts = {mount["target"]: mount["source"] for mount in services["prometheus"]["volumes"]}
    text = Path(mounts["/etc/prometheus/prometheus.yml"]).read_text()
    assert mounts["/etc/prometheus/rules"] == str(ROOT / "rules")
    path = tmp_path / "prometheus.yml"
    path.write_text(text.replace("/etc/prometheus/rules", mounts["/etc/prometheus/rules"]))
    done = subprocess.run(["promtool", "check", "config", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(list((ROOT / 'rules').glob('*.yml')))} rule files" in done.stdout
    told = yaml.safe_load(text)
    (scraped,) = told["scrape_configs"]
    (notified,) = told["alerting"]["alertmanagers"]
    for of, service in ((scraped, "exporter"), (notified, "alertmanager")):
        port = services[service]["ports"][0]["target"]
        assert of["static_configs"] == [{"targets": [f"{service}:{port}"]}]


def test_alertmanager_takes_its_configuration(services: Mapping[str, Any]) -> None:
    if shutil.which("amtool") is None:
        missing("amtool is not installed")
    sources = {mount["target"]: mount["source"] for mount in services["alertmanager"]["volumes"]}
    told = sources["/etc/alertmanager/alertmanager.yml"]
    done = subprocess.run(["amtool", "check-config", told], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_role_is_made_by_the_sql_that_our_command_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "pgvigil", "grants"], capture_output=True, text=True, check=True
    ).stdout
    assert (COMPOSE.parent / "postgres" / "10-grants.sql").read_text() == printed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server as the image would have made it, and the folder with the passwords."""
    if shutil.which("psql") is None:
        missing("psql is not installed")
    passwords = tmp_path_factory.mktemp("passwords")
    (passwords / "pgvigil").write_text("it's/a+canary=\n")
    hba = ["local all postgres trust", "host all all 127.0.0.1/32 scram-sha-256"]
    with Server(18, settings=LOADED | {"log_statement": "all"}, hba=hba) as server:
        environment = {
            "PATH": os.environ["PATH"],
            "PASSWORDS": str(passwords),
            "PGHOST": str(server.directory),
            "PGPORT": str(server.port),
            "PGUSER": "postgres",
        }
        scripts = sorted((COMPOSE.parent / "postgres").iterdir())
        for script in scripts:  # in the image's order, and as it runs them
            sql = ["psql", "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-f", str(script)]
            command = [str(script)] if script.suffix == ".sh" else sql
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        yield server, passwords


def test_the_exporter_gets_in_with_what_it_is_told(
    made: tuple[Server, Path], services: Mapping[str, Any]
) -> None:
    server, passwords = made
    told = {
        name: value.replace("postgres:5432", f"127.0.0.1:{server.port}").replace(
            "/passwords", str(passwords)
        )
        for name, value in services["exporter"]["environment"].items()
    }
    with Exporter(environment=told) as exporter:
        page = exporter.scrape()
        assert page.value("pg_up") == 1, exporter.log
        assert page.value("pgvigil_superuser") == 0
        end = time.monotonic() + 60  # it is asked in the background
        while not exporter.scrape().series("pg_stat_statements_calls_total"):
            assert time.monotonic() < end
            time.sleep(0.2)


def test_neither_the_log_nor_the_statistics_keep_the_password(made: tuple[Server, Path]) -> None:
    server, _ = made
    assert "canary" not in server.log()
    assert "CREATE ROLE pgvigil" in server.log()  # what else it was told is there
    kept = server.execute("select query from pg_stat_statements where query ~ 'canary'")
    assert kept == []
