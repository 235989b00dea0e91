"""A Hugging Face hub of this machine, with the files of one folder and little haste."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

_COMMIT = 40 * "a"


class _Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    seconds: float
    given: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/"):
            self._answer(json.dumps(self._known("/tree/" in path)).encode())
            return
        file = self.folder / path.partition(f"/resolve/{_COMMIT}/")[2]
        if not file.is_file():
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.given.append(file.name)
        content = file.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(content, 200, {"ETag": tag, "X-Repo-Commit": _COMMIT}, self.seconds)

    def _known(self, of_files: bool) -> Any:
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        if of_files:
            oid = 40 * "b"
            return [
                {"type": "file", "oid": oid, "size": size, "path": name}
                for name, size in sizes.items()
            ]
        return {"id": "org/it", "sha": _COMMIT, "siblings": [{"rfilename": n} for n in sizes]}

    def _answer(
        self,
        content: bytes,
        code: int = 200,
        headers: Mapping[str, str] = MappingProxyType({}),
        seconds: float = 0.0,
    ) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            time.sleep(seconds)
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, seconds: float = 0.0, given: list[str] | None = None) -> Iterator[str]:
    """Serves a repository with a folder's files, each of which takes some seconds to come.

    Args:
        folder (Path): Where the files are.
        seconds (float): How long each takes.
        given (list, optional): Has the name of each file afterwards, once for each time that it was
            asked for.

    Yields:
        str: Its address, for ``HF_ENDPOINT``.
    """
    known = {"folder": folder, "seconds": seconds, "given": [] if given is None else given}
    hub = type("Hub", (_Hub,), known)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
