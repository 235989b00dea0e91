"""Holds the engines to the oracle, and to each other, on a drawn task."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_fed.rounds import loop
from mlx_fed.runs.history import History
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.training.trainer import Trainer

from .. import oracle
from .. import oracle_parts as parts
from ..helpers.loopback import LoopbackGrid
from ..oracle_strategies import Tie
from .draw import Drawn

TIGHT = 2e-5
"""Of the update's norm: what sums in another order differ by."""
SHAKES = 3
"""Runs of the oracle whose parameters are moved by a rounding before each step."""
TIMES = 12.0
"""How much more than such runs an engine may differ."""


class Fault(NamedTuple):
    """What differs, from what and by how much."""

    where: str
    what: str


class Values(NamedTuple):
    """A run's final values and metrics as NumPy's, by name."""

    arrays: dict[str, np.ndarray]
    metrics: dict[str, float]


class Run(NamedTuple):
    """What an engine gave."""

    values: Values
    result: fed.Result
    notes: list[str]


def simulate(drawn: Drawn, runs: Path, name: str = "run", **options: Any) -> Run:
    """Runs the task, in this process unless ``options`` say otherwise."""
    notes: list[str] = []
    failed: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(str(event.text))
        if isinstance(event, events.ReplyRefused):
            failed.append(f"{event.phase} of {event.node}: {event.reason}")

    options = {"workers": 0, "num_rounds": drawn.num_rounds, "keep": 0, **options}
    try:
        result = fed.simulate(
            drawn.task,
            drawn.strategy(),
            drawn.num_clients,
            runs=runs,
            listeners=(listen,),
            config=drawn.config,
            seed=drawn.seed,
            name=None if "resume" in options else name,
            max_repeats=0,
            **options,
        )
    except fed.FedError as error:
        raise AssertionError(failed[0] if failed else str(error)) from error
    if failed:
        raise AssertionError(failed[0])
    return Run(values_of(result), result, notes)


def nodes(drawn: Drawn, runs: Path) -> Run:
    """Runs the task on nodes of their own, which get messages and answer them."""
    failed: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ReplyRefused):
            failed.append(f"{event.phase} of {event.node}: {event.reason}")

    folder = runs / "nodes"
    folder.mkdir()
    result = loop.run(
        LoopbackGrid([fed.client_app(drawn.task)] * drawn.num_clients, backwards=True),
        drawn.strategy(),
        Trainer(drawn.task, drawn.seed),
        RunSettings(
            num_rounds=drawn.num_rounds,
            seed=drawn.seed,
            config={**drawn.config, "num-rounds": drawn.num_rounds},
            keep=0,
            max_repeats=0,
        ),
        History(folder, (listen,)),
    )
    if failed:
        raise AssertionError(failed[0])
    return Run(values_of(result), result, [])


def values_of(result: fed.Result) -> Values:
    arrays = {n: to_float(a) for n, a in {**result.parameters, **result.statistics}.items()}
    return Values(arrays, metrics_of(result))


