"""The server of a federation: the round loop, and Flower's Fleet API on one port."""

from __future__ import annotations

import contextlib
import errno
import gc
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from ..arrays import randomness, weights
from ..arrays.spool import Spool
from ..errors import FedError, RunError
from ..events import Listener, NodeInvited, Notice, ServerReady
from ..flower import headers
from ..flower.connections import LimitedHttpProtocol, LimitedServer, raise_file_limit
from ..flower.fleet_routes import FleetRoutes
from ..flower.link_grid import LinkGrid
from ..flower.link_state import Link
from ..flower.log import silence_flower
from ..monitoring.server_terminal import listeners_or_terminal
from ..rounds import loop, strategies
from ..rounds.initial_weights import InitialWeights
from ..rounds.node_selection import NodeSelectors
from ..rounds.run_setup import StrategySource, set_up_run
from ..rounds.settings import EvaluateFn, RunSettings, select_settings, with_argument_hints
from ..rounds.stopping import StopFn
from ..runs.result import Result
from ..system import address, devices, http, memory
from ..task import TaskSource
from ..training.trainer import Trainer
from .audit import AuditListener, AuditLog
from .federation import DEFAULT_FOLDER, Federation, announcement

_DEPARTURE_TIMEOUT = 5.0
"""Seconds that nodes have to leave after the run."""
_KEEP_ALIVE = 120
"""Seconds that a connection may be idle, once its answer is handed over but for the last of it."""
_SPARE = 64 * 2**20
_MODELS = 4
"""A reply has no more bytes than that many models and the spare ones: room for a mod's records."""
_WARNING = (
    "neither encrypted nor closed: anyone on the way may read and change the model, and anyone "
    "who reaches this port may join (--insecure)"
)


class ServeError(FedError):
    """A server that cannot start."""


