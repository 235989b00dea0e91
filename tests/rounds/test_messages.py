"""Named arrays through Flower's records and wire: lossless, and safe from hostile bytes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.rounds import messages
from mlx_fed.arrays import named_arrays, safetensors, weights
from mlx_fed.rounds.messages import MessageError
from mlx_fed.arrays.flower_records import Segment
from mlx_fed.arrays.spool import Spool

from ..helpers.random_arrays import bits, modules, noise

MiB = 2**20
DTYPES = [
    *(mx.float32, mx.float16, mx.bfloat16, mx.complex64, mx.bool_),
    *(mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64),
]


def over_the_wire(content: RecordDict) -> RecordDict:
    """Content as the receiver of a message has it, from the bytes of its objects alone."""
    metadata = Metadata(1, "", 2, 3, "", "", 0.0, 60.0, "train")
    message = make_message(metadata, content)
    sent = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
    received = inflate_object_from_contents(message.object_id, sent)
    assert isinstance(received, Message)
    return received.content


def through_flower(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    content = over_the_wire(RecordDict({"arrays": messages.pack(arrays)}))
    return messages.unpack(content.array_records["arrays"])


def all_bits(arrays: dict[str, mx.array]) -> list:
    return [(name, bits(array)) for name, array in sorted(arrays.items())]


@st.composite
def arrays_by_name(draw: st.DrawFn) -> dict[str, mx.array]:
    shapes = st.lists(st.integers(0, 4), max_size=4)
    names = st.text(st.characters(codec="utf-8"), max_size=12).filter(
        lambda name: name != safetensors._METADATA
    )
    return {
        name: noise(
            mx.zeros(draw(shapes), draw(st.sampled_from(DTYPES))), draw(st.integers(0, 2**32))
        )
        for name in draw(st.lists(names, max_size=6, unique=True))
    }


@settings(max_examples=60, deadline=None)
@given(arrays_by_name())
def test_arrays_of_any_name_shape_and_dtype_arrive_bit_for_bit(arrays):
    assert all_bits(through_flower(arrays)) == all_bits(arrays)


@settings(max_examples=40, deadline=None)
@given(modules(), st.integers(0, 2**32))
def test_any_module_arrives_bit_for_bit(module, seed):
    slots = weights.find_slots(module)
    for kind in slots.kinds().values():
        arrays = {name: noise(array, seed) for name, array in weights.get(kind).items()}
        assert all_bits(through_flower(arrays)) == all_bits(arrays)


@pytest.mark.parametrize(
    ("dtype", "unsigned", "patterns"),
    [
        (mx.float32, mx.uint32, [0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x00000001]),
        (mx.float16, mx.uint16, [0x8000, 0x7E01, 0xFE35, 0x7C01, 0x0001]),
        (mx.bfloat16, mx.uint16, [0x8000, 0x7FC1, 0xFFD2, 0x7F81, 0x0001]),
    ],
)
def test_negative_zero_nan_payloads_and_subnormals_arrive(dtype, unsigned, patterns):
    array = mx.array(patterns, unsigned).view(dtype)
    arrived = through_flower({"w": array})["w"]
    assert arrived.dtype == dtype
    assert arrived.view(unsigned).tolist() == patterns


def test_views_arrive_as_what_they_show():
    whole = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    arrays = {"transposed": whole.T, "strided": whole[::2, 1::2], "one": mx.broadcast_to(1.0, (3,))}
    assert all_bits(through_flower(arrays)) == all_bits(arrays)


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ([], []),
        ([1] * 1000, [1000]),
        ([2 * MiB, 2 * MiB], [2]),
        ([2 * MiB, 2 * MiB, 1], [2, 1]),
        ([1, 4 * MiB], [1, 1]),
        ([9 * MiB, 1, 1], [1, 2]),
        ([0, 4 * MiB, 0], [3]),
    ],
)
def test_shards_hold_up_to_4_mib_or_one_larger_array(sizes, shards):
    arrays = {f"w{i:04}": noise(mx.zeros(n, mx.uint8), i) for i, n in enumerate(sizes)}
    record = messages.pack(arrays)
    parts = [mx.load(BytesIO(array.data), format="safetensors") for array in record.values()]
    assert [len(part) for part in parts] == shards
    content = RecordDict({"arrays": record})
    assert messages.count_bytes(content) >= sum(sizes)
    received = over_the_wire(content).array_records["arrays"]
    assert list(received) == list(record)
    assert all_bits(messages.unpack(received)) == all_bits(arrays)


def test_plain_arrays_are_read_as_well():
    record = ArrayRecord({"w": Array(np.array([[1, 2]], np.float16)), "n": Array(np.array(3))})
    assert not messages.is_packed(record)
    assert messages.is_packed(messages.pack({"w": mx.zeros(1)}))
    assert all_bits(messages.unpack(record)) == all_bits(
        {"w": mx.array([[1, 2]], mx.float16), "n": mx.array(3, mx.int64)}
    )


@settings(max_examples=50, deadline=None)
@given(arrays_by_name(), st.data())
def test_shards_are_read_from_parts_however_they_are_cut(arrays, data):
    for waiting in messages.pack(arrays).values():
        whole = waiting.data
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
        ends = zip([0, *cuts], [*cuts, len(whole)], strict=True)
        # Each part stands behind bytes that are not its own.
        parts = [Segment(b"head" + whole[start:end], 4) for start, end in ends]
        found = safetensors.parse(parts)
        assert all_bits({name: each.read() for name, each in found.items()}) == all_bits(arrays)


def test_pieces_of_chunks_on_disk_are_aligned_for_blas(tmp_path: Path, monkeypatch):
    array = mx.random.normal((2**20,))
    (shard,) = messages.pack({"w": array}).values()
    place, whole = Spool(tmp_path), shard.data
    parts = [
        Segment(place.put(b"head" + whole[start : start + 2**20], head=4), 4)
        for start in range(0, len(whole), 2**20)
    ]
    pieces = [*safetensors.parse(parts)["w"].pieces()]
    assert all(piece.flags.aligned for piece in pieces)
    assert np.array_equal(np.concatenate(pieces), np.asarray(array))


SEVERAL_PIECES = [(0, 3), (), (5, 7), (named_arrays.PIECE,), (3, named_arrays.PIECE - 1)]


@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16])
def test_an_array_has_the_same_values_in_pieces(stored, wanted):
    """On disk it does not begin where a number may, and is cut anywhere."""
    arrays = {
        str(shape): (mx.random.normal(shape) * 1e4).astype(stored) for shape in SEVERAL_PIECES
    }
    for shard in messages.pack(arrays).values():
        whole = shard.data
        parts = [Segment(b"h" + whole[:100], 1), Segment(b"head" + whole[100:], 4)]
        for name, each in safetensors.parse(parts).items():
            pieces = [*each.pieces(wanted)]
            assert all(piece.ndim == 1 and piece.size <= named_arrays.PIECE for piece in pieces)
            values = named_arrays.to_float32(arrays[name].astype(getattr(mx, wanted))).tobytes()
            assert b"".join(piece.tobytes() for piece in pieces) == values
            assert named_arrays.to_float32(each.read(wanted)).tobytes() == values


def test_a_shard_is_a_view_of_what_it_holds():
    array = mx.zeros((MiB,))
    (shard,) = messages.pack({"w": array}).values()
    held = np.frombuffer(shard.segments[-1].view(), np.float32)
    assert np.shares_memory(held, np.asarray(array))


def test_an_array_that_occurs_twice_is_refused():
    (shard,) = messages.pack({"w": mx.zeros(1), "v": mx.zeros(1)}).values()
    with pytest.raises(MessageError, match="parameter 'v' occurs twice"):
        messages.unpack(ArrayRecord({"one": shard, "two": shard}))


def test_the_parameters_are_the_one_record_beside_the_statistics():
    arrays, statistics = messages.pack({"w": mx.zeros(1)}), messages.pack({"m": mx.zeros(1)})
    content = RecordDict({"model": arrays, messages.STATISTICS: statistics})
    assert messages.parameters_of(content) == ("model", arrays)
    for wrong in ({}, {messages.STATISTICS: statistics}, {"a": arrays, "b": arrays}):
        with pytest.raises(MessageError, match="expected one record of parameters"):
            messages.parameters_of(RecordDict({**wrong, "metrics": MetricRecord({"loss": 1.0})}))


def test_settings_may_be_missing():
    assert messages.config_of(RecordDict()) == ("config", ConfigRecord())
    config = ConfigRecord({"learning-rate": 0.1})
    assert messages.config_of(RecordDict({"mine": config})) == ("mine", config)


# -- hostile bytes -------------------------------------------------------------------------


def shard(header: object, body: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list, end: int, dtype: str = "F32") -> bytes:
    return shard({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})


def entries(places: dict[str, tuple[int, int]], size: int) -> bytes:
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in places.items()
    }
    return shard(header, b"\0" * size)


def record(data: bytes, stype: str = "safetensors") -> ArrayRecord:
    return ArrayRecord({"shard": Array("uint8", (len(data),), stype, data)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        shard([1]),
        shard({"w": "F32"}),
        shard(b'{"w":' * 10_000),
        entry([100_000, 100_000], 4),
        entry([17], 68),
        entry([1], 4, "F64"),
        entry([17], 64),
        entry([15], 60),  # four bytes more than that
        entries({"w": (0, 32), "v": (0, 32)}, 32),
        entries({"w": (0, 32), "v": (16, 48)}, 64),
        entries({"w": (0, 32), "v": (36, 64)}, 64),
        entries({"w": (32, 64), "v": (0, 32)}, 64),
        # What MLX itself takes for an array, and what ends the process when it is used:
        entry([2**31, 2**31], 0),
        entry([65536] * 4, 0),
        entry([-1, -4], 16),
        entry([0, -5], 0),
        entry([1] * 1000, 4),
    ],
)
def test_bytes_that_are_no_arrays_are_refused(data):
    with pytest.raises(MessageError, match="'shard' in the message is unreadable"):
        messages.unpack(record(data))


def pickled() -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.array([print], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("stype", "data"),
    [
        ("numpy.ndarray", b"\x93NUMPY"),
        ("numpy.ndarray", b""),
        ("numpy.ndarray", pickled()),
        ("torch", b"\0"),
    ],
)
def test_plain_bytes_that_are_no_arrays_are_refused(stype, data):
    with pytest.raises(MessageError, match="'shard' in the message is unreadable"):
        messages.unpack(record(data, stype))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_shards_are_refused_or_read_as_arrays(data):
    (array,) = messages.pack({"w": mx.ones((3, 2)), "b": mx.ones(3, mx.bfloat16)}).values()
    damaged = bytearray(array.data)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.sampled_from([*b'0129-,[]{}":F', 0, 255]))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    try:
        arrays = messages.unpack(record(bytes(damaged)))
    except MessageError:
        return
    for array in arrays.values():
        assert np.asarray(array.view(mx.uint8)).nbytes == array.nbytes


FUZZ = """
import random, resource
import mlx_fed
import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord
from mlx_fed.rounds import messages

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
before = peak()
(array,) = messages.pack({"w": mx.ones((3, 2)), "b": mx.ones(3, mx.bfloat16)}).values()
read = refused = 0
for case in range(3000):
    chance = random.Random(case)
    data = bytearray(array.data)
    if case < len(data):
        data = data[:case]
    elif case % 10 == 0:
        data = chance.randbytes(chance.randrange(300))
    else:
        for _ in range(chance.randint(1, 3)):
            bit = chance.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
    record = ArrayRecord({"shard": Array("uint8", (len(data),), "safetensors", bytes(data))})
    try:
        for value in messages.unpack(record).values():
            np.asarray(mx.isfinite(value))
        read += 1
    except messages.MessageError:
        refused += 1
assert peak() - before < 2**18, "more than 256 MiB"
print(read, refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_thousands_of_damaged_shards_end_no_process():
    done = subprocess.run([sys.executable, "-c", FUZZ], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert min(read, refused) > 100
