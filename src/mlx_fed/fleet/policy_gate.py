"""Gate of a node: holds requests and replies to its policy, and records both in its audit log."""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from ..arrays.flower_records import records_in, segments_of
from ..rounds import messages
from ..task_settings import kebab_case
from .audit import AuditLog, entries
from .policy import BY_LIBRARY, Policy, PolicyRefusal

_DAY = timedelta(days=1)
_WEIGHT = "num-examples"


class Gate:
    """Flower mod that holds a node's requests and replies to its policy, and writes the audit log.

    Args:
        policy (Policy): What the owner allows.
        server (str): ``HOST:PORT`` of the server.
        log (AuditLog, optional): Where requests, replies and refusals are recorded; what left in
            the last 24 hours is read from it. Default: nowhere.
        approve (callable, optional): ``approve(question)`` asks a person. Default: nobody is there.
        clock (callable): The local time, with its zone.
    """

    def __init__(
        self,
        policy: Policy,
        server: str,
        log: AuditLog | None = None,
        approve: Callable[[str], bool] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC).astimezone(),
    ):
        self.policy, self.server, self.log = policy, server, log
        self.approve, self.clock = approve, clock
        self._approved: dict[str, bool] = {}
        self._runs_of_task: set[str] = set()
        """Runs whose roll call had the task's digest."""
        self._sent: deque[tuple[datetime, int]] = deque()
        """The time and the bytes of arrays of each training reply in the last 24 hours."""
        for entry in entries(log.path) if log else ():
            if entry.event == "approved":
                self._approved[str(entry.fields["run"])] = True
            if entry.event == "sent" and entry.fields.get("request") == "train":
                self._sent.append((entry.time, int(entry.fields["bytes"])))

    def __call__(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Answers a request if the policy allows it.

        Raises:
            PolicyRefusal: If it does not.
        """
        kind = str(message.metadata.message_type)
        if kind == messages.LEAVE:
            return call_next(message, context)
        _, server_config = messages.config_of(message.content)
        config = kebab_case(server_config)
        request = {
            "server": self.server,
            "run": str(config.get("run-id", message.metadata.run_id)),
            "request": "roll-call" if kind == messages.ROLL_CALL else kind,
            "round": config.get("server-round"),
        }
        try:
            self._check(kind, config, request)
            self._record("asked", request, settings=_plain(config))
            reply = call_next(message, context)
            if reply.has_error():
                self._record("failed", request, reason=str(reply.error.reason)[:1000])
                return reply
            self._hold(reply)
        except PolicyRefusal as refusal:
            self._record("refused", request, reason=str(refusal))
            raise
        except Exception as error:
            self._record("failed", request, reason=type(error).__name__)
            raise
        size = messages.count_bytes(reply.content)
        if kind == "train":
            self._sent.append((self.clock(), size))
        self._record("sent", request, bytes=size, **_contents(reply.content))
        return reply

    def _check(self, kind: str, config: Mapping[str, Any], request: Mapping[str, Any]) -> None:
        policy = self.policy
        policy.check_time(self.clock())
        if kind == messages.ROLL_CALL:
            digest = _digest(config.get("fingerprint", ""))
            if policy.task_digest not in (None, digest):
                raise PolicyRefusal(
                    f"this node's policy allows the task {policy.task_digest}, and not {digest}"
                )
            self._runs_of_task.add(str(request["run"]))
        elif policy.task_digest is not None and request["run"] not in self._runs_of_task:
            raise PolicyRefusal(f"this run has not named the task {policy.task_digest}")
        policy.check_settings(config)
        if kind != "train":
            return
        while self._sent and self._sent[0][0] < self.clock() - _DAY:
            self._sent.popleft()
        rounds, size = len(self._sent), sum(size for _, size in self._sent)
        for amount, limit, unit in (
            (rounds, policy.rounds_per_day, "rounds"),
            (size, policy.bytes_per_day, "bytes"),
        ):
            if limit is not None and amount >= limit:
                raise PolicyRefusal(
                    f"this node's policy allows {limit} {unit} in 24 hours, and {amount} were sent"
                )
        if policy.ask and not self._is_approved(request, config):
            raise PolicyRefusal("the owner of this node has not approved this run")

    def _is_approved(self, request: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        run = str(request["run"])
        if run not in self._approved:
            settings = ", ".join(
                f"{name}={value}" for name, value in sorted(_plain(config).items())
            )
            question = f"Train for run {run} of {self.server}, with {settings or 'no settings'}?"
            self._approved[run] = self.approve is not None and self.approve(question)
            self._record("approved" if self._approved[run] else "not approved", request)
        return self._approved[run]

    def clip(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Flower mod around training that clips the update, before it is encoded.

        Raises:
            PolicyRefusal: If the update is not finite.
        """
        max_norm = self.policy.max_update_norm
        _, before = messages.parameters_of(message.content)
        reply = call_next(message, context)
        if max_norm is not None and not reply.has_error():
            name, after = messages.parameters_of(reply.content)
            reply.content[name] = clip_update(before, after, max_norm)
        return reply

    def _hold(self, reply: Message) -> None:
        """Holds a reply to the policy, in place: metrics and number of examples."""
        policy, content = self.policy, reply.content
        for record in records_in(content, MetricRecord).values():
            examples = record.get(_WEIGHT)
            if isinstance(examples, int | float) and examples < policy.min_examples:
                raise PolicyRefusal(
                    f"this node's policy asks for {policy.min_examples} examples or more, and "
                    "there are fewer"
                )
            if policy.metrics is not None:
                for name in set(record) - {*policy.metrics, _WEIGHT}:
                    del record[name]
        if policy.metrics is not None:
            for name in (messages.WEIGHTS, messages.UNDEFINED, messages.COUNTS):
                config_record = records_in(content, ConfigRecord).get(name, ConfigRecord())
                for metric in set(config_record) - {*policy.metrics, _WEIGHT}:
                    del config_record[metric]

    def _record(self, event: str, request: Mapping[str, Any], **fields: Any) -> None:
        if self.log is not None:
            self.log.append(event, **request, **fields)


def clip_update(before: ArrayRecord, after: ArrayRecord, max_norm: float) -> ArrayRecord:
    """The parameters after training with the update's norm clipped.

    Args:
        before (ArrayRecord): The parameters that were sent.
        after (ArrayRecord): The parameters of the reply, in the same form.
        max_norm (float): The largest L2 norm of ``after - before``, over all parameters.

    Returns:
        ArrayRecord: ``after`` itself where the norm is not larger.

    Raises:
        PolicyRefusal: If the update is not finite.
    """
    import mlx.core as mx

    start, end = messages.unpack(before), messages.unpack(after)
    updates = {
        name: np.asarray(array.astype(mx.float32)).astype(np.float64)
        - np.asarray(start[name].astype(mx.float32))
        for name, array in end.items()
    }
    norm = math.sqrt(sum(float(np.vdot(update, update)) for update in updates.values()))
    if not math.isfinite(norm):
        raise PolicyRefusal("the update is not finite, and this node's policy has a norm for it")
    if norm <= max_norm:
        return after
    scale = max_norm / norm
    parameters = {}
    for name, array in end.items():
        value = np.asarray(start[name].astype(mx.float32)) + scale * updates[name]
        parameters[name] = mx.array(value.astype(np.float32)).astype(array.dtype)
    if messages.is_packed(after):
        return messages.pack(parameters)
    from ..arrays import master_weights

    return master_weights.to_masters(parameters)


@contextmanager
def logged(log: AuditLog | None, **fields: Any) -> Iterator[None]:
    """Records when a node starts and ends, and why.

    Args:
        log (AuditLog, optional): Where. Default: nowhere.
        fields: Recorded with its start.
    """
    if log is None:
        yield
        return
    log.append("started", **fields)
    reason = "the run is over"
    try:
        yield
    except KeyboardInterrupt:
        reason = f"stopped by {getpass.getuser()}"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:1000]
        raise
    finally:
        log.append("ended", reason=reason)


