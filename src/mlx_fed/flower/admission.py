"""Who may speak to the server: whose request it is, and whether that one is answered.

It is known from a request's headers alone, before a byte of its body is read. The check of a
signature is Flower's own.
"""

from __future__ import annotations

import asyncio
import datetime
from base64 import b64decode
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
from flwr.supercore.date import now
from flwr.superlink.routers.fleet.node_auth import authenticate_node

from . import headers as ours
from .access import Denied
from .link_state import Link

_SIGNED = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
_MOST_SIGNATURES = 100_000
_UNSIGNED = "Invalid SuperNode authentication"
_AHEAD = SYSTEM_TIME_TOLERANCE
_BEHIND = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
"""Seconds that Flower lets a node's clock be ahead, and a signature be old."""


class Admission:
    """Lets requests in that a known node has signed.

    Args:
        link (Link): Knows the nodes, and has the door if there is one.
    """

    def __init__(self, link: Link):
        self._link = link
        self._app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=link.factory))
        self._verified: dict[tuple[str, ...], bytes] = {}

    def signer(self, headers: dict[str, str]) -> bytes:
        """The public key that signed the request's time, by Flower's own check.

        A signature seen before is not computed again for a minute.

        Raises:
            HTTPException: If it is not signed, or at another time.
            Denied: If the door does not know the key.
        """
        signed = tuple(headers.get(name, "") for name in _SIGNED)
        if (known := self._verified.get(signed)) is not None:
            return known
        try:
            key = b64decode(signed[0], validate=True)
            _check_clock(headers.get(TIMESTAMP_HEADER, ""))
            if self._link.door is not None and ours.TOKEN not in headers:
                self._link.door.name_of(key)  # a stranger is not worth a signature's verification
            authenticate_node(
                SimpleNamespace(  # type: ignore[arg-type]  # the parts of a Request that it reads
                    headers=headers,
                    app=self._app,
                    state=SimpleNamespace(
                        protobuf_request=fleet_pb2.ActivateNodeRequest(public_key=key)
                    ),
                )
            )
        except (HTTPException, Denied):
            raise
        except Exception as error:  # keys of other kinds, times out of range
            raise HTTPException(HTTPStatus.UNAUTHORIZED, _UNSIGNED) from error
        if len(self._verified) < _MOST_SIGNATURES:
            self._verified[signed] = key
            # Nodes reuse a signature for seconds; well before Flower would call it too old it goes.
            asyncio.get_running_loop().call_later(60.0, self._verified.pop, signed, None)
        return key

    def let_in(self, key: bytes, path: str, headers: dict[str, str]) -> None:
        """Refuses keys that the door does not know, and makes known which it invited.

        Raises:
            HTTPException: If anyone may register, and too many have.
            Denied: If the door does not know the key, or its invitation is not good.
        """
        door = self._link.door
        if door is None:
            if path.endswith("/register-node") and self._link.is_full():
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "Too many nodes")
            return
        if path.endswith("/register-node") and ours.TOKEN in headers:
            name = door.enrol(headers[ours.TOKEN], key)
        else:
            name = door.name_of(key)
        if self._link.state.get_node_id_by_public_key(key) is None:
            self._link.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=name)

    def check_identity(self, key: bytes, request: Any) -> None:
        """A request speaks for the node whose key signed it, and for no other.

        Raises:
            HTTPException: If it does not.
        """
        if isinstance(request, (fleet_pb2.RegisterNodeFleetRequest, fleet_pb2.ActivateNodeRequest)):
            speaks_for_itself = request.public_key == key
        else:
            node_id = request.node.node_id if hasattr(request, "node") else request.node_id
            speaks_for_itself = self._link.state.get_node_id_by_public_key(key) == node_id
        if not speaks_for_itself:
            raise HTTPException(HTTPStatus.UNAUTHORIZED, _UNSIGNED)


def _check_clock(timestamp: str) -> None:
    """Says of a request from another time that a clock is wrong, which somebody can mend.

    Raises:
        HTTPException: If Flower would refuse it.
    """
    ahead = (datetime.datetime.fromisoformat(timestamp) - now()).total_seconds()
    if not -_BEHIND < ahead < _AHEAD:
        how = f"{ahead:.0f} s ahead of" if ahead > 0 else f"{-ahead:.0f} s behind"
        raise HTTPException(
            HTTPStatus.TOO_EARLY,
            f"this node's clock is {how} the server's, and {_AHEAD} s ahead or "
            f"{TIMESTAMP_TOLERANCE} s behind are allowed: set them by the network's time",
        )
