"""Gives tests real PostgreSQL servers, started when the first test asks for them."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import pytest

from lab import processes
from lab.binaries import UnavailableError, allowed_sources
from lab.cluster import Cluster, prepare
from lab.postgres import MAJORS, Server, Setting

Made = TypeVar("Made")

_used: dict[int, str] = {}

_PR_SET_CHILD_SUBREAPER = 36
"""Of linux/prctl.h."""

_ended: list[int] = []
"""The signals that have ended this run."""


def pytest_configure() -> None:
    """Let `kill` end a run as Ctrl-C does: with its servers stopped and removed."""
    try:
        allowed_sources()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if _a_worker():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)


def _a_worker() -> bool:
    """Whether this process runs tests for another one, which has been asked for them."""
    return "PYTEST_XDIST_WORKER" in os.environ


def _interrupted(number: int, frame: FrameType | None) -> None:
    """End the run; what the processes that run the tests leave behind becomes our own child."""
    with contextlib.suppress(AttributeError):  # where there is no Linux
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _ended.append(number)
    signal.default_int_handler(number, frame)


def pytest_unconfigure() -> None:
    """Of processes that had no time to stop their servers, these are killed here."""
    if _ended:
        for pid in processes.descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pytest_report_header() -> str:
    """Say where servers are looked for; which ones were found is said at the end."""
    return f"PostgreSQL from: {', '.join(allowed_sources())}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of several processes, each tells the first one which servers it has used."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["used"] = _used


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of several processes has ended, or died."""
    _used.update(getattr(node, "workeroutput", {}).get("used", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which servers were used: the exact version and where it came from."""
    if _used:
        described = ", ".join(_used[major] for major in sorted(_used))
        terminalreporter.write_line(f"PostgreSQL used: {described}")


class Clusters:
    """The clusters that tests share, one of each major version."""

    def __init__(self) -> None:
        self._clusters: dict[int, Cluster] = {}

    def get(self, major: int) -> Cluster:
        """Return the cluster of a major version, started now if it is the first time."""
        if major not in self._clusters:
            self._clusters[major] = _or_skip(lambda: Cluster.start(major))
            _remember(self._clusters[major].primary)
        return self._clusters[major]

    def destroy(self) -> None:
        """Stop and remove them all."""
        for cluster in self._clusters.values():
            cluster.destroy()


@pytest.fixture(scope="session")
def clusters() -> Iterator[Clusters]:
    """All shared clusters; tests want `cluster` or, of several versions at once, `get` of this."""
    shared = Clusters()
    yield shared
    shared.destroy()


@pytest.fixture(params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    """Each major version; `parametrize("major", [17])` narrows it."""
    version: int = request.param
    return version


@pytest.fixture
def cluster(major: int, clusters: Clusters) -> Cluster:
    """A shared primary and standby of the major version: look, and leave it as you found it."""
    return clusters.get(major)


@pytest.fixture
def server(cluster: Cluster) -> Server:
    """The primary of the shared cluster."""
    return cluster.primary


def _servers() -> Iterator[Callable[..., Server]]:
    """Yield a function that starts a server nobody else has; all are removed at the end.

    `start(major=17, *, tls=False, hba=None, initdb_options=(), **settings)`; it has the roles of
    `lab.cluster`.
    """
    servers: list[Server] = []

    def start(
        major: int = 17,
        *,
        tls: bool = False,
        hba: Sequence[str] | None = None,
        initdb_options: Sequence[str] = (),
        **settings: Setting,
    ) -> Server:
        server = _or_skip(
            lambda: Server(
                major, settings=settings, tls=tls, hba=hba, initdb_options=initdb_options
            )
        )
        servers.append(server)
        _remember(server)
        server.start()
        prepare(server)
        return server

    yield start
    for server in servers:
        server.destroy()


fresh_server = pytest.fixture(_servers, name="fresh_server")
"""Starts servers for one test alone, which may break them."""

module_server = pytest.fixture(_servers, scope="module", name="module_server")
"""Starts servers for the tests of one file, which heal what they break."""


def _or_skip(make: Callable[[], Made]) -> Made:
    """Make something of PostgreSQL, or skip the test where there is none; fail where CI is set."""
    try:
        return make()
    except UnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def _remember(server: Server) -> None:
    _used[server.major] = f"{server.binaries.version} ({server.binaries.source})"
