"""Reads the rules and their tests, and the names that stand in an expression."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
RULES = ROOT / "rules"
RUNBOOKS = ROOT / "docs" / "runbooks"
FINDING = "pgvigil:finding"
"""What all findings are recorded as."""

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*) | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<duration>\d+(?:ms|[smhdwy])(?:\d+(?:ms|[smhdwy]))*)
      | (?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)
      | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*) | (?P<sign>=~|!~|==|!=|>=|<=|[-+*/%^<>=(){}\[\],:@])""",
    re.X,
)
_LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = _LISTS | {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_AGGREGATES = {
    *("sum", "min", "max", "avg", "group", "stddev", "stdvar", "count", "quantile"),
    *("count_values", "bottomk", "topk"),
}
_SETS = {"and", "or", "unless"}
_COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}
_SCALARS = {"time", "scalar"}


class Objective(NamedTuple):
    """A number of a standard as rules name it."""

    standard: str
    name: str
    severity: str


@dataclass(frozen=True)
class Selector:
    """A metric with the matchers that stand behind its name."""

    name: str
    """Empty where only matchers stand."""
    matchers: Sequence[tuple[str, str, str]]
    """Label, sign and value."""


@dataclass(frozen=True)
class Rule:
    """An alert, a finding, or another recording rule."""

    area: str
    name: str
    """Of the alert or the finding, or of what is recorded."""
    kind: str
    """`alert`, `finding` or `record`."""
    expression: str
    labels: dict[str, str]
    annotations: dict[str, str]
    wait: str
    """Its `for`; empty where it fires at once."""
    tokens: Sequence[tuple[str, str]] = field(repr=False)

    def __str__(self) -> str:
        """Area, name and severity, for the name of a test."""
        return "-".join(filter(None, (self.area, self.name, self.labels.get("severity"))))

    def selectors(self) -> Iterator[Selector]:
        """What it reads."""
        tokens, at = [*self.tokens, ("end", "")], 0
        while at < len(self.tokens):
            kind, text = tokens[at]
            following = tokens[at + 1][1]
            if kind == "name" and text in _LISTS and following == "(":
                at = _end(tokens, at + 1, ")")
            elif kind == "name" and text not in _WORDS | _AGGREGATES and following != "(":
                end = _end(tokens, at + 1, "}") if following == "{" else at
                yield Selector(text, _matchers(tokens[at + 2 : end]))
                at = end
            elif text == "{":
                end = _end(tokens, at, "}")
                yield Selector("", _matchers(tokens[at + 1 : end]))
                at = end
            at += 1

    def grouped(self) -> Iterator[str]:
        """The labels in the lists behind by, on and their like."""
        for at, (kind, text) in enumerate(self.tokens[:-1]):
            if kind == "name" and text in _LISTS and self.tokens[at + 1][1] == "(":
                end = _end(self.tokens, at + 1, ")")
                yield from (word for kind, word in self.tokens[at:end][1:] if kind == "name")

    def replaced(self) -> set[str]:
        """The labels that it makes."""
        if not {"label_replace", "label_join"} & {text for _, text in self.tokens}:
            return set()
        return {text[1:-1] for kind, text in self.tokens if kind == "string"}

    def objectives(self) -> Iterator[Objective]:
        """The numbers of the standards that it compares with."""
        for selector in self.selectors():
            if selector.name == "pgvigil_objective":
                yield _objective(selector.matchers)

    def told_objectives(self) -> Iterator[Objective]:
        """The numbers of the standards that its text shows."""
        text = self.annotations.get("description", "").replace('\\"', '"')
        for inside in re.findall(r"pgvigil_objective\{([^}]*)\}", text):
            yield _objective(_matchers(_tokens(inside)))

    def compared(self) -> Iterator[str]:
        """The plain numbers that something is compared with, other than 0 and 1."""
        for at, (_, text) in enumerate(self.tokens):
            if text in _COMPARISONS:
                after = at + 1 + (self._text(at + 1) == "bool")
                after += self._text(after) == "-"
                for near in (after, at - 1):
                    if self._kind(near) in ("number", "duration") and not self._window(near):
                        yield self._text(near)

    def unmatched(self) -> Iterator[str]:
        """The signs between two vectors that do not say on which labels they are joined."""
        depth = 0
        for at, (kind, text) in enumerate(self.tokens):
            depth += (text in "{[") - (text in "}]") if kind == "sign" else 0
            binary = text in _SETS or (kind == "sign" and text in {*_COMPARISONS, *"+-*/%^"})
            if not binary or depth or not self._is_operand(at - 1):
                continue
            after = at + 1 + (self._text(at + 1) == "bool")
            if self._text(after) in ("on", "ignoring"):
                continue
            after += self._text(after) in ("-", "+")
            if text in _SETS or not (self._is_scalar(at) or self._starts_scalar(after)):
                yield " ".join(self._text(near) for near in range(max(0, at - 3), at + 4))

    def _text(self, at: int) -> str:
        return self.tokens[at][1] if 0 <= at < len(self.tokens) else ""

    def _kind(self, at: int) -> str:
        return self.tokens[at][0] if 0 <= at < len(self.tokens) else ""

    def _window(self, at: int) -> bool:
        return self._text(at) in ("0", "1")

    def _is_operand(self, at: int) -> bool:
        """Whether something ends here that a sign can stand behind."""
        return self._kind(at) in ("name", "number", "duration") or self._text(at) in (")", "}", "]")

    def _starts_scalar(self, at: int) -> bool:
        return self._kind(at) == "number" or self._text(at) in _SCALARS

    def _is_scalar(self, at: int) -> bool:
        """Whether what ends before here is a number."""
        return self._kind(at - 1) == "number" or [
            self._text(near) for near in range(at - 3, at)
        ] == ["time", "(", ")"]


