"""Makes certificates by openssl: an authority's own, and those it gives to servers and clients."""

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """One that signs whatever it is asked to; its files stand in a directory."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        """Make its key and certificate."""
        self._directory = directory
        self.itself = Pair(directory / f"{name}.pem", directory / f"{name}.key")
        self._run(
            *("req", "-x509", "-days", "30", "-subj", f"/CN={name}", *_key(self.itself.key)),
            *("-addext", "keyUsage=critical,keyCertSign", "-out", str(self.itself.certificate)),
        )

    @property
    def certificate(self) -> Path:
        """What those who trust it need."""
        return self.itself.certificate

    def sign(self, name: str, names: str, days: int = 30) -> Pair:
        """A pair in files called so, for alternative names such as `DNS:localhost`.

        `days` may be negative, for one that has expired.
        """
        made = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        request = self._directory / f"{name}.csr"
        extensions = self._directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        self._run("req", "-subj", f"/CN={name}", *_key(made.key), "-out", str(request))
        self._run(
            *("x509", "-req", "-in", str(request), "-out", str(made.certificate)),
            *("-CA", str(self.certificate), "-CAkey", str(self.itself.key), "-CAcreateserial"),
            *("-extfile", str(extensions), "-days", str(days)),
        )
        return made

    def client(self, pair: Pair | None = None) -> ssl.SSLContext:
        """What a client needs that trusts the authority, and may show a certificate of his."""
        return trusting(self.certificate, pair)

    def _run(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)


def trusting(certificate: Path, pair: Pair | None = None) -> ssl.SSLContext:
    """What a client needs that trusts a certificate, and may show one of his."""
    context = ssl.create_default_context(cafile=certificate)
    if pair:
        context.load_cert_chain(*pair)
    return context


def _key(path: Path) -> tuple[str, ...]:
    words = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    return (*words, "-keyout", str(path))
