"""Any module tree: its arrays by name, which of them are trained, and how they go back in."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import mlx_fed  # noqa: F401 - before mlx.core
from mlx_fed.arrays import weights
from mlx_fed.arrays.named_arrays import WeightsError
from ..helpers.random_arrays import LoRA, Tree, bits, modules, noise


def flat(tree) -> dict[str, mx.array]:
    return {name: array for name, array in tree_flatten(tree) if not name.startswith("tied")}


@settings(max_examples=150, deadline=None)
@given(modules())
def test_every_array_is_found_once_and_of_one_kind(module):
    slots = weights.find_slots(module)
    everything, trainable = flat(module.parameters()), flat(module.trainable_parameters())
    statistics = [n for n in everything if n.rpartition(".")[2] in ("running_mean", "running_var")]
    expected = [
        name
        for name, array in trainable.items()
        if mx.issubdtype(array.dtype, mx.inexact) and name not in statistics
    ]
    assert list(slots.parameters) == expected
    assert list(slots.statistics) == statistics
    assert set(slots.frozen) == set(everything) - set(expected) - set(statistics)
    for kind in slots.kinds().values():
        for name, slot in kind.items():
            assert slot.get() is everything[name]


@settings(max_examples=100, deadline=None)
@given(modules(), st.integers(0, 2**32))
def test_arrays_go_back_in_bit_for_bit(module, seed):
    slots = weights.find_slots(module)
    before = {name: bits(array) for name, array in flat(module.parameters()).items()}
    new = {name: noise(array, seed) for name, array in weights.get(slots.parameters).items()}
    weights.load(slots.parameters, dict(reversed(new.items())))  # by name, in any order
    after = {name: bits(array) for name, array in flat(module.parameters()).items()}
    assert after == before | {name: bits(array) for name, array in new.items()}


def test_statistics_stay_apart_after_unfreeze():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3))
    model.unfreeze()
    assert "running_mean" in model.trainable_parameters()["layers"][1]
    slots = weights.find_slots(model)
    assert list(slots.statistics) == ["layers.1.running_mean", "layers.1.running_var"]
    assert not slots.statistics.keys() & slots.parameters.keys()


def test_frozen_lists_and_dictionaries_of_arrays_stay_frozen():
    model = Tree(factors=[mx.ones(2), mx.ones(3)], scales={"a": mx.ones(1)}, layer=nn.Linear(1, 1))
    model.freeze()
    model.layer.unfreeze()
    slots = weights.find_slots(model)
    assert list(slots.parameters) == ["layer.weight", "layer.bias"]
    assert list(slots.frozen) == ["factors.0", "factors.1", "scales.a"]


def test_freezing_a_name_freezes_all_below_it():
    model = Tree(encoder=[nn.Linear(1, 1)], head=nn.Linear(1, 1))
    model.freeze(recurse=False, keys="encoder")
    assert list(weights.find_slots(model).parameters) == ["head.weight", "head.bias"]


def test_tied_modules_are_one():
    layer = nn.Linear(2, 2)
    model = Tree(encoder=layer, decoder=[layer])
    slots = weights.find_slots(model)
    assert list(slots.parameters) == ["encoder.weight", "encoder.bias"]
    weights.load(slots.parameters, {"encoder.weight": mx.ones((2, 2)), "encoder.bias": mx.ones(2)})
    assert model.decoder[0].weight.sum().item() == 4


def test_a_quantized_base_with_lora_trains_only_the_factors():
    model = Tree(layer=LoRA())
    model.layer.linear = nn.QuantizedLinear(64, 8)
    slots = weights.find_slots(model)
    assert list(slots.parameters) == ["layer.lora_a", "layer.lora_b"]
    assert slots.frozen["layer.linear.weight"].get().dtype == mx.uint32


def test_two_arrays_of_one_name_are_refused():
    model = Tree(a={"b.c": mx.ones(1), "b": {"c": mx.ones(1)}})
    with pytest.raises(WeightsError, match=r"the name 'a\.b\.c'"):
        weights.find_slots(model)


def test_an_array_that_safetensors_cannot_hold_is_refused():
    model = Tree(inner=Tree(scale=mx.array(0, mx.float64)))
    model.freeze()  # a run saves the whole model
    with pytest.raises(WeightsError, match=r"'inner\.scale' is float64.* make it float32"):
        weights.find_slots(model)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a.pop("bias"), "parameter 'bias' is missing"),
        (lambda a: a.clear(), "parameter 'weight' is missing"),
        (lambda a: a.update(scale=mx.ones(1)), "parameter 'scale' is not one of the model's"),
        (
            lambda a: a.update(weight=mx.ones((3, 2))),
            r"parameter 'weight' has shape \(3, 2\), expected \(2, 3\)",
        ),
        (
            lambda a: a.update(bias=mx.ones((1, 2))),
            r"parameter 'bias' has shape \(1, 2\), expected \(2,\)",
        ),
        (
            lambda a: a.update(bias=mx.ones(2, mx.float16)),
            "parameter 'bias' has dtype float16, expected float32",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named_and_change_nothing(change, complaint):
    model = nn.Linear(3, 2)
    slots = weights.find_slots(model)
    before = {name: bits(array) for name, array in weights.get(slots.parameters).items()}
    arrays = {"weight": mx.zeros((2, 3)), "bias": mx.zeros(2)}
    change(arrays)
    with pytest.raises(WeightsError, match=complaint):
        weights.load(slots.parameters, arrays)
    after = {name: bits(array) for name, array in weights.get(slots.parameters).items()}
    assert after == before


def test_initial_weights_come_from_the_seed_alone():
    def weight(seed: int) -> list:
        mx.random.normal((3,))  # whatever the global state is
        return weights.build_model(lambda: nn.Linear(3, 2), seed).weight.tolist()

    assert weight(1) == weight(1)
    assert weight(1) != weight(2)


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match=r"must return an mlx\.nn\.Module, not a int"):
        weights.build_model(lambda: 3, 0)
