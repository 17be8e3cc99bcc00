"""An exporter with queries of its user's own and narrow limits, whose targets are in a list."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.faults.pieces import Piece

if TYPE_CHECKING:
    from tests.faults.stage import Stage

SLOW = 4
"""Queries that are as slow as a row says."""

ROOM = 4000
"""Series that a page may have; without those of statements it has half of them."""

_HANG = """

async def _hang(self, *given, ask=Collector._ask_here):
    if self.target.name == "primary" and os.path.exists({path!r}):
        os.unlink({path!r})
        end = asyncio.get_running_loop().time() + 4
        while asyncio.get_running_loop().time() < end:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)
    await ask(self, *given)

Collector._ask_here = _hang
"""
"""A fault of the program itself: what was cancelled goes on, once, when a file says so."""


class Watching(Piece):
    """What is around the exporter here."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self.hang = stage.directory / "hang"
        self._list = stage.directory / "targets.json"
        self._catalogue = stage.directory / "own.yml"
        self._catalogue.write_text(yaml.safe_dump(_catalogue()))
        stage.primary.execute(
            "create table public.told (id int primary key); insert into told values (1);"
            "create table public.asked (id int primary key); insert into asked values (1);"
            "create table public.nap (seconds float); insert into nap values (0);"
            "grant select on public.told, public.asked, public.nap to public;"
            "analyze told, asked, nap"
        )

    def configure(self, configuration: dict[str, Any]) -> None:
        """Own queries, and little room."""
        configuration["catalogue"] = [str(self._catalogue)]
        for target in configuration["targets"].values():
            # `postgres` and that of the load.
            target |= {"max_databases": 2, "max_series": ROOM, "disable": ["queries"]}

    def plant(self, package: Path) -> None:
        """Give the exporter a fault that shows when it is asked to."""
        module = package / "pgvigil" / "collect.py"
        planted = _HANG.format(path=str(self.hang))
        module.write_text(f"import contextlib\nimport os\n{module.read_text()}{planted}")

    def jobs(self, jobs: list[dict[str, Any]]) -> None:
        """Prometheus has a list of targets, as people write them, and the exporter's own page."""
        self.scrape()
        targets = jobs[0]
        del targets["http_sd_configs"]
        targets["file_sd_configs"] = [{"files": [str(self._list)]}]
        own = f"127.0.0.1:{self._stage.exporter.port}"
        jobs.append({"job_name": "pgvigil", "static_configs": [{"targets": [own]}]})

    def scrape(self, but: str = "") -> None:
        """Have Prometheus scrape all targets but one."""
        found = json.loads(self._stage.exporter.get("/sd").body)
        kept = [group for group in found if not but or but not in json.dumps(group["labels"])]
        written = self._list.with_suffix(".new")
        written.write_text(json.dumps(kept))
        written.rename(self._list)


def _catalogue() -> dict[str, Any]:
    """One query whose rows grow, one whose table may be away, some that may be slow."""
    one = {"column": "one", "type": "gauge", "help": "One."}
    return {
        "told": {
            "why": "It grows.",
            "max_series": 10_000,
            "priority": 9,
            "labels": ["id"],
            "sql": "select id, 1 as one from public.told",
            "metrics": {"pg_own_told": one},
        },
        "asked": {
            "why": "Its table may be away.",
            "max_series": 1,
            "sql": "select 1 as one from public.asked",
            "metrics": {"pg_own_asked": one},
        },
        **{
            f"slow{number}": {
                "why": "It is as slow as it is told to be.",
                "max_series": 1,
                "sql": "select 1 as one from public.nap, pg_catalog.pg_sleep(seconds)",
                "metrics": {f"pg_own_slow{number}": one},
            }
            for number in range(SLOW)
        },
    }


@contextlib.contextmanager
def watching(stage: "Stage") -> Iterator[Piece]:
    """All of it."""
    yield Watching(stage)
