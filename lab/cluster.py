"""Prepares a primary with its standby and the roles that the exporter may meet."""

from dataclasses import dataclass
from typing import Self

from psycopg import sql

from lab.binaries import find
from lab.postgres import Server


@dataclass(frozen=True)
class Role:
    """A database user and what it is granted."""

    name: str
    password: str
    grants: tuple[str, ...] = ()
    connection_limit: int = -1

    @property
    def login(self) -> dict[str, str]:
        """The keywords `Server.conninfo` takes to connect as this role."""
        return {"user": self.name, "password": self.password}


# The password holds what breaks naive quoting in connection strings, URLs, YAML and shells.
PGVIGIL = Role("pgvigil", "p@ss w'or\\d/:?#%41&=\"é$}{", ("pg_monitor",), connection_limit=5)
"""The role our documentation tells people to create."""

READER = Role("reader", "reader", ("pg_read_all_stats",))
"""A role that reads statistics and no settings or functions beyond them."""

BARE = Role("bare", "bare")
"""A role that may log in and nothing more."""

ROLES = (PGVIGIL, READER, BARE)


@dataclass(frozen=True)
class Cluster:
    """A primary and a standby that streams from it through the slot `standby`."""

    primary: Server
    standby: Server

    @classmethod
    def start(cls, major: int) -> Self:
        """Start both, with the roles, and with TLS where the build has it."""
        binaries = find(major)
        primary = Server(major, binaries=binaries, tls=binaries.tls)
        try:
            standby = primary.standby(slot="standby")
            prepare(primary)
            standby.wait_until("select exists (select from pg_roles where rolname = 'bare')")
        except BaseException:
            primary.destroy()
            raise
        return cls(primary, standby)

    @property
    def major(self) -> int:
        """The major version of both."""
        return self.primary.major

    def destroy(self) -> None:
        """Stop and remove both."""
        self.primary.destroy()


def prepare(server: Server) -> None:
    """Create the roles on a primary, and pg_stat_statements in the database `postgres`."""
    if server.binaries.has_library("pg_stat_statements"):
        server.execute("create extension pg_stat_statements")
    for role in ROLES:
        server.execute(
            sql.SQL("create role {} login password {} connection limit {}").format(
                sql.Identifier(role.name), role.password, role.connection_limit
            )
        )
        for grant in role.grants:
            server.execute(
                sql.SQL("grant {} to {}").format(sql.Identifier(grant), sql.Identifier(role.name))
            )
