"""The JSON Schemas that ship are sound, closed, and say what each key is for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pgvigil
import pytest
from jsonschema import Draft202012Validator
from pgvigil import documents
from pgvigil.catalogue import load

SCHEMAS = sorted((Path(pgvigil.__file__).parent / "schemas").glob("*.json"))
NAMES = [path.name.removesuffix(".schema.json") for path in SCHEMAS]


def parts(schema: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every mapping in a schema, with the way to it."""
    if isinstance(schema, dict):
        yield keys, schema
        for key, value in schema.items():
            yield from parts(value, (*keys, key))


def test_there_is_a_schema_for_each_kind_of_file() -> None:
    assert NAMES == ["catalogue", "config", "standards", "web"]


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_valid_draft_2020_12(name: str) -> None:
    schema = documents.schema(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", SCHEMAS, ids=NAMES)
def test_a_schema_holds_no_key_twice(path: Path) -> None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        assert len(names) == len(set(names))
        return dict(pairs)

    assert json.loads(path.read_text("utf-8"), object_pairs_hook=once)


@pytest.mark.parametrize("name", NAMES)
def test_every_mapping_says_which_keys_it_takes(name: str) -> None:
    for keys, part in parts(documents.schema(name)):
        if part.get("type") == "object":
            assert "additionalProperties" in part, keys


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_leads_somewhere_and_every_definition_is_used(name: str) -> None:
    schema = documents.schema(name)
    used = {part["$ref"] for _, part in parts(schema) if isinstance(part.get("$ref"), str)}
    assert used == {f"#/$defs/{key}" for key in schema["$defs"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_that_is_refused_for_its_form_says_what_belongs_there(name: str) -> None:
    for keys, part in parts(documents.schema(name)):
        if "pattern" in part and "properties" not in keys[-1:]:
            assert part.get("description"), keys


def test_the_catalogue_that_ships_fits_its_schema() -> None:
    assert load()
