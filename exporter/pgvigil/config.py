"""Read whom to watch, from the command line, the environment or one YAML file."""

import glob
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pgvigil import documents, dsn
from pgvigil.errors import Problem, Refused
from pgvigil.hosts import Allowed
from pgvigil.listed import Listing
from pgvigil.shard import MOST, WHOLE, Shard
from pgvigil.shard import parse as parse_shard
from pgvigil.target import Target, read_secret, unreadable

DEFAULT_LISTEN = ":9187"

_LISTEN = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[!-9;-~]*):(?P<port>[0-9]{1,5})")
_LISTS = {"targets", "auth_modules", "allow_hosts", "discovery"}
"""Keys of a file that says whom to watch."""
_PARTS = ("URI", "USER", "PASS", "URI_FILE", "USER_FILE", "PASS_FILE")


class Address(NamedTuple):
    """Where to listen; an empty host means every interface."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Cluster(NamedTuple):
    """One whose members Patroni tells."""

    url: str
    """Of a member's REST API."""
    module: str
    name: str
    """What the members' names begin with; empty for what Patroni calls it."""


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
    patterns: Sequence[str] = ()
    """For paths of more files with targets; one that comes is read as well."""
    modules: Mapping[str, Target] = field(default_factory=dict)
    """What targets that are not listed have in common, by the name of the auth_module."""
    allowed: Allowed | None = None
    """The hosts that a request may name; None where it may name none."""
    max_hosts: int = 100
    """The most hosts that are watched because requests have named them."""
    clusters: Sequence[Cluster] = ()
    """Those whose members are discovered."""

    @property
    def open_ended(self) -> bool:
        """Whether there may be other targets than those that are listed."""
        return self.allowed is not None or bool(self.clusters or self.patterns)

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
    settings = Settings(address or Address("", 0), (), (), shard)
    if document and path and not _LISTS.isdisjoint(data):
        if told.dsn or environment.get("PGVIGIL_DSN"):
            # A --dsn with a password has become a PGVIGIL_DSN by now.
            text = "names targets, and --dsn or PGVIGIL_DSN is given as well; leave one out"
            first = min(document.lines[(key,)] for key in _LISTS & data.keys())
            problems.append(Problem(str(path), first, text))
        settings = _listed(settings, document, data, path, problems)
    elif not problems:
        settings = replace(settings, targets=[*_from_words(told.dsn, environment, problems)])
    if problems:
        raise Refused(problems)
    own = [path.parent / name for name in data.get("catalogue", ())] if path else []
    enable = (*told.enable, *environment.get("PGVIGIL_ENABLE", "").split())
    disable = (*told.disable, *environment.get("PGVIGIL_DISABLE", "").split())

    def chosen(target: Target) -> Target:
        on, off = (*target.enable, *enable), (*target.disable, *disable)
        return replace(target, enable=on, disable=off)

    return replace(
        settings,
        targets=[chosen(target) for target in settings.targets],
        modules={name: chosen(module) for name, module in settings.modules.items()},
        catalogue=(*own, *told.catalogue),
        files=((path,) if path else ()) + tuple(settings.files),
    )


def _listed(
    settings: Settings,
    document: documents.Document,
    data: Mapping[str, Any],
    path: Path,
    problems: list[Problem],
) -> Settings:
    """The settings with the targets of a file, and of those that it names."""
    listing = Listing(document, path.parent, problems)
    modules = listing.modules(data.get("auth_modules", {}))
    targets = list(listing.targets(data.get("targets", {}), modules))
    where = {target.name: str(path) for target in targets}
    discovery = data.get("discovery", {})
    patterns = [str(Path(glob.escape(str(path.parent)), p)) for p in discovery.get("files", ())]
    files = sorted({Path(found) for pattern in patterns for found in glob.glob(pattern)})
    for file in files:
        more, faults = documents.read(file)
        problems += faults
        if not more:
            continue
        faults, sound = documents.check(more, "config")
        problems += faults
        for key in sorted((sound or {}).keys() - {"targets"}):
            text = f"{key} is for the configuration itself; this file is for targets alone"
            problems.append(more.problem((key,), text))
        raws = (sound or {}).get("targets", {})
        for target in Listing(more, file.parent, problems).targets(raws, modules):
            if target.name in where:
                text = f"target {target.name} stands in {where[target.name]}, too; drop one"
                problems.append(more.problem(("targets", target.name), text))
            where[target.name] = str(file)
            targets.append(target)
    allowed = listing.allowed(data["allow_hosts"]) if "allow_hosts" in data else None
    if allowed and not modules:
        text = "allow_hosts needs auth_modules, which say how to log in there"
        problems.append(document.problem(("allow_hosts",), text))
    clusters = []
    for position, raw in enumerate(discovery.get("patroni", ())):
        if {"url", "auth_module"} <= raw.keys():
            keys = "discovery", "patroni", position, "auth_module"
            listing.module(keys, raw["auth_module"], modules)
            clusters.append(Cluster(raw["url"], raw["auth_module"], raw.get("cluster", "")))
    return replace(
        settings,
        targets=targets,
        files=tuple(files),
        patterns=tuple(patterns),
        modules=modules,
        allowed=allowed,
        max_hosts=data.get("max_hosts", settings.max_hosts),
        clusters=tuple(clusters),
    )


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


def _from_words(
    given: str | None, environment: Mapping[str, str], problems: list[Problem]
) -> Iterator[Target]:
    """The target of --dsn or PGVIGIL_DSN, those of DATA_SOURCE_*, or libpq's own."""
    text, place = given, "--dsn"
    if not text:
        text, place = environment.get("PGVIGIL_DSN"), "PGVIGIL_DSN"
    if text:
        texts = [text]
    elif text := environment.get("DATA_SOURCE_NAME"):
        place = "DATA_SOURCE_NAME"
        texts = [part for part in dsn.split(text) if part.strip()]
    elif any(f"DATA_SOURCE_{part}" in environment for part in _PARTS):
        yield from _from_parts(environment, problems)
        return
    else:
        for key in dsn.misplaced(dsn.libpq_defaults()):
            problems.append(Problem(dsn.PLACES[key], None, dsn.MISPLACED))
        yield Target(_name({}, set()))
        return
    names: set[str] = set()
    for part in texts:
        try:
            connection = dsn.parse(part)
        except ValueError:
            problems.append(Problem(place, None, dsn.BAD_DSN))
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
            if fault := unreadable(Path(path)):
                problems.append(Problem(place, None, f"{path}: {fault}"))
                continue
            if part != "PASS":
                found[part] = read_secret(Path(path)).strip()
        elif f"DATA_SOURCE_{part}" in environment:
            found[part] = environment[f"DATA_SOURCE_{part}"]
    uri = found.get("URI", "")
    try:
        connection = dsn.parse(uri if "://" in uri else f"postgresql://{uri}")
    except ValueError:
        problems.append(Problem("DATA_SOURCE_URI", None, dsn.BAD_DSN))
        return
    if "USER" in found:
        connection["user"] = found["USER"]
    if "PASS" in found:
        connection["password"] = found["PASS"]
    path = environment.get("DATA_SOURCE_PASS_FILE")
    yield Target(_name(connection, set()), connection, Path(path) if path else None)


def _name(connection: Mapping[str, str], taken: set[str]) -> str:
    known = {**dsn.libpq_defaults(), **connection}
    host = known.get("host") or known.get("hostaddr") or "localhost"
    base = re.sub(r"[^A-Za-z0-9_.:-]+", "-", f"{host}:{known.get('port', '5432')}").strip("-")
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    taken.add(name)
    return name
