"""``/metrics`` and ``/healthz`` of a run, and hooks."""

import json
import socket
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import parser

from mlx_fed import events
from mlx_fed.errors import FedError
from mlx_fed.monitoring.hooks import run_hooks
from mlx_fed.monitoring.prometheus import serve_metrics

from ..conftest import command, free_port


RECORD = {
    "round": 3,
    "train": {"loss": 0.5, "nodes": ["a", "b"]},
    "evaluate": {"accuracy": 0.75, 'odd "name"\\': 1.0, "nodes": ["a"]},
    "seconds": {"train": 1.5, "aggregate": 0.25},
    "bytes": {"down": 100, "up": 40},
    "refused": [],
}


def get(where: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{where}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_what_a_run_did():
    where = f"127.0.0.1:{free_port()}"
    with serve_metrics(where) as listener:
        listener(events.NodesAwaited(1, 2))
        listener(events.NodeJoined("b", 2))
        listener(events.NodeLeft("b"))
        listener(events.NodeRefused("c", "another task"))
        listener(events.PhaseStarted("train", 1, 5, 2))
        listener(events.ReplyRefused("a", "train", "not finite"))
        listener(events.ReplyRefused("b", "train", "not finite"))
        for _ in range(2):
            listener(events.RoundFinished(RECORD))
        status, text = get(where, "/metrics")
    assert status == 200
    found = samples(text)

    def value(name: str, /, **labels: str) -> float:
        return found[f"mlx_fed_{name}", frozenset(labels.items())]

    assert value("up") == 1
    assert value("nodes") == 1
    assert value("nodes_refused_total") == 1
    assert value("round") == 3
    assert value("rounds") == 5
    assert value("replies_refused_total", phase="train") == 2
    assert value("phase_seconds_total", phase="train") == 3
    assert value("bytes_total", direction="up") == 80
    assert value("metric", phase="evaluate", name="accuracy") == 0.75
    assert value("metric", phase="evaluate", name='odd "name"\\') == 1


def test_health():
    where = f"127.0.0.1:{free_port()}"
    with serve_metrics(where) as listener:
        assert get(where, "/healthz") == (200, "ok")
        listener(events.RunAborted("disk full"))
        assert get(where, "/healthz") == (503, "stopped")


def test_an_address_in_use_is_an_error():
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(FedError, match="metrics"),
        serve_metrics(str(other.getsockname()[1])),
    ):
        pass


def test_a_command_gets_the_event(tmp_path):
    path = tmp_path / "event.json"
    with run_hooks([f"joined=tee {path}", "left=false"]) as (hook, failing):
        hook(events.NodeLeft("b"))
        failing(events.NodeLeft("b"))
        hook(events.NodeJoined("b", 2))
    assert json.loads(path.read_text()) == {"event": "joined", "node": "b", "nodes": 2}


def test_a_url_gets_the_event():
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    with run_hooks([f"finished=http://127.0.0.1:{server.server_port}/run"]) as (hook,):
        hook(events.RunFinished(Path("model.safetensors"), 1.0))
    thread.join(10)
    server.server_close()
    assert json.loads(bodies[0])["event"] == "finished"


@pytest.mark.parametrize("text", ["joined", "joind=true", "joined=", "joined='"])
def test_what_is_no_hook_is_refused(text):
    with pytest.raises(FedError, match="hook"), run_hooks([text]):
        pass


def test_a_simulation_with_both(tmp_path):
    run = command(
        *("simulate", "tests.helpers.simulated:TASK", "--clients", 3, "--rounds", 1),
        *("--workers", 0, "--runs", tmp_path),
        *("--metrics", free_port(), "--hook", f"round=tee {tmp_path}/round"),
    )
    assert run.code == 0, run.text
    assert json.loads((tmp_path / "round").read_text())["round"] == 1
