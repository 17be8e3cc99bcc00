"""Wire the rooms together behind the commands, from serve to grants."""

import argparse
import asyncio
import difflib
import gc
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import structlog

from pgvigil import (
    __version__,
    apart,
    catalogue,
    config,
    dsn,
    entry,
    expected,
    grants,
    job,
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
    told = _parser(words).parse_args(words, argparse.Namespace(command=command))
    if told.dsn and dsn.has_password(told.dsn):
        _hide(words, command, told.dsn)
    told.environment = dict(os.environ)
    # libpq would take the user's name; a monitoring role has no database of its own.
    os.environ.setdefault("PGDATABASE", "postgres")
    _log_to_stderr(told.log_level)
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
    # What is loaded now stays for good: collections need not look at it again.
    gc.freeze()
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
        replace(target, objectives=expected.completed(target.objectives))
        for target in settings.targets
    ]
    modules = {
        name: replace(module, objectives=expected.completed(module.objectives))
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


def _log_to_stderr(level: str) -> None:
    """Readable lines on a terminal, JSON elsewhere; the libraries' own words go the same way."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        # Tracebacks without local variables: one of them may be a password.
        last = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    else:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class _Parser(argparse.ArgumentParser):
    """Refuses a command line without showing the password that may stand in it."""

    def error(self, message: str) -> NoReturn:
        """End with 2; what begins like a connection string or a password is cut."""
        super().error(_SECRET.sub("... (not shown: it may hold a password)", message))


_SECRET = re.compile(r"\S*(?:://|pass\w*[\s=]).*", re.I | re.S)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pgvigil", description="Watch PostgreSQL for Prometheus.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pgvigil {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    whom = _Parser(add_help=False, allow_abbrev=False)
    whom.add_argument("--config", type=Path, help="YAML file with targets (or PGVIGIL_CONFIG)")
    whom.add_argument(
        "--dsn",
        help="connection string or URI of one target (or PGVIGIL_DSN, where a password belongs); "
        "without it, libpq's own environment and files say whom to watch",
    )
    common = _Parser(add_help=False, allow_abbrev=False, parents=[whom])
    common.add_argument(
        "--catalogue",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder with queries of your own; may be given more than once",
    )
    for word, text in (
        ("enable", "run an area or query that is opt-in (or PGVIGIL_ENABLE, with spaces between)"),
        ("disable", "leave out an area or query (or PGVIGIL_DISABLE)"),
    ):
        common.add_argument(
            f"--{word}",
            action="append",
            default=[],
            metavar="NAME",
            help=f"on every target, {text}; may be given more than once",
        )
    common.add_argument(
        "--listen", metavar="ADDRESS:PORT", help=f"where to serve (default {config.DEFAULT_LISTEN})"
    )
    common.add_argument(
        "--shard",
        metavar="I/N",
        help="keep only the targets of part I of N, counted from 0; NAME-I/N will do, such as a "
        "pod's name (or PGVIGIL_SHARD)",
    )
    common.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what to log (default info)",
    )

    def command(name: str, run: object, text: str, *parents: _Parser) -> _Parser:
        made = commands.add_parser(
            name, help=text, description=text, parents=parents, allow_abbrev=False
        )
        made.set_defaults(run=run, dsn=None, log_level="info")
        if name == "serve":
            made.add_argument(
                "--web-reload",
                action="store_true",
                help="let POST /-/reload read configuration and catalogue anew, as SIGHUP does",
            )
            made.add_argument(
                "--watch-config",
                action="store_true",
                help="read them anew when their files change, too; looks every 30 s",
            )
        if name == "explain":
            made.add_argument("--target", help="only this target of the configuration")
            made.add_argument(
                "--no-sql", dest="sql", action="store_false", help="leave out the statements"
            )
        if name == "reference":
            made.add_argument(
                "--catalogue",
                type=Path,
                action="append",
                default=[],
                metavar="PATH",
                help="file or folder with queries of your own; may be given more than once",
            )
            made.add_argument(
                "--standards", action="store_true", help="the standards in place of the metrics"
            )
        if name == "query":
            made.add_argument("name", help="the query, such as activity.sessions or one of yours")
            made.add_argument("--target", help="which of the configuration; the first when absent")
            made.add_argument("--database", help="where; the connected one when absent")
            made.add_argument("--sql", action="store_true", help="show the statement as well")
            made.add_argument(
                "--rows", type=int, default=50, help="the most rows to show (default %(default)s)"
            )
        if name == "grants":
            made.add_argument(
                "--role", default=grants.DEFAULT_ROLE, help="its name (default %(default)s)"
            )
            for part, text in grants.PARTS.items():
                made.add_argument(f"--{part}", action="store_true", help=f"instead, {text}")
            made.add_argument("--all", action="store_true", help="the role and all of these")
            made.add_argument(
                "--record-role",
                default=grants.DEFAULT_RECORD_ROLE,
                help="the role that may add to the record (default %(default)s)",
            )
        if name == "record":
            entry.words(made)
        return made

    doors = _Parser(add_help=False, allow_abbrev=False)
    doors.add_argument(
        "--web-config",
        "--web.config.file",
        type=Path,
        metavar="FILE",
        help="YAML file with TLS, users and headers, as Prometheus' exporters take it "
        "(or PGVIGIL_WEB_CONFIG)",
    )
    command("serve", _serve, "Serve the metrics of one or more servers.", common, doors)
    command("alive", _alive, "Ask the exporter with these settings whether it lives.", common)
    command(
        "check", _check, "Check configuration and catalogue, without any server.", common, doors
    )
    command(
        "explain", _explain, "Show what would run on a server, what would not, and why.", common
    )
    command(
        "reference", _reference, "Print the reference of all metrics, or standards, as Markdown."
    )
    command("query", _query, "Run one query on a server: its rows, and their series.", common)
    command("grants", _grants, "Print the SQL that makes a role for monitoring.")
    command("record", _record, "Write down that a backup, a drill or a check was done.", whom)
    for kind, text in (
        ("rules", "alert and recording rules"),
        ("dashboards", "Grafana dashboards"),
    ):
        made = command(kind, _hand_out, f"Write the {text} of this version into a folder.")
        made.set_defaults(kind=kind)
        made.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="the folder; made when absent"
        )
        made.add_argument(
            "--force", action="store_true", help="write over files that say something else"
        )
    drill = command("drill", _drill, "Practise what must work one day: a restore.")
    if "drill" in words[:1]:
        _drills(drill, whom)
    return parser


def _drills(parser: argparse.ArgumentParser, whom: argparse.ArgumentParser) -> None:
    """The words of the drills, which bring what the other commands shall not load."""
    from pgvigil import orders

    kinds = parser.add_subparsers(required=True, metavar="DRILL")
    text = "Restore a backup beside everything else, start it, look at it, and clean up."
    restore = kinds.add_parser(
        "restore", help=text, description=text, parents=[whom], allow_abbrev=False
    )
    restore.set_defaults(run=_drill)
    orders.add_arguments(restore)
