"""Node policy: what a server asks is refused, clipped or left out as the node's owner wrote it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from mlx_fed.arrays import master_weights, named_arrays
from mlx_fed.clientapp import raising_app
from mlx_fed.fleet.audit import AuditLog, entries
from mlx_fed.fleet.policy import Policy, PolicyRefusal, Range
from mlx_fed.fleet.policy_file import PolicyError, load_policy
from mlx_fed.fleet.policy_gate import Gate
from mlx_fed.flower import one_run_grid
from mlx_fed.flower.error_replies import error_reply
from mlx_fed.rounds import messages
from mlx_fed.transforms.compression import parse_compression
from mlx_fed.transforms.update_transform import decode_parameters

from ..conftest import Started, free_port
from ..helpers.tasks import moons

FED = ("-m", "mlx_fed")
TASK = moons({})
NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
PARAMETERS = {
    "layers.0.weight": mx.ones((16, 2)),
    "layers.0.bias": mx.zeros((16,)),
    "layers.2.weight": mx.ones((2, 16)),
    "layers.2.bias": mx.zeros((2,)),
}


def request(kind: str = "train", *, packed: bool = True, **config: object) -> Message:
    settings = {"learning-rate": 0.1, "server-round": 1, "seed": 0, "run-id": "run-1"}
    settings |= {name.replace("_", "-"): value for name, value in config.items()}
    arrays = messages.pack if packed else master_weights.to_masters
    one_run_grid.begin_run()
    content = RecordDict({"arrays": arrays(PARAMETERS), "config": ConfigRecord(settings)})
    return Message(content, 7, kind)


def ask(gate: Gate, message: Message, task: fed.Task = TASK) -> Message:
    app = raising_app(task, around=[gate], around_training=[gate.clip])
    return app(message, Context(1, 7, {"partition-id": 0}, RecordDict(), {}))


def metrics_of(reply: Message) -> MetricRecord:
    return reply.content["metrics"]


def norm_of_update(reply: Message) -> float:
    after = messages.unpack(messages.parameters_of(reply.content)[1])
    updates = [np.asarray(after[name] - before) for name, before in PARAMETERS.items()]
    return float(np.sqrt(sum(np.square(update).sum() for update in updates)))


SETTINGS = {
    "above the range": (Range(max=5), {"local_epochs": 6}, "local-epochs at most 5, and not 6"),
    "below it": (Range(min=2), {"local_epochs": 1}, "local-epochs at least 2, and not 1"),
    "outside it": (Range(min=2, max=3), {"local_epochs": 9}, "from 2 to 3, and not 9"),
    "none of a list": (Range(values=(16, 32)), {"local_epochs": 64}, "one of 16, 32, and not 64"),
    "another type": (Range(values=(1,)), {"local_epochs": True}, "one of 1, and not True"),
    "text for a number": (Range(max=5), {"local_epochs": "9"}, "at most 5, and not '9'"),
    "not a number": (Range(max=5), {"local_epochs": float("nan")}, "at most 5, and not nan"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_is_not_allowed_is_refused_and_nothing_is_done(case):
    allowed, config, words = SETTINGS[case]

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        raise AssertionError("the data was loaded")

    task = fed.Task(TASK.model, TASK.loss, TASK.optimizer, load)
    gate = Gate(Policy(settings={"local-epochs": allowed}), "server:1")
    with pytest.raises(PolicyRefusal, match=words):
        ask(gate, request(**config), task)


def test_a_refusal_reaches_the_server_in_words():
    gate = Gate(Policy(settings={"learning-rate": Range(max=0.01)}), "server:1")
    with pytest.raises(PolicyRefusal) as caught:
        ask(gate, request())
    told = error_reply(request(), caught.value, with_text=False).error.reason
    assert told.startswith(
        "PolicyRefusal: this node's policy allows learning-rate at most 0.01, and not 0.1"
    )


def test_spellings_of_a_setting_are_one():
    gate = Gate(Policy(settings={"local-epochs": Range(max=5)}), "server:1")
    message = request()
    message.content["config"]["local_epochs"] = 6
    with pytest.raises(PolicyRefusal, match="local-epochs"):
        ask(gate, message)


def test_settings_without_a_rule_pass_unless_others_are_refused():
    strict = Policy(settings={"learning-rate": Range(max=1)}, other_settings=False)
    assert not ask(Gate(strict, "server:1"), request()).has_error()
    with pytest.raises(PolicyRefusal, match="does not name the settings momentum"):
        ask(Gate(strict, "server:1"), request(momentum=0.9))


@pytest.mark.parametrize("packed", [True, False])
def test_a_large_update_is_clipped(packed):
    free = ask(Gate(Policy(), "server:1"), request(packed=packed))
    norm = norm_of_update(free)
    clipped = ask(Gate(Policy(max_update_norm=norm / 4), "server:1"), request(packed=packed))
    assert norm_of_update(clipped) == pytest.approx(norm / 4, rel=1e-4)
    below = ask(Gate(Policy(max_update_norm=norm * 1.01), "server:1"), request(packed=packed))
    assert norm_of_update(below) == norm
    assert messages.is_packed(messages.parameters_of(clipped.content)[1]) == packed


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_only_allowed_metrics_leave(kind):
    reply = ask(Gate(Policy(metrics=("accuracy",)), "server:1"), request(kind))
    assert "num-examples" in metrics_of(reply)
    assert set(metrics_of(reply)) <= {"num-examples", "accuracy"}
    assert any("loss" in name for name in metrics_of(ask(Gate(Policy(), "s:1"), request(kind))))


def test_counts_of_a_confusion_matrix_leave_as_a_metric_does(tmp_path):
    path = tmp_path / "audit.jsonl"
    names = ("accuracy", "confusion")
    allowed = ask(Gate(Policy(metrics=names), "server:1", AuditLog(path)), request("evaluate"))
    assert sum(allowed.content["counts"]["confusion"]) == 40
    (_, sent) = entries(path)
    assert sent.fields["metrics"]["counts"] == ["confusion"]
    reply = ask(Gate(Policy(metrics=("accuracy",)), "server:1"), request("evaluate"))
    assert "confusion" not in reply.content["counts"]


def test_few_examples_are_not_trained_on():
    with pytest.raises(PolicyRefusal, match=r"200 examples or more, and Data\.train has 160"):
        Policy(min_examples=200).check_data(TASK.data(0, None))

    def stream(partition_id: int, num_partitions: int | None) -> fed.Data:
        data = TASK.data(partition_id, num_partitions)
        batch = tuple(mx.array(array[:8]) for array in data.train)
        return fed.Data(lambda key: iter([batch]), data.test)

    task = fed.Task(TASK.model, TASK.loss, TASK.optimizer, stream, config=TASK.config)
    with pytest.raises(PolicyRefusal, match="200 examples or more"):
        ask(Gate(Policy(min_examples=200), "server:1"), request(), task)


def test_daily_limits_hold_over_a_restart_and_end_after_a_day(tmp_path):
    log, now = AuditLog(tmp_path / "audit.jsonl"), [datetime.now(UTC)]
    policy = Policy(rounds_per_day=2)
    for _ in range(2):
        ask(Gate(policy, "server:1", AuditLog(log.path), clock=lambda: now[0]), request())
    gate = Gate(policy, "server:1", AuditLog(log.path), clock=lambda: now[0])
    with pytest.raises(PolicyRefusal, match="allows 2 rounds in 24 hours, 2 were sent"):
        ask(gate, request())
    now[0] += timedelta(hours=25)
    assert not ask(gate, request()).has_error()


def test_bytes_per_day():
    size = messages.count_bytes(request().content)
    gate = Gate(Policy(bytes_per_day=size + 1), "server:1")
    ask(gate, request())
    with pytest.raises(PolicyRefusal, match=f"{size} were sent, and {size} would be added"):
        ask(gate, request())
    assert not ask(gate, request("evaluate")).has_error()


@pytest.mark.parametrize(
    ("hours", "is_allowed"),
    [
        (["11:00-13:00"], True),
        (["12:01-13:00"], False),
        (["22:00-06:00"], False),
        (["22:00-06:00", "11:59-12:01"], True),
        (["13:00-12:30"], True),
    ],
)
def test_hours(tmp_path, hours, is_allowed):
    path = tmp_path / "policy.toml"
    path.write_text(f"[limits]\nhours = {hours}\n")
    gate = Gate(load_policy(path), "server:1", clock=lambda: NOON)
    if is_allowed:
        assert not ask(gate, request()).has_error()
    else:
        with pytest.raises(PolicyRefusal, match="in these hours only"):
            ask(gate, request())


def test_a_person_is_asked_once_a_run(tmp_path):
    questions: list[str] = []

    def approve(question: str) -> bool:
        questions.append(question)
        return "run-1" in question

    path = tmp_path / "audit.jsonl"
    gate = Gate(Policy(ask=True), "server:1", AuditLog(path), approve)
    for _ in range(2):
        ask(gate, request())
    assert questions == ["Train for run run-1 of server:1, with learning-rate=0.1?"]
    for _ in range(2):
        with pytest.raises(PolicyRefusal, match="has not approved this run"):
            ask(gate, request(run_id="run-2"))
    assert len(questions) == 2
    restarted = Gate(Policy(ask=True), "server:1", AuditLog(path))
    assert not ask(restarted, request()).has_error()
    with pytest.raises(PolicyRefusal, match="has not approved this run"):
        ask(restarted, request(run_id="run-3"))


@pytest.mark.parametrize("kind", [messages.ROLL_CALL, "train", "evaluate"])
@pytest.mark.parametrize("answer", [False, True])
def test_nothing_is_done_before_a_person_has_approved(kind, answer):
    loaded: list[int] = []
    questions: list[str] = []

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        loaded.append(partition_id)
        return TASK.data(partition_id, num_partitions)

    def approve(question: str) -> bool:
        assert not loaded
        questions.append(question)
        return answer

    task = fed.Task(TASK.model, TASK.loss, TASK.optimizer, load, config=TASK.config)
    gate = Gate(Policy(ask=True), "server:1", approve=approve)
    message = request(kind, prepare=True)
    if answer:
        assert not ask(gate, message, task).has_error()
    else:
        with pytest.raises(PolicyRefusal, match="has not approved this run"):
            ask(gate, message, task)
    assert (len(questions), bool(loaded)) == (1, answer)


def with_statistics(message: Message, statistics: dict[str, mx.array] | None) -> Message:
    """The message to a model with batch normalization before the last layer."""
    norm = {"layers.1.weight": mx.ones((16,)), "layers.1.bias": mx.zeros((16,))}
    shifted = {name.replace("layers.2", "layers.3"): a for name, a in PARAMETERS.items()}
    message.content["arrays"] = messages.pack(shifted | norm)
    if statistics is not None:
        message.content[messages.STATISTICS] = messages.pack(statistics)
    return message


def test_running_statistics_are_clipped_as_the_update_is():
    task = fed.Task(
        lambda: nn.Sequential(nn.Linear(2, 16), nn.BatchNorm(16), nn.ReLU(), nn.Linear(16, 2)),
        TASK.loss,
        TASK.optimizer,
        TASK.data,
        config=TASK.config,
    )
    sent = {
        "layers.1.running_mean": mx.full((16,), 1e3),
        "layers.1.running_var": mx.full((16,), 1e3),
    }

    def change(policy: Policy) -> float:
        reply = ask(Gate(policy, "server:1"), with_statistics(request(), sent), task)
        after = messages.unpack(reply.content[messages.STATISTICS])
        assert after.keys() == sent.keys()
        changes = [np.asarray(after[name] - before) for name, before in sent.items()]
        return float(np.sqrt(sum(np.square(each).sum() for each in changes)))

    assert change(Policy()) > 100
    assert change(Policy(max_update_norm=10.0)) == pytest.approx(10.0, rel=0.01)
    assert change(Policy(max_update_norm=1e9)) == change(Policy())
    with pytest.raises(PolicyRefusal, match="has not sent the running statistics"):
        ask(Gate(Policy(max_update_norm=1.0), "server:1"), with_statistics(request(), None), task)


def test_runs_and_servers():
    with pytest.raises(PolicyRefusal, match="does not allow the run run-1"):
        ask(Gate(Policy(runs=("run-2",)), "server:1"), request())
    policy = Policy(servers=("*.example.org:8080",))
    policy.check_server("fed.example.org:8080")
    with pytest.raises(PolicyRefusal, match=r"and not fed\.example\.com:8080"):
        policy.check_server("fed.example.com:8080")


def test_a_run_that_has_not_named_the_task_is_refused():
    with pytest.raises(PolicyRefusal, match="has not named the task"):
        ask(Gate(Policy(task_digest="sha256:0"), "server:1"), request())


def test_what_was_asked_and_what_left_is_in_the_log(tmp_path):
    path = tmp_path / "audit.jsonl"
    gate = Gate(Policy(settings={"learning-rate": Range(max=1)}), "server:1", AuditLog(path))
    ask(gate, request())
    with pytest.raises(PolicyRefusal):
        ask(gate, request(learning_rate=2.0))
    asked, sent, refused = entries(path)
    assert asked.event == "asked"
    assert asked.fields["settings"] == {"learning-rate": 0.1}
    assert sent.fields["round"] == 1
    assert sent.fields["bytes"] > 4 * 66
    assert len(sent.fields["arrays"]["arrays"]) == 64
    assert "num-examples" in sent.fields["metrics"]["metrics"]
    assert (refused.event, "and not 2.0" in refused.fields["reason"]) == ("refused", True)


FILES = {
    "a key that there is not": ("[limits]\nround-per-day = 3\n", "Did you mean rounds-per-day"),
    "a table that there is not": ("[limit]\nhours = []\n", "Did you mean limits"),
    "a key in no table": ("ask = true\n", "ask is not in a table"),
    "a wrong type": ('[data]\nmin-examples = "9"\n', "a whole number, 0 or more, not '9'"),
    "a negative number": ("[replies]\nmax-update-norm = -1.0\n", "a number, 0 or more"),
    "hours that are none": ('[limits]\nhours = ["8 to 9"]\n', "22:00-06:00"),
    "a range that is none": ("[settings]\nlr = { most = 1 }\n", "min = 1, max = 5"),
    "a number for a range": ("[settings]\nlr = 1\n", "a list of values or a range"),
    "no TOML": ("[limits\n", "is not TOML"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_meant_is_refused(case, tmp_path):
    text, words = FILES[case]
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=words):
        load_policy(path)


def test_the_example_in_the_docs_is_a_policy(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    path = tmp_path / "policy.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0])
    policy = load_policy(path)
    assert policy.settings["batch-size"].allows(32)
    assert not policy.settings["local-epochs"].allows(6)
    assert policy.ask


@pytest.mark.slow
def test_a_node_with_a_policy_in_a_federation(start, tmp_path):
    """The node refuses the roll call in words, the others train, and its log verifies."""
    policy = tmp_path / "policy.toml"
    policy.write_text("[settings]\nlearning-rate = { max = 0.01 }\n[replies]\nmetrics = []\n")
    where = ("--server", f"127.0.0.1:{(port := free_port())}")
    server: Started = start(
        *(*FED, "serve", "tests.helpers.tasks:moons", "--port", port, "--runs", tmp_path / "runs"),
        *("--min-nodes", 1, "--name", "run"),
    )
    server.line("Waiting for")
    held = start(
        *FED, "join", "tests.helpers.tasks:moons", *where, "--node-id", 1, "--policy", policy
    )
    server.line("(?i)refused")
    (tmp_path / "other.toml").write_text(
        '[server]\nstrategies = ["FedAvg"]\n[settings]\nlearning-rate = { max = 1 }\n'
        'others = false\n[replies]\nmetrics = ["loss"]\nmax-update-norm = 100.0\n'
    )
    allowing = ("--policy", tmp_path / "other.toml")
    free = start(*FED, "join", "tests.helpers.tasks:moons", *where, *allowing)
    assert server.ends() == 0, server.text
    assert free.ends() == 0, free.text
    held.ends()
    assert "this node's policy allows learning-rate at most 0.01, and not 0.1" in server.text
    sent = [entry for entry in entries(tmp_path / "other.audit.jsonl") if entry.event == "sent"]
    assert [entry.fields["round"] for entry in sent if entry.fields["request"] == "train"] == [
        1,
        2,
        3,
    ]
    log = tmp_path / "policy.audit.jsonl"
    events = [entry.event for entry in entries(log)]
    assert events[0] == "started"
    assert events[-1] == "ended"
    assert "refused" in events
    (tmp_path / "policy.toml").write_text('[server]\nallowed = ["elsewhere:1"]\n')
    other = start(*FED, "join", "tests.helpers.tasks:moons", *where, "--policy", policy)
    assert other.ends() == 1
    assert "allows the servers elsewhere:1" in other.text


def test_an_update_is_clipped_before_it_is_encoded():
    gate = Gate(Policy(max_update_norm=1e-3), "server:1")
    plain = ask(gate, request())
    encoded = ask(gate, request(compress="int8"))
    transform = parse_compression("int8")
    assert transform is not None
    spec = named_arrays.spec(PARAMETERS)
    message = messages.unpack(messages.parameters_of(encoded.content)[1])
    after = decode_parameters(transform(spec), message, PARAMETERS)
    norm = np.sqrt(sum(np.square(np.asarray(after[n] - a)).sum() for n, a in PARAMETERS.items()))
    assert norm_of_update(plain) == pytest.approx(1e-3, rel=1e-3)
    assert norm == pytest.approx(1e-3, rel=0.05)
