"""The round loop leads every strategy of Flower to where Flower's own loop leads it."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    QFedAvg,
    Result,
    Strategy,
)

from mlx_fed import events
import mlx_fed as fed
from mlx_fed.rounds import messages, loop, strategies
from mlx_fed.runs.history import History
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import App, LoopbackGrid
from ..helpers.federated import (
    BFLOAT16,
    CLIENT,
    NORMALIZED,
    SEED,
    SIZES,
    TASK,
    as_record,
    difference,
    federate,
    float32,
    load,
    on_train,
)
from ..helpers.strategies import CLIPPING, FIXED, MODS, STRATEGIES, Wrapper, clipped, run_ours

pytestmark = pytest.mark.usefixtures("uncompiled")


# -- the two loops -------------------------------------------------------------------------


def plain_app(task: fed.Task, mods: list | None, loss_key: str | None) -> ClientApp:
    """The obvious client: float32 arrays come in and go out, by name, and nothing is checked."""
    trainer = Trainer(task, SEED)
    app = ClientApp()

    def unpack(message: Message) -> dict[str, mx.array]:
        arrays = message.content["arrays"]
        return {
            name: mx.array(arrays[name].numpy()).astype(array.dtype)
            for name, array in trainer.parameters().items()
        }

    def data(context: Context) -> tuple[fed.Data, int]:
        partition = context.node_config["partition-id"]
        return task.data(partition, context.node_config["num-partitions"]), partition

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        examples, partition = data(context)
        config = message.content["config"]
        start = unpack(message)
        update = trainer.train(start, {}, examples, config, client=partition)
        metrics = update.metrics
        if loss_key:
            metrics[loss_key] = trainer.evaluate(start, {}, examples.train).metrics["loss"]
        arrays = as_record(update.parameters)
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = trainer.evaluate(unpack(message), {}, data(context)[0].test).metrics
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def run_stock(strategy: Strategy, task: fed.Task = TASK, num_rounds: int = 3) -> Result:
    """Flower's own loop."""
    mods = [MODS[type(strategy)]] if type(strategy) in MODS else None
    app = plain_app(task, mods, getattr(strategy, "train_loss_key", None))
    config = {**task.config, "seed": SEED}
    with strategies.collecting_only_new():
        return strategy.start(
            LoopbackGrid([app] * 7),
            as_record(Trainer(task, SEED).parameters()),
            num_rounds,
            train_config=ConfigRecord(config),
            evaluate_config=ConfigRecord(config),
        )


def watch(strategy: Strategy) -> list[dict[str, np.ndarray]]:
    """The global arrays after each round, as either loop hands them out to be evaluated."""
    seen: list[dict[str, np.ndarray]] = []
    configure = strategy.configure_evaluate

    def watched(server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid):
        seen.append({name: array.numpy() for name, array in arrays.items()})
        return configure(server_round, arrays, config, grid)

    strategy.configure_evaluate = watched
    return seen


# -- every strategy, against Flower's loop -------------------------------------------------

