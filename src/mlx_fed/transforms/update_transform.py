"""Update transforms: pure functions on an update between a client and the server, in a chain.

An update is the difference of a client's parameters after training from the global ones, in
float32. A client encodes it into a message of named arrays; the server decodes the message. As in
optax, transforms compose: each encodes what the one before it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..arrays import named_arrays
from ..arrays.named_arrays import Arrays, LazyArrays, Spec, arrays_of_kind, name_by_kind

State = Arrays
"""A client's state of a transform, arrays by name; empty if it needs none."""


class UpdateTransform(NamedTuple):
    """A transform for the arrays of one model.

    Attributes:
        spec (dict): Shape and dtype of each array of a message, by name.
        message_names (dict): Names of an array's components in a message, by the array's name.
        init (callable): ``init()`` returns a client's first state.
        encode (callable): ``encode(update, state, key)`` returns the message and the client's new
            state, from float32 arrays by name and an MLX random key. It is pure, so that
            ``mx.compile`` and ``mx.vmap`` take it.
        decode (callable): ``decode(message)`` returns the update, float32 arrays by name; of a
            message with the components of some, the updates of those. Any values of the right
            shapes and dtypes decode without an error: a server's messages come from strangers.
        notes (tuple): In words, what it does, for the run's log.
    """

    spec: Spec
    message_names: Mapping[str, tuple[str, ...]]
    init: Callable[[], State]
    encode: Callable[[Arrays, State, mx.array], tuple[Arrays, State]]
    decode: Callable[[Mapping[str, mx.array]], Arrays]
    notes: tuple[str, ...] = ()


Transform = Callable[[Spec], UpdateTransform]
"""Makes the transform of the arrays of a model, from their shapes and dtypes (float32)."""


def chain(*transforms: Transform) -> Transform:
    """Transforms one after another: the first encodes first, and decodes last.

    Example:
        >>> compress = chain(top_k(0.01), quantize(8))
    """

    def make(spec: Spec) -> UpdateTransform:
        stages: list[UpdateTransform] = []
        for transform in transforms:
            stages.append(transform(stages[-1].spec if stages else spec))

        def init() -> State:
            state: State = {}
            for number, stage in enumerate(stages):
                state |= name_by_kind(stage.init(), str(number))
            return state

        def encode(update: Arrays, state: State, key: mx.array) -> tuple[Arrays, State]:
            new_state: State = {}
            message = update
            for number, (stage, stage_key) in enumerate(
                zip(stages, mx.random.split(key, max(1, len(stages))), strict=False)
            ):
                stage_state = arrays_of_kind(state, str(number))
                message, stage_state = stage.encode(message, stage_state, stage_key)
                new_state |= name_by_kind(stage_state, str(number))
            return message, new_state

        def decode(message: Mapping[str, mx.array]) -> Arrays:
            update = dict(message)
            for stage in reversed(stages):
                update = stage.decode(update)
            return update

        return UpdateTransform(
            stages[-1].spec if stages else spec,
            _join_names(spec, stages),
            init,
            encode,
            decode,
            tuple(note for stage in stages for note in stage.notes),
        )

    return make


