"""A web configuration file is taken as Prometheus' exporters take it, or refused with its line."""

import json
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgvigil import web
from pgvigil.errors import Problem, Refused
from pgvigil.web import Denied, Web

from lab.authority import Authority, Pair

HASH = "$2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG"
KEYS = "cert_file: server.pem\n  key_file: server.key"


class Files:
    """A folder with certificates, and a web configuration that a test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.server = self.authority.sign("server", "DNS:localhost")
        self.other = self.authority.sign("other", "DNS:elsewhere")
        self.web = folder / "web.yml"

    def read(self, text: str) -> web.Rules:
        self.web.write_text(text)
        return web.read(self.web)

    def faults(self, text: str) -> list[tuple[int | None, str]]:
        with pytest.raises(Refused) as refused:
            self.read(text)
        assert {problem.place for problem in refused.value.problems} == {str(self.web)}
        return [(problem.line, problem.text) for problem in refused.value.problems]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("web"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for what is under test."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    return pass_by


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}", "http_server_config: {}"])
def test_a_file_that_says_nothing_keeps_nobody_out(files: Files, text: str) -> None:
    rules = files.read(text)
    assert (rules.tls, rules.users, rules.headers, rules.pace) == (None, {}, {}, None)


def test_all_that_exporter_toolkit_knows_is_read(files: Files) -> None:
    rules = files.read(
        f"""
tls_server_config:
  {KEYS}
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: authority.pem
  client_allowed_sans: [prometheus, 10.0.0.1]
  min_version: TLS12
  max_version: TLS13
  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]
  prefer_server_cipher_suites: false
  curve_preferences: [X25519]
http_server_config:
  http2: false
  headers:
    Content-Security-Policy: default-src 'self'
    X-Frame-Options: sameorigin
    X-Content-Type-Options: nosniff
    X-XSS-Protection: "1"
    Strict-Transport-Security: max-age=31536000
basic_auth_users:
  prometheus: {HASH}
