"""Every kind of target is known in each room that tells them apart."""

from pgvigil import documents
from pgvigil.catalogue import WORDS
from pgvigil.kinds import KINDS
from pgvigil.own import OWN, PREFIXES


def test_the_configuration_takes_the_kinds_that_can_be_opened() -> None:
    target = documents.schema("config")["$defs"]["target"]["properties"]
    assert target["kind"]["enum"] == list(KINDS)


def test_the_catalogue_has_a_word_for_each_kind() -> None:
    assert set(WORDS.values()) == set(KINDS)
    assert set(WORDS) <= set(documents.schema("catalogue")["$defs"]["query"]["properties"])


def test_each_kind_says_whether_it_is_up_in_its_own_name() -> None:
    assert PREFIXES.keys() == KINDS.keys()
    for prefix in PREFIXES.values():
        assert {f"{prefix}_up", f"{prefix}_down_reason"} <= OWN.keys()
