"""There is more of something than anybody thought of: tables, rows, text."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager

import psycopg

from tests.harm.scene import Scenario, Scene, Series, of_sessions

_TABLES = 2000

_CREATE = f"""do $$ begin
  for number in 1 .. {_TABLES} loop
    execute format('create table bulk_%1$s (n int primary key, note text)', number);
  end loop;
end $$"""

_DROP = f"""do $$ begin
  for number in 1 .. {_TABLES} loop
    execute format('drop table bulk_%1$s', number);
  end loop;
end $$"""


@contextmanager
def _many_tables(scene: Scene) -> Iterator[None]:
    scene.server.execute(_CREATE)
    yield
    scene.server.execute(_DROP)


def _then_anew(scene: Scene) -> None:
    """Scrape as before, and again by an exporter that starts among all this.

    Many look at what is expensive only now and then, and at the start.
    """
    for _ in range(2):
        scene.scrape()
    scene.start_anew()
    for _ in range(2):
        scene.scrape()


def _is_chosen(series: Series) -> bool:
    """Which of many tables and statements stand on a page is the exporter's choice."""
    values = {value for _, value in series[1]}
    return (
        of_sessions(series)
        or series[0].startswith("pg_stat_statements_")
        or any(value.startswith(("orders", "customers")) for value in values)
    )


def _one_row(scene: Scene) -> None:
    scene.server.execute(
        "create table how_many (rows int); insert into how_many values (10);"
        "grant select on how_many to public"
    )


_MILLION = (
    "select n as number, n as value from public.how_many, generate_series(1, how_many.rows) n"
)


@contextmanager
def _million_rows(scene: Scene) -> Iterator[None]:
    scene.server.execute("update how_many set rows = 1000000")
    yield
    scene.server.execute("update how_many set rows = 10")


def _is_of_million(series: Series) -> bool:
    return series[0].startswith("pg_own") or ("query", "own.own") in series[1]


_MEGABYTE = 1024 * 1024


@contextmanager
def _huge_texts(scene: Scene) -> Iterator[None]:
    """A session runs a statement of 10 MB; 100 others of 1 MB each were run and are kept."""
    padding = "x" * _MEGABYTE
    with ExitStack() as stack:
        session = stack.enter_context(
            closing(psycopg.connect(scene.server.conninfo(dbname="app"), autocommit=True))
        )
        for columns in range(1, 101):
            # pg_stat_statements tells statements apart by what they do, not by their text.
            session.execute(f"select /* {padding} */ {'1, ' * columns} 1".encode())
        for _ in range(3):
            session.execute(f"select /* {padding * 10} */ 'ten'".encode())
        runs = stack.enter_context(
            closing(psycopg.connect(scene.server.conninfo(dbname="app"), autocommit=True))
        )
        runs.pgconn.nonblocking = 0  # else most of it would wait here
        runs.pgconn.send_query(f"select /* {padding * 10} */ pg_sleep(600)".encode())
        stack.callback(runs.cancel_safe)
        scene.server.wait_until(
            "select count(*) = 1 from pg_stat_activity"
            f" where state = 'active' and length(query) > {_MEGABYTE - 100}"
        )
        yield


def _no_temporary_files(scene: Scene) -> Iterable[str]:
    lines = [line for line in scene.log_of_role() if "temporary file: path" in line]
    if lines:
        yield f"it has the server write {len(lines)} temporary files: {lines[0][:200]}"
    longest = max(
        (len(line) for answer in scene.during if answer.page for line in answer.page.body.split()),
        default=0,
    )
    if longest > 10_000:
        yield f"a word of {longest:,} characters stands on the page"


SCENARIOS = (
    Scenario(
        f"{_TABLES:,} tables are created between two scrapes",
        _many_tables,
        concerned=_is_chosen,
        watch=_then_anew,
        settings={"max_locks_per_transaction": 512},
    ),
    Scenario(
        "a query of one's own returns a million rows",
        _million_rows,
        before=_one_row,
        concerned=_is_of_million,
        sql=_MILLION,
        scrapes=3,
    ),
    Scenario(
        "statements of 10 MB run",
        _huge_texts,
        concerned=_is_chosen,
        truth=_no_temporary_files,
        watch=_then_anew,
        settings={"track_activity_query_size": _MEGABYTE, "log_temp_files": 0},
    ),
)
