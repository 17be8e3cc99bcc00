"""Histograms from counters hold the truth between their bounds, whatever was executed and when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pgvigil.latency import Entry, Histogram, Statements

LIMITS = (0.1, 1.0, 10.0, 50.0, 100.0, 1000.0)

TIMES = st.one_of(
    st.floats(0.0001, 100_000),
    st.sampled_from([*LIMITS, 0.0, 2.0, 300.0]),
    st.floats(90, 110),
)
"""Milliseconds that a call takes."""


@dataclass
class Server:
    """The entry of one statement, kept as PostgreSQL's pgss_store() keeps it."""

    calls: list[float] = field(default_factory=list)
    total: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    smallest: float = 0.0
    largest: float = 0.0
    made: str = ""
    """When, as PostgreSQL 17 tells it."""

    def run(self, times: Sequence[float]) -> None:
        for time in times:
            self.calls.append(time)
            self.total += time
            if len(self.calls) == 1:
                self.mean = self.smallest = self.largest = time
                continue
            before = self.mean
            self.mean += (time - before) / len(self.calls)
            self.squares += (time - before) * (time - self.mean)
            self.smallest = min(self.smallest, time)
            self.largest = max(self.largest, time)

    @property
    def entry(self) -> Entry:
        count = len(self.calls)
        deviation = math.sqrt(self.squares / count) if count > 1 else 0.0
        return Entry(
            count,
            self.total,
            self.smallest,
            self.largest,
            self.mean,
            deviation,
            self.made.encode(),
            self.made.encode(),
        )


def read(
    statements: Statements,
    entries: dict[str, Entry],
    *,
    started: bytes = b"s",
    reset: bytes = b"r",
    whole: bool = True,
) -> None:
    statements.begin(started, reset)
    for key, entry in entries.items():
        statements.take(key, "app", entry)
    statements.end(whole=whole)


def up_to(times: Sequence[float]) -> list[int]:
    return [sum(time <= limit for time in times) for limit in LIMITS]


def assert_sound(histogram: Histogram, times: Sequence[float]) -> None:
    """The truth lies between the bounds, the estimate as well, and nothing decreases."""
    assert histogram.calls == len(times)
    assert histogram.total == pytest.approx(math.fsum(times), rel=1e-6, abs=1e-6)
    for least, true, most in zip(histogram.lower, up_to(times), histogram.upper, strict=True):
        assert least <= true <= most
    for least, guess, most in zip(histogram.lower, histogram.buckets, histogram.upper, strict=True):
        assert least - 1e-9 <= guess <= most + 1e-9
    for counts in (histogram.lower, histogram.buckets, histogram.upper):
        assert counts == sorted(counts)
        assert counts[-1] <= histogram.calls


@given(st.lists(TIMES, max_size=30), st.lists(TIMES, min_size=1, max_size=60))
@settings(max_examples=500)
@example([], [100.0, 100.0, 100.0])
@example([3_600_000.0], [0.1, 0.2, 0.3])
@example([0.0], [0.0, 0.0])
def test_the_truth_lies_between_the_bounds(history: list[float], now: list[float]) -> None:
    server, statements = Server(), Statements(LIMITS)
    if history:
        server.run(history)
        read(statements, {"one": server.entry})
    else:
        read(statements, {})
    assert statements.histograms == {}
    server.run(now)
    read(statements, {"one": server.entry})
    assert_sound(statements.histograms["app"], now)


@given(st.lists(TIMES, min_size=1, max_size=2), st.lists(TIMES, max_size=5))
def test_one_call_or_two_are_known_exactly(now: list[float], history: list[float]) -> None:
    # Of times far apart what is left of two calls may lie within the server's own rounding.
    smallest = min(now)
    history = [time for time in history if time < 1000 * max(smallest, 0.001)]
    server, statements = Server(), Statements((0.05, 7.0, 70.0))
    server.run(history)
    read(statements, {"one": server.entry} if history else {})
    server.run(now)
    read(statements, {"one": server.entry})
    histogram = statements.histograms["app"]
    near = any(abs(t - limit) <= 1e-6 * limit for t in now for limit in statements.limits)
    if not near:
        assert histogram.lower == histogram.upper
        assert histogram.lower == [sum(t <= at for t in now) for at in statements.limits]


