"""Looks each second at the servers and the exporter."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from bench.processes import memory, processor_seconds
from bench.soaking.course import Sample, Sessions
from lab.postgres import Server

_LOOK = """select usename::text, pg_catalog.count(*)::int,
  pg_catalog.count(*) filter (where state like 'idle in transaction%%')::int,
  coalesce(pg_catalog.max(extract(epoch from pg_catalog.clock_timestamp() - query_start))
    filter (where state = 'active'), 0)::float8
from pg_catalog.pg_stat_activity
where usename = any (%s) and backend_type = 'client backend'
group by 1"""
DATABASE = "witness"
"""Where the witnesses are: nobody locks a catalog there."""

_PAUSE_SECONDS = 0.1
_NONE = Sessions(0, 0, 0.0)


class Witness:
    """A superuser's session on one server that counts the exporter's, in a thread of its own."""

    def __init__(self, server: Server, roles: Mapping[str, str]) -> None:
        """`roles` are the targets by the role that is used for each."""
        self._server = server
        self._roles = roles
        self._most: dict[str, Sessions] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def seen(self) -> dict[str, Sessions]:
        """The most by target since this was last asked; nothing when the server did not answer."""
        most, self._most = self._most, {}
        return most

    def stop(self) -> None:
        """End; what waits for a server is left behind."""
        self._stop.set()
        self._thread.join(5)

    def _work(self) -> None:
        way = make_conninfo(
            host=str(self._server.directory),
            port=self._server.port,
            user="postgres",
            dbname=DATABASE,
            application_name="soak",
            connect_timeout=2,
            options="-c lock_timeout=1s",
        )
        while not self._stop.wait(0.5):
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(way, autocommit=True) as connection,
            ):
                while not self._stop.wait(_PAUSE_SECONDS):
                    rows = connection.execute(_LOOK, [list(self._roles)]).fetchall()
                    seen = {self._roles[role]: Sessions(*rest) for role, *rest in rows}
                    before = self._most
                    self._most = {
                        target: _most(before.get(target, _NONE), seen.get(target, _NONE))
                        for target in self._roles.values()
                    }


def _most(one: Sessions, other: Sessions) -> Sessions:
    return Sessions(
        max(one.total, other.total),
        max(one.in_transaction, other.in_transaction),
        max(one.longest, other.longest),
    )


class Log:
    """Counts the lines of the exporter's log by level, those that are new each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._counts = Counter[str]()
        self.bad: list[str] = []
        """The first lines that should not be there."""

    def counts(self) -> Mapping[str, int]:
        """All lines so far."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            self._position += len(whole) + 1
            for line in whole.decode(errors="replace").split("\n"):
                level = _level(line)
                self._counts[level] += 1
                if level not in ("info", "warning") and len(self.bad) < 200:
                    self.bad.append(line[:2000])
        return dict(self._counts)


def _level(line: str) -> str:
    if "Traceback (most recent call last)" in line:
        return "trace"
    try:
        return str(json.loads(line)["level"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def look(
    pid: int, clock: Callable[[], float], witnesses: Mapping[str, Witness], log: Log
) -> Sample:
    """One sample; raises OSError when the exporter is gone."""
    sessions: dict[str, Sessions] = {}
    for witness in witnesses.values():
        sessions |= witness.seen()
    return Sample(
        at=clock(),
        sessions=sessions,
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        resident=memory(pid).resident,
        processor=processor_seconds(pid),
        log=log.counts(),
    )
