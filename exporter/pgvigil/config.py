"""Read whom to watch, from the command line, the environment or one YAML file."""

import difflib
import errno
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from psycopg import ProgrammingError, conninfo, pq

from pgvigil import documents, expected
from pgvigil.errors import Problem, Refused, printable
from pgvigil.maintenance import Window
from pgvigil.shard import MOST, WHOLE, Shard
from pgvigil.shard import parse as parse_shard
from pgvigil.standards import LATENCY, Objective

DEFAULT_LISTEN = ":9187"

_LISTEN = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[!-9;-~]*):(?P<port>[0-9]{1,5})")
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
_PARTS = ("URI", "USER", "PASS", "URI_FILE", "USER_FILE", "PASS_FILE")
_CHOICES = (
    *("enable", "disable", "include_databases", "exclude_databases"),
    *("max_databases", "max_series", "latency_limits", "kind", "command"),
)
_OF_POSTGRESQL = (
    *("pooler", "include_databases", "exclude_databases", "max_databases", "latency_limits"),
)
"""What a target of another kind has no use for."""
COMMANDS = ("pgbackrest", "barman", "wal-g")
"""The kinds that are no servers but programs, each the name of its own."""
_CONSOLE = "pgbouncer"
"""The database under whose name PgBouncer answers itself."""
_PLACES = {"host": "PGHOST", "dbname": "PGDATABASE"}
_WHOLE = re.compile("://|=")
"""What makes libpq's own tools take a database's name for a connection string."""
_MISPLACED = (
    "holds a connection string (not shown: there may be a password in it); write that as a dsn, "
    "such as PGVIGIL_DSN"
)
_BAD_DSN = (
    "is no connection string that libpq understands (not shown: it may hold a password). In a URI, "
    "write @ : / ? # [ ] % and spaces of a user or password percent-encoded, as %40 for @; in "
    "key=value form, put values with spaces in single quotes; or give the password apart"
)


class Address(NamedTuple):
    """Where to listen; an empty host means every interface."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """One server to watch, and how to reach it."""

    name: str
    connection: Mapping[str, str] = field(default_factory=dict, repr=False)
    """libpq's keywords; what is absent libpq takes from its own environment and files."""
    password_file: Path | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Constant labels on every series."""
    pooler: bool = False
    enable: Sequence[str] = ()
    """Areas and queries that run though they are opt-in."""
    disable: Sequence[str] = ()
    """Areas and queries that do not run."""
    include_databases: Sequence[str] = ()
    """Regular expressions; when there are any, only databases whose whole name fits are visited."""
    exclude_databases: Sequence[str] = ()
    max_databases: int = 500
    """The most databases that are visited, the biggest first."""
    max_series: int = 20_000
    """The most series on the target's page, the exporter's own aside."""
    latency_limits: Sequence[float] = ()
    """Seconds; limits of the operator's own, beside those that latency is told by anyhow."""
    objectives: Sequence[Objective] = ()
    """The operator's own; once the program serves, all of the standards'."""
    declared: Sequence[tuple[str, str]] = ()
    """What is as it shall be, as kind and name: a role, a superuser, a tenant_table."""
    maintenance: Sequence[Window] = ()
    command: Sequence[str] = ()
    """What is run, for a target that is a command."""
    kind: str = "postgresql"
    """What answers there; `kinds` knows how each is asked."""

    def parameters(self) -> dict[str, str]:
        """libpq's keywords for a connection now; raises OSError when the password file is gone.

        The file is read each time, so that a rotated password is used at the next connection.
        """
        if self.password_file is None:
            return dict(self.connection)
        return {**self.connection, "password": read_secret(self.password_file)}

    @property
    def limits(self) -> Sequence[float]:
        """In seconds, what latency is told by besides: the operator's limits and objectives."""
        wanted = (of.value for of in self.objectives if of.name == LATENCY)
        return (*self.latency_limits, *wanted)

    @property
    def address(self) -> str:
        """`host:port/dbname` for a person, as far as the configuration tells; never a secret."""
        if self.kind in COMMANDS:
            return printable((self.command or (self.kind,))[0])  # its options may hold anything
        known = {**libpq_defaults(), **self.connection}
        host = known.get("host") or known.get("hostaddr") or "local socket"
        if known.get("service") and "host" not in self.connection:
            return printable(f"service {known['service']}")
        return printable(f"{host}:{known.get('port', '5432')}/{known.get('dbname', '')}")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the program was told."""

    listen: Address
    targets: Sequence[Target]
    catalogue: Sequence[Path]
    """Files and folders with the operator's own queries."""
    shard: Shard = WHOLE
    elsewhere: Collection[str] = frozenset()
    """The names of the targets that other shards keep."""
    files: Sequence[Path] = ()
    """Where all this was read, the catalogue aside."""

    def shared_out(self) -> "Settings":
        """The same with the targets of our shard alone."""
        kept = [target for target in self.targets if self.shard.keeps(target.name)]
        others = {target.name for target in self.targets} - {target.name for target in kept}
        return replace(self, targets=kept, elsewhere=frozenset(others))


