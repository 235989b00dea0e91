"""Checks of a reply by itself. A reply that fails one is refused, with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from ..arrays import master_weights, named_arrays, weighted_mean
from ..arrays.flower_records import records_in
from ..arrays.named_arrays import LazyArrays, Spec
from ..errors import FedError
from ..training.metrics import Evaluation, is_defined
from ..transforms.update_transform import UpdateTransform, decode_parameters
from . import messages

_LONGEST = 500
_LONGEST_METRIC = 200
_MOST_FIGURES = 10_000
"""Characters of a reason that quotes what a stranger sent."""


_SPARE = 2**20
"""Bytes that a reply may have beside its arrays' values."""
_VARIANCE = "running_var"
_LARGEST_WEIGHT = 1e12
"""Of a metric of an evaluation."""
_ZERO = np.zeros((), np.float32)


class Refused(FedError):
    """A reply that does not count; the reason is cut where it quotes more than anyone reads."""

    def __init__(self, reason: str):
        super().__init__(reason[:_LONGEST])


class NotFinite(Refused):
    """A reply with values or metrics that are not finite, or too large to be averaged.

    The model that was sent may be the reason, and not the node.
    """


class Reply(NamedTuple):
    """A reply that counts; its arrays are read again when they are asked for.

    ``statistics`` is empty where the model has none or they stay with the clients.
    """

    name: str
    parameters: Mapping[str, mx.array]
    statistics: Mapping[str, mx.array]
    metrics: MetricRecord
    weight: float
    norm: float | None

    def for_strategy(self) -> RecordDict:
        """The reply as strategies get it: one record of float32 masters, as they sent it."""
        masters = master_weights.to_masters(self.parameters)
        return RecordDict({self.name: masters, "metrics": self.metrics})


def check_answer(message: Message) -> None:
    """Raises :class:`Refused` if the node reports an error instead of a result."""
    if message.has_error():
        reason = message.error.reason or f"error code {message.error.code}"
        raise Refused(reason[:_LONGEST])
    if not message.has_content():
        raise Refused("the reply is empty")


def check_origin(message: Message, round: int, run_id: int) -> None:
    """Raises :class:`Refused` if a reply is one of another round or run."""
    metadata = message.metadata
    if metadata.group_id and metadata.group_id != str(round):
        raise Refused(f"it is a reply of round {metadata.group_id[:20]}, expected round {round}")
    if metadata.run_id and run_id and metadata.run_id != run_id:
        raise Refused(f"it is a reply of run {metadata.run_id}, expected run {run_id}")


def check_size(content: RecordDict, *specs: Spec) -> None:
    """Raises :class:`Refused`, before anything is read, if the arrays take far more bytes than the
    model in float32."""
    values = sum(math.prod(shape) for spec in specs for shape, _ in spec.values())
    limit = 2 * 4 * values + _SPARE
    if (size := messages.count_bytes(content)) > limit:
        raise Refused(f"its arrays take {size} bytes, and no reply of this model more than {limit}")


def check_update(
    message: Message,
    parameters: Spec,
    statistics: Spec,
    weighted_by: str,
    max_weight: float = math.inf,
    before: Mapping[str, mx.array] | None = None,
    transform: UpdateTransform | None = None,
) -> Reply:
    """Checks a reply to a training message.

    Args:
        message (Message): The reply.
        parameters (dict): The shape and dtype that each parameter must have, by name.
        statistics (dict): The same of the running statistics that are averaged; those of a
            task that leaves them with its clients are not looked at.
        weighted_by (str): The metric that weighs the reply, ``"num-examples"``.
        max_weight (float): The most that this metric may be.
        before (dict, optional): The parameters that were sent, if the norm of the update, its
            difference from them, is wanted or has to be decoded.
        transform (UpdateTransform, optional): How the update is encoded.

    Raises:
        Refused: If a name, shape or dtype differs, an array is missing, a value is not finite or
            would not be in a sum, a variance is negative, the arrays are too large, or
            the number of examples is not a positive and believable number.
    """
    check_answer(message)
    metrics = check_metrics(message, weighted_by, max_weight)
    weight = float(str(metrics[weighted_by]))
    message_spec = transform.spec if transform else parameters
    check_size(message.content, message_spec, statistics)
    try:
        name, record = messages.parameters_of(message.content)
        arrays = check_arrays(record, message_spec, messages.is_packed(record), weight)
        if transform is not None and before is not None:
            arrays = decode_parameters(transform, arrays, before)
            for array_name in arrays:
                _check_pieces(array_name, arrays.pieces(array_name), weight, False)
        running: Mapping[str, mx.array] = {}
        if statistics:
            records = records_in(message.content, ArrayRecord)
            if messages.STATISTICS not in records:
                raise Refused("it has no running statistics, which this task averages")
            record = records[messages.STATISTICS]
            running = check_arrays(record, statistics, True, weight, are_statistics=True)
    except Refused:
        raise
    except FedError as error:
        raise Refused(str(error)[:_LONGEST]) from error
    except Exception as error:  # whatever else a stranger's bytes can bring about
        raise Refused(f"unreadable reply: {type(error).__name__}: {error}"[:_LONGEST]) from error
    norm = None if before is None else distance(arrays, before)
    return Reply(name, arrays, running, metrics, weight, norm)


