"""Read what an operator expects of a target: numbers, names, and when it is being worked on."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from functools import cache
from typing import Any

from pgvigil import standards
from pgvigil.documents import Document, Keys, spoken
from pgvigil.errors import Problem
from pgvigil.maintenance import DAYS, Once, Weekly, Window
from pgvigil.standards import Objective

_A_DAY = 86400


def objectives(
    document: Document, keys: Keys, raw: Mapping[str, Any], problems: list[Problem]
) -> Iterator[Objective]:
    """The numbers that the operator has in place of the standards' own."""
    if not raw:
        return
    known = [of[:3] for of in standards.objectives()]
    for standard, by_name in raw.items():
        for name, by_severity in by_name.items():
            for severity, value in by_severity.items():
                path = standard, name, severity
                if name == standards.LATENCY and not 0 < value <= _A_DAY:
                    text = f"a limit of latency must be above 0 and at most {_A_DAY} seconds"
                    problems.append(document.problem((*keys, *path), text))
                elif path in known:
                    yield Objective(*path, float(value))
                else:
                    depth, text = _unknown(path, known)
                    problems.append(document.problem((*keys, *path[: depth + 1]), text))


@cache
def completed(own: tuple[Objective, ...]) -> tuple[Objective, ...]:
    """All objectives of the standards, with the operator's numbers in their place.

    The same comes back for the same: most targets of a fleet have no number of their own.
    """
    values = {of[:3]: of.value for of in own}
    return tuple(of._replace(value=values.get(of[:3], of.value)) for of in standards.objectives())


def _unknown(path: Sequence[str], known: Sequence[Sequence[str]]) -> tuple[int, str]:
    """How deep in a path the first word stands that no objective has, and what to write there."""
    depth = next(
        depth for depth in range(3) if not any(path[: depth + 1] == k[: depth + 1] for k in known)
    )
    what = ("standard with an objective", f"objective of {path[0]}", f"severity of {path[1]}")
    names = list(dict.fromkeys(k[depth] for k in known if k[:depth] == path[:depth]))
    near = difflib.get_close_matches(path[depth], names, 1) if depth == 0 else []
    guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return depth, f"{spoken(path[depth])!r} is no {what[depth]}; {guess}"


def declared(raw: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Kinds and names of what is as it shall be."""
    role = [("role", raw["role"])] if "role" in raw else []
    superusers = [("superuser", name) for name in raw.get("superusers", ())]
    return (*role, *superusers, *(("tenant_table", name) for name in raw.get("tenant_tables", ())))


def maintenance(
    document: Document, keys: Keys, raws: Sequence[Mapping[str, Any]], problems: list[Problem]
) -> Iterator[Window]:
    """The windows in which a target is worked on."""
    for position, raw in enumerate(raws):
        try:
            yield _window(raw)
        except ValueError as error:
            problem = document.problem((*keys, position), str(error))
            # What the schema has refused is not in `raw`, and was told of.
            if not any(other.line == problem.line for other in problems):
                problems.append(problem)


def _window(raw: Mapping[str, Any]) -> Window:
    if raw.keys() not in ({"from", "until"}, {"at", "hours"}, {"days", "at", "hours"}):
        raise ValueError("a window is {from, until}, or {at, hours} with or without days")
    if "from" in raw:
        begins, ends = _moment(raw["from"]), _moment(raw["until"])
        if begins >= ends:
            raise ValueError("the window ends before it begins; mind from and until")
        return Once(begins, ends)
    hours, minutes = raw["at"].split(":")
    days = frozenset(DAYS.index(day) for day in raw.get("days", DAYS))
    lasts = timedelta(hours=raw["hours"])
    return Weekly(days, time(int(hours), int(minutes)), lasts)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(
            f"{spoken(text)!r} must be a time with its zone, such as 2026-12-01T22:00:00Z"
        )
    return moment.astimezone(UTC)
