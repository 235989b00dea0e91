"""A resident node (client): registers with a server and answers its messages until the run ends.

The model is built, its programs are compiled and the data is loaded once. No code is sent: the node
runs its own task.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict

from .. import clientapp
from ..arrays import examples, randomness
from ..arrays.flower_records import records_in
from ..arrays.spool import Spool
from ..errors import FedError
from ..events import (
    Listener,
    MessageAnswered,
    MessageFailed,
    MessageReceived,
    NodeFinished,
    NodeReady,
    Notice,
    ServerAwaited,
    ServerJoined,
    ServerLost,
)
from ..flower import headers
from ..flower.error_replies import error_reply
from ..flower.fleet_client import FleetClient
from ..flower.log import silence_flower
from ..flower.transport import RequestRefused, Unavailable, Unreachable, UntrustedServer
from ..monitoring.node_terminal import node_listener_or_terminal
from ..rounds import coverage, messages
from ..rounds.roster import LONGEST_NAME, is_name, join_tags
from ..rounds.settings import with_argument_hints
from ..settings_check import KINDS, check_config, whole_number
from ..system import address, devices, memory
from ..task import Data, Task, TaskSource, make_task
from ..task_settings import TracedConfig
from ..tracebacks import failure_reason, location, user_traceback
from ..training import batches
from ..training.step_progress import StepProgress
from . import certificates
from .identity import Identity, from_files, from_token
from .model_size import ModelSize
from .policy import Policy
from .policy_file import policy_and_log
from .policy_gate import Gate, ask_at_terminal, logged

_BEAT = 2.0
"""Seconds between heartbeats."""
_MAX_PAUSE = 1.0
_CONFLICT_TIME = 30.0
"""Seconds after which a server has noticed that a node before this one, with its key, is gone."""


class JoinError(FedError):
    """A node that could not register, or had to leave before the run's end."""


class RunStopped(JoinError):
    """The operator of the server has stopped the run."""

    exit_code = 3


class RunFailed(JoinError):
    """The run cannot go on."""

    exit_code = 4


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
        app = clientapp.raising_app(
            _with_data(built_task, data),
            mods,
            gates,
            [gate.clip for gate in gates],
            note,
            progress=partial(StepProgress, notify, steps_per_report),
        )
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
            _ResidentNode(client, app, node_config, credentials, wait, notify, model_size).run()


def _once(notify: Callable[[str], None]) -> Callable[[str], None]:
    """The same function, called once for each text."""
    return lru_cache(maxsize=1000)(notify)


def _with_data(task: Task, data: Data) -> Task:
    return replace(task, data=lambda partition_id, num_partitions: data)


