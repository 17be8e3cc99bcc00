"""The measurement of executor time tells what was executed, and sees a bound that is broken."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.executed import Call, Read, Told, Window, calls, judge, quantile, windows

LIMITS = (10.0, 100.0, 1000.0)
FAST, SLOW = 5.0, 200.0


def call(at: float, time: float = FAST, backend: int = 1, queryid: int = 7) -> Call:
    return Call(at, backend, "app", "load", queryid, time)


def told(*counts: float, calls: float) -> Told:
    """An exporter that knows exactly."""
    return Told(LIMITS, calls, counts, counts, counts)


WINDOW = Window([*(call(1.0) for _ in range(90)), *(call(1.0, SLOW) for _ in range(10))])
TRUE = told(90, 90, 100, calls=100)


def test_the_log_tells_each_call_that_ended_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "1700000000.123 [42] app load -77 LOG:  duration: 12.345 ms  plan:\n"
        "\tQuery Text: select 'LOG:  duration: 99.000 ms  plan:'\n"
        "1700000000.124 [42] app load -77 ERROR:  canceling statement\n"
    )
    assert list(calls(log)) == [Call(1700000000.123, 42, "app", "load", -77, 12.345)]


def test_a_call_belongs_to_the_window_of_the_read_that_counted_it() -> None:
    reads = [Read(10.0, 10.01), Read(20.0, 20.01), Read(30.0, 30.01)]
    first, second = windows([call(5.0), call(12.0), call(15.0), call(22.0), call(35.0)], reads)
    assert [each.at for each in first.certain] == [12.0, 15.0]
    assert [each.at for each in second.certain] == [22.0]
    assert not first.doubtful
    assert not second.doubtful


def test_a_backends_last_call_before_a_read_is_in_doubt_on_both_sides() -> None:
    reads = [Read(10.0, 10.01), Read(20.0, 20.01), Read(30.0, 30.01)]
    executed = [call(19.8), call(19.9), call(19.95, backend=2), call(25.0)]
    first, second = windows(executed, reads)
    assert [each.at for each in first.certain] == [19.8]
    assert sorted(each.at for each in first.doubtful) == [19.9, 19.95]
    assert first.doubtful == second.doubtful
    # It is rather the first window's.
    assert len(first.taken) == 3
    assert [each.at for each in second.taken] == [25.0]


def test_calls_that_end_while_a_read_runs_are_in_doubt() -> None:
    reads = [Read(10.0, 10.1), Read(20.0, 20.4), Read(30.0, 30.1)]
    first, second = windows([call(15.0), call(20.2), call(20.3), call(25.0)], reads)
    assert [each.at for each in first.doubtful] == [20.2, 20.3]
    assert second.doubtful == first.doubtful
    assert [each.at for each in first.taken] == [15.0]
    # They are rather the second window's.
    assert sorted(each.at for each in second.taken) == [20.2, 20.3, 25.0]


def test_what_is_told_exactly_is_found_right() -> None:
    verdict = judge(WINDOW, TRUE, 100.0, 20.0)
    assert verdict is not None
    assert (verdict.calls, verdict.broken, verdict.miscounted, verdict.apart) == (100, 0, 0, 0)
    for share in (verdict.truth, verdict.estimate, verdict.least, verdict.most):
        assert share == pytest.approx(0.1)
    assert verdict.right(verdict.estimate)
    # All calls are one statement's, whose mean is 24.5 ms.
    assert verdict.naive == 0
    assert not verdict.right(verdict.naive)
    assert verdict.naive_apart == 1


@pytest.mark.parametrize(
    "wrong",
    [
        replace(TRUE, lower=(90, 91, 100)),
        replace(TRUE, upper=(89, 90, 100)),
        replace(TRUE, lower=(90, 91, 100), upper=(89, 91, 100)),
    ],
)
def test_a_bound_that_the_truth_lies_beyond_is_broken(wrong: Told) -> None:
    verdict = judge(WINDOW, wrong, 100.0, 20.0)
    assert verdict is not None
    assert verdict.broken == sum(
        least > true for least, true in zip(wrong.lower, TRUE.lower, strict=True)
    ) + sum(most < true for most, true in zip(wrong.upper, TRUE.upper, strict=True))
    assert verdict.broken


def test_a_bound_that_some_choice_of_the_doubtful_calls_keeps_is_not_broken() -> None:
    window = replace(WINDOW, doubtful=[call(19.9), call(19.9)])
    for more in (0, 1, 2):
        verdict = judge(window, told(90 + more, 90 + more, 100 + more, calls=100 + more), 100.0, 20)
        assert verdict is not None
        assert (verdict.broken, verdict.miscounted) == (0, 0)
    verdict = judge(window, told(93, 93, 103, calls=103), 100.0, 20.0)
    assert verdict is not None
    assert verdict.broken == 3
    assert verdict.miscounted == 1


def test_an_estimate_in_another_bucket_is_so_many_apart() -> None:
    verdict = judge(WINDOW, replace(TRUE, estimate=(96, 97, 100)), 100.0, 20.0)
    assert verdict is not None
    assert verdict.apart == 2


def test_a_window_without_calls_has_no_verdict() -> None:
    assert judge(Window(), TRUE, 100.0, 20.0) is None
    assert judge(WINDOW, told(0, 0, 0, calls=0), 100.0, 20.0) is None


def test_a_percentile_is_the_least_time_that_so_many_calls_keep() -> None:
    assert quantile([float(number) for number in range(1, 100)]) == 95
    assert quantile([3.0]) == 3
