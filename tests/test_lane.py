"""What stands between each query and all the others."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from pgvigil.catalogue import Metric, Needs, Query, Variant
from pgvigil.lane import Ledger, Reception
from pgvigil.plan import Statement
from pgvigil.render import Layout
from pgvigil.source import Table


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_what_was_written_goes_without_the_garbage_collector(no_collector: None) -> None:
    metric = Metric("pg_thing_size_bytes", "size", "gauge", "A size.", "", 0, 1000)
    text = Variant(13, 1000, "select 1 as size")
    query = Query("area.query", "why", "any", Needs(), 1.0, 10, (), (text,), (metric,), "", 1)
    statement = Statement(query, text.text, (metric,))
    sheet = Layout(statement, {}).sheet()
    found = []
    reception = Reception(Ledger("main"), "", [(statement, sheet)], lambda _, of: found.append(of))
    answers = reception.answers
    answers.rows(0, Table(["size"], [[1]]))
    answers.end(0, None, 0.1)
    assert found == [sheet]
    gone = weakref.ref(reception)
    del reception, answers
    assert gone() is None
