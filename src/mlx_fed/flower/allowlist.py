"""Protocol of the allowlist of nodes' keys, as the Fleet routes use it."""

from __future__ import annotations

from typing import Protocol

from ..errors import FedError

REVOKED, UNKNOWN = "revoked", "unknown"


class AccessDenied(FedError):
    """A key that is not on the allowlist, with the reason for the node's operator.

    Attributes:
        code (str): :data:`REVOKED`, :data:`UNKNOWN`, or empty for another reason.
    """

    def __init__(self, message: str, code: str = ""):
        super().__init__(message)
        self.code = code


class NodeAllowlist(Protocol):
    """The public keys (PEM) of the nodes that a server accepts.

    Every method raises :class:`AccessDenied` for a key that is not listed or was revoked.
    """

    def name_of(self, key: bytes) -> str:
        """The name of the node with this key."""

    def number_of(self, key: bytes) -> int:
        """The node id of the node with this key: its partition of the data."""

    def enrol(self, invitation: str, key: bytes) -> str:
        """The name of the node, whose key is listed from now on by an invitation that is used up.

        Raises:
            AccessDenied: If the invitation is not valid, or not any more.
        """
