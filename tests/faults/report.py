"""Writes down what was told of each fault: for a terminal as it comes in, and as a page."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.faults import alerts
from tests.faults.fault import Alert, Result, named
from tests.faults.kept import Played
from tests.faults.matrix import FAULTS

_BLOCK = re.compile(r"(<!-- played -->\n).*?(<!-- end -->)", re.DOTALL)


def line(name: str, result: Result) -> str:
    """One result for a terminal."""
    told = [
        f"{named(what)} after {told.came:.0f} s, over after {told.went:.0f} s"
        for what, told in result.told.items()
    ]
    words = [f"{'broken: ' if result.broken else ''}{name}"]
    return "\n    ".join([*words, *told, *(f"BROKEN {what}" for what in result.broken)])


def write(page: Path, facts: str, played: Played) -> None:
    """Put the tables into the block of a page that is kept for them."""
    tables = "\n".join(_tables(facts, played))
    text = page.read_text("utf-8")
    page.write_text(_BLOCK.sub(lambda found: f"{found[1]}{tables}\n{found[2]}", text), "utf-8")


def _tables(facts: str, played: Played) -> Iterator[str]:
    proven = alerts.proven()
    shipped = alerts.shipped()
    yield facts
    yield ""
    yield (
        f"Of {len(shipped)} alerts, a page and a ticket of one name counted as two, "
        f"{len(shipped & proven)} are fired by real faults."
    )
    yield ""
    heads = "".join(f" {major}: told, over |" for major in played)
    yield f"| what happens | alert or finding |{heads}"
    yield "|---|---|" + "---|" * len(played)
    for fault in FAULTS:
        for number, expected in enumerate(fault.expected):
            cells = "".join(f" {_cell(of.get(fault.name), expected)} |" for of in played.values())
            yield f"| {'' if number else fault.name} | {named(expected)} |{cells}"
    yield ""
    yield "Proven by series in [rules/tests](../rules/tests) alone:"
    yield ""
    for (name, severity), reason in sorted(alerts.BY_SERIES.items()):
        yield f"- `{name}`, {severity}: {reason}"
    if missing := sorted(shipped - proven - alerts.BY_SERIES.keys()):
        yield ""
        yield "Still to come:"
        yield ""
        for name, severity in missing:
            yield f"- `{name}`, {severity}"


def _cell(result: Result | None, expected: Alert | str) -> str:
    if result is None:
        return "–"
    told = result.told.get(expected)
    return f"{told.came:.0f} s, {told.went:.0f} s" if told else "✗"
