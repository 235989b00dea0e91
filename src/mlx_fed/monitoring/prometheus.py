"""Metrics of a run for Prometheus, and its health, on a separate HTTP address.

``/metrics`` has Prometheus' text format, version 0.0.4. ``/healthz`` answers 200 while the run goes
on or has finished, and 503 when an exception has ended it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from .. import events
from ..errors import FedError
from ..flower.connections import MAX_PAGE_CONNECTIONS, LimitedHttpProtocol, LimitedServer
from ..runs import round_record
from ..system import address, http

_HELP = {
    "up": "Whether the run has not been ended by an exception.",
    "round": "The last round that is finished.",
    "rounds": "The number of rounds of the run.",
    "nodes": "Nodes that participate.",
    "nodes_left_total": "Times that a node's connection ended.",
    "nodes_refused_total": "Nodes that were refused.",
    "replies_refused_total": "Replies that did not count, or that did not come, by phase.",
    "phase_seconds_total": "Seconds by phase.",
    "bytes_total": "Bytes of arrays sent to nodes (down) and received (up).",
    "last_round_timestamp_seconds": "When the last round was finished.",
    "metric": "Metrics of the last round, by phase.",
}
"""The metrics by name, without ``mlx_fed_``."""


class PrometheusListener:
    """Listener of a run that keeps what ``/metrics`` shows."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {("up", ()): 1.0}
        self._lock = threading.Lock()

    @property
    def is_healthy(self) -> bool:
        """Whether no exception has ended the run."""
        return bool(self._values["up", ()])

    def __call__(self, event: events.Event) -> None:
        with self._lock:
            match event:
                case events.NodesAwaited() | events.NodeJoined():
                    self._set("nodes", event.nodes)
                case events.NodeLeft():
                    self._add("nodes", -1)
                    self._add("nodes_left_total", 1)
                case events.NodeRefused():
                    self._add("nodes_refused_total", 1)
                case events.ReplyRefused():
                    self._add("replies_refused_total", 1, phase=event.phase)
                case events.PhaseStarted():
                    self._set("rounds", event.of)
                case events.RoundFinished():
                    self._add_round(event.record)
                case events.RunAborted():
                    self._set("up", 0)

    def text(self) -> str:
        """The metrics in Prometheus' text format."""
        lines = []
        with self._lock:
            for name, description in _HELP.items():
                kind = "counter" if name.endswith("_total") else "gauge"
                samples = [(labels, v) for (key, labels), v in self._values.items() if key == name]
                if samples:
                    lines.append(f"# HELP mlx_fed_{name} {description}")
                    lines.append(f"# TYPE mlx_fed_{name} {kind}")
                for labels, value in samples:
                    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                    lines.append(
                        f"mlx_fed_{name}{{{inner}}} {value!r}"
                        if inner
                        else f"mlx_fed_{name} {value!r}"
                    )
        return "\n".join(lines) + "\n"

    def _add_round(self, record: dict[str, Any]) -> None:
        # Nodes name metrics: those of earlier rounds would stay, and become more and more.
        self._values = {key: value for key, value in self._values.items() if key[0] != "metric"}
        self._set("last_round_timestamp_seconds", time.time())
        self._set("round", record["round"])
        for name, value in round_record.figures(record).items():
            phase, _, remainder = name.partition("/")
            if phase == "seconds":
                self._add("phase_seconds_total", value, phase=remainder)
            elif phase == "bytes":
                self._add("bytes_total", value, direction=remainder)
            elif remainder:
                self._set("metric", value, phase=phase, name=remainder)

    def _set(self, name: str, value: float, /, **labels: str) -> None:
        self._values[name, tuple(labels.items())] = float(value)

    def _add(self, name: str, value: float, /, **labels: str) -> None:
        key = name, tuple(labels.items())
        self._values[key] = self._values.get(key, 0.0) + value


@contextmanager
def serve_metrics(where: str) -> Iterator[PrometheusListener]:
    """Serves ``/metrics`` and ``/healthz`` while the context lasts.

    Args:
        where (str): ``HOST:PORT``, or a port of the loopback address.

    Raises:
        FedError: If the address is none, or in use.
    """
    host, port = address.parse(where if ":" in where else f"{address.DEFAULT_HOST}:{where}")
    listener = PrometheusListener()

    async def metrics(request: Request) -> PlainTextResponse:
        return PlainTextResponse(listener.text(), media_type="text/plain; version=0.0.4")

    async def health(request: Request) -> PlainTextResponse:
        healthy = listener.is_healthy
        return PlainTextResponse("ok" if healthy else "stopped", 200 if healthy else 503)

    app = Starlette(routes=[Route("/metrics", metrics), Route("/healthz", health)])
    try:
        opened = http.listen(host, port)
    except OSError as error:
        raise FedError(f"Cannot serve metrics on {address.join(host, port)}: {error}") from error
    config = http.configuration(app, http=LimitedHttpProtocol, timeout_graceful_shutdown=1)
    start_error = FedError("The server of the metrics ended at its start.")
    with http.serve_in_thread(LimitedServer(config, MAX_PAGE_CONNECTIONS), opened, start_error):
        yield listener


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
