"""Reads the exporter's page as Prometheus would and says in few lines what stands there."""

import http.client
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_TIMEOUT_SECONDS = 15.0
"""A little more than the exporter takes for a server that does not answer."""

_STATES = ("active", "idle", "idle in transaction")


def fetch(port: int, path: str) -> str:
    """Return a page of the exporter; raise OSError or HTTPException when there is none."""
    # Not urllib: it would ask the proxy that the environment may name.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        if answer.status != http.client.OK:
            raise http.client.HTTPException(f"{path} answered {answer.status}: {body}")
        return body
    finally:
        connection.close()


@dataclass(frozen=True)
class Page:
    """What one reading of /metrics brought."""

    moment: float
    samples: Mapping[str, Sequence[Sample]]

    @classmethod
    def read(cls, port: int) -> "Page":
        """Read the page now; raises OSError or HTTPException."""
        text = fetch(port, "/metrics")
        samples = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name].append(sample)
        return cls(time.monotonic(), samples)

    @property
    def series(self) -> int:
        """How many series the page has."""
        return sum(len(group) for group in self.samples.values())

    def values(self, name: str, **labels: str) -> list[float]:
        """The values of a metric's series that have these labels."""
        return [
            sample.value
            for sample in self.samples.get(name, ())
            if labels.items() <= sample.labels.items()
        ]

    def label(self, name: str, label: str, value: float = 1) -> str:
        """What a label says on the series that has the value."""
        found = [s.labels[label] for s in self.samples.get(name, ()) if s.value == value]
        return found[0] if found else "unknown"


def describe(page: Page, before: Page | None) -> list[str]:
    """The page in lines of a name and what is to be said; rates need the page before."""
    rows = {"PostgreSQL": _server(page)}
    if page.values("pg_up") == [1]:
        rows |= {
            "commits": _commits(page, before),
            "sessions": _sessions(page),
            "idle transaction": _idle_transaction(page),
            "blocked": _blocked(page),
            "standby": _standby(page),
            "backup": _backup(page),
            "restore drill": _drill(page),
        }
    rows["scrape"] = _scrape(page)
    return [line(name, text) for name, text in rows.items()]


def line(name: str, text: str) -> str:
    """A line of the summary."""
    return f"  {name:<18}{text}"


def _server(page: Page) -> str:
    if page.values("pg_up") != [1]:
        return f"down: {page.label('pg_down_reason', 'reason').replace('_', ' ')}"
    info = "pg_server_info"
    return f"up, version {page.label(info, 'version')}, {page.label(info, 'role')}"


def _commits(page: Page, before: Page | None) -> str:
    # The shop's alone: the exporter's own queries are transactions too.
    now, then = (
        sum(one.values("pg_stat_database_xact_commit_total", datname="shop")) if one else 0
        for one in (page, before)
    )
    if before is None or not then:
        return "a rate needs two readings"
    return f"{(now - then) / (page.moment - before.moment):.1f} per second in the shop"


def _sessions(page: Page) -> str:
    name = "pg_stat_activity_sessions"
    counts = (f"{sum(page.values(name, state=state)):.0f} {state}" for state in _STATES)
    return ", ".join(counts)


def _idle_transaction(page: Page) -> str:
    ages = page.values("pg_stat_activity_oldest_idle_in_transaction_seconds")
    oldest = max(ages, default=0)
    return f"the oldest is idle for {oldest:.0f} s" if oldest else "none"


def _blocked(page: Page) -> str:
    blocked = sum(page.values("pg_locks_blocked_sessions"))
    if not blocked:
        return "none"
    longest = max(page.values("pg_locks_longest_wait_seconds"), default=0)
    return f"{_count(blocked, 'session')} waiting for a lock, for {longest:.0f} s"


def _standby(page: Page) -> str:
    streaming = sum(page.values("pg_stat_replication_streaming_standbys"))
    behind = page.values("pg_stat_replication_replay_lag_bytes")
    if not streaming or not behind:
        return "none is streaming"
    return f"{streaming:.0f} streaming, {max(behind):,.0f} bytes behind"


def _backup(page: Page) -> str:
    sizes = page.values("pg_record_last_good_size_bytes", kind="backup")
    age = _age(page, "backup")
    return f"the last good one {age}, {sizes[0] / 1e6:.0f} MB" if sizes and age else "none is known"


def _drill(page: Page) -> str:
    seconds = page.values("pg_record_last_good_duration_seconds", kind="restore_verification")
    age = _age(page, "restore_verification")
    return f"passed {age}: back in {seconds[0]:.1f} s" if seconds and age else "none is known"


def _age(page: Page, kind: str) -> str:
    ends = page.values("pg_record_last_good_ended_timestamp_seconds", kind=kind)
    return f"{max(0, time.time() - max(ends)):.0f} s ago" if ends else ""


def _scrape(page: Page) -> str:
    seconds = max(page.values("pgvigil_scrape_duration_seconds"), default=0)
    return f"{page.series:,} series in {seconds * 1000:.0f} ms"


def _count(number: float, what: str) -> str:
    return f"{number:.0f} {what}{'' if number == 1 else 's'}"