@dataclass(frozen=True, slots=True)
class Told:
    """What the command line says; None where it is silent."""

    config: Path | None = None
    dsn: str | None = None
    listen: str | None = None
    catalogue: Sequence[Path] = ()
    enable: Sequence[str] = ()
    disable: Sequence[str] = ()
    shard: str | None = None


def read_secret(path: Path) -> str:
    """A file's text without the line end that editors and `echo` leave; raises OSError."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "it is not UTF-8 text") from None
    except ValueError:
        raise OSError(errno.EINVAL, "no path holds a NUL") from None
    return re.sub(r"\r?\n\Z", "", text)


def settle(told: Told, environment: Mapping[str, str]) -> Settings:
    """The settings for this run; raises Refused with every problem.

    The command line goes before the environment. Targets come from the first of: the file, `--dsn`,
    PGVIGIL_DSN, postgres_exporter's DATA_SOURCE_* variables, and libpq's own environment and files.
    """
    problems: list[Problem] = []
    path = told.config or (Path(c) if (c := environment.get("PGVIGIL_CONFIG")) else None)
    document, sound = None, None
    if path:
        document, problems = documents.read(path)
        if document:
            faults, sound = documents.check(document, "config")
            problems += faults
    data: Mapping[str, Any] = sound or {}
    listen, place = next(
        (text, place)
        for text, place in (
            (told.listen, "--listen"),
            (environment.get("PGVIGIL_LISTEN"), "PGVIGIL_LISTEN"),
            (data.get("listen"), str(path)),
            (DEFAULT_LISTEN, ""),
        )
        if text
    )
    address = parse_address(listen)
    if address is None:
        text = "must be ADDRESS:PORT or :PORT with a port from 1 to 65535, such as :9187"
        if document and place == str(path):
            problems.append(document.problem(("listen",), f"listen {text}"))
        else:
            problems.append(Problem(place, None, text))
    shard = _shard(told, environment, problems)
    if document and path and "targets" in data:
        if told.dsn or environment.get("PGVIGIL_DSN"):
            # A --dsn with a password has become a PGVIGIL_DSN by now.
            text = "names targets, and --dsn or PGVIGIL_DSN is given as well; leave one out"
            problems.append(Problem(str(path), document.lines[("targets",)], text))
        targets = list(_from_file(document, data["targets"], path, problems))
    elif problems:
        targets = []
    else:
        targets = list(_from_words(told.dsn, environment, problems))
    if problems or not address:
        raise Refused(problems)
    own = [path.parent / name for name in data.get("catalogue", ())] if path else []
    enable = (*told.enable, *environment.get("PGVIGIL_ENABLE", "").split())
    disable = (*told.disable, *environment.get("PGVIGIL_DISABLE", "").split())
    targets = [
        replace(t, enable=(*t.enable, *enable), disable=(*t.disable, *disable)) for t in targets
    ]
    read = (path,) if path else ()
    return Settings(address, targets, (*own, *told.catalogue), shard, files=read)


def _shard(told: Told, environment: Mapping[str, str], problems: list[Problem]) -> Shard:
    """Which part of the targets is ours."""
    text, place = told.shard, "--shard"
    if text is None:
        text, place = environment.get("PGVIGIL_SHARD"), "PGVIGIL_SHARD"
    if not text and place == "PGVIGIL_SHARD":
        return WHOLE
    shard = parse_shard(text or "")
    if shard is None:
        meant = "I/N or NAME-I/N with I from 0 to N - 1, such as 0/3 or pgvigil-2/3"
        problems.append(Problem(place, None, f"must be {meant}, and N at most {MOST}"))
    return shard or WHOLE


def parse_address(text: str) -> Address | None:
    """`host:port`, `[v6]:port` or `:port`; None when it is none of these."""
    found = _LISTEN.fullmatch(text)
    if not found or not 0 <= int(found["port"]) <= 65535:
        return None
    return Address(found["host"].strip("[]"), int(found["port"]))


def has_password(dsn: str) -> bool:
    """Whether a connection string carries a password that a process list would show."""
    try:
        return not _SECRETS.isdisjoint(_parse(dsn))
    except ValueError:
        return True  # what cannot be read may hold one anywhere


def libpq_defaults() -> dict[str, str]:
    """What libpq takes where nothing is said: its environment, PGSERVICE's section, its own."""
    return {
        option.keyword.decode(): option.val.decode(errors="replace")
        for option in pq.Conninfo.get_defaults()
        if option.val and option.keyword != b"password"
    }