def ask_at_terminal(question: str) -> bool:
    """Asks the person at the terminal; False where there is none."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    return input(f"{question} [y/N] ").strip().casefold() in ("y", "yes")


def _digest(fingerprint: Any) -> str:
    return "sha256:" + hashlib.sha256(str(fingerprint).encode()).hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request, without what is long or the same in each."""
    settings = {key: value for key, value in config.items() if key not in BY_LIBRARY}
    if fingerprint := config.get("fingerprint"):
        settings["task"] = _digest(fingerprint)
    return {
        key: value if isinstance(value, bool | int | float) else str(value)[:200]
        for key, value in settings.items()
    }


def _contents(content: RecordDict) -> dict[str, Any]:
    """The names of what a reply has: records of arrays with their digest, and metrics."""
    arrays = {}
    for name, record in records_in(content, ArrayRecord).items():
        digest = hashlib.sha256()
        for key, array in record.items():
            digest.update(json.dumps([key, array.dtype, list(array.shape)]).encode())
            for segment in segments_of(array):
                digest.update(segment.view())
        arrays[name] = digest.hexdigest()
    metrics = {name: [*record] for name, record in records_in(content, MetricRecord).items()}
    if counts := messages.config_record(content, messages.COUNTS):
        metrics[messages.COUNTS] = [*counts]
    return {"arrays": arrays, "metrics": metrics}
