"""Node policy: what a server may ask of a node, as the node's owner has written it down.

A file in TOML, read when the node starts. Each request is checked before anything of it is done,
and each reply before it leaves; the server has no part in either. All keys are optional::

    [server]
    allowed = ["fed.example.org:8080"]    # addresses that the node may join
    runs = ["5f0c..."]                    # ids of runs; a run's settings.json has its run-id
    strategies = ["FedAvg", "FedProx"]    # as the server states them

    [settings]                            # of training, as the server sends them
    local-epochs = { max = 5 }
    learning-rate = { min = 1e-4, max = 0.1 }
    batch-size = [16, 32]
    others = false                        # refuse settings that are not in this table

    [task]
    digest = "sha256:..."                 # of the task's fingerprint: `mlx-fed audit show` has it

    [data]
    min-examples = 100                    # the node does not train or evaluate on fewer

    [replies]
    metrics = ["loss", "accuracy"]        # beside num-examples; others do not leave
    max-update-norm = 10.0                # a larger update is clipped before it leaves

    [limits]
    rounds-per-day = 50
    bytes-per-day = 2_000_000_000         # of arrays that leave
    hours = ["22:00-06:00", "12:30-13:00"]    # local time

    [approval]
    ask = true                            # ask a person before the first training of a run
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from ..arrays.examples import leaves
from ..arrays.flower_records import records_in, segments_of
from ..errors import FedError
from ..rounds import messages
from ..settings_check import SET_BY_THE_RUN
from ..task import Data
from ..task_settings import kebab_case, nearest
from .audit import AuditLog, entries

_DAY = timedelta(days=1)
_WEIGHT = "num-examples"
_BY_LIBRARY = {
    *SET_BY_THE_RUN,
    "num-rounds",
    "train-loss-key",
    "strategy",
    "fingerprint",
    "prepare",
}
"""Settings that each message may have, whatever the task is."""


class PolicyError(FedError):
    """A policy file that cannot be used."""


class PolicyRefusal(FedError):
    """A request that the node's policy does not allow; the message says which rule and value."""


@dataclass(frozen=True)
class Range:
    """The values that a setting may have: a range, or a list.

    Args:
        min (float): The least.
        max (float): The largest.
        values (tuple, optional): The values, in place of a range.
    """

    min: float = -math.inf
    max: float = math.inf
    values: tuple[Any, ...] | None = None

    def allows(self, value: Any) -> bool:
        """Whether a setting may have this value."""
        if self.values is not None:
            return any(value == item and type(value) is type(item) for item in self.values)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.min <= value <= self.max

    def __str__(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(map(repr, self.values))}"
        if math.isinf(self.min):
            return f"at most {self.max:g}"
        if math.isinf(self.max):
            return f"at least {self.min:g}"
        return f"from {self.min:g} to {self.max:g}"


