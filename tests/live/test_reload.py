"""A running exporter takes a new configuration, and no scrape and no counter is lost by it."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from pgvigil import shard

from lab.cluster import PGVIGIL, Cluster
from lab.exporter import Exporter, Page

SLEEPS = """
sleeps:
  why: It takes a while.
  max_series: 1
  timeout: 5s
  sql: select 1 as one from pg_catalog.pg_sleep({seconds})
  metrics: {pg_reload_slept: {column: one, type: gauge, help: One.}}
"""

pytestmark = pytest.mark.parametrize("major", [17])


def target(cluster: Cluster, **more: object) -> dict[str, object]:
    return {"dsn": cluster.primary.conninfo(**PGVIGIL.login), **more}


def write(path: Path, targets: Mapping[str, Any], **more: object) -> str:
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"targets": targets, **more}))
    new.rename(path)
    return str(path)


def wait(exporter: Exporter, condition: Callable[[Page], bool]) -> Page:
    """The overview, once it fulfils a condition."""
    end = time.monotonic() + 60
    while not condition(page := exporter.scrape()):
        assert time.monotonic() < end, exporter.log
        time.sleep(0.05)
    return page


def loaded(page: Page) -> float:
    return page.value("pgvigil_config_last_reload_success_timestamp_seconds")


def test_a_reload_while_scrapes_run_loses_no_scrape_and_no_counter(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "pgvigil.yml"
    same, end = target(cluster), Event()
    write(path, {"same": same, "changes": target(cluster), "goes": target(cluster)})

    def scrape(exporter: Exporter, name: str) -> list[Page]:
        pages = []
        while not end.is_set():
            pages.append(exporter.scrape(name))
        return pages

    with Exporter("--config", str(path)) as exporter, ThreadPoolExecutor() as pool:
        assert exporter.scrape("goes").value("pg_up") == 1
        scraping = {name: pool.submit(scrape, exporter, name) for name in ("same", "changes")}
        try:
            for number in range(5):
                before = loaded(exporter.scrape())
                changed = target(cluster, labels={"number": str(number)})
                write(path, {"comes": target(cluster), "same": same, "changes": changed})
                exporter.process.send_signal(signal.SIGHUP)
                wait(exporter, lambda page, before=before: loaded(page) > before)  # type: ignore[misc]
        finally:
            end.set()
        seen = {name: future.result() for name, future in scraping.items()}
        assert exporter.scrape("comes").value("pg_up") == 1
        changed_page = exporter.scrape("changes")
        assert exporter.get("/probe?target=goes").status == 404
        assert exporter.scrape().value("pgvigil_targets", shard="0", shards="1") == 3
    for pages in seen.values():
        assert len(pages) > 5
        assert all(page.value("pg_up") == 1 and not page.failed() for page in pages)
    scrapes = [page.value("pgvigil_scrapes_total") for page in seen["same"]]
    assert scrapes == list(range(1, len(scrapes) + 1))
    assert {page.value("pgvigil_connects_total") for page in seen["same"]} == {1}
    assert changed_page.value("pg_up", number="4") == 1


def test_who_waits_for_a_target_that_changes_gets_all_of_its_scrape(
    cluster: Cluster, tmp_path: Path
) -> None:
    path, queries = tmp_path / "pgvigil.yml", tmp_path / "own.yml"
    queries.write_text(SLEEPS.replace("{seconds}", "2"))
    write(path, {"one": target(cluster), "two": target(cluster)}, catalogue=["own.yml"])
    with Exporter("--config", str(path)) as exporter, ThreadPoolExecutor() as pool:
        before = loaded(exporter.scrape())
        scrape = pool.submit(exporter.scrape, "one")
        wait(exporter, lambda page: page.value("pgvigil_connections", target="one") == 1)
        queries.write_text(SLEEPS.replace("{seconds}", "0"))
        exporter.process.send_signal(signal.SIGHUP)
        wait(exporter, lambda page: loaded(page) > before)
        assert not scrape.done()
        assert exporter.scrape("one").value("pg_reload_slept") == 1
        assert scrape.result().value("pg_reload_slept") == 1


def test_a_bad_configuration_is_told_and_the_last_good_one_kept(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "pgvigil.yml"
    write(path, {"one": target(cluster), "two": target(cluster)})
    with Exporter("--config", str(path), "--web-reload") as exporter:
        path.write_text("targets:\n  one:\n    dsn: host=h password=kanarienvogel nonsense\n")
        answer = exporter.get("/-/reload", method="POST")
        told = answer.body.decode()
        assert (answer.status, told.splitlines()[0]) == (500, "nothing is changed:")
        assert f"{path}:3: is no connection string" in told
        assert f"{path}:3: is no connection string" in exporter.log
        assert "kanarienvogel" not in told + exporter.log
        page = exporter.scrape()
        assert page.value("pgvigil_config_last_reload_successful") == 0
        assert page.value("pgvigil_targets") == 2
        assert exporter.scrape("two").value("pg_up") == 1
        write(path, {"one": target(cluster)})
        answer = exporter.get("/-/reload", method="POST")
        assert (answer.status, answer.body) == (200, b"reloaded: 1 targets\n")
        assert exporter.scrape().value("pgvigil_config_last_reload_successful") == 1


def test_only_who_was_told_to_reloads_over_http(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    with Exporter("--config", write(path, {"one": target(cluster)})) as exporter:
        for method, status in (("POST", 403), ("GET", 405), ("HEAD", 405), ("PUT", 405)):
            answer = exporter.get("/-/reload", method=method)
            assert answer.status == status, method
            assert answer.headers.get("allow") == ("POST" if status == 405 else None)
        assert "SIGHUP" in exporter.get("/-/reload", method="POST").body.decode()
        assert "reloaded" not in exporter.log


def test_each_shard_serves_its_targets_and_says_where_the_others_are(
    cluster: Cluster, tmp_path: Path
) -> None:
    names = [f"db{n}" for n in range(6)]
    path = write(tmp_path / "pgvigil.yml", {name: target(cluster) for name in names})
    served: list[str] = []
    for ordinal in (0, 1):
        with Exporter("--config", path, "--shard", f"pod-{ordinal}/2") as exporter:
            groups = json.loads(exporter.get("/sd").body)
            served += (own := [group["labels"]["instance"] for group in groups])
            page = exporter.scrape()
            assert page.value("pgvigil_targets", shard=str(ordinal), shards="2") == len(own)
            for name in names:
                answer = exporter.get(f"/probe?target={name}")
                assert answer.status == (200 if name in own else 404)
                if name not in own:
                    told = f"this is shard {ordinal}/2; the target is with {1 - ordinal}/2\n"
                    assert answer.body.decode() == told
                    assert shard.home(name, 2) == 1 - ordinal
    assert sorted(served) == names
