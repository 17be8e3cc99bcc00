"""A request reaches the hosts that are allowed by what a module says, and no others."""

import json
import socket
from pathlib import Path

import pytest

from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter
from tests.live.test_secrets import CANARY, assert_silent

pytestmark = pytest.mark.parametrize("major", [17])


def config(path: Path, *hosts: str, password: str = CANARY, **more: object) -> str:
    """A configuration with one module, whose password is the canary when no other is given."""
    module = {"connection": {"user": PGVIGIL.name, "password": password, "sslmode": "disable"}}
    document = {"auth_modules": {"reader": module}, "allow_hosts": hosts, **more}
    file = path / "pgvigil.yml"
    file.write_text(json.dumps(document))
    return str(file)


def ask(exporter: Exporter, target: str, module: str = "&auth_module=reader") -> tuple[int, str]:
    answer = exporter.get(f"/probe?target={target}{module}")
    return answer.status, answer.body.decode()


def test_a_host_that_is_allowed_is_watched_by_address_and_by_name(
    cluster: Cluster, tmp_path: Path
) -> None:
    port = cluster.primary.port
    allowed = config(tmp_path, "127.0.0.0/8", "localhost", password=PGVIGIL.password)
    with Exporter("--config", allowed) as exporter:
        for target in (f"127.0.0.1:{port}", f"localhost:{port}/postgres"):
            for _ in range(2):
                status, page = ask(exporter, target)
                assert status == 200
                assert "\npg_up 1\n" in page
        assert "\npgvigil_connects_total 1\n" in page
        overview = exporter.scrape()
        assert overview.value("pgvigil_hosts") == 2
        assert overview.value("pgvigil_target_up", target=f"reader@127.0.0.1:{port}") == 1
        assert json.loads(exporter.get("/sd").body) == []
        for text in (page, exporter.get("/").body.decode(), exporter.log):
            assert PGVIGIL.password not in text


def test_a_host_that_is_not_allowed_is_not_reached(cluster: Cluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        with Exporter("--config", config(tmp_path, "10.0.0.0/8", "localhost")) as exporter:
            told = "allow_hosts does not have this host\n"
            for host in ("127.0.0.1", "[::1]", "127.1", "0x7f000001", "metadata", "::ffff:7f00:1"):
                status, text = ask(exporter, f"{host}:{port}" if host[0] != ":" else f"[{host}]")
                assert (status, text) == (403, told), host
            # Its name is allowed, and leads where nothing is.
            status, page = ask(exporter, f"localhost:{port}")
            assert status == 200
            assert '\npg_down_reason{reason="host_unknown"} 1\n' in page
            assert "no address of localhost is one that allow_hosts has" in exporter.log
            assert_silent(exporter)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_request_must_name_a_module_and_a_place(cluster: Cluster, tmp_path: Path) -> None:
    with Exporter("--config", config(tmp_path, "127.0.0.0/8", max_hosts=1)) as exporter:
        known = "auth_module must be one of the configuration: reader\n"
        assert ask(exporter, "127.0.0.1:1", "") == (400, known)
        assert ask(exporter, "127.0.0.1:1", "&auth_module=other") == (400, known)
        for target in ("", "host=db1", "postgresql://127.0.0.1", "127.0.0.1:1,127.0.0.2:1"):
            assert ask(exporter, target)[0] == 404
        assert ask(exporter, "127.0.0.1:1")[0] == 200
        assert ask(exporter, "127.0.0.2:1") == (
            503,
            "1 hosts are watched already, and max_hosts is no more\n",
        )
        assert_silent(exporter)


def test_without_a_list_no_host_can_be_named(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("auth_modules: {reader: {connection: {user: u}}}\ntargets: {a: {dsn: host=a}}")
    with Exporter("--config", str(path)) as exporter:
        told = "no such target; /probe?target=NAME knows a\n"
        assert ask(exporter, "127.0.0.1:5432") == (404, told)


def test_targets_in_a_new_file_are_found(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("targets: {a: {dsn: host=a}}\ndiscovery: {files: ['more/*.yml']}")
    with Exporter("--config", str(path), "--web-reload") as exporter:
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "b.yml").write_text("targets: {b: {dsn: host=b}}")
        assert exporter.get("/-/reload", method="POST").body == b"reloaded: 2 targets\n"
        assert exporter.scrape().value("pgvigil_targets") == 2
