"""Makes up results as libpq gives them, and statements that have them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from pgvigil.catalogue import Metric, Needs, Query, Top, Variant
from pgvigil.plan import Statement
from pgvigil.source import Rows

BOOL, INT8, TEXT, FLOAT8, NUMERIC = 16, 20, 25, 701, 1700


class Column(NamedTuple):
    """A column of a result: its name, the OID of its type and its values as the server writes."""

    name: str
    oid: int
    values: Sequence[bytes | None]


class Result:
    """A result as libpq gives it, as far as rendering asks."""

    def __init__(self, *columns: Column) -> None:
        self._columns = columns
        self.nfields = len(columns)
        self.ntuples = len(columns[0].values)

    def fname(self, column: int) -> bytes:
        """The column's name."""
        return self._columns[column].name.encode()

    def ftype(self, column: int) -> int:
        """The OID of the column's type."""
        return self._columns[column].oid

    def get_value(self, row: int, column: int) -> bytes | None:
        """A value as the server writes it; None for NULL."""
        return self._columns[column].values[row]


def rows(*columns: Column) -> Rows:
    """A result with these columns, all of one length."""
    return cast(Rows, Result(*columns))


def statement(
    *names: str,
    labels: Sequence[str] = (),
    max_series: int = 100,
    text: str = "What it is.",
    top: Top | None = None,
    **other: str,
) -> Statement:
    """A statement whose metrics come from columns of the same names.

    `other` says for gauges of a `top` what they are on the row other.
    """
    metrics = tuple(
        Metric(
            n,
            n,
            "counter" if n.endswith("_total") else "gauge",
            text,
            n,
            0,
            1000,
            other=other.get(n, ""),
        )
        for n in names
    )
    query = Query(
        "area.query",
        "Somebody wants to know.",
        "any",
        Needs(),
        1.0,
        max_series,
        tuple(labels),
        (Variant(0, 1000, "select"),),
        metrics,
        "catalogue/area.yml",
        1,
    )
    return Statement(replace(query, top=top), "select", metrics)
