"""`pgvigil alive` tells an image's health check whether the exporter lives."""

import http.server
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pgvigil import alive
from pgvigil.config import Address

from lab.exporter import Exporter
from lab.ports import free_port


class Handler(http.server.BaseHTTPRequestHandler):
    """Lives, for those who ask in the right place."""

    def do_GET(self) -> None:
        body = b"ok\n"
        self.send_response(200 if self.path == "/livez" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=elsewhere"]
    subprocess.run([*command, "-keyout", path, "-out", path], check=True, capture_output=True)
    return path


@contextmanager
def secured(certificate: Path, *, demanding: bool) -> Iterator[int]:
    """A server that speaks TLS, and may want to know who asks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if demanding:
        context.load_verify_locations(certificate)
        context.verify_mode = ssl.CERT_REQUIRED
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def run(listen: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgvigil", "alive", "--listen", listen],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_exporter_lives_though_its_database_is_away() -> None:
    with Exporter(environment={"PGHOST": "127.0.0.1", "PGPORT": "1"}) as exporter:
        ended = run(f":{exporter.port}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ok\n", "")


def test_where_nobody_listens_nobody_lives() -> None:
    port = free_port()
    ended = run(f"127.0.0.1:{port}")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"127.0.0.1:{port}: [Errno 111] Connection refused\n"


def test_one_that_speaks_tls_lives_whatever_its_name(certificate: Path) -> None:
    with secured(certificate, demanding=False) as port:
        assert alive.ask(Address("", port)) == (True, "ok")


def test_one_that_wants_a_certificate_lives(certificate: Path) -> None:
    with secured(certificate, demanding=True) as port:
        # It hangs up at about the moment at which it is asked.
        for _ in range(50):
            assert alive.ask(Address("0.0.0.0", port)) == (True, "it wants a certificate")


def test_one_that_takes_connections_and_says_nothing_does_not_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alive, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        lives, words = alive.ask(Address("127.0.0.1", server.getsockname()[1]))
    assert not lives
    assert "timed out" in words
