"""Random tasks on every engine, held to an oracle: see tests/generated."""

from __future__ import annotations

import mlx_fed  # noqa: F401, before mlx.core

import mlx.core as mx
import numpy as np
import pytest

from .generated.compare import check, extras, simulate, to_float
from .generated.draw import Drawn, draw, of_processes

FEW, MANY = 300, 3300
SERVED = of_processes(4)


@pytest.mark.parametrize("seed", range(FEW // 2))
def test_a_generated_task(seed):
    """``python -m tests.generated --seed`` shows more of one that fails."""
    drawn = draw(seed)
    report = check(drawn, resumed=extras(seed)["resumed"])
    assert not report.faults, f"{drawn}\n" + "\n".join(fault.what for fault in report.faults[:8])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(FEW, MANY, 1000))
def test_more_generated_tasks(first, start):
    """In two processes, for two cores."""
    halves = [
        start("-m", "tests.generated", "--first", seed, "--tasks", 500)
        for seed in (first, first + 500)
    ]
    codes = [half.ends(1700) for half in halves]
    assert codes == [0, 0], "\n".join(half.text[-3000:] for half in halves)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SERVED)
def test_a_generated_task_on_a_fleet(seed, start, tmp_path):
    """A server and nodes in processes of their own end with the bits of nodes in this one."""
    drawn = draw(seed)
    server = start(
        *("-m", "mlx_fed", "serve", "tests.generated:task", "--port", 0, "--name", "served"),
        *("--runs", tmp_path, "--wait", 120, "--rounds", drawn.num_rounds, "--seed", seed),
        *("--min-nodes", drawn.num_clients, "--strategy", drawn.strategy_name),
        *(part for name, value in drawn.arguments.items() for part in ("-s", f"{name}={value}")),
        *settings(drawn),
    )
    address = server.line(r"Server ready on (\S+)").group(1)
    nodes = [
        start(
            *("-m", "mlx_fed", "join", "tests.generated:task", "--server", address, "--wait", 120),
            *("--node-id", number, "--num-partitions", drawn.num_clients, *settings(drawn)),
        )
        for number in range(drawn.num_clients)
    ]
    assert server.ends(200) == 0, "\n".join(each.text for each in (server, *nodes))
    assert [node.ends() for node in nodes] == [0] * len(nodes)
    expected = simulate(drawn, tmp_path, "plain", batched=False).values
    model = mx.load(str(tmp_path / "served" / "model.safetensors"))
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(to_float(model[name]), array, err_msg=name)


def settings(drawn: Drawn) -> list[str]:
    config = {**drawn.config, "task-seed": drawn.seed}
    return [part for name, value in config.items() for part in ("-c", f"{name}={value}")]
