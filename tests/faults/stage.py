"""A pair of servers with all that watches it, from the exporter to who would be woken."""

import contextlib
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

import psycopg
import yaml
from pgvigil import standards

from lab import alertmanager, basebackup, hurry, prometheus
from lab.alertmanager import Alertmanager, Notice
from lab.binaries import find
from lab.cluster import PGVIGIL, prepare
from lab.disk import Disk
from lab.exporter import Exporter
from lab.postgres import DEFAULT_HBA, Server, Setting
from lab.prometheus import Prometheus
from tests.faults.pieces import Piece
from tests.faults.pieces.pooler import pooler
from tests.faults.pieces.repository import repository
from tests.faults.pieces.watching import watching
from tests.faults.surroundings import (
    CAPACITY,
    declared,
    may_see_files,
    never_saved,
    on_a_machine,
    on_a_network,
    over_days,
)

ROOT = Path(__file__).parents[2]
RULES = ROOT / "rules"
ROUTES = ROOT / "alertmanager" / "alertmanager.yml"

DATABASE = "shop"
"""Where the load is, and where faults take place."""

WATCHED = ("postgres", DATABASE)
"""The databases that are visited."""

CONNECTIONS = 40

SETTINGS: Mapping[str, Setting] = {
    # What a server of somebody who cares has, so that only faults are found fault with.
    "archive_timeout": 2,
    "autovacuum_naptime": 1,
    "fsync": True,
    "log_min_duration_statement": 1000,
    "max_connections": CONNECTIONS,
    # For segments so small initdb makes it as small, and a checkpoint is asked for each minute.
    "max_wal_size": "1GB",
    "max_prepared_transactions": 5,
    "wal_level": "logical",
}

HBA = ("host all client 127.0.0.1/32 trust", *DEFAULT_HBA)

Kind = TypeVar("Kind", bound=Piece)

Objectives = Mapping[str, Mapping[str, Mapping[str, float]]]

OTHERS: Objectives = {
    # A second is a minute here, and a checkpoint of a busy machine, in which nothing is switched to
    # the next file, still takes some.
    "BAK-6": {"recoverable_age_seconds": {"ticket": 30, "page": 30}},
    # A lab would take hours to come near what is default.
    "MNT-4": {"horizon_xids": {"ticket": 10_000}},
    # Here the exporter asks sixty times as often, of a server with next to nothing to do.
    "OPS-3": {"time_ratio": {"ticket": 1000}},
}
"""Numbers that no lab can be held to, and others in their place."""


class Scene(NamedTuple):
    """What is different about a pair."""

    settings: Mapping[str, Setting] = MappingProxyType({})
    objectives: Objectives = MappingProxyType({})
    surround: "Callable[[Stage], AbstractContextManager[object]]" = contextlib.nullcontext
    """Puts there what else is needed, before anybody watches; it may tell the exporter and
    Prometheus of it, by the stage's `targets` and `jobs`, or as a Piece."""
    factor: float = hurry.FACTOR
    """How many times as fast the clock of the rules runs."""
    window: float = hurry.RANGE_FLOOR
    """Seconds that each range lasts at least."""
    around: Collection[str] = ()
    """Alerts that come of others on the machine, too, and then are not the scene's."""
    tls: bool = False


