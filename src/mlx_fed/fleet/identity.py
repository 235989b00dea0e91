"""A node's identity: its private key, and the certificate authority of its server.

~/.mlx-fed/nodes/<authority>-<name>/
  node.key     the private key, which never leaves this machine
  node.pub     the public key, on the server's allowlist
  ca.crt       the authority of the server's certificate
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from ..errors import FedError
from ..flower import keys, proxies
from ..system import address
from . import certificates, private_files, tokens


class IdentityError(FedError):
    """A key or an authority that a node cannot use."""


@dataclass(frozen=True)
class Identity:
    """A node's credentials, and the server that they are for.

    Attributes:
        host (str): The server's.
        port (int): Its port.
        authority (Path, optional): The authority of its certificate; plaintext without.
        key (bytes, optional): The node's private key (PEM). Default: a new one for each run.
        invitation (str, optional): ``name:secret`` of the token, for the enrolment.
        fingerprint (bytes, optional): SHA-256 of the authority, which is fetched by it.
        name (str, optional): Its name on the allowlist.
        number (int, optional): Its node id there.
    """

    host: str
    port: int
    authority: Path | None = None
    key: bytes | None = None
    invitation: str | None = None
    fingerprint: bytes | None = None
    name: str | None = None
    number: int | None = None

    def context(self) -> ssl.SSLContext | None:
        """The TLS context; the authority is fetched where only its fingerprint is known.

        Raises:
            OSError: If the server does not answer.
            CertificateError: If it is another server.
        """
        if self.authority is None:
            return None
        if self.fingerprint is not None and not self.authority.exists():
            pem = certificates.fetch_authority(self.host, self.port, self.fingerprint, self.proxy)
            private_files.publish(self.authority, pem)
        return certificates.client_context(self.authority)

    @property
    def proxy(self) -> proxies.Proxy | None:
        """The HTTP proxy of connections to the server, if there is one.

        Raises:
            ProxyError: If it is no HTTP proxy.
        """
        if address.is_loopback(self.host):
            return None
        scheme = "http" if self.authority is None else "https"
        return proxies.from_environment(self.host, self.port, scheme)


def from_token(text: str, server: str | None, folder: Path | None) -> Identity:
    """The identity of a token, with a new key the first time.

    Args:
        text (str): The token, or ``@FILE`` of the file that has it: what a process is started
            with, others on its machine can read.
        server (str, optional): ``HOST:PORT`` in place of the token's.
        folder (Path, optional): Where the identity is kept.

    Raises:
        FedError: If the token is not whole, others can read its file, or the key cannot be kept.
    """
    token = tokens.read(text)
    host, port = address.parse(server or token.address)
    folder = folder or home() / "nodes" / f"{token.authority.hex()[:16]}-{token.name}"
    private_files.make_folder(folder)
    authority = folder / "ca.crt"
    if authority.exists() and (certificates.fingerprint(authority.read_bytes()) != token.authority):
        raise IdentityError(
            f"{folder} has the identity for another federation: choose another --identity."
        )
    return Identity(
        host,
        port,
        authority,
        make_key(folder / "node.key"),
        token.invitation,
        token.authority,
        token.name,
        token.number,
    )


def from_files(server: str, authority: Path | None, key: Path | None) -> Identity:
    """The identity of a certificate file and a key file, without a token.

    Raises:
        FedError: If they cannot be read.
    """
    host, port = address.parse(server)
    if authority is not None:
        certificates.client_context(authority)
    return Identity(host, port, authority, private_files.read(key) if key else None)


def make_key(path: Path) -> bytes:
    """A node's private key (PEM), generated with its public key where there is no file."""
    if path.exists():
        pem = private_files.read(path)
        keys.load_private(pem, path)
        return pem
    pem, public = keys.generate_files()
    private_files.write(path, pem)
    private_files.publish(path.with_suffix(".pub"), public)
    return pem


def home() -> Path:
    """The folder of this machine's identities: ``MLX_FED_HOME``, or ``~/.mlx-fed``."""
    return Path(os.environ.get("MLX_FED_HOME") or "~/.mlx-fed").expanduser()
