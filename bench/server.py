"""Compares what one pipeline of prepared statements costs the server with a plain loop."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import process_time

import psycopg
from pgvigil import catalogue, target
from pgvigil.connect import GUARDS
from pgvigil.plan import make_plan, wanted
from pgvigil.session import Session
from pgvigil.source import Answers, Ask
from psycopg import conninfo

from bench.processes import processor_seconds
from bench.report import Report, Table, Target
from bench.run import Run
from bench.servers import dsn

_PATIENCE = 30.0
_BURST = 10
_SILENT = Answers(lambda _position, _rows: None, lambda _position, _failure, _seconds: None)


class _Way:
    """One way to ask everything, with the backend that answers."""

    def __init__(self, name: str, backend: int, ask: Callable[[], None]) -> None:
        self.name = name
        self._backend = backend
        self._ask = ask
        self._server: list[float] = []
        self._client: list[float] = []

    def burst(self) -> None:
        """Ask some times and note what one time takes."""
        begun = processor_seconds(self._backend), process_time()
        for _ in range(_BURST):
            self._ask()
        ended = processor_seconds(self._backend), process_time()
        self._server.append((ended[0] - begun[0]) / _BURST)
        self._client.append((ended[1] - begun[1]) / _BURST)

    @property
    def server(self) -> float:
        """The backend's milliseconds of processor time for everything, the median burst's."""
        return median(self._server) * 1000

    @property
    def client(self) -> float:
        """Our own."""
        return median(self._client) * 1000


def measure(run: Run) -> Report:
    """Ask the default catalogue of a plain server in three ways, by turns."""
    line = dsn(run.servers.plain)
    with (
        _pipeline(line) as (pipeline, texts),
        _loop(line, texts, prepare=True) as prepared,
        _loop(line, texts) as plain,
    ):
        ways = (pipeline, prepared, plain)
        for _ in range(2 + run.times(12)):
            for way in ways:
                way.burst()
    table = Table(
        f"processor time of {len(texts)} statements",
        ("way", "server CPU ms", "/ plain loop", "client CPU ms", "/ plain loop"),
    )
    for way in ways:
        table.rows.append(
            (way.name, way.server, way.server / plain.server, way.client, way.client / plain.client)
        )
    claim = "server CPU of the pipeline beside a plain loop"
    return Report(
        "server",
        [
            "The same statements under the same settings over connections that are kept. "
            "pgvigil's way asks for the server's facts besides; no way renders anything."
        ],
        [table],
        [Target(claim, 0.6, pipeline.server / plain.server)],
    )


@contextmanager
def _pipeline(line: str) -> Iterator[tuple[_Way, list[str]]]:
    """The exporter's own way, and the statements it sends."""
    connection = {key: str(value) for key, value in conninfo.conninfo_to_dict(line).items()}
    queries = catalogue.load()
    with asyncio.Runner() as runner:
        clock = runner.get_loop().time
        session = runner.run(
            Session.open(target.Target("bench", connection), wanted(queries), clock() + _PATIENCE)
        )
        facts = runner.run(session.ask((), _SILENT, clock() + _PATIENCE))
        fresh = [query for query in queries if not query.every]
        statements = make_plan(fresh, facts).statements
        asks = [Ask(s.text, s.query.timeout) for s in statements]

        def ask() -> None:
            runner.run(session.ask(asks, _SILENT, clock() + _PATIENCE))

        name = "pgvigil, one pipeline, prepared"
        yield _Way(name, session.backend_pid, ask), [s.text for s in statements]
        session.close()


@contextmanager
def _loop(line: str, texts: Sequence[str], *, prepare: bool = False) -> Iterator[_Way]:
    """A connection of psycopg that sends one statement after the other."""
    escaped = {key: value.replace(" ", r"\ ") for key, value in GUARDS.items()}
    options = " ".join(f"-c {key}={value}" for key, value in escaped.items())
    encoded = [text.encode() for text in texts]
    with psycopg.connect(line, autocommit=True, options=options) as connection:

        def ask() -> None:
            for text in encoded:
                connection.execute(text, prepare=prepare).fetchall()

        name = "psycopg, one by one, prepared" if prepare else "psycopg, one by one"
        yield _Way(name, connection.info.backend_pid, ask)