SCENES: Mapping[str, Scene] = {
    "pair": Scene(),
    "synchronous": Scene(
        {"synchronous_standby_names": "*"}, {"REP-2": {"streaming_standbys": {"ticket": 1}}}
    ),
    "failover": Scene({}, {"REP-2": {"streaming_standbys": {"page": 1}}}, declared),
    # A lab does not burn some thousand million transactions, but many in a minute.
    "aged": Scene(
        {"autovacuum_freeze_max_age": 100_000}, {"MNT-3": {"left_seconds": {"ticket": 1e7}}}
    ),
    "small": Scene(
        {"autovacuum_max_workers": 1, "logging_collector": True},
        {
            "STO-1": {"capacity_bytes": {"page": CAPACITY}},
            "STO-4": {"temporary_bytes": {"ticket": 2e7}, "log_bytes": {"ticket": 3e6}},
        },
        on_a_network,
    ),
    # The checkpointer's list of files to synchronize is as long as there are buffers.
    "few buffers": Scene({"shared_buffers": "1MB"}),
    "machine": Scene(surround=on_a_machine, around=("HostStalls",)),
    # What looks back over days has seen them after half a minute. The windows of an hour would be
    # too short for the exporter's background, which looks each two seconds.
    "days": Scene(
        {},
        {
            "STO-1": {"capacity_bytes": {"ticket": CAPACITY}},
            # A checkpoint of a lab has little to write: of checkpoint_timeout it takes a second.
            "RES-7": {"budget_ratio": {"ticket": 0.001}},
        },
        over_days,
        factor=7200,
        window=15,
    ),
    "encrypted": Scene(tls=True),
    "files shown": Scene(surround=may_see_files),
    # That once there was a good one counts for a week.
    "never saved": Scene(surround=never_saved),
    # What may take a night takes a moment.
    "quick backups": Scene(objectives={"BAK-2": {"backup_seconds": {"ticket": 10}}}),
    "pooler": Scene(surround=pooler),
    "repository": Scene(surround=repository),
    # What is too old after a day is so after a minute and a half.
    "repository that ages": Scene(surround=partial(repository, age=90)),
    "watching": Scene(surround=watching),
}
"""Faults of one scene leave nothing behind that concerns the others."""

LEAST = 5.0
"""Seconds that each `for` lasts at least, so that a machine too busy to answer twice is none that
is away."""

SETTLED = 15.0
"""Seconds until windows are full and what runs in the background has run."""


