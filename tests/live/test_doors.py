"""Those come in whom the web configuration lets in, as a real exporter serves and sees them."""

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from pgvigil import alive
from pgvigil.config import Address

from lab.authority import Authority, Pair
from lab.exporter import Exporter

NOWHERE = ("--dsn", "host=127.0.0.1 port=1")
"""A server that is down is an answer, too."""
SECRET = ("prometheus", "canary-secret")
USERS = {SECRET[0]: bcrypt.hashpw(SECRET[1].encode(), bcrypt.gensalt(6)).decode()}
SEEN = "127.0.0.1"
PATIENCE = 42.0
"""Seconds after which no client that stalls may be borne: 10 for TLS, 20 to ask, and the look at
who overstays, with room for a machine that is busy."""


class House:
    """A folder with an authority's certificates and a web configuration."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.server = self.authority.sign("server", f"IP:{SEEN},DNS:localhost")
        self.file = folder / "web.yml"
        self.tls = {"cert_file": "server.pem", "key_file": "server.key"}

    def write(self, **parts: Any) -> None:
        self.file.write_text(json.dumps(parts))  # JSON is YAML

    def exporter(self, *, client: Pair | None = None, **more: Any) -> Exporter:
        tls = (
            self.authority.client(client) if "tls_server_config" in self.file.read_text() else None
        )
        return Exporter(*NOWHERE, "--web-config", str(self.file), tls=tls, **more)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def quiet(exporter: Exporter) -> None:
    """Nothing stands in the log that is no line of ours, or that is an error."""
    lines = [json.loads(line) for line in exporter.log.splitlines()]
    assert [line for line in lines if line["level"] == "error"] == []
    assert SECRET[1] not in exporter.log
    assert "$2b$" not in exporter.log


def test_with_tls_it_is_served_by_the_certificate_that_is_told(house: House) -> None:
    house.write(tls_server_config=house.tls)
    with house.exporter() as exporter:
        page = exporter.scrape()
        assert page.value("pg_up") == 0
        assert page.value("pgvigil_web_config_current") == 1
        expiry = page.value("pgvigil_web_certificate_expiry_timestamp_seconds")
        assert expiry == pytest.approx(time.time() + 30 * 86400, abs=3600)
        assert json.loads(exporter.get("/sd").body)[0]["labels"]["__scheme__"] == "https"
        exporter.tls = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            exporter.get("/livez")
        quiet(exporter)


def test_versions_ciphers_and_curves_are_those_that_are_told(house: House) -> None:
    suite = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
    newest, older = ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2
    cases: list[tuple[Mapping[str, Any], ssl.TLSVersion, str | None]] = [
        ({}, older, "TLSv1.2"),
        ({}, newest, "TLSv1.3"),
        ({"max_version": "TLS12"}, newest, "TLSv1.2"),
        ({"min_version": "TLS13"}, older, None),
        ({"curve_preferences": ["CurveP256"]}, newest, "TLSv1.3"),
        ({"curve_preferences": ["CurveP384"]}, newest, None),
        ({"cipher_suites": [suite], "max_version": "TLS12"}, newest, "TLSv1.2"),
    ]
    house.write(tls_server_config=house.tls)
    with house.exporter() as exporter:
        for http2, (more, latest, spoken) in enumerate(cases):
            house.write(
                tls_server_config={**house.tls, **more},
                http_server_config={"http2": bool(http2 % 2)},
            )
            client = house.authority.client()
            client.maximum_version = latest
            client.set_ecdh_curve("prime256v1")
            client.set_alpn_protocols(["h2", "http/1.1"])
            with socket.create_connection((SEEN, exporter.port)) as plain:
                if spoken is None:
                    with pytest.raises((ssl.SSLError, ConnectionError)):
                        client.wrap_socket(plain, server_hostname=SEEN)
                    continue
                with client.wrap_socket(plain, server_hostname=SEEN) as encrypted:
                    assert encrypted.version() == spoken
                    assert encrypted.selected_alpn_protocol() == ("http/1.1", "h2")[http2 % 2]
                    if "cipher_suites" in more:
                        assert encrypted.cipher() == (
                            "ECDHE-ECDSA-AES256-GCM-SHA384",
                            "TLSv1.2",
                            256,
                        )
        quiet(exporter)


def test_clients_come_by_certificates_of_the_authority_with_a_name_that_may(
    house: House, tmp_path: Path
) -> None:
    house.write(
        tls_server_config={
            **house.tls,
            "client_auth_type": "RequireAndVerifyClientCert",
            "client_ca_file": "authority.pem",
            "client_allowed_sans": ["prometheus", "::1"],
        }
    )
    other = Authority(tmp_path, "another")
    good = house.authority.sign("good", "DNS:x,DNS:prometheus")
    with house.exporter(client=good) as exporter:
        assert exporter.get("/metrics").status == 200
        exporter.tls = house.authority.client(house.authority.sign("address", "IP:0:0::0:1"))
        assert exporter.get("/metrics").status == 200
        named = house.authority.sign("named", "DNS:grafana,email:prometheus@example.org")
        exporter.tls = house.authority.client(named)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            exporter.get("/livez")
        strangers = [
            None,
            house.authority.sign("expired", "DNS:prometheus", days=-1),
            other.sign("foreign", "DNS:prometheus"),
        ]
        for stranger in strangers:
            exporter.tls = house.authority.client(stranger)
            with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
                exporter.get("/livez")
        exporter.tls = house.authority.client(good)
        denied = exporter.scrape().value("pgvigil_web_denied_total", reason="handshake")
        assert denied == len(strangers) + 1
        assert alive.ask(Address(SEEN, exporter.port)) == (True, "it wants a certificate")
        quiet(exporter)


def test_a_certificate_may_be_left_out_where_it_is_looked_at_only_when_given(
    house: House, tmp_path: Path
) -> None:
    house.write(
        tls_server_config={
            **house.tls,
            "client_auth_type": "VerifyClientCertIfGiven",
            "client_ca_file": "authority.pem",
        }
    )
    with house.exporter() as exporter:
        assert exporter.get("/livez").status == 200
        exporter.tls = house.authority.client(Authority(tmp_path, "another").sign("f", "DNS:f"))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            exporter.get("/livez")


PATHS = ("/", "/metrics", "/probe", "/sd", "/primary", "/replica", "/nowhere", "/livez/", "//livez")


def test_without_a_password_nothing_is_told_but_whether_it_lives(house: House) -> None:
    house.write(basic_auth_users=USERS)
    with house.exporter() as exporter:
        assert exporter.get("/livez").body == exporter.get("/readyz").body == b"ok\n"
        for path in PATHS:
            for login in (None, ("prometheus", "wrong"), ("nobody", SECRET[1])):
                exporter.login = login
                denied = exporter.get(path)
                assert (denied.status, denied.body) == (401, b"a user and a password are needed\n")
                assert denied.headers["www-authenticate"].startswith('Basic realm="pgvigil"')
            exporter.login = SECRET
            assert exporter.get(path).status in (200, 404, 503)
        denials = exporter.scrape().value("pgvigil_web_denied_total", reason="credentials")
        assert denials == 3 * len(PATHS)
        quiet(exporter)


def test_a_user_who_is_taken_out_of_the_file_is_out_with_the_next_request(house: House) -> None:
    house.write(basic_auth_users={**USERS, "other": USERS["prometheus"]})
    with house.exporter(login=("other", SECRET[1])) as exporter:
        assert exporter.get("/metrics").status == 200
        house.write(basic_auth_users=USERS)
        assert exporter.get("/metrics").status == 401
        exporter.login = SECRET
        assert exporter.get("/metrics").status == 200
        house.file.write_text("basic_auth_users: {}")  # which would let everybody in
        assert exporter.get("/metrics").status == 200
        exporter.login = None
        assert exporter.get("/metrics").status == 401
        exporter.login = SECRET
        page = exporter.scrape()
        assert page.value("pgvigil_web_config_current") == 0
        assert page.value("pgvigil_web_config_failures_total") == 1
        assert "must not be empty" in exporter.log


def test_who_came_by_an_authority_that_is_gone_is_put_out(house: House, tmp_path: Path) -> None:
    mutual = {"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "authority.pem"}
    house.write(tls_server_config={**house.tls, **mutual})
    good = house.authority.sign("good", "DNS:x")
    newer = Authority(tmp_path, "newer")
    with house.exporter(client=good) as exporter:
        kept = exporter.connection()
        with contextlib.closing(kept):
            kept.request("GET", "/livez")
            assert kept.getresponse().read() == b"ok\n"
            house.write(tls_server_config={**house.tls, **mutual, "client_ca_file": "newer.pem"})
            context = house.authority.client(newer.sign("new", "DNS:x"))
            exporter.tls = context
            assert exporter.get("/livez").status == 200
            assert kept.sock.recv(1) == b""
        exporter.tls = house.authority.client(good)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            exporter.get("/livez")
        exporter.tls = context
        assert exporter.get("/livez").status == 200


def test_requests_beyond_the_rate_are_declined_and_health_is_not(house: House) -> None:
    house.write(rate_limit={"interval": "1h", "burst": 3})
    with house.exporter() as exporter:
        statuses = [exporter.get("/sd").status for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert exporter.get("/livez").status == 200


SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "deny",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def raw(port: int, words: bytes) -> http.client.HTTPMessage:
    """The headers of the answer to what a client says, whatever it is."""
    with socket.create_connection((SEEN, port), timeout=30) as client:
        client.sendall(words)
        with http.client.HTTPResponse(client) as response:
            response.begin()
            return response.headers


def test_every_answer_tells_a_browser_to_do_nothing_with_it(house: House) -> None:
    with Exporter(*NOWHERE) as exporter:
        answers = [exporter.get(path).headers for path in (*PATHS, "/livez")]
        answers += [
            {name.lower(): value for name, value in raw(exporter.port, words).items()}
            for words in (
                b"rubbish\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\0\0\r\n\r\n",
            )
        ]
        for headers in answers:
            assert SAFE.items() <= dict(headers).items()
            assert headers["content-security-policy"].startswith("default-src 'none'; ")
            assert "server" not in headers
    house.write(
        http_server_config={
            "headers": {"X-Frame-Options": "", "Strict-Transport-Security": "max-age=1"}
        }
    )
    with house.exporter() as exporter:
        headers = exporter.get("/").headers
        assert "x-frame-options" not in headers
        assert headers["strict-transport-security"] == "max-age=1"
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("option", ["--web-config", "--web.config.file", "PGVIGIL_WEB_CONFIG"])
def test_a_web_configuration_that_is_no_good_is_refused_at_the_start(
    house: House, option: str
) -> None:
    house.file.write_text("tls_server_config:\n  cert_file: server.pem\n  key_file: none.key\n")
    words = [] if option.startswith("PG") else [option, str(house.file)]
    variables = {option: str(house.file)} if option.startswith("PG") else {}
    with pytest.raises(
        RuntimeError, match=r"ended with 2: .*web.yml:3: .*none.key: cannot be read"
    ):
        Exporter(*NOWHERE, *words, environment=variables)


def begun(house: House, port: int) -> tuple[socket.socket, bytes]:
    """A connection, and the first words of a handshake that a client would say."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = house.authority.client().wrap_bio(incoming, outgoing, server_hostname=SEEN)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return socket.create_connection((SEEN, port)), outgoing.read()


