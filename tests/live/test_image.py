"""The image does the exporter's whole job with no rights, no shell and nothing to write to."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import docker, helm, kubernetes
from lab.binaries import LocalBinaries, account
from lab.cluster import PGVIGIL, Cluster
from lab.docker import Engine
from lab.exporter import Page
from lab.ports import free_port
from lab.postgres import Server

ROOT = Path(__file__).parents[2]
IMAGE = "pgvigil:test"
BARE = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=20")
ASK = (
    "import urllib.request as r; q = r.Request('http://127.0.0.1:9187/metrics',"
    " headers={'Accept': 'text/plain'}); print(r.urlopen(q).read().decode())"
)
"""What a scrape from within says, as no shell and no curl is there."""


LOOK = (
    "import os, pathlib; print(os.getuid()); [print(p.read_text().replace(chr(0), ' ').strip())"
    " for p in pathlib.Path('/proc').glob('[0-9]*/cmdline')]"
)
"""Whose number a program has, and the command lines of all processes that it sees."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with docker.engine() as found:
        if isinstance(found, str):
            if os.environ.get("CI"):
                pytest.fail(found)
            pytest.skip(found)
        found.build(ROOT, IMAGE)
        try:
            yield found
        finally:
            found.run("rmi", "--force", IMAGE, check=False)


@contextmanager
def container(engine: Engine, *options: object, words: Sequence[str] = ()) -> Iterator[str]:
    """A container of the image in the background."""
    name = engine.run("run", "--detach", *options, IMAGE, *words).splitlines()[-1]
    try:
        yield name
    finally:
        engine.run("rm", "--force", name)


