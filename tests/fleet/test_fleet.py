"""A federation of real processes over real sockets: one server, resident nodes."""

from __future__ import annotations

import errno
import json
import re
import os
import signal
import socket
import time
import weakref
from dataclasses import replace

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from mlx_fed.rounds import messages
from mlx_fed.fleet.identity import from_files
from mlx_fed.fleet.model_size import ModelSize
from mlx_fed.fleet.resident_node import JoinError, ResidentNode
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import transport
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.link_grid import LinkGrid
from mlx_fed.monitoring.server_terminal import server_line
from mlx_fed.system.printable import printable
from mlx_fed.training.trainer import Trainer

from ..helpers.run_folders import read_history
from ..conftest import ROOT, command, free_port
from ..helpers.tasks import moons
from ..helpers.fleet_commands import FED, TASK, assert_same_bits, join, serve


def test_a_run_ends_by_itself_and_leaves_its_folder(start, tmp_path):
    server, address = serve(start, tmp_path)
    nodes = [join(start, address, number, "--steps-per-report", 2) for number in range(2)]
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]
    assert re.search(r"round 3 train: step 2 of \d+   loss \d\.\d+   .* steps/s", nodes[0].text)
    assert "The run is over." in nodes[0].text
    folder = tmp_path / "run"
    assert str(folder / "model.safetensors") in server.text
    rounds = read_history(folder)
    assert [record["round"] for record in rounds] == [1, 2, 3]
    assert rounds[-1]["evaluate"]["accuracy"] > 0.8
    expected = np.zeros((2, 2), int)
    model = fed.load_model(moons({}), folder)
    for partition in range(2):
        x, y = moons({}).data(partition, 2).test
        np.add.at(expected, (y, np.asarray(model(mx.array(x))).argmax(axis=1)), 1)
    assert rounds[-1]["evaluate"]["confusion"] == expected.tolist()
    assert rounds[-1]["train"]["nodes"] == ["node-0", "node-1"]
    assert rounds[-1]["bytes"]["up"] > 0
    assert rounds[-1]["refused"] == []
    assert {"train", "check", "aggregate", "evaluate"} == rounds[-1]["seconds"].keys()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["num_rounds"] == 3
    assert settings["config"]["learning-rate"] == 0.1
    assert settings["strategy"]["name"] == "FedAvg"


def test_bytes_are_those_that_went_over_the_wire(start, tmp_path):
    """A node trains from what it has evaluated in the round before."""
    server, address = serve(start, tmp_path, "--min-nodes", 1, "-c", "hidden=20000")
    node = join(start, address, 0, "-c", "hidden=20000")
    assert server.ends() == 0, server.text
    assert node.ends() == 0
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    first, *others = [record["bytes"]["down"] / size for record in read_history(tmp_path / "run")]
    assert 1.9 < first < 2.1, "to train from, and to evaluate"
    assert all(0.9 < times < 1.1 for times in others), others


def test_the_order_of_starting_does_not_change_a_bit(start, tmp_path):
    port = free_port()
    late = [join(start, f"127.0.0.1:{port}", number) for number in (2, 0)]
    late[0].line("No server at .* yet: trying again")
    serve_on = (*FED, "serve", TASK, "--port", port, "--runs", tmp_path, "--min-nodes", 3)
    server = start(*serve_on, "--name", "late")
    late.append(join(start, f"127.0.0.1:{port}", 1, "--name", "a-name-that-sorts-first"))
    assert server.ends() == 0, server.text
    assert [node.ends() for node in late] == [0, 0, 0]

    server, address = serve(start, tmp_path, "--min-nodes", 3, name="early")
    early = [join(start, address, number) for number in range(3)]
    assert server.ends() == 0
    assert [node.ends() for node in early] == [0, 0, 0]
    assert_same_bits(tmp_path / "late", tmp_path / "early")


