"""Read connection strings as libpq does, and refuse what it would take for something else."""

import difflib
import re
from collections.abc import Iterator, Mapping

from psycopg import ProgrammingError, conninfo, pq

from pgvigil.documents import spoken

_URI = re.compile(r"\s*postgres(?:ql)?://")
_CLEAR_URI = re.compile(
    # A user or password that holds a plain @ or / makes libpq take a part of it for something else.
    # An @ before the first / ends a user, whatever stands before it.
    r"\s*postgres(?:ql)?://(?:[^@/]*@|(?![^/]*@))[^@?]*(?:\?.*)?",
    re.S,
)
_PORTS = re.compile(r"\d*(?:,\d*)*")
_NEXT_URI = re.compile(r"(?P<comma>,)(?=\s*postgres(?:ql)?://)")
_NEXT_KEYWORDS = re.compile(
    # A comma outside quotes before a keyword that opens a connection string.
    r"=\s*'(?:\\.|[^'\\])*'|\\."
    r"|(?P<comma>,)(?=\s*(?:host|hostaddr|port|user|dbname|service)\s*=)",
    re.S,
)
PLACES = {"host": "PGHOST", "dbname": "PGDATABASE"}
_WHOLE = re.compile("://|=")
"""What makes libpq's own tools take a database's name for a connection string."""
MISPLACED = (
    "holds a connection string (not shown: there may be a password in it); write that as a dsn, "
    "such as PGVIGIL_DSN"
)
BAD_DSN = (
    "is no connection string that libpq understands (not shown: it may hold a password). In a URI, "
    "write @ : / ? # [ ] % and spaces of a user or password percent-encoded, as %40 for @; in "
    "key=value form, put values with spaces in single quotes; or give the password apart"
)


def has_password(dsn: str) -> bool:
    """Whether a connection string carries a password that a process list would show."""
    try:
        return not _SECRETS.isdisjoint(parse(dsn))
    except ValueError:
        return True  # what cannot be read may hold one anywhere


def libpq_defaults() -> dict[str, str]:
    """What libpq takes where nothing is said: its environment, PGSERVICE's section, its own."""
    return {
        option.keyword.decode(): option.val.decode(errors="replace")
        for option in pq.Conninfo.get_defaults()
        if option.val and option.keyword != b"password"
    }


def bad_keywords(connection: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What libpq would not take, or would show: the keyword and what is wrong."""
    for key, value in connection.items():
        if key not in _KEYWORDS:
            near = difflib.get_close_matches(key, _KEYWORDS, 1)
            guess = f"did you mean {near[0]!r}?" if near else "see libpq's list of them"
            yield key, f"{spoken(key)!r} is no connection keyword of libpq; {guess}"
        elif "\0" in value:
            yield key, f"{key} holds a NUL, where libpq takes it to end"
    for key in misplaced(connection):
        yield key, f"{key} {MISPLACED}"


def parse(dsn: str) -> dict[str, str]:
    """The keywords and values of a connection string; raises ValueError when it is unclear."""
    if "\0" in dsn:
        raise ValueError  # libpq would take what stands before it
    if _URI.match(dsn):
        dsn = dsn.strip()
        if not _CLEAR_URI.fullmatch(dsn):
            raise ValueError
    try:
        parsed = conninfo.conninfo_to_dict(dsn)
    except ProgrammingError:
        raise ValueError from None  # without libpq's words: they hold parts of the string
    if not _PORTS.fullmatch(str(parsed.get("port", ""))):
        raise ValueError  # such as user:password/database, where the host is missing
    found = {key: str(value) for key, value in parsed.items()}
    if misplaced(found):
        raise ValueError
    return found


def misplaced(connection: Mapping[str, str]) -> list[str]:
    """The keywords that are shown to everybody and hold a whole connection string."""
    return [key for key in PLACES if _WHOLE.search(connection.get(key, ""))]


def split(text: str) -> Iterator[str]:
    """The connection strings of a list with commas; a comma inside one is left alone."""
    begin = 0
    for found in (_NEXT_URI if _URI.match(text) else _NEXT_KEYWORDS).finditer(text):
        if found["comma"]:
            yield text[begin : found.start()]
            begin = found.end()
    yield text[begin:]


_SECRETS = {o.keyword.decode() for o in pq.Conninfo.get_defaults() if o.dispchar == b"*"}
_KEYWORDS = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