def wait_until(true: Callable[[], bool], said: Callable[[], str]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, said()
        time.sleep(0.2)


def scraped(engine: Engine, name: str) -> Page:
    wait_until(
        lambda: "ok" in engine.run("exec", name, "pgvigil", "alive", check=False),
        lambda: engine.run("logs", name),
    )
    return Page(engine.run("exec", name, "python3", "-Ic", ASK), "text/plain; version=0.0.4")


@pytest.mark.parametrize("major", [18])
def test_it_takes_the_place_of_postgres_exporters_image(engine: Engine, cluster: Cluster) -> None:
    """With its variables and its port's place, and as whatever user the platform gives."""
    server = cluster.primary
    begin = server.log_position()
    environment = {
        "DATA_SOURCE_URI": f"127.0.0.1:{server.port}/postgres?sslmode=disable",
        "DATA_SOURCE_USER": PGVIGIL.name,
        "DATA_SOURCE_PASS": PGVIGIL.password,
    }
    variables = [f"--env={name}={value}" for name, value in environment.items()]
    port = free_port()
    listen = f"--env=PGVIGIL_LISTEN=127.0.0.1:{port}"
    options = (*BARE, "--network=host", "--user=65534", "--memory=128m", listen, *variables)
    with container(engine, *options) as name:
        wait_until(
            lambda: "ok" in engine.run("exec", name, "pgvigil", "alive", check=False),
            lambda: engine.run("logs", name),
        )
        ask = ASK.replace("9187", str(port))
        text = engine.run("exec", name, "python3", "-Ic", ask)
        log = engine.run("logs", name)
        engine.run("stop", name)
        code = engine.run("inspect", "--format={{.State.ExitCode}}", name)
    page = Page(text, "text/plain; version=0.0.4")
    assert page.value("pg_up") == 1
    assert page.failed() == set()
    assert server.errors_in_log(begin) == []
    assert PGVIGIL.password not in log
    assert code == "0"


def test_as_a_sidecar_it_shares_the_network_and_nothing_else(
    engine: Engine, fresh_server: Callable[..., Server]
) -> None:
    if engine.base is None:
        pytest.skip("the engine is not ours; its containers may not see the lab's files")
    server = fresh_server(18, hba=["host all all 127.0.0.1/32 trust"])
    server.stop()
    binaries = server.binaries
    assert isinstance(binaries, LocalBinaries)
    programs = binaries.directory.resolve()
    user, group = account() if os.getuid() == 0 else (os.getuid(), os.getgid())
    database = engine.run(
        *("run", "--detach", "--network=none", f"--user={user}:{group}"),
        *(f"--volume={programs.parent}:{programs.parent}:ro", "--volume"),
        *(f"{server.directory}:{server.directory}", engine.base),
        *(programs / "postgres", "-D", server.data),
    ).splitlines()[-1]
    try:
        dsn = f"--env=PGVIGIL_DSN=host=127.0.0.1 port={server.port} user=pgvigil"
        with container(engine, *BARE, f"--network=container:{database}", dsn) as name:
            wait_until(
                lambda: scraped(engine, name).value("pg_up") == 1,
                lambda: engine.run("logs", database) + engine.run("logs", name),
            )
            page = scraped(engine, name)
            # It has the number that the image gives it, and sees no process of its neighbour's.
            uid, *processes = engine.run("exec", name, "python3", "-Ic", LOOK).splitlines()
        assert page.failed() == set()
        assert page.value("pg_server_info") == 1
        assert uid == "65532"
        assert any(line.endswith("pgvigil serve") for line in processes)
        assert [line for line in processes if "postgres -D" in line] == []
    finally:
        engine.run("rm", "--force", database)


def test_its_health_check_follows_the_exporter(engine: Engine) -> None:
    often = ("--health-interval=1s", "--health-retries=1", "--health-start-period=0s")
    with container(engine, *BARE, "--network=none", *often, "--health-timeout=10s") as name:

        def health() -> str:
            return engine.run("inspect", "--format={{.State.Health.Status}}", name)

        wait_until(lambda: health() == "healthy", lambda: engine.run("inspect", name))
        # The exporter itself, and not what asks it.
        engine.run("kill", "--signal=STOP", name)
        wait_until(lambda: health() == "unhealthy", lambda: engine.run("inspect", name))
        engine.run("kill", "--signal=CONT", name)
        wait_until(lambda: health() == "healthy", lambda: engine.run("inspect", name))


def test_it_writes_nothing_even_where_it_could(engine: Engine) -> None:
    with container(engine, "--network=none") as name:
        assert scraped(engine, name).value("pg_up") == 0
        assert engine.run("diff", name) == ""


def test_there_is_no_shell_in_it_and_nothing_that_grants_rights(engine: Engine) -> None:
    look = (
        "import json, os; found = [(os.path.join(d, f), os.lstat(os.path.join(d, f)).st_mode)"
        " for d, _, files in os.walk('/') if not d.startswith(('/proc', '/sys', '/dev'))"
        " for f in files]; print(json.dumps(found))"
    )
    options = ("--rm", "--network=none", "--user=0", "--entrypoint=python3")
    told = engine.run("run", *options, IMAGE, "-Ic", look)
    files = json.loads(told.splitlines()[-1])
    assert len(files) > 1000
    programs = {path for path, mode in files if mode & 0o111 and path.startswith("/usr/bin/")}
    assert programs == {"/usr/bin/python3", "/usr/bin/python3.13"}
    assert [path for path, mode in files if mode & 0o6000 or mode & 0o170002 == 0o100002] == []


def test_it_is_small(engine: Engine) -> None:
    size = int(engine.run("image", "inspect", "--format={{.Size}}", IMAGE))
    assert 20e6 < size < 80e6


def test_everything_that_the_program_may_load_is_there(engine: Engine) -> None:
    """Every module of ours and of what we need can be imported with the libraries of the image."""
    load = (
        "import importlib, pkgutil, pgvigil, psycopg.pq, isal.isal_zlib, yaml, ssl, bz2;"
        " assert yaml.__with_libyaml__ and psycopg.pq.__impl__ == 'binary';"
        " names = [m.name for m in pkgutil.walk_packages(pgvigil.__path__, 'pgvigil.')];"
        " [importlib.import_module(n) for n in names if n != 'pgvigil.__main__'];"
        " print(len(names))"
    )
    options = ("--rm", "--network=none", "--entrypoint=python3")
    told = engine.run("run", *BARE, *options, IMAGE, "-Ic", load)
    rooms = len([*(ROOT / "exporter" / "pgvigil").glob("*.py")])
    assert int(told.splitlines()[-1]) >= rooms - 1


def test_it_hands_out_its_rules_and_checks_a_configuration(engine: Engine, tmp_path: Path) -> None:
    if engine.base is None:
        pytest.skip("the engine is not ours; its containers may not see the lab's files")
    tmp_path.chmod(0o777)
    (tmp_path / "pgvigil.yml").write_text("targets: {shop: {dsn: host=db1}}\n")
    options = ("--rm", "--network=none", *BARE, f"--volume={tmp_path}:/out")
    engine.run("run", *options, IMAGE, "rules", "--out", "/out/rules")
    assert sorted(path.name for path in (tmp_path / "rules").iterdir()) == sorted(
        path.name for path in (ROOT / "rules").glob("*.yml")
    )
    told = engine.run("run", *options, IMAGE, "check", "--config", "/out/pgvigil.yml")
    assert told.endswith("target shop: db1:5432/postgres")


@pytest.mark.parametrize("major", [18])
def test_it_runs_as_the_chart_has_it_run(engine: Engine, server: Server, tmp_path: Path) -> None:
    """As a user whom nobody knows, with what a pod mounts; and so does the test of a release."""
    if engine.base is None:
        pytest.skip("the engine is not ours; its containers may not see the lab's files")
    if isinstance(fault := helm.program(3), str):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(fault)
    port = free_port()
    connection = {"host": "127.0.0.1", "port": server.port, "user": PGVIGIL.name}
    target = {"connection": connection, "existingSecret": {"name": "orders"}}
    values = {"targets": {"orders": target}, "service": {"port": port}}
    manifests = helm.rendered(values=values)
    workload, test = kubernetes.pods(manifests)
    kubernetes.mount(workload, manifests, tmp_path, PGVIGIL.password)
    options = (*BARE, "--network=host", "--user=1000680000:0")
    volume = f"--volume={tmp_path}/etc/pgvigil:/etc/pgvigil:ro"
    (exporter,), (asking,) = (pod["spec"]["containers"] for pod in (workload, test))
    python, *words = (
        word.replace(f"watch-pgvigil.monitoring.svc:{port}", f"127.0.0.1:{port}")
        for word in asking["command"]
    )
    with container(engine, *options, volume, words=exporter["args"]) as name:
        told = engine.run("run", "--rm", *options, f"--entrypoint={python}", IMAGE, *words)
        page = engine.run("exec", name, "python3", "-Ic", ASK.replace("9187", str(port)))
    assert told.splitlines()[-1] == f"http://127.0.0.1:{port}/metrics 200"
    assert Page(page, "text/plain; version=0.0.4").value("pg_up") == 1
