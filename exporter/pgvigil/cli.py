"""Wire the rooms together behind the commands, from serve to grants."""

import argparse
import asyncio
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from pgvigil import (
    __version__,
    apart,
    catalogue,
    config,
    dsn,
    entry,
    expected,
    garbage,
    grants,
    job,
    logs,
    options,
    record,
    serve,
    web,
)
from pgvigil.config import Settings, Told
from pgvigil.discovery import Discovery
from pgvigil.door import Door
from pgvigil.errors import DrillFailed, Problem, QueryFailed, Refused, Unreachable, printable
from pgvigil.fleet import Fleet
from pgvigil.kinds import open_source
from pgvigil.plan import Facts, Plan, concerning, disabled, make_plan, wanted
from pgvigil.reload import Reloader
from pgvigil.target import Target

READING = 60.0
"""Seconds that a reload may take to read configuration and catalogue."""
USAGE_ERROR = 2
"""The exit code for a configuration or a catalogue that is refused."""
FAILURE = 1

_WIDE = 40
"""Columns above which a single row is shown as a list of them."""

_log = structlog.get_logger()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (it failed) or 2 (it was refused)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, command = _apart(words)
    known = options.parser(words, _COMMANDS)
    told = known.parse_args(words, argparse.Namespace(command=command))
    if told.dsn and dsn.has_password(told.dsn):
        _hide(words, command, told.dsn)
    told.environment = dict(os.environ)
    # libpq would take the user's name; a monitoring role has no database of its own.
    os.environ.setdefault("PGDATABASE", "postgres")
    logs.to_stderr(told.log_level)
    try:
        code: int = told.run(told)
    except Refused as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        count = len(error.problems)
        print(f"{count} problem{'s' if count > 1 else ''} to mend", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # `pgvigil explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    return code


def _apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, and the command that `record` is to run."""
    if words[:1] != ["record"] or "--" not in words:
        return words, []
    end = words.index("--")
    return words[:end], words[end + 1 :]


def _hide(words: Sequence[str], command: Sequence[str], dsn: str) -> None:
    """Start anew with the connection string in the environment, where other users cannot read it.

    Everybody on the machine can read a command line, for as long as the process lives.
    """
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith("--dsn"):
            kept.append(word)
        skip = word == "--dsn"
    print(
        "pgvigil: the password in --dsn stood in the process list for a moment; "
        "set PGVIGIL_DSN, PGPASSWORD or a password file instead",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os.environ["PGVIGIL_DSN"] = dsn
    if command:
        kept += ["--", *command]
    os.execv(sys.executable, [sys.executable, "-m", "pgvigil", *kept])  # noqa: S606


def _serve(told: argparse.Namespace) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can be followed
    read = partial(_complete, told)
    (settings, queries), rules = apart.run(partial(_with_doors, told))
    guard = web.Web(rules) if rules else None
    try:
        door = serve.listen(settings.listen)
    except OSError as error:
        _log.error("cannot listen", address=str(settings.listen), reason=error.strerror)
        return FAILURE
    fleet = Fleet()
    fleet.adopt(settings, queries)
    reloader = Reloader(partial(apart.again, read, READING), fleet, settings)
    announce = partial(
        _log.info,
        "pgvigil serves",
        version=__version__,
        address=str(settings.listen._replace(port=door.getsockname()[1])),
        targets=[target.address for target in settings.targets],
        queries=len(queries),
        tls=bool(rules and rules.tls),
        users=len(rules.users) if rules else 0,
    )
    garbage.settle()
    asyncio.run(_serving(told, fleet, reloader, door, guard, announce))
    _log.info("pgvigil ends")
    return 0


async def _serving(
    told: argparse.Namespace,
    fleet: Fleet,
    reloader: Reloader,
    door: Door,
    guard: web.Web | None,
    announce: Callable[[], object],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reloader.begin)
    beside = [
        loop.create_task(work)
        for work in (
            reloader.watch(always=told.watch_config),
            fleet.keep(),
            Discovery(fleet).run(),
            garbage.keep(),
        )
    ]
    announce()  # not before: who reads it may end us at once

    async def stopped() -> None:
        await stop.wait()

    reload = reloader.begin if told.web_reload else None
    application = serve.Application(fleet, door, reload, guard)
    try:
        await serve.run(application, door, stopped)
    finally:
        for task in beside:
            task.cancel()
        await reloader.close()
        await fleet.close()


def _check(told: argparse.Namespace) -> int:
    (settings, queries), _ = _with_doors(told)
    metrics = sum(len(query.metrics) for query in queries)
    print(f"{len(queries)} queries with {metrics} metrics are in order")
    for target in settings.targets:
        print(f"target {target.name}: {target.address}")
    return 0


def _explain(told: argparse.Namespace) -> int:
    settings, queries = _settled(told)
    chosen = [t for t in settings.targets if told.target in (None, t.name)]
    if not chosen:
        return _no_such("target", told.target, (target.name for target in settings.targets))
    codes = [asyncio.run(_explain_one(target, queries, told.sql)) for target in chosen]
    return max(codes)


def _query(told: argparse.Namespace) -> int:
    from pgvigil import trial  # what only one command needs is no load on the others

    settings, queries = _settled(told)
    query = next((query for query in queries if query.name == told.name), None)
    if query is None:
        return _no_such("query", told.name, (query.name for query in queries))
    chosen = [t for t in settings.targets if told.target in (None, t.name)]
    if not chosen:
        return _no_such("target", told.target, (target.name for target in settings.targets))
    target = next((t for t in chosen if t.kind == query.kind), None)
    if target is None:
        text = f"{query.name} is for targets of kind {query.kind}, and {chosen[0].name} is none"
        print(text, file=sys.stderr)
        return USAGE_ERROR
    seconds = serve.DEFAULT_TIMEOUT + query.timeout
    try:
        done = asyncio.run(trial.run(target, query, told.database, seconds))
    except (Unreachable, TimeoutError) as error:
        print(f"{target.address}: {error or 'no answer in time'}", file=sys.stderr)
        return FAILURE
    if told.sql and done.text:
        print(f"{done.text};\n")
    for loss in done.losses:
        print(f"-- without {loss.metric.name}: {loss.reason}: {loss.detail}")
    if done.failure:
        print(f"{query.name}: {done.failure.reason}: {done.failure.detail}", file=sys.stderr)
        print(f"it stands at {query.place}:{query.line}", file=sys.stderr)
        return FAILURE
    columns, rows = done.columns, done.rows[: told.rows]
    if len(columns) > _WIDE and len(rows) == 1:
        columns, rows = ["column", "value"], list(map(list, zip(columns, rows[0], strict=True)))
    print("\n".join(trial.table(columns, rows)))
    count = len(done.rows)
    if count > told.rows:
        print(f"-- and {count - told.rows} more; --rows {count} shows them")
    print(f"-- {count} row{'' if count == 1 else 's'} in {done.seconds * 1000:.1f} ms\n")
    print("\n".join(done.series))
    for reason, dropped in done.dropped.items():
        print(f"-- {dropped} samples dropped: {reason}")
    return 0


def _no_such(kind: str, name: str, known: Iterable[str]) -> int:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    print(f"no {kind} is called {name!r}; {guess}", file=sys.stderr)
    return USAGE_ERROR


async def _explain_one(target: Target, queries: Sequence[catalogue.Query], sql: bool) -> int:
    deadline = asyncio.get_running_loop().time() + serve.DEFAULT_TIMEOUT
    try:
        session = await open_source(target, wanted(concerning(queries, target.kind)), deadline)
        facts = await session.facts(deadline)
        session.close()
    except (Unreachable, TimeoutError) as error:
        print(f"{target.address}: {error or 'no answer in time'}", file=sys.stderr)
        return FAILURE
    off = disabled(queries, target.enable, target.disable)
    _print_plan(target, facts, make_plan(queries, facts, off), sql)
    return 0


def _print_plan(target: Target, facts: Facts, plan: Plan, sql: bool) -> None:
    extensions = ", ".join(f"{name} {of.version}" for name, of in facts.extensions.items())
    role = f", {facts.role}" if facts.role else ""
    print(f"-- {target.address}: {facts.server}{role}, as {facts.user}", end="")
    print(" (a superuser; pgvigil needs none)" if facts.superuser else "")
    if facts.kind == "postgresql":
        print(f"-- extensions: {extensions or 'none'}")
    print(f"\n-- {len(plan.statements)} queries run here")
    for statement in plan.statements:
        query = statement.query
        print(f"\n-- {query.name}: {query.why}")
        pace = f"every {query.every:g} s" if query.every else "with each scrape"
        where = " in each database" if query.scope == "database" else ""
        most = f"at most {query.timeout:g} s, " if query.kind == "postgresql" else "at most "
        print(f"--   {query.place}:{query.line}, {pace}{where}, {most}{statement.max_rows} rows")
        for metric in statement.metrics:
            labels = f"{{{','.join(query.labels)}}}" if query.labels else ""
            print(f"--   {metric.name}{labels} {metric.type}: {metric.help}")
        if sql:
            print(f"{statement.text};")
    print(f"\n-- {len(plan.refusals)} queries do not run here")
    for refusal in plan.refusals:
        print(f"-- {refusal.query.name}: {refusal.reason}: {refusal.detail}")
    if plan.losses:
        print(f"\n-- {len(plan.losses)} metrics are missing from queries that run")
    for loss in plan.losses:
        print(f"-- {loss.metric.name}: {loss.reason}: {loss.detail}")


def _reference(told: argparse.Namespace) -> int:
    from pgvigil import coverage, reference, standards

    if told.standards:
        print(coverage.page(standards.load()), end="")
        return 0
    used: dict[str, list[str]] = {}
    for standard in standards.load():
        for name in standard.metrics:
            used.setdefault(name, []).append(standard.id)
    print(reference.page(catalogue.load(told.catalogue), used), end="")
    return 0


def _record(told: argparse.Namespace) -> int:
    if told.runs != bool(told.command):
        print("--run wants a command behind --, and no other does", file=sys.stderr)
        return USAGE_ERROR
    if told.runs and (told.started or told.ended):
        print("--run knows itself when the command started and ended", file=sys.stderr)
        return USAGE_ERROR
    row = entry.told(told)
    code = None
    if told.runs:
        # First of all: no fault of ours may keep a backup from being taken.
        ended = job.run(told.command, told.environment)
        code = ended.code
        if not ended.began:
            print(f"pgvigil: {printable(ended.note)}", file=sys.stderr)
        note = "; ".join(part for part in (told.note, printable(ended.note)) if part)
        row = replace(
            row,
            ok=not code,
            lasted=ended.seconds,
            tool=told.tool or printable(Path(told.command[0]).name)[: record.TOOL_LENGTH],
            note=note[: record.NOTE_LENGTH],
        )
    try:
        failed = 0 if _written(_one(told), row) else FAILURE
    except Refused as error:
        print("\n".join(map(str, error.problems)), file=sys.stderr)
        print(f"pgvigil: the {row.kind} was NOT recorded", file=sys.stderr)
        failed = USAGE_ERROR
    return failed if code is None else code


def _one(told: argparse.Namespace) -> Target:
    """The target that is meant; Refused where there are several and none is named."""
    settings = config.settle(Told(told.config, told.dsn), os.environ)
    # A record is a row of a table.
    targets = [target for target in settings.targets if target.kind == "postgresql"]
    meant = [t for t in targets if told.target in (None, t.name)]
    if len(meant) != 1:
        names = ", ".join(sorted(target.name for target in targets))
        raise Refused([Problem("--target", None, f"must be one of the configuration: {names}")])
    return meant[0]


def _grants(told: argparse.Namespace) -> int:
    if not (told.role + told.record_role).isprintable():
        print("a role's name must be printable here: it stands in comments too", file=sys.stderr)
        return USAGE_ERROR
    parts = [part for part in grants.PARTS if told.all or getattr(told, part)]
    if "record" in parts and told.role == told.record_role:
        print("the role that watches may not write; name another --record-role", file=sys.stderr)
        return USAGE_ERROR
    script = grants.script(
        told.role, parts, create=told.all or not parts, record_role=told.record_role
    )
    print(script, end="")
    return 0


def _alive(told: argparse.Namespace) -> int:
    from pgvigil import alive

    listen = config.settle(_told(told), os.environ).listen
    lives, words = alive.ask(listen)
    print(printable(words), file=sys.stdout if lives else sys.stderr)
    return 0 if lives else FAILURE


def _hand_out(told: argparse.Namespace) -> int:
    from pgvigil import shipped

    new = shipped.hand_out(told.kind, told.out, force=told.force)
    for path in new:
        print(path)
    count = len(shipped.files(told.kind))
    print(f"{count} files of {told.kind} are in {told.out}, {len(new)} of them new")
    return 0


def _drill(told: argparse.Namespace) -> int:
    from pgvigil import drill, orders, scratch

    order = orders.read(told)
    target = _one(told) if told.records else None
    scratch.listen()
    try:
        with scratch.account(told.account):
            report = drill.run(order, drill.Shown(sys.stderr))
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return FAILURE
    except DrillFailed as error:
        print(error, file=sys.stderr)
        return FAILURE
    if told.json:
        print(json.dumps(drill.document(report), indent=2))
    else:
        print("\n".join(drill.lines(report)))
    recorded = target is None or _written(target, drill.record(report, told.place))
    return 0 if report.ok and recorded else FAILURE


def _written(target: Target, row: record.Record) -> bool:
    """Write down what was done, or say why that fails."""
    try:
        asyncio.run(record.write(target, row))
    except (Unreachable, QueryFailed) as error:
        print(printable(f"{target.address}: {error.detail}"), file=sys.stderr)
        print(f"pgvigil: the {row.kind} was NOT recorded", file=sys.stderr)
        return False
    return True


def _settled(told: argparse.Namespace) -> tuple[Settings, tuple[catalogue.Query, ...]]:
    """Configuration and catalogue; raises Refused with the problems of both."""
    problems: list[Problem] = []
    settings = None
    extra: Sequence[Path] = told.catalogue
    try:
        settings = config.settle(_told(told), os.environ)
        extra = settings.catalogue
    except Refused as error:
        problems += error.problems
    try:
        queries = catalogue.load(extra)
    except Refused as error:
        problems += error.problems
    if settings and not problems:
        problems += _unknown(settings, queries)
    if problems or settings is None:
        raise Refused(problems)
    return settings.shared_out(), queries


def _told(told: argparse.Namespace) -> Told:
    return Told(
        told.config,
        told.dsn,
        told.listen,
        tuple(told.catalogue),
        tuple(told.enable),
        tuple(told.disable),
        told.shard,
    )


def _complete(told: argparse.Namespace) -> tuple[Settings, tuple[catalogue.Query, ...]]:
    """Configuration and catalogue, with all objectives of the standards."""
    settings, queries = _settled(told)
    targets = [
        replace(target, objectives=expected.completed((*target.objectives,)))
        for target in settings.targets
    ]
    modules = {
        name: replace(module, objectives=expected.completed((*module.objectives,)))
        for name, module in settings.modules.items()
    }
    return replace(settings, targets=targets, modules=modules), queries


def _with_doors(
    told: argparse.Namespace,
) -> tuple[tuple[Settings, tuple[catalogue.Query, ...]], web.Rules | None]:
    """The same, and who may come in; raises Refused with the problems of all."""
    problems: list[Problem] = []
    complete = rules = None
    path = told.web_config or os.environ.get("PGVIGIL_WEB_CONFIG")
    try:
        complete = _complete(told)
    except Refused as error:
        problems += error.problems
    try:
        rules = web.read(Path(path)) if path else None
    except Refused as error:
        problems += error.problems
    if problems or complete is None:
        raise Refused(problems)
    return complete, rules


def _unknown(settings: Settings, queries: Sequence[catalogue.Query]) -> Iterator[Problem]:
    """What a target enables or disables that no catalogue has."""
    known = {name for query in queries for name in (query.name, query.area)}
    for target in (*settings.targets, *settings.modules.values()):
        for name in (*target.enable, *target.disable):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                guess = f"did you mean {near[0]!r}?" if near else "`pgvigil explain` lists them"
                text = f"{name!r} is no area and no query of the catalogue; {guess}"
                yield Problem(f"target {target.name}", None, text)


_COMMANDS: Mapping[str, options.Run] = {
    "serve": _serve,
    "alive": _alive,
    "check": _check,
    "explain": _explain,
    "reference": _reference,
    "query": _query,
    "grants": _grants,
    "record": _record,
    "rules": _hand_out,
    "dashboards": _hand_out,
    "drill": _drill,
}
