"""Address of a server: host and port."""

from __future__ import annotations

import ipaddress
import re

from ..errors import FedError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
_PORT = re.compile(r"[0-9]{1,5}")


class AddressError(FedError):
    """An address that cannot be used."""


def parse(address: str) -> tuple[str, int]:
    """``("127.0.0.1", 8080)`` of ``"127.0.0.1:8080"``, ``"127.0.0.1"`` or ``"[::1]:8080"``.

    Raises:
        AddressError: If it is not a host with a port between 1 and 65535.
    """
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = address, str(DEFAULT_PORT)
    host = host.strip("[]")
    plain = host.isprintable() and not any(char.isspace() or char in "/@?#" for char in host)
    if not host or not plain or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise AddressError(f"{address!r} is not HOST:PORT, such as 192.168.1.20:8080.")
    return host, int(port)


def join(host: str, port: int) -> str:
    """An address from host and port, the inverse of :func:`parse`: ``"[::1]:8080"``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
