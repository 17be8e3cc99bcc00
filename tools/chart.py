"""Write what the Helm chart says of its values: the schema, and the table in its README.

`python -m tools.chart` reads helm/pgvigil/values.yaml, whose comments are the descriptions, and the
schema of pgvigil's own configuration, from which the keys of a target come.
"""

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pgvigil import documents

CHART = Path(__file__).parents[1] / "helm" / "pgvigil"
BEGIN, END = "<!-- values -->\n", "<!-- /values -->\n"

Json = dict[str, Any]

FREE = ("resources", "podSecurityContext", "securityContext")
"""Kubernetes says what may stand there."""

NARROW: Mapping[str, Json] = {
    "mode": {"enum": ["one", "many", "sidecar"]},
    "replicas": {"minimum": 1, "maximum": 1000},
    "image.repository": {"minLength": 1},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "service.port": {"minimum": 1, "maximum": 65535},
    "terminationGracePeriodSeconds": {"minimum": 0},
    "catalogue.files": {
        "propertyNames": {"pattern": r"^[-._a-zA-Z0-9]+\.ya?ml$"},
        "additionalProperties": {"type": "string"},
    },
    "podDisruptionBudget.maxUnavailable": {"type": ["integer", "string"]},
    "networkPolicy.ports": {"items": {"type": "integer", "minimum": 1, "maximum": 65535}},
    "extraArgs": {"items": {"type": "string"}},
    "prometheusRule.disabledAreas": {"items": {"type": "string"}, "uniqueItems": True},
    "prometheusRule.disabledAlerts": {"items": {"type": "string"}, "uniqueItems": True},
    "prometheusRule.alertLabels": {"additionalProperties": {"type": "string"}},
    "dashboards.disabled": {"items": {"type": "string"}, "uniqueItems": True},
}
"""What is known of a value besides its type."""

KINDS: Mapping[type, str] = {
    bool: "boolean",
    int: "integer",
    str: "string",
    list: "array",
    dict: "object",
}


class Value(NamedTuple):
    """One value of the chart."""

    path: str
    """With dots."""
    default: Any
    about: str


def values() -> list[Value]:
    """All values in the order of the file; raises ValueError for one that nothing is said of."""
    text = (CHART / "values.yaml").read_text()
    about = dict(_comments(text))
    found = list(_leaves((), yaml.safe_load(text), about))
    silent = [value.path for value in found if not value.about]
    if silent:
        raise ValueError(f"values.yaml says nothing of {', '.join(silent)}")
    return found


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """The path of each key, and the comment right above it."""
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        if found := re.match(r" *# ?(.*)", line):
            above.append(found[1])
        elif found := re.match(r"( *)(\w+):", line):
            path[len(found[1]) // 2 :] = [found[2]]
            yield ".".join(path), " ".join(above)
            above = []
        else:
            above = []


def _leaves(path: tuple[str, ...], value: Any, about: Mapping[str, str]) -> Iterator[Value]:
    name = ".".join(path)
    inner = isinstance(value, dict) and value and name in ("", *about)
    if inner and not (path[:-1] and path[0] in FREE):
        for key, child in value.items():
            yield from _leaves((*path, key), child, about)
    else:
        yield Value(name, value, about.get(name, ""))


def table() -> str:
    """The values as Markdown."""
    about = dict(_comments((CHART / "values.yaml").read_text()))
    lines, group = ["| value | default | |", "|---|---|---|"], ""
    for value in values():
        first = value.path.split(".")[0]
        if first != group and "." in value.path and about[first]:
            lines.append(f"| `{first}` | | {_cell(about[first])} |")
        group = first
        default = json.dumps(value.default)
        lines.append(f"| `{value.path}` | `{_cell(default)}` | {_cell(value.about)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def schema() -> Json:
    """The schema of the values, as Helm takes it."""
    own = documents.schema("config")
    found: Json = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart pgvigil",
        "$defs": {**deepcopy(own["$defs"]), "target": _target(own["$defs"]["target"])},
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "global": {"type": "object", "description": "Helm's own."},
            "enabled": {
                "type": "boolean",
                "description": "For the condition of a chart that depends on this one.",
            },
        },
    }
    for value in values():
        place, (*groups, key) = found, value.path.split(".")
        if groups and groups[0] in FREE:
            groups, key = [], groups[0]
        for group in groups:
            empty = {"type": "object", "additionalProperties": False, "properties": {}}
            place = place["properties"].setdefault(group, empty)
        free = key in FREE
        place["properties"][key] = {
            "type": "object" if free else KINDS[type(value.default)],
            **NARROW.get(value.path, {}),
            **({} if free else {"description": value.about}),
        }
    targets = own["properties"]["targets"]
    found["properties"]["targets"] |= {
        key: targets[key] for key in ("propertyNames", "additionalProperties")
    }
    found["properties"]["objectives"] = own["$defs"]["target"]["properties"]["objectives"]
    return found


def _target(own: Json) -> Json:
    """A target as in pgvigil's configuration, and where Kubernetes has its password."""
    target = deepcopy(own)
    target["properties"] |= {
        "existingSecret": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "description": "the Secret that holds the password, and its key",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "key": {"type": "string", "minLength": 1, "description": "password when absent"},
            },
        },
        "password": {
            "type": "string",
            "minLength": 1,
            "description": "the password itself; a Secret is made of it",
        },
    }
    return target


def files() -> Iterator[tuple[Path, str]]:
    """Each file that is written, with what belongs into it."""
    yield CHART / "values.schema.json", json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    page = CHART / "README.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    yield page, f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write them."""
    for path, text in files():
        path.write_text(text)


if __name__ == "__main__":
    main()
