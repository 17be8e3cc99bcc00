"""A server changes its role, and a standby cancels who stands in the way of replay."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

import psycopg

from lab.exporter import Page
from tests.harm.scene import Scenario, Scene, Series

_OF_THE_ROLE = re.compile(
    "recovery|replica|replay|receive|standby|timeline|wal|slot|archiv|backup|primary|checkpoint"
    "|server_info|conflict|publication|subscription|vacuum|statements|stat_io"
)
"""Names of metrics that a primary and a standby need not share; which statements stand out and
what reads and writes differs as well."""


@contextmanager
def _promoted(scene: Scene) -> Iterator[None]:
    """pg_promote() is called while a scrape runs."""
    scene.amid_next_scrape(0.002, scene.server.promote)
    scene.scrape()
    yield


@contextmanager
def _demoted(scene: Scene) -> Iterator[None]:
    """A switch-over: the other server becomes the primary, and this one its standby."""
    other = scene.server.standbys[0]
    scene.server.stop()
    scene.notes["stopped"] = scene.scrape()
    scene.during.clear()
    other.promote()
    scene.server.follow(other)
    yield


def _with_standby(scene: Scene) -> None:
    standby = scene.server.standby()
    # What shall stream to it later must be allowed to; nobody else knows its port.
    assert standby.running


@contextmanager
def _conflicts(scene: Scene) -> Iterator[None]:
    """Vacuum, drop and lock on the primary; the standby grants nobody a moment."""
    over = Event()
    thread = Thread(target=_quarrel, args=[scene, over])
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        scene.primary.execute("drop table if exists quarrel")


def _quarrel(scene: Scene, over: Event) -> None:
    """Each round removes rows that a snapshot on the standby may see, of catalogs above all."""
    with psycopg.connect(scene.primary.conninfo(), autocommit=True) as session:
        while not over.wait(0.02):
            session.execute("create table quarrel (n int, note text)")
            session.execute("insert into quarrel select 1, 'x' from generate_series(1, 100)")
            session.execute("delete from quarrel")
            session.execute("vacuum quarrel")
            session.execute("drop table quarrel")
            for catalog in ("class", "attribute", "type", "depend", "statistic"):
                session.execute(f"vacuum pg_catalog.pg_{catalog}")


def _role_is(of: str, scene: Scene) -> Iterable[str]:
    for answer in scene.during[-scene.scenario.scrapes :]:
        if answer.page and (told := _role(answer.page)) not in (None, of):
            yield f"the server is called a {told} while it is a {of}"


def _role(page: Page) -> str | None:
    """What a page calls the server, in the ways of several exporters; None when it says nothing."""
    for series in page.series("pg_server_info"):
        if role := dict(series).get("role"):
            return role
    for name in ("pg_replication_is_replica", "pg_is_in_recovery"):
        for value in page.series(name).values():
            return "standby" if value else "primary"
    return None


def _gone(scene: Scene) -> Iterable[str]:
    """What only a standby has may not be told of a primary."""
    yield from _role_is("primary", scene)
    for answer in scene.during[-scene.scenario.scrapes :]:
        for name, _ in answer.page.samples if answer.page else ():
            if re.search("^(?!pg_settings).*(wal_receiver|_replay_(lag|lsn|paused))", name):
                yield f"{name} is told of a primary"
        if answer.page:
            lags = answer.page.series("pg_replication_lag_seconds").values()
            yield from (f"a primary lags by {lag} s" for lag in lags if lag)


def _stood_by(scene: Scene) -> Iterable[str]:
    yield from _role_is("standby", scene)
    if scene.notes["stopped"].up:
        yield "pg_up is 1 while the server is stopped"


def _left_to_primary(series: Series) -> bool:
    """What is in a database is the same on a standby, so that an exporter may tell it once."""
    name, labels = series
    about = dict(labels)
    inside = "schema" in about.get("query", "") or {"datname", "database"} & about.keys()
    asked = not re.match("pg_(stat_(database|activity)|locks)", name)
    return _depends_on_role(series) or bool(inside and asked)


def _depends_on_role(series: Series) -> bool:
    name, labels = series
    about = dict(labels).get("query", "")  # a page may tell of its own queries
    return bool(_OF_THE_ROLE.search(f"{name} {about}"))


SCENARIOS = (
    Scenario(
        "a standby is promoted during a scrape",
        _promoted,
        standby=True,
        truth=_gone,
        concerned=_depends_on_role,
    ),
    Scenario(
        "a primary comes back as a standby",
        _demoted,
        before=_with_standby,
        truth=_stood_by,
        concerned=_left_to_primary,
        provoked="terminating connection|the database system is",
    ),
    Scenario(
        "a standby cancels who stands in the way of replay",
        _conflicts,
        standby=True,
        settings={"max_standby_streaming_delay": 0, "hot_standby_feedback": False},
        provoked="conflict with recovery",
        scrapes=20,
    ),
)
