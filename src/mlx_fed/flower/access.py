"""Who may speak to the server: what the routes ask of a list of nodes that they do not keep."""

from __future__ import annotations

from typing import Protocol

from ..errors import FedError

SIGNED = "mlx-fed.signed"
"""The extension of an ASGI scope whose function ``by`` is called with the key of a known node."""


class Denied(FedError):
    """Why a key is turned away, in words for whoever runs the node."""


class Door(Protocol):
    """A list of nodes that are known by their keys."""

    def name_of(self, key: bytes) -> str:
        """The name of the node with this public key (PEM).

        Raises:
            Denied: If there is none, or it was revoked.
        """

    def number_of(self, key: bytes) -> int:
        """The number of the node with this public key (PEM): which part of the data it holds.

        Raises:
            Denied: If there is none, or it was revoked.
        """

    def enrol(self, invitation: str, key: bytes) -> str:
        """Makes a key known by an invitation, which serves once, and returns the node's name.

        Raises:
            Denied: If the invitation is not valid, or not any more.
        """
