"""Resident node (client): registers with a server and answers its messages until the run ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict

from .. import clientapp
from ..arrays.flower_records import records_in
from ..arrays.spool import Spool
from ..errors import FedError
from ..events import (
    Listener,
    MessageAnswered,
    MessageFailed,
    MessageReceived,
    NodeFinished,
    ServerAwaited,
    ServerJoined,
    ServerLost,
)
from ..flower import headers
from ..flower.error_replies import error_reply
from ..flower.fleet_client import FleetClient
from ..flower.transport import RequestRefused, Unavailable, Unreachable, UntrustedServer
from ..rounds import messages
from ..system import address
from ..tracebacks import failure_reason, location, user_traceback
from . import certificates
from .identity import Identity
from .model_size import ModelSize

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
    """The run failed on its server."""

    exit_code = 4


class ResidentNode:
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
