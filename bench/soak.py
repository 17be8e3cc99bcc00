"""Lets the exporter run under load while everything around it breaks, and looks for leaks."""

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from bench.report import Table, machine
from bench.soaking import curves
from bench.soaking.clients import Clients
from bench.soaking.course import Course, Finding, judge
from bench.soaking.faults import Faults, LineFaults, ServerFaults
from bench.soaking.watch import DATABASE, Log, Witness, look
from lab.binaries import UnavailableError
from lab.exporter import Exporter
from lab.line import Line
from lab.postgres import Server
from lab.silent_port import silent_port

_RESULTS = Path(__file__).parent / "results"
_FIRST_QUIET, _LAST_QUIET = 30.0, 60.0
"""Seconds before the first fault and after the last one."""
_SHORTEST = 120.0
PASSWORD = "soak"


class _Stage:
    """The servers, the ways to them, and which target goes which way by which role."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.primary = Server(18, settings={"max_connections": 40, "wal_level": "logical"})
        stack.callback(self.primary.destroy)
        self.primary.start()  # else the standby would ask for initdb's max_connections
        self.standby = self.primary.standby(slot="standby")
        self.old = stack.enter_context(Server(13, settings={"max_connections": 40}))
        self.line = stack.enter_context(Line("127.0.0.1", self.primary.port))
        hole = stack.enter_context(silent_port())
        self.ways: Mapping[str, tuple[Server | None, int]] = {
            "primary": (self.primary, self.primary.port),
            "standby": (self.standby, self.standby.port),
            "old": (self.old, self.old.port),
            "line": (self.primary, self.line.port),
            "hole": (None, hole),
        }
        for server in (self.primary, self.old):
            prepare(server, [f"watch_{name}" for name in self.ways])

    def roles(self, server: Server) -> dict[str, str]:
        """The targets on a server by the role they use: the standby has the primary's roles."""
        return {f"watch_{name}": name for name, (on, _) in self.ways.items() if on is server}

    def configuration(self) -> str:
        """What the exporter is told."""
        targets = {
            name: {"dsn": f"postgresql://watch_{name}:{PASSWORD}@127.0.0.1:{port}/postgres"}
            for name, (_, port) in self.ways.items()
        }
        return yaml.safe_dump({"targets": targets})


def prepare(server: Server, roles: Iterable[str]) -> None:
    """Make what the faults need and the roles that the exporter uses."""
    server.execute(f"create database {DATABASE}")
    server.execute("create table public.orders (id int)")
    server.execute("grant select on public.orders to public")
    server.execute("create extension if not exists pg_stat_statements")
    server.execute(f"create role crowd login password '{PASSWORD}'")
    for role in roles:
        server.execute(
            f"create role {role} login password '{PASSWORD}' connection limit 5 in role pg_monitor"
        )


def main() -> int:
    """Soak; 1 when a rule was broken."""
    told = _parser().parse_args()
    print(f"seed {told.seed}, {told.seconds:g} s", flush=True)
    course = Course(dead=frozenset({"hole"}))
    begun = time.monotonic()
    bad: list[str] = []
    try:
        errors = _soak(course, told.seconds, random.Random(told.seed), bad)
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    findings = judge(course)
    _RESULTS.mkdir(parents=True, exist_ok=True)
    picture, record = _RESULTS / "soak.png", _RESULTS / "soak.json"
    broken = sum(not finding.kept for finding in findings)
    title = f"pgvigil soaked for {course.samples[-1].at:.0f} s, seed {told.seed}: "
    title += f"{len(course.faults)} faults, {len(course.scrapes):,} scrapes, "
    title += f"{broken} rules broken" if broken else "every rule kept"
    curves.draw(course, title, picture)
    record.write_text(_record(course, findings, told.seed, bad, errors))
    print(f"\n{_text(course, findings, errors)}\n")
    for line in bad[:10]:
        print(line, file=sys.stderr)
    print(f"{title}; {time.monotonic() - begun:.0f} s\n{picture}\n{record}")
    return 1 if broken else 0