@with_argument_hints
@devices.restore_default()
@randomness.restore_generators()
def serve(
    task: TaskSource,
    strategy: StrategySource | None = None,
    num_rounds: int | None = None,
    *,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    min_nodes: int | None = None,
    select_nodes: NodeSelectors | None = None,
    wait: float = 600.0,
    round_timeout: float = 3600.0,
    grace: float | None = None,
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
    host: str = address.DEFAULT_HOST,
    port: int = address.DEFAULT_PORT,
    insecure: bool = False,
    secure: bool = False,
    federation: Path | str = DEFAULT_FOLDER,
    announce: str | None = None,
    join_command: str = "mlx-fed join MODULE:TASK",
    name: str | None = None,
    runs: Path | str = "runs",
    resume: Path | str | None = None,
    change: Mapping[str, Any] | None = None,
    device: str | None = "cpu",
    audit: Path | str | None = None,
    listeners: tuple[Listener, ...] | None = None,
) -> Result:
    """Runs the server of a federation of machines; returns when the run is over.

    Nodes (:func:`mlx_fed.join`) may come before the server, after it and between rounds; when
    the run is finished, was stopped by Ctrl-C or has failed they are told and end. When the server
    ends otherwise they wait for the one that resumes the run.

    On other addresses than the loopback connections are encrypted and only nodes that the server
    knows by their keys take part. What that needs is made in the folder ``federation``, and a
    line is printed for each node that the run needs and that is not known yet.

    Args:
        task (Task or callable): What is trained, or a function of ``config`` that makes it.
        strategy (Strategy, str or callable, optional): Any Flower strategy, the name of one, or a
            function of ``config`` that returns one. Default: ``"FedAvg"``, of ``min_nodes`` nodes
            or 2.
        num_rounds (int, optional): Rounds to train. Default: ``num-rounds`` of ``config`` or
            else of the task, or 3.
        config (dict, optional): Settings that clients are sent with every message, over the
            task's own.
        seed (int): Decides initial weights, sampling, shuffling and dropout. Default: ``0``.
        min_nodes (int, optional): Nodes to wait for before each round. Default: as many as the
            strategy asks for.
        select_nodes (str or list, optional): Which nodes may take part, by name, node id or tag:
            ``"clinic-a,0-4,tag:hospital"``. Default: all; of a resumed run, those that it had.
        wait (float): Seconds to wait for them. Default: ``600``.
        round_timeout (float): Seconds that a phase may take; later replies are dropped.
            Default: ``3600``.
        grace (float, optional): Seconds that nodes have once half of them, and ``min_replies``,
            have replied; ``math.inf`` waits for all until the timeout. Default: 30 s, three times
            what that half needed, or as much as makes twice the node's own time, whichever is more.
        min_replies (int): Training replies that have to count in a round; with fewer it is
            repeated. Default: ``1``.
        max_repeats (int): How often a round is repeated before the run stops, to be resumed when
            more nodes are well. Default: ``2``.
        max_examples (float, optional): Limit of the number of examples that a reply may report,
            by which it is weighed. Default: 1,000 times the median of
            the others in the round, or 100,000, where there are three replies or more.
        max_update_norm (float, optional): Limit of an update's norm, in medians of the norms of
            all updates, where there are three or more; ``math.inf`` for none. Default: 100 times
            the median of the others', or as much as the norm of the model where that is more.
        compress (str, optional): Compression of updates, ``"int8"``, ``"int4"``, ``"int2"``,
            ``"int1"``, ``"topk:0.01"`` or ``"randk:0.01"``, or two as in ``"topk:0.01,int8"``.
            Default: the setting ``compress``, or none.
        keep (int): Checkpoints to keep, beside the best; 0 writes none. Default: ``3``.
        test (tuple, optional): Held-out examples of the server, as ``Data.test``: the task's loss
            and metrics of the global model on them are recorded each round.
        evaluate_fn (callable, optional): ``evaluate_fn(round, parameters, statistics)`` returns
            other metrics of the global model, or text such as a sample of what it writes. As
            ``evaluate_fn(round, arrays)`` it gets, as from Flower, an ``ArrayRecord`` in float32.
        patience (int, optional): The run ends after so many rounds without a new lowest loss, the
            loss by which the best round is chosen; 0 is no limit. Default: no limit.
        target (str or dict, optional): The run ends when a metric is reached:
            ``"accuracy=0.95"`` or more, ``"loss=0.1"`` or less, ``"ppl<=12"``, or all of
            ``{"accuracy": 0.95, "loss": 0.1}``. Default: none.
        stop (callable, optional): ``stop(rounds)`` gets the records of the rounds so far after
            each one, and ends the run with a reason, a text, or True.
        initial (Path, str or dict, optional): Initial weights in place of those that the seed
            draws: a safetensors file, such as the model of another run, or arrays by name.
        host (str): The address to listen on. Default: ``"127.0.0.1"``.
        port (int): The port; 0 takes a free one. Default: ``8080``.
        insecure (bool): On other addresses than the loopback: neither encrypt nor ask for keys.
        secure (bool): Encrypt and ask for keys on the loopback, too.
        federation (Path): The federation's folder. Default: ``"federation"``.
        announce (str, optional): ``HOST:PORT`` by which nodes reach the server. Default: this
            machine's address on its network.
        join_command (str): What a line for a node begins with.
        name (str, optional): The run's name, of the folder below ``runs``. Default: the time.
        runs (Path): Where runs are kept. Default: ``"runs"``.
        resume (str or Path, optional): Go on with the run of this name below ``runs``, or in this
            folder, from its last whole round; the rest of the arguments are as they were, but for
            ``num_rounds``, ``patience`` and ``target``, whose default is then what the run was
            started with.
        change (dict, optional): With ``resume``, settings of ``config`` that have another value
            from the next round on: ``{"learning-rate": 0.01}``.
        device (str, optional): ``"cpu"`` or ``"gpu"``, where the server aggregates.
        audit (Path, optional): The audit log, to which joins, refusals and rounds are appended.
            Default: ``audit.jsonl`` in the federation's folder, if nodes are known by keys.
        listeners (tuple, optional): Who is told what happens (see
            :mod:`mlx_fed.events`), in place of the progress display.

    Returns:
        Result: The final model, and a record of each round.

    Raises:
        FedError: If the server cannot start or the run cannot go on. What was reached is kept
            in the run's folder.

    Example:
        >>> result = serve(task, FedAvg(), num_rounds=3)
    """
    settings = RunSettings(**select_settings(locals()))
    if secure and insecure:
        raise ServeError("A server is either --secure or --insecure.")
    secure = secure or not (insecure or address.is_loopback(host))
    silence_flower()
    memory.retain_freed_memory()
    with _socket(host, port) as listening, listeners_or_terminal(listeners) as watching:
        port = listening.getsockname()[1]
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
            description={"engine": "fleet"},
        )
        history = setup.history
        registry = Federation(federation, announcement(announce, host, port)) if secure else None
        if audit is None and registry is not None:
            audit = registry.audit_log
        if audit is not None:
            history.listeners = (*history.listeners, AuditListener(AuditLog(audit)))
        waiting = Spool(history.folder / "waiting")
        with _frozen_heap(), _serving(listening, registry, host, waiting) as link:
            link.reply_limit = _reply_limit(setup.trainer)
            history.notify(ServerReady(address.join(host, port), secure))
            if insecure:
                history.notify(Notice(_WARNING))
            for node, token in _invitations(registry, setup.strategy, setup.settings).items():
                history.notify(NodeInvited(node, token, join_command))
            with _reporting_outcome(link):
                return loop.run(LinkGrid(link), *setup, resume=resume is not None)


