"""A server and honest nodes as processes, and a hostile node that sends what it likes."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_tree,
)

from mlx_fed.fleet.federation import Federation
from mlx_fed.fleet.identity import from_token
from mlx_fed.flower.fleet_client import FleetClient

from ..conftest import Started, free_port

TASK = "tests.helpers.tasks:moons"
FED = ("-m", "mlx_fed")


class Running:
    """A federation of one server and some honest nodes, which goes on until it is ended.

    Args:
        start (callable): Starts a process, as the fixture ``start`` does.
        folder (Path): Where all of its files are.
        secure (bool): TLS, and nodes with tokens.
        nodes (int): Honest nodes.
        arguments: More of the server's command.
        command (tuple): What Python runs as ``mlx-fed``.
    """

    def __init__(self, start, folder: Path, secure: bool, nodes=2, arguments=(), command=FED):
        self.folder, self.secure, self.start = folder, secure, start
        self.tokens: dict[str, str] = {}
        self.port = free_port()
        self.federation = folder / "federation"
        where = ["--port", self.port, "--runs", folder / "runs", "--name", "run"]
        where += ["--secure", "--federation", self.federation] if secure else []
        rounds = ["--rounds", 100_000, *(["--min-nodes", nodes] if nodes else [])]
        self.server: Started = start(*command, "serve", TASK, *where, *rounds, *arguments)
        self.server.line("(?i)waiting for|joins with")
        self.honest = [self.join(number) for number in range(nodes)]

    def join(self, number: int, *arguments: object) -> Started:
        """Starts an honest node."""
        if self.secure:
            who = [self.token(f"honest-{number}")]
        else:
            who = ["--server", f"127.0.0.1:{self.port}", "--node-id", number]
        home = str(self.folder / "home")
        return self.start(
            *FED, "join", TASK, *who, "-c", "slow=0.01", *arguments, MLX_FED_HOME=home
        )

    def token(self, name: str) -> str:
        """A node's token, which is made the first time."""
        if name not in self.tokens:
            self.tokens[name] = Federation(self.federation).invite(name)
        return self.tokens[name]

    def hostile(self, name: str = "hostile") -> HostileNode:
        """A node that has joined, and will send what it likes."""
        if self.secure:
            who = from_token(self.token(name), None, self.folder / name)
            node = HostileNode(who.host, who.port, who.context, who.key, who.invitation)
            node.number = who.number
        else:
            node = HostileNode("127.0.0.1", self.port)
        node.register()
        return node

    @property
    def rounds(self) -> int:
        """Rounds that are over."""
        return len(re.findall(r"(?m)^ *round \d+ ", self.server.text))

    def goes_on(self, rounds: int = 2, timeout: float = 60) -> None:
        """Waits for more rounds with all honest nodes.

        Raises:
            AssertionError: If the run does not go on.
        """
        before, deadline = self.rounds, time.monotonic() + timeout
        while self.rounds < before + rounds:
            assert self.server.process.poll() is None, self.server.text[-3000:]
            assert time.monotonic() < deadline, f"the run stands still:\n{self.server.text[-3000:]}"
            time.sleep(0.05)
        assert all(node.process.poll() is None for node in self.honest), self.honest[0].text

    @property
    def memory(self) -> int:
        """Bytes that the server's process has in memory."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


class HostileNode(FleetClient):
    """A node's end of the Fleet API that announces and pushes whatever it is told to.

    Attributes:
        number (int): The node id that it may have.
    """

    number = 900

    def announce(self, reply: Message, tree: ObjectTree) -> fleet_pb2.PushMessagesResponse:
        """Announces a reply that is made of these objects, whatever they are."""
        reply.metadata.__dict__["_message_id"] = tree.object_id
        return self._transport.PushMessages(
            fleet_pb2.PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
            )
        )

    def push(self, session: str, object_id: str, content: bytes) -> bool:
        """Pushes one object; whether the server has taken it."""
        return self._transport.PushObject(
            message_pb2.PushObjectRequest(
                node=self._node,
                run_id=self._run_id,
                object_id=object_id,
                object_content=content,
                session_id=session,
            )
        ).stored

    def push_all(self, reply: Message, tree: ObjectTree, contents: dict[str, bytes]) -> list[bool]:
        """Announces a reply and pushes what the server asks for; what it has taken."""
        response = self.announce(reply, tree)
        wanted = [each for each in contents if each in set(response.objects_to_push)]
        return [self.push(response.session_id, each, contents[each]) for each in wanted]

    def beat(self) -> None:
        """A heartbeat whose answer the server does not delay."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=30)
        path = "/v1/fleet/send-node-heartbeat"
        headers = self._transport._signed_headers()
        self._transport._post(path, request.SerializeToString(), headers)

    def asked(self, timeout: float = 30) -> Message:
        """The next message for this node."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (message := self.receive()) is not None:
                return message
        raise AssertionError("the server sends nothing")


def made(children: list[str], kind: str = "ArrayChunk", body: bytes = b"") -> tuple[str, bytes]:
    """An object of this kind with these children: its id and its bytes."""
    head = f"{kind} {','.join(children)} {len(body)}".encode()
    content = head + HEAD_BODY_DIVIDER + body
    return hashlib.sha256(content).hexdigest(), content


def objects_of(reply: Message) -> tuple[ObjectTree, dict[str, bytes]]:
    """The tree of a reply, and its objects."""
    objects = get_all_nested_objects(reply)
    return get_object_tree(reply), {each: item.deflate() for each, item in objects.items()}


def roll_call_answer(question: Message, name: str, partition: int, /, **changes: object) -> Message:
    """What an honest node of the task answers, but for what is changed."""
    config = next(value for value in question.content.values() if isinstance(value, ConfigRecord))
    sizes = {"0.weight": [16, 2], "0.bias": [16], "2.weight": [2, 16], "2.bias": [2]}
    spec = {f"layers.{name}": [shape, "float32"] for name, shape in sizes.items()}
    answer = {
        "name": name,
        "partition-id": partition,
        "fingerprint": config["fingerprint"],
        "parameters": json.dumps(spec),
        "statistics": "{}",
    }
    return Message(RecordDict({"node": ConfigRecord(answer | changes)}), reply_to=question)


def as_it_came(question: Message) -> Message:
    """A reply to training with the parameters that came, as a node that trains nothing sends."""
    records = {k: v for k, v in question.content.items() if isinstance(v, ArrayRecord)}
    metrics = MetricRecord({"num-examples": 160, "loss": 0.5})
    return Message(RecordDict({**records, "metrics": metrics}), reply_to=question)


def replaced(contents: dict[str, bytes], old: bytes, new: bytes) -> dict[str, bytes]:
    """Objects, children first, with one body changed and all parents made to fit."""
    ids: dict[bytes, bytes] = {}
    changed: dict[str, bytes] = {}
    for object_id, content in contents.items():
        for before, after in ids.items():
            content = content.replace(before, after)
        if old in content:
            head, _, body = content.partition(HEAD_BODY_DIVIDER)
            body = body.replace(old, new)
            kind, children, _ = head.split(b" ")
            head = b" ".join([kind, children, b"%d" % len(body)])
            content = head + HEAD_BODY_DIVIDER + body
        changed_id = hashlib.sha256(content).hexdigest()
        ids[object_id.encode()] = changed_id.encode()
        changed[changed_id] = content
    return changed


def tree_of(contents: dict[str, bytes], root: str) -> ObjectTree:
    """The tree that the objects' own heads give."""
    children = get_object_children_ids_from_object_content(contents[root])
    return ObjectTree(object_id=root, children=[tree_of(contents, child) for child in children])
