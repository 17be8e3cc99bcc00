"""Read who may come in over HTTP and how, as Prometheus' web configuration file tells it."""

import re
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from pgvigil import documents, tls
from pgvigil.errors import Problem, Refused
from pgvigil.tls import Pem, Tls

DEAREST = 15
"""The highest cost of a bcrypt hash: some two seconds of work for each password that is tried."""
_AGAIN = 2.0
"""Seconds after which files that have changed are read once more: the clock of a file system is
coarse, and who writes may have been half-way through."""
_QUIET = 60.0
"""Seconds between two words to the log about clients that were not let in."""
_RETRY = 10.0
"""Seconds between two looks at files that were no good: what they lack may have come by now."""

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CURVES = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}
_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""What Go calls secure for TLS 1.2, and OpenSSL's names for it."""
_OF_TLS13 = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
_VERIFY = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_TLS = "tls_server_config"
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

_log = structlog.get_logger()

_Stamp = tuple[int, ...]
"""What tells one version of a file from the next without reading it."""
_Faults = Iterator[tuple[documents.Keys, str]]
"""The way to a value, and what is wrong with it."""


class Denied(StrEnum):
    """Why somebody was not let in."""

    CREDENTIALS = "credentials"
    """No user with that password."""
    BUSY = "busy"
    """Too many passwords were to be looked at."""
    RATE = "rate"
    """Too many requests."""
    HANDSHAKE = "handshake"
    """No TLS, or no certificate that may come."""


class Pace(NamedTuple):
    """How many requests may come."""

    interval: float
    """Seconds between two."""
    burst: int
    """So many may come at once."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a web configuration file says."""

    path: Path
    stamp: _Stamp = field(compare=False)
    """Of the file, before it was read."""
    tls: Tls | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of every answer; an empty one is not sent."""
    http2: bool = True
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Names and bcrypt hashes; whoever comes may come in when there are none."""
    pace: Pace | None = None


def read(path: Path) -> Rules:
    """What the file at `path` says; raises Refused with every fault of it and of what it names."""
    stamp = _stamp(path)
    document, problems = documents.read(path)
    if document is None or problems:
        raise Refused(problems)
    if document.data is None:  # nothing but comments: nobody is kept out
        document = replace(document, data={})
    problems, sound = documents.check(document, "web")
    data: Mapping[str, Any] = sound or {}
    faults = (*_tls_faults(document.data, data), *_user_faults(data), *_pace_faults(data))
    problems += [document.problem(keys, text) for keys, text in faults]
    if problems:
        raise Refused(problems)
    http = data.get("http_server_config", {})
    http2 = http.get("http2", True)
    made = None
    if _TLS in data:
        made = _tls(document, path, data[_TLS], http2)
        tls.make(made, tls.read(made))
    return Rules(
        path,
        stamp,
        made,
        http.get("headers", {}),
        http2,
        data.get("basic_auth_users", {}),
        _pace(data),
    )


def _tls_faults(written: Any, data: Mapping[str, Any]) -> _Faults:
    """What is wrong with the part on TLS, beside its form."""
    raw: Mapping[str, Any] = data.get(_TLS) or {}
    if not raw:
        return
    there = written[_TLS].keys()
    for name in ("cert", "key", "client_ca"):
        if {name, f"{name}_file"} <= there:
            yield (_TLS, name), f"there is {name}_file as well; write one of the two"
    for name in ("cert", "key"):
        if there.isdisjoint({name, f"{name}_file"}):
            yield (_TLS,), f"lacks {name}_file (or {name}), without which there is no TLS"
    for key, text in (*_client_faults(raw, there), *_cipher_faults(raw)):
        yield (_TLS, key), text


