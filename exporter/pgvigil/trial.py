"""Run one query on a server and show its rows, and the series they become."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pgvigil import computed, render
from pgvigil.catalogue import Query
from pgvigil.errors import QueryFailed
from pgvigil.kinds import open_source
from pgvigil.plan import Facts, Loss, make_plan, wanted
from pgvigil.source import Answers, Ask, Rows
from pgvigil.target import Target

_WIDTH = 40
"""Characters of a value that a table shows."""


@dataclass(slots=True)
class Trial:
    """What one query came to on one server."""

    facts: Facts
    text: str = ""
    """The statement as the server got it."""
    losses: Sequence[Loss] = ()
    columns: list[str] = field(default_factory=list)
    rows: list[list[str | None]] = field(default_factory=list)
    series: list[str] = field(default_factory=list)
    """As the text format writes them, with their HELP and TYPE lines."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    failure: QueryFailed | None = None


async def run(target: Target, query: Query, database: str | None, seconds: float) -> Trial:
    """Ask one query under the guards of a scrape, though it may be opt-in or disabled.

    Raises Unreachable, and TimeoutError after `seconds`.
    """
    if database is not None:
        target = replace(target, connection={**target.connection, "dbname": database})
    deadline = asyncio.get_running_loop().time() + seconds
    session = await open_source(target, wanted([query]), deadline)
    try:
        facts = await session.facts(deadline)
        plan = make_plan([query], facts)
        if plan.refusals:
            refusal = plan.refusals[0]
            return Trial(facts, failure=QueryFailed(refusal.reason, refusal.detail))
        (statement,) = plan.statements
        labels = dict(target.labels)
        if query.scope == "database":
            labels["datname"] = facts.database
        trial = Trial(facts, statement.text, plan.losses)
        sheet = computed.layout(statement, labels, target.limits).sheet()

        def take(_: int, rows: Rows) -> None:
            trial.columns = [_text(rows.fname(column)) or "" for column in range(rows.nfields)]
            trial.rows += (
                [_text(rows.get_value(row, column)) for column in range(rows.nfields)]
                for row in range(rows.ntuples)
            )
            if trial.failure is None:
                try:
                    sheet.add(rows)
                except QueryFailed as failure:
                    trial.failure = failure

        def end(_: int, failure: QueryFailed | None, took: float) -> None:
            trial.failure, trial.seconds = failure or trial.failure, took

        await session.ask([Ask(statement.text, query.timeout)], Answers(take, end), deadline)
    finally:
        session.close()
    if trial.failure is None:
        sheet.finish()
        page = b"".join(render.write(sheet.families, openmetrics=False, process=False))
        trial.series, trial.dropped = page.decode().splitlines(), sheet.dropped
    return trial


def table(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> Iterator[str]:
    """The lines of a table for a terminal; NULL stands as nothing."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for position, row in enumerate(cells):
        yield "  ".join(v.ljust(width) for v, width in zip(row, widths, strict=True)).rstrip()
        if position == 0:
            yield "  ".join("-" * width for width in widths)


def _cell(value: str | None) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in value or "")
    return shown if len(shown) <= _WIDTH else shown[: _WIDTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
