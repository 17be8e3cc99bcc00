"""Targets that answer nothing take nothing from the others of a fleet."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.exporter import Exporter, Page
from lab.line import Line
from lab.postgres import Server
from lab.silent_port import silent_port

HEALTHY, SILENT, NEVER = 30, 5, 5
BUDGET = 3
TIMEOUT = 5.0
"""What a scrape says that it waits for."""


@dataclass(frozen=True)
class Fleet:
    exporter: Exporter
    server: Server
    line: Line
    healthy: list[str]
    silent: list[str]
    """Those whose connections go over the line."""
    never: list[str]

    def scrape(self, names: list[str]) -> dict[str, Page]:
        """Scrape all at once, as targets of one interval meet."""
        with ThreadPoolExecutor(len(names)) as clients:
            # The patience of a busy machine; that answers come in time is measured by the bench.
            pages = clients.map(self._scrape, names)
            return dict(zip(names, pages, strict=True))

    def _scrape(self, name: str) -> Page:
        headers = {"X-Prometheus-Scrape-Timeout-Seconds": str(TIMEOUT)}
        response = self.exporter.get(f"/probe?target={name}", headers)
        assert response.status == 200
        return Page(response.body.decode(), response.headers["content-type"])

    def sessions(self) -> dict[str, int]:
        rows = self.server.execute(
            "select usename::text, count(*)::int from pg_stat_activity"
            " where usename like 't%' and backend_type = 'client backend' group by 1"
        )
        return dict(rows)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Forty targets, each with a role of its own so that its sessions can be told."""
    hba = ["host all all 127.0.0.1/32 trust"]
    with ExitStack() as stack:
        settings = {"max_connections": BUDGET * (HEALTHY + SILENT) + 10}
        server = stack.enter_context(Server(18, settings=settings, hba=hba))
        line = stack.enter_context(Line("127.0.0.1", server.port))
        hole = stack.enter_context(silent_port())
        ports = [server.port] * HEALTHY + [line.port] * SILENT + [hole] * NEVER
        names = [f"t{number:02}" for number in range(len(ports))]
        server.execute("".join(f"create role {n} login in role pg_monitor;" for n in names))
        targets = {
            name: {"dsn": f"postgresql://{name}@127.0.0.1:{port}/postgres?sslmode=disable"}
            for name, port in zip(names, ports, strict=True)
        }
        path = tmp_path / "pgvigil.yml"
        path.write_text(json.dumps({"targets": targets}))
        exporter = stack.enter_context(Exporter(f"--config={path}"))
        last = HEALTHY + SILENT
        yield Fleet(exporter, server, line, names[:HEALTHY], names[HEALTHY:last], names[last:])


def test_black_holes_take_nothing_from_the_healthy(fleet: Fleet) -> None:
    before = fleet.scrape([*fleet.healthy, *fleet.silent])
    assert {page.value("pg_up") for page in before.values()} == {1.0}
    # Of sessions each target tells while others connect, who then are not known as exporters yet.
    steady = frozenset.intersection(*(frozenset(page.names) for page in before.values()))
    steady = frozenset(name for name in steady if not name.startswith("pg_stat_activity_"))
    fleet.line.freeze()
    dead = [*fleet.silent, *fleet.never]
    most: dict[str, int] = {}
    for _ in range(2):  # first over connections that were there, then over none
        pages = fleet.scrape([*fleet.healthy, *dead])
        assert {name for name, page in pages.items() if page.value("pg_up") == 1} == {
            *fleet.healthy
        }
        assert {pages[name].reason for name in dead} == {"timeout"}
        for name in fleet.healthy:
            assert pages[name].names >= steady
            assert pages[name].failed() == set()
        assert fleet.exporter.get("/livez").status == 200
        most |= {name: max(most.get(name, 0), n) for name, n in fleet.sessions().items()}
    assert most.keys() >= {*fleet.healthy}
    assert max(most.values()) <= BUDGET
    fleet.line.thaw()
    after = fleet.scrape(fleet.silent)
    assert {page.value("pg_up") for page in after.values()} == {1.0}
