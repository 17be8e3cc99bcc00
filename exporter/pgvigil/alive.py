"""Ask the exporter on this machine whether it lives, as an image's health check does."""

import contextlib
import http.client
import select
import ssl

from pgvigil.config import Address

TIMEOUT = 3.0
"""Seconds for the whole question; one that lives answers at once."""

_HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # where it listens


def ask(address: Address) -> tuple[bool, str]:
    """Whether the exporter that listens there says on `/livez` that it lives, and its words.

    It may speak TLS, with a certificate for the name that others call it by; nothing that is told
    here is a secret, so that the certificate is not looked at.
    """
    host = _HERE.get(address.host, address.host)
    unverified = ssl._create_unverified_context()  # noqa: S323
    said = "no answer"
    for connection in (
        http.client.HTTPConnection(host, address.port, timeout=TIMEOUT),
        http.client.HTTPSConnection(host, address.port, timeout=TIMEOUT, context=unverified),
    ):
        try:
            connection.connect()
            if isinstance(connection.sock, ssl.SSLSocket):
                _listen(connection.sock)
            connection.request("GET", "/livez")
            answer = connection.getresponse()
            return answer.status == 200, answer.read(1000).decode(errors="replace").strip()
        except ssl.SSLError as error:
            # One that asks for the client's certificate has turned its loop to do so.
            wanted = "CERTIFICATE_REQUIRED" in str(error.reason)
            return wanted, "it wants a certificate" if wanted else f"{host}: {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            said = f"{host}:{address.port}: {error or type(error).__name__}"
        finally:
            connection.close()
    return False, said


def _listen(sock: ssl.SSLSocket) -> None:
    """Hear what the other end makes of our part of the handshake; raises ssl.SSLError.

    By TLS 1.3 ours is over before that: it sends a ticket, or that it wants a certificate and hangs
    up. Who writes to one that has hung up may not get to read why.
    """
    if sock.version() == "TLSv1.3":
        select.select([sock], [], [], TIMEOUT)
        sock.settimeout(0)
        with contextlib.suppress(ssl.SSLWantReadError):
            sock.recv(1)
        sock.settimeout(TIMEOUT)
