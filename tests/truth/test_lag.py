"""How far behind a standby is, as both ends of its line tell it in each situation.

The classic lies: 0 because all that was received is replayed, while nothing is received any more;
hours because the primary has been idle; a figure of before, after the line or the role is gone.
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import psycopg
import pytest
from pgvigil import catalogue
from pgvigil.plan import concerning

from lab.cluster import PGVIGIL
from lab.exporter import Exporter, Page
from lab.line import Line
from lab.postgres import Server
from lab.truth import Look, cells_of, fits

MakeServer = Callable[..., Server]

# In situations that are `written`, somebody commits before each look. Refused is a line that is
# cut and cannot be made anew, silent is one where nothing comes through and nobody says so, until
# both sides have noticed.

# A sender's seconds are those between a commit and its replay, as last measured: of what is not
# replayed they know nothing. The bytes and the last reply do.
SEEN_ON_THE_PRIMARY = """
situation                 standbys  unflushed  unreplayed  seconds  reply   active  retained
idle                      1         0          0           0        some    1       0
busy                      1         some       some        any      some    1       some
refused, idle             0         -          -           -        -       0       0
refused, written          0         -          -           -        -       0       grows
silent, idle              1         0          0           0        stands  1       0
silent, written           1         grows      grows       last     stands  1       grows
noticed, written          0         -          -           -        -       0       grows
paused, idle              1         0          0           0        some    1       0
paused, written           1         0          grows       last     some    1       0
delayed, written          1         0          grows       last     some    1       0
leaf paused, written      1         0          0           0        some    1       0
promoted, written         0         -          -           -        -       0       grows
"""

# The superuser's figure of `lag` is the age of what is missing: a standby may say that its data
# are as old as the last commit it has, and never that they are younger than they are. What it
# cannot know are writes under way, and those behind a line that has gone silent, until half of
# wal_receiver_timeout and 10 seconds are over.
SEEN_ON_THE_STANDBY = """
situation                 up  silence  lag    backlog  paused
idle                      1   some     0      0        0
busy                      1   some     below  some     0
refused, idle             0   -        grows  0        0
refused, written          0   -        grows  0        0
silent, idle              1   grows    0      0        0
silent, written           1   grows    blind  0        0
noticed, written          0   -        grows  0        0
paused, idle              1   some     0      0        1
paused, written           1   some     grows  grows    1
delayed, written          1   some     grows  grows    0
leaf paused, written      1   some     0      0        0
promoted, written         -   -        -      -        -
"""

# The standby serves a standby of its own, the leaf, over a line that is always sound. That it
# follows somebody who is cut off himself, or paused, nobody tells it.
SEEN_ON_THE_LEAF = """
situation                 up  silence  lag    backlog  paused
idle                      1   some     0      0        0
busy                      1   some     below  some     0
refused, idle             1   some     0      0        0
refused, written          1   some     blind  0        0
silent, idle              1   some     0      0        0
silent, written           1   some     blind  0        0
noticed, written          1   some     blind  0        0
paused, idle              1   some     0      0        0
paused, written           1   some     0      0        0
delayed, written          1   some     0      0        0
leaf paused, written      1   some     grows  grows    1
promoted, written         1   some     0      0        0
"""

# What the standby tells as the leaf's sender is told by no other measure than a primary's.
CASCADE = {"busy": "busy", "leaf paused, written": "paused, written"}  # idle in all others


class Column(NamedTuple):
    """What a column of the tables stands for on a page, and how the superuser looks at it."""

    metric: str
    label: str | None = None
    """The label that has the standby's name."""
    truth: str | None = None
    """SQL for two numbers that never fall; the figure is the first less the second."""


_WRITTEN = """case when pg_is_in_recovery() then pg_last_wal_receive_lsn()
  else pg_current_wal_lsn() end - '0/0'"""

