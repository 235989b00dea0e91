"""Hooks and ``/metrics`` in the hands of somebody who wants to hold up, end or steer a run."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from prometheus_client import parser

from mlx_fed import events
from mlx_fed.flower.connections import MAX_PAGE_CONNECTIONS
from mlx_fed.monitoring import hooks
from mlx_fed.monitoring.hooks import run_hooks
from mlx_fed.monitoring.prometheus import serve_metrics

from ..conftest import free_port
from ..helpers.idle_connections import assert_room_is_made

NAMES = {
    "shell": '$(touch owned); `touch owned` | touch owned & "; touch owned #',
    "option": "--output=owned",
    "lines": 'a\n{"event": "finished"}',
    "escapes": "\x1b[2J\x1b]0;owned\x07",
    "quotes": '"}{"\\',
}


@pytest.mark.parametrize("case", NAMES)
def test_a_nodes_name_is_data_to_a_command(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    with run_hooks([f"joined=tee {tmp_path}/event"]) as (hook,):
        hook(events.NodeJoined(NAMES[case], 2))
    (line,) = (tmp_path / "event").read_text().splitlines()
    assert json.loads(line)["node"] == NAMES[case]
    assert [path.name for path in tmp_path.iterdir()] == ["event"]


@pytest.fixture
def web_hook() -> Iterator[Callable[[bytes], str]]:
    """A server that answers with these bytes, slowly, and its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    open_connections: list[socket.socket] = []

    def serve(answer: bytes) -> str:
        def answer_all() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    open_connections.append(connection)
                    threading.Thread(target=drip, args=(connection,), daemon=True).start()

        def drip(connection: socket.socket) -> None:
            with suppress(OSError):
                connection.recv(2**16)
                connection.sendall(answer)
                for _ in range(1000 if not answer.endswith(b"\n") else 0):
                    time.sleep(0.02)
                    connection.send(b"x")
                if answer.endswith(b"\n"):
                    connection.close()

        threading.Thread(target=answer_all, daemon=True).start()
        return f"http://secret-user:secret-key@127.0.0.1:{listening.getsockname()[1]}/"

    yield serve
    listening.close()
    for connection in open_connections:
        connection.close()


def test_a_web_hook_that_never_ends_its_answer_holds_up_nothing(web_hook, monkeypatch):
    """More events than wait for it, and each byte comes before the next timeout."""
    monkeypatch.setattr(hooks, "_TIMEOUT", 0.5)
    monkeypatch.setattr(hooks, "_MOST_WAITING", 5)
    thread = threading.Thread(target=_run_with, args=(web_hook(b"HTTP/1.1 200 OK\r\nx: "),))
    thread.start()
    thread.join(15)
    assert not thread.is_alive()


def _run_with(url: str) -> None:
    with run_hooks([f"left={url}", f"joined={url}"]) as both:
        for number in range(20):
            for hook in both:
                hook(events.NodeLeft(f"node-{number}"))
                hook(events.NodeJoined(f"node-{number}", 1))


@pytest.mark.parametrize(
    "answer",
    [b"\0\1\2 garbage\n", b"HTTP/1.1 500 \x1b[2Jowned\r\n\r\n", b"HTTP/9.9 abc\r\n", b"\n"],
    ids=["garbage", "escapes", "version", "empty"],
)
def test_an_answer_that_is_none_does_not_end_the_hook(web_hook, tmp_path, caplog, answer):
    with run_hooks([f"left={web_hook(answer)}"]) as (hook,):
        hook(events.NodeLeft("a"))
        hook(events.NodeLeft("b"))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert all("hook for left failed" in text for text in texts)
    assert not any("\x1b" in text or "secret" in text for text in texts)


def test_a_failing_command_does_not_show_its_secrets(caplog):
    with run_hooks(["left=false --password secret", "left=no-such-command secret"]) as both:
        for hook in both:
            hook(events.NodeLeft("a"))
    assert len(caplog.records) == 2
    assert "secret" not in caplog.text


# -- /metrics ----------------------------------------------------------------------------------


def record(**metrics: float) -> dict:
    return {
        "round": 1,
        "train": metrics,
        "evaluate": {},
        "seconds": {},
        "bytes": {},
        "refused": [],
    }


ODD_NAMES = [
    'a"} 1\nmlx_fed_up 0',
    "a\\",
    "\n",
    "\r\n# TYPE mlx_fed_up counter",
    "{}",
    "\u2028",
    "\0",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_a_metrics_name_stays_in_its_label(name):
    with serve_metrics(f"127.0.0.1:{free_port()}") as listener:
        listener(events.RoundFinished(record(**{name: 0.5})))
        families = [*parser.text_string_to_metric_families(listener.text())]
    values = {sample.name: sample for family in families for sample in family.samples}
    assert values["mlx_fed_up"].value == 1
    assert values["mlx_fed_metric"].value == 0.5


def test_names_that_change_in_each_round_do_not_become_more():
    with serve_metrics(f"127.0.0.1:{free_port()}") as listener:
        for number in range(200):
            listener(events.RoundFinished(record(**{f"metric-{number}": 1.0})))
        assert listener.text().count("mlx_fed_metric{") == 1


def test_connections_to_the_metrics_take_only_so_many_files():
    where = f"127.0.0.1:{free_port()}"
    port = int(where.partition(":")[2])
    with serve_metrics(where):
        assert_room_is_made(port, f"http://{where}/healthz", MAX_PAGE_CONNECTIONS + 9)
