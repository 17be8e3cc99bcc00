"""Starts, breaks and removes real PostgreSQL servers."""

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from lab import processes
from lab.binaries import Binaries, Process, account, find
from lab.ports import free_port

MAJORS = (13, 14, 15, 16, 17, 18)
"""The major versions we promise to work with."""

Setting = str | int | float | bool
StopMode = Literal["smart", "fast", "immediate"]

DEFAULT_HBA = (
    "host all postgres 127.0.0.1/32 trust",
    "host replication postgres 127.0.0.1/32 trust",
    "local all all scram-sha-256",
    "host all all 127.0.0.1/32 scram-sha-256",
)
"""The superuser comes in freely over loopback, everybody else by password."""

# The lab's own way in, which no other line, setting or fault on the network may close.
_OWN_HBA = "local all postgres trust"

_DEFAULT_SETTINGS: Mapping[str, Setting] = {
    "fsync": False,
    "listen_addresses": "127.0.0.1",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
    "password_encryption": "scram-sha-256",
    "shared_buffers": "16MB",
    "track_io_timing": True,
    "wal_keep_size": "64MB",
    "wal_level": "replica",
    # In the data directory, so that a killed server leaves nothing in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
}

_STOP_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

_SEVERITY = re.compile(r"(?:DEBUG\d|[A-Z]+):  ")

_TIMEOUT_SECONDS = 60.0


class ServerError(Exception):
    """The server did not do what the lab asked of it; the text ends with its log's last lines."""


