"""Nodes that reach their server through an HTTP proxy."""

from __future__ import annotations

from base64 import b64encode

import pytest

from mlx_fed.fleet.identity import Identity
from mlx_fed.flower.proxies import Proxy, ProxyError, from_environment

from ..helpers.fleet_commands import FED, TASK, serve
from ..conftest import free_port
from ..helpers.proxy import Proxy as Passing

HOST = "fed.example.org"
NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "plain"])
def test_a_run_through_a_proxy(start, tmp_path, encrypted: bool):
    """The server's name is known to the proxy only."""
    port = free_port()
    way = Passing(port)
    way.asked = []
    secure = ("--secure", "--federation", tmp_path / "federation", "--announce", f"{HOST}:{port}")
    arguments = ("--port", port, "--min-nodes", 1, "--rounds", 2, *(secure if encrypted else ()))
    server, _ = serve(start, tmp_path, *arguments)
    joins = ["--server", f"{HOST}:{port}"]
    if encrypted:
        joins = [server.line(r"(mlxfed-\S+)\n")[1]]
    proxy = {
        "HTTPS_PROXY" if encrypted else "HTTP_PROXY": f"http://ann:p%40ss@127.0.0.1:{way.port}"
    }
    where = {"MLX_FED_HOME": str(tmp_path / "home"), **proxy}
    insecure = () if encrypted else ("--insecure",)
    node = start(*FED, "join", TASK, *joins, *insecure, "--wait", 30, **where)
    assert server.ends() == 0, server.text
    assert node.ends() == 0, node.text
    assert f"through the proxy 127.0.0.1:{way.port}" in node.text
    assert "p@ss" not in node.text
    way.close()
    for asked in way.asked:
        assert asked.startswith(f"CONNECT {HOST}:{port} HTTP/1.")
        assert f"Basic {b64encode(b'ann:p@ss').decode()}" in asked
    assert len(way.asked) > 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, ("proxy", 3128)),
        ({"https_proxy": "proxy:3128"}, ("proxy", 3128)),
        ({"HTTP_PROXY": "http://proxy:3128"}, None),
        ({"ALL_PROXY": "http://[::1]"}, ("::1", 80)),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "a.org, example.org"}, None),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "fed.example.org:8080"}, None),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "ample.org"}, ("proxy", 80)),
        ({"HTTPS_PROXY": ""}, None),
    ],
)
def test_which_proxy(monkeypatch, environment: dict[str, str], expected: tuple | None):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy = from_environment(HOST, 8080, "https")
    assert (proxy and proxy[:2]) == expected


@pytest.mark.parametrize(
    "address", ["socks5://ann:secret@proxy:1080", "https://proxy", "http://:x"]
)
def test_a_proxy_of_another_kind_is_refused_in_words(monkeypatch, address: str):
    monkeypatch.setenv("HTTPS_PROXY", address)
    with pytest.raises(ProxyError, match=r"HTTPS_PROXY .* is not http://HOST:PORT") as refused:
        from_environment(HOST, 8080, "https")
    assert "secret" not in str(refused.value)


def test_this_machine_is_reached_without(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert Identity("127.0.0.1", 8080).proxy is None
    assert Identity("localhost", 8080).proxy is None
    assert Identity(HOST, 8080).proxy == Proxy("proxy", 3128, {})
