"""Say what a target is: a server to watch, and how to reach it."""

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pgvigil import dsn
from pgvigil.errors import printable
from pgvigil.hosts import Allowed
from pgvigil.maintenance import Window
from pgvigil.standards import LATENCY, Objective

COMMANDS = ("pgbackrest", "barman", "wal-g")
"""The kinds that are no servers but programs, each the name of its own."""


@dataclass(frozen=True, slots=True)
class Target:
    """One server to watch, and how to reach it."""

    name: str
    connection: Mapping[str, str] = field(default_factory=dict, repr=False)
    """libpq's keywords; what is absent libpq takes from its own environment and files."""
    password_file: Path | None = None
    password_command: Sequence[str] = ()
    """What is run to be told the password; `password` knows how."""
    password_lifetime: float = 600.0
    """Seconds for which a password that was told so is good."""
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
    allowed: Allowed | None = None
    """Where the host's name may lead, where a request has named it."""

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
        known = {**dsn.libpq_defaults(), **self.connection}
        host = known.get("host") or known.get("hostaddr") or "local socket"
        if known.get("service") and "host" not in self.connection:
            return printable(f"service {known['service']}")
        return printable(f"{host}:{known.get('port', '5432')}/{known.get('dbname', '')}")


def read_secret(path: Path) -> str:
    """A file's text without the line end that editors and `echo` leave; raises OSError."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "it is not UTF-8 text") from None
    except ValueError:
        raise OSError(errno.EINVAL, "no path holds a NUL") from None
    return re.sub(r"\r?\n\Z", "", text)


def unreadable(path: Path) -> str | None:
    """Why a password file cannot be used, if so."""
    try:
        read_secret(path)
    except OSError as error:
        return f"the password file cannot be read: {error.strerror}; mind its path, owner and mode"
    return None
