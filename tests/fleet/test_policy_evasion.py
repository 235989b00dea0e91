"""Ways around a node's policy, each of which is refused before anything is done or leaves."""

from datetime import UTC, datetime, timedelta

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from mlx_fed.arrays import master_weights
from mlx_fed.clientapp import raising_app
from mlx_fed.fleet import policy_gate
from mlx_fed.fleet.audit import AuditLog, entries
from mlx_fed.fleet.policy import Policy, PolicyRefusal, Range
from mlx_fed.fleet.policy_file import PolicyError, load_policy
from mlx_fed.fleet.policy_gate import Gate, clip_update
from mlx_fed.flower import one_run_grid
from mlx_fed.rounds import messages

from ..helpers.tasks import moons

TASK = moons({})
SPEC = {
    "layers.0.weight": (16, 2),
    "layers.0.bias": (16,),
    "layers.2.weight": (2, 16),
    "layers.2.bias": (2,),
}


def request(kind: str = "train", scale: float = 1.0, **config: object) -> Message:
    settings = {"learning-rate": 0.1, "server-round": 1, "seed": 0, "run-id": "run-1"}
    settings |= {name.replace("_", "-"): value for name, value in config.items()}
    parameters = {name: scale * mx.ones(shape) for name, shape in SPEC.items()}
    one_run_grid.begin_run()
    content = RecordDict({"arrays": messages.pack(parameters), "config": ConfigRecord(settings)})
    return Message(content, 7, kind)


def ask(gate: Gate, message: Message) -> Message:
    app = raising_app(TASK, around=[gate], around_training=[gate.clip])
    return app(message, Context(1, 7, {"partition-id": 0}, RecordDict(), {}))


def refuses(gate: Gate, message: Message, words: str) -> None:
    with pytest.raises(PolicyRefusal, match=words):
        ask(gate, message)


@pytest.mark.parametrize("kind", ["train", "train.default"])
def test_a_type_of_message_has_one_meaning(kind):
    """Flower takes ``train.default`` as ``train``."""
    gate = Gate(Policy(rounds_per_day=1, max_update_norm=1e-3), "server:1")
    reply = ask(gate, request(kind))
    _, record = messages.parameters_of(reply.content)
    norm = sum(float(((array - 1) ** 2).sum()) for array in messages.unpack(record).values()) ** 0.5
    assert norm <= 1e-3
    refuses(gate, request("train.default"), "1 rounds in 24 hours")
    refuses(Gate(Policy(ask=True), "server:1"), request(kind), "has not approved")


@pytest.mark.parametrize("kind", ["query", "query.x", "train.x", "evaluate.x"])
def test_other_requests_are_refused_and_recorded(tmp_path, kind):
    gate = Gate(Policy(), "server:1", AuditLog(tmp_path / "log"))
    message = request("query.x")
    message.metadata.__dict__["_message_type"] = kind
    with pytest.raises(PolicyRefusal, match="no requests of the kind"):
        gate(
            message, Context(1, 7, {}, RecordDict(), {}), lambda *_: pytest.fail("it was answered")
        )
    assert [entry.event for entry in entries(tmp_path / "log")] == ["refused"]


LIMITED = Policy(settings={"local-epochs": Range(max=5), "learning-rate": Range(min=1e-4)})
EVASIONS = {
    "steps for epochs": (LIMITED, {"local_steps": 10**9}, "no range for local-steps"),
    "one example": (
        Policy(min_examples=100),
        {"local_steps": 1, "batch_size": 1},
        "no range for local-steps",
    ),
    "infinite": (LIMITED, {"learning_rate": float("inf")}, "at least 0.0001, and not inf"),
    "a list": (LIMITED, {"local_epochs": [6]}, "at most 5"),
    "bytes": (LIMITED, {"local_epochs": b"6"}, "at most 5"),
    "a truth value": (LIMITED, {"local_epochs": True}, "at most 5"),
    "a huge number": (LIMITED, {"local_epochs": 2**62}, "at most 5"),
    "a long run id": (Policy(), {"run_id": "r" * 300}, "at most 200 characters"),
    "many settings": (Policy(), {f"s{n}": n for n in range(300)}, "at most 200 settings"),
    "a long name": (Policy(), {"s" * 300: 1}, "names of at most"),
    "more than a person reads": (
        Policy(ask=True),
        {f"aaaa{n}": "x" * 100 for n in range(20)} | {"local_epochs": 10**6},
        "more settings than a person can be shown",
    ),
}


