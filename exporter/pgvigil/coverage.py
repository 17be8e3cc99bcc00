"""Write the standards, their numbers and what keeps each as one Markdown page."""

from collections.abc import Iterable, Iterator

from pgvigil.render import number
from pgvigil.standards import Standard

_HEAD = """\
# The standards

`make docs` writes this page from `exporter/pgvigil/standards.yml`, and a test compares the two.
{count} standards, of which {numbered} are held against numbers. The exporter shows each number as
`pgvigil_objective`, with the labels `standard`, `objective` and `severity`; the configuration
changes it for a target:

```yaml
targets:
  orders:
    objectives: {{REP-1: {{lag_seconds: {{ticket: 60, page: 600}}}}}}
```

A *page* wakes somebody, a *ticket* waits for office hours, a *finding* is listed and alerts nobody.
"""


def page(standards: Iterable[Standard]) -> str:
    """The whole page."""
    standards = tuple(standards)
    numbered = sum(bool(standard.objectives) for standard in standards)
    parts = [_HEAD.format(count=len(standards), numbered=numbered)]
    parts += ["\n".join(_part(standard)) for standard in standards]
    return "\n".join(parts)


def _part(standard: Standard) -> Iterator[str]:
    yield f"## {standard.id}: {standard.title}\n"
    yield f"{standard.objective[:1].upper()}{standard.objective[1:]}.\n"
    yield f"- proved by: {', '.join(standard.evidence)}"
    yield f"- not kept: {', '.join(standard.response) or 'the build fails'}"
    for name, numbers in standard.objectives.items():
        told = ", ".join(f"{severity} {number(value)}" for severity, value in numbers.items())
        yield f"- `{name}`: {told}"
    for word, names in (("alerts", standard.alerts), ("findings", standard.findings)):
        if names:
            yield f"- {word}: {', '.join(f'`{name}`' for name in names)}"
    if standard.metrics:
        yield f"- metrics: {', '.join(f'`{name}`' for name in standard.metrics)}"
    yield ""