@dataclass(frozen=True)
class Step:
    """What happens between two reads, and how the read goes."""

    ran: dict[str, list[float]]
    event: str
    whole: bool


STEPS = st.lists(
    st.builds(
        Step,
        ran=st.dictionaries(st.sampled_from("abc"), st.lists(TIMES, min_size=1, max_size=8)),
        event=st.sampled_from(["", "", "", "evicted", "reset", "restart"]),
        whole=st.sampled_from([True, True, True, False]),
    ),
    max_size=8,
)


@given(STEPS)
@settings(max_examples=300)
def test_counts_and_sums_never_fall_and_never_exceed_what_was_executed(steps: list[Step]) -> None:
    servers: dict[str, Server] = {}
    statements = Statements(LIMITS)
    read(statements, {})
    executed: list[float] = []
    started = reset = 0
    last = 0
    for number, step in enumerate(steps):
        if step.event == "evicted":
            servers.pop("a", None)
        elif step.event == "reset":
            servers, reset = {}, reset + 1
        elif step.event == "restart":
            started += 1
        for key, times in step.ran.items():
            servers.setdefault(key, Server(made=f"at {number}")).run(times)
            executed += times
        entries = {key: server.entry for key, server in servers.items()}
        if not step.whole:
            entries.pop("b", None)
        read(statements, entries, started=b"%d" % started, reset=b"%d" % reset, whole=step.whole)
        histogram = statements.histograms.get("app", Histogram(LIMITS))
        assert last <= histogram.calls <= len(executed)
        last = histogram.calls
        # What was seen is a part of what was executed: no more below any limit than there were.
        for least, true in zip(histogram.lower, up_to(executed), strict=True):
            assert least <= true
        assert histogram.buckets == sorted(histogram.buckets)


def test_what_was_counted_before_the_first_read_is_history() -> None:
    server, statements = Server(), Statements(LIMITS)
    server.run([5.0] * 1000)
    read(statements, {"one": server.entry})
    read(statements, {"one": server.entry})
    assert statements.histograms == {}


def test_an_entry_that_comes_after_a_whole_read_is_new() -> None:
    server, statements = Server(), Statements(LIMITS)
    read(statements, {})
    server.run([5.0, 200.0, 7.0])
    read(statements, {"one": server.entry})
    assert statements.histograms["app"].calls == 3


def test_an_entry_that_a_cut_read_may_have_hidden_is_history() -> None:
    server, statements = Server(), Statements(LIMITS)
    server.run([5.0] * 1000)
    read(statements, {}, whole=False)
    read(statements, {"one": server.entry})
    assert statements.histograms == {}
    server.run([5.0])
    read(statements, {"one": server.entry}, whole=False)
    assert statements.histograms["app"].calls == 1


def test_a_read_that_breaks_off_counts_nothing_twice() -> None:
    first, second, statements = Server(), Server(), Statements(LIMITS)
    first.run([5.0])
    second.run([5.0])
    read(statements, {"a": first.entry, "b": second.entry})
    first.run([6.0])
    second.run([6.0])
    statements.begin(b"s", b"r")
    statements.take("a", "app", first.entry)  # and no end
    read(statements, {"a": first.entry, "b": second.entry})
    assert statements.histograms["app"].calls == 2


def test_an_entry_that_is_gone_was_evicted_and_one_that_is_ignored_was_not() -> None:
    one, two, three, statements = Server(), Server(), Server(), Statements(LIMITS)
    for server in (one, two, three):
        server.run([5.0])
    read(statements, {})
    read(statements, {"one": one.entry, "two": two.entry, "three": three.entry})
    statements.ignore("three")
    read(statements, {"one": one.entry}, whole=False)  # it may be in what was cut off
    assert statements.histograms["app"].evicted == 0
    read(statements, {"one": one.entry})
    read(statements, {"one": one.entry})
    assert statements.histograms["app"].evicted == 1
    read(statements, {}, reset=b"again")
    assert statements.histograms["app"].evicted == 1


