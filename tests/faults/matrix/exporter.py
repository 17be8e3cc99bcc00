"""What is not watched, or not as it should be."""

import contextlib
import threading
from collections.abc import Iterator

from lab.cluster import PGVIGIL
from tests.faults.fault import Alert, Fault
from tests.faults.pieces.watching import ROOM, Watching
from tests.faults.stage import Stage


@contextlib.contextmanager
def _not_a_target(stage: Stage) -> Iterator[None]:
    """Somebody takes a target from Prometheus' list; the exporter still has it."""
    watching = stage.piece(Watching)
    watching.scrape(but="standby")
    yield
    watching.scrape()


@contextlib.contextmanager
def _hung(stage: Stage) -> Iterator[None]:
    watching = stage.piece(Watching)
    watching.hang.touch()
    stage.wait(lambda: not watching.hang.exists(), lambda: "it never hung")
    yield


@contextlib.contextmanager
def _slow(stage: Stage) -> Iterator[None]:
    """All that somebody asks is slow, and together too slow for a scrape."""
    stage.primary.execute("update nap set seconds = 0.4")
    yield
    stage.primary.execute("update nap set seconds = 0")


@contextlib.contextmanager
def _too_many(stage: Stage) -> Iterator[None]:
    stage.primary.execute(f"insert into told select generate_series(2, {ROOM}); analyze told")
    yield
    stage.primary.execute("delete from told where id > 1; analyze told")


@contextlib.contextmanager
def _renamed(stage: Stage) -> Iterator[None]:
    """A table that somebody's query reads has another name."""
    stage.primary.execute("alter table asked rename to renamed")
    yield
    stage.primary.execute("alter table renamed rename to asked")


@contextlib.contextmanager
def _another_database(stage: Stage) -> Iterator[None]:
    stage.primary.execute("create database another")
    yield
    stage.primary.execute("drop database another")


@contextlib.contextmanager
def _no_second_session(stage: Stage) -> Iterator[None]:
    """The scrapes keep their session, and what runs in the background gets none any more."""
    stage.primary.execute(f"alter role {PGVIGIL.name} connection limit 1")
    stage.primary.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        # The last statement of a scrape is ours.
        f" where usename = '{PGVIGIL.name}' and query not like '%public.told%'"
    )
    yield
    stage.primary.execute(f"alter role {PGVIGIL.name} connection limit 5")


@contextlib.contextmanager
def _another_exporter(stage: Stage) -> Iterator[None]:
    """Somebody starts a second one by the same configuration, and has it asked."""
    over = threading.Event()
    with stage.another_exporter() as exporter:

        def ask() -> None:
            while not over.wait(0.5):
                exporter.scrape("primary")

        asker = threading.Thread(target=ask)
        asker.start()
        try:
            yield
        finally:
            over.set()
            asker.join()


FAULTS = (
    Fault(
        "somebody starts a second exporter for the same servers",
        _another_exporter,
        (Alert("ExporterConnections", "ticket", "primary"),),
        also=("RoleConnectionsNearLimit",),
    ),
    Fault(
        "somebody takes a target from Prometheus' list",
        _not_a_target,
        (
            Alert("TargetNotScraped", "ticket", labels=(("target", "standby"),)),
            Alert("TargetVanished", "ticket", "standby"),
        ),
        scene="watching",
    ),
    Fault(
        "a scrape hangs by a fault of the exporter's own",
        _hung,
        (Alert("ScrapesAbandoned", "ticket", "primary"),),
        # Its session is cut.
        also=("DatabaseDown", "SessionsFail"),
        scene="watching",
    ),
    Fault(
        "what somebody asks of a server takes longer than a scrape may",
        _slow,
        (Alert("ScrapesOverrun", "ticket", "primary"),),
        # Its session is cut with each scrape that is cut short.
        also=("QueryFailing", "SessionsFail"),
        scene="watching",
    ),
    Fault(
        "somebody's query has more rows than a page has room",
        _too_many,
        (Alert("SeriesLeftOut", "ticket", "primary", (("query", "own.told"),)),),
        scene="watching",
    ),
    Fault(
        "a table that somebody's query reads gets another name",
        _renamed,
        (Alert("QueryFailing", "ticket", "primary", (("query", "own.asked"),)),),
        scene="watching",
    ),
    Fault(
        "there are more databases than the exporter may visit",
        _another_database,
        (Alert("DatabasesNotVisited", "ticket", "primary"),),
        scene="watching",
    ),
    Fault(
        "the exporter's role may have one session alone",
        _no_second_session,
        (Alert("DataStale", "ticket", "primary"),),
        also=("RoleConnectionsNearLimit", "DatabaseUnwatched", "DatabasesNotVisited"),
        scene="watching",
    ),
)
