"""Simulation of a federation on one machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..arrays import randomness
from ..errors import SettingsError
from ..events import Event, Listener, RunResumed
from ..flower.log import silence_flower
from ..monitoring.server_terminal import listeners_or_terminal
from ..rounds import loop
from ..rounds.initial_weights import InitialWeights
from ..rounds.node_selection import NodeSelectors, parse_selection
from ..rounds.run_setup import StrategySource, set_up_run
from ..rounds.settings import EvaluateFn, RunSettings, select_settings, with_argument_hints
from ..rounds.stopping import StopFn
from ..runs.labels import LabelsFile
from ..runs.result import Result
from ..settings_check import whole_number
from ..system import devices
from ..task import TaskSource
from ..training.trainer import Trainer
from .client_states import ClientStateStore
from .faults import Faults
from .simulated_grid import SimulationGrid
from .simulated_roster import SimulatedRoster
from .worker_messages import WorkerConfig
from .worker_pool import InProcessPool, Pool, data_bytes, default_workers
from .worker_progress import received


@with_argument_hints
@devices.restore_default()
@randomness.restore_generators()
def simulate(
    task: TaskSource,
    strategy: StrategySource | None = None,
    num_clients: int = 100,
    num_rounds: int | None = None,
    *,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    select_nodes: NodeSelectors | None = None,
    round_timeout: float = 3600.0,
    min_replies: int = 1,
    max_repeats: int = 2,
    max_examples: float | None = None,
    max_update_norm: float | None = None,
    compress: str | None = None,
    keep: int = 3,
    test: Sequence[Any] | None = None,
    evaluate_fn: EvaluateFn | None = None,
    patience: int | None = None,
    target: str | Mapping[str, float] | None = None,
    stop: StopFn | None = None,
    initial: InitialWeights | None = None,
    batched: bool = True,
    chunk_size: int | None = None,
    workers: int | None = None,
    faults: Faults | None = None,
    name: str | None = None,
    runs: Path | str = "runs",
    resume: Path | str | None = None,
    change: Mapping[str, Any] | None = None,
    device: str | None = None,
    listeners: tuple[Listener, ...] | None = None,
) -> Result:
    """Runs a federation of clients on this machine, and returns when it is over.

    It ends with the weights that a federation of machines would end with, for the same task,
    strategy and seed: the same round loop, and each client trains as a node does. Clients train
    many at once where the model allows it, in a process for each core, or on the GPU.

    Args:
        task (Task or callable): What is trained, or a function of ``config`` that makes it.
            ``Task.data`` is called with each sampled client's partition, in the process that
            trains it.
        strategy (Strategy, str or callable, optional): Any Flower strategy, the name of one, or a
            function of ``config`` that returns one; ``fraction_train`` is the share of clients
            that train in a round. Default: ``FedAvg()``, all of them.
        num_clients (int): How many clients there are. Default: ``100``.
        num_rounds (int, optional): As :func:`mlx_fed.serve` has it, and the other settings that
            are not listed here.
        select_nodes (str or list, optional): Which clients take part, by name or number:
            ``"0-9,node-20"``. Default: all; of a resumed run, those that it had.
        max_examples (float, optional): Limit of the number of examples that a reply may report,
            by which it is weighed. Default: any number.
        max_update_norm (float, optional): Limit of an update's norm, in medians of the norms of
            all updates, where there are three or more; ``math.inf`` for none. Default: none.
        batched (bool): Train clients many at once where that is possible; otherwise, and where
            it is not, one after another. Both give the same. Default: ``True``.
        chunk_size (int, optional): Clients at once. Default: what fits the device's cache.
        workers (int, optional): Processes to use; 0 is this process alone. Default: one for
            each core, on a GPU 0.
        faults (Faults, optional): Clients that fail, straggle or attack. Default: none.
        device (str, optional): ``"cpu"`` or ``"gpu"``. Default: MLX's own choice.
        listeners (tuple, optional): Who is told what happens (see
            :mod:`mlx_fed.events`), in place of the progress display.

    Returns:
        Result: The final model, and a record of each round.

    Raises:
        FedError: If the simulation cannot start or go on. What was reached is kept in the run's
            folder.

    Example:
        >>> result = simulate(task, FedAvg(fraction_train=0.1), num_clients=1000, num_rounds=20)
    """
    settings = RunSettings(**select_settings(locals()))
    for argument, value, minimum in (
        ("num_clients", num_clients, 1),
        ("chunk_size", chunk_size, 1),
        ("workers", workers, 0),
    ):
        if value is not None:
            whole_number(minimum).check("", argument, value)
    if settings.min_replies > num_clients:
        raise SettingsError(
            f"min_replies is {settings.min_replies}, and there are {num_clients} clients: no round "
            "can have so many replies. Give at most num_clients."
        )
    if faults is not None and not isinstance(faults, Faults):
        raise SettingsError(f"faults is an mlx_fed.Faults, not {faults!r}.")
    silence_flower()
    faults = faults or Faults()
    with (
        listeners_or_terminal(listeners) as watching,
        tempfile.TemporaryDirectory(prefix="mlx-fed-") as folder,
    ):
        setup = set_up_run(
            task,
            strategy,
            settings,
            num_rounds,
            runs=runs,
            name=name,
            resume=resume,
            device=device,
            listeners=watching,
            description={"engine": "simulation", "clients": num_clients, "faults": vars(faults)},
            num_clients=num_clients,
        )
        _, trainer, settings, history = setup
        num_workers = default_workers(device) if workers is None else workers
        client_states = ClientStateStore(history.folder.resolve() / "clients", settings.keep)

        def forget(event: Event) -> None:
            if isinstance(event, RunResumed):
                client_states.delete_after(event.round)

        label_file = LabelsFile(history.folder, num_clients)
        history.listeners = (forget, label_file, *history.listeners)
        worker_config = WorkerConfig(
            task,
            settings.config,
            settings.seed,
            num_clients,
            batched,
            chunk_size,
            faults,
            Path(folder),
            data_bytes(num_workers or 1),
            client_states,
            trainer.frozen if num_workers else {},
        )
        with (
            received(Path(folder), watching),
            _pool(worker_config, num_workers, device, trainer) as pool,
        ):
            grid = SimulationGrid(
                num_clients, pool, Path(folder), settings.round_timeout, history.notify
            )
            roster = SimulatedRoster(num_clients, parse_selection(settings.select_nodes))
            return loop.run(grid, *setup, roster, resume=resume is not None)


@contextmanager
def _pool(
    config: WorkerConfig, num_workers: int, device: str | None, trainer: Trainer
) -> Iterator[Pool | InProcessPool]:
    pool = Pool(config, num_workers, device) if num_workers else InProcessPool(config, trainer)
    try:
        yield pool
    except BaseException:
        pool.close(at_once=True)
        raise
    pool.close(at_once=False)