class _ResidentNode:
    """State of a node across messages."""

    def __init__(
        self,
        client: FleetClient,
        app: Callable[[Message, Context], Message],
        node_config: dict[str, Any],
        credentials: Identity,
        wait: float,
        listener: Listener,
        model_size: ModelSize,
    ):
        self.model_size = model_size
        self.client, self.app, self.node_config = client, app, node_config
        self.identity, self.wait, self.listener = credentials, wait, listener
        self.server = address.join(credentials.host, credentials.port)
        self.client_states: dict[str, RecordDict] = {}
        self.failures: set[tuple[type, tuple[str, int] | None]] = set()
        self.spool = Spool()

    def run(self) -> None:
        self._register()
        try:
            with TemporaryDirectory(prefix="mlx-fed-node-") as folder, self._heartbeat():
                self.spool = Spool(Path(folder))
                self._answer_messages()
        finally:
            self.client.leave()
        if self.client.outcome == headers.STOPPED:
            raise RunStopped(f"The run was stopped on its server, {self.server}.")
        if self.client.outcome == headers.FAILED:
            raise RunFailed(f"The run failed. Its server, {self.server}, says why.")
        self.listener(NodeFinished())

    def _answer_messages(self) -> None:
        pause = 0.0
        while not self.client.outcome:
            message = self._retry(self.client.receive)
            if message is not None:
                pause = 0.0
                self._answer(message)
            elif not self.client.outcome:
                # A stock SuperLink answers at once, with nothing: ask more and more seldom.
                if self._retry(self.client.run_has_ended):
                    return
                pause = min(2 * pause + 0.05, _MAX_PAUSE)
                time.sleep(pause)

    def _answer(self, message: Message) -> None:
        kind, run_id = message.metadata.message_type, message.metadata.run_id
        _, config = messages.config_of(message.content)
        if kind == messages.LEAVE:
            raise JoinError(
                f"The server at {self.server} sent this node away: {config.get('reason')!s}"
            )
        # A run that goes on is another one to Flower: only its server knows that it is the same.
        client_state = self.client_states.setdefault(
            str(config.get("run-id", run_id)), RecordDict()
        )
        context = Context(run_id, self.client.node_id, self.node_config, client_state, {})
        number = config.get("server-round")
        server_round = number if isinstance(number, int) else None
        self.listener(MessageReceived(kind, server_round))
        start_time = time.monotonic()
        # The node stays when it fails: it may be the data of one round, or one bad message. Here
        # it is told what the exception says, whatever the server is told.
        try:
            reply = self.app(message, context)
            if kind == messages.ROLL_CALL and reply.has_content():
                self.model_size.take_answer(reply)
            if reply.has_error():
                self.listener(MessageFailed(kind, server_round, reply.error.reason or ""))
        except Exception as error:
            reason, text = failure_reason(error), self._new_traceback(error)
            self.listener(MessageFailed(kind, server_round, reason, text))
            with_text = bool(self.node_config.get(clientapp.SHARE_ERRORS))
            reply = error_reply(message, error, with_text)
        reply = clientapp.named_failure(reply, message, context)
        self.spool.put_message(client_state)
        seconds = time.monotonic() - start_time
        self._retry(lambda: self.client.send(reply, seconds))
        records = records_in(reply.content, MetricRecord) if reply.has_content() else {}
        metrics = dict(next(iter(records.values()), {}))
        self.listener(MessageAnswered(kind, server_round, seconds, metrics))

    def _new_traceback(self, error: Exception) -> str:
        """The traceback of the task's code, once for each type and line; empty after that."""
        failure = type(error), location(error)
        if isinstance(error, FedError) or failure in self.failures:
            return ""
        self.failures.add(failure)
        return user_traceback(error)

    # -- the connection --------------------------------------------------------------------

    def _register(self) -> None:
        deadline = time.monotonic() + self.wait
        conflict_time: float | None = None
        pause = 0.1
        is_waiting = False
        while True:
            try:
                self.client.register()
            except (UntrustedServer, certificates.CertificateError) as error:
                raise JoinError(
                    f"{self.server} is not the server that this node trusts: {error}. It may have "
                    "been set up anew (ask for a token), or somebody is in between."
                ) from error
            except Unreachable as error:
                if not is_waiting and self.identity.authority is None:
                    self._require_plaintext()
                if time.monotonic() + pause > deadline:
                    raise JoinError(
                        f"No server at {self.server} within {self.wait:.0f} seconds "
                        f"({error}). Start it, or name another with --server HOST:PORT."
                    ) from error
                if not is_waiting:
                    self.listener(ServerAwaited(self.server, self.wait, str(error)))
                    is_waiting = True
                time.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE)
                conflict_time = None  # it may have been heard, and the answer was lost
            except RequestRefused as error:
                if error.status == HTTPStatus.CONFLICT:
                    # That node may be this one, or its last process that was killed just now.
                    conflict_time = conflict_time or time.monotonic()
                    if time.monotonic() - conflict_time < _CONFLICT_TIME:
                        time.sleep(_MAX_PAUSE)
                        continue
                raise JoinError(
                    f"The server at {self.server} refused this node: {error}"
                ) from error
            else:
                self.listener(ServerJoined(self.server))
                return

    def _require_plaintext(self) -> None:
        if certificates.speaks_tls(self.identity.host, self.identity.port, self.identity.proxy):
            raise JoinError(
                f"The server at {self.server} encrypts: join with a token, which it prints and "
                "`mlx-fed nodes add NAME` makes there, or with --root-certificates."
            )

    def _retry(self, request: Callable[[], Any]) -> Any:
        """A request, retried while the server cannot be reached.

        ``None`` where the run has ended meanwhile, or is another one now.
        """
        loss_time = None
        pause = 0.1
        while True:
            try:
                return request()
            except Unreachable as error:
                if self.client.outcome:  # a heartbeat was told so before the server went
                    return None
                if loss_time is None:
                    loss_time = time.monotonic()
                    self.listener(ServerLost(self.server, str(error)))
                # One that answers other requests, or parts of this one, is there; not so where its
                # answer to this one is that it cannot.
                is_down = isinstance(error, Unavailable)
                last_response = loss_time if is_down else max(loss_time, self.client.last_response)
                if time.monotonic() > last_response + self.wait:
                    raise JoinError(
                        f"The server at {self.server} has been gone for {self.wait:.0f} seconds "
                        f"({error})."
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE)
            except RequestRefused as error:
                if error.status == 403:  # the run ended while this node was at work
                    return None
                if error.status == 401:  # a server that was started again knows no node
                    self._register()
                    return None
                raise JoinError(f"The server at {self.server} said: {error}") from error

    @contextmanager
    def _heartbeat(self) -> Any:
        stop = threading.Event()

        def beat() -> None:
            pause = 0.0
            while not stop.wait(pause):
                start_time = time.monotonic()
                try:
                    self.client.heartbeat()
                    # A server of ours has held the beat for longer than the pause.
                    pause = max(0.0, _BEAT - (time.monotonic() - start_time))
                except (Unreachable, RequestRefused):
                    # What is wrong is for the main thread to act on. It may be at work, and the
                    # server takes a node whose connections broke for gone within a second.
                    pause = min(2 * pause + 0.1, _BEAT)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
