"""Databases come, go and change their names while an exporter looks into them."""

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread

import psycopg

from tests.harm.scene import Scenario, Scene, Series
from tests.harm.subject import Answer

_MANY = [f"many_{number:02}" for number in range(12)]

_HARM: Mapping[str, str] = {
    "dropped": "drop database {name}",
    "renamed": "alter database {name} rename to new_{name}",
    "copied": "create database copy_of_{name} template {name}",
    "invalid": "update pg_database set datconnlimit = -2 where datname = '{name}'",
    "dropped by force": "drop database {name} with (force)",
    "closed": "alter database {name} allow_connections false",
}
"""PostgreSQL itself waits 5 s for others to leave a database, then refuses the first three."""

_GONE = (
    r'database "\w*many_\d+" (does not exist|is not currently accepting)|invalid database "\w*many'
)
"""What somebody reads who comes to a database too late; he cannot always know."""

_VISITOR = """select datname from pg_stat_activity
where usename = %s and datname = any(%s) and backend_type = 'client backend'"""


def _many(scene: Scene) -> None:
    for name in _MANY:
        scene.server.execute(f"create database {name}")


@contextmanager
def _harmed_amid_scan(scene: Scene) -> Iterator[None]:
    """The exporter starts to look around; whatever it looks into, is dropped, renamed and so on."""
    answers: list[Answer] = scene.notes.setdefault("answers", [])
    over = Event()
    scene.start_anew(wait=False)
    scraper = Thread(target=_scrape_on, args=[scene, over, answers])
    scraper.start()
    try:
        _harm_all(scene)
    finally:
        over.set()
        scraper.join()
    scene.wait_until_known()
    yield


def _scrape_on(scene: Scene, over: Event, answers: list[Answer]) -> None:
    while not over.wait(0.1):
        answers.append(scene.exporter.scrape())


def _harm_all(scene: Scene) -> None:
    left = list(_MANY)
    refused: list[str] = scene.notes.setdefault("refused", [])
    with psycopg.connect(scene.server.conninfo(), autocommit=True) as session:
        for what in itertools.cycle(_HARM):
            if not left:
                return
            name = _visited(session, scene.role, left)
            left.remove(name)
            try:
                session.execute(_HARM[what].format(name=name).encode())
            except psycopg.errors.ObjectInUse:
                refused.append(what)


def _visited(session: psycopg.Connection, role: str, names: list[str]) -> str:
    """One of some databases, the one the exporter is in if it enters any within a moment."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        if found := session.execute(_VISITOR, [role, names]).fetchone():
            return str(found[0])
    return names[0]


def _in_nobodys_way(scene: Scene) -> Iterable[str]:
    for what in scene.notes["refused"]:
        yield f"a database could not be {what} for 5 s because of the exporter's session"
    for answer in scene.notes["answers"]:
        if answer.up != 1:
            yield answer.fault or f"pg_up is {answer.up} while databases come and go"
    late = [line for line in scene.log_of_role() if re.search(_GONE, line)]
    if len(late) > len(_MANY):
        yield f"it comes {len(late)} times to databases that are gone"


def _of_many(series: Series) -> bool:
    """Which statements stand out is chosen anew as well, when an exporter starts anew."""
    name, labels = series
    return "statements" in name or any("many_" in value for _, value in labels)


SCENARIOS = (
    Scenario(
        "databases are dropped, renamed, copied and made invalid during a scan",
        _harmed_amid_scan,
        before=_many,
        truth=_in_nobodys_way,
        concerned=_of_many,
        provoked=f"{_GONE}|terminating connection due to administrator command",
    ),
)
