"""Hooks: a command or an HTTP request for chosen events of a run."""

from __future__ import annotations

import json
import logging
import queue
import shlex
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .. import events
from ..errors import FedError
from ..system.printable import printable

log = logging.getLogger(__name__)

EVENTS = {
    event.name: event
    for event in (
        events.RunStarted,
        events.NodesAwaited,
        events.NodeJoined,
        events.NodeLeft,
        events.NodeRefused,
        events.ReplyRefused,
        events.RoundFinished,
        events.RunFinished,
        events.RunAborted,
    )
}
"""The events that a hook can be for, by the names that they have with ``--json``."""
_TIMEOUT = 30.0
"""Seconds that a command or a request may take."""
_MOST_WAITING = 1000


class Hook:
    """Listener that runs a command, or sends a request, for events of one kind.

    It runs in a thread: neither a slow nor a failing hook holds up the run.

    Args:
        text (str): ``EVENT=COMMAND`` or ``EVENT=URL``. A command gets the event as JSON on its
            standard input, a URL as the body of a POST.

    Raises:
        FedError: If there is no such event, or the command cannot be read.
    """

    def __init__(self, text: str):
        name, _, self.target = text.partition("=")
        if name not in EVENTS or not self.target:
            raise FedError(
                f"A hook is EVENT=COMMAND or EVENT=URL, not {text!r}. The events are "
                f"{', '.join(EVENTS)}."
            )
        self.kind = EVENTS[name]
        self.is_url = self.target.startswith(("http://", "https://"))
        try:
            self.command = shlex.split(self.target)
        except ValueError as error:
            raise FedError(f"The command of the hook {text!r}: {error}.") from error
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, self.kind):
            with suppress(queue.Full):
                self._events.put_nowait({"event": event.name, **event.to_dict()})

    def end(self) -> None:
        """Lets the thread end after the events that wait."""
        with suppress(queue.Full):
            self._events.put_nowait(None)

    def join(self, deadline: float) -> None:
        """Waits for the thread until a time of ``time.monotonic()``: one that hangs is left."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (fields := self._events.get()) is not None:
            body = json.dumps(fields, default=str).encode()
            try:
                self._send(body)
            except subprocess.TimeoutExpired:
                log.warning("The hook for %s took more than %d seconds", self.kind.name, _TIMEOUT)
            except subprocess.CalledProcessError as error:  # whose text has the command's secrets
                log.warning("The hook for %s ended with %d", self.kind.name, error.returncode)
            except Exception as error:  # whatever is at the other end
                log.warning("The hook for %s failed: %s", self.kind.name, printable(str(error)))

    def _send(self, body: bytes) -> None:
        if self.is_url:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self.target, body, headers)
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
        else:
            subprocess.run(self.command, input=body, timeout=_TIMEOUT, check=True)


@contextmanager
def run_hooks(texts: Sequence[str]) -> Iterator[list[Hook]]:
    """The hooks of some texts, which end with the context.

    Raises:
        FedError: If a text is no hook.
    """
    hooks = [Hook(text) for text in texts]
    try:
        yield hooks
    finally:
        deadline = time.monotonic() + _TIMEOUT
        for hook in hooks:
            hook.end()
        for hook in hooks:
            hook.join(deadline)