@pytest.mark.slow
def test_the_seed_changes_the_run(start, tmp_path):
    for seed in (0, 1):
        few = ("--rounds", 1, "--min-nodes", 1)
        server, address = serve(start, tmp_path, "--seed", seed, *few, name=f"seed{seed}")
        node = join(start, address, 0)
        assert server.ends() == 0
        assert node.ends() == 0
    with pytest.raises(AssertionError):
        assert_same_bits(tmp_path / "seed0", tmp_path / "seed1")


def test_nodes_with_a_taken_node_id_or_another_model_are_sent_away(start, tmp_path):
    server, address = serve(start, tmp_path)
    first = join(start, address, 0)
    server.line("node-0 joined")
    second = join(start, address, 0, "--name", "impostor")
    other = join(start, address, 2, "-c", "hidden=8")
    assert second.ends() == 1
    assert "sent this node away: node id 0 is taken by a node that is online" in second.text
    assert "impostor refused" in server.text
    assert other.ends() == 1
    assert "'layers.0.weight' has shape (8, 2), expected (16, 2)" in other.text
    assert "node-2 refused: its model is not the server's" in server.text
    third = join(start, address, 1)
    assert server.ends() == 0
    assert [first.ends(), third.ends()] == [0, 0]


def test_a_node_that_raises_in_training_is_left_out_of_that_round(start, tmp_path):
    server, address = serve(start, tmp_path, "--min-nodes", 3)
    nodes = [join(start, address, number) for number in range(2)]
    broken = join(start, address, 2, "-c", "raise-in=2")
    assert server.ends() == 0, server.text
    assert [node.ends() for node in (*nodes, broken)] == [0, 0, 0]
    assert "round 2 train failed: RuntimeError: the disk of this node is full" in broken.text
    assert re.search(
        r"node-2 left out of train: RuntimeError \(tasks\.py, line \d+\): ", server.text
    )
    assert "the disk" not in server.text, "what an exception says is the node's owner's to share"
    rounds = read_history(tmp_path / "run")
    trained = [len(record["train"]["nodes"]) for record in rounds]
    assert trained == [3, 2, 3]
    (refused,) = rounds[1]["refused"]
    assert (refused["node"], refused["phase"]) == ("node-2", "train")
    assert "the disk" not in refused["reason"]


def test_when_every_node_fails_the_run_stops_and_what_was_reached_is_kept(start, tmp_path):
    server, address = serve(start, tmp_path)
    nodes = [join(start, address, number, "-c", "raise-in=2") for number in range(2)]
    assert server.ends() == 1
    assert "Round 2: all 2 nodes failed with the same error" in server.text
    assert [node.ends() for node in nodes] == [4, 4]
    assert "The run failed." in nodes[0].text
    assert len(read_history(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_nodes_come_and_go_between_rounds(start, tmp_path):
    server, address = serve(start, tmp_path, "--rounds", 12, "--min-nodes", 2)
    nodes = [join(start, address, number, "-c", "slow=0.4") for number in range(2)]
    server.line("round 1 ")
    third = join(start, address, 2, "-c", "slow=0.4")
    server.line("node-2 joined")
    third.line("round .* train")
    third.interrupt()
    assert third.ends() == 130
    server.line("node-2 left")
    assert server.ends(120) == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]
    took_part = [record["train"]["nodes"] for record in read_history(tmp_path / "run")]
    assert took_part[0] == ["node-0", "node-1"]
    assert ["node-0", "node-1", "node-2"] in took_part
    assert took_part[-1] == ["node-0", "node-1"]


def test_a_node_that_is_killed_does_not_hold_up_the_run(start, tmp_path):
    server, address = serve(start, tmp_path, "--rounds", 4, "--min-nodes", 3)
    nodes = [join(start, address, number, "-c", "slow=0.3") for number in range(2)]
    victim = join(start, address, 2, "-c", "slow=0.3")
    server.line("round 1 ")
    victim.process.kill()
    server.line("node-2 left", 60)
    substitute = join(start, address, 2)  # the same node id, once the first is gone
    assert server.ends(120) == 0, server.text
    assert [node.ends() for node in (*nodes, substitute)] == [0, 0, 0]


def test_nodes_go_over_to_a_server_that_was_started_again(start, tmp_path):
    port = free_port()
    nodes = [join(start, f"127.0.0.1:{port}", number, "-c", "slow=0.2") for number in range(2)]
    serve_on = (*FED, "serve", TASK, "--port", port, "--runs", tmp_path)
    waiting = start(*serve_on, "--name", "waiting", "--min-nodes", 3)
    waiting.line("node-0 joined")
    waiting.line("node-1 joined")
    waiting.end()
    nodes[0].line("Lost ")
    at_work = start(*serve_on, "--name", "at-work", "--rounds", 100)
    at_work.line("round 1 ")
    at_work.end()
    last = start(*serve_on, "--name", "last")
    assert last.ends() == 0, last.text
    assert [node.ends() for node in nodes] == [0, 0]
    assert len(read_history(tmp_path / "last")) == 3


def test_what_a_node_keeps_is_there_when_its_run_goes_on(start, tmp_path):
    port = free_port()
    personal = ("-c", "personal=true")
    serve_on = ("--port", port, "--runs", tmp_path, "--name", "run", "--min-nodes", 1)
    server = start(*FED, "serve", TASK, *serve_on, "--rounds", 1000, *personal)
    node = join(start, f"127.0.0.1:{port}", 0, *personal)
    server.line("round 2 ")
    server.end()
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["config"]
    parameters = messages.pack(Trainer(moons({"personal": True})).parameters())

    with _serving(_socket("127.0.0.1", port)) as link:
        grid = LinkGrid(link)
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.05)
        losses = []
        for changed in ({}, {"run-id": "another"}, {}):
            config = ConfigRecord({**settings, **changed})
            content = RecordDict({"arrays": parameters, "config": config})
            message = Message(content, nodes[0], MessageType.EVALUATE)
            (answer,) = grid.send_and_receive([message], timeout=30)
            losses.append(answer.content["metrics"]["loss"])
        link.finish()
        assert node.ends() == 0, node.text
    assert losses[0] == losses[2] != losses[1]