def to_float(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def metrics_of(result: fed.Result) -> dict[str, float]:
    """Each client's metrics of each round and the mean of evaluations, by a path."""
    rounds = [
        (record, {**record.get("each", {}), "mean": {"node-all": _means(record)}})
        for record in result.rounds
    ]
    return {
        f"round {record['round']} {phase} {node} {name}": float(value)
        for record, phases in rounds
        for phase, each in phases.items()
        for node, metrics in each.items()
        for name, value in metrics.items()
        if not name.endswith("-per-second")
    }


def _means(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in record["evaluate"].items()
        if isinstance(value, float) and not name.startswith("num-") and np.isfinite(value)
    }


def nodes_of(result: fed.Result) -> list[tuple[list[int], list[int]]]:
    """Who trained in each round, and who evaluated."""
    return [
        (numbers(record["train"]["nodes"]), numbers(record["evaluate"]["nodes"]))
        for record in result.rounds
    ]


def numbers(nodes: list[str]) -> list[int]:
    return [int(node.removeprefix("node-")) for node in nodes]


class Oracle:
    """The plain algorithm on a drawn task, for those who trained in a run."""

    def __init__(self, drawn: Drawn, nodes: list[tuple[list[int], list[int]]]):
        self.drawn, self.nodes = drawn, nodes
        self.start, self.values = self.run(None)
        self._noise: list[Values] | None = None

    @property
    def is_finite(self) -> bool:
        numbers = [*self.values.metrics.values()]
        return all(np.isfinite(a).all() for a in [*self.values.arrays.values(), np.array(numbers)])

    def run(self, touch: Callable | None) -> tuple[dict[str, np.ndarray], Values]:
        drawn = self.drawn
        start, model, rounds = oracle.run(
            drawn.task,
            drawn.strategy_name,
            drawn.options,
            drawn.num_clients,
            drawn.seed,
            self.nodes,
            drawn.config,
            touch,
        )
        every = dict(tree_flatten(model.parameters())) | parts.private(model)
        metrics = {
            f"round {number} {phase} node-{client} {name}": float(value)
            for number, record in enumerate(rounds, 1)
            for phase, each in record.items()
            for client, values in each.items()
            for name, value in values.items()
            if name == "loss" or np.isfinite(value)  # what is not defined is not reported
        }
        return start, Values({name: to_float(array) for name, array in every.items()}, metrics)

    def noise(self, name: str, kind: str) -> float:
        """How much a value moves where parameters are moved by a rounding before each step."""
        if self._noise is None:
            try:
                self._noise = [self.run(shake(number))[1] for number in range(SHAKES)]
            except Tie:
                return np.inf
        values = [getattr(run, kind)[name] for run in self._noise]
        calm = getattr(self.values, kind)[name]
        return max(float(np.linalg.norm(value - calm)) for value in values)


def shake(seed: int) -> Callable[[nn.Module], None]:
    """Moves every parameter by about half a step of its dtype."""
    rng = np.random.default_rng(seed)

    def moved(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        size = mx.finfo(array.dtype).eps / 2
        ways = mx.array(rng.choice([-1.0, 0.0, 1.0], array.shape).astype(np.float32))
        exact = array.astype(mx.float32)
        return (exact + exact * ways * size * 1.01).astype(array.dtype)

    return lambda module: module.update(tree_map(moved, module.trainable_parameters()))


def differences(where: str, got: Values, want: Values, of: Oracle) -> list[Fault]:
    """What differs by more than rounding does."""
    faults = []
    half = any(
        array.dtype != mx.float32
        for array in dict(tree_flatten(of_model(of.drawn))).values()
        if mx.issubdtype(array.dtype, mx.floating)
    )
    eps = 4e-3 if half else 1.2e-7
    for name, array in got.arrays.items():
        value = want.arrays[name]
        error = float(np.linalg.norm(array - value))
        update = float(np.linalg.norm(value - of.start[name])) if name in of.start else 0.0
        tight = TIGHT * update + 2 * eps * float(np.linalg.norm(value))
        if error <= (0 if half else tight) and np.isfinite(error):
            continue
        noise = of.noise(name, "arrays")
        if not error <= tight + TIMES * noise:
            faults.append(
                Fault(
                    where, f"{name}: {error:.2e}, of an update of {update:.2e}, noise {noise:.1e}"
                )
            )
    missing = want.metrics.keys() ^ got.metrics.keys()
    if missing:
        faults.append(Fault(where, f"metrics that only one has: {sorted(missing)[:3]}"))
    for name in want.metrics.keys() & got.metrics.keys():
        one, other = got.metrics[name], want.metrics[name]
        tight = (5e-3 if half else TIGHT) * max(abs(other), 0.1)
        if abs(one - other) <= tight:
            continue
        noise = of.noise(name, "metrics")
        if not abs(one - other) <= tight + TIMES * noise:
            faults.append(Fault(where, f"{name}: {one:.6g}, not {other:.6g}, noise {noise:.1e}"))
    return faults


def of_model(drawn: Drawn) -> Any:
    return drawn.task.model().trainable_parameters()


def bits(where: str, got: Values, want: Values) -> list[Fault]:
    """What differs at all."""
    faults = [
        Fault(where, f"{name}: other bits, {np.abs(got.arrays[name] - value).max():.1e}")
        for name, value in want.arrays.items()
        if not np.array_equal(got.arrays[name], value)
    ]
    if got.metrics != want.metrics:
        names = [n for n in want.metrics if got.metrics.get(n) != want.metrics[n]]
        faults.append(Fault(where, f"other metrics: {names[:3]}"))
    return faults


class Report(NamedTuple):
    """What a task showed.

    Attributes:
        faults (list): Where an engine differs.
        batched (bool): Whether clients trained many at once.
        useless (str, optional): Why the plain algorithm itself fails on the task.
        has_tie (bool): Whether what clients count is by rounding, so that no oracle knows it.
    """

    faults: list[Fault]
    batched: bool = False
    useless: str | None = None
    has_tie: bool = False


def check(
    drawn: Drawn, *, resumed: bool = False, workers: int = 0, compiled: bool = False
) -> Report:
    """Runs the task on each engine and compares.

    Args:
        drawn (Drawn): The task.
        resumed (bool): Also stop and resume.
        workers (int): Also in so many processes.
        compiled (bool): Compile programs, which takes seconds where a kernel is new.
    """
    if not compiled:
        mx.disable_compile()
    try:
        return _check_in_folder(drawn, resumed, workers)
    finally:
        mx.enable_compile()


def extras(seed: int) -> dict[str, Any]:
    """What else is tried with the task of a seed, by the number alone."""
    return {
        "resumed": seed % 8 == 0,
        "workers": seed // 60 % 3 + 1 if seed % 60 == 7 else 0,
        "compiled": seed % 30 == 11,
    }


def _check_in_folder(drawn: Drawn, resumed: bool, workers: int) -> Report:
    memory = Path("/dev/shm")  # where there is one, writing costs nothing
    where = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="mlx-fed-generated-", dir=where) as folder:
        return _check(drawn, Path(folder), resumed, workers)


def _check(drawn: Drawn, runs: Path, resumed: bool, workers: int) -> Report:
    everyone = list(range(drawn.num_clients))
    # Every other plain run does not even look at what could be compiled.
    alone = replace(drawn.task, compile=False) if drawn.seed % 2 else drawn.task
    apart = replace(drawn, task=alone)
    try:
        plain = simulate(apart, runs, "plain", batched=False)
    except Exception as error:
        try:
            of = Oracle(drawn, [(everyone, everyone)] * drawn.num_rounds)
        except Exception as same:
            return Report([], useless=f"{type(same).__name__}: {same}")
        if not of.is_finite or ("not finite" in str(error) and not drawn.follows):
            return Report([], useless="it diverges")
        return Report([Fault("plain", f"{type(error).__name__}: {error}")])
    together = simulate(drawn, runs, "batched", chunk_size=drawn.chunk_size)
    faults: list[Fault] = []
    try:
        of = Oracle(drawn, nodes_of(plain.result))
    except Tie:
        of = None
    else:
        faults += differences("plain", plain.values, of.values, of) if drawn.follows else []
        faults += differences("batched", together.values, plain.values, of)
    batched = not any("one after another" in note for note in together.notes)
    if resumed and drawn.num_rounds > 1:
        first = replace(drawn, num_rounds=drawn.num_rounds - 1)
        options = {"chunk_size": drawn.chunk_size, "keep": 1}
        simulate(first, runs, "stopped", **options)
        again = simulate(drawn, runs, resume="stopped", **options)
        faults += bits("resumed", again.values, together.values)
    if drawn.seed % 8 == 1:
        faults += bits("nodes", nodes(apart, runs).values, plain.values)
    if workers:
        spread = simulate(apart, runs, "apart", batched=False, workers=workers)
        faults += bits(f"{workers} workers", spread.values, plain.values)
        spread = simulate(drawn, runs, "several", chunk_size=drawn.chunk_size, workers=workers)
        if of:
            faults += differences(f"batched by {workers} workers", spread.values, plain.values, of)
    return Report(faults, batched, has_tie=of is None)
