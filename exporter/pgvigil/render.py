"""Write rows and states as exposition text, straight from the server's own spelling of values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_latest

from pgvigil.errors import QueryFailed
from pgvigil.plan import Statement
from pgvigil.source import Rows

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_BOOL = 16
_INTEGERS = {20, 21, 23, 26, 28, 5069}
"""The OIDs of int8, int2, int4, oid, xid and xid8 in pg_type.dat."""
_NUMERIC = 1700
_DIGITS = 300
"""Characters up to which a numeric is no number too large for a float, which a reader refuses."""
_FLOATS = {700, 701, _NUMERIC}
"""The OIDs of float4, float8 and numeric."""
_MANY = 8
_SHAPES = 4096
_LABEL = 1024
"""Bytes of a label's value that are shown; what is longer is cut."""
_ENDLESS = {b"Infinity": b"+Inf", b"-Infinity": b"-Inf"}
_TRUTH = {b"t": b"1", b"f": b"0", None: None}

_registry = CollectorRegistry(auto_describe=False)
ProcessCollector(registry=_registry)

Labels = tuple[tuple[str, str], ...]
"""Names and values."""


class Headers(NamedTuple):
    """What stands above the samples of a metric, in each format."""

    text: bytes
    openmetrics: bytes


@cache
def headers(name: str, kind: str, about: str) -> Headers:
    """The HELP and TYPE lines of a metric; `kind` is gauge or counter."""
    about = about.replace("\\", r"\\").replace("\n", r"\n")
    family = name.removesuffix("_total") if kind == "counter" else name
    quoted = about.replace('"', r"\"")
    return Headers(
        f"# HELP {name} {about}\n# TYPE {name} {kind}".encode(),
        f"# HELP {family} {quoted}\n# TYPE {family} {kind}".encode(),
    )


@dataclass(slots=True)
class Family:
    """One metric with all its samples, as bytes that both formats share."""

    headers: Headers
    chunks: list[bytes] = field(default_factory=list)
    """Samples, each with a line break before it and none after."""

    def write(self, *, openmetrics: bool) -> Iterator[bytes]:
        """The family in one of the two formats; nothing when it has no sample."""
        if self.chunks:
            yield self.headers.openmetrics if openmetrics else self.headers.text
            yield from self.chunks
            yield b"\n"


class Shape:
    """All that is the same in each run of a statement, on whatever server."""

    __slots__ = (
        *("max_rows", "labels", "columns", "counters", "headers", "prefixes"),
        *("plain", "_columns", "_found"),
    )

    def __init__(self, statement: Statement) -> None:
        self.max_rows = statement.max_rows
        self.labels = statement.query.labels
        self.columns = [metric.column for metric in statement.metrics]
        self.counters = [metric.type == "counter" for metric in statement.metrics]
        self.headers = [headers(m.name, m.type, m.help) for m in statement.metrics]
        self.prefixes = [f"\n{metric.name}".encode() for metric in statement.metrics]
        self.plain = template({}, self.labels)
        """The template where no constant label is added."""
        self._columns: list[tuple[bytes | None, int]] = []
        self._found: tuple[list[int], list[tuple[int, int]]] = [], []

    def find(self, rows: Rows) -> tuple[list[int], list[tuple[int, int]]]:
        """Where the labels stand, and where the values, with their types' OIDs.

        Raises QueryFailed when a declared column is not among the result's.
        """
        columns = [(rows.fname(column), rows.ftype(column)) for column in range(rows.nfields)]
        if columns != self._columns:
            # What we declare is ASCII; what else is there may have been named in any encoding.
            at = {
                (name or b"").decode(errors="replace"): column
                for column, (name, _) in enumerate(columns)
            }
            missing = [name for name in (*self.labels, *self.columns) if name not in at]
            if missing:
                raise QueryFailed(
                    "wrong_columns",
                    f"declared but not in the result: {', '.join(missing)}; it has {', '.join(at)}",
                )
            values = [(at[name], columns[at[name]][1]) for name in self.columns]
            self._columns, self._found = columns, ([at[name] for name in self.labels], values)
        return self._found


_shapes: dict[str, tuple[Statement, Shape]] = {}
"""By the statements' texts; bounded, as those are."""