def _from_file(
    document: documents.Document, raws: Mapping[str, Any], path: Path, problems: list[Problem]
) -> Iterator[Target]:
    for name, raw in raws.items():
        keys: documents.Keys = ("targets", name)
        if "dsn" in raw and "connection" in raw:
            text = "has both dsn and connection; write one"
            problems.append(document.problem((*keys, "connection"), text))
        connection = {key: str(value) for key, value in raw.get("connection", {}).items()}
        for key, text in _bad_keywords(connection):
            problems.append(document.problem((*keys, "connection", key), text))
        if "dsn" in raw:
            try:
                connection = _parse(raw["dsn"])
            except ValueError:
                problems.append(document.problem((*keys, "dsn"), _BAD_DSN))
        password_file = None
        if "password_file" in raw:
            password_file = path.parent / raw["password_file"]
            if fault := _unreadable(password_file):
                problems.append(document.problem((*keys, "password_file"), fault))
            if "password" in connection:
                text = "there is a password already; write one of the two"
                problems.append(document.problem((*keys, "password_file"), text))
        problems += _bad_patterns(document, keys, raw)
        if raw.get("kind") == "pgbouncer":
            for key, text in _not_for_pgbouncer(raw, connection):
                problems.append(document.problem((*keys, key), text))
            connection["dbname"] = _CONSOLE
        for key, text in _not_for_commands(raw):
            problems.append(document.problem((*keys, key), text))
        chosen = {key: raw[key] for key in _CHOICES if key in raw}
        yield Target(
            name,
            connection,
            password_file,
            raw.get("labels", {}),
            raw.get("pooler", False),
            objectives=tuple(
                expected.objectives(
                    document, (*keys, "objectives"), raw.get("objectives", {}), problems
                )
            ),
            declared=expected.declared(raw.get("declared", {})),
            maintenance=tuple(
                expected.maintenance(
                    document, (*keys, "maintenance"), raw.get("maintenance", ()), problems
                )
            ),
            **chosen,
        )