def held(house: House, port: int, said: Callable[[bytes], bytes], *, drips: bool) -> float:
    """Seconds for which a client is borne that says a part of its first words, and then drips."""
    plain, hello = begun(house, port)
    words = said(hello)
    since = time.monotonic()
    with contextlib.closing(plain), contextlib.suppress(ConnectionError):
        plain.sendall(words)
        plain.settimeout(0.5)
        while time.monotonic() < since + PATIENCE:
            with contextlib.suppress(TimeoutError):
                if not plain.recv(65536):
                    break
            if drips and len(words) < len(hello):
                plain.sendall(hello[len(words) :][:1])
                words += hello[len(words) :][:1]
    return time.monotonic() - since


def encrypted(house: House, port: int, words: bytes, drop: bytes) -> float:
    """Seconds for which a client is borne that has come in, says something, and then drips."""
    since = time.monotonic()
    with (
        socket.create_connection((SEEN, port)) as plain,
        house.authority.client().wrap_socket(plain, server_hostname=SEEN) as client,
        contextlib.suppress(ConnectionError, ssl.SSLError),
    ):
        client.sendall(words)
        client.settimeout(0.5)
        while time.monotonic() < since + PATIENCE:
            with contextlib.suppress(TimeoutError):
                if not client.recv(65536):
                    break
            client.sendall(drop)
    return time.monotonic() - since


