"""A cluster that Patroni minds, behind two HAProxies, and a night on which its leader dies."""

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from psycopg.conninfo import make_conninfo

from lab import haproxy, patroni, prometheus
from lab.cluster import PGVIGIL
from lab.exporter import Exporter
from lab.haproxy import HAProxy
from lab.hurry import hurried
from lab.patroni import Pair
from lab.prometheus import Prometheus
from tools.draw.clients import Clients, Work

ROOT = Path(__file__).parents[2]
SUITES = ("bookworm", "trixie")
"""Those of Debian whose HAProxies stand before it."""

WRITING: Work = (("insert into orders (note) values ('order ' || %s)", 1),)
READING: Work = (("select count(*) from orders where id < %s", 1),)

PATIENT = {"scrape_interval": "2500ms", "scrape_timeout": "2500ms"}
"""Patroni asks a PostgreSQL that is away a second time before it answers."""


class Cluster(NamedTuple):
    """Two members, their exporters, the proxies, and the Prometheus of docs/patroni.md."""

    pair: Pair
    prometheus: Prometheus

    def faults(
        self, words: Collection[str]
    ) -> Iterator[tuple[AbstractContextManager[None], set[str]]]:
        """What comes over it, and the dashboards that shall tell of it."""
        yield self.monday(), {*words}

    @contextlib.contextmanager
    def monday(self) -> Iterator[None]:
        """The leader and its Patroni die at once, and nobody starts them."""
        self.pair.leader().kill()
        yield


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Set it up; all of it is gone at the end."""
    program = prometheus.installed()
    if program is None:
        raise RuntimeError("Prometheus is not installed")
    programs = [haproxy.program(suite) for suite in SUITES]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        pair = enter(Pair(patroni.programs(4), "orders"))
        pair.leader().execute(
            "create table orders (id bigint generated always as identity primary key, note text)"
        )
        ports: dict[str, int] = {}
        for member in pair.members:
            dsn = member.conninfo(**PGVIGIL.login)
            exporter = enter(Exporter(environment={"PGVIGIL_DSN": dsn}))
            ports |= {f"{member.name}:8008": member.rest_port, f"{member.name}:9187": exporter.port}
        for number, path in enumerate(programs, 1):
            proxy = enter(HAProxy(path, pair))
            ports[f"proxy{number}:8405"] = proxy.metrics_port
            for port, work in ((proxy.primary_port, WRITING), (proxy.replica_port, READING)):
                conninfo = make_conninfo("", host="127.0.0.1", port=port, user="postgres")
                enter(Clients(conninfo, work, 2, turns=50))
        copies = Path(enter(tempfile.TemporaryDirectory(prefix="pgvigil-rules-")))
        rules = [hurried(ROOT / "rules" / f"{area}.yml", copies) for area in ("patroni", "haproxy")]
        watching = enter(Prometheus(program, _jobs(ports), rules))
        watching.wait_until(f"count(up == 1) == {len(ports)}")
        yield Cluster(pair, watching)


def _jobs(ports: dict[str, int]) -> list[dict[str, Any]]:
    """The example that we ship, where everything is here."""
    text = (ROOT / "prometheus" / "patroni.yml").read_text()
    for address, port in ports.items():
        name = address.split(":")[0]
        text = text.replace(
            f'{{targets: ["{address}"], labels: {{',
            f'{{targets: ["127.0.0.1:{port}"], labels: {{instance: {name}, ',
        )
    jobs: list[dict[str, Any]] = yaml.safe_load(text)["scrape_configs"]
    (proxies,) = (job for job in jobs if job["job_name"] == "haproxy")
    proxies["static_configs"] = [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {"cluster": "orders", "instance": address.split(":")[0]},
        }
        for address, port in ports.items()
        if address.startswith("proxy")
    ]
    return [job | (PATIENT if job["job_name"] == "patroni" else {}) for job in jobs]
