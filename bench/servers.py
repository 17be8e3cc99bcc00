"""Starts the PostgreSQL servers that are measured on, each when it is first asked for."""

from functools import cached_property

from lab.postgres import Server

DATABASES = 100
TABLES = 5000
ROLE = "monitor"
"""A member of pg_monitor, as both exporters' documentation asks for."""

_TABLES_AT_ONCE = 500
"""In one transaction: each holds locks."""


class Servers:
    """The servers of one run."""

    def __init__(self, major: int) -> None:
        self.major = major
        self._started: list[Server] = []

    @cached_property
    def plain(self) -> Server:
        """A server as initdb leaves it."""
        return self._start(50)

    @cached_property
    def crowded(self) -> Server:
        """A server with many databases."""
        server = self._start(50)
        for number in range(DATABASES - len(server.execute("select from pg_database"))):
            server.execute(f"create database db_{number} template template0")
        return server

    @cached_property
    def wide(self) -> Server:
        """A server whose database `wide` has many tables."""
        server = self._start(50)
        server.execute("create database wide")
        for first in range(0, TABLES, _TABLES_AT_ONCE):
            server.execute(
                f"""do $$ begin
                  for number in {first} .. {first + _TABLES_AT_ONCE - 1} loop
                    execute pg_catalog.format(
                      'create table table_%s (id int primary key, word text)', number);
                    execute pg_catalog.format(
                      'insert into table_%s select n, n from generate_series(1, 20) n', number);
                  end loop;
                end $$""",
                database="wide",
            )
        server.execute("analyze", database="wide")
        return server

    @cached_property
    def busy(self) -> Server:
        """A server with room for a fleet's connections."""
        return self._start(600)

    @cached_property
    def four(self) -> list[Server]:
        """Servers with room for the connections of 125 targets each."""
        return [self._start(400) for _ in range(4)]

    def destroy(self) -> None:
        """Remove all of them."""
        for server in self._started:
            server.destroy()

    def _start(self, max_connections: int) -> Server:
        server = Server(
            self.major,
            # Nobody pays for passwords, which would cost the peer more: it connects each time.
            hba=("host all all 127.0.0.1/32 trust",),
            # Autovacuum would work at one exporter's time and not at the other's.
            settings={"autovacuum": False, "max_connections": max_connections},
        )
        self._started.append(server)
        server.start()
        server.execute(f"create role {ROLE} login in role pg_monitor")
        return server


def dsn(server: Server, database: str = "postgres", port: int | None = None) -> str:
    """Return the connection string both exporters get."""
    return f"postgresql://{ROLE}@127.0.0.1:{port or server.port}/{database}?sslmode=disable"
