"""Read YAML files strictly, so that every fault is known with its line before anything runs."""

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pgvigil.errors import Problem

if TYPE_CHECKING:
    import jsonschema
    import yaml

Keys = tuple[str | int, ...]
"""The way from a document's root to a value: mapping keys and list positions."""

_PATH = "mind its path, owner and mode"
_REMEDY = "mind the indent, and put text with special characters in quotes"
_NO_VALUE = (
    "a key between braces has no value; write a blank after its colon, and put text with a comma "
    "in quotes"
)

_SPOKEN = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a mapping (key: value)",
    "array": "a list",
    "null": "nothing",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML file that was read: its data and the line of every value."""

    place: str
    data: Any
    lines: Mapping[Keys, int]

    def problem(self, keys: Keys, text: str) -> Problem:
        """A problem at the value `keys` leads to, or at the nearest that has a line."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return Problem(self.place, self.lines.get(keys, 1), text)


@cache
def schema(name: str) -> Mapping[str, Any]:
    """The JSON Schema that ships as `schemas/<name>.schema.json`."""
    text = files("pgvigil").joinpath("schemas", f"{name}.schema.json").read_text("utf-8")
    loaded: Mapping[str, Any] = json.loads(text)
    return loaded


def read(path: Path, place: str | None = None) -> tuple[Document | None, list[Problem]]:
    """The document at `path`, or the reasons why there is none; never raises for a bad file."""
    place = place or str(path)
    try:
        text = path.read_text("utf-8")
    except IsADirectoryError:
        return None, [Problem(place, None, "is a directory; name a file")]
    except UnicodeDecodeError as error:
        return None, [Problem(place, None, f"is not UTF-8 text ({error.reason}); save it as UTF-8")]
    except OSError as error:
        return None, [Problem(place, None, f"cannot be read: {error.strerror}; {_PATH}")]
    return parse(text, place)


def parse(text: str, place: str) -> tuple[Document | None, list[Problem]]:
    """The document in `text`; `place` names it in problems."""
    # Imported where they are used: the process that serves has no need of them (see apart.py).
    import yaml

    loader: yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        lines: dict[Keys, int] = {(): 1}
        problems: list[Problem] = []
        data = None if node is None else _build(loader, node, (), place, lines, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context
        if isinstance(error, yaml.constructor.ConstructorError):
            what = "found a value of no known kind"  # YAML's own words hold the value
        text = f"is not YAML: {what}; {_REMEDY}"
        return None, [Problem(place, mark.line + 1 if mark else None, text)]
    except yaml.reader.ReaderError as error:
        line = text.encode()[: error.position].count(b"\n") + 1
        return None, [Problem(place, line, "holds a control character; remove it")]
    except RecursionError:
        return None, [Problem(place, None, "holds itself, by an alias, or is nested too deep")]
    finally:
        loader.dispose()
    return Document(place, data, lines), problems


def _build(
    loader: "yaml.SafeLoader",
    node: "yaml.Node",
    keys: Keys,
    place: str,
    lines: dict[Keys, int],
    problems: list[Problem],
) -> Any:
    import yaml

    lines.setdefault(keys, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, item, (*keys, position), place, lines, problems)
            for position, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(Problem(place, line, "a key must be plain text"))
                continue
            # The text as written: YAML 1.1 would read the keys `on` and `no` as booleans.
            key = str(key_node.value)
            if key in mapping:
                first = lines[(*keys, key)]
                text = f"the key {key!r} stands twice; the first is in line {first}; remove one"
                problems.append(Problem(place, line, text))
                continue
            if node.flow_style and value_node.start_mark.index == value_node.end_mark.index:
                # Not named: what stands for a key here may be part of a password.
                problems.append(Problem(place, line, _NO_VALUE))
                continue
            lines[(*keys, key)] = line
            mapping[key] = _build(loader, value_node, (*keys, key), place, lines, problems)
        return mapping
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, AttributeError):
        return node.value  # such as 2026-99-99, which looks like a date
    # The text as written: YAML 1.1 would read the password 012345 as the number 5349.
    return node.value if type(value) is int and str(value) != node.value else value


