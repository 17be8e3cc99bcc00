"""Tell when a server's certificate expires, as its clients see it."""

import asyncio
import contextlib
import ipaddress
import ssl
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""What a client sends to ask for TLS; PostgreSQL's manual, message formats."""
_VERSION = 0xA0
_TIMES = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}
"""UTCTime and GeneralizedTime as RFC 5280 has them in certificates."""


class Peer(NamedTuple):
    """The other end of an encrypted connection."""

    address: str
    port: int
    host: str
    """The name it was looked up by; empty where there was none."""


async def expiry(peer: Peer, seconds: float) -> float | None:
    """When the certificate expires, in seconds since the epoch; None when it cannot be seen.

    It is a connection of its own that ends after the handshake, because libpq shows no part of the
    certificate. The server's log says nothing of it. Whether the certificate is to be trusted is
    libpq's matter (sslmode); one that is not expires as well.
    """
    # Without the system's authorities: nothing is verified here.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    der: bytes | None = None
    with contextlib.suppress(OSError, EOFError, TimeoutError):
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(peer.address, peer.port)
            try:
                writer.write(_SSL_REQUEST)
                if await reader.readexactly(1) == b"S":
                    await writer.start_tls(context, server_hostname=_name(peer.host))
                    tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
                    der = tls.getpeercert(binary_form=True)
            finally:
                writer.close()
            await writer.wait_closed()  # after TLS it takes the server's goodbye
    return not_after(der) if der else None


def _name(host: str) -> str | None:
    """The name to ask a proxy for; an address is none."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host or None
    return None


def not_after(der: bytes) -> float | None:
    """The end of a certificate's validity (RFC 5280, 4.1.2.5); None for what is no certificate."""
    try:
        (_, certificate), *_ = _elements(der)
        (_, signed), *_ = _elements(certificate)
        fields = [(kind, value) for kind, value in _elements(signed) if kind != _VERSION]
        # serialNumber, signature, issuer, validity
        _, (kind, end) = _elements(fields[3][1])
        moment = datetime.strptime(end.decode("ascii"), _TIMES[kind])
    except (ValueError, KeyError, IndexError, UnicodeDecodeError):
        return None
    return moment.replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements of a DER sequence: type and content; ValueError where they do not fit."""
    position = 0
    while position < len(der):
        kind, size = der[position], der[position + 1]
        position += 2
        if size & 0x80:
            width = size & 0x7F
            size = int.from_bytes(der[position : position + width], "big")
            position += width
        if position + size > len(der):
            raise ValueError("cut off")
        yield kind, der[position : position + size]
        position += size
