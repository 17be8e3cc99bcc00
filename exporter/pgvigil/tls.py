"""Encrypt what is served, and know the clients by their certificates."""

import ipaddress
import os
import re
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pgvigil.certificate import not_after
from pgvigil.errors import Problem, Refused

_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S | re.ASCII
)
_KEY = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----(.{0,100})", re.S)
_AGAIN = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True, slots=True)
class Pem:
    """Something in PEM that stands in a file, or in the configuration itself."""

    place: str
    """The configuration's file."""
    line: int | None
    """Where it names this."""
    path: Path | None
    text: str = field(default="", repr=False)

    def read(self) -> bytes:
        """Its bytes as they are now; raises Refused."""
        if not self.path:
            return self.text.encode()
        try:
            return self.path.read_bytes()
        except OSError as error:
            self.refuse(f"cannot be read: {error.strerror}; mind path, owner and mode")
        except ValueError:
            self.refuse("no path holds a NUL")

    def refuse(self, text: str) -> NoReturn:
        """Raise Refused for what is wrong with it."""
        what = f"{self.path}: {text}" if self.path else text
        raise Refused([Problem(self.place, self.line, what)])


@dataclass(frozen=True, slots=True)
class Tls:
    """How to encrypt, and for whom."""

    certificate: Pem
    key: Pem
    authorities: Pem | None = None
    """Those that clients' certificates may come from."""
    verify: ssl.VerifyMode = ssl.CERT_NONE
    names: frozenset[str] = frozenset()
    """Alternative names, of which a client's certificate must have one; any will do when empty."""
    oldest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    latest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ciphers: str = ""
    """OpenSSL's names for those of TLS 1.2; its own choice when empty."""
    ours_first: bool = True
    """Whether our order of ciphers counts, not the client's."""
    curve: str = ""
    """OpenSSL's name of the only one; its own choice when empty."""
    http2: bool = True

    @property
    def parts(self) -> Iterator[Pem]:
        """All that is read anew when it changes."""
        yield self.certificate
        yield self.key
        if self.authorities:
            yield self.authorities


class Material(NamedTuple):
    """What the files held when they were read."""

    certificate: bytes
    key: bytes
    authorities: bytes


class _Connection(ssl.SSLObject):
    """One client's, from the handshake on."""

    outgoing: ssl.MemoryBIO
    """What is to be sent to the client."""
    _failed: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        """Go on with the handshake, at the end of which the client must be one that may come."""
        if self._failed:
            raise self._failed
        context = self.context
        assert isinstance(context, Context)
        try:
            super().do_handshake()
            if context.names and context.names.isdisjoint(alternative_names(self.getpeercert())):
                raise ssl.SSLCertVerificationError("none of its names may come in")
        except _AGAIN:
            raise
        except ssl.SSLError as error:
            self._failed = error
            context.declined(getattr(error, "reason", None) or str(error.args[-1]))
            if not self.outgoing.pending:
                raise
            # asyncio would hang up without a word. Asked to go on, it sends what OpenSSL has to say
            # of the reason, and comes back when the client says something or has hung up.
            raise ssl.SSLWantReadError from None


class Context(ssl.SSLContext):
    """OpenSSL's context for all who come while nothing changes."""

    names: frozenset[str] = frozenset()
    expiry: float | None = None
    """When the certificate expires, in seconds since the epoch."""
    declined: Callable[[str], object] = staticmethod(lambda _: None)
    """Called for each handshake that comes to nothing, with OpenSSL's word for the reason."""


class Changing(ssl.SSLContext):
    """What asyncio takes for one context, and has each connection begin with the one in force."""

    current: Callable[[], ssl.SSLContext]

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *rest: Any, **named: Any
    ) -> ssl.SSLObject:
        """Begin a connection."""
        begun = self.current().wrap_bio(incoming, outgoing, *rest, **named)
        assert isinstance(begun, _Connection)
        begun.outgoing = outgoing
        return begun


def changing(current: Callable[[], ssl.SSLContext]) -> Changing:
    """A context that is what `current` returns when a client comes."""
    made = Changing(ssl.PROTOCOL_TLS_SERVER)
    made.current = current
    return made


def read(tls: Tls) -> Material:
    """What the files hold now; raises Refused."""
    authorities = tls.authorities.read() if tls.authorities else b""
    return Material(tls.certificate.read(), tls.key.read(), authorities)


def make(tls: Tls, material: Material) -> Context:
    """A context for those who come from now on; raises Refused."""
    first = _CERTIFICATE.search(material.certificate)
    if not first:
        tls.certificate.refuse("holds no certificate in PEM, which begins with BEGIN CERTIFICATE")
    key = _KEY.search(material.key)
    if not key:
        tls.key.refuse("holds no key in PEM, which begins with BEGIN PRIVATE KEY")
    if b"ENCRYPTED" in key[1] or b"ENCRYPTED" in key[2]:
        text = "needs a passphrase, for which nobody is there; `openssl pkey` writes it without one"
        tls.key.refuse(text)
    context = Context(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = _Connection
    # Whoever renegotiates has us compute for nothing.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not tls.ours_first:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.minimum_version, context.maximum_version = tls.oldest, tls.latest
    context.set_alpn_protocols(["h2", "http/1.1"] if tls.http2 else ["http/1.1"])
    if tls.ciphers:
        context.set_ciphers(tls.ciphers)
    if tls.curve:
        context.set_ecdh_curve(tls.curve)
    with _file(material.certificate) as certificate, _file(material.key) as private:
        try:
            context.load_cert_chain(certificate, private, password=_nobody)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                tls.key.refuse("is not the key of the certificate; the two must belong together")
            what = error.reason or "it cannot be read"
            tls.certificate.refuse(f"OpenSSL does not take the certificate with its key: {what}")
    if tls.authorities:
        try:
            context.load_verify_locations(cadata=material.authorities.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError):
            tls.authorities.refuse("holds no certificates in PEM")
    context.verify_mode = tls.verify
    # As Go does: whom the file names is trusted, whether or not somebody stands above.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.names = tls.names
    context.expiry = not_after(ssl.PEM_cert_to_DER_cert(first[0].decode("ascii")))
    return context


def alternative_names(certificate: Any) -> set[str]:
    """The names of a certificate as `getpeercert` tells it: DNS, addresses, e-mail, URIs."""
    names = set()
    for kind, value in (certificate or {}).get("subjectAltName", ()):
        if kind == "IP Address":
            names.add(str(ipaddress.ip_address(value.strip())))
        elif kind in ("DNS", "email", "URI"):
            names.add(value)
    return names


def _nobody() -> str:
    # Else OpenSSL would ask at the terminal, and wait.
    return ""


@contextmanager
def _file(text: bytes) -> Iterator[str]:
    """A path under which OpenSSL finds these bytes, in memory where that can be."""
    memory = getattr(os, "memfd_create", None)
    with os.fdopen(memory("pem"), "r+b") if memory else tempfile.TemporaryFile() as file:
        file.write(text)
        file.flush()
        yield f"/dev/fd/{file.fileno()}"