@pytest.mark.parametrize("case", EVASIONS)
def test_settings(case, tmp_path):
    policy, config, words = EVASIONS[case]
    gate = Gate(policy, "server:1", AuditLog(tmp_path / "log"), lambda question: True)
    refuses(gate, request(**config), words)
    (entry,) = entries(tmp_path / "log")
    assert entry.event == "refused"
    assert entry.fields["settings"]


def test_two_spellings_with_two_values_are_refused_and_recorded(tmp_path):
    message = request(local_epochs=5)
    message.content["config"]["local_epochs"] = 6
    refuses(Gate(LIMITED, "server:1", AuditLog(tmp_path / "log")), message, "are one setting")
    assert [entry.event for entry in entries(tmp_path / "log")] == ["refused"]


@pytest.mark.parametrize("key", ["num-examples", "loss", "accuracy"])
def test_a_loss_does_not_leave_under_another_name(key):
    gate = Gate(Policy(metrics=("accuracy",)), "server:1")
    with pytest.raises(fed.FedError, match="is another metric"):
        ask(gate, request(train_loss_key=key))
    assert [*ask(gate, request(train_loss_key="before")).content["metrics"]] == ["num-examples"]


# -- approval ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate", messages.ROLL_CALL])
def test_nothing_is_computed_before_the_approval(kind):
    """The roll call may train one step, to compile it."""
    gate = Gate(Policy(ask=True), "server:1")
    refuses(gate, request(kind, prepare=True), "has not approved this run")


def test_an_approval_is_for_one_server(tmp_path):
    path = tmp_path / "log"
    assert ask(Gate(Policy(ask=True), "a:1", AuditLog(path), lambda question: True), request())
    assert ask(Gate(Policy(ask=True), "a:1", AuditLog(path)), request())
    refuses(Gate(Policy(ask=True), "b:1", AuditLog(path)), request(), "has not approved")


def test_a_question_does_not_steer_the_terminal(monkeypatch):
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or "y")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    gate = Gate(Policy(ask=True), "server:1", approve=policy_gate.ask_at_terminal)
    ask(gate, request(run_id="a\x1b[2Jb", note="\r\u202eevil"))
    assert questions[0].isprintable()


# -- limits ------------------------------------------------------------------------------------


def test_two_processes_share_the_limits_of_a_day(tmp_path):
    """Both started before either sent anything."""
    gates = [
        Gate(Policy(rounds_per_day=3), f"server:{n}", AuditLog(tmp_path / "log")) for n in range(2)
    ]
    for number in range(3):
        ask(gates[number % 2], request())
    for gate in gates:
        refuses(gate, request(), "3 were sent")


def test_a_reply_that_another_process_has_made_too_much_does_not_leave(tmp_path):
    first, second = (
        Gate(Policy(rounds_per_day=1), "server:1", AuditLog(tmp_path / "log")) for _ in range(2)
    )
    context = Context(1, 7, {"partition-id": 0}, RecordDict(), {})
    app = raising_app(TASK)

    def overtaken(message: Message, context: Context) -> Message:
        ask(second, request())
        return app(message, context)

    with pytest.raises(PolicyRefusal, match="1 were sent"):
        first(request(), context, overtaken)
    events = [entry.event for entry in entries(tmp_path / "log")]
    assert events == ["asked", "asked", "sent", "refused"]


def test_evaluations_have_the_same_limit():
    gate = Gate(Policy(rounds_per_day=1), "server:1")
    ask(gate, request())
    ask(gate, request("evaluate"))
    refuses(gate, request("evaluate"), "1 rounds in 24 hours")