def test_whoever_stalls_in_tls_or_behind_it_is_put_out_and_holds_up_nobody(house: House) -> None:
    house.write(tls_server_config=house.tls)
    start = b"GET /metrics HTTP/1.1\r\nX: "
    with house.exporter() as exporter, ThreadPoolExecutor(60) as pool:
        exporter.scrape()
        before = len(list(Path(f"/proc/{exporter.process.pid}/fd").iterdir()))
        port, stalling = exporter.port, []
        for _ in range(10):
            stalling += [
                pool.submit(held, house, port, lambda _: b"", drips=False),
                pool.submit(held, house, port, lambda hello: hello[:-1], drips=False),
                pool.submit(held, house, port, lambda hello: hello[:5], drips=True),
                pool.submit(held, house, port, lambda hello: hello, drips=False),
                pool.submit(encrypted, house, port, b"", b""),
                pool.submit(encrypted, house, port, start, b"y"),
            ]
        scrapes = 0
        while not all(future.done() for future in stalling):
            assert exporter.scrape().value("pg_up") == 0
            scrapes += 1
            time.sleep(0.2)
        assert max(future.result() for future in stalling) < PATIENCE
        assert scrapes > 10
        end = time.monotonic() + 40
        while len(list(Path(f"/proc/{exporter.process.pid}/fd").iterdir())) > before:
            assert time.monotonic() < end, "descriptors are left open"
            time.sleep(0.1)
        quiet(exporter)
