"""Hostile acts, each of which costs its own reply: all others' bits and rounds stay as they are."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from mlx_fed.fleet.audit import AuditError, AuditLog, entries
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower.transport import RequestRefused, Unreachable
from mlx_fed.rounds import messages

from ..conftest import command
from ..helpers.fleet_routes import Fleet
from ..helpers.run_folders import read_history
from ..helpers.tasks import moons
from .acts import KINDS
from .acts.servers import ALLOWED, POLICY
from .running import FED, HostileNode, Running, roll_call_answer

ROOT = Path(__file__).parents[2]
TASK = "tests.helpers.tasks:moons"


def test_the_docs_count_the_acts():
    text = (ROOT / "docs" / "reliability.md").read_text()
    for kind, acts in KINDS.items():
        assert re.search(rf"\| {re.escape(kind)} \| {len(acts)} \|", text), (kind, len(acts))
    total = sum(map(len, KINDS.values()))
    assert total >= 200
    assert f"| in all | {total} |" in text


# -- nodes against a server --------------------------------------------------------------------


class Attacker:
    """A node that answers what it is asked with the acts of a kind, one at a time.

    Args:
        running (Running): The federation.
        name (str): The node's.

    Attributes:
        log (list): The act, the phase and the number of rounds that were over, of each act.
    """

    def __init__(self, running: Running, name: str):
        self.running, self.name = running, name
        self.log: list[tuple[str, str, int]] = []
        self.node: HostileNode | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        """Keeps the node online while it is busy."""
        while True:
            with self._lock, suppress(Unreachable):
                if self.node is not None:
                    self.node.beat()
            time.sleep(2)

    def question(self, kind: str, between: Callable[[Message], Message]) -> Message:
        """The next question of a kind; it joins anew where it was sent away."""
        while True:
            with self._lock:
                self.node = self.node or self.running.hostile(self.name)
            question = self.node.asked(60)
            asked = question.metadata.message_type
            if asked == kind:
                return question
            if asked == messages.ROLL_CALL:
                answer = roll_call_answer(question, self.name, self.node.number)
                self.node.send(answer, 0.0)
            elif asked == messages.LEAVE:
                self.leave()
            else:
                self.node.send(between(question), 0.0)

    def note(self, act: str, kind: str) -> None:
        self.log.append((act, kind, self.running.rounds))

    def leave(self) -> None:
        """Leaves, so that nobody waits for what it has not sent."""
        with self._lock:
            if self.node is not None:
                self.node.leave()
            self.node = None


def refused(question: Message) -> Message:
    """A reply that does not count."""
    return Message(RecordDict(), reply_to=question)


@pytest.fixture(scope="module", params=["TLS", "plaintext"])
def running(request, start_once, tmp_path_factory) -> Iterator[Running]:
    running = Running(start_once, tmp_path_factory.mktemp("run"), request.param == "TLS")
    running.goes_on()
    return running


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_acts_of_nodes_and_strangers(running):
    attacker = Attacker(running, "attacker")
    for name, act in KINDS["replies to training"].items():
        question = attacker.question("train", refused)
        attacker.note(name, "train")
        try_to_send(attacker, act(question))
    for name, act in KINDS["replies to evaluation"].items():
        question = attacker.question("evaluate", refused)
        attacker.note(name, "evaluate")
        try_to_send(attacker, act(question))
    for name, act in KINDS["object trees"].items():
        question = attacker.question("train", refused)
        attacker.note(name, "train")
        act(attacker.node, question)
        attacker.leave()
    attacker.leave()
    served = []
    for name, act in KINDS["answers to the roll call"].items():
        node = running.hostile(attacker.name)
        attacker.note(name, "roll call")
        node.send(act(node.asked(), attacker.name, node.number), 0.0)
        if node.asked().metadata.message_type != messages.LEAVE:
            served.append(name)
        node.leave()
    node = running.hostile(attacker.name)
    for name, request in KINDS["HTTP, TLS and identity"].items():
        attacker.note(name, "request")
        status = request(running, node)
        if (status is not None and not 400 <= status < 500) or status in (426,):
            served.append((name, status))
    node.leave()
    assert not served
    running.goes_on(3)
    assert "Traceback" not in running.server.text
    check_history(running, attacker)


def try_to_send(attacker: Attacker, reply: Message) -> None:
    """Sends a reply, which the server may refuse to take; nobody waits for another one."""
    assert attacker.node is not None
    try:
        attacker.node.send(reply, 0.0)
    except (RequestRefused, Unreachable):
        attacker.leave()


def check_history(running: Running, attacker: Attacker) -> None:
    """Each round has both honest nodes' replies and no other, and the bits of a simulation.

    With TLS the nodes' numbers, and so their data, are not those of a simulation of two clients.
    """
    running.server.interrupt()
    running.server.ends()
    folder = running.folder / "runs" / "run"
    records = read_history(folder)
    phases = [(phase, record["round"]) for record in records for phase in ("train", "evaluate")]
    by_phase = {
        (phase, record["round"]): record[phase].get("nodes")
        for record in records
        for phase in ("train", "evaluate")
    }
    counted = {
        act
        for act, phase, rounds in attacker.log
        for number in (rounds, rounds + 1, rounds + 2)
        if attacker.name in (by_phase.get((phase, number)) or ())
    }
    assert not counted
    honest = [f"honest-{n}" if running.secure else f"node-{n}" for n in range(2)]
    assert [by_phase[each] for each in phases] == [honest] * len(phases)
    reasons = Counter(refusal["reason"][:60] for record in records for refusal in record["refused"])
    assert all(
        refusal["node"] == attacker.name for record in records for refusal in record["refused"]
    ), reasons
    if running.secure:
        return
    reference = fed.simulate(
        moons({}), "FedAvg", 2, num_rounds=len(records), workers=0, runs=running.folder / "other"
    )
    for record, expected in zip(records, reference.rounds, strict=True):
        assert record["train"]["loss"] == expected["train"]["loss"], record["round"]
        assert record["evaluate"]["loss"] == expected["evaluate"]["loss"], record["round"]


# -- a server against a node -------------------------------------------------------------------


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as state:
        yield Fleet(state, listening.getsockname()[1])
        state.finish()


@pytest.mark.slow
def test_a_server_gets_nothing_that_the_nodes_policy_forbids(fleet: Fleet, start, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    where = ("--server", f"127.0.0.1:{fleet.port}", "--policy", policy)
    node = start(*FED, "join", TASK, *where)
    node.line("Joined")
    (node_id,) = wait_for(fleet.grid.get_node_ids)
    parameters = {
        "layers.0.weight": mx.ones((16, 2)),
        "layers.0.bias": mx.zeros((16,)),
        "layers.2.weight": mx.ones((2, 16)),
        "layers.2.bias": mx.zeros((2,)),
    }

    def ask(kind: str, settings: dict) -> Message:
        content = RecordDict(
            {"arrays": messages.pack(parameters), "config": ConfigRecord(settings)}
        )
        message = Message(content, node_id, kind)
        (reply,) = fleet.grid.send_and_receive([message], timeout=60)
        return reply

    before = ask("train", ALLOWED)
    assert not before.has_error()
    for name, act in KINDS["a server against a node with a policy"].items():
        kind, settings = act()
        merged = {k: v for k, v in {**ALLOWED, **settings}.items() if v is not None}
        reply = ask(kind, merged)
        # A roll call is answered with who the node is, and why it refuses.
        record = {} if reply.has_error() else dict(reply.content.config_records["node"])
        assert record.keys() <= {"name", "partition-id", "tags", "failure"}, name
        assert reply.has_error() or [*reply.content] == ["node"], name
        reason = reply.error.reason if reply.has_error() else str(record.get("failure"))
        assert re.match("PolicyRefusal|SettingsError", reason), (name, reason)
        assert "\x1b" not in node.text
    after = ask("train", ALLOWED)
    assert not after.has_error()
    assert arrays_of(after) == arrays_of(before)
    assert set(after.content["metrics"]) == {"num-examples", "loss"}
    log = [entry.event for entry in entries(tmp_path / "policy.audit.jsonl")]
    assert log.count("sent") == 2
    assert log.count("refused") + log.count("failed") == len(
        KINDS["a server against a node with a policy"]
    )


def arrays_of(reply: Message) -> dict[str, list]:
    _, record = messages.parameters_of(reply.content)
    return {name: array.tolist() for name, array in messages.unpack(record).items()}


def wait_for(function: Callable[[], object], timeout: float = 60) -> list:
    """What the function gives once that is not empty."""
    deadline = time.monotonic() + timeout
    while not (values := list(function())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return values


# -- files -------------------------------------------------------------------------------------


AS_A_CRASH_LEAVES_IT = (
    "a line without its end",
    "without the last line break",
    "bytes at the end",
)
"""What is left of the last line is kept in an entry of its own when the log goes on."""


@pytest.mark.parametrize("name", KINDS["audit logs"])
def test_a_change_of_an_audit_log_is_found(tmp_path, name):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    for event, size in (("sent", 1), ("refused", 2), ("sent", 3), ("sent", 4)):
        log.append(event, run="run-1", bytes=size)
    content = path.read_bytes()
    path.write_bytes(KINDS["audit logs"][name](content))
    assert path.read_bytes() != content
    shown = command("audit", "verify", path)
    assert shown.code == 1
    assert re.search("line [1-5]", shown.text)
    if name not in AS_A_CRASH_LEAVES_IT:
        with pytest.raises(AuditError):
            AuditLog(path).append("sent")