def test_a_node_at_work_when_the_run_ends_does_not_wait_for_its_server(start):
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as link:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        node = join(start, address, 0, "-c", "slow=4")
        grid = LinkGrid(link)
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.05)
        config = ConfigRecord({"learning-rate": 0.1, "server-round": 1, "seed": 0})
        arrays = messages.pack(Trainer(moons({})).parameters())
        content = RecordDict({"arrays": arrays, "config": config})
        grid.push_messages([Message(content, nodes[0], MessageType.TRAIN)])
        while len(link.store):  # until it has confirmed the message
            time.sleep(0.05)
        link.finish()
        time.sleep(1)  # what a server waits for nodes to leave is shorter than some work
    assert node.ends(20) == 0, node.text
    assert "The run is over." in node.text
    assert "Lost" not in node.text


def test_a_server_that_answers_now_and_then_is_not_given_up(monkeypatch):
    """As on a connection that breaks time and again in the middle of a large reply."""
    monkeypatch.setattr(transport, "LONG_POLLS", {})
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as link:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        connection = FleetClient(*listening.getsockname())
        connection.register()
        told: list[str] = []

        def tell(event: events.Event) -> None:
            told.append(event.name)

        node = ResidentNode(
            connection, None, {}, from_files(address, None, None), 0.5, tell, ModelSize(moons({}))
        )
        tries: list[bool] = []

        def send() -> str:
            tries.append(True)
            if len(tries) < 6:
                connection.heartbeat()
                raise transport.Unreachable("its connection broke")
            return "sent"

        assert node._retry(send) == "sent"
        assert told == ["lost"]
        link.finish()
    connection._transport.outcome = ""
    with pytest.raises(JoinError, match=f"{address} has been gone for 0 seconds"):
        node._retry(connection.heartbeat)


