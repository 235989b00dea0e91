"""A whole federation in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from ..errors import SettingsError
from ..events import Event, Listener, Notice, RunResumed
from ..flower.log import silence_flower
from ..monitoring.server_terminal import listeners_or_terminal
from ..rounds import loop, named_strategies
from ..rounds.settings import decide_rounds, make_checked_task, settings_of
from ..runs.history import History, Previous, previous_of, run_folder
from ..runs.labels import LabelsFile
from ..settings_check import whole_number
from ..system import devices
from ..task import TaskSource
from ..training.trainer import Trainer
from .client_states import ClientStateStore
from .faults import Faults
from .simulated_grid import SimulationGrid
from .simulated_roster import SimulatedRoster
from .worker import WorkerConfig
from .worker_pool import InProcessPool, Pool, data_bytes, default_workers
from .worker_progress import received


@devices.restore_default()
def simulate(
    task: TaskSource,
    strategy: Strategy | str | None = None,
    num_clients: int = 100,
    num_rounds: int | None = None,
    *,
    batched: bool = True,
    chunk_size: int | None = None,
    workers: int | None = None,
    faults: Faults | None = None,
    name: str | None = None,
    runs: Path | str = "runs",
    resume: Path | str | None = None,
    device: str | None = None,
    listeners: tuple[Listener, ...] | None = None,
    **settings: Any,
) -> loop.Result:
    """Runs a federation of clients on this machine, and returns when it is over.

    It ends with the weights that a federation of machines would end with, for the same task,
    strategy and seed: the same round loop, and each client trains as a node does. Clients train
    many at once where the model allows it, in a process for each core, or on the GPU.

    Args:
        task (Task or callable): What is trained, or a function of ``config`` that makes it.
            ``Task.data`` is called with each sampled client's partition, in the process that
            trains it.
        strategy (flwr.serverapp.strategy.Strategy or str): Any Flower strategy, or the name of
            one, as ``"FedAvg"``; ``fraction_train`` is the share of clients that train in a
            round. Default: ``FedAvg()``, all of them.
        num_clients (int): How many clients there are. Default: ``100``.
        num_rounds (int, optional): Rounds to train. Default: ``num-rounds`` of ``config`` or
            else of the task, or 3.
        batched (bool): Train clients many at once where that is possible; otherwise, and where
            it is not, one after another. Both give the same. Default: ``True``.
        chunk_size (int, optional): Clients at once. Default: what fits the device's cache.
        workers (int, optional): Processes to use; 0 is this process alone. Default: one for
            each core, on a GPU 0.
        faults (Faults, optional): Clients that fail, straggle or attack. Default: none.
        name (str, optional): The run's name, of the folder below ``runs``. Default: the time.
        runs (Path): Where runs are kept. Default: ``"runs"``.
        resume (str or Path, optional): Go on with the run of this name below ``runs``, or in this
            folder, from its last whole round; the rest of the arguments are as they were, but for
            ``num_rounds``, ``patience`` and ``target``, whose default is then what the run was
            started with.
        device (str, optional): ``"cpu"`` or ``"gpu"``. Default: MLX's own choice.
        listeners (tuple, optional): Who is told what happens (see
            :mod:`mlx_fed.events`), in place of the progress display.
        settings: ``config``, ``seed``, ``round_timeout``, ``keep``, ``min_replies``,
            ``max_repeats``, ``max_examples``, ``max_update_norm``, ``test``, ``evaluate_fn``,
            ``patience``, ``target`` and ``stop``, as
            :class:`~mlx_fed.rounds.settings.Settings` has them.

    Returns:
        Result: The final model, and a record of each round.

    Raises:
        FedError: If the simulation cannot start or go on. What was reached is kept in the run's
            folder.

    Example:
        >>> result = simulate(task, FedAvg(fraction_train=0.1), num_clients=1000, num_rounds=20)
    """
    for argument, value, minimum in (
        ("num_clients", num_clients, 1),
        ("chunk_size", chunk_size, 1),
        ("workers", workers, 0),
    ):
        if value is not None:
            whole_number(minimum).check("", argument, value)
    if faults is not None and not isinstance(faults, Faults):
        raise SettingsError(f"faults is an mlx_fed.Faults, not {faults!r}.")
    silence_flower()
    computing_on = devices.use(device)
    leading = settings_of(simulate, settings)
    strategy = named_strategies.find(strategy, 1)
    previous = previous_of(run_folder(runs, name, resume)) if resume is not None else Previous()
    checked_task = make_checked_task(task, leading, strategy, previous.config, num_clients)
    task_config = leading.config
    decide_rounds(leading, checked_task.config, num_rounds, previous.num_rounds or None)
    faults = faults or Faults()
    with (
        listeners_or_terminal(listeners) as watching,
        tempfile.TemporaryDirectory(prefix="mlx-fed-") as folder,
    ):
        trainer = Trainer(checked_task, leading.seed)
        size = default_workers(device) if workers is None else workers
        run = run_folder(runs, name, resume)
        client_states = ClientStateStore(run.resolve() / "clients", leading.keep)

        def forget(event: Event) -> None:
            if isinstance(event, RunResumed):
                client_states.delete_after(event.round)

        description = {"engine": "simulation", "clients": num_clients, "faults": vars(faults)}
        history = History(run, (forget, LabelsFile(run, num_clients), *watching), description)
        if devices.is_slow(computing_on):
            history.notify(Notice(f"computing on {computing_on}"))
        worker_config = WorkerConfig(
            task,
            task_config,
            leading.seed,
            num_clients,
            batched,
            chunk_size,
            faults,
            Path(folder),
            data_bytes(size or 1),
            client_states,
            trainer.frozen if size else {},
        )
        with (
            received(Path(folder), watching),
            _pool(worker_config, size, device, trainer) as pool,
        ):
            grid = SimulationGrid(
                num_clients, pool, Path(folder), leading.round_timeout, history.notify
            )
            roster = SimulatedRoster(num_clients)
            return loop.run(
                grid, strategy, trainer, leading, history, roster, resume=resume is not None
            )


@contextmanager
def _pool(
    worker_config: WorkerConfig, size: int, device: str | None, trainer: Trainer
) -> Iterator[Pool | InProcessPool]:
    pool = Pool(worker_config, size, device) if size else InProcessPool(worker_config, trainer)
    try:
        yield pool
    except BaseException:
        pool.close(at_once=True)
        raise
    pool.close(at_once=False)
