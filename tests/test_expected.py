"""What an operator expects of a target is read, shown on its page, or refused with the place."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pgvigil import config, expected, standards
from pgvigil.config import Settings, Told
from pgvigil.errors import Refused
from pgvigil.maintenance import Once, Weekly

from lab.exporter import Exporter


def settled(folder: Path, text: str) -> Settings:
    path = folder / "pgvigil.yml"
    path.write_text(f"targets:\n  main:\n    dsn: host=127.0.0.1 port=1\n{text}")
    return config.settle(Told(path), {})


def fault(folder: Path, text: str) -> str:
    with pytest.raises(Refused) as refused:
        settled(folder, text)
    (problem,) = refused.value.problems
    return str(problem).removeprefix(f"{folder}/pgvigil.yml:")


def test_a_target_has_the_numbers_of_the_standards_and_its_own_in_their_place(
    tmp_path: Path,
) -> None:
    (target,) = settled(tmp_path, "    objectives: {REP-1: {lag_seconds: {ticket: 60}}}\n").targets
    complete = expected.completed((*target.objectives,))
    assert len(complete) == len(standards.objectives())
    assert set(complete) - set(standards.objectives()) == {("REP-1", "lag_seconds", "ticket", 60.0)}
    assert expected.completed(()) == standards.objectives()


def test_an_objective_of_latency_is_a_limit_that_is_told(tmp_path: Path) -> None:
    (target,) = settled(
        tmp_path, "    objectives: {QRY-1: {latency_seconds: {page: 0.35}}}\n"
    ).targets
    assert target.limits == (0.35,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "{REP-11: {lag_seconds: {page: 1}}}",
            "'REP-11' is no standard with an objective; did you mean REP-1?",
        ),
        ("{REP-1: {lag: {page: 1}}}", "'lag' is no objective of REP-1; there are lag_seconds"),
        (
            "{REP-1: {lag_seconds: {finding: 1}}}",
            "'finding' is no severity of lag_seconds; there are ticket, page",
        ),
        (
            "{REP-1: {lag_seconds: {page: soon}}}",
            "targets.main.objectives.REP-1.lag_seconds.page must be a number",
        ),
        ("{QRY-1: {latency_seconds: {page: 0}}}", "a limit of latency must be above 0"),
    ],
)
def test_an_objective_that_there_is_not_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert fault(tmp_path, f"    objectives: {text}\n").startswith(f"4: {told}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{from: '2026-12-02T00:00Z', until: '2026-12-01T00:00Z'}", "window ends before it begins"),
        ("{from: '2026-12-01T00:00', until: '2026-12-02T00:00Z'}", "must be a time with its zone"),
        ("{from: noon, until: '2026-12-02T00:00Z'}", "'noon' must be a time with its zone"),
        ("{from: 2026-12-01T00:00:00Z, until: '2026-12-02T00:00Z'}", "with its zone, in quotes"),
        (
            "{from: '2026-12-02T00:00Z'}",
            "a window is {from, until}, or {at, hours}",
        ),
        ("{at: '2:00', hours: 1}", "by UTC, in quotes"),
        ("{at: '02:00', hours: 25}", "how long it lasts, at most 24"),
    ],
)
def test_a_window_that_cannot_be_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in fault(tmp_path, f"    maintenance:\n    - {text}\n")


def test_a_window_covers_its_times_and_no_others() -> None:
    def at(day: int, hour: int, minute: int = 0) -> datetime:
        return datetime(2026, 11, day, hour, minute, tzinfo=UTC)

    once = Once(at(20, 22), at(21, 2))
    assert [once.covers(at(20, 21, 59)), once.covers(at(20, 22)), once.covers(at(21, 2))] == [
        *(False, True, False)
    ]
    # 2026-11-21 is a Saturday.
    late = Weekly(frozenset([5]), at(1, 23).time(), timedelta(hours=3))
    covered = [late.covers(at(*of)) for of in ((21, 22), (21, 23), (22, 1), (22, 2), (20, 23))]
    assert covered == [False, True, True, False, False]


def test_what_is_expected_stands_on_the_page_also_of_a_server_that_is_away(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text(
        "targets:\n  main:\n    dsn: host=127.0.0.1 port=1\n"
        "    labels: {cluster: orders}\n"
        "    objectives: {REP-2: {streaming_standbys: {ticket: 2, page: 1}}}\n"
        "    declared:\n      role: primary\n      superusers: [postgres, 'odd \"name']\n"
        "      tenant_tables: [app.orders]\n"
        "    maintenance: [{from: '2000-01-01T00:00Z', until: '2999-01-01T00:00Z'}]\n"
    )
    with Exporter("--config", str(path)) as exporter:
        page = exporter.scrape()
    assert page.value("pg_up") == 0
    at = {"standard": "REP-2", "objective": "streaming_standbys", "cluster": "orders"}
    assert page.value("pgvigil_objective", severity="ticket", **at) == 2
    assert page.value("pgvigil_objective", severity="page", **at) == 1
    of_latency = {"objective": "latency_seconds", "severity": "page", "limit": "0.1"}
    assert page.value("pgvigil_objective", **of_latency) == 0.1
    assert len(page.series("pgvigil_objective")) == len(standards.objectives())
    declared = [("role", "primary"), ("superuser", "postgres"), ("superuser", 'odd "name')]
    for kind, name in (*declared, ("tenant_table", "app.orders")):
        assert page.value("pgvigil_declared", kind=kind, name=name) == 1
    assert page.value("pgvigil_maintenance") == 1
