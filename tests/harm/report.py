"""Writes down who bore what: for a terminal as it comes in, and as a page."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.harm.scene import RULES, Scenario, Verdict
from tests.harm.subject import Subject

_BLOCK = re.compile(r"(<!-- played -->\n).*?(<!-- end -->)", re.DOTALL)

Played = Mapping[tuple[str, str], Verdict | str | None]
"""By scenario and subject: the verdict, why there is none, or None where it does not apply."""


def line(verdict: Verdict) -> str:
    """One verdict for a terminal."""
    kept = "" if verdict.kept is None else f", {verdict.kept:.0%} of the series"
    words = [
        f"{'passes' if not verdict.broken else 'breaks rules'}: slowest {verdict.slowest:.2f} s"
        f"{kept}, {verdict.sessions} sessions"
    ]
    words += [f"    {rule}: {seen}" for rule, seen in verdict.broken.items()]
    return "\n".join(words)


def write(
    page: Path,
    facts: Mapping[str, str],
    scenarios: Sequence[Scenario],
    subjects: Sequence[Subject],
    played: Played,
) -> None:
    """Put the tables into the block of a page that is kept for them."""
    text = page.read_text("utf-8")
    tables = "\n".join(_tables(facts, scenarios, subjects, played))
    page.write_text(_BLOCK.sub(lambda found: f"{found[1]}{tables}\n{found[2]}", text), "utf-8")


def _tables(
    facts: Mapping[str, str],
    scenarios: Sequence[Scenario],
    subjects: Sequence[Subject],
    played: Played,
) -> Iterable[str]:
    yield ", ".join(f"{name} {value}" for name, value in facts.items()) + "."
    yield ""
    yield from _table(
        "what happens",
        scenarios,
        subjects,
        lambda scenario, subject: _cell(played.get((scenario.name, subject.name))),
    )
    counts = [
        sum(isinstance(of, Verdict) and not of.broken for of in _of(subject, scenarios, played))
        for subject in subjects
    ]
    applied = [
        sum(isinstance(of, Verdict) for of in _of(subject, scenarios, played))
        for subject in subjects
    ]
    sums = [f"**{count} of {of}**" for count, of in zip(counts, applied, strict=True)]
    yield f"| **no rule broken in** | {' | '.join(sums)} |"
    yield ""
    yield "Slowest answer while the fault lasts, and the most sessions at any look:"
    yield ""
    yield from _table(
        "what happens",
        scenarios,
        subjects,
        lambda scenario, subject: _figures(played.get((scenario.name, subject.name))),
    )
    yield ""
    yield "What was seen where a rule was broken:"
    yield ""
    for scenario in scenarios:
        for subject in subjects:
            verdict = played.get((scenario.name, subject.name))
            if isinstance(verdict, Verdict) and verdict.broken:
                seen = "; ".join(f"*{r}* {_plain(text)}" for r, text in verdict.broken.items())
                yield f"- {scenario.name}, {subject.name}: {seen}"


def _of(
    subject: Subject, scenarios: Sequence[Scenario], played: Played
) -> Iterable[Verdict | str | None]:
    return (played.get((scenario.name, subject.name)) for scenario in scenarios)


def _table(
    first: str,
    scenarios: Sequence[Scenario],
    subjects: Sequence[Subject],
    cell: Callable[[Scenario, Subject], str],
) -> Iterable[str]:
    heads = " | ".join(f"{subject.name} {subject.version}".strip() for subject in subjects)
    yield f"| {first} | {heads} |"
    yield "|---" * (len(subjects) + 1) + "|"
    for scenario in scenarios:
        cells = " | ".join(cell(scenario, subject) for subject in subjects)
        yield f"| {scenario.name} | {cells} |"


def _cell(played: Verdict | str | None) -> str:
    if played is None:
        return "–"
    if isinstance(played, str):
        return "could not be played"
    if not played.broken:
        return "✓"
    return "✗ " + ", ".join(rule for rule in RULES if rule in played.broken)


def _figures(played: Verdict | str | None) -> str:
    if not isinstance(played, Verdict):
        return "–"
    return f"{played.slowest:.2f} s, {played.sessions}"


def _plain(text: str) -> str:
    """A text that is no markup and no place of this machine."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