def test_a_node_holds_its_examples_once(start, tmp_path):
    task = moons({})
    theirs: list[weakref.ref] = []
    alive: list[bool] = []

    def load(partition_id, num_partitions):
        data = task.data(partition_id, num_partitions)
        data = fed.Data(tuple(map(np.copy, data.train)), tuple(map(np.copy, data.test)))
        theirs.extend(map(weakref.ref, (*data.train, *data.test)))
        return data

    def optimizer(settings):
        alive.extend(array() is not None for array in theirs)
        return task.optimizer(settings)

    _, address = serve(start, tmp_path, "--min-nodes", 1, "--rounds", 1)
    holding = replace(task, data=load, optimizer=optimizer)
    fed.join(holding, address, wait=60, listener=lambda event: None)
    assert alive
    assert not any(alive)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_outlives_a_server_that_sleeps_and_a_node_that_does(start, tmp_path):
    server, address = serve(start, tmp_path, "--rounds", 25)
    nodes = [join(start, address, number, "-c", "slow=0.3") for number in range(3)]
    server.line("node-2 joined")
    server.line("round 2 ")
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(65)  # Flower ends a run a minute after its last heartbeat
    server.process.send_signal(signal.SIGCONT)
    server.line("round 5 ")
    assert " left" not in server.text
    nodes[2].process.send_signal(signal.SIGSTOP)
    server.line("node-2 left out of ")
    nodes[2].process.send_signal(signal.SIGCONT)
    assert server.ends(120) == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0, 0]
    trained = [record["train"]["nodes"] for record in read_history(tmp_path / "run")]
    assert ["node-0", "node-1"] in trained[2:]
    assert trained[-1] == ["node-0", "node-1", "node-2"]


def test_a_node_cannot_steer_the_servers_terminal(start, tmp_path):
    server, address = serve(start, tmp_path, "--min-nodes", 1)
    node = join(start, address, 0, "--name", "[bold]x[/bold] y")
    assert server.ends() == 0, server.text
    assert node.ends() == 0
    assert "[bold]x[/bold] y joined" in server.text
    # A node of another make may have any name.
    for sent in ("\x1b[2Jred", "a\nround 9   accuracy 1.0000", "\N{RIGHT-TO-LEFT OVERRIDE}x"):
        shown = printable(server_line(events.NodeJoined(sent, 1)))
        assert shown.isprintable()
    assert len(printable("A" * 10_000_000)) < 2000


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "A" * 65])
def test_a_name_that_cannot_be_shown(name):
    code, text = command("join", TASK, "--name", name)
    assert code == 1
    assert "A node's name has 1 to 64 printable characters" in text


def test_a_node_shows_nothing_or_json(start, tmp_path):
    server, address = serve(start, tmp_path, "--rounds", 1)
    quiet = join(start, address, 0, "--quiet")
    told = join(start, address, 1, "--json")
    for process in (server, quiet, told):
        assert process.ends() == 0, process.text
    assert quiet.text == ""
    events = [json.loads(line) for line in told.text.splitlines()]
    assert [each["event"] for each in events if each["event"] != "answered"] == [
        *("ready", "joined", "working", "working", "working", "finished"),
    ]
    answers = [(each["kind"], each["round"]) for each in events if each["event"] == "answered"]
    assert answers == [("query.roll_call", None), ("train", 1), ("evaluate", 1)]
    assert events[-2]["metrics"]["num-examples"] > 0


def test_a_node_shows_nothing_and_json():
    code, text = command("join", TASK, "--quiet", "--json")
    assert code == 1
    assert "Choose --quiet or --json" in text


def test_on_ipv6(start, tmp_path):
    server, address = serve(start, tmp_path, "--host", "::1", "--min-nodes", 1)
    assert address.startswith("[::1]:")
    node = join(start, address, 0)
    assert server.ends() == 0, server.text
    assert node.ends() == 0


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xff\xff\xff"]
)
def test_another_program_at_the_servers_address(start, answer):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        node = start(*FED, "join", TASK, "--server", address, "--wait", 1)
        connection, _ = other.accept()
        connection.recv(100_000)
        connection.sendall(answer)
        connection.close()
    assert node.ends() == 1
    assert f"No server at {address} within 1 seconds" in node.text
    assert "Traceback" not in node.text


