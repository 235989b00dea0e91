"""Node policy: what a server may ask of a node, as the node's owner decides.

A policy comes from a file (:mod:`mlx_fed.fleet.policy_file`), and a node is held to it by a
:class:`~mlx_fed.fleet.policy_gate.Gate`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, time
from typing import Any

from ..arrays import examples
from ..errors import FedError
from ..settings_check import SET_BY_THE_RUN
from ..task import Data

BY_LIBRARY = {
    *SET_BY_THE_RUN,
    "num-rounds",
    "train-loss-key",
    "strategy",
    "fingerprint",
    "prepare",
}
"""Settings that each message may have, whatever the task is."""


class PolicyRefusal(FedError):
    """A request that the node's policy does not allow; the message has the rule and the value."""


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
        return is_number and -math.inf < value < math.inf and self.min <= value <= self.max

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
    """Rules of a node's owner; see :mod:`mlx_fed.fleet.policy_file` for the file.

    Args:
        servers (tuple, optional): Addresses, ``HOST:PORT``, with ``*`` for any part.
        runs (tuple, optional): Ids of runs.
        strategies (tuple, optional): Names of strategies, as the server states them.
        settings (dict): The range of each setting.
        other_settings (bool): Allow settings that have no range.
        task_digest (str, optional): Of the task's fingerprint, which the server compares.
        min_examples (int): Examples that a split must have to be used.
        metrics (tuple, optional): Names of metrics that may leave, beside ``num-examples``.
        max_update_norm (float, optional): To which the update is clipped, L2 over all parameters,
            and the change of all running statistics.
        rounds_per_day (int, optional): Training requests that are answered in 24 hours, and as many
            evaluations.
        bytes_per_day (int, optional): Bytes of arrays that leave in 24 hours.
        hours (tuple, optional): Local times between which requests are answered.
        ask (bool): Ask a person before anything is done for a run.
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
    hours: tuple[tuple[time, time], ...] | None = None
    ask: bool = False

    def check_server(self, address: str) -> None:
        """Checks the address of a server before the node connects to it.

        Args:
            address (str): ``HOST:PORT``.

        Raises:
            PolicyRefusal: If it is none of the allowed ones.
        """
        patterns = (re.escape(entry).replace(r"\*", ".*") for entry in self.servers or ())
        if self.servers is not None and not any(
            re.fullmatch(pattern, address, re.IGNORECASE | re.DOTALL) for pattern in patterns
        ):
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
            if (size := examples.count(split)) < self.min_examples:
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
        if "local-steps" in config.keys() - self.settings.keys() and (
            self.min_examples or "local-epochs" in self.settings
        ):
            raise PolicyRefusal(
                "this node's policy limits local-epochs or examples, and has no range for "
                "local-steps, which would take their place"
            )
        other_names = config.keys() - self.settings.keys() - BY_LIBRARY
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
        if self.hours is None:
            return
        if not any(_is_between(local_time.time(), *entry) for entry in self.hours):
            spans = ", ".join(f"{start:%H:%M}-{end:%H:%M}" for start, end in self.hours) or "none"
            raise PolicyRefusal(f"this node's policy allows work in these hours only: {spans}")


def _is_between(local_time: time, start: time, end: time) -> bool:
    if start <= end:
        return start <= local_time < end
    return local_time >= start or local_time < end
