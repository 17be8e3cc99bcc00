"""The soak finds what is planted in its samples, and nothing in a clean course."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from bench.soak import PASSWORD, prepare
from bench.soaking import curves
from bench.soaking.clients import Clients
from bench.soaking.course import Course, Fault, Sample, Scrape, Sessions, judge
from bench.soaking.faults import Faults, LineFaults, ServerFaults
from bench.soaking.watch import Log, Witness
from lab.line import Line
from lab.postgres import Server

END = 300


def clean() -> Course:
    """Five minutes without a fault of the exporter's; things break from 30 s to 220 s."""
    course = Course(dead=frozenset({"hole"}), exit_code=0)
    for second in range(END):
        course.samples.append(
            Sample(
                at=float(second),
                sessions={"primary": Sessions(2, 0, 0.1), "hole": Sessions(0, 0, 0.0)},
                descriptors=20 + second % 3,
                threads=4,
                resident=60_000_000 + second * 1000,
                processor=second / 10,
                log={"info": 3, "warning": second // 10},
            )
        )
        course.scrapes.append(Scrape(float(second), "primary", 0.01, 3, 200, up=True))
        course.scrapes.append(Scrape(float(second), "hole", 2.5, 3, 200, up=False))
        course.scrapes.append(Scrape(float(second), "", 0.01, 3, 200, up=None))
    course.faults += [Fault("pause", "primary", 30, 37), Fault("cut", "line", 200, 220)]
    return course


def samples(course: Course, change: Callable[[Sample], Sample], since: int = 0) -> None:
    course.samples[:] = [change(s) if s.at >= since else s for s in course.samples]


def broken(course: Course) -> list[str]:
    return [finding.rule for finding in judge(course) if not finding.kept]


def sessions(total: int, in_transaction: int = 0, longest: float = 0.0) -> dict[str, Sessions]:
    return {"primary": Sessions(total, in_transaction, longest), "hole": Sessions(0, 0, 0.0)}


def test_a_clean_course_breaks_no_rule() -> None:
    assert broken(clean()) == []


def test_one_connection_too_many_at_one_moment_is_found() -> None:
    course = clean()
    course.samples[100] = replace(course.samples[100], sessions=sessions(4))
    assert broken(course) == ["never more than 3 connections to a target"]


def test_servers_that_nobody_could_ask_at_the_end_prove_nothing() -> None:
    course = clean()
    samples(course, lambda sample: replace(sample, sessions={}), since=200)
    assert broken(course) == ["and not after the faults"]


def test_a_session_idle_in_a_transaction_is_found() -> None:
    course = clean()
    course.samples[100] = replace(course.samples[100], sessions=sessions(2, in_transaction=1))
    assert broken(course) == ["no session idle in a transaction"]


@pytest.mark.parametrize(("second", "found"), [(100, True), (35, False), (39, False), (42, True)])
def test_a_statement_that_runs_on_is_found_unless_its_server_slept(
    second: int, found: bool
) -> None:
    course = clean()
    course.samples[second] = replace(course.samples[second], sessions=sessions(2, longest=9))
    assert bool(broken(course)) == found


def test_descriptors_that_stay_behind_are_found() -> None:
    course = clean()
    samples(course, lambda sample: replace(sample, descriptors=sample.descriptors + 6), since=150)
    assert broken(course) == ["descriptors are back to what they were, 5 more at most"]


def test_descriptors_that_come_and_go_are_no_leak() -> None:
    course = clean()
    for second in range(60, 200):
        course.samples[second] = replace(course.samples[second], descriptors=300)
    assert broken(course) == []


def test_threads_that_stay_behind_are_found() -> None:
    course = clean()
    samples(course, lambda sample: replace(sample, threads=11), since=150)
    assert broken(course) == ["threads are back to what they were, 6 more at most"]


@pytest.mark.parametrize(("bytes_a_second", "found"), [(10_000, False), (80_000, True)])
def test_memory_that_grows_and_grows_is_found(bytes_a_second: int, found: bool) -> None:
    course = clean()
    samples(
        course,
        lambda sample: replace(sample, resident=60_000_000 + int(sample.at) * bytes_a_second),
    )
    assert bool(broken(course)) == found


@pytest.mark.parametrize("level", ["error", "critical", "trace", "unreadable"])
def test_an_error_in_its_log_is_found(level: str) -> None:
    course = clean()
    samples(course, lambda sample: replace(sample, log={"info": 3, level: 1}), since=END - 1)
    assert broken(course) == ["no error of its own in its log"]


@pytest.mark.parametrize(
    "scrape",
    [
        Scrape(100, "primary", 0.1, 3, 500, up=None),
        Scrape(100, "primary", 0.1, 3, 0, up=None, reason="ConnectionResetError"),
        Scrape(100, "primary", 3.1, 3, 200, up=True),
    ],
    ids=["500", "no answer", "late"],
)
def test_one_bad_answer_among_hundreds_is_found(scrape: Scrape) -> None:
    course = clean()
    course.scrapes[100] = scrape
    assert broken(course) == ["each scrape is answered with 200 before its timeout"]


def test_a_soak_without_scrapes_proves_nothing() -> None:
    course = clean()
    course.scrapes.clear()
    assert len(broken(course)) == 2


@pytest.mark.parametrize(
    ("scrape", "found"),
    [
        (Scrape(250, "primary", 0.1, 3, 200, up=False), True),
        (Scrape(230, "primary", 0.1, 3, 200, up=False), False),
        (Scrape(100, "hole", 0.1, 3, 200, up=True), True),
    ],
    ids=["down after the faults", "down while it recovers", "a dead one up"],
)
def test_a_wrong_pg_up_is_found(scrape: Scrape, found: bool) -> None:
    course = clean()
    course.scrapes.append(scrape)
    assert bool(broken(course)) == found


def test_a_refused_drop_and_a_bad_end_are_found() -> None:
    course = clean()
    course.refused_drops.append("database is being accessed by other users")
    course.exit_code = -9
    assert len(broken(course)) == 2


def test_the_log_is_counted_once_and_by_level(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"level": "info"}\n{"level": "error", "event": "x"}\nTraceback (most re')
    log = Log(path)
    assert log.counts() == {"info": 1, "error": 1}
    with path.open("a") as file:
        file.write('cent call last):\nsomething\n{"level": "info"}\n')
    assert log.counts() == {"info": 2, "error": 1, "trace": 1, "unreadable": 1}
    assert len(log.bad) == 3


def test_the_picture_is_as_wide_as_a_screen(tmp_path: Path) -> None:
    path = tmp_path / "soak.png"
    curves.draw(clean(), "a soak", path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1440


def test_a_client_whose_exporter_is_gone_books_no_answer() -> None:
    found: list[Scrape] = []
    clients = Clients(1, lambda: 0.0, found)  # nobody listens on port 1
    clients.polite(["primary"], every=0.01, timeout=3)
    end = time.monotonic() + 30
    while not found and time.monotonic() < end:
        time.sleep(0.01)
    clients.stop()
    assert found[0].status == 0
    assert found[0].reason == "ConnectionRefusedError"


@pytest.fixture(scope="module")
def watched() -> Iterator[Server]:
    """A server as the soak prepares it, with room for few."""
    with Server(18, settings={"max_connections": 15}) as server:
        prepare(server, ["watch"])
        yield server


@pytest.mark.parametrize("kind", list(ServerFaults.on_primary(ServerFaults.__new__(ServerFaults))))
def test_each_fault_of_a_server_is_mended(kind: str, watched: Server) -> None:
    course = Course(frozenset())
    with ServerFaults(watched, ["watch"], random.Random(1), course).on_primary()[kind]():
        pass
    way = watched.conninfo(user="watch", password=PASSWORD)
    with psycopg.connect(way) as one, psycopg.connect(way):
        look = "select rolconnlimit from pg_roles where rolname = 'watch'"
        assert one.execute(look).fetchone() == (5,)
        assert one.execute("select count(*) from public.orders").fetchone() == (0,)
        assert one.execute("select count(*) from pg_extension").fetchone() == (2,)
        databases = one.execute("select datname from pg_database where datname ~ 'soak'")
        assert databases.fetchall() == []
    assert course.refused_drops == []


def test_a_session_in_the_way_of_a_drop_is_booked(watched: Server) -> None:
    course = Course(frozenset())
    faults = ServerFaults(watched, ["watch"], random.Random(1), course)
    with contextlib.ExitStack() as stack:
        with faults.tables():
            [(name,)] = watched.execute("select datname from pg_database where datname ~ 'soak'")
            way = watched.conninfo(user="watch", password=PASSWORD, dbname=name)
            stack.enter_context(contextlib.closing(psycopg.connect(way)))
        assert len(course.refused_drops) == 1
    assert watched.execute("select from pg_database where datname ~ 'soak'") == []


def test_a_fault_that_cannot_be_done_is_booked_and_the_server_mended(watched: Server) -> None:
    course = Course(frozenset())
    own = ServerFaults(watched, ["watch"], random.Random(1), course)
    watched.stop()
    faults = Faults(course, time.monotonic, random.Random(1), pause=0.01)
    faults.add("server", {"reset": own.reset})
    faults.mend(own.mend)
    faults.start(0, time.monotonic() + 30)
    end = time.monotonic() + 30
    while not (course.faults and course.faults[0].problem) and time.monotonic() < end:
        time.sleep(0.01)
    faults.stop()
    assert course.faults[0].problem
    assert watched.running


@pytest.mark.parametrize("kind", list(LineFaults.all(LineFaults.__new__(LineFaults))))
def test_each_fault_of_a_line_is_mended(kind: str, watched: Server) -> None:
    with Line("127.0.0.1", watched.port) as line:
        with LineFaults(line, random.Random(1)).all()[kind]():
            pass
        with psycopg.connect(watched.conninfo(port=line.port)) as connection:
            assert connection.execute("select 1").fetchone() == (1,)


def test_the_witness_counts_sessions_and_those_idle_in_a_transaction(watched: Server) -> None:
    witness = Witness(watched, {"watch": "target", "crowd": "other"})
    way = watched.conninfo(user="watch", password=PASSWORD)
    try:
        with psycopg.connect(way) as idle, psycopg.connect(way, autocommit=True) as other:
            idle.execute("select 1")
            other.execute("select 1")
            end = time.monotonic() + 30
            seen: dict[str, Sessions] = {}
            while seen.get("target", Sessions(0, 0, 0))[:2] != (2, 1) and time.monotonic() < end:
                time.sleep(0.05)
                seen = witness.seen()
        assert seen["target"][:2] == (2, 1)
        assert seen["other"] == Sessions(0, 0, 0.0)
    finally:
        witness.stop()
