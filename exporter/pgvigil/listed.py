"""Read targets as a file lists them, and what they have in common."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgvigil import dsn, expected, hosts
from pgvigil.documents import Document, Keys, spoken
from pgvigil.errors import Problem
from pgvigil.hosts import Allowed
from pgvigil.target import COMMANDS, Target, unreadable

_CHOICES = (
    *("enable", "disable", "include_databases", "exclude_databases"),
    *("max_databases", "max_series", "latency_limits", "kind", "command", "pooler"),
)
_OF_POSTGRESQL = (
    *("pooler", "include_databases", "exclude_databases", "max_databases", "latency_limits"),
)
"""What a target of another kind has no use for."""
_OF_ONE_HOST = {"host", "hostaddr", "service"}
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_CONSOLE = "pgbouncer"
"""The database under whose name PgBouncer answers itself."""


class Listing:
    """One file, what it says of targets, and what is wrong with that."""

    def __init__(self, document: Document, folder: Path, problems: list[Problem]) -> None:
        """Paths in it are relative to `folder`; what is wrong is added to `problems`."""
        self._document = document
        self._folder = folder
        self._problems = problems
        self._modules: Mapping[str, Target] = {}

    def modules(self, raws: Mapping[str, Any]) -> Mapping[str, Target]:
        """What targets may have in common, by the names of `auth_modules`."""
        found = {}
        for name, raw in raws.items():
            keys: Keys = ("auth_modules", name)
            for key in ("auth_module", "command"):
                if key in raw:
                    self._tell((*keys, key), f"{key} is for targets; drop it here")
            if raw.get("kind") in COMMANDS:
                self._tell((*keys, "kind"), f"a {raw['kind']} is no host; list it as a target")
            found[name] = module = self._target(keys, name, raw)
            for key in sorted(_OF_ONE_HOST & module.connection.keys()):
                place = "dsn" if "dsn" in raw else "connection"
                text = f"{key} says whom to watch, which is for the targets; drop it here"
                self._tell((*keys, place, key), text)
        return found

    def targets(self, raws: Mapping[str, Any], modules: Mapping[str, Target]) -> Iterator[Target]:
        """The targets, with what they take from the modules they name."""
        self._modules = modules
        for name, raw in raws.items():
            yield self._target(("targets", name), name, raw)

    def module(self, keys: Keys, name: str, known: Iterable[str]) -> None:
        """Tell of a name, at `keys`, that no module has."""
        names = ", ".join(known)
        if name not in known:
            there = f"there are {names}" if names else "the file has no auth_modules"
            self._tell(keys, f"{spoken(name)!r} is no auth_module; {there}")

    def allowed(self, raw: Sequence[str]) -> Allowed:
        """The hosts that requests may name."""
        found, faults = hosts.allowed(raw)
        for position, text in faults.items():
            self._tell(("allow_hosts", position), f"allow_hosts.{position} {text}")
        return found

    def _tell(self, keys: Keys, text: str) -> None:
        self._problems.append(self._document.problem(keys, text))

    def _target(self, keys: Keys, name: str, raw: Mapping[str, Any]) -> Target:
        base = Target(name)
        if "auth_module" in raw and keys[0] == "targets":
            self.module((*keys, "auth_module"), raw["auth_module"], self._modules)
            base = self._modules.get(raw["auth_module"], base)
        kind = raw.get("kind", base.kind)
        connection = self._connection(keys, raw)
        secret = self._secret(keys, raw, connection)
        self._problems += _bad_patterns(self._document, keys, raw)
        if kind == "pgbouncer":
            for key, text in _not_for_pgbouncer(raw, connection):
                self._tell((*keys, key), text)
            connection["dbname"] = _CONSOLE
        for key, text in _not_for_commands(kind, raw):
            self._tell((*keys, key), text)
        chosen = {key: raw[key] for key in _CHOICES if key in raw}
        if "declared" in raw:
            chosen["declared"] = expected.declared(raw["declared"])
        if "maintenance" in raw:
            at = (*keys, "maintenance")
            windows = expected.maintenance(self._document, at, raw["maintenance"], self._problems)
            chosen["maintenance"] = tuple(windows)
        at = (*keys, "objectives")
        own = expected.objectives(self._document, at, raw.get("objectives", {}), self._problems)
        inherited = base.connection
        if secret or "password" in connection:
            inherited = {key: value for key, value in inherited.items() if key != "password"}
            base = replace(base, password_file=None, password_command=())
        return replace(
            base,
            name=name,
            connection={**inherited, **connection},
            labels={**base.labels, **raw.get("labels", {})},
            objectives=(*base.objectives, *own),
            **secret,
            **chosen,
        )

    def _connection(self, keys: Keys, raw: Mapping[str, Any]) -> dict[str, str]:
        if "dsn" in raw and "connection" in raw:
            self._tell((*keys, "connection"), "has both dsn and connection; write one")
        connection = {key: str(value) for key, value in raw.get("connection", {}).items()}
        for key, text in dsn.bad_keywords(connection):
            self._tell((*keys, "connection", key), text)
        if "dsn" in raw:
            try:
                connection = dsn.parse(raw["dsn"])
            except ValueError:
                self._tell((*keys, "dsn"), dsn.BAD_DSN)
        return connection

    def _secret(
        self, keys: Keys, raw: Mapping[str, Any], connection: Mapping[str, str]
    ) -> dict[str, Any]:
        """Where the password comes from, when it does not stand in the connection."""
        found: dict[str, Any] = {}
        if "password_file" in raw:
            found["password_file"] = path = self._folder / raw["password_file"]
            if fault := unreadable(path):
                self._tell((*keys, "password_file"), fault)
        if "password_command" in raw:
            found["password_command"] = tuple(raw["password_command"])
            lifetime = raw.get("password_lifetime", "10m")
            found["password_lifetime"] = int(lifetime[:-1]) * _UNITS[lifetime[-1]]
        elif "password_lifetime" in raw:
            text = "password_lifetime is for a password_command; drop it"
            self._tell((*keys, "password_lifetime"), text)
        ways = [key for key in ("password_file", "password_command") if key in raw]
        if ways and ("password" in connection or len(ways) > 1):
            text = "there is a password already; write one of the two"
            self._tell((*keys, ways[-1]), text)
        return found


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


def _not_for_commands(kind: str, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a target that is a command may not say, and what only such a one may."""
    if kind not in COMMANDS:
        if "command" in raw:
            text = f"command is for targets of kind {', '.join(COMMANDS)}; drop it"
            yield "command", text
        return
    others = ("auth_module", "dsn", "connection", "password_file", "password_command", "declared")
    for key in (*_OF_POSTGRESQL, *others):
        if key in raw:
            yield key, f"{key} says nothing to {kind}, which has its own configuration; drop it"


def _bad_patterns(document: Document, keys: Keys, raw: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("include_databases", "exclude_databases"):
        for position, pattern in enumerate(raw.get(key, ())):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                text = f"{pattern!r} is no regular expression: {error}"
                yield document.problem((*keys, key, position), text)
