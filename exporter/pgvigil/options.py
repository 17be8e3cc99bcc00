"""Say what each command takes on its command line."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pgvigil import __version__, config, entry, grants

Run = Callable[[argparse.Namespace], int]
"""A command: it takes what it was told, and ends with an exit code."""


class _Parser(argparse.ArgumentParser):
    """Refuses a command line without showing the password that may stand in it."""

    def error(self, message: str) -> NoReturn:
        """End with 2; what begins like a connection string or a password is cut."""
        super().error(_SECRET.sub("... (not shown: it may hold a password)", message))


_SECRET = re.compile(r"\S*(?:://|pass\w*[\s=]).*", re.I | re.S)


def parser(words: Sequence[str], commands: Mapping[str, Run]) -> argparse.ArgumentParser:
    """What reads these words; `run` of what it reads is the command that they name."""
    made = _Parser(
        prog="pgvigil", description="Watch PostgreSQL for Prometheus.", allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=f"pgvigil {__version__}")
    parts = made.add_subparsers(required=True, metavar="COMMAND")
    whom, doors = _whom(), _doors()
    common = _common(whom)

    def command(name: str, text: str, *parents: _Parser) -> _Parser:
        part = parts.add_parser(
            name, help=text, description=text, parents=parents, allow_abbrev=False
        )
        part.set_defaults(run=commands[name], dsn=None, log_level="info")
        return part

    _serve(command("serve", "Serve the metrics of one or more servers.", common, doors))
    command("alive", "Ask the exporter with these settings whether it lives.", common)
    command("check", "Check configuration and catalogue, without any server.", common, doors)
    _explain(
        command("explain", "Show what would run on a server, what would not, and why.", common)
    )
    _reference(
        command("reference", "Print the reference of all metrics, or standards, as Markdown.")
    )
    _query(command("query", "Run one query on a server: its rows, and their series.", common))
    _grants(command("grants", "Print the SQL that makes a role for monitoring."))
    entry.words(command("record", "Write down that a backup, a drill or a check was done.", whom))
    for kind, text in {
        "rules": "alert and recording rules",
        "dashboards": "Grafana dashboards",
    }.items():
        handed = command(kind, f"Write the {text} of this version into a folder.")
        handed.set_defaults(kind=kind)
        _hand_out(handed)
    drill = command("drill", "Practise what must work one day: a restore.")
    if "drill" in words[:1]:
        _drills(drill, whom)
    return made


def _whom() -> _Parser:
    """Whom to watch."""
    made = _Parser(add_help=False, allow_abbrev=False)
    made.add_argument("--config", type=Path, help="YAML file with targets (or PGVIGIL_CONFIG)")
    made.add_argument(
        "--dsn",
        help="connection string or URI of one target (or PGVIGIL_DSN, where a password belongs); "
        "without it, libpq's own environment and files say whom to watch",
    )
    return made


def _doors() -> _Parser:
    """Who may come in."""
    made = _Parser(add_help=False, allow_abbrev=False)
    made.add_argument(
        "--web-config",
        "--web.config.file",
        type=Path,
        metavar="FILE",
        help="YAML file with TLS, users and headers, as Prometheus' exporters take it "
        "(or PGVIGIL_WEB_CONFIG)",
    )
    return made


def _common(whom: _Parser) -> _Parser:
    """What the commands take that know whom to watch, and what to ask."""
    made = _Parser(add_help=False, allow_abbrev=False, parents=[whom])
    _catalogue(made)
    for word, text in (
        ("enable", "run an area or query that is opt-in (or PGVIGIL_ENABLE, with spaces between)"),
        ("disable", "leave out an area or query (or PGVIGIL_DISABLE)"),
    ):
        made.add_argument(
            f"--{word}",
            action="append",
            default=[],
            metavar="NAME",
            help=f"on every target, {text}; may be given more than once",
        )
    made.add_argument(
        "--listen", metavar="ADDRESS:PORT", help=f"where to serve (default {config.DEFAULT_LISTEN})"
    )
    made.add_argument(
        "--shard",
        metavar="I/N",
        help="keep only the targets of part I of N, counted from 0; NAME-I/N will do, such as a "
        "pod's name (or PGVIGIL_SHARD)",
    )
    made.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what to log (default info)",
    )
    return made


def _catalogue(made: _Parser) -> None:
    made.add_argument(
        "--catalogue",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder with queries of your own; may be given more than once",
    )


def _serve(made: _Parser) -> None:
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


def _explain(made: _Parser) -> None:
    made.add_argument("--target", help="only this target of the configuration")
    made.add_argument("--no-sql", dest="sql", action="store_false", help="leave out the statements")


def _reference(made: _Parser) -> None:
    _catalogue(made)
    made.add_argument(
        "--standards", action="store_true", help="the standards in place of the metrics"
    )


def _query(made: _Parser) -> None:
    made.add_argument("name", help="the query, such as activity.sessions or one of yours")
    made.add_argument("--target", help="which of the configuration; the first when absent")
    made.add_argument("--database", help="where; the connected one when absent")
    made.add_argument("--sql", action="store_true", help="show the statement as well")
    made.add_argument(
        "--rows", type=int, default=50, help="the most rows to show (default %(default)s)"
    )


def _grants(made: _Parser) -> None:
    made.add_argument("--role", default=grants.DEFAULT_ROLE, help="its name (default %(default)s)")
    for part, text in grants.PARTS.items():
        made.add_argument(f"--{part}", action="store_true", help=f"instead, {text}")
    made.add_argument("--all", action="store_true", help="the role and all of these")
    made.add_argument(
        "--record-role",
        default=grants.DEFAULT_RECORD_ROLE,
        help="the role that may add to the record (default %(default)s)",
    )


def _hand_out(made: _Parser) -> None:
    made.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder; made when absent"
    )
    made.add_argument(
        "--force", action="store_true", help="write over files that say something else"
    )


def _drills(made: _Parser, whom: _Parser) -> None:
    """The words of the drills, which bring what the other commands shall not load."""
    from pgvigil import orders

    kinds = made.add_subparsers(required=True, metavar="DRILL")
    text = "Restore a backup beside everything else, start it, look at it, and clean up."
    restore = kinds.add_parser(
        "restore", help=text, description=text, parents=[whom], allow_abbrev=False
    )
    orders.add_arguments(restore)