rate_limit: {{interval: 1m1.5s, burst: 20}}
"""
    )
    assert rules.tls
    assert rules.tls.verify is ssl.CERT_REQUIRED
    assert rules.tls.names == {"prometheus", "10.0.0.1"}
    assert rules.tls.ciphers == "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384"
    assert rules.tls.curve == "X25519"
    assert not rules.tls.ours_first
    assert not rules.http2
    assert rules.headers["X-Frame-Options"] == "sameorigin"
    assert rules.users == {"prometheus": HASH}
    assert rules.pace == (61.5, 20)


def test_certificates_may_stand_in_the_file_itself(files: Files) -> None:
    names = {"cert": "server.pem", "key": "server.key", "client_ca": "authority.pem"}
    inline = {key: (files.folder / name).read_text() for key, name in names.items()}
    inline["client_auth_type"] = "VerifyClientCertIfGiven"
    rules = files.read(json.dumps({"tls_server_config": inline}))
    guard = Web(rules)
    assert guard.context
    assert guard.context.verify_mode is ssl.CERT_OPTIONAL
    assert "BEGIN PRIVATE" not in repr(rules)


def in_tls(*lines: str) -> str:
    return "\n".join(["tls_server_config:", f"  {KEYS}", *(f"  {line}" for line in lines)])


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("users: {}", 1, "unknown key 'users'"),
        ("tls_server_config: {}", 1, "must not be empty"),
        ("tls_server_config: {cert_file: server.pem}", 1, "lacks key_file (or key)"),
        ("tls_server_config:\n  key_file: server.key", 1, "lacks cert_file (or cert)"),
        (in_tls("cert: x"), 4, "there is cert_file as well"),
        (in_tls("client_ca_file: authority.pem"), 4, "nobody is asked for a certificate"),
        (in_tls("client_auth_type: RequireAndVerifyClientCert"), 4, "needs client_ca_file"),
        (in_tls("client_auth_type: VerifyClientCertIfGiven"), 4, "needs client_ca_file"),
        (in_tls("client_auth_type: RequestClientCert"), 4, "which Python's ssl cannot"),
        (in_tls("client_auth_type: RequireAnyClientCert"), 4, "which Python's ssl cannot"),
        (in_tls("client_auth_type: RequireClientCert"), 4, "which Python's ssl cannot"),
        (in_tls("client_auth_type: Any"), 4, "must be one of NoClientCert, RequestClientCert"),
        (in_tls("client_allowed_sans: [x]"), 4, "needs client_auth_type: RequireAndVerify"),
        (in_tls("client_allowed_sans: []"), 4, "must not be empty"),
        (in_tls("min_version: TLS10"), 4, "TLS 1.2 and 1.3 alone"),
        (in_tls("max_version: TLS11"), 4, "TLS 1.2 and 1.3 alone"),
        (in_tls("min_version: TLS13", "max_version: TLS12"), 5, "is below min_version"),
        (in_tls("cipher_suites: [TLS_AES_128_GCM_SHA256]"), 4, "is of TLS 1.3"),
        (in_tls("cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]"), 4, "none of Go's secure suites"),
        (in_tls("curve_preferences: [X25519, CurveP256]"), 4, "takes one curve"),
        (in_tls("curve_preferences: [CurveP224]"), 4, "must be one of CurveP256"),
        ("tls_server_config:\n  cert_file: x\n  key_file: server.key", 2, "No such file"),
        ("tls_server_config:\n  cert_file: .\n  key_file: server.key", 2, "Is a directory"),
        (
            "tls_server_config:\n  cert_file: server.key\n  key_file: server.key",
            2,
            "no certificate",
        ),
        ("tls_server_config:\n  cert_file: server.pem\n  key_file: server.pem", 3, "holds no key"),
        ("tls_server_config:\n  cert_file: server.pem\n  key_file: other.key", 3, "not the key of"),
        (
            in_tls("client_auth_type: RequireAndVerifyClientCert", "client_ca_file: server.key"),
            5,
            "holds no certificates",
        ),
        ("http_server_config: {headers: {Server: x}}", 1, "unknown key 'Server'"),
        ("http_server_config: {headers: {X-Frame-Options: allow}}", 1, "must be one of deny"),
        ('http_server_config: {headers: {X-XSS-Protection: "a\\nb"}}', 1, "printable ASCII"),
        ("basic_auth_users: {}", 1, "must not be empty"),
        ("basic_auth_users:\n  a: secret", 2, "a bcrypt hash"),
        (f"basic_auth_users:\n  'a:b': {HASH}", 2, "has no colon"),
        (f"basic_auth_users:\n  a: {HASH.replace('$10$', '$16$')}", 2, "has cost 16"),
        (f"basic_auth_users:\n  a: {HASH.replace('$10$', '$03$')}", 2, "has cost 3"),
        (f"basic_auth_users:\n  a: {HASH.replace('2y', '2x')}", 2, "a bcrypt hash"),
        (f"basic_auth_users:\n  a: {HASH[:28]}a{HASH[29:]}", 2, "a bcrypt hash"),
        ("rate_limit: {burst: 3}", 1, "lacks the key 'interval'"),
        ("rate_limit: {interval: 3, burst: 3}", 1, "needs a unit, such as 3s"),
        ("rate_limit: {interval: 3s}", 1, "a burst of at least 1"),
        ("rate_limit: {interval: often, burst: 3}", 1, "is not of the right form"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_line(
    files: Files, text: str, line: int, told: str
) -> None:
    ((at, said),) = files.faults(text)
    assert at == line
    assert told in said
    assert "secret" not in said


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(files: Files) -> None:
    for cipher in ("-aes128", "-traditional -aes128"):
        locked = files.folder / "locked.key"
        command = f"openssl pkey {cipher} -passout pass:x -in {files.server.key} -out {locked}"
        assert os.system(command) == 0
        text = "tls_server_config:\n  cert_file: server.pem\n  key_file: locked.key"
        ((line, said),) = files.faults(text)
        assert line == 3
        assert "needs a passphrase" in said


def test_all_faults_are_told_at_once(files: Files) -> None:
    told = files.faults(f"users: {{}}\n{in_tls('min_version: TLS10')}\nrate_limit: {{burst: x}}")
    assert [line for line, _ in told] == [1, 6, 6, 5]


@given(
    st.dictionaries(
        st.sampled_from(
            ["tls_server_config", "http_server_config", "basic_auth_users", "rate_limit", "x"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.just(HASH),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            *("cert", "key", "cert_file", "key_file", "headers", "http2", "burst"),
                            *("interval", "cipher_suites", "client_allowed_sans", "min_version"),
                        ]
                    )
                    | st.text(),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_file_of_whatever_form_is_taken_amiss(files: Files, data: Mapping[str, Any]) -> None:
    told: Sequence[Problem] | None = None
    try:
        Web(files.read(json.dumps(data)))
    except Refused as refused:
        told = refused.problems
    assert told is None or (told and all(HASH not in str(problem) for problem in told))


def expiry(guard: Web) -> float:
    guard.look()
    assert guard.context
    assert guard.context.expiry
    return guard.context.expiry


def give(pair: Pair, to: Pair) -> None:
    """Put a pair in the place of another, as a whole, as Kubernetes and certbot do."""
    for source, target in zip(pair, to, strict=True):
        new = target.with_suffix(".new")
        new.write_bytes(source.read_bytes())
        new.replace(target)


def test_a_certificate_that_is_renewed_is_shown_to_the_next_who_comes(tmp_path: Path) -> None:
    files = Files(tmp_path)
    guard = Web(files.read(in_tls()))
    changes: list[object] = []
    guard.changed = lambda: changes.append(guard.context)
    before, old = guard.context, expiry(guard)
    assert guard.secure() is before
    give(files.authority.sign("longer", "DNS:localhost", 90), files.server)
    assert guard.secure() is not before
    assert expiry(guard) > old + 50 * 86400
    assert changes == [guard.context]
    assert (guard.current, guard.failures) == (True, 0)


def test_a_change_that_is_no_good_leaves_the_last_good_in_force(tmp_path: Path) -> None:
    files = Files(tmp_path)
    guard = Web(files.read(in_tls()))
    before = guard.context
    files.server.key.write_bytes(files.other.key.read_bytes())
    for _ in range(3):
        assert guard.secure() is before
    assert (guard.current, guard.failures) == (False, 1)
    files.server.certificate.write_bytes(files.other.certificate.read_bytes())
    assert guard.secure() is not before
    assert (guard.current, guard.failures) == (True, 1)
    files.web.write_text("nonsense: 1")
    rules = guard.rules
    assert guard.look() is rules
    assert (guard.current, guard.failures) == (False, 2)


def test_what_a_refused_file_lacks_is_looked_for_again(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    files = Files(tmp_path)
    guard = Web(files.read(in_tls()))
    files.web.write_text(in_tls().replace("server.", "late."))
    guard.look()
    assert not guard.current
    files.authority.sign("late", "DNS:localhost", 90)
    clock(60)
    guard.look()
    assert (guard.current, guard.failures) == (True, 1)


def test_a_file_that_changed_without_a_trace_is_read_a_second_time(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "web.yml"
    path.write_text(f"basic_auth_users: {{aa: {HASH}}}")
    guard = Web(web.read(path))
    path.write_text(f"basic_auth_users: {{ab: {HASH}}}")
    os.utime(path, (1, 1))
    assert guard.look().users == {"ab": HASH}
    same = web._stamp(path)
    monkeypatch.setattr(web, "_stamp", lambda _: same)
    path.write_text(f"basic_auth_users: {{ac: {HASH}}}")
    assert guard.look().users == {"ab": HASH}
    clock(5)
    assert guard.look().users == {"ac": HASH}
    path.write_text(f"basic_auth_users: {{ad: {HASH}}}")
    clock(5)
    guard.look()
    clock(5)
    assert guard.look().users == {"ad": HASH}


def test_users_are_the_same_ones_until_the_file_says_otherwise(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    path = tmp_path / "web.yml"
    path.write_text(f"basic_auth_users: {{a: {HASH}}}")
    guard = Web(web.read(path))
    users = guard.rules.users
    path.write_text(f"# Only a word more.\nbasic_auth_users: {{a: {HASH}}}")
    assert guard.look().users is users
    clock(5)
    assert guard.look().users is users
    assert guard.current


@pytest.mark.parametrize(("before", "after"), [("{}", in_tls()), (in_tls(), "{}")])
def test_tls_neither_comes_nor_goes_while_the_program_runs(
    files: Files, before: str, after: str
) -> None:
    guard = Web(files.read(before))
    context = guard.context
    files.web.write_text(after)
    os.utime(files.web, (1, 1))
    guard.look()
    assert (guard.current, guard.context) == (False, context)


def test_a_file_that_is_gone_is_a_change_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.yml"
    path.write_text(f"basic_auth_users: {{a: {HASH}}}")
    guard = Web(web.read(path))
    path.unlink()
    assert guard.look().users == {"a": HASH}
    assert not guard.current


def test_requests_come_at_the_pace_that_is_told(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    path = tmp_path / "web.yml"
    path.write_text("rate_limit: {interval: 500ms, burst: 3}")
    guard = Web(web.read(path))
    assert [guard.within_pace() for _ in range(5)] == [True, True, True, False, False]
    clock(0.5)
    assert [guard.within_pace() for _ in range(2)] == [True, False]
    clock(100)
    assert [guard.within_pace() for _ in range(5)] == [True, True, True, False, False]
    path.write_text("rate_limit: {interval: 0}")
    guard.look()
    assert all(guard.within_pace() for _ in range(100))


def test_who_is_not_let_in_is_counted_and_told_once(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(web, "_log", logger)
    guard = Web(files.read(""))
    for _ in range(5):
        guard.deny(Denied.CREDENTIALS)
    guard.deny(Denied.HANDSHAKE, "HTTP_REQUEST")
    assert guard.denied == {Denied.CREDENTIALS: 5, Denied.HANDSHAKE: 1}
    assert [call.method_name for call in logger.calls] == ["warning"]
