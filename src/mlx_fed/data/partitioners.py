"""Flower's partitioners by name: which rows of a dataset each client holds.

The partitioners are flwr_datasets', so that a partition here is the one that Flower's own examples
have. Importing that costs seconds, so it happens where it is used.
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


class CannotPartition(ValueError):
    """Why there are no such partitions, as part of a sentence that names the dataset."""


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
"""Names, Flower's classes' made short, with the arguments that have a default of ours."""

EXCLUDED = {
    "vertical-even": "it gives each client some columns of every example, not some examples",
    "vertical-size": "it gives each client some columns of every example, not some examples",
    "id-to-size-fnc": "it takes a function: make one in Python and hand it over",
}


def partition_rows(
    dataset: Dataset,
    partitioner: str | Partitioner,
    num_partitions: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> list[np.ndarray]:
    """The rows of ``dataset`` that each partition has, once it is shuffled by ``seed``.

    Args:
        dataset (datasets.Dataset): The examples.
        partitioner (str): A name of :data:`PARTITIONERS`, or one of flwr_datasets' objects.
        num_partitions (int): How many partitions there are to be.
        seed (int): Of shuffling and of the partitioner.
        arguments (dict): The partitioner's own, by their names in Flower.

    Raises:
        CannotPartition: If there is no such partitioner, an argument is wrong or missing, or the
            dataset cannot be partitioned so.
    """
    size = len(dataset)
    if num_partitions > size:
        raise CannotPartition(
            f"there are {size} examples, too few for {num_partitions} partitions: "
            f"use at most {size // 2}, so that each has one to train on and one to hold out"
        )
    if partitioner == "iid" and not arguments:
        # As Dataset.shuffle and Dataset.shard have it, without importing them.
        order = np.random.default_rng(seed).permutation(size)
        return np.array_split(order, num_partitions)
    if isinstance(partitioner, str):
        arguments = {**PARTITIONERS[partitioner], **arguments}
        name = f"partitioner {partitioner!r}"
        chosen = _make(partitioner, num_partitions, seed, arguments, dataset.column_names)
    else:
        name = type(partitioner).__name__
        if partitioner.is_dataset_assigned():
            raise CannotPartition(f"the {name} already has a dataset: make one for each dataset")
        chosen = copy.deepcopy(partitioner)  # it takes a dataset only once
    try:
        rows = _run(chosen, dataset, seed)
        made = chosen.num_partitions
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise CannotPartition(
            f"the {name} cannot make {num_partitions} partitions{_as_text(arguments)}: {reason}"
        ) from error
    if made != num_partitions:
        raise CannotPartition(f"the {name} makes {made} partitions of it, not {num_partitions}")
    return rows


def partition_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's settings say about partitions, as ``load_partition`` takes it.

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
    """Refuses what cannot be a partitioner, whatever the dataset.

    Raises:
        CannotPartition: With those that there are.
    """
    if hasattr(partitioner, "load_partition"):
        if arguments:
            name, first = type(partitioner).__name__, _kebab(next(iter(arguments)))
            raise CannotPartition(f"the {name} is made already: make it with the argument {first}")
    elif partitioner in EXCLUDED:
        reason = EXCLUDED[str(partitioner)]
        raise CannotPartition(f"the partitioner {partitioner!r} cannot be used here: {reason}")
    elif partitioner not in PARTITIONERS:
        names = ", ".join(PARTITIONERS)
        raise CannotPartition(f"{partitioner!r} is not a partitioner: choose one of {names}")


def _make(
    name: str, num_partitions: int, seed: int, arguments: Mapping[str, Any], columns: list[str]
) -> Partitioner:
    from flwr_datasets import partitioner

    words = "".join(word.capitalize() for word in name.split("-"))
    made = getattr(partitioner, f"{words}Partitioner")
    takes = inspect.signature(made).parameters
    given = {"num_partitions": num_partitions, "seed": seed}
    values: dict[str, Any] = {key: value for key, value in given.items() if key in takes}
    own = [key for key in takes if key not in given]
    for key, value in arguments.items():
        if key not in own:
            has = f"it takes {', '.join(map(_kebab, own))}" if own else "it takes none"
            raise CannotPartition(f"the partitioner {name!r} has no argument {_kebab(key)}: {has}")
        try:
            values[key] = _READERS[key](value)
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise CannotPartition(
                f"the partitioner {name!r} cannot take {_kebab(key)}={value}: {error}"
            ) from error
    missing = [k for k in own if k not in values and takes[k].default is inspect.Parameter.empty]
    if missing:
        raise CannotPartition(
            f"the partitioner {name!r} needs {' and '.join(map(_kebab, missing))}, "
            f"such as -c {_kebab(missing[0])}={_EXAMPLES[missing[0]]}"
        )
    column = values.get("partition_by")
    if column and column not in columns:
        raise CannotPartition(
            f"the partitioner {name!r} cannot go by partition-by={column}: there is no such "
            f"column, but {', '.join(map(repr, columns))}"
        )
    try:
        return made(**values)
    except (TypeError, ValueError) as error:
        raise CannotPartition(
            f"the partitioner {name!r} refuses its arguments: {str(error).rstrip('.')}"
        ) from error


def _run(partitioner: Partitioner, dataset: Dataset, seed: int) -> list[np.ndarray]:
    row = "row" + "_" * (1 + max(map(len, dataset.column_names)))  # a name that is free
    partitioner.dataset = dataset.add_column(row, np.arange(len(dataset))).shuffle(seed=seed)
    # One draws a progress bar, and some warn of what `mlx-fed partitions` shows.
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        first = partitioner.load_partition(0)
    # Some sort their dataset, so rows are read back from it. Their private index saves what a
    # public call for each of thousands of partitions would cost; without it, those are made.
    numbers = partitioner.dataset.with_format("numpy")[row][:]
    indices = getattr(partitioner, "_partition_id_to_indices", None)
    if indices:
        return [numbers[np.asarray(indices[k], np.int64)] for k in range(len(indices))]
    parts = [first, *map(partitioner.load_partition, range(1, partitioner.num_partitions))]
    return [part.with_format("numpy")[row][:] for part in parts]


def _as_text(arguments: Mapping[str, Any]) -> str:
    """The arguments that are short enough for a message."""
    short = (f"{_kebab(key)}={value}" for key, value in arguments.items())
    shown = ", ".join(text for text in short if len(text) < 60)
    return shown and f" with {shown}"


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


def _several(value: Any, kind: Callable[[str], Any], what: str) -> list[Any]:
    items = value.split(",") if isinstance(value, str) else np.atleast_1d(value).tolist()
    try:
        return [kind(item) for item in items]
    except (TypeError, ValueError):
        raise ValueError(f"it must be {what}, with commas between") from None


def _alpha(value: Any) -> float | list[float]:
    several = _several(value, float, "a number, or one for each")
    return several[0] if len(several) == 1 else several


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
    "partition_sizes": lambda value: _several(value, int, "whole numbers"),
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
