"""Gate of a node: holds requests and replies to its policy, and records both in its audit log."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from ..arrays.flower_records import records_in, segments_of
from ..errors import SettingsError
from ..rounds import messages
from ..system.printable import printable
from ..task_settings import kebab_case
from .audit import AuditError, AuditLog, Entry, entries, user_name
from .policy import BY_LIBRARY, Policy, PolicyRefusal

_DAY = timedelta(days=1)
_WEIGHT = "num-examples"
_ANSWERED = ("train", "evaluate", messages.ROLL_CALL)
_DEFAULT = ".default"
"""What Flower takes as the end of a message's type where it has none."""
_MOST_SETTINGS = 200
_LONGEST_NAME = 200
"""Characters of a setting's name, and of a run's id."""
_LONGEST_QUESTION = 900


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
        """The answers for this server's runs."""
        self._runs_of_task: set[str] = set()
        """Runs whose roll call had the task's digest."""
        self._sent: list[tuple[str, datetime, int]] = []
        """Request, time and bytes of arrays of what left, of all processes that share the log."""
        if log is not None:
            for entry in islice(entries(log.path), log.count):
                self._observe(entry)
            log.observe = self._observe

    def __call__(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Answers a request if the policy allows it.

        Raises:
            PolicyRefusal: If it does not.
        """
        kind = str(message.metadata.message_type).removesuffix(_DEFAULT)
        if kind == messages.LEAVE:
            return call_next(message, context)
        _, server_config = messages.config_of(message.content)
        request: dict[str, Any] = {
            "server": self.server,
            "run": str(message.metadata.run_id),
            "request": "roll-call" if kind == messages.ROLL_CALL else kind,
            "round": None,
        }
        try:
            config = _settings_of(server_config)
            number = config.get("server-round")
            request["run"] = str(config.get("run-id", request["run"]))
            request["round"] = number if isinstance(number, int) else None
            self._check(kind, config, request)
            self._record("asked", request, settings=_plain(config))
            reply = call_next(message, context)
            if reply.has_error():
                self._record("failed", request, reason=str(reply.error.reason)[:1000])
                return reply
            self._hold(reply)
            self._record_sent(request, reply.content)
        except PolicyRefusal as refusal:
            asked = _plain(dict(islice(server_config.items(), _MOST_SETTINGS)))
            self._record("refused", request, reason=str(refusal)[:1000], settings=asked)
            raise
        except Exception as error:
            self._record("failed", request, reason=type(error).__name__)
            raise
        return reply

    def _check(self, kind: str, config: Mapping[str, Any], request: Mapping[str, Any]) -> None:
        policy, run = self.policy, str(request["run"])
        if kind not in _ANSWERED:
            raise PolicyRefusal(f"this node's policy has no requests of the kind {kind[:100]!r}")
        if len(run) > _LONGEST_NAME:
            raise PolicyRefusal(f"a run's id has at most {_LONGEST_NAME} characters")
        policy.check_time(self.clock())
        if kind == messages.ROLL_CALL:
            digest = _digest(config.get("fingerprint", ""))
            if policy.task_digest not in (None, digest):
                self._runs_of_task.discard(run)
                raise PolicyRefusal(
                    f"this node's policy allows the task {policy.task_digest}, and not {digest}"
                )
            if policy.task_digest is not None:
                self._runs_of_task.add(run)
        elif policy.task_digest is not None and run not in self._runs_of_task:
            raise PolicyRefusal(f"this run has not named the task {policy.task_digest}")
        policy.check_settings(config)
        if kind != messages.ROLL_CALL:
            self._check_limits(kind, 1 if kind == "train" else 0)  # or it is trained in vain
        if policy.ask:
            self._require_approval(run, request, config)

    def _check_limits(self, kind: str, size: int) -> None:
        """Checks whether another reply with so many bytes of arrays may leave now."""
        policy, start = self.policy, self.clock() - _DAY
        sent = [(request, number) for request, time, number in self._sent if time > start]
        for amount, addition, limit, unit in (
            ([request for request, _ in sent].count(kind), 1, policy.rounds_per_day, "rounds"),
            (sum(number for _, number in sent), size, policy.bytes_per_day, "bytes"),
        ):
            if limit is not None and amount + addition > limit:
                raise PolicyRefusal(
                    f"this node's policy allows {limit} {unit} in 24 hours, {amount} were sent, "
                    f"and {addition} would be added"
                )

    def _require_approval(
        self, run: str, request: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        if run not in self._approved:
            settings = ", ".join(
                f"{name}={value}" for name, value in sorted(_plain(config).items())
            )
            question = f"Train for run {run} of {self.server}, with {settings or 'no settings'}?"
            if len(question) > _LONGEST_QUESTION:
                raise PolicyRefusal("this run has more settings than a person can be shown")
            answer = self.approve is not None and self.approve(question)
            self._approved[run] = answer
            self._record("approved" if answer else "not approved", request)
        if not self._approved[run]:
            raise PolicyRefusal("the owner of this node has not approved this run")

    def _observe(self, entry: Entry) -> None:
        """Takes in a line of the log that this or another process has written."""
        try:
            if entry.event == "approved" and entry.fields["server"] == self.server:
                self._approved[str(entry.fields["run"])] = True
            if entry.event == "sent" and self._has_limits:
                request, size = str(entry.fields["request"]), int(entry.fields["bytes"])
                self._sent.append((request, entry.time, size))
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise AuditError(f"Line {entry.number} of the audit log is no node's.") from error

    @property
    def _has_limits(self) -> bool:
        return (self.policy.rounds_per_day, self.policy.bytes_per_day) != (None, None)

    def clip(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Flower mod around training that clips the update, before it is encoded, and the change of
        running statistics, each to the policy's norm.

        Raises:
            PolicyRefusal: If one of them is not finite, or statistics leave that did not come.
        """
        max_norm = self.policy.max_update_norm
        if max_norm is None:  # nothing holds the message, whose parameters training releases
            return call_next(message, context)
        _, before = messages.parameters_of(message.content)
        statistics_before = records_in(message.content, ArrayRecord).get(messages.STATISTICS)
        reply = call_next(message, context)
        if not reply.has_error():
            name, after = messages.parameters_of(reply.content)
            reply.content[name] = clip_update(before, after, max_norm)
            statistics = records_in(reply.content, ArrayRecord).get(messages.STATISTICS)
            if statistics is not None:
                if statistics_before is None:
                    raise PolicyRefusal(
                        "this node's policy has a norm for updates, and the server has not sent "
                        "the running statistics that theirs is measured from"
                    )
                reply.content[messages.STATISTICS] = clip_update(
                    statistics_before, statistics, max_norm
                )
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

    def _record_sent(self, request: Mapping[str, Any], content: RecordDict) -> None:
        """Records a reply, if with it and what other processes have sent the limits hold."""
        size, kind = messages.count_bytes(content), str(request["request"])
        if self.log is None:
            self._check_limits(kind, size)
            self._sent.append((kind, self.clock(), size))
            return
        self.log.append(
            "sent",
            lambda: self._check_limits(kind, size),
            **request,
            bytes=size,
            **_contents(content),
        )

    def _record(self, event: str, request: Mapping[str, Any], **fields: Any) -> None:
        if self.log is not None:
            self.log.append(event, **request, **fields)


def clip_update(before: ArrayRecord, after: ArrayRecord, max_norm: float) -> ArrayRecord:
    """The parameters, or running statistics, after training with the update's norm clipped.

    Args:
        before (ArrayRecord): The arrays that were sent.
        after (ArrayRecord): The arrays of the reply, in the same form.
        max_norm (float): The largest L2 norm of ``after - before``, over all arrays.

    Returns:
        ArrayRecord: ``after`` itself where the norm is not larger.

    Raises:
        PolicyRefusal: If the update is not finite.
    """
    import mlx.core as mx

    end = messages.unpack(after)
    start = {
        name: _float64(array.astype(end[name].dtype))
        for name, array in messages.unpack(before).items()
    }
    updates = {name: _float64(array) - start[name] for name, array in end.items()}
    norm = _norm(updates)
    if not math.isfinite(norm):
        raise PolicyRefusal("the update is not finite, and this node's policy has a norm for it")
    if norm <= max_norm:
        return after
    # Where an update is small beside the parameters, rounding may make it larger again, twice as
    # large at most.
    for factor in (1.0, 0.99, 0.5):
        scale = factor * max_norm / norm
        parameters = {
            name: mx.array((start[name] + scale * updates[name]).astype(np.float32)).astype(
                array.dtype
            )
            for name, array in end.items()
        }
        if _norm({name: _float64(a) - start[name] for name, a in parameters.items()}) <= max_norm:
            break
    if messages.is_packed(after):
        return messages.pack(parameters)
    from ..arrays import master_weights

    return master_weights.to_masters(parameters)


def _float64(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.asarray(array.astype(mx.float32)).astype(np.float64)


def _norm(updates: Mapping[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.vdot(update, update)) for update in updates.values()))


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
        reason = f"stopped by {user_name()}"
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
    try:
        return input(f"{printable(question)} [y/N] ").strip().casefold() in ("y", "yes")
    except EOFError:
        return False


def _settings_of(server_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request in kebab-case.

    Raises:
        PolicyRefusal: If they contradict each other, or are more than an audit log can show.
    """
    if len(server_config) > _MOST_SETTINGS or any(len(n) > _LONGEST_NAME for n in server_config):
        raise PolicyRefusal(
            f"a request has at most {_MOST_SETTINGS} settings, with names of at most "
            f"{_LONGEST_NAME} characters"
        )
    try:
        return kebab_case(server_config)
    except SettingsError as error:
        raise PolicyRefusal(f"{error!s:.500}") from None


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