class Load:
    """Somebody who writes a few rows a second, whatever happens to the server."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(self._conninfo, autocommit=True, connect_timeout=5) as session,
            ):
                for turn in itertools.takewhile(self._goes_on, itertools.count()):
                    session.execute("insert into orders (note) values ('x')")
                    session.execute("select count(*) from orders where id < 100")
                    # Where few sessions end, those few that fail would be many of them.
                    if turn % 3 == 0:
                        psycopg.connect(self._conninfo, connect_timeout=5).close()
            self._over.wait(0.2)

    def _goes_on(self, _: int) -> bool:
        return not self._over.wait(0.1)


class Stage:
    """A primary with its standby under a little load, and one of everything that watches them.

    Prometheus runs our rules and Alertmanager our routes, by the clock of `lab.hurry`. The targets
    are called `primary` and `standby`, and so are their instances.
    """

    def __init__(self, major: int, scene: str = "pair", rules: Path = RULES) -> None:
        """`scene` is one of SCENES, `rules` the folder of those that are run."""
        self.scene = SCENES[scene]
        self.major = major
        self.program = prometheus.installed()
        """The Prometheus that watches, for whoever wants another one."""
        self.patience = 120.0
        """Seconds for an alert to come, and again to go."""
        self.targets: dict[str, dict[str, Any]] = {"primary": {}, "standby": {}}
        """By name, what the exporter is told of a target besides how to come in."""
        self.jobs: list[dict[str, Any]] = []
        """What Prometheus scrapes besides."""
        self.objectives: dict[str, dict[str, dict[str, float]]] = {}
        """Numbers that a scene only knows when it is set."""
        self.usual: Collection[str] = ()
        """What is found when all is well."""
        self.disk: Disk
        """That of a scene which has one."""
        self._rules = sorted(rules.glob("*.yml"))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._set()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set(self) -> None:
        enter = self._stack.enter_context
        self.directory = Path(enter(tempfile.TemporaryDirectory(prefix="pgvigil-faults-")))
        self.primary = Server(
            self.major,
            binaries=find(self.major),
            settings={**SETTINGS, **self.scene.settings},
            initdb_options=["--data-checksums", "--wal-segsize=1"],
            tls=self.scene.tls,
        )
        self._stack.callback(self.primary.destroy)
        self.archive = basebackup.archive(self.primary)
        self.refusal = self.archive.with_name("refuse")
        self.hang = self.archive.with_name("hang")
        self.primary.set_hba(HBA)
        self.primary.set({"archive_command": self._archive_command()})
        self.primary.start()  # a standby goes by the settings with which its primary last ran
        self.standby = self.primary.standby(slot="standby")
        prepare(self.primary)
        self.primary.execute(f"create database {DATABASE}")
        self.execute(
            "create table orders (id bigint generated always as identity primary key, note text)"
        )
        # Faults take place here, so that the load is not in their way nor they in its.
        self.execute("create table parked (id bigint primary key); analyze parked")
        self.execute(
            "create table churned (id int primary key); insert into churned values (1);"
            "analyze churned, orders"
        )
        self.primary.execute("create role client login")
        self.primary.execute(printed("grants", "--record"))
        for place in ("here", "elsewhere"):
            self.record("backup", place=place)
        for kind in ("restore_verification", "failover_drill", "integrity_check"):
            self.record(kind)
        self.record("attestation", place="encryption-at-rest")
        for database in WATCHED:
            # Until PostgreSQL 15 it is so by default.
            self.primary.execute("revoke create on schema public from public", database=database)
        self.analyze()
        around = enter(self.scene.surround(self))
        self._piece = around if isinstance(around, Piece) else Piece()
        self.mind_archive_timeout()
        load = Load(self.primary.conninfo(dbname=DATABASE))
        self._stack.callback(load.stop)
        self.furnish()
        self._watch()

    def furnish(self) -> None:
        """Put up what else shall be there before anybody watches; nothing here."""

    def _archive_command(self) -> str:
        """It refuses or hangs for as long as a file says so, and keeps what it was given last."""
        waits = f"while test -e {self.hang}; do sleep 0.2; done"
        return f"{waits}; test ! -e {self.refusal} && cp %p {self.archive}/newest"

    def _watch(self) -> None:
        enter = self._stack.enter_context
        self._package = hurry.package(ROOT / "exporter" / "pgvigil", self.directory / "exporter")
        self._piece.plant(self._package)
        self._configuration = self.directory / "pgvigil.yml"
        self._configuration.touch(0o600)
        self._configuration.write_text(yaml.safe_dump(self.configuration()))
        self.exporter = self._exporter()
        self._stack.callback(lambda: self.exporter.stop())
        mailer = alertmanager.installed()
        if mailer is None or self.program is None:
            raise RuntimeError("Prometheus and Alertmanager are not both installed")
        self.alertmanager = enter(Alertmanager(mailer, ROUTES))
        copies = self.directory / "rules"
        copies.mkdir()
        jobs: list[dict[str, Any]] = [
            {"job_name": "postgresql", "http_sd_configs": [self._discovery()]}
        ]
        self._piece.jobs(jobs)
        self.prometheus = enter(
            Prometheus(
                self.program,
                [*jobs, *self.jobs],
                [self._hurried(file, copies) for file in self._rules],
                alertmanager=self.alertmanager.port,
            )
        )
        self.prometheus.wait_until("count(pg_up == 1) == 2")

    def _hurried(self, file: Path, copies: Path) -> Path:
        return hurry.hurried(file, copies, LEAST, self.scene.factor, self.scene.window)

    def _exporter(self, port: int | None = None) -> Exporter:
        environment = {"PYTHONPATH": str(self._package)}
        return Exporter("--config", str(self._configuration), environment=environment, port=port)

    def another_exporter(self) -> Exporter:
        """Start a second one by the same configuration, which Prometheus does not know."""
        return self._exporter()

    def start_exporter_anew(self) -> None:
        """Start another where the first one was."""
        self.exporter = self._exporter(self.exporter.port)

    def record(
        self,
        kind: str,
        age: str = "1 minute",
        ok: bool = True,
        lasted: str = "5 seconds",
        place: str = "here",
    ) -> None:
        """Write down what a job has done some time ago."""
        self.primary.execute(
            "insert into pgvigil.record (kind, place, started, ended, ok) values (%s, %s,"
            " now() - %s::interval - %s::interval, now() - %s::interval, %s)",
            [kind, place, age, lasted, age, ok],
        )

    def settle(self) -> None:
        """Return when all has run for a while and nothing is told of it."""
        begun = time.monotonic()
        self.wait(
            lambda: time.monotonic() - begun > SETTLED and not self.held(),
            lambda: f"a stage where all is well has alerts: {sorted(self.held())}",
        )
        self.usual = frozenset(self.findings())

    def mind_archive_timeout(self) -> None:
        """Have a primary that was just started do so.

        From 15 on it does only after a checkpoint, which would come after minutes as long as ever.
        """
        self.primary.execute("checkpoint")

    def analyze(self) -> None:
        """Have the server know all tables."""
        for database in WATCHED:
            self.primary.execute("analyze", database=database)

    def _discovery(self) -> dict[str, str]:
        return {"url": f"http://127.0.0.1:{self.exporter.port}/sd", "refresh_interval": "1s"}

    def configuration(self) -> dict[str, Any]:
        """What the exporter is told."""
        ours: dict[str, dict[str, dict[str, float]]] = {}
        for standard, name, severity, value in standards.objectives():
            ours.setdefault(standard, {}).setdefault(name, {})[severity] = value
        numbers = hurry.objectives(ours)
        for given in (OTHERS, self.scene.objectives, self.objectives):
            for standard, names in given.items():
                for name, by_severity in names.items():
                    numbers.setdefault(standard, {}).setdefault(name, {}).update(by_severity)
        told = {
            "targets": {
                name: {
                    "connection": {
                        "host": "127.0.0.1",
                        "port": server.port,
                        **PGVIGIL.login,
                    },
                    "objectives": numbers,
                    **self.targets[name],
                }
                for name, server in (("primary", self.primary), ("standby", self.standby))
            }
        }
        self._piece.configure(told)
        return told

    def piece(self, kind: type[Kind]) -> Kind:
        """What the scene has beside the pair; raises TypeError when it is something else."""
        if not isinstance(self._piece, kind):
            raise TypeError(f"the scene has no {kind.__name__}")
        return self._piece

    def execute(self, text: str) -> list[tuple[Any, ...]]:
        """Run SQL in the database of the load."""
        return self.primary.execute(text, database=DATABASE)

    @contextlib.contextmanager
    def session(self, **keywords: str) -> Iterator["psycopg.Connection[Any]"]:
        """A client of the primary; whatever it does is undone by its end."""
        conninfo = self.primary.conninfo(dbname=DATABASE, application_name="fault", **keywords)
        with contextlib.closing(psycopg.connect(conninfo)) as connection:
            yield connection

    def arrived(self, since: float) -> list[Notice]:
        """What came to the webhook since a moment."""
        return [notice for notice in list(self.alertmanager.inbox.notices) if notice.at >= since]

    def findings(self) -> set[str]:
        """What is listed and wakes nobody."""
        return {labels["finding"] for labels, _ in self.prometheus.query("pgvigil:finding")}

    def held(self) -> set[str]:
        """The names of the alerts that Alertmanager knows of, or Prometheus is about to tell."""
        names = {labels["alertname"] for labels in self.alertmanager.alerts()}
        names |= {
            labels["alertname"]
            for labels, _ in self.prometheus.query('ALERTS{alertstate=~"firing|pending"}')
        }
        return names - {*self.scene.around}

    def wait(self, holds: Callable[[], object], what: Callable[[], str]) -> float:
        """Return when it holds, by the clock of notices; raises TimeoutError."""
        end = time.monotonic() + self.patience
        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(what())
            time.sleep(0.1)
        return time.monotonic()


def printed(*command: str) -> str:
    """What our program prints."""
    words = [sys.executable, "-m", "pgvigil", *command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