def check(document: Document, name: str) -> tuple[list[Problem], Any]:
    """Every way in which a document breaks the schema called `name`, and its data without those.

    Values never stand in the texts, only keys and kinds: a value may be a password.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema(name))
    errors = sorted(validator.iter_errors(document.data), key=lambda e: list(map(str, e.path)))
    # jsonschema tells each missing key apart, and each time the whole rule.
    faults = list(dict.fromkeys(fault for error in errors for fault in _explain(error)))
    problems = [document.problem(fault.keys, fault.text) for fault in faults]
    return problems, _without(document.data, (), {f.keys for f in faults if not f.missing})


def _without(data: Any, keys: Keys, broken: Set[Keys]) -> Any:
    """A copy of `data`, which stands at `keys`, that lacks what is broken."""
    if keys in broken:
        return None
    if isinstance(data, dict):
        return {
            key: _without(value, (*keys, key), broken)
            for key, value in data.items()
            if (*keys, key) not in broken
        }
    if isinstance(data, list):
        return [
            _without(value, (*keys, position), broken)
            for position, value in enumerate(data)
            if (*keys, position) not in broken
        ]
    return data


class _Fault(NamedTuple):
    keys: Keys
    text: str
    missing: bool = False
    """Whether what `keys` leads to merely lacks something."""


def _explain(  # noqa: C901  (flat: one case for each rule of the schemas)
    error: "jsonschema.ValidationError",
) -> Iterator[_Fault]:
    import difflib

    keys: Keys = tuple(error.absolute_path)
    here = ".".join(spoken(str(key)) for key in keys) or "the file"
    instance: Any = error.instance
    rule: Any = error.validator_value
    part: Mapping[str, Any] = error.schema if isinstance(error.schema, Mapping) else {}
    hint = f" ({part['description']})" if "description" in part else ""
    match error.validator:
        case "additionalProperties" | "unevaluatedProperties":
            known = sorted(part.get("properties", {}))
            for key in instance:
                if key not in known:
                    near = difflib.get_close_matches(key, known, 1)
                    guess = f"; did you mean {near[0]!r}?" if near else ""
                    text = f"unknown key {spoken(key)!r}{guess} (known here: {', '.join(known)})"
                    yield _Fault((*keys, key), text)
        case "required":
            for key in rule:
                if key not in instance:
                    wanted = part.get("properties", {}).get(key, {}).get("description", "")
                    text = f"{here} lacks the key {key!r}{f' ({wanted})' if wanted else ''}"
                    yield _Fault(keys, text, missing=True)
        case "type":
            wanted = " or ".join(
                _SPOKEN[kind] for kind in ([rule] if isinstance(rule, str) else rule)
            )
            text = f"{here} must be {wanted}, not {_kind(instance)}{hint}"
            if "string" in rule and not isinstance(instance, list | dict):
                text += "; put it in quotes"
            yield _Fault(keys, text)
        case "enum":
            yield _Fault(keys, f"{here} must be one of {', '.join(map(str, rule))}")
        case "propertyNames":
            key = instance
            yield _Fault((*keys, str(key)), f"{spoken(str(key))!r} is not a legal name here{hint}")
        case "minItems" | "minLength" | "minProperties":
            yield _Fault(keys, f"{here} must not be empty{hint}")
        case "minimum" | "maximum":
            word = "least" if error.validator == "minimum" else "most"
            yield _Fault(keys, f"{here} must be at {word} {rule}{hint}")
        case "uniqueItems":
            yield _Fault(keys, f"{here} names the same thing twice; remove one")
        case "pattern" if "propertyNames" in error.schema_path:
            yield _Fault(
                (*keys, str(instance)), f"{spoken(str(instance))!r} is not a legal name here{hint}"
            )
        case "pattern":
            yield _Fault(keys, f"{here} is not of the right form{hint}")
        case _:
            yield _Fault(keys, f"{here} breaks the rule {error.validator!r}{hint}")


def spoken(key: str) -> str:
    """A key as it may be shown: of `password:secret`, where a blank is missing, the first part."""
    return _SLIP.sub(r"\1...", key)


_SLIP = re.compile(r"(pass\w*)\W.*", re.I | re.S)


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"  # YAML 1.1 reads 2026-01-01 as a date