def norm_of(arrays: Mapping[str, mx.array]) -> float:
    """The Euclidean norm of all values."""
    return distance(arrays, {})


def distance(arrays: Mapping[str, mx.array], reference: Mapping[str, mx.array]) -> float:
    """The Euclidean norm of a difference, a piece at a time; a name that only ``arrays`` has is
    compared with 0."""
    squares = 0.0
    for name in arrays:
        pieces = named_arrays.pieces(arrays, name)
        reference_pieces = (
            named_arrays.pieces(reference, name) if name in reference else repeat(_ZERO)
        )
        with np.errstate(all="ignore"):
            for piece, reference_piece in zip(pieces, reference_pieces, strict=False):
                difference = np.subtract(piece, reference_piece, dtype=np.float32)
                squares += float(np.dot(difference, difference))
    return math.sqrt(squares)


def check_arrays(
    record: ArrayRecord, specs: Spec, is_packed: bool, weight: float, are_statistics: bool = False
) -> LazyArrays:
    """Checks the arrays in a record, a part at a time, and gives them in the expected order.

    Those that are not packed come from mods, which have worked on float32 masters: they are
    checked as they would be in the model's dtypes, and stay as they are.
    """
    record_names: dict[str, str] = {}
    array_specs: Spec = {}
    for record_name, shard in messages.shards(record):
        for name, array in shard.items():
            master_weights.check_array(name, array.shape, array.dtype, specs)
            record_names[name] = record_name
            array_specs[name] = array.shape, specs[name][1] if is_packed else array.dtype
            is_variance = are_statistics and name.endswith(_VARIANCE)
            _check_pieces(name, array.pieces(array_specs[name][1]), weight, is_variance)
    named_arrays.check(specs, {name: specs[name] for name in record_names})
    return messages.lazy_arrays(record, {name: array_specs[name] for name in specs}, record_names)


def check_values(
    parameters: Mapping[str, mx.array], statistics: Mapping[str, mx.array], weight: float
) -> None:
    """Checks that all values are finite, and would be in a sum in which they have a weight, and
    that variances are not negative.

    Raises:
        Refused: Naming the first array of which that is not so.
    """
    mx.eval(dict(parameters), dict(statistics))
    for arrays, are_statistics in ((parameters, False), (statistics, True)):
        for name in arrays:
            is_variance = are_statistics and name.endswith(_VARIANCE)
            _check_pieces(name, named_arrays.pieces(arrays, name), weight, is_variance)


def _check_pieces(
    name: str, pieces: Iterable[np.ndarray], weight: float, is_variance: bool
) -> None:
    for values in pieces:
        # NumPy takes a tenth of the time that MLX takes on a CPU; float32 holds every value.
        if not named_arrays.is_finite(values, weight * weighted_mean.LARGEST_BLOCK):
            what = (
                "not finite" if not named_arrays.is_finite(values) else "too large to be averaged"
            )
            raise NotFinite(f"parameter {name!r} has values that are {what}")
        if is_variance and (values < 0).any():
            raise Refused(f"parameter {name!r} has negative values, which no variance has")


def check_metrics(message: Message, weighted_by: str, max_weight: float = math.inf) -> MetricRecord:
    """Checks the metrics of a reply.

    Args:
        message (Message): The reply, to a message of training or of evaluation.
        weighted_by (str): The metric that weighs the reply, ``"num-examples"``.
        max_weight (float): The most that this metric may be.

    Raises:
        Refused: If there is not one record of metrics, a value is not finite, or the weight is
            not a positive and believable number.
    """
    metrics = _metrics_of(message)
    check_figures(metrics, weighted_by, max_weight)
    return metrics