AS_A_SENDER = {
    "standbys": Column("pg_stat_replication_streaming_standbys"),
    "unflushed": Column(
        "pg_stat_replication_flush_lag_bytes",
        "application_name",
        f"select {_WRITTEN}, flush_lsn - '0/0' from pg_stat_replication",
    ),
    "unreplayed": Column(
        "pg_stat_replication_replay_lag_bytes",
        "application_name",
        f"select {_WRITTEN}, replay_lsn - '0/0' from pg_stat_replication",
    ),
    "seconds": Column(
        "pg_stat_replication_replay_lag_seconds",
        "application_name",
        f"select case when replay_lsn - '0/0' >= {_WRITTEN} then 0"
        " else extract(epoch from replay_lag) end, 0 from pg_stat_replication",
    ),
    "reply": Column(
        "pg_stat_replication_reply_timestamp_seconds",
        "application_name",
        "select extract(epoch from reply_time), 0 from pg_stat_replication",
    ),
    "active": Column("pg_replication_slots_active", "slot_name"),
    "retained": Column(
        "pg_replication_slots_retained_bytes",
        "slot_name",
        f"select {_WRITTEN}, restart_lsn - '0/0' from pg_replication_slots",
    ),
}
AS_A_RECEIVER = {
    "up": Column("pg_stat_wal_receiver_up"),
    "silence": Column(
        "pg_stat_wal_receiver_last_msg_receipt_age_seconds",
        truth="select extract(epoch from clock_timestamp()), extract(epoch from"
        " last_msg_receipt_time) from pg_stat_wal_receiver",
    ),
    "lag": Column("pg_replication_replay_lag_seconds"),
    "backlog": Column(
        "pg_replication_replay_backlog_bytes",
        truth="select pg_last_wal_receive_lsn() - '0/0', pg_last_wal_replay_lsn() - '0/0'",
    ),
    "paused": Column("pg_is_wal_replay_paused"),
}


class Age(NamedTuple):
    """How old a server's data are, in seconds since the epoch."""

    moment: float
    newest: float
    """When the last was written that the server has."""
    lacking: float
    """When the first was written that it has not, or `moment`."""

    @classmethod
    def of(cls, server: Server, source: Server) -> Self:
        """Compare what a server has with what its primary has."""
        ((last, newest),) = server.execute(
            "select max(n), extract(epoch from max(at)) from written"
        )
        ((moment, lacking),) = source.execute(
            "select extract(epoch from clock_timestamp()),"
            " extract(epoch from (select min(at) from written where n > %s))",
            [last],
        )
        return cls(float(moment), float(newest), float(moment if lacking is None else lacking))

    @staticmethod
    def look(lag: float | None, before: "Age", after: "Age") -> Look:
        """A lag that is at least the age of what was missing, at most that of what was there."""
        return Look(lag, max(0, before.moment - after.lacking), after.moment - before.newest)


@dataclass(frozen=True)
class Chain:
    """A primary, a standby of it behind a line, a leaf that follows the standby, an exporter."""

    primary: Server
    standby: Server
    leaf: Server
    line: Line
    exporter: Exporter

    @property
    def seats(self) -> Mapping[str, Server]:
        """All servers by the exporter's names for them."""
        return {"primary": self.primary, "standby": self.standby, "leaf": self.leaf}

    def write(self, rows: int = 1) -> None:
        """Commit on the primary."""
        self.primary.execute("insert into written select from generate_series(1, %s)", [rows])

    def arrive(self) -> None:
        """Return when all WAL is where it can come to, and everybody has said so."""
        for sender, receiver in ((self.primary, self.standby), (self.standby, self.leaf)):
            ((waits,),) = receiver.execute(
                "select pg_is_wal_replay_paused()"
                " or current_setting('recovery_min_apply_delay') <> '0'"
            )
            lsn = "flush_lsn" if waits else "replay_lsn"
            sender.wait_until(f"select {lsn} - '0/0' = {_WRITTEN} from pg_stat_replication", 60)

    def rest(self) -> None:
        """Commit, and return when the whole chain has replayed that."""
        self.write()
        self.arrive()

    def look(self, seat: str, columns: Mapping[str, Column]) -> dict[str, Look]:
        """What a server's page says in each column, between two looks of the superuser."""
        server = self.seats[seat]
        asked = {name: column.truth for name, column in columns.items() if column.truth}
        before = {name: _pair(server, sql) for name, sql in asked.items()}
        # After a promotion the chain begins with the promoted one.
        ((follows,),) = self.standby.execute("select pg_is_in_recovery()")
        source = self.primary if follows else self.standby
        was = Age.of(server, source)
        page = self.exporter.scrape(seat)
        now = Age.of(server, source)
        after = {name: _pair(server, sql) for name, sql in asked.items()}

        assert page.value("pg_up") == 1
        assert page.failed() == set()
        looks = {name: Look(_value(page, column, seat)) for name, column in columns.items()}
        for name in asked:
            looks[name] = Look.between(looks[name].value, before[name], after[name])
        if "lag" in looks:
            looks["lag"] = Age.look(looks["lag"].value, was, now)
        return looks