@dataclass(frozen=True)
class Policy:
    """What a node's owner allows; see :mod:`mlx_fed.fleet.policy` for the file.

    Args:
        servers (tuple, optional): Addresses, ``HOST:PORT``, with ``*`` for any part.
        runs (tuple, optional): Ids of runs.
        strategies (tuple, optional): Names of strategies, as the server states them.
        settings (dict): The range of each setting.
        other_settings (bool): Allow settings that have no range.
        task_digest (str, optional): Of the task's fingerprint, which the server compares.
        min_examples (int): Examples that a split must have to be used.
        metrics (tuple, optional): Names of metrics that may leave, beside ``num-examples``.
        max_update_norm (float, optional): To which the update is clipped, L2 over all parameters.
        rounds_per_day (int, optional): Training requests that are answered in 24 hours.
        bytes_per_day (int, optional): Bytes of arrays that leave in 24 hours.
        hours (tuple): Local times between which requests are answered; empty for any.
        ask (bool): Ask a person before the first training of a run.
    """

    servers: tuple[str, ...] | None = None
    runs: tuple[str, ...] | None = None
    strategies: tuple[str, ...] | None = None
    settings: Mapping[str, Range] = field(default_factory=dict)
    other_settings: bool = True
    task_digest: str | None = None
    min_examples: int = 0
    metrics: tuple[str, ...] | None = None
    max_update_norm: float | None = None
    rounds_per_day: int | None = None
    bytes_per_day: int | None = None
    hours: tuple[tuple[time, time], ...] = ()
    ask: bool = False

    def check_server(self, address: str) -> None:
        """Checks the address of a server before the node connects to it.

        Args:
            address (str): ``HOST:PORT``.

        Raises:
            PolicyRefusal: If it is none of the allowed ones.
        """
        if self.servers is not None and not any(fnmatch(address, entry) for entry in self.servers):
            raise PolicyRefusal(
                f"This node's policy allows the servers {', '.join(self.servers) or 'none'}, and "
                f"not {address}."
            )

    def check_data(self, data: Data) -> None:
        """Checks how many examples each split has; of a stream that is seen in its replies.

        Args:
            data (Data): The node's.

        Raises:
            PolicyRefusal: If a split has fewer than ``min_examples``.
        """
        for name, split in (("train", data.train), ("test", data.test)):
            if split is None or callable(split):
                continue
            if (size := len(leaves(split)[0])) < self.min_examples:
                raise PolicyRefusal(
                    f"This node's policy asks for {self.min_examples} examples or more, and "
                    f"Data.{name} has {size}."
                )

    def check_settings(self, config: Mapping[str, Any]) -> None:
        """Checks the settings of a request.

        Args:
            config (dict): As the server sent them, in kebab-case.

        Raises:
            PolicyRefusal: If a setting, the run or the strategy is not allowed.
        """
        run_id = config.get("run-id")
        if self.runs is not None and run_id not in self.runs:
            raise PolicyRefusal(f"this node's policy does not allow the run {run_id}")
        strategy = config.get("strategy")
        if self.strategies is not None and strategy not in self.strategies:
            raise PolicyRefusal(
                f"this node's policy allows the strategies {', '.join(self.strategies)}, and not "
                f"{strategy or 'one that the server does not name'}"
            )
        for name, allowed_range in self.settings.items():
            if name in config and not allowed_range.allows(config[name]):
                raise PolicyRefusal(
                    f"this node's policy allows {name} {allowed_range}, and not {config[name]!r}"
                )
        other_names = config.keys() - self.settings.keys() - _BY_LIBRARY
        if other_names and not self.other_settings:
            raise PolicyRefusal(
                f"this node's policy does not name the settings {', '.join(sorted(other_names))}"
            )

    def check_time(self, local_time: datetime) -> None:
        """Checks the hours.

        Args:
            local_time (datetime): The local time.

        Raises:
            PolicyRefusal: If it is outside all of them.
        """
        if self.hours and not any(_is_between(local_time.time(), *entry) for entry in self.hours):
            spans = ", ".join(f"{start:%H:%M}-{end:%H:%M}" for start, end in self.hours)
            raise PolicyRefusal(f"this node's policy allows work in these hours only: {spans}")


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
            before = self._parameters_before(message) if kind == "train" else None
            reply = call_next(message, context)
            if reply.has_error():
                self._record("failed", request, reason=str(reply.error.reason)[:1000])
                return reply
            self._hold(kind, reply, before)
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

    def _parameters_before(self, message: Message) -> ArrayRecord | None:
        if self.policy.max_update_norm is None:
            return None
        return messages.parameters_of(message.content)[1]

    def _hold(self, kind: str, reply: Message, before: ArrayRecord | None) -> None:
        """Holds a reply to the policy, in place: metrics, number of examples, norm."""
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
            for name in (messages.WEIGHTS, messages.UNDEFINED):
                config_record = records_in(content, ConfigRecord).get(name, ConfigRecord())
                for metric in set(config_record) - {*policy.metrics, _WEIGHT}:
                    del config_record[metric]
        if kind == "train" and before is not None:
            name, after = messages.parameters_of(content)
            content[name] = clip_update(before, after, float(policy.max_update_norm or 0.0))

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


def load_policy(path: Path | str) -> Policy:
    """Reads a policy file.

    Args:
        path (Path): The file.

    Raises:
        PolicyError: If it cannot be read, or has a key or a value that no policy has.
    """
    path = Path(path).expanduser()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"Cannot read the policy {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} is not TOML: {error}.") from error
    reader = _Reader(path, tables)
    policy = Policy(
        servers=reader.texts("server", "allowed"),
        runs=reader.texts("server", "runs"),
        strategies=reader.texts("server", "strategies"),
        other_settings=reader.value("settings", "others", bool, True),
        task_digest=reader.value("task", "digest", str, None),
        min_examples=reader.value("data", "min-examples", int, 0),
        metrics=reader.texts("replies", "metrics"),
        max_update_norm=reader.value("replies", "max-update-norm", float, None),
        rounds_per_day=reader.value("limits", "rounds-per-day", int, None),
        bytes_per_day=reader.value("limits", "bytes-per-day", int, None),
        hours=tuple(map(reader.hours, reader.texts("limits", "hours") or ())),
        ask=reader.value("approval", "ask", bool, False),
        settings={
            name: reader.range(name, value)
            for name, value in kebab_case(reader.rest("settings"), str(path)).items()
        },
    )
    reader.require_empty()
    return policy