def check_evaluation(
    message: Message,
    weighted_by: str,
    max_weight: float,
    must_be_defined: bool,
    classes: Mapping[str, int],
) -> Evaluation:
    """Checks a reply to a message of evaluation.

    Args:
        message (Message): The reply.
        weighted_by (str): The metric that weighs those without a weight of their own.
        max_weight (float): The most that it, and the number of examples, may be.
        must_be_defined (bool): Refuse a reply that has a metric which is not finite.
        classes (dict): The number of classes of each confusion matrix, by metric.

    Returns:
        Evaluation: Its reasons are those that the client gives.

    Raises:
        Refused: If there is not one record of metrics, the number of examples is not a positive
            and believable number, a weight is none, a metric has to be defined and is not, or a
            confusion matrix has other counts than numbers from 0.
    """
    metrics = _metrics_of(message)
    record = messages.config_record(message.content, messages.WEIGHTS)
    # They may count tokens or pixels, of which an example has many.
    limit = max(max_weight, _LARGEST_WEIGHT)
    weights: dict[str, Any] = {name: record[name] for name in metrics if name in record}
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not 0 <= weight <= limit:
            weight_text = f"{weight!r}"[:_LONGEST]
            raise Refused(
                f"the weight of metric {name!r} must be from 0 to {limit:g}, not {weight_text}"
            )
    if weights and weighted_by != "num-examples":
        _check_weight(metrics, "num-examples", max_weight)
    # With weights of their own all but counts do without num-tokens, which may be 0.
    _check_weight(metrics, weighted_by, max_weight, bool(weights) and weighted_by != "num-examples")
    _check_extent(metrics)
    reasons = messages.config_record(message.content, messages.UNDEFINED)
    undefined_metrics = {
        name: str(reasons.get(name, f"it is {value}"))[:_LONGEST]
        for name, value in metrics.items()
        if not is_defined(value) or weights.get(name) == 0
    }
    for name, why in undefined_metrics.items() if must_be_defined else ():
        raise Refused(f"metric {name!r} is not finite: {why}"[:_LONGEST])
    counts = messages.config_record(message.content, messages.COUNTS)
    matrices: dict[str, list[int]] = {}
    for name, num_classes in classes.items():
        if name in counts:
            matrices[name] = _check_counts(name, counts[name], num_classes, limit)
            weights[name] = sum(matrices[name])
        else:
            undefined_metrics[name] = str(reasons.get(name, "it was not sent"))[:_LONGEST]
    return Evaluation(dict(metrics), weights, undefined_metrics, matrices)


def _check_counts(name: str, counts: Any, num_classes: int, limit: float) -> list[int]:
    """The counts of a confusion matrix."""
    is_matrix = isinstance(counts, list) and len(counts) == num_classes**2
    if not is_matrix or not isinstance(counts[0], int) or min(counts) < 0 or sum(counts) > limit:
        raise Refused(
            f"metric {name!r} must have {num_classes**2} counts from 0, of {num_classes} classes, "
            f"with a sum of at most {limit:g}"
        )
    return counts


def _metrics_of(message: Message) -> MetricRecord:
    check_answer(message)
    records = list(records_in(message.content, MetricRecord).values())
    if len(records) != 1:
        raise Refused(f"expected one record of metrics, got {len(records)}")
    return records[0]


def _check_extent(metrics: Mapping[str, Any]) -> None:
    """Refuses metrics of long names or of many values, which a history would keep."""
    figures = sum(len(value) if isinstance(value, list) else 1 for value in metrics.values())
    if figures > _MOST_FIGURES or any(len(name) > _LONGEST_METRIC for name in metrics):
        raise Refused(
            f"metrics have names of at most {_LONGEST_METRIC} characters, and {_MOST_FIGURES} "
            "values in all"
        )


def _check_weight(
    metrics: Mapping[str, Any], name: str, max_weight: float, may_be_zero: bool = False
) -> None:
    weight: Any = metrics.get(name)
    is_number = isinstance(weight, (int, float)) and math.isfinite(weight)
    if not is_number or weight < 0 or (weight == 0 and not may_be_zero):
        raise Refused(f"{name} must be a positive number, not {weight!r}"[:_LONGEST])
    if weight > max_weight:
        raise Refused(f"{name} is {weight:g}, and more than {max_weight:g} is not believed")


def check_figures(
    metrics: Mapping[str, Any], weighted_by: str, max_weight: float = math.inf
) -> None:
    """Checks that metrics are finite and the weight among them is positive.

    Raises:
        Refused: Naming the first that is not.
    """
    _check_weight(metrics, weighted_by, max_weight)
    _check_extent(metrics)
    for key, value in metrics.items():
        if not is_defined(value):
            raise NotFinite(f"metric {key!r} is not finite")
