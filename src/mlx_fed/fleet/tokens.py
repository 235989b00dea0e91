"""Tokens: URL-safe text that invites one node to a federation.

A token has the server's address, the fingerprint of its certificate authority, the name and node id
of the node, and a secret for one enrolment, with a checksum.
"""

from __future__ import annotations

import binascii
import re
import secrets
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path
from typing import NamedTuple

from ..errors import FedError
from ..system import address
from . import private_files

_PREFIX = "mlxfed-"
_VERSION = 1
_FINGERPRINT, _SECRET, _CHECKSUM = 32, 16, 4
_LONGEST = 1000
_LARGEST_NUMBER = 2**31 - 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TokenError(FedError):
    """Text that is not a complete token."""


class Token(NamedTuple):
    """The content of a token.

    Attributes:
        address (str): ``HOST:PORT`` of the server.
        authority (bytes): SHA-256 of the certificate of its authority.
        name (str): The node's name.
        number (int): Its node id: its partition of the data.
        secret (bytes): Valid for one enrolment.
    """

    address: str
    authority: bytes
    name: str
    number: int
    secret: bytes

    @property
    def invitation(self) -> str:
        """``name:secret``, which a node sends to enrol."""
        return f"{self.name}:{self.secret.hex()}"


def check_name(name: str) -> str:
    """The name of a node, checked: it is a folder's name as well.

    Raises:
        TokenError: If it has other characters than a plain file name, or more than 64.
    """
    if not _NAME.fullmatch(name):
        raise TokenError(
            f"A node's name has 1 to 64 letters, digits, '.', '_' and '-': not {name!r:.90}."
        )
    return name


def new_secret() -> bytes:
    """A random secret of 128 bits."""
    return secrets.token_bytes(_SECRET)


def encode(token: Token) -> str:
    """A token as text."""
    words = "\n".join([token.address, token.name, str(token.number)]).encode()
    body = bytes([_VERSION]) + token.authority + token.secret + words
    body += zlib.crc32(body).to_bytes(_CHECKSUM, "big")
    return _PREFIX + urlsafe_b64encode(body).decode().rstrip("=")


def read(text: str) -> Token:
    """The token of a text, or of the secret file ``@FILE``.

    Raises:
        FedError: If it is not whole, or others can read the file.
    """
    if text.startswith("@"):
        text = private_files.read(Path(text[1:]).expanduser()).decode("ascii", "replace")
    return decode(text)


def decode(text: str) -> Token:
    """The token of a text.

    Raises:
        TokenError: If it is not whole, or not a token.
    """
    shown = text if len(text) <= 20 else f"{text[:20]}..."
    token_error = TokenError(
        f"{shown!r} is not a whole token: copy the line that the server printed, "
        "from mlxfed- to its end."
    )
    text = text.strip()
    if not text.startswith(_PREFIX) or len(text) > _LONGEST or not text.isascii():
        raise token_error
    base64_text = text.removeprefix(_PREFIX)
    try:
        body = urlsafe_b64decode(base64_text + "=" * (-len(base64_text) % 4))
    except (ValueError, binascii.Error) as error:
        raise token_error from error
    body, checksum = body[:-_CHECKSUM], body[-_CHECKSUM:]
    if zlib.crc32(body).to_bytes(_CHECKSUM, "big") != checksum or body[:1] != bytes([_VERSION]):
        raise token_error
    head, tail = 1 + _FINGERPRINT, 1 + _FINGERPRINT + _SECRET
    try:
        server, name, number = body[tail:].decode().split("\n")
        address.parse(server)
        if len(body) < tail or not number.isdecimal() or int(number) > _LARGEST_NUMBER:
            raise token_error
        return Token(server, body[1:head], check_name(name), int(number), body[head:tail])
    except (ValueError, FedError) as error:
        raise token_error from error
