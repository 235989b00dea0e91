"""Commands, processes and sockets of a federation that encrypts: two machines, two commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_fed.fleet.federation import Federation

from ..conftest import Ended, Started, command, free_port

TASK = "tests.helpers.tasks:moons"
FED = ("-m", "mlx_fed")
SLOW_ROUNDS = ("--rounds", 1000)


class Commands:
    """What an operator types, in a folder of the test's."""

    def __init__(self, start: Callable[..., Started], folder: Path):
        self.start, self.folder = start, folder
        self.federation = folder / "federation"
        self.port = free_port()

    def serve(self, *arguments: object) -> Started:
        where = ("--secure", "--port", self.port, "--runs", self.folder / "runs")
        kept = ("--federation", self.federation)
        return self.start(*FED, "serve", TASK, *where, *kept, *arguments)

    def join(self, *arguments: object) -> Started:
        home = str(self.folder / "home")
        return self.start(*FED, "join", TASK, *arguments, "--wait", 30, MLX_FED_HOME=home)

    def nodes(self, *arguments: object) -> Ended:
        return command("nodes", *arguments, "--federation", self.federation)


@pytest.fixture
def commands(start, tmp_path) -> Commands:
    return Commands(start, tmp_path)


def tokens(process: Started, count: int) -> list[str]:
    process.line(rf"(?s)({TASK} mlxfed-.*){{{count}}}\n")
    return re.findall(rf"joins with:  mlx-fed join {TASK} (mlxfed-\S+)", process.text)


def test_two_commands_and_the_same_two_again(commands):
    server = commands.serve()
    given = tokens(server, 2)
    nodes = [commands.join(token) for token in given]
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0], nodes[0].text
    assert "encrypted; nodes are known by their keys" in server.text
    assert "node-1 joined" in server.text

    again = commands.serve("--rounds", 1)
    nodes = [commands.join(token) for token in given]
    assert again.ends() == 0, again.text
    assert [node.ends() for node in nodes] == [0, 0], nodes[0].text
    assert "mlxfed-" not in again.text
    listed = commands.nodes("list").text
    assert re.search(r"node-0  node id 0 +enrolled\nnode-1  node id 1 +enrolled", listed)


@pytest.mark.slow
def test_a_server_that_is_started_again_knows_its_nodes_as_they_wait(commands):
    server = commands.serve(*SLOW_ROUNDS)
    nodes = [commands.join(token, "-c", "slow=0.1") for token in tokens(server, 2)]
    server.line("round 1 ")
    server.end()
    nodes[0].line("Lost ")
    again = commands.serve("--rounds", 2)
    assert again.ends() == 0, again.text
    assert [node.ends() for node in nodes] == [0, 0], nodes[0].text


@pytest.mark.slow
def test_a_node_that_is_revoked_ends_and_the_run_goes_on(commands):
    server = commands.serve(*SLOW_ROUNDS)
    nodes = [commands.join(token, "-c", "slow=0.1") for token in tokens(server, 2)]
    server.line("round 1 ")
    added = commands.nodes("add", "late")
    (token,) = re.findall(r"mlx-fed join MODULE:TASK (mlxfed-\S+)", added.text)
    nodes.append(commands.join(token, "-c", "slow=0.1"))
    server.line("late joined")
    assert "node-1 is revoked." in commands.nodes("revoke", "node-1").text
    assert nodes[1].ends() == 1
    assert "The key of node-1 was revoked on the server." in nodes[1].text
    assert "Traceback" not in nodes[1].text
    server.line("node-1 left")
    rounds = len(history(commands))
    server.line(rf"round {rounds + 3} ")
    assert history(commands)[-1]["train"]["nodes"] == ["node-0", "late"]
    assert "revoked" in commands.nodes("list").text


def history(commands: Commands) -> list[dict]:
    (run,) = (commands.folder / "runs").iterdir()
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_node_that_is_killed_and_started_again_within_a_round_joins_again(commands):
    server = commands.serve(*SLOW_ROUNDS)
    first, second = tokens(server, 2)
    slow = commands.join(first, "-c", "slow=8")
    node = commands.join(second)
    node.line("round 1 train")
    node.end()
    again = commands.join(second)
    server.line("(?s)node-1 left.*node-1 joined")
    again.line("round 3 train")
    assert slow.process.poll() is None
    assert [record["train"]["nodes"] for record in history(commands)][1] == ["node-0", "node-1"]


