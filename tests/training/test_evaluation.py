"""Evaluation: a metric on a client and over clients, against NumPy on the same examples."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.arrays.examples import ExamplesError
from mlx_fed.rounds.checkpoint import Best
from mlx_fed.training.evaluation_step import mean_and_weight
from mlx_fed.rounds.phase import Model
from mlx_fed.runs.round_record import RoundRecord
from mlx_fed.rounds.resume import RunState
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import LoopbackGrid
from ..helpers.federated import federate

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


# -- the task: examples are (x, y, weight, value), and only x and y have to do with the model ------


def loss(model, x, y, w, v):
    """The mean over words, of which an example has any number, none too."""
    errors = (model(x).squeeze(-1) - y) ** 2
    return (errors * w).sum() / w.sum(), w.sum()


def error(model, x, y, w, v):
    """A value for each example: with such functions alone, batches are padded."""
    return (model(x).squeeze(-1) - y) ** 2


def recall(model, x, y, w, v):
    """0 / 0 on a batch without positives."""
    positives = y > 0
    hits = (model(x).squeeze(-1) > 0) & positives
    return hits.sum() / positives.sum(), positives.sum()


def hits(model, x, y, w, v):
    return (model(x).squeeze(-1) > 0) == (y > 0)


METRICS = {
    "recall": recall,
    "accuracy": hits,
    "error": lambda model, x, y, w, v: mx.mean(mx.abs(model(x).squeeze(-1) - y)),
    "value": lambda model, x, y, w, v: v,
    "token": lambda model, x, y, w, v: mx.stack([y, w, y * 0], axis=1),
    "number": lambda model, x, y, w, v: np.float64(len(x)),
    "numpy": lambda model, x, y, w, v: float(np.asarray(y).max()),
    "spread": fed.DatasetMetric(
        lambda model, x, y, w, v: {"scores": model(x), "labels": y},
        lambda labels, scores: np.std(np.asarray(scores)) + np.asarray(labels).max(),
    ),
    "sorted": fed.DatasetMetric(
        lambda model, x, y, w, v: v, lambda v: np.sort(np.asarray(v))[len(v) // 2]
    ),
    "rows": fed.DatasetMetric(
        lambda model, x, y, w, v: (y, w.astype(mx.bfloat16)), lambda y, w: np.asarray(w).size
    ),
}


PADDED: dict[str, Any] = {
    "loss": error,
    "weight_unit": None,
    "metrics": {name: METRICS[name] for name in ("accuracy", "value", "spread", "sorted", "rows")},
}


class Client(NamedTuple):
    """A client's test examples."""

    weights: list[int]
    values: list[float]

    def arrays(self, number: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(number)
        size = len(self.weights)
        x, y = rng.normal(size=(size, 3)), rng.choice([-1.0, 1.0], size)
        arrays = (x, y, np.array(self.weights), np.array(self.values))
        return tuple(array.astype(np.float32) for array in arrays)


def make_task(clients: list[Client], **options: Any) -> fed.Task:
    def load(partition: int, num_partitions: int | None) -> fed.Data:
        train = Client([1] * 4, [0.0] * 4).arrays(100 + partition)
        return fed.Data(train, clients[partition].arrays(partition))

    options = {"loss": loss, "metrics": METRICS, "weight_unit": "words", **options}
    return fed.Task(
        model=lambda: nn.Linear(3, 1), optimizer=lambda config: optim.SGD(0.1), data=load, **options
    )


EVERYBODY = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


def simulate(task: fed.Task, num_clients: int, folder: Path, strategy: Any = None, **options: Any):
    options = {"num_rounds": 1, "workers": 0, "listeners": (), "seed": 7, **options}
    strategy = strategy or FedAvg(**EVERYBODY)
    return fed.simulate(task, strategy, num_clients, runs=folder, **options)


# -- against NumPy -----------------------------------------------------------------------------


def expected_metrics(
    clients: list[Client], parameters: dict[str, mx.array], batch_size: int
) -> tuple[dict[str, float], dict[str, int]]:
    """The metrics over clients, and on how many clients each is undefined."""
    weight, bias = (np.array(parameters[name], np.float64) for name in ("weight", "bias"))
    pools: dict[str, list[tuple[float, float]]] = {}
    for number, client in enumerate(clients):
        x, y, w, v = (array.astype(np.float64) for array in client.arrays(number))
        outputs = x @ weight[0] + bias[0]
        size = len(y)
        batches = [slice(at, at + batch_size) for at in range(0, size, batch_size)]
        lengths = np.array([len(y[rows]) for rows in batches])
        with np.errstate(invalid="ignore"):
            pairs = {
                "loss": (((outputs - y) ** 2 * w).sum() / w.sum(), w.sum()),
                "square": (((outputs - y) ** 2).mean(), size),
                "recall": (((outputs > 0) & (y > 0)).sum() / (y > 0).sum(), (y > 0).sum()),
                "accuracy": (((outputs > 0) == (y > 0)).mean(), size),
                "error": (np.abs(outputs - y).mean(), size),
                "value": (v.mean(), size),
                "token": ((y + w).mean() / 3, size),
                "number": (np.average(lengths, weights=lengths), size),
                "numpy": (np.average([y[r].max() for r in batches], weights=lengths), size),
                "spread": (outputs.std() + y.max(), size),
                "sorted": (np.sort(v)[size // 2], size),
                "rows": (size, size),
            }
        for name, pair in pairs.items():
            pools.setdefault(name, []).append(pair)
    metrics, undefined = {}, {}
    for name, pool in pools.items():
        values, shares = map(np.array, zip(*pool, strict=True))
        counts = np.isfinite(values) & (shares > 0)
        metrics[name] = np.average(values[counts], weights=shares[counts]) if any(counts) else None
        if not all(counts):
            undefined[name] = int((~counts).sum())
    return metrics, undefined


WEIGHTS = st.sampled_from([0, 0, 1, 2, 5])
VALUES = st.sampled_from([0.0, 1.0, -2.5, 7.0])
ODD_VALUES = st.sampled_from([0.0, 1.0, 1.0, math.nan, math.inf])


@st.composite
def some_client(draw: st.DrawFn) -> Client:
    size = draw(st.integers(1, 13))
    values = draw(st.sampled_from([VALUES, VALUES, ODD_VALUES]))
    some = lambda of: draw(st.lists(of, min_size=size, max_size=size))  # noqa: E731
    return Client(some(draw(st.sampled_from([WEIGHTS, st.just(0)]))), some(values))


@pytest.mark.usefixtures("uncompiled")
@settings(max_examples=25, deadline=None)
@given(clients=st.lists(some_client(), min_size=1, max_size=4), batch_size=st.integers(1, 40))
@pytest.mark.parametrize("padded", [False, True])
def test_metrics_are_those_of_numpy(
    tmp_path_factory, padded: bool, clients: list[Client], batch_size: int
):
    task = make_task(clients, eval_batch_size=batch_size, **(PADDED if padded else {}))
    result = simulate(task, len(clients), tmp_path_factory.mktemp("run"))
    expected, undefined = expected_metrics(clients, result.parameters, batch_size)
    check_metrics(result.rounds[0], expected, undefined, task)


def check_metrics(
    record: dict, expected: dict[str, Any], undefined: dict[str, int], task: fed.Task
) -> None:
    if task.loss is error:
        expected = {"loss": expected["square"], **{name: expected[name] for name in task.metrics}}
        undefined = {name: count for name, count in undefined.items() if name in task.metrics}
    else:
        del expected["square"]
    metrics = dict(record["evaluate"])
    assert record["refused"] == []
    assert len(metrics.pop("nodes")) == len(record["train"]["nodes"])
    metrics.pop("num-words", None)
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        known = math.nan if value is None else value
        assert metrics[name] == pytest.approx(known, rel=1e-4, abs=1e-5, nan_ok=True), name
    assert record.get("undefined", {}).get("evaluate", {}) == undefined


CLIENTS = [
    Client([1, 0, 0, 0, 0, 2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    Client([0, 0, 0], [1.0, math.nan, 3.0]),
    Client([4], [2.0]),
]


@pytest.mark.parametrize("batch_size", [1, 4, 512])
def test_compiled_metrics_are_those_of_numpy(batch_size: int, tmp_path: Path):
    for number, options in enumerate(({}, PADDED)):
        task = make_task(CLIENTS, eval_batch_size=batch_size, **options)
        result = simulate(task, 3, tmp_path / str(number), num_rounds=2)
        expected = expected_metrics(CLIENTS, result.parameters, batch_size)
        check_metrics(result.rounds[-1], *expected, task)


@pytest.mark.usefixtures("uncompiled")
def test_a_federation_and_the_server_measure_the_same(tmp_path: Path):
    task = make_task(CLIENTS, eval_batch_size=4)
    app = fed.client_app(task)
    test = CLIENTS[0].arrays(0)
    strategy = FedAvg(**EVERYBODY)
    record = federate(
        strategy, tmp_path / "f", [app] * 3, task=task, num_rounds=1, seed=7, test=test
    ).rounds[0]
    simulation = simulate(task, 3, tmp_path / "s", test=test).rounds[0]
    for key in ("evaluate", "central", "undefined"):
        assert str(record[key]) == str(simulation[key])
    assert record["each"]["evaluate"] == simulation["each"]["evaluate"]
    alone = record["each"]["evaluate"]["node-0"]
    assert {**record["central"], "num-examples": 7} == alone
    assert "recall" in alone
    assert "value" not in record["each"]["evaluate"]["node-1"]


# -- metrics over all examples -----------------------------------------------------------------


def plain_task(metrics: dict[str, Any], **options: Any) -> fed.Task:
    """Three classes, a loss of each example, and as many examples on each client."""

    def load(partition: int, num_partitions: int | None) -> fed.Data:
        rng = np.random.default_rng(partition)
        y = rng.integers(0, 3 if partition else 1, 21).astype(np.int32)
        x = (rng.normal(size=(21, 4)) + np.eye(3, 4)[y]).astype(np.float32)
        return fed.Data((x, y), (x, y))

    return fed.Task(
        **{
            "model": lambda: nn.Linear(4, 3),
            "loss": lambda model, x, y: nn.losses.cross_entropy(model(x), y),
            "metrics": metrics,
            "optimizer": lambda config: optim.SGD(config.get("learning-rate", 0.1)),
            "data": load,
            "eval_batch_size": 8,
            **options,
        }
    )


def evaluate(task: fed.Task, partition: int = 1) -> dict[str, Any]:
    trainer = Trainer(task)
    return trainer.evaluate(trainer.parameters(), {}, task.data(partition, None).test).metrics


def test_the_example_of_the_docs(tmp_path: Path):
    """The area under the curve and the F1 score, by their definitions."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "auc" in c)
    scope: dict[str, Any] = {}
    exec(code, scope)
    task = plain_task(scope["metrics"])
    result = simulate(task, 4, tmp_path)
    record = result.rounds[0]
    model = task.model()
    model.load_weights([(name, array) for name, array in result.parameters.items()])
    areas, scores = [], []
    for partition in range(4):
        x, y = task.data(partition, None).test
        probabilities = np.array(mx.softmax(model(mx.array(x)), axis=1))
        ones, others = probabilities[y == 1, 1], probabilities[y != 1, 1]
        pairs = [(a > b) + (a == b) / 2 for a in ones for b in others]
        areas += [np.mean(pairs)] if pairs else []
        guesses = probabilities.argmax(axis=1)
        f1 = []
        for c in {*guesses, *y}:
            found = ((guesses == c) & (y == c)).sum()
            wrong, missed = ((guesses == c) & (y != c)).sum(), ((guesses != c) & (y == c)).sum()
            f1.append(found / (found + (wrong + missed) / 2))
        scores.append(np.mean(f1))
    assert record["undefined"] == {"evaluate": {"auc": 1}}  # node-0 has one class alone
    assert record["evaluate"]["auc"] == pytest.approx(np.mean(areas), rel=1e-6)
    assert record["evaluate"]["f1"] == pytest.approx(np.mean(scores), rel=1e-6)


def test_padding_is_not_in_what_a_metric_computes():
    arrays = []
    whole = fed.DatasetMetric(lambda model, x, y: (x, y), lambda *both: arrays.append(both))
    task = plain_task({"all": whole}, eval_batch_size=64)  # of a batch of 21, 24 rows
    evaluate(task)
    ((x, y),) = arrays
    test = task.data(1, None).test
    np.testing.assert_array_equal(np.asarray(x), test[0])
    np.testing.assert_array_equal(np.asarray(y), test[1])


def test_a_stream_of_batches_of_other_sizes():
    task = plain_task(
        {"size": fed.DatasetMetric(lambda model, x, y: y, len), "hits": lambda m, x, y: y}
    )
    x, y = task.data(1, None).test
    trainer = Trainer(task)
    stream = lambda key: ((x[at : at + 9], y[at : at + 9]) for at in range(0, 21, 9))  # noqa: E731
    metrics = trainer.evaluate(trainer.parameters(), {}, stream).metrics
    assert metrics["size"] == 21
    assert metrics["hits"] == pytest.approx(y.mean())


# -- what is no metric -------------------------------------------------------------------------


def raising(model, x, y):
    raise KeyError("no such class")


def raising_later(model, x, y):
    if len(x) != 8:
        raise ValueError("not enough")
    return y


UNFIT = {
    "raises": (raising, r"KeyError: 'no such class' \(test_evaluation.py, line \d+\)"),
    "raises on the last batch": (raising_later, "ValueError: not enough"),
    "classes": (lambda m, x, y: mx.zeros(3), r"shape \(3,\) for a batch of 8 examples"),
    "tokens": (lambda m, x, y: m(x).reshape(-1), r"shape \(24,\) for a batch of 8"),
    "text": (lambda m, x, y: "good", "'metric' returned a str"),
    "nothing": (lambda m, x, y: None, "'metric' returned a NoneType"),
    "list": (lambda m, x, y: [m(x).mean(), 1], "'metric' returned a list"),
    "three": (lambda m, x, y: (1.0, 2.0, 3.0), "returned a tuple of 3"),
    "vectors": (lambda m, x, y: (y, y), r"shapes \(8,\) and \(8,\)"),
    "complex": (lambda m, x, y: y * mx.array(1j), "complex"),
    "predicts a mean": (fed.DatasetMetric(lambda m, x, y: x.mean(), float), r"shape \(\)"),
    "predicts classes": (fed.DatasetMetric(lambda m, x, y: m(x).T, float), r"shape \(3, 8\)"),
    "predicts otherwise": (
        fed.DatasetMetric(lambda m, x, y: (y,) * len(x), lambda *arrays: 1.0),
        "predicts 5 on one batch and 8 on another",
    ),
    "computes a text": (fed.DatasetMetric(lambda m, x, y: y, lambda y: "good"), "ValueError"),
    "computes nothing": (fed.DatasetMetric(lambda m, x, y: y, lambda y: None), "returned nan"),
    "infinite": (lambda m, x, y: (y + 1) / 0, "it is inf"),
    "weighs nothing": (lambda m, x, y: (y.sum() / 0, 0), "its weight is 0 on all"),
    "weighs NaN": (lambda m, x, y: (1.0, mx.array(mx.nan)), "its weight is not finite"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_metric_is_named_and_the_others_count(case: str):
    metric, reason = UNFIT[case]
    if case == "predicts otherwise":  # five rows: the batches of a stream are not padded
        x, y = plain_task({}).data(1, None).test
        rows = (slice(0, 8), slice(8, 13))
        data = lambda *_: fed.Data((x, y), lambda key: [(x[r], y[r]) for r in rows])  # noqa: E731
    else:
        data = plain_task({}).data
    accuracy = {"accuracy": lambda m, x, y: mx.argmax(m(x), axis=1) == y}
    task = plain_task({"metric": metric, **accuracy}, data=data)
    trainer = Trainer(task)
    evaluation = trainer.evaluate(trainer.parameters(), {}, data(1, None).test)
    assert re.search(reason, evaluation.undefined["metric"])
    assert list(evaluation.undefined) == ["metric"]
    assert not math.isfinite(evaluation.metrics["metric"])
    expected = evaluate(plain_task(accuracy, data=data))
    for name in ("loss", "accuracy"):
        assert evaluation.metrics[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_metric_that_fails_is_told_once(tmp_path: Path):
    told: list[str] = []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            told.append(event.text)

    task = plain_task({"metric": raising})
    result = simulate(task, 3, tmp_path, num_rounds=3, listeners=(listener,))
    (text,) = (text for text in told if "metric" in text)
    assert "metric 'metric' is undefined on 3 of 3 nodes" in text
    assert "node-0: KeyError: 'no such class' (test_evaluation.py, line" in text
    for record in result.rounds:
        assert record["undefined"] == {"evaluate": {"metric": 3}}
        assert math.isnan(record["evaluate"]["metric"])
        assert record["evaluate"]["loss"] > 0
    assert '"metric": null' in (result.folder / "history.jsonl").read_text()


@pytest.mark.parametrize("name", ["nodes", "loss"])
def test_a_metric_with_the_name_of_another_figure_is_refused(name: str):
    with pytest.raises(ValueError, match=f"Task.metrics has '{name}'"):
        plain_task({name: raising})


@pytest.mark.parametrize("name", ["loss", "accuracy", "num-examples"])
def test_a_derived_metric_with_the_name_of_another_is_refused(name: str):
    options = {"derived": lambda metrics: {name: 0.0}}
    with pytest.raises(fed.FedError, match=f"Task.derived .* returns '{name}'"):
        evaluate(plain_task({"accuracy": lambda model, x, y: y}, **options))


@pytest.mark.parametrize(
    ("field", "value"), [("compile", "no"), ("keep_optimizer", "no"), ("weight_unit", True)]
)
def test_a_value_of_another_type_is_refused(field: str, value: Any):
    with pytest.raises(fed.FedError, match=f"Task.{field} .*{value!r}"):
        plain_task({}, **{field: value})


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"Task.metrics\['accuracy'\] is a str"):
        plain_task({"accuracy": "accuracy"})


def test_numbers_of_python_and_numpy_are_means():
    metrics = {
        "float": lambda m, x, y: 0.5,
        "whole": lambda m, x, y: len(x),
        "numpy": lambda m, x, y: np.float32(2.0),
        "truth": lambda m, x, y: True,
        "item": lambda m, x, y: y.astype(mx.float32).mean().item(),
        "vector": lambda m, x, y: np.asarray(y),
        "matrix": lambda m, x, y: mx.stack([y, y + 1], axis=1),
        "weighed": lambda m, x, y: (np.asarray(y).mean(), len(x)),
        "one": lambda m, x, y: mx.ones(1),
    }
    y = plain_task({}).data(1, None).test[1].mean()
    got = evaluate(plain_task(metrics))
    expected = {"float": 0.5, "whole": (8 * 8 + 8 * 8 + 5 * 5) / 21, "numpy": 2.0, "truth": 1.0}
    expected |= {"item": y, "vector": y, "matrix": y + 0.5, "weighed": y, "one": 1.0}
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_mean_and_its_weight_without_padding():
    mean, weight = mean_and_weight(mx.array([1, 2, 9]), 3, mx.array([1.0, 1.0, 0.0]), "m")
    assert (mean.item(), weight.item()) == (1.5, 2.0)


# -- random numbers ----------------------------------------------------------------------------


def sampled(model, x, y):
    """Draws without a key, as a variational autoencoder's loss does."""
    noise = mx.random.normal(y.shape)
    return nn.losses.cross_entropy(model(x), y) + 0.01 * noise


DRAWN = {
    "draws": lambda m, x, y: mx.random.uniform(shape=y.shape),
    "first": fed.DatasetMetric(
        lambda m, x, y: mx.random.uniform(shape=y.shape), lambda draws: draws[0].item()
    ),
    "distinct": fed.DatasetMetric(
        lambda m, x, y: mx.random.uniform(shape=y.shape), lambda draws: len({*draws.tolist()})
    ),
}


def drawing(config: Any = None) -> fed.Task:
    return plain_task(DRAWN, loss=sampled, config={"learning-rate": 0.0})


def test_batches_draw_differently_and_rounds_alike(tmp_path: Path):
    task = drawing()
    first, second = simulate(task, 2, tmp_path, num_rounds=2).rounds
    assert first["evaluate"]["distinct"] == 21
    assert first["evaluate"] == second["evaluate"]
    mx.random.seed(99)
    assert evaluate(task) == evaluate(task)
    fewer = plain_task({}, loss=sampled)
    assert evaluate(fewer)["loss"] == evaluate(task)["loss"]


@pytest.mark.slow
def test_processes_draw_alike(tmp_path: Path):
    one, other = (
        simulate(drawing, 3, tmp_path / str(workers), workers=workers) for workers in (0, 2)
    )
    for key in ("evaluate", "each"):
        assert one.rounds[0][key] == other.rounds[0][key]


# -- what follows from metrics -----------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_perplexity_is_that_of_the_mean_loss_over_all_tokens(tmp_path: Path):
    clients = [Client([1, 2], [0.0] * 2), Client([50, 60, 70], [0.0] * 3), Client([0], [0.0])]
    perplexity = lambda metrics: {"perplexity": math.exp(metrics["loss"])}  # noqa: E731
    result = simulate(make_task(clients, derived=perplexity), 3, tmp_path)
    record = result.rounds[0]
    expected, undefined = expected_metrics(clients, result.parameters, 512)
    assert record["evaluate"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert record["evaluate"]["perplexity"] == math.exp(record["evaluate"]["loss"])
    assert record["undefined"]["evaluate"] == {**undefined, "perplexity": 1}
    for node, metrics in record["each"]["evaluate"].items():
        if node != "node-2":
            assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


@pytest.mark.usefixtures("uncompiled")
def test_a_derived_metric_that_raises_costs_only_itself(tmp_path: Path):
    def f1(metrics):
        p, r = metrics["hits"], metrics["hits"]
        return {"f1": 2 * p * r / (p + r)}  # 0 / 0

    metrics = {"hits": lambda m, x, y: (y == 0).all() & (y == 1)}  # 0 on each client
    record = simulate(plain_task(metrics, derived=f1), 3, tmp_path).rounds[0]
    assert record["refused"] == []
    assert record["evaluate"]["loss"] > 0
    assert math.isnan(record["evaluate"]["f1"])
    assert record["undefined"] == {"evaluate": {"f1": 3}}


@pytest.mark.usefixtures("uncompiled")
def test_derived_metrics_with_a_mistake_are_told(tmp_path: Path):
    told: list[str] = []
    task = plain_task({}, derived=lambda metrics: {"error": 1 - metrics["accuracy"]})
    listener = lambda event: told.append(getattr(event, "text", ""))  # noqa: E731
    record = simulate(task, 2, tmp_path, listeners=(listener,)).rounds[0]
    assert record["evaluate"]["loss"] > 0
    assert any("'derived'" in text and "KeyError: 'accuracy'" in text for text in told)


# -- strategies --------------------------------------------------------------------------------


def weighed_task(undefined_on: int | None = None) -> fed.Task:
    """A metric whose value is the partition's number, and its weight in each batch one more."""

    def load(partition: int, num_partitions: int | None) -> fed.Data:
        data = plain_task({}).data(partition, num_partitions)
        numbers = np.full(21, partition, np.float32)
        test = (*data.test, numbers * (math.nan if partition == undefined_on else 1.0))
        return fed.Data(data.train, test)

    return plain_task(
        {"number": lambda m, x, y, n: (n.mean(), mx.nan_to_num(n.mean()) + 1)},
        loss=lambda m, x, y, n=None: nn.losses.cross_entropy(m(x), y),
        data=load,
    )


class Watching(FedAvg):
    """An aggregation of its own, which adds to that of Flower's."""

    def aggregate_evaluate(self, server_round, replies):
        replies = list(replies)
        metrics = super().aggregate_evaluate(server_round, replies)
        metrics["replies"] = float(len(replies))
        return metrics


def largest(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    assert all(
        content["weights"]["number"] == 3 * (content["metrics"]["number"] + 1)
        for content in contents
    )
    return MetricRecord({"largest": max(content["metrics"]["number"] for content in contents)})


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (FedAvg(), {"number": 8 / 6}),
        (FedMedian(), {"number": 8 / 6}),
        (Watching(), {"number": 8 / 6, "replies": 3.0}),
        (FedAvg(evaluate_metrics_aggr_fn=largest), {"largest": 2.0}),
    ],
    ids=["FedAvg", "FedMedian", "an override", "a function"],
)
def test_a_strategys_own_aggregation_stands_over_the_mean(strategy, expected, tmp_path: Path):
    record = simulate(weighed_task(), 3, tmp_path, strategy).rounds[0]
    metrics = record["evaluate"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert record["refused"] == []
    assert strategy.evaluate_metrics_aggr_fn is FedAvg().evaluate_metrics_aggr_fn or (
        strategy.evaluate_metrics_aggr_fn is largest
    )


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "strategy", [Watching(), FedAvg(evaluate_metrics_aggr_fn=largest)], ids=["override", "function"]
)
def test_a_strategys_own_aggregation_sees_what_is_defined(strategy, tmp_path: Path):
    record = simulate(weighed_task(undefined_on=2), 3, tmp_path, strategy).rounds[0]
    (refused,) = record["refused"]
    assert (refused["node"], refused["phase"]) == ("node-2", "evaluate")
    assert "metric 'number' is not finite" in refused["reason"]
    assert record["evaluate"]["nodes"] == ["node-0", "node-1"]


def changed(**changes: Any):
    """A node whose evaluation has other weights than it measured."""
    app = fed.client_app(weighed_task())

    def answer(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate":
            for name, values in changes.items():
                reply.content[name] = ConfigRecord(values)
        return reply

    return answer


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e30, "many", [1.0]])
def test_an_unfit_weight_is_refused(weight: Any, tmp_path: Path):
    task = weighed_task()
    honest = fed.client_app(task)
    apps = [changed(weights={"number": weight}), honest, honest]
    record = federate(FedAvg(), tmp_path, apps, task=task, num_rounds=1).rounds[0]
    (refused,) = record["refused"]
    assert (refused["node"], refused["phase"]) == ("node-0", "evaluate")
    assert "the weight of metric 'number' must be from 0 to 1e+12, not" in refused["reason"]
    assert record["evaluate"]["number"] == pytest.approx(8 / 5)


@pytest.mark.usefixtures("uncompiled")
def test_a_stranger_costs_a_metric_no_more_than_its_own_part(tmp_path: Path):
    task = weighed_task()
    honest = fed.client_app(task)
    strange = {"number": "x" * 10_000, "loss": [1], "other": "what is not in the metrics"}
    apps = [changed(weights={"number": 0, "other": "x"}, undefined=strange), honest, honest]
    told: list[str] = []
    listener = lambda event: told.append(getattr(event, "text", ""))  # noqa: E731
    record = federate(FedAvg(), tmp_path, apps, task=task, num_rounds=1, listener=listener).rounds[
        0
    ]
    assert record["refused"] == []
    assert record["undefined"] == {"evaluate": {"number": 1}}
    assert record["evaluate"]["number"] == pytest.approx(8 / 5)
    assert max(map(len, told)) < 700


def test_a_reply_without_weights_is_weighed_by_the_strategys_metric(tmp_path: Path):
    """As that of a client that is not ours."""

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if message.metadata.message_type == "evaluate":
            partition = int(context.node_config["partition-id"])
            figures = {
                "num-examples": 5,
                "mine": 1.0 + 9 * (partition == 1),
                "loss": float(partition),
            }
            reply.content = RecordDict({"metrics": MetricRecord(figures)})
        if message.metadata.message_type == "train":
            reply.content["metrics"]["mine"] = 1.0
        return reply

    task = plain_task({})
    honest = fed.client_app(task)
    record = federate(
        FedAvg(weighted_by_key="mine"), tmp_path, [app] * 3, task=task, num_rounds=1
    ).rounds[0]
    assert record["evaluate"]["loss"] == pytest.approx((0 + 10 + 2) / 12)


def test_a_client_without_tokens_still_has_metrics(tmp_path: Path):
    """The loss has no weight there, and num-tokens, which weighs updates, is 0."""
    clients = [Client([2, 3], [1.0, 1.0]), Client([0, 0], [3.0, 3.0])]
    strategy = FedAvg(weighted_by_key="num-words", **EVERYBODY)
    record = simulate(make_task(clients), 2, tmp_path, strategy).rounds[0]
    assert record["refused"] == []
    assert record["evaluate"]["value"] == 2.0
    assert record["undefined"]["evaluate"]["loss"] == 1


def test_a_server_that_is_not_ours_gets_an_error_for_what_is_undefined():
    """Flower's mean would be NaN for all clients."""
    arrays = {name: Array(np.array(a)) for name, a in Trainer(weighed_task()).parameters().items()}
    replies = []
    for undefined_on in (None, 1):
        grid = LoopbackGrid([fed.client_app(weighed_task(undefined_on))] * 2)
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord()})
        message = Message(content, dst_node_id=2, message_type="evaluate")
        (reply,) = grid.send_and_receive([message])
        replies.append(reply)
    assert replies[0].content["metrics"]["number"] == 1.0
    assert "Metric 'number' is undefined: it is nan" in replies[1].error.reason


# -- the best round ----------------------------------------------------------------------------


def after(*rounds: tuple[float, int, int]) -> Best | None:
    """The best of rounds with a loss, of which so many nodes of so many had none."""
    state = RunState(0, Model(None, {}), None)
    for number, (value, undefined, nodes) in enumerate(rounds, 1):
        record = RoundRecord(number, evaluate={"loss": value, "nodes": ["node"] * nodes})
        record.undefined = {"evaluate": {"loss": undefined}} if undefined else {}
        state = state.after(record, state.model)
    return state.best


def test_a_round_with_fewer_losses_is_not_the_best_for_that():
    assert after((2.0, 0, 4), (0.5, 1, 4), (3.0, 0, 4)) == Best(1, 2.0)
    assert after((0.5, 1, 4), (2.0, 0, 4)) == Best(2, 2.0)
    assert after((0.5, 2, 4), (0.7, 1, 4), (0.6, 1, 4)) == Best(3, 0.6, 0.25)
    assert after((0.5, 1, 4), (0.7, 1, 8)) == Best(2, 0.7, 0.125)
    assert after((math.nan, 4, 4)) is None


def test_the_servers_own_loss_counts_whatever_its_nodes_have():
    state = RunState(0, Model(None, {}), None)
    record = RoundRecord(1, evaluate={"loss": 1.0, "nodes": ["a"]}, central={"loss": 3.0})
    record.undefined = {"evaluate": {"loss": 1}}
    assert state.after(record, state.model).best == Best(1, 3.0)
    record.central = {"loss": math.nan}
    assert state.after(record, state.model).best is None


def test_a_diverged_loss_leaves_the_other_clients(tmp_path: Path):
    task = replace(
        weighed_task(1),
        loss=lambda m, x, y, n=None: nn.losses.cross_entropy(m(x), y) + (0 if n is None else n),
    )
    record = simulate(task, 3, tmp_path).rounds[0]
    assert record["undefined"] == {"evaluate": {"loss": 1, "number": 1}}
    each = record["each"]["evaluate"]
    expected = (each["node-0"]["loss"] + each["node-2"]["loss"]) / 2
    assert record["evaluate"]["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("form", ["arrays", "stream"])
@pytest.mark.parametrize(("label", "is_refused"), [(2, False), (3, True), (100_000, True)])
def test_labels_without_an_output_are_refused(form: str, label: int, is_refused: bool):
    task = fed.Task(
        model=lambda: nn.Linear(4, 3),
        loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
        optimizer=lambda config: optim.SGD(0.1),
        data=lambda partition, num_partitions: fed.Data(train=None),
    )
    batches = [(mx.ones((6, 4)), mx.array([0, 1, 2, 0, 1, last])) for last in (0, label)]
    trainer = Trainer(task)

    def evaluate(split: Any) -> Any:
        return trainer.evaluate(trainer.parameters(), trainer.statistics(), split)

    evaluate(batches[0])  # the range of other examples does not cover these
    split = batches[1] if form == "arrays" else lambda key: iter(batches)
    if is_refused:
        with pytest.raises(ExamplesError, match=f"entry {label} of 3"):
            evaluate(split)
    else:
        assert math.isfinite(evaluate(split).metrics["loss"])


def test_predictions_that_depend_on_the_batch_see_no_padding():
    def predict(model, x, y):
        scores = model(x)[:, 0]
        return {"deviations": scores - scores.mean(), "y": y}

    metric = fed.DatasetMetric(predict, lambda deviations, y: np.asarray(deviations).mean())
    task = plain_task({"metric": metric})
    trainer = Trainer(task)
    evaluation = trainer.evaluate(trainer.parameters(), {}, task.data(1, None).test)
    assert evaluation.metrics["metric"] == pytest.approx(0, abs=1e-6)