WRITTEN = "create table written (n bigserial, at timestamptz default clock_timestamp())"
"""Who commits says when."""

SHIPPED = concerning(catalogue.load(), "postgresql")

OF_STANDBYS = {m.name for query in SHIPPED if query.role == "standby" for m in query.metrics}
"""The names that only standbys serve."""

_FOLLOWER = {"primary": "standby", "standby": "leaf", "leaf": "none"}


def _pair(server: Server, query: str) -> tuple[float, float]:
    """Two numbers of the superuser's, or what no figure can fit where there are none."""
    rows = server.execute(query)
    if not rows or None in rows[0]:
        return math.nan, math.nan
    return float(rows[0][0]), float(rows[0][1])


def _value(page: Page, column: Column, seat: str) -> float | None:
    labels = {column.label: _FOLLOWER[seat]} if column.label else {}
    found = page.series(column.metric, **labels)
    assert len(found) <= 1, found
    return next(iter(found.values()), None)


def exporter_of(servers: Mapping[str, Server], directory: Path) -> Exporter:
    """An exporter whose targets are the servers by their names."""
    targets = {
        name: {
            "connection": {"host": "127.0.0.1", "port": server.port, **PGVIGIL.login},
            "disable": sorted({query.area for query in SHIPPED} - {"availability", "replication"}),
        }
        for name, server in servers.items()
    }
    path = directory / "pgvigil.yml"
    path.write_text(json.dumps({"targets": targets}))  # JSON is YAML
    return Exporter("--config", str(path))


@contextmanager
def chained(make_server: MakeServer, major: int, directory: Path) -> Iterator[Chain]:
    """A chain in which nobody writes WAL but the test."""
    # What reads may write, hint bits and all, stays away without checksums and after a VACUUM.
    options = ["--no-data-checksums"] if major >= 18 else []
    primary = make_server(
        major,
        initdb_options=options,
        autovacuum=False,
        checkpoint_timeout="1h",
        wal_retrieve_retry_interval="100ms",
    )
    primary.execute(WRITTEN)
    primary.execute("vacuum freeze")
    with Line("127.0.0.1", primary.port) as line:
        through = f"host=127.0.0.1 port={line.port} user=postgres application_name=standby"
        standby = primary.standby(slot="standby", settings={"primary_conninfo": through})
        leaf = standby.standby("leaf", slot="leaf")
        servers = {"primary": primary, "standby": standby, "leaf": leaf}
        # It notes running transactions in the WAL from time to time.
        ((background_writer,),) = primary.execute(
            "select pid from pg_stat_activity where backend_type = 'background writer'"
        )
        os.kill(background_writer, signal.SIGSTOP)
        try:
            with exporter_of(servers, directory) as exporter:
                yield Chain(primary, standby, leaf, line, exporter)
        finally:
            os.kill(background_writer, signal.SIGCONT)


@pytest.fixture(scope="module", params=[13, 18])
def chain(
    request: pytest.FixtureRequest,
    module_server: MakeServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Chain]:
    """A chain that tests share: they heal what they break."""
    with chained(module_server, request.param, tmp_path_factory.mktemp("chain")) as chain:
        yield chain


@contextmanager
def idle(chain: Chain) -> Iterator[None]:
    """Nobody has written for longer than anything else in this file takes."""
    chain.primary.wait_until("select max(at) < now() - interval '1.5 s' from written")
    yield


@contextmanager
def busy(chain: Chain) -> Iterator[None]:
    """Somebody commits all the time."""
    enough = threading.Event()

    def write() -> None:
        with psycopg.connect(chain.primary.conninfo(), autocommit=True) as connection:
            while not enough.wait(0.002):
                connection.execute("insert into written default values")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        enough.set()
        writer.join()


@contextmanager
def refused(chain: Chain) -> Iterator[None]:
    """The connection is reset, and none can be made."""
    chain.line.refuse()
    chain.line.cut()
    try:
        _wait_until_parted(chain)
        yield
    finally:
        chain.line.accept()


@contextmanager
def silent(chain: Chain) -> Iterator[None]:
    """Packets are lost, and neither side knows."""
    chain.line.freeze()
    try:
        yield
    finally:
        chain.line.thaw()


