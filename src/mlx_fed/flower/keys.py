"""Elliptic-curve keys of nodes in PEM files, as Flower's SuperNode authentication has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..errors import FedError

_NIST_CURVES = (ec.SECP192R1, ec.SECP224R1, ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


class KeyFileError(FedError):
    """A file that is not a key of the kind that nodes have."""


def generate() -> ec.EllipticCurvePrivateKey:
    """A new private key on P-384, Flower's curve."""
    return ec.generate_private_key(ec.SECP384R1())


def generate_files() -> tuple[bytes, bytes]:
    """A new key pair: the private key (PEM), and the public key as Flower's commands take it
    (OpenSSH)."""
    key = generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public_key = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return pem, public_key + b"\n"


def load_private(pem: bytes, path: Path | None = None) -> ec.EllipticCurvePrivateKey:
    """A private key from PEM, as Flower and OpenSSL write it, or from OpenSSH's form.

    Raises:
        KeyFileError: If it is another kind of key, or has a password.
    """
    file = path or "The node's key"
    loader: Any = (
        serialization.load_ssh_private_key
        if b"OPENSSH PRIVATE KEY" in pem
        else serialization.load_pem_private_key
    )
    try:
        key = loader(pem, None)
    except Exception as error:  # the type depends on what is wrong with the file
        raise KeyFileError(f"{file} is not a private key without a password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{file} is not an elliptic-curve key, which Flower's nodes have.")
    return key


def load_public(text: bytes, path: Path | None = None) -> bytes:
    """A public key (PEM) in the bytes that nodes send, from PEM or from OpenSSH's form.

    Raises:
        KeyFileError: If it is another kind of key.
    """
    file = path or "The key"
    is_ssh = text.startswith(b"ecdsa-")
    try:
        loader: Any = (
            serialization.load_ssh_public_key if is_ssh else serialization.load_pem_public_key
        )
        key = loader(text)
    except Exception as error:
        raise KeyFileError(f"{file} is not a public key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _NIST_CURVES):
        raise KeyFileError(f"{file} is not a NIST elliptic-curve key, which Flower's nodes have.")
    return public_pem(key)


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as PEM (SubjectPublicKeyInfo)."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """The ECDSA signature of bytes, with SHA-256, as Flower's servers verify it."""
    return key.sign(content, ec.ECDSA(hashes.SHA256()))
