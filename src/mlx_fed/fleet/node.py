"""Join a federation: the checks of a node, its data and its policy, before it registers.

The model is built, its programs are compiled and the data is loaded once. No code is sent: the node
runs its own task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from .. import clientapp
from ..arrays import examples, randomness
from ..events import (
    Listener,
    NodeReady,
    Notice,
)
from ..flower.fleet_client import FleetClient
from ..flower.log import silence_flower
from ..monitoring.node_terminal import node_listener_or_terminal
from ..rounds import coverage
from ..rounds.roster import LONGEST_NAME, is_name, join_tags
from ..rounds.settings import with_argument_hints
from ..settings_check import KINDS, check_config, whole_number
from ..system import address, devices, memory
from ..task import Data, Task, TaskSource, make_task
from ..task_settings import TracedConfig
from ..training import batches
from ..training.step_progress import StepProgress
from .identity import from_files, from_token
from .model_size import ModelSize
from .policy import Policy
from .policy_file import policy_and_log
from .policy_gate import Gate, ask_at_terminal, logged
from .resident_node import JoinError, ResidentNode


@with_argument_hints
@devices.restore_default()
@randomness.restore_generators()
def join(
    task: TaskSource,
    server: str | None = None,
    *,
    token: str | None = None,
    partition_id: int | None = None,
    num_partitions: int | None = None,
    name: str | None = None,
    tags: Sequence[str] | None = None,
    device: str | None = None,
    config: dict[str, Any] | None = None,
    mods: Sequence[Any] | None = None,
    insecure: bool = False,
    identity: Path | str | None = None,
    root_certificates: Path | str | None = None,
    key: Path | str | None = None,
    wait: float = 600.0,
    share_errors: bool = False,
    policy: Policy | Path | str | None = None,
    audit: Path | str | None = None,
    steps_per_report: int | None = None,
    listener: Listener | None = None,
) -> None:
    """Runs a federated learning client with this machine's data until the run is over.

    The server may be one of ours (:func:`mlx_fed.serve`) or a stock Flower SuperLink. Until it
    is up, and when it ends without the run being over or the connection is lost, the node tries
    again.

    Args:
        task (Task or callable): What is trained, or a function of ``config`` that makes it.
        server (str, optional): ``HOST:PORT``. Default: the token's, or ``"127.0.0.1:8080"``.
        token (str, optional): What the server printed for this node. It enrols the first time,
            and says which server to trust each time.
        partition_id (int, optional): Which part of the data this node holds; each node of a run
            has its own. Default: the token's number, or ``0``.
        num_partitions (int, optional): Of how many parts, where the data is partitioned.
        name (str, optional): How the server calls this node. Default: the token's, or
            ``"node-0"`` and so on.
        tags (list, optional): What the server may select this node by: ``["hospital", "europe"]``.
        device (str, optional): ``"gpu"`` or ``"cpu"``. Default: MLX's own choice.
        config (dict, optional): What ``task`` is made from, if it is a function. All else that is
            trained with is the server's to set.
        mods (list, optional): Flower mods around training.
        insecure (bool): Allow plaintext beyond the loopback.
        identity (Path, optional): Where the key that belongs to the token is kept.
            Default: a folder below ``~/.mlx-fed``.
        root_certificates (Path, optional): Without a token: whom the server's certificate has to
            be from (PEM).
        key (Path, optional): Without a token: this node's private key (PEM), which the server
            knows already.
        wait (float): Seconds to keep trying to reach the server. Default: ``600``.
        share_errors (bool): Tell the server what an exception of the task says, which may hold
            data. Default: only its type, and the line of the task that raised it.
        policy (Policy or Path, optional): What the server may ask of this node, or the file that
            has it: see :mod:`mlx_fed.fleet.policy_file`.
        audit (Path, optional): The audit log, to which each request, reply and refusal is appended.
            Default: beside the policy's file, ``policy.audit.jsonl``; none without a policy's file.
        steps_per_report (int, optional): Steps of a training between two reports on them.
            Default: a report a second.
        listener (callable, optional): Called with each event of the node (see
            :mod:`mlx_fed.events`), in place of the lines on the terminal.

    Raises:
        PolicyRefusal: If the policy does not allow the server, or the data has too few examples.
        JoinError: If the server is not reached in time, or sends this node away.
        RunStopped: If the run was stopped on its server.
        RunFailed: If the run failed there.
        FedError: If the data, the device or the task is not usable.

    Example:
        >>> join(task, partition_id=0)
    """
    if token is not None:
        if root_certificates or key:
            raise JoinError("A token says whom to trust: leave out certificates and key.")
        folder = Path(identity) if identity else None
        credentials = from_token(token, server, folder)
    else:
        files = (Path(path) if path else None for path in (root_certificates, key))
        default = address.join(address.DEFAULT_HOST, address.DEFAULT_PORT)
        credentials = from_files(server or default, *files)
    is_open = credentials.authority is None and not address.is_loopback(credentials.host)
    if is_open and not insecure:
        raise address.AddressError(
            f"{credentials.host} is not this machine: join with a token, which the server prints "
            "and `mlx-fed nodes add NAME` makes there, or with --root-certificates."
        )
    if credentials.name is not None and name not in (None, credentials.name):
        raise JoinError(
            f"The token is for {credentials.name}: leave out the name, or ask for another."
        )
    name = credentials.name if name is None else name
    if steps_per_report is not None:
        whole_number(1).check("", "steps_per_report", steps_per_report)
    if partition_id is None:
        partition_id = credentials.number or 0
    clientapp.check_partition(partition_id, num_partitions)
    if name is not None and not is_name(name):
        raise JoinError(
            f"A node's name has 1 to {LONGEST_NAME} printable characters: {name!r:.90}."
        )
    server = address.join(credentials.host, credentials.port)
    rules, log = policy_and_log(policy, audit)
    rules.check_server(server)
    silence_flower()
    memory.retain_freed_memory()
    where = devices.use(device)
    node_config: dict[str, Any] = {
        "partition-id": partition_id,
        clientapp.SHARE_ERRORS: share_errors,
    }
    if num_partitions is not None:
        node_config["num-partitions"] = num_partitions
    if name is not None:
        node_config["name"] = name
    if tags:
        node_config["tags"] = join_tags(tags)
    with node_listener_or_terminal(listener) as notify:
        if is_open:
            notify(
                Notice(f"not encrypted: {credentials.host} and all between may read and change it")
            )
        settings = TracedConfig.of(config)
        built_task = make_task(task, settings)
        data = batches.load(built_task, partition_id, num_partitions)
        if not callable(data.train) and examples.count(data.train) == 0:
            raise JoinError(f"Partition {partition_id} has no training examples: see Task.data.")
        check_config(settings, built_task, [] if isinstance(task, Task) else [task])
        servers = (KINDS.keys() | built_task.config.keys()) & dict.keys(
            settings
        ) - settings.looked_up
        if servers:
            names = ", ".join(sorted(servers))
            notify(Notice(f"{names}: the server's values are trained with, not this node's"))
        notify(NodeReady(where, partition_id))
        note = _once(lambda text: notify(Notice(text)))
        if private := coverage.name_of_private(mods or ()):
            note(coverage.note(private, built_task))
        rules.check_data(data)
        gates = [Gate(rules, server, log, ask_at_terminal)] if log or rules != Policy() else []
        app: Callable[[Message, Context], Message] = clientapp.raising_app(
            _with_data(built_task, data),
            mods,
            (),
            [gate.clip for gate in gates],
            note,
            progress=partial(StepProgress, notify, steps_per_report),
        )
        for gate in gates:  # requests that the app does not know are recorded, too
            app = partial(gate, call_next=app)
        if (proxy := credentials.proxy) is not None:
            notify(Notice(f"through the proxy {address.join(proxy.host, proxy.port)}"))
        model_size = ModelSize(built_task)
        client = FleetClient(
            credentials.host,
            credentials.port,
            credentials.context,
            credentials.key,
            credentials.invitation,
            proxy,
            model_size,
        )
        with logged(log, server=server, node=name):
            ResidentNode(client, app, node_config, credentials, wait, notify, model_size).run()


def _once(notify: Callable[[str], None]) -> Callable[[str], None]:
    """The same function, called once for each text."""
    return lru_cache(maxsize=1000)(notify)


def _with_data(task: Task, data: Data) -> Task:
    return replace(task, data=lambda partition_id, num_partitions: data)
