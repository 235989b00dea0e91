"""The page of a folder of runs, served while they go on.

It reads run folders and nothing else: the runs do not know of it. It answers on the loopback
unless told otherwise, only for folders right below the one it was given, and only to browsers
that asked for this machine by its address or name (DNS rebinding would make another site's page a
reader of the runs).
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

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..errors import FedError
from ..flower.connections import MOST_OF_PAGE, BoundedConnection, Server
from ..runs import folders, labels, round_record, status
from ..system import address, http
from ..system.atomic_files import open_plain
from .page import page, policy

_PAUSE = 1.0
"""Seconds between two questions of a page."""
_MOST_RUNS = 500
_MOST_BYTES = 2**18
"""Of a history, in one answer: as much as a page takes in without a pause that one sees."""
_LARGEST = 2**40
"""Of a history, which is read in pieces."""
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
    """A dashboard that cannot start."""


@contextmanager
def serving(
    folder: Path, host: str = "127.0.0.1", port: int = 8000, insecure: bool = False
) -> Iterator[str]:
    """Serves the page of the runs in a folder from a thread, for as long as the context lasts.

    Args:
        folder (Path): Where runs are kept; it need not be there yet.
        host (str): The address to listen on.
        port (int): The port; 0 takes a free one.
        insecure (bool): Allow addresses beyond this machine: whoever reaches them sees the runs.

    Yields:
        str: The page's address.

    Raises:
        DashboardError: If the port is in use, or the address is not to be had.
    """
    listening = _listening(host, port, insecure)
    config = uvicorn.Config(
        app(folder),
        http=BoundedConnection,
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
        ws="none",
        proxy_headers=False,
        server_header=False,
    )
    failed = DashboardError("The dashboard's thread ended at its start.")
    with http.running(Server(config, MOST_OF_PAGE), listening, failed):
        yield f"http://{address.join(host, listening.getsockname()[1])}/"


def serve_until_interrupted(folder: Path, host: str, port: int, insecure: bool) -> None:
    """Serves the page in the foreground, until Ctrl-C.

    Raises:
        FedError: If there is no such folder, or it cannot be served.
    """
    found = folders.folders(folder)
    with serving(folder, host, port, insecure) as shown, suppress(KeyboardInterrupt):
        print(f"Dashboard on {shown} ({len(found)} runs). Ctrl-C ends it.", flush=True)
        threading.Event().wait()


def _listening(host: str, port: int, insecure: bool) -> socket.socket:
    if not insecure and not address.is_loopback(host):
        raise DashboardError(
            f"{host} is not this machine only: whoever reaches it could watch the runs. On a "
            "network that you trust, say --insecure; or forward the port through SSH."
        )
    try:
        return http.listening(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DashboardError(
                f"Port {port} is in use on {host}: end what listens there, or give the dashboard "
                "another port; 0 takes a free one."
            ) from error
        raise DashboardError(f"The dashboard cannot listen on {host}:{port}: {error}") from error


# -- what it answers -----------------------------------------------------------------------


def app(folder: Path) -> _App:
    """The ASGI app of a folder of runs."""
    html = page({"live": True, "pause": _PAUSE})

    def root(request: Request) -> Response:
        return HTMLResponse(html)

    def index(request: Request) -> Response:
        found = _runs(folder)[:_MOST_RUNS]
        return _json({"runs": [{"name": each.name, "state": _state(each)} for each in found]})

    def one(request: Request) -> Response:
        found = _run(folder, request.path_params["name"])
        if found is None:
            return _json({"error": "no such run"}, 404)
        query = request.query_params
        start = query.get("start", "0")
        if not start.isascii() or not start.isdecimal() or len(start) > 18:
            return _json({"error": "start is a number of bytes"}, 400)
        try:
            return _json(_news(found, int(start), query.get("mark", ""), query.get("labels", "")))
        except OSError as error:  # removed meanwhile, or not to be read
            return _json({"error": error.strerror}, 404)

    routes = [Route("/", root), Route("/api/runs", index), Route("/api/runs/{name}", one)]
    return _for_this_machine(Starlette(routes=routes))


def _runs(folder: Path) -> list[Path]:
    """The folder's runs, without what only a link puts there."""
    try:
        found = folders.folders(folder)
    except (folders.RunsError, OSError):
        return []
    return [each for each in found if not each.is_symlink()]


def _run(folder: Path, name: str) -> Path | None:
    """The run of that name among :func:`_runs`."""
    try:
        if name not in {each.name for each in folder.iterdir()}:  # none leads elsewhere
            return None
    except OSError:
        return None
    found = folder / name
    return found if folders.is_run(found) and not found.is_symlink() else None


def _state(folder: Path) -> str:
    return str(status.read(folder).get("state", "recorded"))


def _news(folder: Path, start: int, mark: str, labels_mark: str) -> dict[str, Any]:
    """What a run's folder tells, and its history from the byte ``start`` on.

    A history that was written anew (the run was resumed) has another ``mark``, and is then told
    from its beginning. Labels are told where they have changed since ``labels_mark``.
    """
    known = folders.about(folder)
    labels_now = labels.changed(folder)
    if labels_now != labels_mark:
        known["labels"] = labels.read(folder)
    path = folder / "history.jsonl"
    lines: list[bytes] = []
    end, more = 0, False
    now = ""
    if path.exists():
        with open_plain(path, _LARGEST) as file:
            now = f"{os.fstat(file.fileno()).st_ino}"
            size = file.seek(0, 2)
            anew = mark != now or start > size
            end = 0 if anew else start
            file.seek(end)
            chunk = file.read(_MOST_BYTES)
            if b"\n" not in chunk:
                chunk += file.readline()
            whole = chunk.rfind(b"\n") + 1
            more = end + whole < size and whole > 0
            if not whole and known["status"].get("state") not in ("running", "waiting"):
                whole = len(chunk)  # a last line that nobody will complete
            lines = chunk[:whole].splitlines()
            end += whole
    else:
        anew = start > 0
    return {
        **known,
        "lines": [line.decode("utf-8", "replace") for line in lines],
        "end": end,
        "more": more,
        "anew": anew,
        "mark": now,
        "labels_mark": labels_now,
    }


def _json(value: Any, code: int = 200) -> Response:
    return Response(round_record.to_json(value), code, media_type="application/json")


def _for_this_machine(inner: _App) -> _App:
    """Refuses requests by another machine's name, and adds what keeps a browser strict."""

    async def answer(scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return

        async def send_strict(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                strict = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *strict]
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if not _is_ours(host):
            refusal = Response("This dashboard is asked for by an address of its machine.", 421)
            await refusal(scope, receive, send_strict)
            return
        await inner(scope, receive, send_strict)

    return answer


def _is_ours(host: str) -> bool:
    """Whether a Host header names this machine: an address, which no other site's name is, or a
    name that it has itself."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = platform.node().lower()
        return name in ("localhost", own, f"{own.removesuffix('.local')}.local")
    return True
