"""Shows how big the image is and how soon it answers, beside postgres_exporter's."""

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from urllib.error import URLError
from urllib.request import urlopen

from bench.report import Report, Table, ratio
from bench.run import Run
from bench.servers import dsn
from lab import docker
from lab.docker import Engine
from lab.ports import free_port

_ROOT = Path(__file__).parents[1]
_PEER = 'FROM scratch\nCOPY postgres_exporter /\nUSER 65534\nENTRYPOINT ["/postgres_exporter"]\n'
"""As its own Dockerfile, less busybox and the time zones: smaller than what is pulled."""
_PATIENCE_SECONDS = 60.0


def measure(run: Run) -> Report:
    """Measure images made here from both programs."""
    report = Report("image")
    columns = ("image", "size MB", "to the first page ms", "ratio of the sizes")
    table = Table("Images, and from `docker run` to an answered scrape of a plain server", columns)
    report.tables.append(table)
    with docker.engine() as engine:
        if isinstance(engine, str):
            report.notes.append(f"Nothing was measured: {engine}.")
            return report
        engine.build(_ROOT, "ours")
        of = dsn(run.servers.plain)
        ours = _size(engine, "ours")
        seconds = _answers(engine, "ours", run.times(9), {"PGVIGIL_DSN": of}, "PGVIGIL_LISTEN")
        rows = [("pgvigil", ours / 1e6, seconds * 1000, 1.0)]
        if run.peer:
            with tempfile.TemporaryDirectory() as directory:
                shutil.copy(run.peer.program, Path(directory, "postgres_exporter"))
                Path(directory, "Dockerfile").write_text(_PEER)
                engine.build(Path(directory), "theirs")
            theirs = _size(engine, "theirs")
            seconds = _answers(engine, "theirs", run.times(9), {"DATA_SOURCE_NAME": of}, None)
            rows.append(
                ("postgres_exporter", theirs / 1e6, seconds * 1000, ratio(theirs, ours) or 0.0)
            )
        table.rows += rows
    report.notes.append(
        "Sizes as the engine counts the layers. The peer's image is its program alone, without the "
        "busybox that its own stands on. Times are medians."
    )
    return report


def _size(engine: Engine, image: str) -> int:
    return int(engine.run("image", "inspect", "--format={{.Size}}", image))


def _answers(
    engine: Engine, image: str, times: int, environment: dict[str, str], listen: str | None
) -> float:
    """Seconds from the command to a page that was read, the median."""
    found: list[float] = []
    for _ in range(times):
        port = free_port()
        told = {**environment, **({listen: f"127.0.0.1:{port}"} if listen else {})}
        variables = [f"--env={name}={value}" for name, value in told.items()]
        words = [] if listen else [f"--web.listen-address=127.0.0.1:{port}"]
        begun = time.monotonic()
        options = ("--detach", "--network=host", "--read-only", "--cap-drop=ALL", *variables)
        name = engine.run("run", *options, image, *words).splitlines()[-1]
        try:
            found.append(_read(port) - begun)
        finally:
            engine.run("rm", "--force", name)
    return median(found)


def _read(port: int) -> float:
    """When a page was read."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                if b"\npg_up 1" in answer.read():
                    return time.monotonic()
        except (URLError, ConnectionError):
            if time.monotonic() > end:
                raise
        time.sleep(0.005)