class Server:
    """A PostgreSQL server of its own: a fresh directory, a free port, nothing shared.

    Creating one prepares its data; `start` (or `with`) runs it; `destroy` leaves nothing behind,
    and is called at the interpreter's end for whoever forgot.
    """

    def __init__(
        self,
        major: int,
        *,
        settings: Mapping[str, Setting] | None = None,
        hba: Sequence[str] | None = None,
        tls: bool = False,
        binaries: Binaries | None = None,
        initdb_options: Sequence[str] = (),
        copy_of: Path | None = None,
    ) -> None:
        """Prepare a server of a major version, its data new or a cold copy of other data.

        `hba` takes the place of DEFAULT_HBA. `tls` lets clients choose between TLS and plain.
        Raises UnavailableError when the version cannot be had, ServerError when it has no TLS.
        """
        self.binaries = binaries or find(major)
        self.major = major
        self.port = free_port()
        self.tls = tls
        self.directory = Path(tempfile.mkdtemp(prefix=f"pgvigil-{major}-"))
        self.data = self.directory / "data"
        self.log_path = self.directory / "log"
        self.standbys: list[Server] = []
        self.environment: dict[str, str] = {}
        """What its processes find in their environment from the next start on."""
        self._settings: dict[str, Setting] = {}
        self._hba: Sequence[str] = DEFAULT_HBA
        self._process: Process | None = None
        self._paused = False
        _existing.append(self)
        try:
            self._prepare(copy_of, initdb_options)
            self._settings |= settings or {}
            self._write_settings()
            self.set_hba(hba)
        except BaseException:
            self.destroy()
            raise

    def __enter__(self) -> Self:
        """Start the server; it is destroyed at the end."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    @property
    def certificate(self) -> Path:
        """The file with the server's own certificate, for `sslrootcert`."""
        return self.directory / "server.crt"

    @property
    def running(self) -> bool:
        """Whether the server's main process lives, paused or not."""
        return self._process is not None and self._process.running()

    @property
    def pid(self) -> int:
        """The process id of the postmaster; raises ServerError when it does not run."""
        if self._process is None or not self._process.running():
            raise ServerError(f"PostgreSQL {self.major} does not run")
        return self._process.pid

    def start(self) -> None:
        """Start and return when connections are accepted; raise ServerError with the log's end."""
        if self.running:
            raise ServerError(f"PostgreSQL {self.major} runs already")
        self._discard_process()
        self._process = self.binaries.spawn(
            ["postgres", "-D", str(self.data)], self.directory, self.log_path, self.environment
        )
        with self._waiting("start") as still_waiting:
            while (state := self._state()) not in ("ready", "standby"):
                if not self._process.running():
                    raise self._failure("ended while it started")
                still_waiting()
        if state == "ready":  # a standby that serves nobody stays at "standby"
            self.execute("select 1")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop and return when the server is gone; raise ServerError when it does not go."""
        self.resume()
        os.kill(self.pid, _STOP_SIGNALS[mode])
        self._wait_until_gone(f"stop ({mode})")

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start on the same port; a server that does not run is only started."""
        if self.running:
            self.stop(mode)
        self.start()

    def crash(self) -> None:
        """Kill all processes as the kernel would when memory ends; return when they are gone."""
        victims = self._halt()
        for victim in victims:
            _signal(victim, signal.SIGKILL)
        self._wait_until_gone("die")
        with self._waiting("die") as still_waiting:
            while any(processes.alive(victim) for victim in victims):
                still_waiting()

    def pause(self) -> None:
        """Halt all processes: connections stay open and nothing answers."""
        self._halt()
        self._paused = True

    def resume(self) -> None:
        """Let the processes go on where `pause` halted them."""
        if self._paused:
            for pid in (self.pid, *processes.descendants(self.pid)):
                _signal(pid, signal.SIGCONT)
            self._paused = False

    def promote(self) -> None:
        """Make a standby a primary and return when it is one."""
        if self.execute("select pg_promote(true, %s)", [int(_TIMEOUT_SECONDS)]) != [(True,)]:
            raise self._failure("was not promoted")

    def follow(self, primary: "Server") -> None:
        """Start as a standby of another server, this one's standby until it was promoted.

        It must have been stopped before the other was promoted. Returns when it streams.
        """
        source = make_conninfo(
            host="127.0.0.1", port=primary.port, user="postgres", application_name="follower"
        )
        self.set({"primary_conninfo": source, "primary_slot_name": None})
        self._write("standby.signal", "")
        self.start()
        primary.wait_until(
            "select exists (select from pg_stat_replication"
            " where state = 'streaming' and application_name = 'follower')"
        )

    def standby(
        self,
        name: str = "standby",
        *,
        slot: str | None = None,
        settings: Mapping[str, Setting] | None = None,
    ) -> "Server":
        """Return a new server that streams from this one and knows itself by `name`.

        This server is stopped for the copy and then runs, so do it before anybody uses it. With
        `slot`, a physical slot of that name is made here for it. The standby takes over settings,
        hba and TLS, and is destroyed with this server.
        """
        if self.running:
            self.stop()
        source = make_conninfo(
            host="127.0.0.1", port=self.port, user="postgres", application_name=name
        )
        streaming = {"cluster_name": name, "primary_conninfo": source}
        streaming["primary_slot_name"] = slot or ""
        standby = Server(
            self.major,
            settings={**self._settings, **streaming, **(settings or {})},
            hba=self._hba,
            tls=self.tls,
            binaries=self.binaries,
            copy_of=self.data,
        )
        self.standbys.append(standby)
        standby._write("standby.signal", "")
        self.start()
        if slot is not None:
            self.execute("select pg_create_physical_replication_slot(%s, true)", [slot])
        standby.start()
        self.wait_until(
            sql.SQL(
                "select exists (select from pg_stat_replication"
                " where state = 'streaming' and application_name = {})"
            ).format(name)
        )
        return standby

    def execute(
        self,
        query: str | sql.Composable,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        database: str = "postgres",
    ) -> list[tuple[Any, ...]]:
        """Run SQL as superuser over the Unix socket, each statement committed for itself.

        Returns the rows of the last statement (none if it has none); raises psycopg's errors.
        """
        own_way = make_conninfo(
            host=str(self.directory),
            port=self.port,
            user="postgres",
            dbname=database,
            application_name="lab",
            connect_timeout=10,
        )
        with psycopg.connect(own_way, autocommit=True) as connection:
            cursor = connection.execute(_as_query(query), parameters)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def wait_until(self, query: str | sql.Composable, timeout: float = 10) -> None:
        """Return when the query's first column is true, or raise ServerError after seconds."""
        with self._waiting(f"make true: {query}", timeout) as still_waiting:
            while not (rows := self.execute(query)) or not rows[0][0]:
                still_waiting()

    def conninfo(self, **overrides: str | int | None) -> str:
        """Return a libpq connection string over TCP, the superuser's unless `user` is given.

        None removes a keyword.
        """
        keywords: dict[str, str | int | None] = {
            "host": "127.0.0.1",
            "port": self.port,
            "dbname": "postgres",
            "user": "postgres",
            **overrides,
        }
        return make_conninfo("", **{k: v for k, v in keywords.items() if v is not None})

    def log_position(self) -> int:
        """Return how long the log is now, in bytes: where what comes next will begin."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log(self, since: int = 0) -> str:
        """Return the log, or what came after a position."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def errors_in_log(self, since: int = 0) -> list[str]:
        """Return the lines of severity ERROR, FATAL or PANIC."""
        found = []
        for line in self.log(since).splitlines():
            # The first severity word is the line's own: a statement may quote another one.
            severity = _SEVERITY.search(line)
            if severity and severity[0].startswith(("ERROR", "FATAL", "PANIC")):
                found.append(line)
        return found

    def reload(self) -> None:
        """Have the configuration read again and return when it was."""
        query = "select pg_conf_load_time()"
        before = self.execute(query)
        os.kill(self.pid, signal.SIGHUP)
        with self._waiting("read its configuration") as still_waiting:
            while self.execute(query) == before:
                still_waiting()

    def set(self, settings: Mapping[str, Setting | None]) -> None:
        """Change settings (None: back to the default), in force at once when that is possible.

        Those that need a restart wait for `restart`.
        """
        for name, value in settings.items():
            if value is None:
                self._settings.pop(name, None)
            else:
                self._settings[name] = value
        self._write_settings()
        if self.running:
            self.reload()

    def set_hba(self, lines: Sequence[str] | None) -> None:
        """Replace who may connect, in force at once; None brings DEFAULT_HBA back.

        The lab's own way in, the superuser over the Unix socket, stays open.
        """
        self._hba = DEFAULT_HBA if lines is None else lines
        self._write("pg_hba.conf", "".join(f"{line}\n" for line in (_OWN_HBA, *self._hba)))
        if self.running:
            self.reload()

    def renew_certificate(self, days: int) -> None:
        """Have another certificate, in force for new connections at once, that lasts for days."""
        self._make_certificate(days)
        self.reload()

    def destroy(self) -> None:
        """Stop without ceremony and remove every trace, of the standbys made here as well."""
        for standby in self.standbys:
            standby.destroy()
        if self.running:
            try:
                self.stop("immediate")
            except ServerError:
                self.crash()
        self._discard_process()
        # A server that was killed leaves its interlock, a few bytes of System V shared memory.
        for identifier in self._lock_file()[6:7]:
            if words := identifier.split():
                subprocess.run(["ipcrm", "-m", words[-1]], capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self in _existing:
            _existing.remove(self)

    def _prepare(self, copy_of: Path | None, initdb_options: Sequence[str]) -> None:
        self.directory.chmod(0o755)
        _give(self.directory)
        if copy_of is None:
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            command = ["initdb", "-D", str(self.data), "--no-sync", *options, *initdb_options]
            self.binaries.run(command, self.directory)
            with (self.data / "postgresql.conf").open("a") as file:
                file.write("include 'lab.conf'\n")
        else:
            subprocess.run(["cp", "-a", copy_of, self.data], check=True)
            for slot in (self.data / "pg_replslot").iterdir():
                shutil.rmtree(slot)  # it would hold back WAL here for nobody
        self._settings |= _DEFAULT_SETTINGS
        if self.binaries.has_library("pg_stat_statements"):
            self._settings["shared_preload_libraries"] = "pg_stat_statements"
        if self.tls:
            self._make_certificate()

    def _make_certificate(self, days: int = 30) -> None:
        if not self.binaries.tls:
            raise ServerError(f"PostgreSQL {self.major} from {self.binaries.source} has no TLS")
        key = self.directory / "server.key"
        command = [
            "openssl",
            "req",
            "-x509",
            "-nodes",
            "-days",
            str(days),
            "-subj",
            "/CN=localhost",
        ]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        command += ["-keyout", str(key), "-out", str(self.certificate)]
        subprocess.run(command, check=True, capture_output=True)
        key.chmod(0o600)
        _give(key)
        _give(self.certificate)

    def _write_settings(self) -> None:
        # What belongs to this server alone and must not go to its standbys with the rest.
        own: dict[str, Setting] = {
            "port": self.port,
            "unix_socket_directories": str(self.directory),
        }
        if self.tls:
            own |= {
                "ssl": True,
                "ssl_cert_file": str(self.certificate),
                "ssl_key_file": str(self.directory / "server.key"),
            }
        lines = [f"{name} = {_quoted(value)}\n" for name, value in (own | self._settings).items()]
        self._write("lab.conf", "".join(lines))

    def _write(self, name: str, text: str) -> None:
        path = self.data / name
        path.write_text(text)
        _give(path)

    def _lock_file(self) -> list[str]:
        """Return the lines of postmaster.pid: 0 the process, 6 the shared memory, 7 the state."""
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _state(self) -> str | None:
        """Return what the server says of itself, or None before it says anything.

        Read from its lock file and not asked by connecting, for the log shall hold no FATAL line
        that the lab provoked.
        """
        lines = self._lock_file()
        if self._process is None or len(lines) < 8 or lines[0] != str(self._process.pid):
            return None
        return lines[7].strip()

    def _halt(self) -> list[int]:
        """Stop the postmaster first, that it makes no more children; return all processes."""
        _signal(self.pid, signal.SIGSTOP)
        found = [self.pid, *processes.descendants(self.pid)]
        for pid in found[1:]:
            _signal(pid, signal.SIGSTOP)
        return found

    def _wait_until_gone(self, task: str) -> None:
        with self._waiting(task) as still_waiting:
            while self.running:
                still_waiting()
        self._discard_process()

    def _discard_process(self) -> None:
        if self._process is not None:
            self._process.discard()
        self._process = None
        self._paused = False

    @contextlib.contextmanager
    def _waiting(self, task: str, timeout: float = _TIMEOUT_SECONDS) -> Iterator["_Patience"]:
        """Give a function to call in a loop: it sleeps a little and raises when time is up."""
        try:
            yield _Patience(timeout)
        except TimeoutError:
            raise self._failure(f"did not {task} within {timeout:g} seconds") from None

    def _failure(self, what: str) -> ServerError:
        tail = "\n".join(self.log().splitlines()[-15:])
        return ServerError(f"PostgreSQL {self.major} {what}; its log ends with:\n{tail}")


class _Patience:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __call__(self) -> None:
        if time.monotonic() > self._end:
            raise TimeoutError
        time.sleep(0.01)


_existing: list[Server] = []


@atexit.register
def _destroy_all() -> None:
    for server in _existing.copy():
        server.destroy()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _give(path: Path) -> None:
    """Let the servers' account own a file we wrote."""
    if os.getuid() == 0:
        os.chown(path, *account())


def _as_query(query: str | sql.Composable) -> bytes:
    return query.encode() if isinstance(query, str) else query.as_bytes()


def _quoted(value: Setting) -> str:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return "'" + text.replace("'", "''") + "'"