def test_ctrl_c_twice(start, tmp_path):
    server, address = serve(start, tmp_path, "--rounds", 1000)
    nodes = [join(start, address, number, "-c", "slow=0.2") for number in range(2)]
    server.line("round 1 ")
    for process in (server, *nodes):
        process.interrupt()
        process.interrupt()
    for process in (server, *nodes):
        process.ends()
        assert process.process.returncode != 0
        assert "Traceback" not in process.text


@pytest.mark.parametrize("command", ["server.py", "client.py"])
def test_ctrl_c_while_a_command_starts(start, tmp_path, command):
    late = tmp_path / "flwr" / "app"
    late.mkdir(parents=True)
    (tmp_path / "flwr" / "__init__.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    process = start(
        command,
        *(["--node-id", 0] if command == "client.py" else []),
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src"), str(ROOT)]),
    )
    process.line("importing")
    process.interrupt()
    assert process.ends() == 130
    assert "Traceback" not in process.text


def test_ctrl_c_on_the_server_ends_its_nodes_and_keeps_the_model(start, tmp_path):
    server, address = serve(start, tmp_path, "--rounds", 1000, "--min-nodes", 1)
    node = join(start, address, 0)
    server.line("round 2 ")
    server.interrupt()
    assert server.ends() == 130
    assert "Traceback" not in server.text
    assert node.ends() == 3
    assert "The run was stopped on its server" in node.text
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_nodes_wait_for_a_server_that_was_ended_to_be_started_again(start, tmp_path):
    port = free_port()
    serve_on = (*FED, "serve", TASK, "--port", port, "--runs", tmp_path, "--rounds", 5)
    server = start(*serve_on, "--name", "run")
    nodes = [join(start, f"127.0.0.1:{port}", number, "-c", "slow=0.2") for number in range(2)]
    server.line("round 2 ")
    server.process.send_signal(signal.SIGTERM)
    assert server.ends() == 128 + signal.SIGTERM
    assert "Traceback" not in server.text
    assert "ERROR" not in server.text
    assert (tmp_path / "run" / "model.safetensors").exists()
    nodes[0].line("Lost ")
    resumed = start(*serve_on, "--resume", "run")
    assert resumed.ends() == 0, resumed.text
    assert [node.ends() for node in nodes] == [0, 0], nodes[0].text


def test_nodes_wait_for_a_server_that_broke_off(start, tmp_path):
    port = free_port()
    broken = [True]

    def evaluate(number: int, parameters: dict, statistics: dict) -> None:
        if number == 2 and broken:
            broken.clear()
            raise OSError(errno.ENOSPC, "No space left on device")

    where = {"port": port, "runs": tmp_path, "listeners": (), "evaluate_fn": evaluate}
    node = join(start, f"127.0.0.1:{port}", 0)
    with pytest.raises(OSError, match="No space left"):
        fed.serve(moons, num_rounds=3, min_nodes=1, name="run", **where)
    node.line("Lost ")
    result = fed.serve(moons, num_rounds=3, min_nodes=1, resume="run", **where)
    assert len(result.rounds) == 3
    assert node.ends() == 0, node.text


def test_ctrl_c_while_the_server_waits_for_nodes(start, tmp_path):
    server, _ = serve(start, tmp_path)
    server.line("Waiting for nodes: 0 of 2")
    server.interrupt()
    assert server.ends() == 130
    assert "Traceback" not in server.text


def test_ctrl_c_while_a_node_waits_for_its_server(start):
    node = join(start, f"127.0.0.1:{free_port()}", 0)
    node.line("trying again")
    node.interrupt()
    assert node.ends() == 130
    assert "Traceback" not in node.text


def test_the_server_gives_up_waiting_for_nodes(start, tmp_path):
    server, address = serve(start, tmp_path, "--wait", 2)
    node = join(start, address, 0)
    assert server.ends() == 1
    assert "of 2 nodes came within 2 seconds" in server.text
    node.end()  # it may have come after the server was gone


