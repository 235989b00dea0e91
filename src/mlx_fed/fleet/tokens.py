"""Tokens: the one line that lets a machine join, as text that survives a mail or a chat.

A token has the server's address, the fingerprint of the authority that vouches for it, the name
and number that the node will have, and a secret that is good for one enrolment.
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
    """Text that is not a whole token."""


class Token(NamedTuple):
    """What a token says.

    Attributes:
        address (str): ``HOST:PORT`` of the server.
        authority (bytes): SHA-256 of the certificate of its authority.
        name (str): The node's name.
        number (int): Its number: which part of the data it holds, unless it says otherwise.
        secret (bytes): Good for one enrolment.
    """

    address: str
    authority: bytes
    name: str
    number: int
    secret: bytes

    @property
    def invitation(self) -> str:
        """What the node shows to enrol."""
        return f"{self.name}:{self.secret.hex()}"


def check_name(name: str) -> str:
    """The name, if an enrolled node may have it: it is also that of a folder.

    Raises:
        TokenError: If it has other characters than a plain file name, or more than 64.
    """
    if not _NAME.fullmatch(name):
        raise TokenError(
            f"A node's name has 1 to 64 letters, digits, '.', '_' and '-': not {name!r:.90}."
        )
    return name


def new_secret() -> bytes:
    """A secret that nobody guesses."""
    return secrets.token_bytes(_SECRET)


def encode(token: Token) -> str:
    """The token as text of URL-safe characters."""
    words = "\n".join([token.address, token.name, str(token.number)]).encode()
    body = bytes([_VERSION]) + token.authority + token.secret + words
    body += zlib.crc32(body).to_bytes(_CHECKSUM, "big")
    return _PREFIX + urlsafe_b64encode(body).decode().rstrip("=")


def read(text: str) -> Token:
    """What a token says that is written out, or as ``@FILE`` in a file which is its owner's alone.

    Raises:
        FedError: If it is not whole, or others can read the file.
    """
    if text.startswith("@"):
        text = private_files.read(Path(text[1:]).expanduser()).decode("ascii", "replace")
    return decode(text)


def decode(text: str) -> Token:
    """What a token says.

    Raises:
        TokenError: If it is not whole, or not a token.
    """
    broken = TokenError(
        f"{text[:20]!r}... is not a whole token: copy the line that the server printed, "
        "from mlxfed- to its end."
    )
    text = text.strip()
    if not text.startswith(_PREFIX) or len(text) > _LONGEST or not text.isascii():
        raise broken
    encoded = text.removeprefix(_PREFIX)
    try:
        body = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (ValueError, binascii.Error) as error:
        raise broken from error
    body, checksum = body[:-_CHECKSUM], body[-_CHECKSUM:]
    if zlib.crc32(body).to_bytes(_CHECKSUM, "big") != checksum or body[:1] != bytes([_VERSION]):
        raise broken
    head, tail = 1 + _FINGERPRINT, 1 + _FINGERPRINT + _SECRET
    try:
        place, name, number = body[tail:].decode().split("\n")
        address.parse(place)
        if len(body) < tail or not number.isdecimal() or int(number) > _LARGEST_NUMBER:
            raise broken
        return Token(place, body[1:head], check_name(name), int(number), body[head:tail])
    except (ValueError, FedError) as error:
        raise broken from error