def array_transform(
    encode_array: Callable[[mx.array, mx.array], Arrays],
    decode_array: Callable[[Arrays, tuple[int, ...]], mx.array],
    note: str,
    min_size: int = 1,
) -> Transform:
    """A transform of each array by itself, without a state.

    Arrays of fewer values than ``min_size`` pass unchanged, and so do arrays that are not float32,
    such as the indices of a transform before this one.

    Args:
        encode_array (callable): ``encode_array(array, key)`` returns the components of an array,
            by their names.
        decode_array (callable): ``decode_array(components, shape)`` returns the float32 array.
        note (str): What it does, in words.
        min_size (int): The least number of values of an array that is encoded.
    """

    def make(spec: Spec) -> UpdateTransform:
        message_spec: Spec = {}
        names_of: dict[str, dict[str, str]] = {}
        for name, (shape, dtype) in spec.items():
            if dtype == "float32" and math.prod(shape) >= min_size:
                # Nothing is computed: the shapes and dtypes of the graph's arrays are known.
                components = encode_array(mx.zeros(shape), mx.zeros(2, mx.uint32))
                names_of[name] = {key: f"{name}/{key}" for key in components}
                array_spec = named_arrays.spec(components)
                component_spec = {f"{name}/{key}": array_spec[key] for key in components}
            else:
                component_spec = {name: (shape, dtype)}
            if clash := message_spec.keys() & component_spec.keys():
                raise named_arrays.WeightsError(
                    f"{min(clash)!r} is the name of two arrays of an encoded update: give the "
                    "model's array another name"
                )
            message_spec |= component_spec

        def encode(update: Arrays, state: State, key: mx.array) -> tuple[Arrays, State]:
            message: Arrays = {}
            keys = mx.random.split(key, max(1, len(spec)))
            for name, array_key in zip(spec, keys, strict=False):
                if name in names_of:
                    components = encode_array(update[name], array_key)
                    message |= {
                        names_of[name][component]: array for component, array in components.items()
                    }
                else:
                    message[name] = update[name]
            return message, state

        def decode(message: Mapping[str, mx.array]) -> Arrays:
            update: Arrays = {}
            for name, (shape, _) in spec.items():
                components = names_of.get(name, {})
                if not components and name in message:
                    update[name] = message[name]
                elif components and next(iter(components.values())) in message:
                    arrays = {
                        component: message[full_name] for component, full_name in components.items()
                    }
                    update[name] = decode_array(arrays, shape)
            return update

        message_names = {
            name: tuple(names_of[name].values()) if name in names_of else (name,) for name in spec
        }
        return UpdateTransform(message_spec, message_names, dict, encode, decode, (note,))

    return make


def with_error_feedback(transform: Transform) -> Transform:
    """The transform, with what it lost of a client's updates added to the client's next one.

    A compressor that is biased, as the largest values of an update are, then still converges
    (Stich et al. 2018, https://arxiv.org/abs/1809.07599; Karimireddy et al. 2019,
    https://arxiv.org/abs/1901.09847). The state is an array like each of the model's.
    """

    def make(spec: Spec) -> UpdateTransform:
        inner = transform(spec)

        def init() -> State:
            losses = {name: mx.zeros(shape) for name, (shape, _) in spec.items()}
            return name_by_kind(losses, "loss") | name_by_kind(inner.init(), "inner")

        def encode(update: Arrays, state: State, key: mx.array) -> tuple[Arrays, State]:
            losses = arrays_of_kind(state, "loss")
            total = {name: array + losses[name] for name, array in update.items()}
            message, inner_state = inner.encode(total, arrays_of_kind(state, "inner"), key)
            update_sent = inner.decode(message)
            losses = {name: total[name] - update_sent[name] for name in total}
            return message, name_by_kind(losses, "loss") | name_by_kind(inner_state, "inner")

        note = "what is lost is added to the client's next update"
        return inner._replace(init=init, encode=encode, notes=(*inner.notes, note))

    return make


def decode_parameters(
    transform: UpdateTransform, message: Mapping[str, mx.array], before: Mapping[str, mx.array]
) -> LazyArrays:
    """Parameters after training in float32, each decoded when it is read.

    Args:
        transform (UpdateTransform): The transform that encoded the update.
        message (dict): Arrays of the message by name.
        before (dict): The global parameters that the client got.
    """

    def load(name: str) -> mx.array:
        update = transform.decode(
            {component: message[component] for component in transform.message_names[name]}
        )
        return before[name].astype(mx.float32) + update[name]

    return LazyArrays({name: (tuple(before[name].shape), "float32") for name in before}, load)


def update_of(after: Mapping[str, mx.array], before: Mapping[str, mx.array]) -> Arrays:
    """The update: the difference of parameters in float32."""
    return {
        name: after[name].astype(mx.float32) - before[name].astype(mx.float32) for name in before
    }


def _join_names(spec: Spec, stages: Sequence[UpdateTransform]) -> Mapping[str, tuple[str, ...]]:
    message_names: dict[str, tuple[str, ...]] = {name: (name,) for name in spec}
    for stage in stages:
        message_names = {
            name: tuple(component for old in names for component in stage.message_names[old])
            for name, names in message_names.items()
        }
    return message_names
