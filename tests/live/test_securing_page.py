"""What docs/securing.md has people do makes a door that a real Prometheus comes in by."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import prometheus
from lab.authority import Pair, trusting
from lab.exporter import Exporter
from lab.prometheus import Prometheus

PAGE = (Path(__file__).parents[2] / "docs" / "securing.md").read_text("utf-8")
PASSWORD = "a long password"


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def run(command: str, folder: Path, said: str = "") -> str:
    """What a command of the page prints; it has no terminal to ask at."""
    done = subprocess.run(
        ["sh", "-euc", command.replace("python -c", f"{sys.executable} -c")],
        cwd=folder,
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def documents(name: str) -> list[dict[str, Any]]:
    """The pieces of a file that the page shows."""
    return [yaml.safe_load(text) for text in fences("yaml") if text.startswith(f"# {name}")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the page's certificates are made."""
    for command in fences("sh"):
        if command.startswith("openssl"):
            run(command, tmp_path)
    return tmp_path


def hashed_by(command: str, folder: Path) -> str:
    return run(command, folder, f"{PASSWORD}\n").rpartition(":")[2]


def test_every_command_of_the_page_is_run_here() -> None:
    kinds = [command.split()[0] for command in fences("sh")]
    assert kinds == ["openssl", "htpasswd", "python", "openssl"]


def test_htpasswd_makes_a_hash_that_is_taken(tmp_path: Path) -> None:
    if not shutil.which("htpasswd"):
        if os.environ.get("CI"):
            pytest.fail("htpasswd is not installed")
        pytest.skip("htpasswd is not installed")
    (command,) = (command for command in fences("sh") if command.startswith("htpasswd"))
    hashed = hashed_by(command, tmp_path)
    (tmp_path / "web.yml").write_text(yaml.safe_dump({"basic_auth_users": {"a": hashed}}))
    words = ("--dsn", "host=127.0.0.1 port=1", "--web-config", str(tmp_path / "web.yml"))
    with Exporter(*words, login=("a", PASSWORD)) as exporter:
        assert exporter.get("/metrics").status == 200


def test_a_prometheus_comes_in_by_what_the_page_shows(folder: Path) -> None:
    program = prometheus.installed()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("prometheus is not installed")
        pytest.skip("prometheus is not installed")
    (command,) = (command for command in fences("sh") if command.startswith("python"))
    _, users, tls = documents("web.yml")
    users["basic_auth_users"]["prometheus"] = hashed_by(command, folder)
    (folder / "web.yml").write_text(yaml.safe_dump({**users, **tls}))

    (whole, *parts) = documents("prometheus.yml")
    (job,) = whole["scrape_configs"]
    for part in parts:
        job.update(part)
    job["tls_config"] = {key: str(folder / name) for key, name in job["tls_config"].items()}
    (folder / "password").write_text(PASSWORD)
    job["basic_auth"]["password_file"] = str(folder / "password")

    client = Pair(folder / "client.pem", folder / "client.key")
    context = trusting(folder / "server.pem", client)
    words = ("--dsn", "host=127.0.0.1 port=1", "--web-config", str(folder / "web.yml"))
    with Exporter(*words, tls=context) as exporter:
        check = subprocess.run([sys.executable, "-m", "pgvigil", "check", *words], check=False)
        assert check.returncode == 0
        assert job["static_configs"] == [{"targets": ["localhost:9187"]}]
        job["static_configs"] = [{"targets": [f"localhost:{exporter.port}"]}]
        with Prometheus(program, [job]) as watcher:
            watcher.wait_until("pgvigil_web_config_current == 1")
            assert [target["lastError"] for target in watcher.targets()] == [""]
            lasts = watcher.query("pgvigil_web_certificate_expiry_timestamp_seconds")
            assert [value for _, value in lasts] == [
                pytest.approx(time.time() + 365 * 86400, abs=9e3)
            ]