# The mean of linear strategies is ours: Flower's is summed in another order, and Adam's kin
# divide the roundings by small numbers. QFedAvg computes in float64 and Flower's loop keeps what
# it returns, so that it subtracts a float64 model from the replies; ours goes on from its
# float32 master. All others are the same to the bit.
TOLERANCE = {
    **dict.fromkeys(["FedAvg", "FedAvgM", "FedProx"], 3e-7),
    **dict.fromkeys(["FedAdam", "FedAdagrad", "FedYogi"], 2e-5),
    "QFedAvg": 1e-6,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_ends_where_flowers_loop_ends(name: str, tmp_path: Path):
    ours, stock = STRATEGIES[name](), STRATEGIES[name]()
    our_rounds, stock_rounds = watch(ours), watch(stock)
    result, expected = run_ours(ours, tmp_path), run_stock(stock)

    tolerance = TOLERANCE.get(name, 0)
    for our_arrays, stock_arrays in zip(our_rounds, stock_rounds, strict=True):
        assert all(array.dtype == np.float32 for array in our_arrays.values())
        assert difference(our_arrays, stock_arrays) <= tolerance
    assert difference(result.parameters, expected.arrays) <= tolerance
    for record in result.rounds:
        number = record["round"]
        for phase, theirs in (
            ("train", expected.train_metrics_clientapp),
            ("evaluate", expected.evaluate_metrics_clientapp),
        ):
            nodes = record[phase].pop("nodes")
            assert nodes == [f"node-{partition}" for partition in range(7)]
            assert record[phase] == pytest.approx(dict(theirs[number]), rel=10 * tolerance, abs=0)


MEAN = FedAvg.aggregate_train
"""It is not called: the mean is taken as replies come."""


class Collecting(FedMedian):
    """Notes how many objects a collection of garbage looks through as it aggregates."""

    def aggregate_train(self, server_round, replies):
        gc.collect()
        self.looked_through = len(gc.get_objects())
        return super().aggregate_train(server_round, replies)


def test_a_strategy_that_collects_garbage_looks_through_little(tmp_path: Path):
    """Flower's do for each reply, and a process with MLX and Flower has 200,000 objects."""
    strategy = Collecting()
    before = gc.get_freeze_count()
    federate(strategy, tmp_path, num_rounds=1)
    assert strategy.looked_through < 20_000
    assert gc.get_freeze_count() == before == 0


@pytest.mark.parametrize(
    "name", [n for n, make in STRATEGIES.items() if make().aggregate_train.__func__ is not MEAN]
)
def test_replies_are_gone_once_they_are_aggregated(name: str, tmp_path: Path):
    """Not when garbage happens to be collected: they may be large."""
    replied: list[weakref.ref] = []
    strategy = STRATEGIES[name]()
    aggregate = strategy.aggregate_train

    def aggregate_train(server_round, replies):
        replies = list(replies)
        records = (record for reply in replies for record in reply.content.values())
        arrays = [record.values() for record in records if isinstance(record, ArrayRecord)]
        replied.extend(weakref.ref(array) for some in arrays for array in some)
        return aggregate(server_round, replies)

    def listener(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase == "evaluate":
            assert [each() for each in replied] == [None] * len(replied)

    strategy.aggregate_train = aggregate_train
    gc.disable()
    try:
        run_ours(strategy, tmp_path, num_rounds=2, listener=listener)
    finally:
        gc.enable()
    assert replied


def test_strategies_do_differ_on_this_task(tmp_path: Path):
    """Or the test above would say nothing about what each strategy needs of the loop."""
    ends = set()
    for name, make in STRATEGIES.items():
        result = run_ours(make(), tmp_path / name, num_rounds=2)
        ends.add(tuple(float32(array).tobytes() for array in result.parameters.values()))
    # Server and clients clip alike, at either kind of norm.
    assert len(ends) == len(STRATEGIES) - 2


@pytest.mark.parametrize("kind", CLIPPING)
def test_noise_is_added_as_flowers_loop_adds_it(kind, tmp_path: Path, monkeypatch):
    """One round with equal noise: the same secret for our loop, as NumPy's seed for Flower's."""
    secret = bytes(range(64))
    monkeypatch.setattr("secrets.token_bytes", lambda size: secret[:size])
    result = run_ours(clipped(kind, noise=0.5), tmp_path, num_rounds=1)

    state = np.random.get_state()
    np.random.seed(np.frombuffer(secret, np.uint32))
    expected = run_stock(clipped(kind, noise=0.5), num_rounds=1)
    np.random.set_state(state)
    assert difference(result.parameters, expected.arrays) == 0


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam"])
def test_bfloat16_models_have_float32_masters(name: str, tmp_path: Path):
    ours, stock = STRATEGIES[name](), STRATEGIES[name]()
    masters, expected = watch(ours), watch(stock)
    result = run_ours(ours, tmp_path, BFLOAT16)
    run_stock(stock, BFLOAT16)

    for ours_after, stock_after in zip(masters, expected, strict=True):
        assert difference(ours_after, stock_after) <= TOLERANCE.get(name, 0)
        assert all(array.dtype == np.float32 for array in ours_after.values())
        rounded = {k: mx.array(a).astype(mx.bfloat16) for k, a in ours_after.items()}
        assert difference(ours_after, rounded) > 0
    assert all(array.dtype == mx.bfloat16 for array in result.parameters.values())
    assert difference(result.parameters, rounded) == 0


# -- what strategies need of the loop and its clients --------------------------------------


def test_optimizers_leave_statistics_alone(tmp_path: Path):
    """FedAdam on a variance makes it negative; it is averaged by examples instead."""
    replies: list[Message] = []
    app = on_train(replies.append, fed.client_app(NORMALIZED))
    strategy = FedAdam(eta=0.5)
    seen = watch(strategy)
    result = federate(strategy, tmp_path, [app] * 3, task=NORMALIZED)

    trainer = Trainer(NORMALIZED, SEED)
    assert list(seen[-1]) == list(trainer.spec)
    assert list(result.statistics) == ["layers.1.running_mean", "layers.1.running_var"]
    last = [messages.unpack(r.content["statistics"]) for r in replies[-3:]]
    examples = [r.content["metrics"]["num-examples"] for r in replies[-3:]]
    assert sorted(examples) == sorted(SIZES[:3])
    for name, mean in result.statistics.items():
        expected = np.average([float32(s[name]) for s in last], axis=0, weights=examples)
        np.testing.assert_allclose(float32(mean), expected, rtol=1e-6, atol=1e-7)
        assert difference({name: mean}, {name: trainer.statistics()[name]}) > 0
    assert (float32(result.statistics["layers.1.running_var"]) > 0).all()


def one_record(message: Message, context: Context, call_next: App) -> Message:
    """A mod that takes one record, both ways, as Flower's do."""
    (before,) = message.content.array_records.values()
    reply = call_next(message, context)
    if reply.has_content():
        (after,) = reply.content.array_records.values()
        assert list(after) == list(before)
    return reply


def test_statistics_pass_by_the_mods(tmp_path: Path):
    """A mod sees one record of float32 arrays, and the statistics are averaged nevertheless."""
    with_mod = fed.client_app(NORMALIZED, [one_record])
    passed = federate(FedAvg(), tmp_path / "passed", [with_mod] * 3, task=NORMALIZED)
    plain = fed.client_app(NORMALIZED)
    free = federate(FedAvg(), tmp_path / "free", [plain] * 3, task=NORMALIZED)

    assert difference(passed.parameters, free.parameters) == 0
    assert difference(passed.statistics, free.statistics) == 0


def test_a_failed_client_with_mods_keeps_no_old_statistics(tmp_path: Path):
    def optimizer(config: fed.task.Config) -> optim.Optimizer:
        if config.get("server-round") == 1 and not config.get("prepare"):
            raise RuntimeError("the disk of this node is full")
        return optim.SGD(0.1)

    well = fed.client_app(NORMALIZED, [one_record])
    ill = fed.client_app(replace(NORMALIZED, optimizer=optimizer), [one_record])
    grid = LoopbackGrid([well, ill])
    strategy = FedAvg()
    settings = RunSettings(num_rounds=1, seed=SEED)
    result = loop.run(grid, strategy, Trainer(NORMALIZED, SEED), settings, History(tmp_path))

    assert "the disk of this node is full" in result.rounds[0]["refused"][0]["reason"]
    # It would evaluate with them, in place of the round's.
    assert messages.STATISTICS not in grid.contexts[2].state


@pytest.mark.parametrize("key", ["train_loss", "loss-before"])
def test_qfedavg_gets_the_loss_before_training(key: str, tmp_path: Path):
    strategy = QFedAvg(client_learning_rate=0.2, q=0.5, train_loss_key=key)
    result = federate(strategy, tmp_path, (CLIENT,) * 3, num_rounds=1)

    trainer = Trainer(TASK, SEED)
    losses = [
        trainer.evaluate(trainer.parameters(), {}, load(partition, 3).train).metrics["loss"]
        for partition in range(3)
    ]
    train = result.rounds[0]["train"]
    assert train[key] == pytest.approx(np.average(losses, weights=SIZES[:3]))
    assert train[key] != pytest.approx(train["loss"])


def backwards_in_shards(reply: Message) -> None:
    arrays = messages.unpack(reply.content["arrays"])
    shards = [messages.pack({name: arrays[name]}) for name in reversed(arrays)]
    named = {f"shard-{n}": array for n, shard in enumerate(shards) for array in shard.values()}
    reply.content["arrays"] = ArrayRecord(named)


def backwards_in_numpy(reply: Message) -> None:
    arrays = messages.unpack(reply.content["arrays"])
    reply.content["arrays"] = as_record({name: arrays[name] for name in reversed(arrays)})


@pytest.mark.parametrize("shuffle", [backwards_in_shards, backwards_in_numpy])
@pytest.mark.parametrize(
    "name", ["FedAvgM", "QFedAvg", "Krum", "DifferentialPrivacyServerSideFixedClipping"]
)
def test_order_of_arrays_in_a_reply_is_of_no_account(name: str, shuffle, tmp_path: Path):
    """These strategies pair arrays by position."""
    expected = federate(STRATEGIES[name](), tmp_path / "in order", num_rounds=2)
    apps = [on_train(shuffle) if partition % 2 else CLIENT for partition in range(7)]
    result = federate(STRATEGIES[name](), tmp_path / "shuffled", apps, num_rounds=2)
    assert difference(result.parameters, expected.parameters) == 0
    assert not any(record["refused"] for record in result.rounds)


class OwnStrategy(Strategy):
    """Trains the first and the last node, at rates of their own, under names of its own."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        first, *_, last = grid.get_node_ids()
        for node_id, rate in ((first, 0.0), (last, 0.5)):
            settings = ConfigRecord({"learning-rate": rate, "server-round": server_round})
            yield Message(RecordDict({"model": arrays, "how": settings}), node_id, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        first, last = (reply.content["model"] for reply in replies)
        half = {k: Array((first[k].numpy() + last[k].numpy()) / 2) for k in first}
        return ArrayRecord(half), MetricRecord({"trained": 2})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        raise AssertionError("nobody was asked to evaluate")

    def summary(self) -> None: ...


def test_a_strategy_of_ones_own(tmp_path: Path):
    result = federate(OwnStrategy(), tmp_path, (CLIENT,) * 3, num_rounds=2)

    trainer = Trainer(TASK, SEED)
    expected = trainer.parameters()
    for number in (1, 2):
        config = {"seed": SEED, "server-round": number, "learning-rate": 0.5}
        trained = trainer.train(expected, {}, load(2, 3), config, client=2).parameters
        expected = {name: (expected[name] + trained[name]) / 2 for name in expected}
    assert difference(result.parameters, expected) == 0
    assert [record["train"] for record in result.rounds] == [
        {"trained": 2, "nodes": ["node-0", "node-2"]}
    ] * 2
    assert [record["evaluate"] for record in result.rounds] == [{"nodes": []}] * 2


# -- chance --------------------------------------------------------------------------------


def sampled(folder: Path, seed: int, node_ids: Sequence[int]) -> list[list[str]]:
    strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.5)
    result = federate(strategy, folder, (CLIENT,) * 6, seed=seed, node_ids=node_ids)
    return [record[phase]["nodes"] for record in result.rounds for phase in ("train", "evaluate")]


def test_the_seed_decides_who_is_sampled(tmp_path: Path):
    """Flower draws from node ids, which are random; names are what stays from run to run."""
    one = sampled(tmp_path / "one", SEED, [501, 17, 93, 2**63, 8, 77])
    two = sampled(tmp_path / "two", SEED, [4, 3000, 61, 5, 2**62, 12])
    other = sampled(tmp_path / "other", SEED + 1, [501, 17, 93, 2**63, 8, 77])
    assert one == two
    assert one != other
    assert all(len(nodes) == 3 for nodes in one)
    assert len({tuple(nodes) for nodes in one}) > 1


def test_global_random_states_are_put_back(tmp_path: Path):
    before = random.getstate(), np.random.get_state()
    federate(clipped(FIXED, noise=1.0), tmp_path, [fed.client_app(TASK, [fixedclipping_mod])] * 7)
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(), before[1])


@pytest.mark.parametrize("wrap", [lambda dp: dp, lambda dp: Wrapper(dp)], ids=["bare", "wrapped"])
def test_noise_for_privacy_does_not_come_from_the_seed(wrap, tmp_path: Path):
    """Nodes know the seed, and could take the noise off again."""

    def run(name: str, noise: float) -> loop.Result:
        strategy = wrap(clipped(DifferentialPrivacyServerSideFixedClipping, noise))
        return federate(strategy, tmp_path / name, num_rounds=1)

    clean, again = run("clean", 0.0), run("again", 0.0)
    one, two = run("one", 1.0), run("two", 1.0)
    assert difference(clean.parameters, again.parameters) == 0
    assert difference(one.parameters, two.parameters) > 0
    assert difference(one.parameters, clean.parameters) > 0


@pytest.mark.parametrize("wrap", [lambda own: own, lambda own: Wrapper(own)])
@pytest.mark.parametrize("private", [False, True])
def test_a_strategy_of_ones_own_says_whether_its_noise_is_private(wrap, private):
    class Noisy(FedAvg):
        private_noise = private

    def draw() -> float:
        with strategies.seeded(wrap(Noisy()), SEED, 1, "aggregate_train"):
            return np.random.normal()

    assert (draw() != draw()) == private