def test_a_node_gives_up_when_there_is_no_server():
    port = free_port()
    code, text = command("join", TASK, "--server", f"127.0.0.1:{port}", "--wait", 1)
    assert code == 1
    assert f"No server at 127.0.0.1:{port} within 1 seconds" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-id", 3, "--num-partitions", 3], "Node id 3 is outside the partitions"),
        (["--server", "127.0.0.1:http"], "is not HOST:PORT"),
        (["--server", "192.0.2.1:8080"], "192.0.2.1 is not this machine: join with a token"),
        (["mlxfed-AAAA"], "is not a whole token: copy the line that the server printed"),
        (["-c", "learning-rate"], "'learning-rate' is not KEY=VALUE"),
    ],
)
def test_a_node_says_what_is_wrong_with_its_arguments(arguments, message):
    code, text = command("join", TASK, *arguments)
    assert code == 1
    assert message in text


def test_a_node_without_its_data_ends_with_one_message(start):
    node = start(*FED, "join", TASK, "-c", "missing=true")
    assert node.ends() == 1
    assert node.text == "Error: There is no folder '/data/patients'.\n"


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU here")
def test_gpu_without_a_gpu():
    code, text = command("join", TASK, "--gpu")
    assert code == 1
    assert "MLX has no GPU here" in text


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = command("serve", TASK, "--port", port, "--runs", tmp_path)
        assert code == 1
    assert f"Port {port} is in use on 127.0.0.1" in text
    assert not any(tmp_path.glob("*/settings.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--secure", "--insecure"], "A server is either --secure or --insecure."),
        (["--strategy", "FedBest"], "Flower has no strategy 'FedBest'. It has Bulyan"),
        (["--strategy", "FedAdam", "-s", "speed=9"], "-s: FedAdam has no argument speed"),
        (["--name", "../outside"], "A run's name has letters"),
    ],
)
def test_a_server_says_what_is_wrong_with_its_arguments(tmp_path, arguments, message):
    code, text = command("serve", TASK, "--port", 0, "--runs", tmp_path, *arguments)
    assert code == 1
    assert message in text


@pytest.mark.parametrize(
    "task", ["tests.helpers.tasks", "tests.nothing:task", "tests.helpers.tasks:nothing"]
)
def test_a_task_that_is_not_there(task):
    code, text = command("serve", task, "--port", 0)
    assert code == 1
    assert "Error: " in text


def test_a_server_without_its_task_ends_with_one_message(start):
    server = start(*FED, "serve", "tests.nothing:task", "--port", 0)
    assert server.ends() == 1
    assert server.text.startswith("Error: There is no module 'tests.nothing'")
    assert "Traceback" not in server.text


def test_a_new_app_runs(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("init", "my_app").code == 0
    code, text = command("init", "my_app")
    assert code == 1
    assert "File exists" in text
    code, text = command("init", "my-app")
    assert code == 1
    assert "not valid as the name of a Python module" in text
    app = tmp_path / "my_app"
    server = start(*FED, "serve", "my_app:task", "--port", 0, cwd=app)
    address = server.line(r"Server ready on (\S+)").group(1)
    nodes = [
        start(*FED, "join", "my_app:task", "--server", address, "--node-id", number, cwd=app)
        for number in range(2)
    ]
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]
    (folder,) = (app / "runs").iterdir()
    assert read_history(folder)[-1]["evaluate"]["accuracy"] > 0.9


def test_compressed_updates_are_those_of_a_simulation(start, tmp_path):
    """Nodes keep what compression lost of their updates."""
    server, address = serve(start, tmp_path, "--compress", "topk:0.2,int8", "-c", "hidden=64")
    nodes = [join(start, address, number, "-c", "hidden=64") for number in range(2)]
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]
    options = {"num_clients": 2, "workers": 0, "runs": tmp_path, "name": "same", "listeners": ()}
    fed.simulate(moons, config={"hidden": 64, "compress": "topk:0.2,int8"}, **options)
    assert_same_bits(tmp_path / "run", tmp_path / "same")
    one, other = (read_history(tmp_path / name) for name in ("run", "same"))
    assert [each["bytes"]["up"] for each in one] == [each["bytes"]["up"] for each in other]
