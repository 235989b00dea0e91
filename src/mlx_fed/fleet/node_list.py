"""The nodes that a federation knows, by key and name: a file that commands and server share.

``nodes.json`` is small and read whole. Who changes it holds a lock meanwhile and puts a new file
in its place, so the running server sees each change with the next request and never half of one.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from ..errors import FedError
from ..flower.allowlist import AccessDenied
from . import private_files, tokens
from .audit import AuditLog

INVITATION_TIME = 7 * 24 * 3600.0
"""Seconds that an invitation is good for."""
_MAX_NODES = 100_000

log = getLogger("mlx_fed")


class NodeListError(FedError):
    """A change to the list that cannot be made, or a list that cannot be read."""


@dataclass(frozen=True)
class Node:
    """A node that may take part, or is invited to.

    Attributes:
        name (str): Its name.
        number (int): Its number.
        key (str): Its public key (PEM); empty until it has enrolled.
        secret (str): SHA-256 of its invitation's secret; empty where there was none.
        expires (float): When the invitation does, in seconds of the epoch.
        revoked (bool): It may not take part any more; the name may be given again.
    """

    name: str
    number: int
    key: str = ""
    secret: str = ""
    expires: float = 0.0
    revoked: bool = False

    @property
    def state(self) -> str:
        """``enrolled``, ``invited``, ``expired`` or ``revoked``."""
        if self.revoked:
            return "revoked"
        if self.key:
            return "enrolled"
        return "invited" if time.time() < self.expires else "expired"


class NodeList:
    """The list, as the file has it at the moment.

    Args:
        path (Path): ``nodes.json``; an empty list where there is no such file.
        audit_log (Path, optional): Where changes are recorded.
    """

    def __init__(self, path: Path, audit_log: Path | None = None):
        self.path, self.audit_log = path, audit_log
        self._seen: tuple[int, ...] | None = None
        self._members: list[Node] = []
        self._by_key: dict[bytes, Node] = {}

    def all(self) -> list[Node]:
        """Every member, those revoked included.

        Raises:
            NodeListError: If the file cannot be read.
        """
        self._look()
        return list(self._members)

    def invite(
        self,
        name: str,
        secret: bytes,
        number: int | None = None,
        lasts: float = INVITATION_TIME,
    ) -> Node:
        """Invites a node that will show this secret, of which only a hash is kept.

        An invitation that was not used is replaced.

        Raises:
            NodeListError: If the name is in use.
        """
        member = Node(tokens.check_name(name), 0, secret=_hash(secret), expires=time.time() + lasts)
        return self._add(member, number)

    def add(self, name: str, key: bytes, number: int | None = None) -> Node:
        """Makes a key known that was brought otherwise.

        Raises:
            NodeListError: If the name or the key is in use.
        """
        return self._add(Node(tokens.check_name(name), 0, key=key.decode()), number)

    def revoke(self, name: str) -> Node:
        """Turns a node away from now on, or takes back its invitation.

        Raises:
            NodeListError: If there is none of this name.
        """
        with self._changing() as members:
            for place, member in enumerate(members):
                if member.name == name and not member.revoked:
                    members[place] = replace(member, revoked=True)
                    return members[place]
        raise NodeListError(f"There is no node named {name!r}: mlx-fed nodes list shows them.")

    # What the routes ask.

    def name_of(self, key: bytes) -> str:
        """The name of the node with this key (``NodeAllowlist``)."""
        return self._enrolled(key).name

    def number_of(self, key: bytes) -> int:
        """The number of the node with this key (``NodeAllowlist``)."""
        return self._enrolled(key).number

    def _enrolled(self, key: bytes) -> Node:
        self._look()
        member = self._by_key.get(key)
        if member is None:
            raise AccessDenied(
                "This server does not know this node's key: join with a token, which "
                "`mlx-fed nodes add NAME` makes on the server."
            )
        if member.revoked:
            raise AccessDenied(f"The key of {member.name} was revoked on the server.")
        return member

    def enrol(self, invitation: str, key: bytes) -> str:
        """Makes a key known by ``name:secret`` (``NodeAllowlist``)."""
        name, _, secret = invitation.partition(":")
        self._look()
        known = self._by_key.get(key)
        if known is not None:
            if not known.revoked and known.name != name:
                raise AccessDenied(
                    f"This node's key has enrolled as {known.name}: one key is one node. "
                    "For another node choose another --identity."
                )
            return self.name_of(key)
        try:
            shown = _hash(bytes.fromhex(secret))
        except ValueError:
            shown = ""
        with self._changing() as members:
            for place, member in enumerate(members):
                if member.name != name or not member.secret:
                    continue
                if not hmac.compare_digest(member.secret, shown):
                    continue
                if member.state == "invited":
                    members[place] = replace(member, key=key.decode())
                    return name
                raise AccessDenied(
                    {
                        "enrolled": f"This token was used: {name} has enrolled with another key.",
                        "expired": "This token has expired.",
                        "revoked": "This token was revoked.",
                    }[member.state]
                    + f" `mlx-fed nodes add {name}` makes another, on the server."
                )
        raise AccessDenied("This token is not valid here, or not any more.")

    # The file.

    def _add(self, member: Node, number: int | None) -> Node:
        with self._changing() as members:
            for other in members:
                if member.key and other.key == member.key:
                    state = "revoked" if other.revoked else f"in use, by {other.name}"
                    raise NodeListError(f"This key is {state}: make a new one for {member.name}.")
                if other.name == member.name and other.state == "enrolled":
                    raise NodeListError(
                        f"There is a node named {member.name} already: choose another name, or "
                        f"`mlx-fed nodes revoke {member.name}` first."
                    )
            members[:] = [
                other for other in members if other.name != member.name or other.state == "revoked"
            ]
            if len(members) >= _MAX_NODES:
                raise NodeListError(f"There are {_MAX_NODES} nodes already.")
            taken = {other.number for other in members if not other.revoked}
            if number is None:
                number = next(n for n in range(_MAX_NODES + 1) if n not in taken)
            elif number in taken:
                raise NodeListError(f"The number {number} is taken by another node.")
            members.append(replace(member, number=number))
            return members[-1]

    @contextmanager
    def _changing(self) -> Iterator[list[Node]]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise NodeListError(f"Cannot write {self.path}: {error.strerror or error}.") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            members = _read(self.path)
            before = list(members)
            yield members
            if members != before:
                text = json.dumps({"nodes": [asdict(member) for member in members]}, indent=1)
                private_files.write(self.path, text.encode() + b"\n")
                if self.audit_log is not None:
                    log = AuditLog(self.audit_log)
                    for member in members:
                        if member not in before:
                            log.append(member.state, node=member.name, number=member.number)
        finally:
            os.close(held)

    def _look(self) -> None:
        """Reads the file again if it is another one than before."""
        try:
            about = self.path.stat()
            seen: tuple[int, ...] = (about.st_ino, about.st_mtime_ns, about.st_size)
        except FileNotFoundError:
            seen = ()
        except OSError as error:
            raise NodeListError(f"Cannot read {self.path}: {error.strerror or error}.") from error
        if seen == self._seen:
            return
        try:
            self._members = _read(self.path)
        except NodeListError as error:
            if self._seen is None:
                raise
            log.warning("%s The nodes known before stay so.", error)  # it was edited by hand
            self._seen = seen
            return
        known = sorted((member for member in self._members if member.key), key=_is_revoked)
        self._by_key = {member.key.encode(): member for member in known}  # revoked ones last
        self._seen = seen


def _read(path: Path) -> list[Node]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise NodeListError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        return [_member(record) for record in json.loads(text)["nodes"]]
    except (ValueError, KeyError, TypeError, RecursionError, FedError) as error:
        raise NodeListError(f"{path} is not a list of nodes: {error}") from error


def _member(record: Any) -> Node:
    kinds = {"name": str, "number": int, "key": str, "secret": str, "revoked": bool}
    member = Node(**record)
    for name, kind in kinds.items():
        if type(getattr(member, name)) is not kind:
            raise ValueError(f"{name} of a node is {getattr(member, name)!r}")
    if type(member.expires) not in (int, float) or not member.key.isascii():
        raise ValueError(f"{member.name} has a key or a time that cannot be")
    tokens.check_name(member.name)
    return member


def _is_revoked(member: Node) -> bool:
    return member.revoked


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
