"""Whatever a client says over HTTP, in clear or encrypted, it breaks nothing and leaves nothing."""

import contextlib
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.authority import Authority
from lab.exporter import Exporter

HERE = "127.0.0.1"
TARGETS = {"one": {"dsn": "host=127.0.0.1 port=1"}, "two": {"dsn": "host=127.0.0.1 port=2"}}
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
ODD = {
    "an unknown method": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method that is no word": b"G\0T / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long method": b"G" * 20_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "an absolute address": b"GET http://elsewhere:1/metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "an address that is none": b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "OPTIONS of all": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: x\r\nCookie: a\r\n\r\n",
    "HTTP/1.0": b"GET /metrics HTTP/1.0\r\n\r\n",
    "HTTP/1.0 that stays": b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /sd HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "a host that is none": b"GET /sd HTTP/1.1\r\nHost: \"'><script>\xff\r\n\r\n",
    "traversal": b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "traversal in disguise": b"GET /%2e%2e/%252e%252e/..%c0%afetc HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL": b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL as it is": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a line break": b"GET /%0d%0aSet-Cookie:%20a HTTP/1.1\r\nHost: x\r\n\r\n",
    "no UTF-8": b"GET /%ff%fe?target=%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes beyond ASCII": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target that is none": b"GET /probe?target=%00%ff%3Cscript%3E HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target that is a server": b"GET /probe?target=postgres://a@b/c HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target that is a file": b"GET /probe?target=file:///etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "many targets": b"GET /probe?" + b"target=a&" * 1500 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a role of none": b"GET /primary?target=%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long address": b"GET /" + b"a" * 30_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 30_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "lines without carriage": b"GET /livez HTTP/1.1\nHost: x\n\n",
    "odd qualities": b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*;q=\xff,;;=\r\n"
    b"Accept-Encoding: gzip;q=9e9\r\nX-Prometheus-Scrape-Timeout-Seconds: -1e999\r\n\r\n",
    "odd credentials": b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Basic \xff\r\n\r\n",
    "two lengths": b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length below nothing": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "length and pieces": CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\n")
    + b"0\r\n\r\n",
    "pieces": CHUNKED + b"5\r\nabcde\r\n0\r\n\r\n",
    "pieces that are none": CHUNKED + b"zz\r\n",
    "a piece without an end": CHUNKED + b"fffffffffffffff0\r\n",
    "another coding": CHUNKED.replace(b"chunked", b"gzip, chunked"),
    "one after the other": HEALTH * 50,
    "a request in another": CHUNKED + b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "reload": b"POST /-/reload HTTP/1.1\r\nHost: x\r\n\r\n",
    "an upgrade to HTTP/2 that is none": b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n"
    b"Connection: upgrade, HTTP2-Settings\r\nHTTP2-Settings: !!\r\n\r\n",
    "an upgrade to what is unknown": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\n"
    b"Upgrade: TLS/1.3\r\n\r\n",
    "a WebSocket without a key": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\n"
    b"Upgrade: websocket\r\n\r\n",
    "HTTP/2 and rubbish": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    "TLS": bytes.fromhex("1603010200010001fc0303") + b"\x5a" * 500,
    "PostgreSQL": bytes.fromhex("0000000804d2162f"),
    "zeros": b"\0" * 5000,
    "nothing": b"",
}
_STATUS = re.compile(rb"(?:\A|\r\n\r\n|\n)HTTP/1\.1 (\d{3}) ")
_ALLOWED = {101, 200, 400, 401, 403, 404, 405, 413, 414, 415, 426, 431, 501, 503, 505}
"""501 is h11's word for codings that are not known."""


class Fuzzed:
    """An exporter, in clear or encrypted, and what it had open before anybody came."""

    def __init__(self, exporter: Exporter, tls: ssl.SSLContext | None) -> None:
        self.exporter = exporter
        self.tls = tls
        assert exporter.get("/metrics").status == 200
        self.before = self.descriptors()

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.exporter.process.pid}/fd").iterdir()))

    def says(self, words: bytes, *, encrypted: bool = True) -> bytes:
        """What comes back until the other end hangs up, or says nothing any more."""
        heard = b""
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(socket.create_connection((HERE, self.exporter.port)))
            client.settimeout(20)
            if self.tls and encrypted:
                client = stack.enter_context(self.tls.wrap_socket(client, server_hostname=HERE))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                client.sendall(words)
                client.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    while more := client.recv(65536):
                        heard += more
                        client.settimeout(0.2)
        return heard

    def holds(self) -> None:
        """A good scrape works, nothing is open that was not before, and the log is in order."""
        assert self.exporter.scrape().value("pgvigil_target_up", target="one") == 0
        end = time.monotonic() + 40
        while self.descriptors() > self.before:
            assert time.monotonic() < end, "descriptors are left open"
            time.sleep(0.1)
        lines = [json.loads(line) for line in self.exporter.log.splitlines()]
        assert [line for line in lines if line["level"] == "error" or "exception" in line] == []