def _client_faults(raw: Mapping[str, Any], there: Set[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with how clients' certificates are looked at: the key and the text."""
    mode = raw.get("client_auth_type", "NoClientCert")
    authorities = "client_ca" if "client_ca" in there else "client_ca_file"
    if mode not in _VERIFY:
        text = (
            f"{mode} takes any certificate, which Python's ssl cannot, and which proves nothing; "
            "RequireAndVerifyClientCert asks for one of client_ca_file, NoClientCert for none"
        )
        yield "client_auth_type", text
    elif mode == "NoClientCert" and authorities in there:
        text = "nobody is asked for a certificate; set client_auth_type: RequireAndVerifyClientCert"
        yield authorities, text
    elif mode != "NoClientCert" and authorities not in there:
        text = f"{mode} needs client_ca_file (or client_ca): who may have signed"
        yield "client_auth_type", text
    if "client_allowed_sans" in raw and mode != "RequireAndVerifyClientCert":
        text = "needs client_auth_type: RequireAndVerifyClientCert; else there may be no name"
        yield "client_allowed_sans", text


def _cipher_faults(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with versions, ciphers and curves: the key and the text."""
    for key in ("min_version", "max_version"):
        if raw.get(key, "TLS12") not in _VERSIONS:
            text = "OpenSSL 3 speaks TLS 1.2 and 1.3 alone, as RFC 8996 has it; write TLS12"
            yield key, text
    if (raw.get("min_version"), raw.get("max_version")) == ("TLS13", "TLS12"):
        yield "max_version", "is below min_version, so that nobody could come in"
    for name in raw.get("cipher_suites", ()):
        if name in _OF_TLS13:
            text = f"{name} is of TLS 1.3, where all are on and none can be chosen; leave it out"
            yield "cipher_suites", text
        elif name not in _SUITES:
            text = f"{name!r} is none of Go's secure suites for TLS 1.2: {', '.join(_SUITES)}"
            yield "cipher_suites", text
    if len(raw.get("curve_preferences", ())) > 1:
        text = "Python's ssl takes one curve; name one, or drop the key for OpenSSL's own choice"
        yield "curve_preferences", text


def _user_faults(data: Mapping[str, Any]) -> _Faults:
    for name, hashed in (data.get("basic_auth_users") or {}).items():
        cost = int(hashed[4:6])
        if not 4 <= cost <= DEAREST:
            text = (
                f"the hash has cost {cost}, and a look at a password is 2 to the power of it; "
                f"bcrypt begins with 4, and above {DEAREST} a scrape would be over: take 10"
            )
            yield ("basic_auth_users", name), text


def _pace_faults(data: Mapping[str, Any]) -> _Faults:
    raw = data.get("rate_limit") or {}
    interval, at = raw.get("interval"), ("rate_limit", "interval")
    if isinstance(interval, int) and interval:
        yield at, f"needs a unit, such as {interval}s"
    elif interval and _seconds(interval) and not raw.get("burst"):
        yield at, "lets nobody in without a burst of at least 1"


def _pace(data: Mapping[str, Any]) -> Pace | None:
    raw = data.get("rate_limit") or {}
    interval = _seconds(raw.get("interval", 0))
    return Pace(interval, raw["burst"]) if interval else None


def _seconds(interval: str | int) -> float:
    """A duration as Go writes it."""
    parts = re.findall(r"([0-9.]+)(ns|us|µs|ms|s|m|h)", str(interval))
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _tls(document: documents.Document, path: Path, raw: Mapping[str, Any], http2: bool) -> Tls:
    def pem(name: str) -> Pem:
        key = f"{name}_file" if f"{name}_file" in raw else name
        file = path.parent / raw[key] if key != name else None
        line = document.problem((_TLS, key), "").line
        return Pem(document.place, line, file, "" if file else raw[key])

    curves: Sequence[str] = raw.get("curve_preferences", ())
    return Tls(
        pem("cert"),
        pem("key"),
        pem("client_ca") if "client_ca" in raw or "client_ca_file" in raw else None,
        _VERIFY[raw.get("client_auth_type", "NoClientCert")],
        frozenset(raw.get("client_allowed_sans", ())),
        _VERSIONS[raw.get("min_version", "TLS12")],
        _VERSIONS[raw.get("max_version", "TLS13")],
        ":".join(_SUITES[name] for name in raw.get("cipher_suites", ())),
        raw.get("prefer_server_cipher_suites", True),
        _CURVES[curves[0]] if curves else "",
        http2,
    )


def _stamp(path: Path) -> _Stamp:
    try:
        of = path.stat()
    except (OSError, ValueError):
        return ()
    return of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns


class Web:
    """The rules in force, which follow their files."""

    def __init__(self, rules: Rules) -> None:
        """Begin with these; raises Refused when a file has changed meanwhile and is no good."""
        self.rules = rules
        self.context: tls.Context | None = None
        self.denied: Counter[Denied] = Counter()
        self.failures = 0
        """Versions of the files that were refused."""
        self.current = True
        """Whether the files are in force as they are now."""
        self.changed: Callable[[], object] = lambda: None
        """Called when those who are in have come by rules on TLS that hold no more."""
        self._denied_at = float("-inf")
        self._material: tls.Material | None = None
        self._told: Sequence[Problem] = ()
        self._next = 0.0
        """When to read them again though nothing has changed; 0 when there is no need."""
        self._whole = False
        """Whether that means the configuration itself."""
        self._tokens = float(rules.pace.burst) if rules.pace else 0.0
        self._counted_at = time.monotonic()
        self._stamps = {path: _stamp(path) for path in _files(rules)}
        self._take(rules)

    def look(self) -> Rules:
        """The rules in force now, after a look at whether a file has changed."""
        stamps = {path: _stamp(path) for path in self._stamps}
        due = self._next and time.monotonic() >= self._next
        if stamps == self._stamps and not due:
            return self.rules
        whole = self._whole or stamps[self.rules.path] != self.rules.stamp
        self._stamps, self._next, self._whole = stamps, 0.0, False
        try:
            rules = read(self.rules.path) if whole else self.rules
            if bool(rules.tls) != bool(self.rules.tls):
                text = "TLS comes and goes with a restart alone"
                raise Refused([Problem(str(rules.path), None, text)])
            renewed = self._take(rules)
        except Refused as error:
            self._next, self._whole = time.monotonic() + _RETRY, whole
            self._refused(error.problems)
            return self.rules
        self._stamps = {path: _stamp(path) for path in _files(self.rules)}
        if renewed or not due:  # a second time, when nothing can be half-way any more
            self._next, self._whole = time.monotonic() + _AGAIN, whole
        if renewed or not self.current:
            _log.info("the web configuration was read anew", file=str(rules.path))
        self.current, self._told = True, ()
        return self.rules

    def secure(self) -> ssl.SSLContext:
        """The context for whoever comes now."""
        self.look()
        assert self.context
        return self.context

    def within_pace(self) -> bool:
        """Whether one more request may come now, which is counted."""
        if not (pace := self.rules.pace):
            return True
        now = time.monotonic()
        gained = (now - self._counted_at) / pace.interval
        self._tokens, self._counted_at = min(pace.burst, self._tokens + gained), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def deny(self, why: Denied, detail: str = "") -> None:
        """Count somebody who was not let in, and tell the log now and then."""
        self.denied[why] += 1
        now = time.monotonic()
        if now - self._denied_at >= _QUIET:
            self._denied_at = now
            more = {"detail": detail} if detail else {}
            _log.warning("a client was not let in", reason=str(why), **more)

    def _take(self, rules: Rules) -> bool:
        """Have these in force, if they are others; raises Refused, and then the old ones still are.

        Whether something is other now.
        """
        other = False
        if rules.tls:
            material = tls.read(rules.tls)
            if (material, rules.tls) != (self._material, self.rules.tls):
                context = tls.make(rules.tls, material)
                context.declined = partial(self.deny, Denied.HANDSHAKE)
                if context.expiry and context.expiry < time.time():
                    _log.warning("our own certificate has expired", file=str(rules.path))
                self.context, self._material, other = context, material, True
                self.changed()
        if rules == self.rules:
            # The same users, too, as what is known of their passwords goes by that.
            self.rules = replace(self.rules, stamp=rules.stamp)
            return other
        self.rules = rules
        return True

    def _refused(self, problems: Sequence[Problem]) -> None:
        self.current = False
        if problems != self._told:
            self.failures += 1
            self._told = problems
            told = [str(problem) for problem in problems]
            _log.error("the web configuration is refused; the last good one holds", problems=told)


def _files(rules: Rules) -> Iterable[Path]:
    yield rules.path
    if rules.tls:
        yield from (part.path for part in rules.tls.parts if part.path)
