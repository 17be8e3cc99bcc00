"""Read from the command line what is to be written into the record."""

import argparse
import re
from datetime import UTC, datetime
from functools import partial

from pgvigil import record
from pgvigil.record import Record


def words(made: argparse.ArgumentParser) -> None:
    """Add the options that say what was done."""
    made.usage = (
        "pgvigil record KIND (--ok | --failed) [options]\n"
        "       pgvigil record KIND --run [options] -- COMMAND [ARGUMENT ...]"
    )
    made.add_argument(
        "kind",
        metavar="KIND",
        choices=record.KINDS,
        type=lambda text: text.replace("-", "_"),
        help=f"one of {', '.join(record.KINDS)}",
    )
    outcome = made.add_mutually_exclusive_group(required=True)
    outcome.add_argument("--ok", action="store_const", const=True, help="it was done")
    outcome.add_argument(
        "--failed", dest="ok", action="store_const", const=False, help="it was not"
    )
    outcome.add_argument(
        "--run",
        dest="runs",
        action="store_true",
        help="run the command behind --, and write down when, for how long and whether it did; "
        "ends with its exit code, also where nothing could be written down",
    )
    made.add_argument("--target", help="which of the configuration, where it has several")
    for word, length, text in (
        ("place", record.PLACE_LENGTH, "repository, region or disk it concerns: one of few"),
        ("tool", record.TOOL_LENGTH, "what did it (with --run, the command)"),
        ("note", record.NOTE_LENGTH, "words for a person; no metric shows them"),
    ):
        made.add_argument(
            f"--{word}", type=partial(_short, length), default="", metavar="TEXT", help=text
        )
    for word, text in (
        ("started", "when it began"),
        ("ended", "when it ended (default: now, by the server's clock)"),
        ("recovery-point", "up to when one can recover with it, or has recovered"),
        ("window-start", "the oldest point that one can recover to"),
    ):
        made.add_argument(
            f"--{word}",
            type=_moment,
            metavar="TIME",
            help=f"{text}; as 2026-11-21T02:00:00Z, or in seconds since the epoch",
        )
    made.add_argument("--size", type=_bytes, metavar="BYTES", help="how big it is")


def told(words: argparse.Namespace) -> Record:
    """What the options say was done."""
    return Record(
        kind=words.kind,
        ok=bool(words.ok),
        place=words.place,
        started=words.started,
        ended=words.ended,
        size_bytes=words.size,
        recovery_point=words.recovery_point,
        window_start=words.window_start,
        tool=words.tool,
        note=words.note,
    )


def _short(length: int, text: str) -> str:
    """A text of the command line that the record has room for."""
    if len(text) > length:
        raise argparse.ArgumentTypeError(f"has {len(text)} characters, and may have {length}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is no UTF-8 text") from None
    return text


def _moment(text: str) -> datetime:
    at = None
    try:
        if re.fullmatch(r"@?[0-9]+(\.[0-9]+)?", text):
            at = datetime.fromtimestamp(float(text.removeprefix("@")), UTC)
        else:
            at = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        pass
    if at is None or at.tzinfo is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be seconds since the epoch, as `date +%s` gives them, or a time with "
            "its zone, such as 2026-11-21T02:00:00Z"
        )
    return at


def _bytes(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of bytes")
    return int(text)