@cache
def files() -> tuple[Path, ...]:
    """The files of rules, one an area."""
    return tuple(sorted(RULES.glob("*.yml")))


@cache
def load() -> tuple[Rule, ...]:
    """All rules, in the order of their files."""
    return tuple(
        make(file.stem, raw)
        for file in files()
        for group in yaml.safe_load(file.read_text())["groups"]
        for raw in group["rules"]
    )


def make(area: str, raw: dict[str, Any]) -> Rule:
    """One rule as it stands in a file."""
    labels = raw.get("labels", {})
    kind = "alert" if "alert" in raw else "record"
    name = raw[kind]
    if name == FINDING:
        kind, name = "finding", labels.get("finding", "")
    expression = str(raw["expr"])
    return Rule(
        area,
        name,
        kind,
        expression,
        labels,
        raw.get("annotations", {}),
        raw.get("for", ""),
        _tokens(expression),
    )


@cache
def fired(area: str) -> set[tuple[str, str]]:
    """The alerts and their severities that the tests of an area show firing.

    The severity is empty where a test does not name it.
    """
    found: set[tuple[str, str]] = set()
    for test in _tests(area):
        for case in test.get("alert_rule_test", ()):
            for alert in case.get("exp_alerts", ()):
                severity = alert.get("exp_labels", {}).get("severity", "")
                found.add((case["alertname"], severity))
        for case in test.get("promql_expr_test", ()):
            if "ALERTS" in case["expr"] and case.get("exp_samples"):
                found |= {(name, "") for name in re.findall(r'alertname="(\w+)"', case["expr"])}
        found |= {
            (name[1], severity[1] if severity else "")
            for labels in _samples(test)
            if (name := re.search(r'alertname="(\w+)"', labels))
            for severity in [re.search(r'severity="(\w+)"', labels)]
        }
    return found


@cache
def silent(area: str) -> set[str]:
    """The alerts that the tests of an area show silent; all of them where a test names none."""
    found: set[str] = set()
    for test in _tests(area):
        for case in test.get("alert_rule_test", ()):
            if not case.get("exp_alerts"):
                found.add(case["alertname"])
        for case in test.get("promql_expr_test", ()):
            if "ALERTS" in case["expr"] and not case.get("exp_samples"):
                found |= set(re.findall(r'alertname="(\w+)"', case["expr"])) or {"*"}
    return found


@cache
def found(area: str) -> set[str]:
    """The findings that the tests of an area show."""
    return {
        name
        for test in _tests(area)
        for labels in _samples(test)
        for name in re.findall(r'finding="(\w+)"', labels)
    }


def _tests(area: str) -> Iterator[dict[str, Any]]:
    for file in tests(area):
        yield from yaml.safe_load(file.read_text())["tests"]


def tests(area: str) -> list[Path]:
    """The unit tests of an area: area_test.yml, and where they are many area_something_test.yml."""
    return sorted([*RULES.glob(f"tests/{area}_test.yml"), *RULES.glob(f"tests/{area}_*_test.yml")])


def _samples(test: dict[str, Any]) -> Iterator[str]:
    for case in test.get("promql_expr_test", ()):
        for sample in case.get("exp_samples") or ():
            yield sample["labels"]


def sections(area: str) -> list[tuple[str, str]]:
    """The headings of the second level of an area's runbook, each with the text below."""
    file = RUNBOOKS / f"{area}.md"
    parts = re.split(r"^## (.+)$", file.read_text(), flags=re.M)[1:] if file.exists() else []
    return list(zip(parts[::2], parts[1::2], strict=True))


def _tokens(expression: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (match.lastgroup or "", match[0])
        for match in _TOKEN.finditer(expression)
        if match.lastgroup != "comment"
    )


def _end(tokens: Sequence[tuple[str, str]], at: int, sign: str) -> int:
    return next(n for n in range(at, len(tokens)) if tokens[n][1] == sign)


def _matchers(tokens: Sequence[tuple[str, str]]) -> tuple[tuple[str, str, str], ...]:
    words = [text for _, text in tokens if text != ","]
    return tuple(
        (words[at], words[at + 1], words[at + 2][1:-1]) for at in range(0, len(words) - 2, 3)
    )


def _objective(matchers: Sequence[tuple[str, str, str]]) -> Objective:
    known = {label: value for label, _, value in matchers}
    return Objective(
        known.get("standard", ""), known.get("objective", ""), known.get("severity", "")
    )