@pytest.mark.slow
def test_who_has_no_place_is_told_so(commands, tmp_path):
    server = commands.serve(*SLOW_ROUNDS)
    first, second = tokens(server, 2)
    node = commands.join(first)
    server.line("node-0 joined")
    elsewhere = Federation(tmp_path / "elsewhere", f"127.0.0.1:{commands.port}")
    plain = ("--server", f"127.0.0.1:{commands.port}")
    ca = ("--root-certificates", commands.federation / "ca.crt")
    cases = {
        "This token was used": (first, "--identity", tmp_path / "thief"),
        "is not the server that this node trusts: it has another certificate": (
            elsewhere.invite("node-0"),
        ),
        "encrypts: join with a token": plain,
        "does not know this node's key": (*plain, *ca),
        "is not a whole token": (second[:-5],),
        "A node with this key is online: one key is one node.": (first,),
    }
    started = {message: commands.join(*arguments) for message, arguments in cases.items()}
    for message, process in started.items():
        assert process.ends(90) == 1, process.text
        assert message in process.text
        assert "Traceback" not in process.text
    assert node.process.poll() is None, "the honest one is still there"
    assert server.process.poll() is None


@pytest.mark.slow
def test_keys_and_certificates_of_ones_own(commands, tmp_path):
    def certs(*arguments: object) -> str:
        done = commands.start(*FED, "certs", *arguments)
        assert done.ends() == 0, done.text
        return done.text

    kept = ("--federation", commands.federation)
    made = ("--federation", tmp_path / "made")
    certs("make", "127.0.0.1", *made)
    bring = ["bring", "--certificate", tmp_path / "made" / "server.crt"]
    bring += ["--key", tmp_path / "made" / "secret" / "server.key"]
    certs(*bring, "--authority", tmp_path / "made" / "ca.crt", *kept)
    assert "(imported)" in certs("show", *kept)
    certs("key", tmp_path / "own.key")
    assert (tmp_path / "own.key").stat().st_mode & 0o777 == 0o600
    added = commands.nodes("add", "hospital-a", "--key", tmp_path / "own.pub")
    assert "hospital-a may join, with node id 0." in added.text
    server = commands.serve("--min-nodes", 1)
    server.line("Waiting for nodes")
    files = ("--root-certificates", tmp_path / "made" / "ca.crt", "--key", tmp_path / "own.key")
    where = ("--server", f"127.0.0.1:{commands.port}", "--name", "hospital-a")
    node = commands.join(*where, *files)
    assert server.ends() == 0, server.text
    assert node.ends() == 0, node.text
    assert "hospital-a joined" in server.text


def test_a_folder_that_does_not_say_where_its_server_is_can_be_told(tmp_path):
    made, kept = (("--federation", tmp_path / name) for name in ("made", "kept"))
    assert command("certs", "make", "127.0.0.1", *made).code == 0
    bring = ["certs", "bring", "--certificate", tmp_path / "made" / "server.crt"]
    bring += ["--key", tmp_path / "made" / "secret" / "server.key"]
    assert command(*bring, "--authority", tmp_path / "made" / "ca.crt", *kept).code == 0
    code, text = command("nodes", "add", "node-0", *kept)
    assert code == 1
    (told,) = re.findall(r"say it with mlx-fed (certs make HOST:PORT --federation \S+)\.$", text)
    done = command(*told.replace("HOST:PORT", "127.0.0.1:8123").split())
    assert done.code == 0, done.text
    assert "node-0 joins with:" in command("nodes", "add", "node-0", *kept).text
    assert "(imported)" in command("certs", "show", *kept).text


def test_beyond_the_loopback_a_server_encrypts_unless_it_is_told_not_to(commands):
    everywhere = ("--host", "0.0.0.0", "--wait", 0.1, "--announce", "127.0.0.1")
    server = commands.start(
        *FED, "serve", TASK, *everywhere, "--port", 0, "--federation", commands.federation,
        "--runs", commands.folder,
    )  # fmt: skip
    assert server.ends() == 1
    assert "encrypted; nodes are known by their keys" in server.text
    assert "mlxfed-" in server.text
    where = ("--port", 0, "--wait", 0.1, "--runs", commands.folder)
    open_ = commands.start(*FED, "serve", TASK, "--insecure", *where)
    assert open_.ends() == 1
    assert "Note: neither encrypted nor closed" in open_.text


def test_commands_say_what_is_wrong_with_their_arguments(commands, tmp_path):
    nowhere = commands.nodes("list")
    assert "is not a federation's folder" in nowhere.text
    Federation(commands.federation, "127.0.0.1:1")
    assert "There is no node named 'nobody'" in commands.nodes("revoke", "nobody").text
    assert "A node's name has 1 to 64 letters" in commands.nodes("add", "../a").text
    assert "Cannot read" in commands.nodes("add", "a", "--key", tmp_path / "missing").text
    (tmp_path / "rsa.pub").write_text("ssh-rsa AAAA")
    assert "is not a public key" in commands.nodes("add", "a", "--key", tmp_path / "rsa.pub").text
