"""Read from the command line what a drill shall do."""

import argparse
import re
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pgvigil.drill import Directory, Order, Source
from pgvigil.errors import Problem, Refused
from pgvigil.pgbackrest import PgBackRest
from pgvigil.record import PLACE_LENGTH

_SETTING = re.compile(r"([A-Za-z_][A-Za-z0-9_.$]*)=(.*)")
_LONGEST = 24 * 365
_STANZA = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `pgvigil drill restore`."""
    backup = parser.add_argument_group("the backup")
    backup.add_argument(
        "--from",
        dest="directory",
        type=Path,
        metavar="DIRECTORY",
        help="a base backup, or its tars",
    )
    backup.add_argument(
        "--wal", type=Path, metavar="DIRECTORY", help="its archived WAL, plain or packed by gzip"
    )
    backup.add_argument(
        "--restore-command", metavar="COMMAND", help="instead, PostgreSQL's command to get WAL"
    )
    backup.add_argument(
        "--tablespace",
        action="append",
        default=[],
        metavar="OID=DIRECTORY",
        help="where the backup has a tablespace that it holds a link to",
    )
    backup.add_argument("--pgbackrest", metavar="STANZA", help="instead, pgBackRest's newest")
    backup.add_argument("--repo", type=int, metavar="N", help="from this repository of its")
    backup.add_argument("--pgbackrest-config", type=Path, metavar="FILE", help="its configuration")
    recovery = parser.add_argument_group("recovery")
    recovery.add_argument(
        "--target-time",
        metavar="TIME",
        help="recover up to then, such as 2026-01-31T12:00:00+01:00; all WAL when absent",
    )
    recovery.add_argument(
        "--immediate", action="store_true", help="recover only until the backup is consistent"
    )
    recovery.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the restored server, such as shared_preload_libraries=timescaledb",
    )
    recovery.add_argument(
        "--bin", type=Path, metavar="DIRECTORY", help="PostgreSQL's programs of the right version"
    )
    checking = parser.add_argument_group("checks")
    checking.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="SQL",
        help="SQL or a file with it, whose last statement must return true; may be repeated",
    )
    checking.add_argument(
        "--database", default="postgres", metavar="NAME", help="where they run (default postgres)"
    )
    checking.add_argument(
        "--superuser",
        default="postgres",
        metavar="ROLE",
        help="the backup's superuser (default postgres)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--scratch",
        type=Path,
        metavar="DIRECTORY",
        help="where it is restored into a directory of its own (default TMPDIR)",
    )
    how.add_argument("--keep", action="store_true", help="leave what was restored there")
    how.add_argument(
        "--as", dest="account", metavar="USER", help="for root: the account that does everything"
    )
    how.add_argument(
        "--timeout",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="give up after so long (default %(default)s)",
    )
    how.add_argument(
        "--no-record",
        dest="records",
        action="store_false",
        help="do not write the outcome into the record (`pgvigil grants --record`)",
    )
    how.add_argument("--target", help="whose record, where the configuration has several")
    how.add_argument(
        "--place",
        default="",
        metavar="TEXT",
        help="the record's label for where the backup lies: one of few (default repoN, or none)",
    )
    how.add_argument("--json", action="store_true", help="print the report as JSON")


def read(told: argparse.Namespace) -> Order:
    """The order that was told; raises Refused with all that is wrong with it."""
    problems = [
        Problem(option, None, text) for wrong in (_wrong, _misspelt) for option, text in wrong(told)
    ]
    target: dict[str, str] = {"recovery_target": "immediate"} if told.immediate else {}
    if told.target_time and (moment := _moment(told.target_time)):
        target = {"recovery_target_time": moment.isoformat(" ")}
    tablespaces = {key: Path(value) for key, value in _pairs(told.tablespace).items()}
    queries = []
    for text in told.query:
        try:
            queries.append(_query(text))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem("--query", None, f"{text}: {error}"))
    if problems:
        raise Refused(problems)
    source: Source = (
        Directory(told.directory, told.wal, told.restore_command, tablespaces)
        if told.directory
        else PgBackRest(told.pgbackrest, told.repo, told.pgbackrest_config, target)
    )
    return Order(
        source,
        told.scratch or Path(tempfile.gettempdir()),
        told.keep,
        told.bin,
        told.superuser,
        target,
        _pairs(told.settings),
        queries,
        told.database,
        told.timeout * 3600,
    )


def _wrong(told: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Options that are no use, or not together, with the remedy."""
    if (told.directory is None) == (told.pgbackrest is None):
        yield "--from", "say which backup: one of --from DIRECTORY and --pgbackrest STANZA"
    other = {"--repo": told.repo, "--pgbackrest-config": told.pgbackrest_config}
    for option, value in other.items() if told.pgbackrest is None else ():
        if value is not None:
            yield option, "is of use with --pgbackrest STANZA only"
    own = {
        "--wal": told.wal,
        "--restore-command": told.restore_command,
        "--tablespace": told.tablespace,
    }
    for option, value in own.items() if told.directory is None else ():
        if value:
            yield option, "is of use with --from DIRECTORY only"
    if told.wal and told.restore_command:
        yield "--wal", "there is --restore-command as well; leave one out"
    if told.target_time and told.immediate:
        yield "--target-time", "there is --immediate as well; leave one out"


def _misspelt(told: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Options whose value is not of the shape that it must have."""
    if told.pgbackrest is not None and not _STANZA.fullmatch(told.pgbackrest):
        yield "--pgbackrest", "a stanza's name has letters, digits, _, . and -"
    if told.target_time and not _moment(told.target_time):
        yield "--target-time", "is no moment in ISO 8601, such as 2026-01-31T12:00:00+01:00"
    for text in told.tablespace:
        if not re.fullmatch(r"\d+=.+", text):
            yield "--tablespace", f"{text!r} is not OID=DIRECTORY, such as 16384=/backup/ts1"
    for text in told.settings:
        if not _SETTING.fullmatch(text):
            yield "--set", f"{text!r} is not NAME=VALUE"
    if len(told.place) > PLACE_LENGTH:
        yield "--place", f"may have {PLACE_LENGTH} characters"
    if not 0 < told.timeout <= _LONGEST:
        yield "--timeout", "must be a number of hours above 0"


def _moment(text: str) -> datetime | None:
    """A moment; without an offset it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC)


def _pairs(texts: list[str]) -> Mapping[str, str]:
    return dict(text.split("=", 1) for text in texts if "=" in text)


def _query(text: str) -> str:
    """SQL, or what the file has; raises OSError and UnicodeDecodeError."""
    if text.endswith(".sql") or (" " not in text and Path(text).is_file()):
        return Path(text).read_text("utf-8")
    return text
