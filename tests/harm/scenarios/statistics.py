"""What a server has counted is lost, and an extension that counts comes and goes."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import psycopg

from lab.exporter import Page
from tests.harm.scene import Scenario, Scene, Series

_SHARED = (
    *("archiver", "bgwriter", "checkpointer", "io", "recovery_prefetch", "slru", "wal"),
    "no such thing",
)
"""What pg_stat_reset_shared takes on one version or another; on others it raises."""

_COMMITS = re.compile("^pg_stat_database_xact_commit(_total)?$")
_COUNTS = re.compile("^pg_stat_(?!activity|progress|\\w*_reset).*(_total|_count|_sum)$")
_WORK = 3000


def _work_done(scene: Scene) -> None:
    """Enough commits in `app` that nobody takes what comes after a reset for them."""
    with psycopg.connect(scene.server.conninfo(dbname="app"), autocommit=True) as session:
        for number in range(_WORK):
            session.execute(f"select {number % 100} as number_{number % 100}")


@contextmanager
def _reset(scene: Scene) -> Iterator[None]:
    scene.notes["counted"] = scene.before[-1]
    execute = scene.server.execute
    for name in _SHARED:
        with suppress(psycopg.Error):
            execute(f"select pg_stat_reset_shared('{name}')")
    execute("select pg_stat_reset_slru(null), pg_stat_reset_replication_slot(null)")
    execute("select pg_stat_reset_subscription_stats(null)")
    execute("select pg_stat_statements_reset()")
    for (database,) in execute("select datname from pg_database where datallowconn"):
        execute("select pg_stat_reset()", database=database)
    yield


def _from_nothing(scene: Scene) -> Iterable[str]:
    """Counters start again from what has happened since, and no sum makes up for what is lost."""
    counted = _commits(scene.notes["counted"].page)
    if counted is not None and counted < _WORK:
        yield f"{counted:.0f} commits were told of {_WORK}"
    for answer in scene.during:
        if answer.page is None:
            continue
        since = _commits(answer.page)
        if since is not None and not 0 <= since < _WORK / 2:
            yield f"{since:.0f} commits are told after a reset"
        before = scene.notes["counted"].page.samples
        for (name, labels), value in answer.page.samples.items():
            if _COUNTS.search(name) and value < 0:
                yield f"{name} is {value}"
            was = before.get((name, labels))
            if _COUNTS.search(name) and was is not None and value > 10 * was + 1e9:
                yield f"{name} jumps from {was} to {value}"


def _commits(page: Page) -> float | None:
    """The commits in `app` that a page tells of; None when it does not tell."""
    found = [
        value
        for (name, labels), value in page.samples.items()
        if _COMMITS.search(name) and "app" in dict(labels).values()
    ]
    return max(found, default=None)


@contextmanager
def _dropped(scene: Scene) -> Iterator[None]:
    """The first scrape may not know it yet; the others can."""
    drop = "drop extension pg_stat_statements"
    scene.amid_next_scrape(0.002, lambda: scene.server.execute(drop))
    scene.scrape()
    yield
    scene.server.execute("create extension pg_stat_statements")


def _asked_once(scene: Scene) -> Iterable[str]:
    lines = [line for line in scene.log_of_role() if re.search(_NO_STATEMENTS, line)]
    if len(lines) > 2:
        yield f"it asks {len(lines)} times for what is not there"
    for answer in scene.during[-scene.scenario.scrapes :]:
        for name in answer.page.names if answer.page else ():
            if name.startswith("pg_stat_statements_calls"):
                yield f"{name} is told of what nobody can ask"


_NO_STATEMENTS = r'ERROR:  .*"?[\w.]*pg_stat_statements\w*(\(|"? does not exist)'


def _of_statements(series: Series) -> bool:
    name, labels = series
    asked = ("statements", "queries.")  # a page may tell of its own queries
    return "statement" in name or any(word in value for _, value in labels for word in asked)


def _may_be_lost(series: Series) -> bool:
    """A statement that has not run since has no row, nor has what did neither read nor write."""
    return _of_statements(series) or "stat_io" in series[0] or "io" in dict(series[1]).values()


SCENARIOS = (
    Scenario(
        "all statistics are reset",
        _reset,
        before=_work_done,
        truth=_from_nothing,
        concerned=_may_be_lost,
    ),
    Scenario(
        "an extension is dropped during a scrape",
        _dropped,
        truth=_asked_once,
        concerned=_of_statements,
        provoked=_NO_STATEMENTS,
        scrapes=4,
    ),
)
