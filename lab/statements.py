"""Takes the catalogue's statements apart, as far as their rules need it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from pgvigil.catalogue import SUPPORTED, Query
from pgvigil.plan import Extension, Facts, make_plan

TOKEN = re.compile(
    r"""
    (?P<comment>--[^\n]*|/\*.*?\*/)
    |(?P<string>[eE]?'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")*")
    |(?P<placeholder>\{[a-z0-9_]+\})
    |(?P<word>[A-Za-z_][A-Za-z0-9_$]*)
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<cast>::)
    |(?P<sign>[^\s])
    """,
    re.X | re.S,
)

SPECIAL = {"extract", "overlay", "position", "substring", "trim"}
"""Calls whose arguments are separated by words, FROM among them."""
ENDS_FROM = {
    *("where", "group", "having", "order", "limit", "offset", "window", "union", "except"),
    *("intersect", "fetch"),
}


class Token(NamedTuple):
    """A piece of a statement: its kind, and its text in lower case."""

    kind: str
    text: str


class Relation(NamedTuple):
    """What rows are read from, in lower case; the schema is empty where none is said."""

    schema: str
    name: str
    called: bool
    """Whether it is a function."""


class Text(NamedTuple):
    """A statement as one version gets it, with the query it belongs to."""

    query: Query
    major: int
    tokens: Sequence[Token]


def tokens(text: str) -> list[Token]:
    """The pieces of a statement, without its comments."""
    found = (Token(m.lastgroup or "", m[0].lower()) for m in TOKEN.finditer(text))
    return [token for token in found if token.kind != "comment"]


def texts(queries: Iterable[Query]) -> Iterator[Text]:
    """Each variant with its columns filled in, for each version; extensions' schemas as {name}."""
    for whole in queries:
        needs = whole.all_needs
        for major, variant in product(SUPPORTED, whole.variants):
            query = replace(whole, variants=(variant,))
            facts = Facts(
                version=major * 10000,
                in_recovery=query.role == "standby",
                extensions={
                    n: Extension("99", "{" + n + "}") for of in needs for n in of.extension
                },
                privileges=frozenset(name for of in needs for name in of.privilege),
                functions=frozenset(name for of in needs for name in of.function),
                settings={name: value for of in needs for name, value in of.setting.items()},
            )
            for statement in make_plan([query], facts).statements:
                inner = statement.text.split("\n", 1)[1].rsplit("\n", 1)[0]
                yield Text(whole, major, tokens(inner))


def with_queries(found: Sequence[Token]) -> set[str]:
    """The names that a statement gives the queries in its WITH."""
    return {
        token.text
        for token, following, then in zip(found, found[1:], found[2:], strict=False)
        if token.kind == "word"
        and following.text == "as"
        and then.text in ("(", "materialized", "not")
    }


def relations(found: Sequence[Token]) -> Iterator[Relation]:
    """Each table, view or function that a statement reads rows from; its own WITH queries too."""
    openers: list[str] = [""]
    expecting, within = [False], [False]
    for position, token in enumerate(found):
        before = found[position - 1].text if position else ""
        if token.text == "(":
            openers.append(before)
            # A parenthesis where a relation is due holds a join, or a query of its own.
            expecting.append(expecting[-1])
            within.append(expecting[-1])
            expecting[-2] = False
        elif token.text == ")":
            for stack in (openers, expecting, within):
                del stack[-1]
        elif token.text in ("select", "with", "values"):
            expecting[-1] = within[-1] = False
        elif token.text == "from" and openers[-1] not in SPECIAL and before != "distinct":
            expecting[-1] = within[-1] = True
        elif token.text == "join" or (token.text == "," and within[-1]):
            expecting[-1] = True
        elif token.text in ENDS_FROM:
            expecting[-1] = within[-1] = False
        elif expecting[-1] and token.text not in ("lateral", "only"):
            expecting[-1] = False
            following = [token.text for token in found[position + 1 : position + 4]]
            if following[:1] == ["."]:
                yield Relation(token.text, following[1], following[2:] == ["("])
            else:
                yield Relation("", token.text, following[:1] == ["("])
