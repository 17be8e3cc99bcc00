"""Say which hosts a request may name, and where their names may lead."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple

_PLACE = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?))"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?:/(?P<dbname>[^\x00-\x1f\x7f/=?#]{1,63})?)?"
)
_NAMES = re.compile(r"\*|(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_NUMERIC = re.compile(r"[0-9a-f:.]*[:/][0-9a-f:./]*|[0-9.]+")


class Place(NamedTuple):
    """What a request names."""

    host: str
    port: str
    """Empty where it says none, as is `dbname`."""
    dbname: str


@dataclass(frozen=True, slots=True)
class Allowed:
    """Which hosts may be named, and where that may lead."""

    networks: Sequence[IPv4Network | IPv6Network] = ()
    names: Sequence[str] = ()
    """Names in lower case; one that begins with `*.` is for all that end so, `*` for all."""

    def named(self, host: str) -> bool:
        """Whether a request may name this host: an address of a network, or a name that fits."""
        try:
            ip_address(host)
        except ValueError:
            name = host.lower().removesuffix(".")
            return any(
                known in ("*", name) or (known[:2] == "*." and name.endswith(known[1:]))
                for known in self.names
            )
        return self.reached(host)

    def reached(self, address: str) -> bool:
        """Whether a connection to this address may be made."""
        found = ip_address(address)
        mapped = getattr(found, "ipv4_mapped", None)
        return any((mapped or found) in network for network in self.networks)


def parse(text: str) -> Place | None:
    """`HOST`, `HOST:PORT` or either with `/DBNAME`; None when it is none of these."""
    found = _PLACE.fullmatch(text)
    if not found or int(found["port"] or 1) > 65535:
        return None
    return Place(found["v6"] or found["host"], found["port"] or "", found["dbname"] or "")


def allowed(texts: Sequence[str]) -> tuple[Allowed, dict[int, str]]:
    """What a list allows, and what is wrong with it by position."""
    networks: list[IPv4Network | IPv6Network] = []
    names: list[str] = []
    faults: dict[int, str] = {}
    for position, text in enumerate(texts):
        word = text.lower()
        if _NUMERIC.fullmatch(word):
            try:
                networks.append(ip_network(word))
            except ValueError:
                faults[position] = "must be a network such as 10.0.0.0/8, with no bits behind it"
        elif _NAMES.fullmatch(word):
            names.append(word)
        else:
            faults[position] = "must be a network such as 10.0.0.0/8, or a name such as *.db.local"
    if not networks and not faults:
        faults[0] = "holds no network, so that no host can be reached; add one such as 10.0.0.0/8"
    return Allowed(tuple(networks), tuple(names)), faults