@pytest.mark.parametrize("seen_by", ["count", "time of creation"])
def test_an_entry_that_was_made_again_counts_from_zero(seen_by: str) -> None:
    old, new, statements = Server(), Server(), Statements(LIMITS)
    old.run([5.0, 500.0, 5.0])
    new.run([200.0, 300.0] if seen_by == "count" else [5.0, 500.0, 5.0, 6.0])
    since = (b"", b"") if seen_by == "count" else (b"monday", b"tuesday")
    read(statements, {"one": old.entry._replace(since=since[0])})
    read(statements, {"one": new.entry._replace(since=since[1])})
    assert statements.histograms["app"].recreated == 1
    assert statements.histograms["app"].calls == len(new.calls)


def test_moments_that_no_calls_could_have_made_are_those_of_another_entry() -> None:
    statements = Statements(LIMITS)
    read(statements, {"one": Entry(10, 1000.0, 1.0, 900.0, 100.0, 250.0)})
    read(statements, {"one": Entry(20, 1200.0, 1.0, 900.0, 60.0, 1.0)})
    assert statements.histograms["app"].recreated == 1
    assert statements.histograms["app"].calls == 20


def test_after_a_reset_all_that_is_there_was_executed_since() -> None:
    statements = Statements(LIMITS)
    read(statements, {"one": Entry(10, 100.0, 10.0, 10.0, 10.0, 0.0)})
    read(statements, {"one": Entry(12, 120.0, 10.0, 10.0, 10.0, 0.0)}, reset=b"again")
    assert statements.histograms["app"].calls == 12


def test_a_server_that_was_started_anew_is_compared_with_nothing() -> None:
    statements = Statements(LIMITS)
    read(statements, {"one": Entry(10, 100.0, 10.0, 10.0, 10.0, 0.0)})
    read(statements, {"one": Entry(9000, 90000.0, 10.0, 10.0, 10.0, 0.0)}, started=b"later")
    assert statements.histograms == {}


def test_extremes_that_were_reset_bind_nothing_they_do_not_know() -> None:
    statements, server = Statements(LIMITS), Server()
    server.run([5.0] * 50)
    read(statements, {"one": server.entry._replace(since=b"m", extremes_since=b"m")})
    server.run([400.0, 5.0, 5.0])
    # Somebody reset smallest and largest after the slow call.
    reset = server.entry._replace(smallest=5.0, largest=5.0, since=b"m", extremes_since=b"t")
    read(statements, {"one": reset})
    assert_sound(statements.histograms["app"], [400.0, 5.0, 5.0])


def test_a_limit_that_no_entry_straddles_is_decided() -> None:
    statements, fast, slow = Statements((100.0,)), Server(), Server()
    read(statements, {})
    fast.run([1.0, 2.0, 3.0] * 100)
    slow.run([200.0, 300.0] * 30)
    read(statements, {"fast": fast.entry, "slow": slow.entry})
    histogram = statements.histograms["app"]
    assert (histogram.lower, histogram.upper, histogram.undecided) == ([300], [300], 0)


@pytest.mark.parametrize(
    ("times", "limit", "points"),
    [
        # A long tail, then two modes: the shares that a log-normal alone gets wrong.
        ([math.exp(3.0 + 1.0 * z / 100) for z in range(-250, 251)], 100.0, 0.03),
        ([2.0] * 970 + [300.0] * 30, 100.0, 0.01),
        ([2.0] * 930 + [300.0] * 70, 100.0, 0.01),
    ],
)
def test_the_estimate_is_near_for_shapes_it_knows(
    times: list[float], limit: float, points: float
) -> None:
    statements, server = Statements((limit,)), Server()
    read(statements, {})
    server.run(times)
    read(statements, {"one": server.entry})
    (guess,) = statements.histograms["app"].buckets
    true = sum(time <= limit for time in times)
    assert guess / len(times) == pytest.approx(true / len(times), abs=points)


def test_what_somebody_else_has_counted_is_sure_at_its_edges_and_guessed_between() -> None:
    histogram = Histogram([1.0, 10.0, 100.0])
    histogram.put(0.0, 1.0, 5)
    histogram.put(1.0, 10.0, 3)
    histogram.put(10.0, 1000.0, 9)
    histogram.put(1000.0, math.inf, 2)
    assert histogram.lower == [5, 8, 8]
    assert histogram.upper == [5, 8, 17]
    assert histogram.buckets == pytest.approx([5, 8, 8 + 9 * 90 / 990])
    assert (histogram.calls, histogram.undecided) == (19, 9)