@pytest.fixture(scope="module", params=["clear", "encrypted"])
def fuzzed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "pgvigil.yml").write_text(json.dumps({"targets": TARGETS}))
    words, tls = ["--config", f"{folder}/pgvigil.yml"], None
    if request.param == "encrypted":
        authority = Authority(folder)
        authority.sign("server", f"IP:{HERE}")
        served = {"tls_server_config": {"cert_file": "server.pem", "key_file": "server.key"}}
        (folder / "web.yml").write_text(json.dumps(served))
        words += ["--web-config", f"{folder}/web.yml"]
        tls = authority.client()
    with Exporter(*words, tls=tls) as exporter:
        yield Fuzzed(exporter, tls)


def test_what_no_client_says_is_declined_and_never_a_fault(fuzzed: Fuzzed) -> None:
    for kind, words in ODD.items():
        heard = fuzzed.says(words)
        statuses = {int(status) for status in _STATUS.findall(heard)}
        assert statuses <= _ALLOWED, kind
        assert b"root:" not in heard, kind
        assert b"Traceback" not in heard, kind
        assert b"\r\nSet-Cookie" not in heard, kind
        assert b"<script>" not in heard, kind
    fuzzed.holds()


def test_clear_text_to_a_door_that_encrypts_and_the_other_way_round(fuzzed: Fuzzed) -> None:
    for words in ODD.values():
        assert b"pgvigil_" not in fuzzed.says(words, encrypted=False) or not fuzzed.tls
    fuzzed.holds()


TOKENS = st.sampled_from(
    [
        *(b"GET ", b"HEAD ", b"POST ", b"/metrics", b"/probe?target=", b"/sd", b"/", b"%00", b"\0"),
        *(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"Host: x\r\n", b"\r\n", b"\n"),
        *(b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"1\r\nx\r\n"),
        *(b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n"),
        *(b"Expect: 100-continue\r\n", b"Accept-Encoding: gzip\r\n", b"Authorization: Basic "),
        *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"a" * 3000, b"..", b"\xff", b":", b" "),
        *(HEALTH, b"Upgrade: h2c\r\n", b"HTTP2-Settings: AAMAAABk\r\n"),
    ]
)


@given(words=st.lists(TOKENS | st.binary(max_size=20), max_size=12).map(b"".join))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_mixture_of_what_clients_say_is_a_fault(fuzzed: Fuzzed, words: bytes) -> None:
    heard = fuzzed.says(words)
    assert {int(status) for status in _STATUS.findall(heard)} <= _ALLOWED


def test_after_all_mixtures_nothing_is_left(fuzzed: Fuzzed) -> None:
    fuzzed.holds()


ODD_STREAMS: dict[str, list[tuple[bytes, bytes]]] = {
    "bytes beyond ASCII": [(b":method", b"GET"), (b":path", b"/\xff\xfe")],
    "a method beyond ASCII": [(b":method", b"G\xffT"), (b":path", b"/")],
    "no path": [(b":method", b"GET")],
    "no method": [(b":path", b"/metrics")],
    "an empty path": [(b":method", b"GET"), (b":path", b"")],
    "CONNECT": [(b":method", b"CONNECT")],
    "CONNECT to a protocol": [
        *((b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":path", b"/")),
    ],
    "another protocol": [
        *((b":method", b"CONNECT"), (b":protocol", b"\xff"), (b":path", b"/")),
    ],
    "a header of a connection": [
        *((b":method", b"GET"), (b":path", b"/"), (b"connection", b"upgrade")),
    ],
    "a header in capitals": [(b":method", b"GET"), (b":path", b"/"), (b"HOST", b"x")],
    "a line break": [(b":method", b"GET"), (b":path", b"/\r\nx: y"), (b"x", b"a\r\nb: c")],
    "a query beyond ASCII": [(b":method", b"GET"), (b":path", b"/probe?target=\xff\0")],
    "what is right": [(b":method", b"GET"), (b":path", b"/livez")],
}


def test_streams_that_no_client_opens_are_no_fault_either(fuzzed: Fuzzed) -> None:
    if fuzzed.tls:
        fuzzed.tls.set_alpn_protocols(["h2"])
    for kind, headers in ODD_STREAMS.items():
        client = h2.connection.H2Connection(
            h2.config.H2Configuration(
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                header_encoding=None,
            )
        )
        client.initiate_connection()
        whole = [*headers, (b":scheme", b"http"), (b":authority", b"x")]
        whole.sort(key=lambda header: not header[0].startswith(b":"))
        client.send_headers(1, whole, end_stream=True)
        heard = fuzzed.says(client.data_to_send())
        if kind == "what is right":
            assert b"ok\n" in heard
    if fuzzed.tls:
        fuzzed.tls.set_alpn_protocols(["http/1.1"])
    fuzzed.holds()
