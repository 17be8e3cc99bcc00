"""Sort what can go wrong by what the program does next."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple


def printable(text: str) -> str:
    """A text on one line, which moves no cursor and colours nothing on a terminal."""
    if text.isprintable():
        return text
    signs = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(signs)


class Problem(NamedTuple):
    """One fault in something the operator wrote, with its place and its remedy."""

    place: str
    """A file, an environment variable or a command line option."""
    line: int | None
    """Counted from 1; None where the place has no lines."""
    text: str
    """What is wrong and what to do about it."""

    def __str__(self) -> str:
        where = self.place if self.line is None else f"{self.place}:{self.line}"
        return printable(f"{where}: {self.text}")


class PgvigilError(Exception):
    """The base of all errors this program raises on purpose."""


class Refused(PgvigilError):
    """The configuration or a catalogue is wrong: print every problem and exit with 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Down(StrEnum):
    """Why a target cannot be asked: the closed list behind `pg_down_reason` and its like.

    Where PostgreSQL itself refuses, the word is its condition name (the manual's appendix A);
    the others say what stood between.
    """

    HOST_UNKNOWN = "host_unknown"
    CONNECTION_REFUSED = "connection_refused"
    HOST_UNREACHABLE = "host_unreachable"
    TIMEOUT = "timeout"
    TLS = "tls"
    PASSWORD_FILE = "password_file"  # noqa: S105  (a reason, not a password)
    PASSWORD_COMMAND = "password_command"  # noqa: S105
    INVALID_PASSWORD = "invalid_password"  # noqa: S105
    INVALID_AUTHORIZATION = "invalid_authorization_specification"
    INVALID_CATALOG_NAME = "invalid_catalog_name"
    INSUFFICIENT_PRIVILEGE = "insufficient_privilege"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    CANNOT_CONNECT_NOW = "cannot_connect_now"
    ADMIN_SHUTDOWN = "admin_shutdown"
    CONNECTION_LOST = "connection_lost"
    WRONG_KIND = "wrong_kind"
    OTHER = "other"


DOWN_BY_SQLSTATE = {
    "28P01": Down.INVALID_PASSWORD,
    "28000": Down.INVALID_AUTHORIZATION,
    "3D000": Down.INVALID_CATALOG_NAME,
    "42501": Down.INSUFFICIENT_PRIVILEGE,
    "53300": Down.TOO_MANY_CONNECTIONS,
    "57P01": Down.ADMIN_SHUTDOWN,
    "57P02": Down.ADMIN_SHUTDOWN,
    "57P03": Down.CANNOT_CONNECT_NOW,
}


CONFLICT = "40001"
"""The SQLSTATE with which a standby ends what replay would have to wait for."""

AGAIN = 3
"""How often what a standby has ended for that is asked again."""


class Unreachable(PgvigilError):
    """A server could not be asked: it is down for this scrape, and tried anew at the next."""

    def __init__(self, reason: Down, detail: str, *, passing: bool = False) -> None:
        self.reason = reason
        self.detail = detail
        """One line for a person; free of secrets."""
        self.passing = passing
        """Whether a new connection may do at once: a standby has ended this one for what it
        replays."""
        super().__init__(f"{reason}: {detail}")


class QueryFailed(PgvigilError):
    """One query gave no usable result; the others stand."""

    def __init__(self, reason: str, detail: str, sqlstate: str = "") -> None:
        self.reason = reason
        """A condition name of PostgreSQL's (`lock_not_available`) or a word of our own."""
        self.detail = detail
        self.sqlstate = sqlstate
        """Empty where no server spoke."""
        super().__init__(f"{reason}: {detail}")


class DrillFailed(PgvigilError):
    """A drill cannot go on, so that it has failed; the text is for a person and has a remedy."""
