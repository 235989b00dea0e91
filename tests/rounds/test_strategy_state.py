"""What of a strategy is kept, and that it is the same when it is given back."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mlx_fed.rounds.checkpoint import Checkpoint, Checkpoints
from mlx_fed.rounds.strategy_restore import restore
from mlx_fed.rounds.strategy_state import State, StateError, snapshot

from ..helpers.strategies import STRATEGIES, Wrapper

pytestmark = pytest.mark.usefixtures("uncompiled")


class Holding(FedAvg):
    """A strategy that holds something, or nothing yet."""

    def __init__(self, held: Any = None):
        super().__init__()
        self.held = held


def through_a_file(state: State) -> State:
    """The state as it is read from a checkpoint."""
    with TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder), 1)
        kept.save(Checkpoint(1, ArrayRecord(), {}, state, None, {}), lambda: None)
        kept.wait()
        checkpoint = kept.last(lambda path, why: pytest.fail(why))
    assert checkpoint is not None
    return checkpoint.strategy


def there_and_back(held: Any) -> Any:
    strategy = Holding()
    restore(strategy, through_a_file(snapshot(Holding(held))))
    return strategy.held


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit and of the same types."""
    assert type(one) is type(other)
    if isinstance(one, (dict, ArrayRecord, MetricRecord, ConfigRecord)):
        assert_same(list(one.items()), list(other.items()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, (np.ndarray, np.generic)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes("A") == other.tobytes("A")
        assert one.flags.f_contiguous == other.flags.f_contiguous
    elif isinstance(one, mx.array):
        assert one.dtype == other.dtype
        assert mx.array_equal(one, other, equal_nan=True)
    elif isinstance(one, float):
        assert np.float64(one).tobytes() == np.float64(other).tobytes() or one != one
    else:
        assert one == other


ARRAYS = npst.arrays(
    st.one_of(
        npst.boolean_dtypes(),
        npst.integer_dtypes(endianness="?"),
        npst.floating_dtypes(endianness="?"),
        npst.complex_number_dtypes(),
        npst.unicode_string_dtypes(min_len=1),
    ),
    npst.array_shapes(min_dims=0, min_side=0, max_side=4),
)
FLOWERS = st.builds(Array, npst.arrays(np.float32, (2, 3)))
KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers()))
RECORD_VALUES = st.one_of(
    st.integers(-(2**40), 2**40), st.floats(), st.lists(st.floats(), max_size=3)
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    ARRAYS,
    ARRAYS.map(lambda array: array.T),
    ARRAYS.filter(lambda array: array.size).map(lambda array: array.flat[0]),
    npst.arrays(np.float32, (3,)).map(lambda array: mx.array(array).astype(mx.bfloat16)),
    FLOWERS,
    st.dictionaries(st.text(), FLOWERS, max_size=3).map(ArrayRecord),
    st.dictionaries(st.text(), RECORD_VALUES, max_size=3).map(MetricRecord),
    st.dictionaries(st.text(), st.text(), max_size=3).map(ConfigRecord),
)
HELD = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(HELD)
def test_whatever_a_strategy_may_hold_comes_back(held: Any):
    assert_same(there_and_back(held), held)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_flower_can_be_kept(name: str):
    make = STRATEGIES[name]
    one, other = make(), make()
    restore(other, through_a_file(snapshot(one)))
    assert snapshot(other).tree == snapshot(one).tree


def test_what_the_strategy_does_later_does_not_change_what_was_kept():
    held = {"array": np.ones(3), "list": [1], "record": ArrayRecord({"w": Array(np.ones(2))})}
    strategy = Holding(held)
    state = snapshot(strategy)
    held["array"] += 1
    held["list"].append(2)
    held["record"].clear()
    restore(strategy, through_a_file(state))
    assert strategy.held["array"].tolist() == [1, 1, 1]
    assert strategy.held["list"] == [1]
    assert list(strategy.held["record"]) == ["w"]
    strategy.held["array"] += 1  # and it may be changed


def test_what_is_one_object_is_one_object_again():
    array = np.arange(6.0).reshape(2, 3)
    held: list[Any] = [array, {"again": array}, (array, array)]
    held.append(held)
    back = there_and_back(held)
    assert back[0] is back[1]["again"] is back[2][0] is back[2][1]
    assert back[3] is back
    assert len(snapshot(Holding(held)).arrays) == 1


def test_functions_stay_the_new_strategys_own():
    def mean(contents: list, weighted_by: str) -> MetricRecord:
        return MetricRecord()

    strategy = FedAvg(train_metrics_aggr_fn=mean)
    restore(strategy, through_a_file(snapshot(FedAvg())))
    assert strategy.train_metrics_aggr_fn is mean
    in_dict = Holding({"functions": [len], "n": 1})
    restore(in_dict, through_a_file(snapshot(Holding({"functions": [max], "n": 2}))))
    assert in_dict.held == {"functions": [len], "n": 2}
    with pytest.raises(StateError, match=r"Holding\.held was a function"):
        restore(Holding(), through_a_file(snapshot(Holding(max))))


def test_nested_strategies_get_their_state():
    inner = FedAdam()
    inner.m_t = {"w": np.ones(2, np.float32)}
    new = Wrapper(FedAdam())
    own = new.strategy
    restore(new, through_a_file(snapshot(Wrapper(inner))))
    assert new.strategy is own
    assert own.m_t["w"].tolist() == [1, 1]
    with pytest.raises(StateError, match=r"Wrapper\.strategy was a flwr.*FedAdam, and is a flwr"):
        restore(Wrapper(FedMedian()), snapshot(Wrapper(inner)))


def test_how_many_nodes_to_wait_for_may_change():
    strategy = FedAvg(min_available_nodes=2, fraction_train=0.5)
    restore(strategy, snapshot(FedAvg(min_available_nodes=5, fraction_train=0.25)))
    assert (strategy.min_available_nodes, strategy.fraction_train) == (2, 0.25)


@pytest.mark.parametrize(
    ("held", "what"),
    [
        ({"rng": np.random.default_rng(0)}, r"Holding\.held\['rng'\] is a numpy.*Generator"),
        ([1, {2}], r"Holding\.held\[1\] is a set"),
        (np.array([None]), r"Holding\.held is a numpy.ndarray"),
        (object(), r"Holding\.held is a object"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(held: Any, what: str):
    with pytest.raises(StateError, match=what + r".*state\(\).*load_state\(kept\)"):
        snapshot(Holding(held))


class Accountant:
    """Something with a state of its own, in the manner of Flower's privacy accountants."""

    def __init__(self) -> None:
        self.spent = {3.5}

    def state_dict(self) -> dict[str, Any]:
        return {"spent": sorted(self.spent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent = set(state["spent"])


class Own(FedAvg):
    """A strategy that says itself what to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def state(self) -> Any:
        return self.rng.bit_generator.state

    def load_state(self, kept: Any) -> None:
        self.rng.bit_generator.state = kept


def test_who_has_a_state_of_its_own_says_what_to_keep():
    strategy, accountant = Own(), Accountant()
    strategy.rng.random(5)
    state = through_a_file(snapshot(strategy))
    expected = strategy.rng.random(3)
    other = Own()
    restore(other, state)
    assert other.rng.random(3).tolist() == expected.tolist()

    accountant.spent = {1.0, 2.0}
    new = Holding(Accountant())
    restore(new, through_a_file(snapshot(Holding(accountant))))
    assert new.held.spent == {1.0, 2.0}
