"""The end of a certificate's validity is read from its bytes, and from a server's handshake."""

import asyncio
import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import certificate
from pgvigil.certificate import Peer

from lab.ports import free_port
from lab.postgres import Server
from lab.silent_port import silent_port


def made(directory: Path, days: int) -> bytes:
    """A certificate by openssl that is valid for so many days."""
    path = directory / "made.pem"
    subject = ["-subj", "/CN=a name with \xfc and 1234567890"]
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(directory / "key.pem")]
    command = ["openssl", "req", "-x509", *key, *subject, "-days", str(days), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return ssl.PEM_cert_to_DER_cert(path.read_text())


def openssl_says(der: bytes) -> float:
    command = ["openssl", "x509", "-inform", "der", "-noout", "-enddate"]
    said = subprocess.run(command, check=True, capture_output=True, input=der).stdout.decode()
    moment = datetime.strptime(said.strip(), "notAfter=%b %d %H:%M:%S %Y GMT")
    return moment.replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize("days", [1, 365, 20000])  # the last is written with four digits
def test_the_end_is_what_openssl_says(tmp_path: Path, days: int) -> None:
    der = made(tmp_path, days)
    assert certificate.not_after(der) == openssl_says(der)


@given(st.binary(max_size=200))
def test_what_is_no_certificate_has_no_end(noise: bytes) -> None:
    assert certificate.not_after(noise) is None


def test_a_certificate_that_is_cut_off_has_no_end_or_the_right_one(tmp_path: Path) -> None:
    der = made(tmp_path, 10)
    whole = certificate.not_after(der)
    assert {certificate.not_after(der[:end]) for end in range(len(der))} <= {None, whole}


@pytest.mark.parametrize("major", [18])
def test_a_servers_certificate_is_seen_and_its_log_stays_quiet(server: Server) -> None:
    if not server.tls:
        pytest.skip("this build of PostgreSQL has no TLS")
    begin = server.log_position()
    der = ssl.PEM_cert_to_DER_cert(server.certificate.read_text())
    peer = Peer("127.0.0.1", server.port, "localhost")
    assert asyncio.run(certificate.expiry(peer, 5)) == openssl_says(der)
    assert server.log(begin) == ""


def test_a_server_without_tls_or_without_words_shows_none() -> None:
    assert asyncio.run(certificate.expiry(Peer("127.0.0.1", free_port(), ""), 1)) is None
    with silent_port() as port:
        assert asyncio.run(certificate.expiry(Peer("127.0.0.1", port, ""), 0.2)) is None