def _socket(host: str, port: int) -> socket.socket:
    try:
        return http.listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"Port {port} is in use on {host}: end the other server or choose a --port."
            raise ServeError(why) from error
        raise ServeError(f"Cannot listen on {host}:{port}: {error}") from error


def _invitations(
    federation: Federation | None, strategy: Strategy, settings: RunSettings
) -> dict[str, str]:
    """Tokens by node name, for nodes that the run needs and that are not enrolled."""
    if federation is None:
        return {}
    num_nodes = max(settings.min_nodes or 1, strategies.least_nodes(strategy))
    return dict(federation.invite_missing(num_nodes))


def _reply_limit(trainer: Trainer) -> int:
    arrays = (*trainer.parameters().values(), *weights.get(trainer.slots.statistics).values())
    return _SPARE + _MODELS * sum(array.nbytes for array in arrays)


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Leaves the objects that are there now out of garbage collections.

    Connections leave cycles behind. Python collects these when they are a quarter of all objects,
    and a flood makes hundreds of megabytes of them until then.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _serving(
    listening: socket.socket,
    federation: Federation | None = None,
    host: str = "",
    spool: Spool | None = None,
) -> Iterator[Link]:
    """Context in which a thread serves the Fleet routes.

    With a federation's folder connections are encrypted, and only its nodes are answered.
    """
    max_connections = raise_file_limit()
    link = Link(spool, federation.nodes if federation else None)
    secure: dict[str, Any] = {}
    if federation is not None:
        context = federation.context(host)
        secure = {"ssl_context_factory": lambda config, default: context}
    config = http.configuration(
        FleetRoutes(link),
        http=LimitedHttpProtocol,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        date_header=False,
        **secure,
    )
    start_error = ServeError("The server's HTTP thread ended at its start.")
    try:
        with http.serve_in_thread(LimitedServer(config, max_connections), listening, start_error):
            yield link
    finally:
        link.close()


@contextlib.contextmanager
def _reporting_outcome(link: Link) -> Iterator[None]:
    """Context that reports the run's outcome to the nodes.

    What else ends a server (SIGTERM, a full disk, a defect) is no end of the run: nodes wait for
    the server that resumes it.
    """
    outcome = ""
    try:
        yield
        outcome = headers.FINISHED
    except KeyboardInterrupt:
        outcome = headers.STOPPED
        raise
    except RunError:
        outcome = headers.FAILED
        raise
    finally:
        link.finish(outcome)
        if outcome:
            _wait_for_departures(link)


def _wait_for_departures(link: Link) -> None:
    """Waits until the nodes have left."""
    deadline = time.monotonic() + _DEPARTURE_TIMEOUT
    while link.online() and time.monotonic() < deadline:
        last_count = link.news_count()
        if link.online():
            link.wait_for_news(last_count, 0.2)
