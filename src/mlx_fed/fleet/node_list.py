"""The allowlist of a federation's nodes: a JSON file that commands and the server share.

``nodes.json`` is read whole. A change takes a lock and replaces the file, so that a running server
sees it at the next request, and never half of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from ..errors import FedError, os_errors
from ..flower.allowlist import REVOKED, UNKNOWN, AccessDenied
from . import private_files, tokens
from .audit import AuditLog

INVITATION_TIME = 7 * 24 * 3600.0
"""Seconds for which an invitation is valid."""
_MAX_NODES = 100_000

log = getLogger("mlx_fed")


class NodeListError(FedError):
    """A list that cannot be read, or a change of it that is not valid."""


@dataclass(frozen=True)
class Node:
    """A node on the allowlist, enrolled, invited or revoked.

    Attributes:
        name (str): Its name.
        number (int): Its node id: its partition of the data.
        key (str): Its public key (PEM); empty until it has enrolled.
        secret (str): SHA-256 of its invitation's secret; empty where there was none.
        expires (float): When the invitation does, in seconds of the epoch.
        revoked (bool): Its key is refused; its name may be given again.
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
    """The allowlist in a file (``NodeAllowlist``), read again when the file changes.

    Args:
        path (Path): ``nodes.json``; an empty list where there is no such file.
        audit_log (Path, optional): Where changes are recorded.
    """

    def __init__(self, path: Path, audit_log: Path | None = None):
        self.path, self.audit_log = path, audit_log
        self._file_version: tuple[int, ...] | None = None
        self._members: list[Node] = []
        self._by_key: dict[bytes, Node] = {}
        self._log: AuditLog | None = None

    def all(self) -> list[Node]:
        """Every node, with revoked ones.

        Raises:
            NodeListError: If the file cannot be read.
        """
        self._refresh()
        return list(self._members)

    def invite(
        self,
        name: str,
        secret: bytes,
        number: int | None = None,
        lasts: float = INVITATION_TIME,
    ) -> Node:
        """Adds an invitation with the hash of a secret.

        An invitation that was not used is replaced.

        Raises:
            NodeListError: If the name is in use.
        """
        member = Node(tokens.check_name(name), 0, secret=_hash(secret), expires=time.time() + lasts)
        return self._add(member, number)

    def add(self, name: str, key: bytes, number: int | None = None) -> Node:
        """Adds a public key (PEM) without an invitation.

        Raises:
            NodeListError: If the name or the key is in use.
        """
        return self._add(Node(tokens.check_name(name), 0, key=key.decode()), number)

    def revoke(self, name: str) -> Node:
        """Revokes a node's key, or its invitation.

        Raises:
            NodeListError: If there is none of this name.
        """
        with self._edit() as members:
            for index, member in enumerate(members):
                if member.name == name and not member.revoked:
                    members[index] = replace(member, revoked=True)
                    return members[index]
        raise NodeListError(f"There is no node named {name!r}: mlx-fed nodes list shows them.")

    # NodeAllowlist, for the Fleet routes.

    def name_of(self, key: bytes) -> str:
        """The name of the node with this key (``NodeAllowlist``)."""
        return self._enrolled(key).name

    def number_of(self, key: bytes) -> int:
        """The number of the node with this key (``NodeAllowlist``)."""
        return self._enrolled(key).number

    def _enrolled(self, key: bytes) -> Node:
        self._refresh()
        member = self._by_key.get(key)
        if member is None:
            raise AccessDenied(
                "This server does not know this node's key: join with a token, which "
                "`mlx-fed nodes add NAME` makes on the server.",
                UNKNOWN,
            )
        if member.revoked:
            raise AccessDenied(f"The key of {member.name} was revoked on the server.", REVOKED)
        return member

    def enrol(self, invitation: str, key: bytes) -> str:
        """Lists a key by the invitation ``name:secret`` (``NodeAllowlist``)."""
        name, _, secret = invitation.partition(":")
        self._refresh()
        entry = self._by_key.get(key)
        if entry is not None:
            if not entry.revoked and entry.name != name:
                raise AccessDenied(
                    f"This node's key has enrolled as {entry.name}: one key is one node. "
                    "For another node choose another --identity."
                )
            return self.name_of(key)
        try:
            secret_hash = _hash(bytes.fromhex(secret))
        except ValueError:
            secret_hash = ""
        with self._edit() as members:
            for index, member in enumerate(members):
                if member.name != name or not member.secret:
                    continue
                if not hmac.compare_digest(member.secret, secret_hash):
                    continue
                if member.state == "invited":
                    members[index] = replace(member, key=key.decode())
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
        with self._edit() as members:
            for entry in members:
                if member.key and entry.key == member.key:
                    state = "revoked" if entry.revoked else f"in use, by {entry.name}"
                    raise NodeListError(f"This key is {state}: make a new one for {member.name}.")
                if entry.name == member.name and entry.state == "enrolled":
                    raise NodeListError(
                        f"There is a node named {member.name} already: choose another name, or "
                        f"`mlx-fed nodes revoke {member.name}` first."
                    )
            members[:] = [
                entry for entry in members if entry.name != member.name or entry.state == "revoked"
            ]
            if len(members) >= _MAX_NODES:
                raise NodeListError(f"There are {_MAX_NODES} nodes already.")
            numbers = {entry.number for entry in members if not entry.revoked}
            if number is None:
                number = next(n for n in range(_MAX_NODES + 1) if n not in numbers)
            elif number in numbers:
                raise NodeListError(f"The number {number} is taken by another node.")
            members.append(replace(member, number=number))
            return members[-1]

    @contextmanager
    def _edit(self) -> Iterator[list[Node]]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        with os_errors(NodeListError, f"Cannot write {self.path}"):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            members = _read(self.path)
            before = list(members)
            yield members
            if members != before:
                text = json.dumps({"nodes": [asdict(member) for member in members]}, indent=1)
                private_files.write(self.path, text.encode() + b"\n")
                if self.audit_log is not None:
                    self._log = self._log or AuditLog(self.audit_log)
                    for member in members:
                        if member not in before:
                            self._log.append(member.state, node=member.name, number=member.number)
        finally:
            os.close(descriptor)

    def _refresh(self) -> None:
        """Reads the file again if it has changed."""
        file_version: tuple[int, ...] = ()
        with os_errors(NodeListError, f"Cannot read {self.path}"), suppress(FileNotFoundError):
            stat = self.path.stat()
            file_version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if file_version == self._file_version:
            return
        try:
            self._members = _read(self.path)
        except NodeListError as error:
            if self._file_version is None:
                raise
            log.warning("%s The nodes known before stay so.", error)  # it was edited by hand
            self._file_version = file_version
            return
        entries = sorted(
            (member for member in self._members if member.key), key=lambda member: member.revoked
        )
        self._by_key = {member.key.encode(): member for member in entries}  # revoked ones last
        self._file_version = file_version


def _read(path: Path) -> list[Node]:
    text = b'{"nodes": []}'
    with os_errors(NodeListError, f"Cannot read {path}"), suppress(FileNotFoundError):
        text = path.read_bytes()
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


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