@contextmanager
def noticed(chain: Chain) -> Iterator[None]:
    """Packets have been lost for longer than both sides wait."""
    with silent(chain):
        chain.primary.set({"wal_sender_timeout": "200ms"})
        chain.standby.set({"wal_receiver_timeout": "200ms"})
        try:
            _wait_until_parted(chain)
            yield
        finally:
            chain.primary.set({"wal_sender_timeout": None})
            chain.standby.set({"wal_receiver_timeout": None})


@contextmanager
def paused(chain: Chain) -> Iterator[None]:
    """Somebody has paused the standby's replay."""
    with _paused(chain.standby):
        yield


@contextmanager
def leaf_paused(chain: Chain) -> Iterator[None]:
    """Somebody has paused the leaf's replay."""
    with _paused(chain.leaf):
        yield


@contextmanager
def _paused(server: Server) -> Iterator[None]:
    server.execute("select pg_wal_replay_pause()")
    try:
        if server.major >= 14:
            server.wait_until("select pg_get_wal_replay_pause_state() = 'paused'")
        yield
    finally:
        server.execute("select pg_wal_replay_resume()")


@contextmanager
def delayed(chain: Chain) -> Iterator[None]:
    """The standby is told to stay behind."""
    chain.standby.set({"recovery_min_apply_delay": "1h"})
    try:
        yield
    finally:
        chain.standby.set({"recovery_min_apply_delay": None})
        chain.standby.restart()  # who waits does not look at the setting on PostgreSQL 13


def _wait_until_parted(chain: Chain) -> None:
    chain.standby.wait_until("select count(*) = 0 from pg_stat_wal_receiver", timeout=60)
    chain.primary.wait_until(
        "select not active from pg_replication_slots where slot_name = 'standby'", timeout=60
    )


Make = Callable[[Chain], AbstractContextManager[None]]

SITUATIONS: Mapping[str, Make] = {
    "idle": idle,
    "busy": busy,
    "refused": refused,
    "silent": silent,
    "noticed": noticed,
    "paused": paused,
    "leaf paused": leaf_paused,
    "delayed": delayed,
}


def faults(chain: Chain, situation: str, *, arrives: bool) -> dict[str, str]:
    """The cells of a situation that are not what they should be, with what they are."""
    senders, receivers = cells_of(SEEN_ON_THE_PRIMARY), cells_of(SEEN_ON_THE_STANDBY)
    leaves = cells_of(SEEN_ON_THE_LEAF)
    nothing = dict.fromkeys([*AS_A_SENDER, *AS_A_RECEIVER], "-")
    expected = {
        "primary": {**nothing, **senders[situation]},
        "standby": {**senders[CASCADE.get(situation, "idle")], **receivers[situation]},
        "leaf": {**nothing, **leaves[situation], "standbys": "0"},
    }
    looks: list[dict[str, dict[str, Look]]] = []
    for rows in (100, 1000):  # more than what replay may still reach of the first
        if situation.endswith("written"):
            chain.write(rows)
            if arrives:
                chain.arrive()
        looks.append({seat: chain.look(seat, AS_A_SENDER | AS_A_RECEIVER) for seat in expected})
    first, then = looks
    return {
        f"{seat} {column}": f"is not {cell}: {first[seat][column]}, {then[seat][column]}"
        for seat, cells in expected.items()
        for column, cell in cells.items()
        if not fits(cell, first[seat][column], then[seat][column])
    }


@pytest.mark.parametrize(
    "situation", [row for row in cells_of(SEEN_ON_THE_STANDBY) if row != "promoted, written"]
)
def test_lag_is_told_as_it_is(chain: Chain, situation: str) -> None:
    make = SITUATIONS[situation.partition(",")[0]]
    chain.rest()
    with make(chain):
        assert faults(chain, situation, arrives=make in (paused, delayed, leaf_paused)) == {}


@pytest.mark.parametrize("major", [13, 18])
def test_a_promotion_leaves_nothing_of_the_standby_in_the_very_next_scrape(
    fresh_server: MakeServer, major: int, tmp_path: Path
) -> None:
    with chained(fresh_server, major, tmp_path) as chain:
        chain.rest()
        before = chain.exporter.scrape("standby")
        shown = OF_STANDBYS & before.names
        assert {"pg_replication_replay_lag_seconds", "pg_stat_wal_receiver_up"} <= shown
        assert before.value("pg_server_info", role="standby") == 1
        assert not before.series("pg_current_wal_lsn_bytes")

        chain.standby.promote()
        after = chain.exporter.scrape("standby")

        assert OF_STANDBYS & after.names == set()
        assert after.value("pg_server_info", role="primary") == 1
        assert not after.series("pg_server_info", role="standby")
        assert after.value("pg_current_wal_lsn_bytes") >= before.value(
            "pg_last_wal_replay_lsn_bytes"
        )
        assert not [
            series for series, value in after.samples.items() if "lag" in series[0] and value < 0
        ]
        chain.standby.execute("checkpoint")
        chain.primary.wait_until("select not active from pg_replication_slots", timeout=60)
        _wait_until_level(chain)
        assert faults(chain, "promoted, written", arrives=False) == {}


