"""Node keys as Flower has them: EC keys in PEM files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
    uses_nist_ec_curve,
)

from ..errors import FedError


class KeyFileError(FedError):
    """A file that is not a key of the kind that nodes have."""


def make() -> tuple[bytes, bytes]:
    """A new private key (PEM), and its public one as Flower's commands take it: OpenSSH's."""
    private_key, public_key = generate_key_pairs()
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return private_key_to_bytes(private_key), public_key.public_bytes(*form) + b"\n"


def check(pem: bytes, path: Path) -> None:
    """Raises :class:`KeyFileError` if a private key cannot be used by a node."""
    load(pem, path)


def load(pem: bytes, path: Path | None = None) -> ec.EllipticCurvePrivateKey:
    """A private key, from PEM as Flower and OpenSSL write it, or from OpenSSH's form.

    Raises:
        KeyFileError: If it is another kind of key, or has a password.
    """
    where = path or "The node's key"
    read: Any = (
        serialization.load_ssh_private_key
        if b"OPENSSH PRIVATE KEY" in pem
        else serialization.load_pem_private_key
    )
    try:
        key = read(pem, None)
    except Exception as error:  # what is wrong with it decides which kind
        raise KeyFileError(f"{where} is not a private key without a password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{where} is not an elliptic-curve key, which Flower's nodes have.")
    return key


def public(pem: bytes, path: Path | None = None) -> bytes:
    """A public key (PEM) exactly as nodes send it, from PEM or from OpenSSH's form.

    Raises:
        KeyFileError: If it is another kind of key.
    """
    where = path or "The key"
    ssh = pem.startswith(b"ecdsa-")
    try:
        read: Any = serialization.load_ssh_public_key if ssh else serialization.load_pem_public_key
        key = read(pem)
    except Exception as error:
        raise KeyFileError(f"{where} is not a public key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise KeyFileError(f"{where} is not a NIST elliptic-curve key, which Flower's nodes have.")
    return public_key_to_bytes(key)