def _bad_keywords(connection: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What libpq would not take, or would show: the keyword and what is wrong."""
    for key, value in connection.items():
        if key not in _KEYWORDS:
            near = difflib.get_close_matches(key, _KEYWORDS, 1)
            guess = f"did you mean {near[0]!r}?" if near else "see libpq's list of them"
            yield key, f"{documents.spoken(key)!r} is no connection keyword of libpq; {guess}"
        elif "\0" in value:
            yield key, f"{key} holds a NUL, where libpq takes it to end"
    for key in _misplaced(connection):
        yield key, f"{key} {_MISPLACED}"


def _not_for_pgbouncer(
    raw: Mapping[str, Any], connection: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """What a target of that kind may not say: the key and what is wrong."""
    for key in _OF_POSTGRESQL:
        if key in raw:
            yield key, f"{key} is for targets of kind postgresql; drop it"
    if connection.get("dbname", _CONSOLE) != _CONSOLE:
        text = f"PgBouncer answers for itself in the database {_CONSOLE} alone; leave dbname out"
        yield "dsn" if "dsn" in raw else "connection", text


def _not_for_commands(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a target that is a command may not say, and what only such a one may."""
    kind = raw.get("kind")
    if kind not in COMMANDS:
        if "command" in raw:
            text = f"command is for targets of kind {', '.join(COMMANDS)}; drop it"
            yield "command", text
        return
    for key in (*_OF_POSTGRESQL, "dsn", "connection", "password_file", "declared"):
        if key in raw:
            yield key, f"{key} says nothing to {kind}, which has its own configuration; drop it"


def _bad_patterns(
    document: documents.Document, keys: documents.Keys, raw: Mapping[str, Any]
) -> Iterator[Problem]:
    for key in ("include_databases", "exclude_databases"):
        for position, pattern in enumerate(raw.get(key, ())):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                text = f"{pattern!r} is no regular expression: {error}"
                yield document.problem((*keys, key, position), text)


def _from_words(
    dsn: str | None, environment: Mapping[str, str], problems: list[Problem]
) -> Iterator[Target]:
    """The target of --dsn or PGVIGIL_DSN, those of DATA_SOURCE_*, or libpq's own."""
    text, place = dsn, "--dsn"
    if not text:
        text, place = environment.get("PGVIGIL_DSN"), "PGVIGIL_DSN"
    if text:
        texts = [text]
    elif text := environment.get("DATA_SOURCE_NAME"):
        place = "DATA_SOURCE_NAME"
        texts = [part for part in _split(text) if part.strip()]
    elif any(f"DATA_SOURCE_{part}" in environment for part in _PARTS):
        yield from _from_parts(environment, problems)
        return
    else:
        for key in _misplaced(libpq_defaults()):
            problems.append(Problem(_PLACES[key], None, _MISPLACED))
        yield Target(_name({}, set()))
        return
    names: set[str] = set()
    for part in texts:
        try:
            connection = _parse(part)
        except ValueError:
            problems.append(Problem(place, None, _BAD_DSN))
            continue
        yield Target(_name(connection, names), connection)


def _from_parts(environment: Mapping[str, str], problems: list[Problem]) -> Iterator[Target]:
    """DATA_SOURCE_URI, _USER and _PASS with their _FILE forms, as postgres_exporter takes them.

    User and password stand as they are, without any encoding; the URI has no scheme.
    """
    found: dict[str, str] = {}
    for part in ("URI", "USER", "PASS"):
        place = f"DATA_SOURCE_{part}_FILE"
        if path := environment.get(place):
            if fault := _unreadable(Path(path)):
                problems.append(Problem(place, None, f"{path}: {fault}"))
                continue
            if part != "PASS":
                found[part] = read_secret(Path(path)).strip()
        elif f"DATA_SOURCE_{part}" in environment:
            found[part] = environment[f"DATA_SOURCE_{part}"]
    uri = found.get("URI", "")
    try:
        connection = _parse(uri if "://" in uri else f"postgresql://{uri}")
    except ValueError:
        problems.append(Problem("DATA_SOURCE_URI", None, _BAD_DSN))
        return
    if "USER" in found:
        connection["user"] = found["USER"]
    if "PASS" in found:
        connection["password"] = found["PASS"]
    path = environment.get("DATA_SOURCE_PASS_FILE")
    yield Target(_name(connection, set()), connection, Path(path) if path else None)


def _parse(dsn: str) -> dict[str, str]:
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
    if _misplaced(found):
        raise ValueError
    return found


def _misplaced(connection: Mapping[str, str]) -> list[str]:
    """The keywords that are shown to everybody and hold a whole connection string."""
    return [key for key in _PLACES if _WHOLE.search(connection.get(key, ""))]


def _split(text: str) -> Iterator[str]:
    """The connection strings of a list with commas; a comma inside one is left alone."""
    begin = 0
    for found in (_NEXT_URI if _URI.match(text) else _NEXT_KEYWORDS).finditer(text):
        if found["comma"]:
            yield text[begin : found.start()]
            begin = found.end()
    yield text[begin:]


def _name(connection: Mapping[str, str], taken: set[str]) -> str:
    known = {**libpq_defaults(), **connection}
    host = known.get("host") or known.get("hostaddr") or "localhost"
    base = re.sub(r"[^A-Za-z0-9_.:-]+", "-", f"{host}:{known.get('port', '5432')}").strip("-")
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    taken.add(name)
    return name


def _unreadable(path: Path) -> str | None:
    """Why a password file cannot be used, if so."""
    try:
        read_secret(path)
    except OSError as error:
        return f"the password file cannot be read: {error.strerror}; mind its path, owner and mode"
    return None


_SECRETS = {o.keyword.decode() for o in pq.Conninfo.get_defaults() if o.dispchar == b"*"}
_KEYWORDS = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
