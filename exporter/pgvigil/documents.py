"""Read YAML files strictly, so that every fault is known with its line before anything runs."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pgvigil.errors import Problem

if TYPE_CHECKING:
    import jsonschema
    import yaml

Keys = tuple[str | int, ...]
"""The way from a document's root to a value: mapping keys and list positions."""

_DEEPEST = 50
"""Levels of nesting; the schemas know seven, and libyaml dies of some ten thousand."""
_LARGEST = 5_000_000
"""Characters with every alias written out: a few lines of aliases to aliases make billions."""
_OF_A_VALUE = 40
"""What a value weighs beside its own characters."""
_LONGEST_NUMBER = 40
_MOST_FAULTS = 200
"""Told of one file; nobody reads more, and a close match for each unknown key takes time."""
_MORE = "there are more problems than are told"
_LONGEST_KEY = 80

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
    except ValueError:
        return None, [Problem(place, None, f"cannot be read: no path holds a NUL; {_PATH}")]
    return parse(text, place)


def parse(text: str, place: str) -> tuple[Document | None, list[Problem]]:
    """The document in `text`; `place` names it in problems."""
    # Imported where they are used: the process that serves has no need of them (see apart.py).
    import yaml

    kind: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = kind(text)
    building = _Building(loader, place)
    try:
        # Before nodes are made of it, which libyaml does without a bound.
        _measure(yaml.parse(text, Loader=kind))
        node = loader.get_single_node()
        data = None if node is None else building.build(node, ())
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
    except _TooMuchError as error:
        return None, [*building.problems, Problem(place, error.line, str(error))]
    finally:
        loader.dispose()
    return Document(place, data, building.lines), building.problems


class _TooMuchError(Exception):
    """A document that nobody means: what is wrong, at a line."""

    def __init__(self, line: int, text: str) -> None:
        self.line = line
        super().__init__(text)


def _measure(events: "Iterable[yaml.Event]") -> None:
    """Raise _TooMuchError where a text is nested too deep."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise _TooMuchError(line, f"is nested deeper than {_DEEPEST} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Building:
    """Turns the nodes of one text into data, and keeps the line of each value."""

    def __init__(self, loader: "yaml.SafeLoader", place: str) -> None:
        self.lines: dict[Keys, int] = {(): 1}
        self.problems: list[Problem] = []
        self._loader = loader
        self._place = place
        self._weight = 0

    def build(self, node: "yaml.Node", keys: Keys) -> Any:
        """The data of a node, which `keys` lead to."""
        import yaml

        line = node.start_mark.line + 1
        self._weight += _OF_A_VALUE + (len(node.value) if isinstance(node.value, str) else 0)
        if len(keys) > _DEEPEST or self._weight > _LARGEST:
            raise _TooMuchError(line, "holds itself, by an alias, or is too large")
        self.lines.setdefault(keys, line)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*keys, position)) for position, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        return self._value(node)

    def _mapping(self, node: "yaml.MappingNode", keys: Keys) -> dict[str, Any]:
        import yaml

        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(line, "a key must be plain text")
                continue
            # The text as written: YAML 1.1 would read the keys `on` and `no` as booleans.
            key = str(key_node.value)
            if key in mapping:
                first = self.lines[(*keys, key)]
                text = f"stands twice; the first is in line {first}; remove one"
                self._fault(line, f"the key {spoken(key)!r} {text}")
                continue
            if node.flow_style and value_node.start_mark.index == value_node.end_mark.index:
                # Not named: what stands for a key here may be part of a password.
                self._fault(line, _NO_VALUE)
                continue
            self.lines[(*keys, key)] = line
            mapping[key] = self.build(value_node, (*keys, key))
        return mapping

    def _value(self, node: "yaml.Node") -> Any:
        number = node.tag.endswith((":int", ":float"))
        if number and len(node.value) > _LONGEST_NUMBER:
            return node.value  # Python takes its time for numbers of a million digits
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            return node.value  # such as 2026-99-99, which looks like a date
        # The text as written: YAML 1.1 would read the password 012345 as the number 5349.
        return node.value if type(value) is int and str(value) != node.value else value

    def _fault(self, line: int, text: str) -> None:
        if len(self.problems) >= _MOST_FAULTS:
            raise _TooMuchError(line, _MORE)
        self.problems.append(Problem(self._place, line, text))


def check(document: Document, name: str) -> tuple[list[Problem], Any]:
    """Every way in which a document breaks the schema called `name`, and its data without those.

    Values never stand in the texts, only keys and kinds: a value may be a password. Of a file that
    is wrong all over, the data are None.
    """
    validator = _strict()(schema(name))
    errors = sorted(validator.iter_errors(document.data), key=lambda e: list(map(str, e.path)))
    every = (fault for error in errors for fault in _explain(error))
    # jsonschema tells each missing key apart, and each time the whole rule.
    faults = list(dict.fromkeys(islice(every, _MOST_FAULTS)))
    problems = [document.problem(fault.keys, fault.text) for fault in faults]
    if next(every, None):
        return [*problems, document.problem((), _MORE)], None
    return problems, _without(document.data, (), {f.keys for f in faults if not f.missing})


@cache
def _strict() -> "type[jsonschema.protocols.Validator]":
    """jsonschema's validator, where it takes less for right than we do."""
    import jsonschema

    draft = jsonschema.Draft202012Validator
    kinds = draft.TYPE_CHECKER.redefine(
        # JSON has one kind of number, so that 5.0 is an integer there; Python has two.
        "integer",
        lambda _, value: isinstance(value, int) and not isinstance(value, bool),
    )
    rules = {"pattern": _pattern, "uniqueItems": _unique}
    made: type[jsonschema.protocols.Validator] = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        draft, rules, type_checker=kinds
    )
    return made


def _pattern(
    _: object, pattern: str, instance: object, __: object
) -> "Iterator[jsonschema.ValidationError]":
    """JSON Schema's `$` is the end of a text; Python's stands before a last line break as well."""
    import jsonschema

    exact = re.sub(r"\$\Z", r"\\Z", pattern)
    if isinstance(instance, str) and not re.search(exact, instance):
        yield jsonschema.ValidationError("does not match")


def _unique(
    _: object, wanted: bool, instance: object, __: object
) -> "Iterator[jsonschema.ValidationError]":
    """Whether texts stand twice; jsonschema compares each value with each, for hours."""
    import jsonschema

    if wanted and isinstance(instance, list):
        texts = [value for value in instance if isinstance(value, str)]
        if len(set(texts)) < len(texts):
            yield jsonschema.ValidationError("not unique")


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
    shown = _SLIP.sub(r"\1...", key)
    return shown if len(shown) <= _LONGEST_KEY else f"{shown[:_LONGEST_KEY]}..."


_SLIP = re.compile(r"(pass\w*)\W.*", re.I | re.S)


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int():
            return "a number"
        case float():
            return "a number with a point"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"  # YAML 1.1 reads 2026-01-01 as a date
