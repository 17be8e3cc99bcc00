"""Holds the figures of the machine against what this machine's kernel says itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from pgvigil import grants
from pgvigil.catalogue import load

from lab.catalogue import Row, asking, refusal_of, rows_of
from lab.cluster import BARE, PGVIGIL, Cluster
from lab.postgres import MAJORS, Server

QUERIES = [query for query in load() if query.area == "host"]
SOME = [13, 18]


@contextmanager
def granted(server: Server) -> Iterator[None]:
    server.execute(grants.script("pgvigil", ["host"], create=False))
    try:
        yield
    finally:
        server.execute("drop schema pgvigil cascade")


@contextmanager
def files(server: Server, **contents: str) -> Iterator[None]:
    """A machine with these files and no others; __ stands for a dot, ___ for a slash."""
    server.execute("create schema pgvigil; grant usage on schema pgvigil to public")
    server.execute("create table pgvigil.file (name text, content text)")
    for name, content in contents.items():
        server.execute(
            "insert into pgvigil.file values (%s, %s)",
            [name.replace("___", "/").replace("__", "."), content],
        )
    server.execute(
        "create function pgvigil.host_file(name text) returns text language sql stable"
        " security definer as 'select f.content from pgvigil.file as f where f.name = $1'"
    )
    try:
        yield
    finally:
        server.execute("drop schema pgvigil cascade")


def row_of(server: Server, query: str) -> Row:
    (row,) = rows_of(server, query)
    return row


def meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(words.split()[0]) for name, words in (line.split(":") for line in lines)}


def jiffies() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]


@pytest.mark.parametrize("major", MAJORS)
def test_memory_and_processors_are_what_the_kernel_says(server: Server) -> None:
    with granted(server):
        before, memory, after = jiffies(), row_of(server, "host.memory"), jiffies()
        truth = meminfo()
        assert memory["total"] == truth["MemTotal"] * 1024
        assert memory["swap_total"] == truth["SwapTotal"] * 1024
        assert memory["commit_limit"] == truth["CommitLimit"] * 1024
        assert memory["huge_total"] == truth["HugePages_Total"] * truth["Hugepagesize"] * 1024
        assert 0 < float(str(memory["available"])) <= truth["MemTotal"] * 1024
        assert None not in memory.values()

        before = jiffies()
        cpu = {r["mode"]: r["spent"] for r in rows_of(server, "host.cpu")}
        after = jiffies()
        modes = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
        assert tuple(cpu) == modes
        for mode, low, high in zip(modes, before, after, strict=True):
            # iowait may go back a little; the kernel says so itself.
            assert low / 100 - 1 <= float(str(cpu[mode])) <= high / 100 + 1, mode

        load = row_of(server, "host.load")
        online = os.sysconf("SC_NPROCESSORS_ONLN")
        assert load["cpus"] == online
        (boot,) = [
            line.split()[1]
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        ]
        assert load["boot"] == float(boot)


@pytest.mark.parametrize("major", SOME)
def test_disks_and_networks_are_those_of_the_kernel(server: Server) -> None:
    with granted(server):
        devices = {r["device"] for r in rows_of(server, "host.disks")}
        known = {line.split()[2] for line in Path("/proc/diskstats").read_text().splitlines()}
        assert devices <= known

        lines = Path("/proc/net/dev").read_text().splitlines()[2:]
        before = {name.strip(): words.split() for name, words in (n.rsplit(":", 1) for n in lines)}
        told = {r["device"]: r for r in rows_of(server, "host.network")}
        assert set(told) == set(before) - {"lo"}
        for name, row in told.items():
            assert float(str(row["receive_bytes"])) >= float(before[str(name)][0])
            assert float(str(row["transmit_bytes"])) >= float(before[str(name)][8])


@pytest.mark.parametrize("major", SOME)
def test_files_of_the_kernel_are_read_number_by_number(server: Server) -> None:
    with files(
        server,
        loadavg="0.52 1.58 12.59 3/1234 56789\n",
        stat="cpu  100 200 300 400 500 600 700 800 900 1000\n"
        "cpu0 50 100 150 200 250 300 350 400 450 500\ncpu17 1 1 1 1 1 1 1 1 1 1\n"
        "intr 1 2 3\nbtime 1700000000\nprocesses 7\nprocs_running 5\nprocs_blocked 6\n",
        vmstat="nr_free_pages 1\npswpin 11\npswpout 12\npgfault 99\npgmajfault 13\noom_kill 14\n",
        pressure___cpu="some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n",
        pressure___io="some avg10=0.10 avg60=0.00 avg300=0.00 total=2\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=3000000\n",
        diskstats="   7       0 loop0 1 0 1 1 1 0 1 1 1 1 1\n"
        " 259       0 nvme0n1 10 1 20 3000 40 2 50 6000 7 8000 9000 0 0 0 0 11 12\n"
        " 259       1 nvme0n1p1 10 1 20 3000 40 2 50 6000 7 8000 9000\n"
        "   8       0 sda 0 0 0 0 0 0 0 0 0 0 0\n"
        "   8      16 sdb 1 0 2 3 0 0 0 0 0 4 5\n"
        " 253       0 dm-0 1 0 2 3 0 0 0 0 0 4 5\n",
        net___dev="Inter-|   Receive\n face |bytes packets\n"
        "    lo: 1 2 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n"
        "  eth0:1001    2    3    4    5     6          7         8 2001    10   11   12 0 0 0 0\n"
        "eth0:1: 5 2 0 0 0 0 0 0 6 2 0 0 0 0 0 0\n",
        memory__max="1073741824\n",
        memory__current="536870912\n",
        memory__events="low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n",
        cpu__max="150000 100000\n",
        cpu__stat="usage_usec 1\nnr_periods 9\nnr_throttled 8\nthrottled_usec 2500000\n",
    ):
        assert row_of(server, "host.load") == {
            "load1": 0.52,
            "load5": 1.58,
            "load15": 12.59,
            "cpus": 2,
            "running": 5,
            "blocked": 6,
            "boot": 1700000000,
        }
        cpu = {r["mode"]: r["spent"] for r in rows_of(server, "host.cpu")}
        modes = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
        assert cpu == dict(zip(modes, range(1, 9), strict=True))
        assert row_of(server, "host.paging") == {
            "oom_kills": 14,
            "major_faults": 13,
            "swapped_in": 11,
            "swapped_out": 12,
        }
        assert {
            (r["resource"], r["stalled"]): r["spent"] for r in rows_of(server, "host.pressure")
        } == {("cpu", "some"): 1.5, ("io", "some"): 0.000002, ("io", "full"): 3}
        disks = {r.pop("device"): r for r in rows_of(server, "host.disks")}
        assert set(disks) == {"nvme0n1", "sdb", "dm-0"}
        assert disks["nvme0n1"] == {
            "reads": 10,
            "read_bytes": 20 * 512,
            "read_time": 3,
            "writes": 40,
            "write_bytes": 50 * 512,
            "write_time": 6,
            "in_flight": 7,
            "busy": 8,
        }
        networks = {r.pop("device"): r for r in rows_of(server, "host.network")}
        assert set(networks) == {"eth0", "eth0:1"}
        assert networks["eth0"] == {
            "receive_bytes": 1001,
            "receive_errors": 3,
            "receive_drops": 4,
            "transmit_bytes": 2001,
            "transmit_errors": 11,
            "transmit_drops": 12,
        }
        assert row_of(server, "host.cgroup") == {
            "memory_max": 1073741824,
            "memory_current": 536870912,
            "oom_kills": 4,
            "cpu_max": 1.5,
            "throttled": 8,
            "throttled_time": 2.5,
        }


@pytest.mark.parametrize("major", SOME)
def test_control_groups_without_a_limit_or_of_version_1_are_understood(server: Server) -> None:
    with files(server, memory__max="max\n", cpu__max="max 100000\n"):
        row = row_of(server, "host.cgroup")
        assert (row["memory_max"], row["cpu_max"]) == (None, None)
    with files(
        server,
        memory__limit_in_bytes="9223372036854771712\n",
        memory__usage_in_bytes="4096\n",
        cpu__cfs_quota_us="-1\n",
        cpu__cfs_period_us="100000\n",
        cpu__stat="nr_periods 0\nnr_throttled 3\nthrottled_time 1500000000\n",
    ):
        row = row_of(server, "host.cgroup")
        assert (row["memory_max"], row["memory_current"], row["cpu_max"]) == (None, 4096, None)
        assert (row["throttled"], row["throttled_time"]) == (3, 1.5)
    with files(
        server,
        memory__limit_in_bytes="2147483648\n",
        cpu__cfs_quota_us="50000\n",
        cpu__cfs_period_us="100000\n",
    ):
        row = row_of(server, "host.cgroup")
        assert (row["memory_max"], row["cpu_max"]) == (2147483648, 0.5)


@pytest.mark.parametrize("major", SOME)
@pytest.mark.parametrize("content", [None, "", "nonsense\n", "cpu  x\n\n: : :\n0 0 0"])
def test_a_machine_without_these_files_gives_no_figures_and_no_error(
    server: Server, content: str | None
) -> None:
    names = ["loadavg", "stat", "meminfo", "vmstat", "diskstats", "pressure___cpu", "net___dev"]
    names += ["memory__max", "memory__limit_in_bytes", "cpu__max", "cpu__cfs_quota_us", "cpu__stat"]
    with (
        files(server, **({} if content is None else dict.fromkeys(names, content))),
        asking(server) as asker,
    ):
        outcomes = asker.ask([query.name for query in QUERIES])
    for name, outcome in outcomes.items():
        assert outcome.failure is None, name
        assert {v for row in outcome.rows for v in row.values()} <= {None}, name


@pytest.mark.parametrize("major", MAJORS)
def test_the_function_reads_no_other_file_and_raises_nothing(cluster: Cluster) -> None:
    server = cluster.primary
    with granted(server):
        begin = server.log_position()
        ours = server.conninfo(**PGVIGIL.login)
        with psycopg.connect(ours, autocommit=True) as connection:

            def read(name: str | None) -> object:
                row = connection.execute("select pgvigil.host_file(%s)", [name]).fetchone()
                assert row
                return row[0]

            assert read("meminfo")
            for name in ("/etc/passwd", "../etc/passwd", "PG_VERSION", "self/environ", "", None):
                assert read(name) is None
            # A file that cannot be read is as good as none.
            groups = ("memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_quota_us")
            for name in groups:
                read(name)
        assert refusal_of(server, "host.load", role=BARE)
        assert server.errors_in_log(begin) == []

        (lsn,) = server.execute("select pg_current_wal_lsn()")[0]
        cluster.standby.wait_until(f"select pg_last_wal_replay_lsn() >= '{lsn}'")
        assert row_of(cluster.standby, "host.load")["cpus"] == row_of(server, "host.load")["cpus"]


@pytest.mark.parametrize("major", SOME)
def test_a_file_the_kernel_refuses_to_read_is_as_good_as_none(server: Server) -> None:
    script = grants.script("pgvigil", ["host"], create=False)
    # /proc/self/mem opens and fails to read at 0, as pressure does on some kernels.
    server.execute(script.replace("/proc/self/net/dev", "/proc/self/mem"))
    try:
        begin = server.log_position()
        assert rows_of(server, "host.network") == []
        assert server.errors_in_log(begin) == []
        with pytest.raises(psycopg.Error):
            server.execute("select pg_read_file('/proc/self/mem', 0, 1000, true)")
    finally:
        server.execute("drop schema pgvigil cascade")


def test_all_of_it_runs_only_where_it_is_asked_for() -> None:
    assert QUERIES
    assert all(query.opt_in and query.priority == 7 for query in QUERIES)
