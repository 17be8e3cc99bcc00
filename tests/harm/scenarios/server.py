"""The server stands still, ends, crashes, changes its role or takes nobody in."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import psycopg

from tests.harm.scene import ROLE, Scenario, Scene


@contextmanager
def _stands_still(scene: Scene) -> Iterator[None]:
    """SIGSTOP in mid-scrape."""
    scene.amid_next_scrape(0.005, scene.server.pause)
    scene.scrape()
    scene.during.clear()  # it may have been quicker than the signal
    try:
        yield
    finally:
        scene.server.resume()


@contextmanager
def _restarted(scene: Scene) -> Iterator[None]:
    scene.server.restart()
    yield


@contextmanager
def _stopped(scene: Scene) -> Iterator[None]:
    scene.server.stop()
    yield
    scene.server.start()


@contextmanager
def _crashed(scene: Scene) -> Iterator[None]:
    """SIGKILL of all processes during a scrape."""
    scene.amid_next_scrape(0.005, scene.server.crash)
    scene.scrape()
    scene.during.clear()
    yield
    scene.server.start()


@contextmanager
def _crowded(scene: Scene) -> Iterator[None]:
    """Others hold all connections but those an exporter has, and take what becomes free."""
    with ExitStack() as crowd:
        for _ in range(100):
            try:
                crowd.enter_context(closing(psycopg.connect(scene.server.conninfo(user="crowd"))))
            except psycopg.OperationalError:
                break
        yield


def _role_for_crowds(scene: Scene) -> None:
    scene.server.execute("create role crowd login")


@contextmanager
def _limited(scene: Scene) -> Iterator[None]:
    """The role may hold no more connections than it has, and those are ended."""
    scene.server.execute(f"alter role {ROLE} connection limit 0")
    _end_sessions(scene)
    yield
    scene.server.execute(f"alter role {ROLE} connection limit -1")


def _end_sessions(scene: Scene) -> None:
    scene.server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [ROLE]
    )


# Who looks whether a server is back may come while it starts or ends, and it says so in its log.
_COMING_OR_GOING = "terminating connection|the database system is"

SCENARIOS = (
    Scenario(
        "the server stands still in mid-scrape",
        _stands_still,
        "down",
        provoked="connection to client lost|canceling statement due to user request",
    ),
    Scenario("the server is restarted", _restarted, provoked=_COMING_OR_GOING),
    Scenario("the server is stopped", _stopped, "down", provoked=_COMING_OR_GOING),
    Scenario(
        "the server crashes during a scrape",
        _crashed,
        "down",
        # A crash loses the statistics, and what has not happened since is not told.
        concerned=lambda series: series[0].startswith("pg_stat_io_"),
        provoked=_COMING_OR_GOING,
    ),
    Scenario(
        "others take every connection",
        _crowded,
        "either",
        before=_role_for_crowds,
        provoked="remaining connection slots|too many clients",
    ),
    Scenario(
        "the role's CONNECTION LIMIT is reached",
        _limited,
        "down",
        provoked="too many connections for role|terminating connection",
    ),
)
