"""A round's evaluation phase: the metrics of the global model, on its nodes and on the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from flwr.app import Message

from ..arrays import master_weights
from ..errors import SettingsError
from ..events import Notice
from ..runs.round_record import RoundRecord
from ..tracebacks import definition
from ..training.confusion_matrix import ConfusionMatrix, to_rows
from ..training.metrics import Evaluation, derive_metrics, is_defined
from . import checks, messages, reply_names, strategies
from .phase import Model, Phase, Run
from .settings import takes_record


def evaluate(run: Run, model: Model, record: RoundRecord) -> None:
    """Federated evaluation on the nodes that the strategy's ``configure_evaluate`` selects.

    Each metric is the mean over the nodes for which it is defined, by its own weight, unless the
    strategy has an aggregation of its own: that one gets the replies in which all are defined.

    Args:
        run (Run): What the run is led with.
        model (Model): The global model.
        record (RoundRecord): Gets the metrics, refusals, bytes and seconds.

    Raises:
        RunError: If the strategy fails.
    """
    phase = Phase(run, "evaluate", record)
    must_be_defined = not strategies.leaves_evaluation_to_mean(run.strategy)
    classes = {
        name: metric.num_classes
        for name, metric in run.trainer.task.metrics.items()
        if isinstance(metric, ConfusionMatrix)
    }
    replies: dict[str, Message] = {}
    evaluations: dict[str, Evaluation] = {}
    for node, reply in phase.exchange(phase.configure(model)):
        if messages.has_nothing_to_evaluate(reply):
            continue
        with phase.refusing(node):
            evaluations[node] = checks.check_evaluation(
                reply, run.weighted_by, phase.max_examples, must_be_defined, classes
            )
            replies[node] = reply
    names = {node: reply_names.names_in(reply.content) for node, reply in replies.items()}
    for node in phase.refuse_odd_names(names):
        del replies[node], evaluations[node]
    weighed_metrics = dict.fromkeys(
        name for evaluation in evaluations.values() for name in evaluation.weights
    )
    for metric in (run.weighted_by, *weighed_metrics):
        shares = {
            node: evaluation.weights.get(metric, float(str(evaluation.metrics[run.weighted_by])))
            for node, evaluation in evaluations.items()
        }
        what = f"the weight of {metric}" if metric in weighed_metrics else metric
        for node in phase.refuse_heavy(shares, what):
            del replies[node], evaluations[node]
    metrics: dict[str, Any] = {}
    undefined_metrics: dict[str, dict[str, str]] = {}
    for node, evaluation in evaluations.items():
        for name, why in evaluation.undefined.items():
            undefined_metrics.setdefault(name, {})[node] = why
    if replies:
        with phase.hook("aggregate_evaluate"), strategies.pooling(run.strategy):
            result = run.strategy.aggregate_evaluate(phase.number, list(replies.values()))
        metrics = {**(result or {})}
    if metrics:
        further, reasons = derive_metrics(run.trainer.task, metrics)
        metrics |= further
        for name, why in reasons.items():
            undefined_metrics.setdefault(name, {"their mean": why})
    for name in classes:
        matrices = [e.counts[name] for e in evaluations.values() if name in e.counts]
        if matrices:
            metrics[name] = to_rows([sum(cells) for cells in zip(*matrices, strict=True)])
    record.evaluate = {**metrics, "nodes": list(replies)}
    _record_undefined(phase, undefined_metrics, len(replies))
    phase.record_each(
        {
            node: {name: value for name, value in evaluation.metrics.items() if is_defined(value)}
            for node, evaluation in evaluations.items()
        }
    )


def evaluate_centrally(run: Run, model: Model, record: RoundRecord) -> None:
    """The server's own evaluation: on its test examples, and by the user's ``evaluate_fn``."""
    test, evaluate_fn = run.settings.test, run.settings.evaluate_fn
    if test is None and evaluate_fn is None:
        return
    phase = Phase(run, "central", record)
    phase.begin([])
    with phase.timed("central"):
        parameters = model.parameters(run.trainer.spec)
        metrics: dict[str, Any] = {}
        if test is not None:
            config = {**run.config, "server-round": phase.number}
            arrays = parameters, model.statistics
            evaluation = run.trainer.evaluate(*arrays, test, config=config)
            reasons = {name: {"server": why} for name, why in evaluation.undefined.items()}
            _record_undefined(phase, reasons)
            metrics |= evaluation.metrics
            metrics |= {name: to_rows(counts) for name, counts in evaluation.counts.items()}
            del metrics["num-examples"]
        if evaluate_fn is not None:
            if takes_record(evaluate_fn):
                masters = master_weights.to_masters({**parameters, **model.statistics})
                result: Any = evaluate_fn(record.round, masters) or {}
            else:
                result = evaluate_fn(record.round, parameters, model.statistics) or {}
            if not isinstance(result, Mapping):
                raise SettingsError(
                    f"evaluate_fn{definition(evaluate_fn)} returned a {type(result).__name__}: it "
                    'returns metrics by name, such as {"accuracy": 0.9}, or None.'
                )
            metrics |= {k: v.item() if isinstance(v, mx.array) else v for k, v in result.items()}
    record.central = metrics


def _record_undefined(
    phase: Phase, reasons: Mapping[str, Mapping[str, str]], num_nodes: int | None = None
) -> None:
    """Counts where each metric is undefined, and says why when it first is in a run.

    Args:
        phase (Phase): The phase.
        reasons (dict): By metric and node, why it is undefined there.
        num_nodes (int, optional): The nodes that evaluated. Default: the server did.
    """
    if not reasons:
        return
    history = phase.run.history
    counts = {name: len(by_node) for name, by_node in reasons.items()}
    before = [
        earlier_record.get("undefined", {}).get(phase.name, {}) for earlier_record in history.rounds
    ]
    for name, by_node in reasons.items():
        if any(name in earlier for earlier in before):
            continue
        node, why = next(iter(by_node.items()))
        what = "the loss" if name == "loss" else f"metric {name!r}"
        where = "the server's examples"
        if num_nodes is not None:
            where = f"{counts[name]} of {num_nodes} nodes, which do not count in it: {node}"
        text = f"round {phase.number}: {what} is undefined on {where}: {why}"
        history.notify(Notice(text))
    phase.record.undefined[phase.name] = counts
