"""Dashboard: a web page of a folder of runs, served while they run.

It reads run folders and nothing else. It listens on the loopback address by default, serves only
folders directly below the given one, and answers only requests whose Host header names this
machine (against DNS rebinding, by which another site's page would read the runs).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import platform
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..errors import FedError
from ..flower.connections import MAX_PAGE_CONNECTIONS, LimitedHttpProtocol, LimitedServer
from ..runs import folders, labels, round_record
from ..runs.run_summary import RunSummary
from ..system import address, http
from ..system.atomic_files import open_regular_file
from .page import page, policy

_PAUSE = 1.0
"""Seconds between two requests of a page."""
_MAX_RUNS = 500
_ACTIVE = ("running", "waiting")
_MAX_CHUNK = 2**18
"""Bytes of a history in one response: a page draws them without a visible pause."""
_MAX_HISTORY = 2**40
"""Bytes of a history, which is read in chunks."""
_HEADERS = {
    "Content-Security-Policy": policy() + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class DashboardError(FedError):
    """The dashboard cannot start."""


@contextmanager
def serving(
    folder: Path, host: str = "127.0.0.1", port: int = 8000, insecure: bool = False
) -> Iterator[str]:
    """Dashboard of a folder of runs, served from a thread until the context ends.

    Args:
        folder (Path): The folder of runs; it need not exist yet.
        host (str): The address to listen on.
        port (int): The port; 0 is any free port.
        insecure (bool): Allow other addresses than the loopback: everyone who reaches them can
            read the runs.

    Yields:
        str: The page's URL.

    Raises:
        DashboardError: If the port is in use, or the machine does not have the address.
    """
    listener = _listen(host, port, insecure)
    config = http.configuration(app(folder), http=LimitedHttpProtocol, timeout_graceful_shutdown=1)
    error = DashboardError("The dashboard's thread ended at its start.")
    with http.serve_in_thread(LimitedServer(config, MAX_PAGE_CONNECTIONS), listener, error):
        yield f"http://{address.join(host, listener.getsockname()[1])}/"


def serve_until_interrupted(folder: Path, host: str, port: int, insecure: bool) -> None:
    """Serves the dashboard in the foreground, until Ctrl-C.

    Raises:
        FedError: If the folder does not exist, or the dashboard cannot start.
    """
    num_runs = len(folders.list_runs(folder))
    with serving(folder, host, port, insecure) as url, suppress(KeyboardInterrupt):
        print(f"Dashboard on {url} ({num_runs} runs). Ctrl-C ends it.", flush=True)
        threading.Event().wait()


def _listen(host: str, port: int, insecure: bool) -> socket.socket:
    if not insecure and not address.is_loopback(host):
        raise DashboardError(
            f"{host} is not this machine only: everyone who reaches it could read the runs. On a "
            "network that you trust, add --insecure; or forward the port through SSH."
        )
    try:
        return http.listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DashboardError(
                f"Port {port} is in use on {host}: end the program that listens there, or give the "
                "dashboard another port; 0 is any free port."
            ) from error
        raise DashboardError(f"The dashboard cannot listen on {host}:{port}: {error}") from error


# -- requests and responses ----------------------------------------------------------------


def app(folder: Path) -> _App:
    """ASGI application of the dashboard: the page, the list of runs, and one run."""
    html = page({"live": True, "pause": _PAUSE})
    summaries = _Summaries()

    def root(request: Request) -> Response:
        return HTMLResponse(html)

    def list_runs(request: Request) -> Response:
        paths = _runs(folder)[:_MAX_RUNS]
        return _json({"runs": [{"name": path.name, **summaries.read(path)} for path in paths]})

    def show_run(request: Request) -> Response:
        path = _run(folder, request.path_params["name"])
        if path is None:
            return _json({"error": "no such run"}, 404)
        query = request.query_params
        start = query.get("start", "0")
        if not start.isascii() or not start.isdecimal() or len(start) > 18:
            return _json({"error": "start is a number of bytes"}, 400)
        file_id, version = query.get("file_id", ""), query.get("labels", "")
        try:
            return _json(_changes(path, int(start), file_id, version))
        except OSError as error:  # removed in the meantime, or not readable
            return _json({"error": error.strerror}, 404)

    routes = [
        Route("/", root),
        Route("/api/runs", list_runs),
        Route("/api/runs/{name}", show_run),
    ]
    return _for_this_machine(Starlette(routes=routes))


def _runs(folder: Path) -> list[Path]:
    """The runs in a folder, symbolic links excluded."""
    try:
        return [path for path in folders.list_runs(folder) if not path.is_symlink()]
    except (folders.RunsError, OSError):
        return []


def _run(folder: Path, name: str) -> Path | None:
    """The run of that name among :func:`_runs`."""
    try:
        if name not in {path.name for path in folder.iterdir()}:  # such as "..", which leads out
            return None
    except OSError:
        return None
    path = folder / name
    return path if folders.is_run(path) and not path.is_symlink() else None


class _Summaries:
    """State, settings and summary of runs for their list; of a history only new lines are read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.positions: dict[Path, tuple[int, str, RunSummary]] = {}

    def read(self, folder: Path) -> dict[str, Any]:
        """``state``, ``settings`` and ``summary`` of the run in a folder."""
        try:
            state = folders.read_state(folder)
            is_active = state["status"].get("state") in _ACTIVE
            with self.lock:
                summary = self._summary(folder, is_active)
        except OSError:  # removed in the meantime, or not readable
            return {"state": "recorded", "settings": {}, "summary": RunSummary().to_dict()}
        settings = {key: state["settings"].get(key) for key in ("num_rounds", "strategy")}
        run_state = str(state["status"].get("state", "recorded"))
        return {"state": run_state, "settings": settings, "summary": summary}

    def _summary(self, folder: Path, is_active: bool) -> dict[str, Any]:
        end, file_id, summary = self.positions.get(folder, (0, "", RunSummary()))
        has_more = True
        while has_more:
            chunk = _read_history(folder / "history.jsonl", end, file_id, is_active)
            if chunk["reset"]:
                summary = RunSummary()
            for line in chunk["lines"]:
                with suppress(ValueError):  # damaged: the page counts those of a run it shows
                    summary.add(round_record.from_line(line))
            end, file_id, has_more = chunk["end"], chunk["file_id"], chunk["more"]
        self.positions[folder] = end, file_id, summary
        return summary.to_dict()


