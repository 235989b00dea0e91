"""The server of a federation: Flower's Fleet routes on one port, the round loop beside them."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from flwr.serverapp.strategy import Strategy

from .. import devices, rounds, strategies
from ..errors import FedError
from ..flower.grid import LinkGrid
from ..flower.link import Link
from ..flower.routes import FleetRoutes
from ..history import History, Listener, Result, recorded_rounds, run_folder
from ..progress import ServerProgress, quiet_flower
from ..settings import Settings, decide_rounds
from ..spool import Spool
from ..task import TaskSource, make_task
from ..training import Trainer
from . import address

_FAREWELL = 5.0
"""Seconds that nodes have to leave after the run."""


class ServeError(FedError):
    """A server that cannot start."""


def serve(
    task: TaskSource,
    strategy: Strategy | None = None,
    num_rounds: int | None = None,
    *,
    host: str = address.DEFAULT_HOST,
    port: int = address.DEFAULT_PORT,
    insecure: bool = False,
    name: str | None = None,
    runs: Path | str = "runs",
    resume: Path | str | None = None,
    device: str | None = "cpu",
    listeners: tuple[Listener, ...] | None = None,
    **settings: Any,
) -> Result:
    """Leads a federation of machines through a run, and returns when it is over.

    Nodes (:func:`mlx_fed.join`) may come before the server, after it and between rounds; when
    the run is over they are told and end.

    Args:
        task (Task or callable): What is trained, or a function of ``config`` that makes it.
        strategy (flwr.serverapp.strategy.Strategy): Any Flower strategy. Default:
            FedAvg, of ``min_nodes`` nodes or 2.
        num_rounds (int, optional): Rounds to train. Default: ``num-rounds`` of ``config`` or
            else of the task, or 3.
        host (str): The address to listen on. Default: ``"127.0.0.1"``.
        port (int): The port; 0 takes a free one. Default: ``8080``.
        insecure (bool): Allow plaintext on other addresses than the loopback.
        name (str, optional): The run's name, of the folder below ``runs``. Default: the time.
        runs (Path): Where runs are kept. Default: ``"runs"``.
        resume (str or Path, optional): Go on with the run of this name below ``runs``, or in this
            folder, from its last whole round; the rest of the arguments are as they were, but for
            ``num_rounds``, whose default is then what the run was started with.
        device (str, optional): ``"cpu"`` or ``"gpu"``, where the server aggregates.
        listeners (tuple, optional): Who is told what happens (see
            :class:`~mlx_fed.history.History`), in place of the progress display.
        settings: ``config``, ``seed``, ``min_nodes``, ``wait``, ``round_timeout``, ``keep``,
            ``min_replies``, ``max_repeats``, ``max_examples``, ``max_update_norm``, ``test`` and
            ``evaluate_fn``, as :class:`~mlx_fed.settings.Settings` has them.

    Returns:
        Result: The final model, and a record of each round.

    Raises:
        FedError: If the server cannot start or the run cannot go on. What was reached is kept
            in the run's folder.

    Example:
        >>> result = serve(task, FedAvg(), num_rounds=3)
    """
    address.require_loopback(host, insecure)
    leading = Settings(**settings)
    strategy = strategy or strategies.default(leading.min_nodes)
    made = make_task(task, leading.config)
    recorded = recorded_rounds(run_folder(runs, name, resume)) if resume is not None else None
    decide_rounds(leading, made.config, num_rounds, recorded)
    quiet_flower()
    with _socket(host, port) as listening:
        port = listening.getsockname()[1]
        computing_on = devices.use(device)
        trainer = Trainer(made, leading.seed)
        shown = ServerProgress()
        folder = run_folder(runs, name, resume)
        history = History(folder, (shown,) if listeners is None else tuple(listeners))
        with _serving(listening, Spool(folder / "waiting")) as link:
            history.notify("serving", address=address.join(host, port), insecure=insecure)
            if devices.is_slow(computing_on):
                history.notify("note", text=f"computing on {computing_on}")
            try:
                return rounds.run(
                    LinkGrid(link),
                    strategy,
                    trainer,
                    leading,
                    history,
                    resume=resume is not None,
                )
            finally:
                shown.close()
                _say_goodbye(link)


def _socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            why = f"Port {port} is in use on {host}: end the other server or choose a --port."
            raise ServeError(why) from error
        raise ServeError(f"Cannot listen on {host}:{port}: {error}") from error
    return listening


@contextlib.contextmanager
def _serving(listening: socket.socket, spool: Spool | None = None) -> Iterator[Link]:
    """Serves the Fleet routes from a thread for as long as the context lasts."""
    link = Link(spool)
    config = uvicorn.Config(
        FleetRoutes(link),
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_keep_alive=120,
        timeout_graceful_shutdown=1,
        ws="none",
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise ServeError("The server's HTTP thread ended at its start.")
            time.sleep(0.01)
        yield link
    finally:
        server.should_exit = True
        thread.join()
        link.close()


def _say_goodbye(link: Link) -> None:
    """Tells the nodes that the run is over and waits for them to leave."""
    link.finish()
    deadline = time.monotonic() + _FAREWELL
    while link.online() and time.monotonic() < deadline:
        seen = link.news()
        if link.online():
            link.wait_for_news(seen, 0.2)
