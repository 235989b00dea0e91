"""Checks of a task before a run: its data, their values, one training step, memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import examples
from ..settings_check import check_config
from ..system import devices
from ..task import Data, Task, TaskSource, make_task
from ..task_settings import TracedConfig
from ..training import batches
from ..training.trainer import Trainer
from .findings import Fault, Finding, check

TASK_ADVICE = "mend the task at the line that is named"
_SPARE_SHARE = 0.1
"""Of the machine's memory, which should stay free."""


def check_task(
    source: Callable[[], TaskSource],
    config: dict[str, Any] | None,
    device: str | None,
    partition_id: int,
    num_partitions: int | None,
) -> Iterator[Finding]:
    """Checks of a task in the order in which it would fail, up to one step of training."""
    steps: dict[str, Any] = {}

    def make() -> None:
        steps["device"] = devices.use(device)
        steps["task"] = build_task(source, config)

    def load() -> str:
        data = batches.load(steps["task"], partition_id, num_partitions)
        schema = _schema(data)
        steps["data"] = data
        return schema

    def look() -> str:
        _check_values(steps["data"])
        steps["values"] = True
        return "all are finite"

    def train() -> str:
        trainer = steps["trainer"] = Trainer(steps["task"])
        mx.reset_peak_memory()
        start = time.monotonic()
        parameters, statistics = trainer.parameters(), trainer.statistics()
        settings = {**steps["task"].config, "server-round": 1, "local-steps": 1}
        update = trainer.train(parameters, statistics, steps["data"], settings)
        seconds = time.monotonic() - start
        losses = {k: v for k, v in update.metrics.items() if "loss" in k}
        if not all(math.isfinite(float(loss)) for loss in losses.values()):
            raise Fault(
                f"the loss of the first step is {next(iter(losses.values()))}",
                "look for values that are not finite in the data, or try a smaller learning rate",
            )
        steps["peak"] = mx.get_peak_memory()
        return f"one step took {seconds:.1f} s on {steps['device']}"

    yield from check("task", make, lambda _: "it can be made", TASK_ADVICE)
    if "task" in steps:
        yield from check("data", load, str, "mend Task.data at the line that is named")
    if "data" in steps:
        yield from check("values", look, str, "mend the data")
    if "values" in steps:
        yield from check("training", train, str, TASK_ADVICE)
    if "peak" in steps:
        yield from check("memory", lambda: _memory(steps["peak"]), str, "end other programs")


def build_task(source: Callable[[], TaskSource], config: dict[str, Any] | None) -> Task:
    """The task, whose settings are checked."""
    task_source = source()
    settings = TracedConfig.of(config)
    task = make_task(task_source, settings)
    check_config(settings, task, [] if isinstance(task_source, Task) else [task_source])
    return task


def _schema(data: Data) -> str:
    parts = []
    for name, split in (("train", data.train), ("test", data.test)):
        if split is None:
            parts.append(f"{name}: none")
        elif callable(split):
            parts.append(f"{name}: a stream")
        else:
            count = examples.count(split)
            if name == "train" and not count:
                raise Fault("Data.train has no examples", "choose another partition or dataset")
            arrays = ", ".join(
                f"{tuple(array.shape[1:])} {str(array.dtype).removeprefix('mlx.core.')}"
                for array in examples.leaves(split)
            )
            parts.append(f"{name}: {count} examples of {arrays}")
    return "; ".join(parts)


def _check_values(data: Data) -> None:
    for name, split in (("train", data.train), ("test", data.test)):
        if split is None or callable(split):
            continue
        for path, array in examples.paths(split):
            if not mx.issubdtype(array.dtype, mx.inexact):
                continue
            rows = ~mx.isfinite(array.reshape(len(array), -1)).all(axis=1)
            wrong = np.flatnonzero(np.asarray(rows))
            if len(wrong):
                raise Fault(
                    f"Data.{name}, array {path}: {len(wrong)} of {len(array)} examples have "
                    f"values that are not finite, the first at {wrong[0]}",
                    "leave these examples out, or fill in their missing values",
                )


def _memory(peak: int) -> str:
    total = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if hasattr(mx, "device_info") and mx.default_device().type == mx.gpu:
        total = int(mx.device_info().get("memory_size", total))
    text = f"a step needs {peak / 2**20:.1f} MiB of {total / 2**30:.1f} GiB"
    if peak > (1 - _SPARE_SHARE) * total:
        raise Fault(f"{text}, which leaves too little", "choose a smaller batch-size or model")
    return text


def describe_size(trainer: Trainer, device: str) -> str:
    """Bytes of the parameters, and where they are aggregated."""
    size = sum(array.nbytes for array in trainer.parameters().values())
    return f"{size / 2**20:.1f} MiB of parameters, aggregated on {device}"
