"""A request may name the hosts that are allowed, however it spells them, and no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import hosts
from pgvigil.hosts import Place

NETWORKS = ("10.0.0.0/8", "192.168.1.7", "fd00::/8")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("db1", ("db1", "", "")),
        ("db1:5433", ("db1", "5433", "")),
        ("db1:5433/app", ("db1", "5433", "app")),
        ("10.0.0.1/my app", ("10.0.0.1", "", "my app")),
        ("[fd00::1]:5432", ("fd00::1", "5432", "")),
        ("db1.example.com./", ("db1.example.com.", "", "")),
    ],
)
def test_a_place_is_a_host_with_or_without_port_and_database(text: str, place: Place) -> None:
    assert hosts.parse(text) == place


@pytest.mark.parametrize(
    "text",
    [
        *("", ":5432", "/app", "db1:0", "db1:65536", "db1:x", "db1 ", "-db1", "db1/a/b", "db1/a=b"),
        *("postgresql://db1", "host=db1", "user@db1", "db1,db2", "/run/postgresql", "@abstract"),
        *("fd00::1", "db1\n", "db1/\0", "db1:5432,5433", "db1/a?sslmode=disable", "[fd00::1%lo]"),
    ],
)
def test_what_is_no_place_is_none(text: str) -> None:
    assert hosts.parse(text) is None


@given(st.text(st.sampled_from("ab.:/[]%@,=- \t\n?#'\"\\1é0"), max_size=12))
def test_no_place_holds_what_libpq_takes_for_more_than_one_host(text: str) -> None:
    if place := hosts.parse(text):
        assert not set(place.host) & set(",/@ =%'\\[]\n")
        assert not set(place.dbname) & set("/=\n\t")


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("10.1.2.3", True),
        ("11.1.2.3", False),
        ("192.168.1.7", True),
        ("192.168.1.8", False),
        ("fd00::1", True),
        ("FD00:0::1", True),
        ("fe80::1", False),
        ("::ffff:10.0.0.1", True),
        ("::ffff:11.0.0.1", False),
        ("db1.example.com", True),
        ("DB1.Example.COM.", True),
        ("a.b.example.com", True),
        ("example.com", False),
        ("evilexample.com", False),
        ("db1.example.com.evil.org", False),
        ("only", True),
        ("only.example.org", False),
        ("localhost", False),
        # Whatever else a resolver takes for an address is a name here, and none of those.
        ("10.1", False),
        ("0x0a000001", False),
        ("167772161", False),
        ("010.0.0.1", False),
    ],
)
def test_an_address_needs_a_network_and_a_name_a_pattern(host: str, named: bool) -> None:
    allowed, faults = hosts.allowed([*NETWORKS, "*.Example.com", "only"])
    assert not faults
    assert allowed.named(host) is named


def test_a_name_leads_where_the_networks_are_and_nowhere_else() -> None:
    allowed, _ = hosts.allowed([*NETWORKS, "*"])
    assert allowed.named("anything")
    assert not allowed.named("127.0.0.1")
    reached = ["10.0.0.1", "::ffff:10.0.0.1", "fd12::1"]
    assert all(map(allowed.reached, reached))
    assert not any(map(allowed.reached, ["127.0.0.1", "::1", "169.254.169.254", "fe80::1%eth0"]))


def test_what_allows_nothing_that_can_be_meant_is_told() -> None:
    network = "must be a network such as 10.0.0.0/8, with no bits behind it"
    either = "must be a network such as 10.0.0.0/8, or a name such as *.db.local"
    texts = ["10.0.0.1/8", "10.0.0", "fd00::1/8", "*db", "a b", "db*", "*.", "10.0.0.0/8"]
    assert hosts.allowed(texts)[1] == {
        **dict.fromkeys(range(3), network),
        **dict.fromkeys(range(3, 7), either),
    }
    assert hosts.allowed(["*.db.local"])[1] == {
        0: "holds no network, so that no host can be reached; add one such as 10.0.0.0/8"
    }
