"""Hostile acts by kind and name: what a party that means ill sends, or makes of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import audit_logs, evaluations, object_trees, requests, roll_calls, run_files, servers
from . import training_replies

KINDS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "replies to training": training_replies.ACTS,
    "replies to evaluation": evaluations.ACTS,
    "object trees": object_trees.ACTS,
    "answers to the roll call": roll_calls.ACTS,
    "HTTP, TLS and identity": requests.ACTS,
    "a server against a node with a policy": servers.ACTS,
    "audit logs": audit_logs.ACTS,
    "run folders": run_files.ACTS,
}
"""The acts of each kind, by name."""