def _soak(
    course: Course, seconds: float, chance: random.Random, bad: list[str]
) -> Mapping[str, int]:
    """Fill the course, and count what the servers say of the exporter's statements."""
    with contextlib.ExitStack() as stack:
        stage = _Stage(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "pgvigil.yml"
        path.write_text(stage.configuration())
        for server in (stage.primary, stage.old):
            stack.enter_context(_load(server))
        exporter = stack.enter_context(Exporter(f"--config={path}"))
        zero = time.monotonic()

        def clock() -> float:
            return time.monotonic() - zero

        # Its standard output is its log.
        log = Log(Path(f"/proc/{exporter.process.pid}/fd/1").resolve())
        servers = {"primary": stage.primary, "standby": stage.standby, "old": stage.old}
        roles = {name: stage.roles(server) for name, server in servers.items()}
        witnesses = {name: Witness(server, roles[name]) for name, server in servers.items()}
        clients = _clients(exporter.port, list(stage.ways), clock, course, chance)
        breakers = _breakers(stage, course, clock, chance)
        for breaker in breakers:
            breaker.start(_FIRST_QUIET, seconds - _LAST_QUIET)
        try:
            while (moment := clock()) < seconds:
                course.samples.append(look(exporter.process.pid, clock, witnesses, log))
                if len(course.samples) % 60 == 0:
                    _progress(course)
                time.sleep(max(0.0, 1 - (clock() - moment)))
        finally:
            for breaker in breakers:
                breaker.stop()
            clients.stop()
            for witness in witnesses.values():
                witness.stop()
            bad += log.bad
            course.exit_code = exporter.stop()
        return _complaints(servers.values())


def _clients(
    port: int,
    targets: Sequence[str],
    clock: Callable[[], float],
    course: Course,
    chance: random.Random,
) -> Clients:
    clients = Clients(port, clock, course.scrapes)
    clients.polite(targets, every=5, timeout=4)
    clients.polite(["primary"], every=1, timeout=3)
    clients.polite(["line"], every=1, timeout=3)
    clients.polite(["standby", "old"], every=3, timeout=3)
    clients.polite(["hole", ""], every=4, timeout=2)
    clients.hang_up(targets, random.Random(chance.random()))
    clients.half_close(targets, random.Random(chance.random()))
    clients.read_slowly(targets, random.Random(chance.random()))
    return clients


def _breakers(
    stage: _Stage, course: Course, clock: Callable[[], float], chance: random.Random
) -> list[Faults]:
    """One for the servers and one for the line, so that both may be broken at once."""
    on_servers = Faults(course, clock, random.Random(chance.random()), pause=6)
    for name, server in (("primary", stage.primary), ("old", stage.old)):
        own = ServerFaults(server, list(stage.roles(server)), chance, course)
        on_servers.add(name, own.on_primary())
        on_servers.mend(own.mend)
    own = ServerFaults(stage.standby, list(stage.roles(stage.standby)), chance, course)
    on_servers.add("standby", own.on_standby())
    on_servers.mend(own.mend)
    on_line = Faults(course, clock, random.Random(chance.random()), pause=10)
    on_line.add("line", LineFaults(stage.line, random.Random(chance.random())).all())
    return [on_servers, on_line]


@contextlib.contextmanager
def _load(server: Server) -> Iterator[None]:
    """Keep the server busy, again when it was away."""
    command = [sys.executable, "-m", "bench.load", f"--dsn={server.conninfo()}", "--rate=50"]
    root = Path(__file__).resolve().parents[1]  # where -m finds the bench
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(1):
            # What it says when the server goes away is no news here.
            with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None and not stop.wait(0.5):
                    pass
                process.terminate()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _complaints(servers: Iterable[Server]) -> Mapping[str, int]:
    """The errors in the servers' logs that came of the exporter's statements, and how often."""
    found = Counter[str]()
    for server in servers:
        for line in server.errors_in_log():
            if re.search(r"\] watch_\w+@\S+ pgvigil ", line):
                _, _, words = line.partition("  ")
                found[re.sub(r'"[^"]*"|\d+', "...", words)] += 1
    return dict(found.most_common())


def _progress(course: Course) -> None:
    last = course.samples[-1]
    recent = [scrape for scrape in course.scrapes if scrape.at > last.at - 60]
    sessions = ", ".join(f"{name} {s.total}" for name, s in sorted(last.sessions.items()))
    print(
        f"{last.at:5.0f} s  {len(course.faults)} faults, {len(recent)} scrapes in a minute, "
        f"{sum(scrape.status != 200 for scrape in recent)} failed; sessions {sessions}; "
        f"{last.descriptors} descriptors, {last.threads} threads, {last.resident / 1e6:.1f} MB",
        flush=True,
    )


def _text(course: Course, findings: Sequence[Finding], errors: Mapping[str, int]) -> str:
    rules = Table("rules", ("rule", "seen", "verdict"))
    rules.rows += [(f.rule, f.seen, "kept" if f.kept else "BROKEN") for f in findings]
    kinds = Counter((fault.where, fault.kind) for fault in course.faults)
    odd = Counter((fault.where, fault.kind) for fault in course.faults if fault.problem)
    faults = Table("faults", ("where", "what", "times", "not as meant"))
    faults.rows += [(*key, count, odd[key]) for key, count in sorted(kinds.items())]
    tables = [faults, rules]
    if errors:
        server = Table("the exporter in the servers' logs", ("said", "times"))
        server.rows += errors.items()
        tables.insert(1, server)
    return "\n\n".join(table.text() for table in tables)


def _record(
    course: Course,
    findings: Sequence[Finding],
    seed: int,
    bad: Sequence[str],
    errors: Mapping[str, int],
) -> str:
    content = {
        "measurement": "soak",
        "machine": machine(),
        "seed": seed,
        "findings": [finding._asdict() for finding in findings],
        "faults": [asdict(fault) for fault in course.faults],
        "log": list(bad),
        "server_log": dict(errors),
        "refused_drops": course.refused_drops,
        "samples": [asdict(sample) for sample in course.samples],
        "scrapes": [scrape._asdict() for scrape in course.scrapes],
    }
    return json.dumps(content) + "\n"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smh]?)", text)
    seconds = int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0
    if seconds < _SHORTEST:
        raise argparse.ArgumentTypeError(f"say at least {_SHORTEST:g}s, as 150s, 10m or 1h")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument(
        "--for", type=_seconds, default=600.0, metavar="TIME", dest="seconds", help="10m by default"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    return parser


if __name__ == "__main__":
    sys.exit(main())
