"""Partitioners of flwr_datasets by name: they assign the rows of a dataset to clients.

A partition here is the one that Flower's own examples have. flwr_datasets takes seconds to import,
so it is imported late.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner


class PartitionError(ValueError):
    """A dataset that cannot be partitioned; the message is part of a sentence with its name."""


_BY_LABEL = {"partition_by": "label"}
PARTITIONERS: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {**_BY_LABEL, "alpha": 0.5, "min_partition_size": 2},
    "pathological": _BY_LABEL,
    "shard": _BY_LABEL,
    "linear": {},
    "square": {},
    "exponential": {},
    "size": {},
    "distribution": _BY_LABEL,
    "inner-dirichlet": {**_BY_LABEL, "alpha": 0.5},
    "continuous": {},
    "natural-id": {},
    "grouped-natural-id": {},
}
"""Names, which are short for Flower's classes, and our defaults of their arguments."""

EXCLUDED = {
    "vertical-even": "it gives each client some columns of every example, not some examples",
    "vertical-size": "it gives each client some columns of every example, not some examples",
    "id-to-size-fnc": "it takes a function: create one in Python and pass it",
}


def partition_rows(
    dataset: Dataset,
    partitioner: str | Partitioner,
    num_partitions: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> list[np.ndarray]:
    """The rows of each partition of ``dataset``, which is shuffled by ``seed`` before.

    Args:
        dataset (datasets.Dataset): The examples.
        partitioner (str): A name of :data:`PARTITIONERS`, or one of flwr_datasets' objects.
        num_partitions (int): The number of partitions.
        seed (int): Of shuffling and of the partitioner.
        arguments (dict): The partitioner's arguments, by their names in Flower.

    Raises:
        PartitionError: If there is no such partitioner, an argument is wrong or missing, or it
            cannot partition the dataset.
    """
    size = len(dataset)
    if num_partitions > size:
        raise PartitionError(
            f"there are {size} examples, too few for {num_partitions} partitions: "
            f"use at most {size // 2}, so that each has one to train on and one to hold out"
        )
    if partitioner == "iid" and not arguments:
        # The result of Dataset.shuffle and Dataset.shard, without importing them.
        order = np.random.default_rng(seed).permutation(size)
        return np.array_split(order, num_partitions)
    if isinstance(partitioner, str):
        arguments = {**PARTITIONERS[partitioner], **arguments}
        name = f"partitioner {partitioner!r}"
        instance = _create(partitioner, num_partitions, seed, arguments, dataset.column_names)
    else:
        name = type(partitioner).__name__
        if partitioner.is_dataset_assigned():
            raise PartitionError(f"the {name} already has a dataset: create one for each dataset")
        instance = copy.deepcopy(partitioner)  # a dataset can be assigned only once
    try:
        rows = _run(instance, dataset, seed)
        num_results = instance.num_partitions
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise PartitionError(
            f"the {name} cannot make {num_partitions} partitions{_as_text(arguments)}: {reason}"
        ) from error
    if num_results != num_partitions:
        raise PartitionError(
            f"the {name} makes {num_results} partitions of it, not {num_partitions}"
        )
    return rows


def partition_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``load_partition`` from a task's settings.

    The settings are ``partitioner``, its arguments in kebab-case, such as
    ``num-classes-per-partition``, and ``partition-seed``.
    """
    names = {_kebab(name): name for name in _READERS}
    settings = {name: config[key] for key, name in names.items() if key in config}
    if "partitioner" in config:
        settings["partitioner"] = config["partitioner"]
    if "partition-seed" in config:
        settings["seed"] = config["partition-seed"]
    return settings


def check_partitioner(partitioner: str | Partitioner, arguments: Mapping[str, Any]) -> None:
    """Checks a partitioner before a dataset is loaded.

    Raises:
        PartitionError: If there is none of that name; the message lists the names.
    """
    if hasattr(partitioner, "load_partition"):
        if arguments:
            name, first = type(partitioner).__name__, _kebab(next(iter(arguments)))
            raise PartitionError(
                f"the {name} is an object already: create it with the argument {first}"
            )
    elif partitioner in EXCLUDED:
        reason = EXCLUDED[str(partitioner)]
        raise PartitionError(f"the partitioner {partitioner!r} cannot be used here: {reason}")
    elif partitioner not in PARTITIONERS:
        names = ", ".join(PARTITIONERS)
        raise PartitionError(f"{partitioner!r} is not a partitioner: choose one of {names}")


def _create(
    name: str, num_partitions: int, seed: int, arguments: Mapping[str, Any], columns: list[str]
) -> Partitioner:
    from flwr_datasets import partitioner

    words = "".join(word.capitalize() for word in name.split("-"))
    kind = getattr(partitioner, f"{words}Partitioner")
    parameters = inspect.signature(kind).parameters
    common = {"num_partitions": num_partitions, "seed": seed}
    values: dict[str, Any] = {key: value for key, value in common.items() if key in parameters}
    names = [key for key in parameters if key not in common]
    for key, value in arguments.items():
        if key not in names:
            has = f"it takes {', '.join(map(_kebab, names))}" if names else "it takes none"
            raise PartitionError(f"the partitioner {name!r} has no argument {_kebab(key)}: {has}")
        try:
            values[key] = _READERS[key](value)
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise PartitionError(
                f"the partitioner {name!r} cannot take {_kebab(key)}={value}: {error}"
            ) from error
    required_names = [k for k in names if parameters[k].default is inspect.Parameter.empty]
    if missing := [key for key in required_names if key not in values]:
        raise PartitionError(
            f"the partitioner {name!r} needs {' and '.join(map(_kebab, missing))}, "
            f"such as -c {_kebab(missing[0])}={_EXAMPLES[missing[0]]}"
        )
    column = values.get("partition_by")
    if column and column not in columns:
        raise PartitionError(
            f"the partitioner {name!r} cannot go by partition-by={column}: there is no such "
            f"column, but {', '.join(map(repr, columns))}"
        )
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise PartitionError(
            f"the partitioner {name!r} refuses its arguments: {str(error).rstrip('.')}"
        ) from error


def _run(partitioner: Partitioner, dataset: Dataset, seed: int) -> list[np.ndarray]:
    row = "row" + "_" * (1 + max(map(len, dataset.column_names)))  # no column has this name
    partitioner.dataset = dataset.add_column(row, np.arange(len(dataset))).shuffle(seed=seed)
    # One shows a progress bar, and some warn of sizes that `mlx-fed partitions` shows.
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        first = partitioner.load_partition(0)
    # Some sort their dataset, so row numbers are read back from it. Their private index is faster
    # than the public call for each of thousands of partitions.
    numbers = partitioner.dataset.with_format("numpy")[row][:]
    indices = getattr(partitioner, "_partition_id_to_indices", None)
    if indices:
        return [numbers[np.asarray(indices[k], np.int64)] for k in range(len(indices))]
    partitions = [first, *map(partitioner.load_partition, range(1, partitioner.num_partitions))]
    return [partition.with_format("numpy")[row][:] for partition in partitions]


def _as_text(arguments: Mapping[str, Any]) -> str:
    """The arguments that are short enough for a message."""
    short = (f"{_kebab(key)}={value}" for key, value in arguments.items())
    text = ", ".join(argument for argument in short if len(argument) < 60)
    return text and f" with {text}"


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError("it must be a whole number")
    return int(value)


def _positive(value: Any) -> int:
    if _whole(value) == 0:
        raise ValueError("it must be 1 or more")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError("it must be a number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("it must be a name")
    return value


def _list(value: Any, kind: Callable[[str], Any], what: str) -> list[Any]:
    items = value.split(",") if isinstance(value, str) else np.atleast_1d(value).tolist()
    try:
        return [kind(item) for item in items]
    except (TypeError, ValueError):
        raise ValueError(f"it must be {what}, with commas between") from None


def _alpha(value: Any) -> float | list[float]:
    alphas = _list(value, float, "a number, or one for each")
    return alphas[0] if len(alphas) == 1 else alphas


def _array(value: Any) -> np.ndarray:
    if isinstance(value, str):
        if not value.endswith(".npy"):
            raise ValueError("it must be a file that numpy.save wrote, FILE.npy")
        return np.load(Path(value).expanduser())
    return np.asarray(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "partition_by": _text,
    "alpha": _alpha,
    "min_partition_size": _whole,
    "self_balancing": _flag,
    "shuffle": _flag,
    "num_classes_per_partition": _positive,
    "class_assignment_mode": _text,
    "num_shards_per_partition": _positive,
    "shard_size": _positive,
    "keep_incomplete_shard": _flag,
    "partition_sizes": lambda value: _list(value, int, "whole numbers"),
    "strictness": _number,
    "group_size": _positive,
    "mode": _text,
    "sort_unique_ids": _flag,
    "distribution_array": _array,
    "num_unique_labels_per_partition": _positive,
    "preassigned_num_samples_per_label": _whole,
    "rescale": _flag,
}
_EXAMPLES = {
    "partition_by": "COLUMN",
    "num_classes_per_partition": 2,
    "partition_sizes": "600,300,100",
    "strictness": 0.5,
    "group_size": 10,
    "distribution_array": "FILE.npy",
    "num_unique_labels_per_partition": 2,
    "preassigned_num_samples_per_label": 5,
}