def _wait_until_level(chain: Chain) -> None:
    """Return when the leaf has followed the promoted standby to the end of its WAL."""
    chain.standby.wait_until(
        "select replay_lsn = pg_current_wal_lsn() from pg_stat_replication", timeout=60
    )


@pytest.mark.parametrize("chain", [18], indirect=True)
def test_a_silence_of_ten_seconds_over_half_the_timeout_is_lag(chain: Chain) -> None:
    def look() -> tuple[float, float, float]:
        page = chain.exporter.scrape("standby")
        names = ("up", "silence", "lag")
        up, silence, lag = (page.value(AS_A_RECEIVER[name].metric) for name in names)
        return up, silence, lag

    chain.rest()
    # What neither a timeout nor the sender ends: a receiver that stands still.
    ((receiver,),) = chain.standby.execute("select pid from pg_stat_wal_receiver")
    os.kill(receiver, signal.SIGSTOP)
    try:
        chain.standby.set({"wal_receiver_timeout": "2s"})
        seen = [look()]
        while seen[-1][1] <= 11.5:
            assert len(seen) < 600
            time.sleep(0.1)
            seen.append(look())
    finally:
        chain.standby.set({"wal_receiver_timeout": None})
        os.kill(receiver, signal.SIGCONT)

    assert {up for up, _, _ in seen} == {1}
    assert [(s, lag) for _, s, lag in seen if lag != (0 if s <= 11 else s)] == []
    assert seen[0][2] == 0 < seen[-1][2]


@pytest.mark.parametrize("major", [13, 18])
def test_a_standby_that_only_reads_the_archive_is_as_old_as_its_last_commit(
    fresh_server: MakeServer, major: int, tmp_path: Path
) -> None:
    primary = fresh_server(
        major, autovacuum=False, archive_mode=True, wal_retrieve_retry_interval="100ms"
    )
    primary.execute(WRITTEN)
    standby = primary.standby()
    archive = primary.directory / "archive"
    archive.mkdir()
    archive.chmod(0o777)
    primary.set({"archive_command": f"cp %p {archive}/%f"})
    standby.set({"primary_conninfo": "", "restore_command": f"cp {archive}/%f %p"})
    standby.restart()

    def write() -> None:
        primary.execute("insert into written default values")

    def ship() -> None:
        ((n,),) = primary.execute("select max(n) from written")
        primary.execute("select pg_switch_wal()")
        standby.wait_until(f"select max(n) = {n} from written", timeout=60)

    def look() -> Look:
        was = Age.of(standby, primary)
        lag = exporter.scrape("standby").value("pg_replication_replay_lag_seconds")
        now = Age.of(standby, primary)
        return Age.look(lag, was, now)

    with exporter_of({"primary": primary, "standby": standby}, tmp_path) as exporter:
        write()
        ship()
        # Nothing is missing, but nobody tells it so.
        assert fits("grows", look(), look())
        write()
        time.sleep(0.5)
        late = look()
        assert late.true
        assert late.low >= 0.5
        ship()
        assert look().true

        page = exporter.scrape("standby")
        assert page.value("pg_stat_wal_receiver_up") == 0
        assert set(page.series("pg_stat_wal_receiver_status").values()) == {0}
        for column in ("silence", "backlog"):
            assert not page.series(AS_A_RECEIVER[column].metric)
        assert not page.series("pg_last_wal_receive_lsn_bytes")
        assert page.value("pg_last_wal_replay_lsn_bytes") == pytest.approx(
            float(standby.execute("select pg_last_wal_replay_lsn() - '0/0'")[0][0]), abs=0
        )
        page = exporter.scrape("primary")
        assert page.value("pg_stat_replication_streaming_standbys") == 0
        assert not page.series("pg_stat_replication_replay_lag_bytes")