@pytest.mark.parametrize("days", [-400, -2, 2, 400])
def test_a_clock_that_was_wrong_for_a_while_resets_nothing(days):
    times = [datetime.now(UTC)]
    gate = Gate(Policy(rounds_per_day=1), "server:1", clock=lambda: times[0])
    ask(gate, request())
    times[0] += timedelta(days=days)
    try:
        ask(gate, request())
    except PolicyRefusal:
        assert days < 0
    times[0] -= timedelta(days=days)
    refuses(gate, request(), "rounds in 24 hours")


def test_another_fingerprint_takes_a_run_back():
    digest = policy_gate._digest("{}")
    gate = Gate(Policy(task_digest=digest), "server:1")
    ask(gate, request(messages.ROLL_CALL, fingerprint="{}"))
    assert ask(gate, request())
    refuses(gate, request(messages.ROLL_CALL, fingerprint='{"a": "b"}'), "allows the task")
    refuses(gate, request(), "has not named the task")


# -- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0, 6e4])
def test_a_clipped_update_is_within_the_norm_whatever_is_sent(dtype, scale):
    """Rounding beside large parameters may make an update larger than it was clipped to."""
    start = {"w": (scale * mx.random.normal((64, 8), key=mx.random.key(0))).astype(mx.float32)}
    clipped_start = {"w": mx.clip(start["w"], -6e4, 6e4)}
    end = {"w": (clipped_start["w"] * 1.05).astype(dtype)}
    after = clip_update(messages.pack(clipped_start), messages.pack(end), 0.5)
    before = np.asarray(clipped_start["w"].astype(dtype).astype(mx.float32)).astype(np.float64)
    result = np.asarray(messages.unpack(after)["w"].astype(mx.float32))
    assert np.linalg.norm(result - before) <= 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_parameters_that_overflow_are_refused(value):
    with pytest.raises((PolicyRefusal, ValueError, fed.FedError)):
        ask(Gate(Policy(max_update_norm=1.0), "server:1"), request(scale=value))


def test_plain_arrays_are_clipped_too():
    parameters = {name: mx.ones(shape) for name, shape in SPEC.items()}
    far = {name: 9 * array for name, array in parameters.items()}
    after = clip_update(master_weights.to_masters(parameters), master_weights.to_masters(far), 1.0)
    assert not messages.is_packed(after)


# -- the file ----------------------------------------------------------------------------------

FILES = {
    "a slip": ("[settings]\nlocal-epoch = { max = 5 }\n", "Did you mean local-epochs"),
    "another case": ("[settings]\nLocal-Epochs = { max = 5 }\n", "Did you mean local-epochs"),
    "no value": ("[settings]\nlocal-epochs = { min = 5, max = 1 }\n", "no value"),
    "NaN": ("[settings]\nlocal-epochs = { max = nan }\n", "no value"),
    "a zone": ('[limits]\nhours = ["22:00Z-06:00Z"]\n', "22:00-06:00"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_limits_less_than_it_says_is_refused(case, tmp_path):
    text, words = FILES[case]
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=words):
        load_policy(path)


def test_an_empty_list_allows_nothing(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[limits]\nhours = []\n")
    refuses(Gate(load_policy(path), "server:1"), request(), "these hours only: none")


@pytest.mark.parametrize(
    ("pattern", "address", "is_allowed"),
    [
        ("[::1]:8080", "[::1]:8080", True),
        ("[::1]:8080", "1:8080", False),
        ("*.example.org:8080", "fed.EXAMPLE.org:8080", True),
        ("fed?example.org:8080", "fed.example.org:8080", False),
        ("fed.example.org:8080", "fedXexample.org:8080", False),
    ],
)
def test_a_servers_address_is_taken_literally(pattern, address, is_allowed):
    policy = Policy(servers=(pattern,))
    if is_allowed:
        policy.check_server(address)
    else:
        with pytest.raises(PolicyRefusal):
            policy.check_server(address)
