"""Authentication of nodes by the signed headers of their requests, before a body is read.

Signatures are verified by Flower's own ``authenticate_node``.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from datetime import UTC, datetime
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto import fleet_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.superlink.routers.fleet.node_auth import authenticate_node

from . import headers as ours
from .allowlist import AccessDenied
from .link_state import Link

_SIGNATURE_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
_MAX_SIGNATURES = 100_000
_CACHE_TIME = 60.0
"""Seconds for which a verified signature is cached. Nodes use one for seconds, and Flower accepts
it for minutes."""
_UNSIGNED = "Invalid SuperNode authentication"
_MAX_AHEAD = SYSTEM_TIME_TOLERANCE
_MAX_BEHIND = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
"""Seconds that Flower lets a node's clock be ahead, and a signature be old."""


class NodeAuthentication:
    """Authentication of a request's node, and authorization of the request.

    Args:
        link (Link): The nodes' state, with the allowlist if there is one.
    """

    def __init__(self, link: Link):
        self._link = link
        self._app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=link.factory))
        self._verified_keys: dict[tuple[str, ...], bytes] = {}

    def authenticate(self, headers: dict[str, str]) -> bytes:
        """The public key (PEM) that signed the request's time.

        Raises:
            HTTPException: If the signature is missing or wrong, or its time is.
            AccessDenied: If the key is not on the allowlist.
        """
        signature = tuple(headers.get(name, "") for name in _SIGNATURE_HEADERS)
        if (cached_key := self._verified_keys.get(signature)) is not None:
            return cached_key
        try:
            key = b64decode(signature[0], validate=True)
            _check_clock(headers.get(TIMESTAMP_HEADER, ""))
            if self._link.allowlist is not None and ours.TOKEN not in headers:
                self._link.allowlist.name_of(key)  # before the cost of a verification
            authenticate_node(
                SimpleNamespace(  # type: ignore[arg-type]  # what it reads of a Request
                    headers=headers,
                    app=self._app,
                    state=SimpleNamespace(
                        protobuf_request=fleet_pb2.ActivateNodeRequest(public_key=key)
                    ),
                )
            )
        except (HTTPException, AccessDenied):
            raise
        except Exception as error:  # keys of other kinds, times out of range
            raise HTTPException(HTTPStatus.UNAUTHORIZED, _UNSIGNED) from error
        if len(self._verified_keys) < _MAX_SIGNATURES:
            self._verified_keys[signature] = key
            asyncio.get_running_loop().call_later(
                _CACHE_TIME, self._verified_keys.pop, signature, None
            )
        return key

    def authorize(self, key: bytes, path: str, headers: dict[str, str]) -> None:
        """Checks that a key may make requests, and enrols it by the invitation that it has.

        Raises:
            HTTPException: If any node may register, and too many have.
            AccessDenied: If the key is not on the allowlist, or its invitation is not valid.
        """
        allowlist = self._link.allowlist
        if allowlist is None:
            if path.endswith("/register-node") and self._link.is_full():
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "Too many nodes")
            return
        if path.endswith("/register-node") and ours.TOKEN in headers:
            name = allowlist.enrol(headers[ours.TOKEN], key)
        else:
            name = allowlist.name_of(key)
        if self._link.state.get_node_id_by_public_key(key) is None:
            self._link.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=name)

    def check_sender(self, key: bytes, request: Any) -> None:
        """Checks that a request names the node whose key signed it.

        Raises:
            HTTPException: If it names another.
        """
        if isinstance(request, (fleet_pb2.RegisterNodeFleetRequest, fleet_pb2.ActivateNodeRequest)):
            is_sender = request.public_key == key
        else:
            node_id = request.node.node_id if hasattr(request, "node") else request.node_id
            is_sender = self._link.state.get_node_id_by_public_key(key) == node_id
        if not is_sender:
            raise HTTPException(HTTPStatus.UNAUTHORIZED, _UNSIGNED)


def _check_clock(timestamp: str) -> None:
    """Check of a node's clock, whose error has the difference in seconds.

    Raises:
        HTTPException: If Flower would refuse the time.
    """
    ahead_by = (datetime.fromisoformat(timestamp) - datetime.now(UTC)).total_seconds()
    if not -_MAX_BEHIND < ahead_by < _MAX_AHEAD:
        offset = f"{ahead_by:.0f} s ahead of" if ahead_by > 0 else f"{-ahead_by:.0f} s behind"
        raise HTTPException(
            HTTPStatus.TOO_EARLY,
            f"this node's clock is {offset} the server's, and {_MAX_AHEAD} s ahead or "
            f"{TIMESTAMP_TOLERANCE} s behind are allowed: set them by the network's time",
        )