def policy_and_log(
    policy: Policy | Path | str | None, log: Path | str | None
) -> tuple[Policy, AuditLog | None]:
    """The policy and the audit log of a node.

    Args:
        policy (Policy or Path, optional): The policy or its file. Default: all is allowed.
        log (Path, optional): The log's file. Default: beside the policy's file, if there is one.

    Raises:
        PolicyError: If the policy cannot be used, or its daily limits have no log to count by.
        AuditError: If the log cannot be read, or was changed.
    """
    if isinstance(policy, Path | str):
        path = Path(policy).expanduser()
        log = log or path.with_name(f"{path.stem}.audit.jsonl")
        policy = load_policy(path)
    policy = policy or Policy()
    if log is None and (policy.rounds_per_day or policy.bytes_per_day):
        raise PolicyError("Daily limits are counted by an audit log: name one (audit=, --audit).")
    return policy, AuditLog(log) if log else None


@contextmanager
def logged(log: AuditLog | None, **fields: Any) -> Iterator[None]:
    """Records when a node starts and ends, and why.

    Args:
        log (AuditLog, optional): Where. Default: nowhere.
        about: RunRecord with its start.
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


class _Reader:
    """Takes values out of the tables of a policy file; what is left at the end is unknown."""

    def __init__(self, path: Path, tables: dict[str, Any]):
        self.path, self.tables = path, tables
        self.names: dict[str, list[str]] = {}
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise PolicyError(f"{path}: {name} is not in a table, such as [limits].")

    def value(self, table: str, key: str, kind: type, default: Any) -> Any:
        self.names.setdefault(table, []).append(key)
        value = self.tables.get(table, {}).pop(key, default)
        if value is default:
            return default
        types: tuple[type, ...] = (int, float) if kind is float else (kind,)
        is_number = kind in (int, float)
        if type(value) not in types or (is_number and not 0 <= value < math.inf):
            words = {bool: "true or false", str: "text", int: "a whole number, 0 or more"}
            raise PolicyError(
                f"{self.path}: {key} of [{table}] is {words.get(kind, 'a number, 0 or more')}, "
                f"not {value!r}."
            )
        return value

    def texts(self, table: str, key: str) -> tuple[str, ...] | None:
        self.names.setdefault(table, []).append(key)
        value = self.tables.get(table, {}).pop(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise PolicyError(f"{self.path}: {key} of [{table}] is a list of texts, not {value!r}.")
        return tuple(value)

    def rest(self, table: str) -> dict[str, Any]:
        self.names.setdefault(table, [])
        return self.tables.pop(table, {})

    def range(self, name: str, value: Any) -> Range:
        if isinstance(value, list):
            return Range(values=tuple(value))
        numbers = value.values() if isinstance(value, dict) else ()
        is_range = isinstance(value, dict) and value and value.keys() <= {"min", "max"}
        if not is_range or not all(type(number) in (int, float) for number in numbers):
            raise PolicyError(
                f"{self.path}: {name} of [settings] is a list of values or a range such as "
                f"{{ min = 1, max = 5 }}, not {value!r}."
            )
        return Range(**value)

    def hours(self, text: str) -> tuple[time, time]:
        start, _, end = text.partition("-")
        try:
            return time.fromisoformat(start.strip()), time.fromisoformat(end.strip())
        except ValueError:
            raise PolicyError(
                f'{self.path}: hours of [limits] are such as "22:00-06:00", not {text!r}.'
            ) from None

    def require_empty(self) -> None:
        for table, values in self.tables.items():
            if table not in self.names:
                hint = _hint(table, self.names)
                raise PolicyError(f"{self.path}: a policy has no table [{table}]. {hint}")
            for key in values:
                hint = _hint(key, self.names[table])
                raise PolicyError(f"{self.path}: [{table}] has no key {key}. {hint}")


def _hint(name: str, names: Any) -> str:
    likely = nearest(name, names)
    return f"Did you mean {likely}?" if likely else f"There are {', '.join(names)}."


def _is_between(local_time: time, start: time, end: time) -> bool:
    if start <= end:
        return start <= local_time < end
    return local_time >= start or local_time < end


def _digest(fingerprint: Any) -> str:
    return "sha256:" + hashlib.sha256(str(fingerprint).encode()).hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request, without what is long or the same in each."""
    settings = {key: value for key, value in config.items() if key not in _BY_LIBRARY}
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
    return {"arrays": arrays, "metrics": metrics}