def _changes(folder: Path, start: int, file_id: str, labels_version: str) -> dict[str, Any]:
    """A run's settings and status, its history from the byte ``start`` on, and its labels if their
    version is another than ``labels_version``.

    A resumed run has a new history file: its ``file_id`` differs, and the history is sent from its
    first byte (``reset``).
    """
    changes = folders.read_state(folder)
    changes["labels_version"] = labels.version(folder)
    if changes["labels_version"] != labels_version:
        changes["labels"] = labels.read(folder)
    is_active = changes["status"].get("state") in _ACTIVE
    return changes | _read_history(folder / "history.jsonl", start, file_id, is_active)


def _read_history(path: Path, start: int, file_id: str, is_active: bool) -> dict[str, Any]:
    """Complete lines of a history from the byte ``start`` on, at most :data:`_MAX_CHUNK` bytes or
    one line."""
    if not path.exists():
        return {"lines": [], "end": 0, "more": False, "reset": start > 0, "file_id": ""}
    with open_regular_file(path, _MAX_HISTORY) as file:
        inode = str(os.fstat(file.fileno()).st_ino)
        size = file.seek(0, 2)
        reset = file_id != inode or start > size
        start = 0 if reset else start
        file.seek(start)
        chunk = file.read(_MAX_CHUNK)
        if b"\n" not in chunk:
            chunk += file.readline()
    length = chunk.rfind(b"\n") + 1
    if not length and not is_active:
        length = len(chunk)  # a last line that no process will complete
    return {
        "lines": [line.decode("utf-8", "replace") for line in chunk[:length].splitlines()],
        "end": start + length,
        "more": length > 0 and start + length < size,
        "reset": reset,
        "file_id": inode,
    }


def _json(value: Any, status_code: int = 200) -> Response:
    return Response(round_record.to_json(value), status_code, media_type="application/json")


def _for_this_machine(inner: _App) -> _App:
    """ASGI middleware that refuses other Host headers and adds the security headers."""
    headers = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

    async def respond(scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        text = "The Host header has to be an address or a name of the dashboard's machine."
        app = inner if _is_this_machine(host) else Response(text, 421)
        await app(scope, receive, send_with_headers)

    return respond


def _is_this_machine(host: str) -> bool:
    """Whether a Host header is an IP address, which is no other site's name, or a name of this
    machine."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        node = platform.node().lower()
        return name in ("localhost", node, f"{node.removesuffix('.local')}.local")
    return True