def _shape(statement: Statement) -> Shape:
    known, shape = _shapes.get(statement.text, (None, None))
    if shape is None or known != statement:
        if len(_shapes) > _SHAPES:
            _shapes.clear()
        shape = Shape(statement)
        _shapes[statement.text] = statement, shape
    return shape


class Layout:
    """How a statement's rows become samples of one target, or of one of its databases."""

    __slots__ = ("shape", "template")

    def __init__(self, statement: Statement, constant: Mapping[str, str]) -> None:
        """`constant` labels stand on every sample."""
        self.shape = _shape(statement)
        self.template = template(constant, self.shape.labels) if constant else self.shape.plain

    def sheet(self) -> "Sheet":
        """A sheet for one run."""
        return Sheet(self)


class Sheet:
    """The samples of one run of one statement, written while its rows come in.

    Rows come as libpq holds them: text, column by column. Numbers are never parsed where the type
    says that PostgreSQL's spelling is Prometheus' own; `constant` labels stand on every sample.
    """

    __slots__ = ("_layout", "_seen", "dropped", "families", "rows", "series")

    def __init__(self, layout: Layout) -> None:
        self.rows = 0
        self.series = 0
        self.families = [Family(of) for of in layout.shape.headers]
        self.dropped: dict[str, int] = {}
        """The samples that were left out, by reason."""
        self._layout: Layout | None = layout
        self._seen: set[bytes] | None = None

    def add(self, rows: Rows) -> None:
        """Write some rows; raises QueryFailed when a declared column is not among theirs."""
        layout = self._layout
        assert layout
        shape = layout.shape
        labels, columns = shape.find(rows)
        count = min(rows.ntuples, shape.max_rows - self.rows)
        if count < rows.ntuples:
            self.drop("max_series", (rows.ntuples - count) * len(self.families))
        if count <= 0:
            return
        self.rows += count
        value, span, template = rows.get_value, range(count), layout.template
        texts = [label_values([value(row, column) for row in span]) for column in labels]
        blocks = (
            list(map(template.__mod__, zip(*texts, strict=True)))
            if texts
            else [template % ()] * count
        )
        keep = self._first_of_each(blocks)
        for family, prefix, counts, (column, oid) in zip(
            self.families, shape.prefixes, shape.counters, columns, strict=True
        ):
            values = [value(row, column) for row in span]
            if keep is not None:
                values = [values[row] for row in keep]
            values = self._spelled(values, oid)
            if counts:
                values = self._counts(values)
            here = blocks if keep is None else [blocks[row] for row in keep]
            self.series += write_samples(family, prefix, here, values)

    def finish(self) -> None:
        """All rows were taken: what only helped to write them goes."""
        self._layout = self._seen = None
        self.families = [family for family in self.families if family.chunks]

    def drop(self, reason: str, count: int = 1) -> None:
        """Count samples that are left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def _first_of_each(self, blocks: list[bytes]) -> list[int] | None:
        """The rows whose labels were not there before; None when that is all of them."""
        fresh = set(blocks)
        if self._seen is None:
            self._seen = set()
        if len(fresh) == len(blocks) and self._seen.isdisjoint(fresh):
            self._seen |= fresh
            return None
        keep: list[int] = []
        for row, block in enumerate(blocks):
            if block not in self._seen:
                self._seen.add(block)
                keep.append(row)
        self.drop("duplicate", (len(blocks) - len(keep)) * len(self.families))
        return keep

    def _spelled(self, raw: list[bytes | None], oid: int) -> list[bytes | None]:
        """The values as Prometheus spells them; None where there is no sample."""
        if oid in _INTEGERS:
            return raw
        if oid in _FLOATS:
            if oid == _NUMERIC and max(map(len, filter(None, raw)), default=0) > _DIGITS:
                raw = [v if not v or len(v) <= _DIGITS else self._parsed(v) for v in raw]
            if b"Infinity" in raw or b"-Infinity" in raw:
                return [_ENDLESS.get(v, v) if v else v for v in raw]
            return raw
        if oid == _BOOL:
            return [_TRUTH[v] for v in raw]
        return [self._parsed(v) for v in raw]

    def _counts(self, values: list[bytes | None]) -> list[bytes | None]:
        """The values but those that OpenMetrics forbids a counter: below zero, and NaN."""
        joined = b"".join(filter(None, values))
        if b"-" not in joined and b"N" not in joined:
            return values
        kept = [v if v is None or float(v) >= 0 else None for v in values]
        if lost := kept.count(None) - values.count(None):
            self.drop("not_a_count", lost)
        return kept

    def _parsed(self, value: bytes | None) -> bytes | None:
        if value is None:
            return None
        try:
            return number(float(value)).encode()
        except ValueError:
            self.drop("not_a_number")
            return None


def write_samples(
    family: Family, prefix: bytes, blocks: list[bytes], values: list[bytes | None]
) -> int:
    """Add samples to a family, but those without a value; the number added."""
    if None in values:
        pairs = [pair for pair in zip(blocks, values, strict=True) if pair[1] is not None]
        if not pairs:
            return 0
        blocks, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    parts: list[bytes] = [prefix] * (3 * len(values))
    parts[1::3] = blocks
    parts[2::3] = values  # type: ignore[assignment]  # None was sorted out above
    family.chunks.append(b"".join(parts))
    return len(values)


def write(pages: Iterable[Family], *, openmetrics: bool, process: bool = True) -> Iterator[bytes]:
    """The body of an answer in chunks: the families given, then our own process if asked."""
    for family in pages:
        header = family.headers.openmetrics if openmetrics else family.headers.text
        if len(family.chunks) > _MANY:
            yield header
            yield from family.chunks
            yield b"\n"
        elif family.chunks:
            # Most are small, and handing them on costs more than copying them.
            yield b"".join((header, *family.chunks, b"\n"))
    if not process:
        yield b"# EOF\n" if openmetrics else b""
    elif openmetrics:
        yield openmetrics_latest(_registry)  # type: ignore[no-untyped-call]
    else:
        yield prometheus_client.generate_latest(_registry)


def template(constant: Mapping[str, str], names: Sequence[str]) -> bytes:
    """A `%` template of a label block and the blank after it, with a place for each name's value.

    A constant label gives way to a column of the same name.
    """
    fixed = [
        pair(name, value).replace(b"%", b"%%")
        for name, value in constant.items()
        if name not in names
    ]
    blocks = fixed + [b'%b="%%b"' % name.encode() for name in names]
    return b"{" + b",".join(blocks) + b"} " if blocks else b" "


def pair(name: str, value: str) -> bytes:
    """A label as it stands in a block."""
    return b'%b="%b"' % (name.encode(), _escaped(value.encode()))


def label_block(layout: Layout, values: Sequence[bytes]) -> bytes:
    """The label block of a row with these labels."""
    return layout.template % tuple(label_values([value])[0] for value in values)


def label_values(column: list[bytes | None]) -> list[bytes]:
    """A column's values as they may stand between quotes: as they are shown, escaped."""
    values = shown_values(column)
    joined = b"".join(values)
    if b"\\" in joined or b'"' in joined or b"\n" in joined:
        values = [_escaped(value) for value in values]
    return values


def shown_values(column: list[bytes | None]) -> list[bytes]:
    """A column's values as a page shows them: no NULL, valid UTF-8, none too long."""
    values = [value or b"" for value in column]
    joined = b" ".join(values)  # apart, else two halves of a character would make a whole
    if not joined.isascii():
        try:
            joined.decode()
        except UnicodeDecodeError:
            values = [value.decode(errors="replace").encode() for value in values]
            joined = b" ".join(values)  # each such byte has become three
    if len(joined) > _LABEL:
        values = [
            v if len(v) <= _LABEL else v[:_LABEL].decode(errors="ignore").encode() for v in values
        ]
    return values


def _escaped(value: bytes) -> bytes:
    return value.replace(b"\\", rb"\\").replace(b'"', rb"\"").replace(b"\n", rb"\n")


def number(value: float) -> str:
    """A number as both formats take it."""
    if type(value) is int:
        return str(value)
    text = repr(float(value))
    if text.endswith(".0"):
        return text[:-2]
    return _NOT_FINITE.get(text, text)


def bucket_limit(value: float) -> str:
    """The limit of a bucket as OpenMetrics spells it: 1.0, not 1."""
    text = number(value)
    return text if "." in text else f"{text}.0"


_NOT_FINITE = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}
