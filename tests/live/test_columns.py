"""Compares the columns of what the catalogue reads with those that were there when it was made."""

from lab import columns
from lab.columns import differences
from lab.postgres import Server


def test_what_the_catalogue_reads_has_the_columns_that_were_written_down(server: Server) -> None:
    found = columns.of(server)

    assert [name for name, of in found.items() if not of] == []  # asked for and not there
    # `python -m lab.columns` writes them anew; a difference of the server may break a query.
    assert differences(columns.snapshot(server.major), found) == []


def test_a_difference_is_said_in_words() -> None:
    written = {"v": {"a": "integer", "b": "text"}, "extension.only": {"c": "text"}}
    found = {"v": {"a": "bigint", "c": "text"}, "w": {"a": "oid"}}

    assert differences(written, found) == [
        "v has a new c",
        "v lost b",
        "v.a was integer and is bigint",
        "w is not written down",
    ]
