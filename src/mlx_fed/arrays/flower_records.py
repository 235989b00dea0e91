"""Flower's arrays and records without copies of their bytes, which lie in memory or on disk.

A :class:`SegmentedArray` is a :class:`flwr.app.Array` whose bytes are in several segments: the
chunks of a message as they were received, or views of the arrays that are sent.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_Record = TypeVar("_Record", ArrayRecord, ConfigRecord, MetricRecord)


class SpooledBytes:
    """Bytes in a file of a :class:`.spool.Spool`, which lasts as long as this object and its views.

    Args:
        path (Path): The file.
        start (int): The offset of the bytes in the file.
        size (int): The number of bytes.
        release (callable): ``release(path, file_size)``, called when nothing refers to the file.
    """

    def __init__(self, path: Path, start: int, size: int, release: Callable[[Path, int], None]):
        self._path, self._start, self._size, self._release = path, start, size, release
        self._mapping: Callable[[], _Mapping | None] = lambda: None

    def __len__(self) -> int:
        return self._size

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """A copy of the bytes from ``start`` up to ``end``."""
        return bytes(self.view(start, end))

    def view(self, start: int = 0, end: int | None = None) -> memoryview:
        """The bytes from ``start`` up to ``end`` in the mapped file, without a copy."""
        end = self._size if end is None else min(end, self._size)
        mapping = self._mapping() or self._map()
        return memoryview(mapping)[self._start + start : self._start + end]

    def _map(self) -> _Mapping:
        try:
            with self._path.open("rb", buffering=0) as file:
                size = self._start + self._size
                mapping = _Mapping(file.fileno(), size, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise OSError(f"{self._path} is shorter than the bytes written to it") from error
        mapping.spooled_bytes = self
        self._mapping = weakref.ref(mapping)  # the next view shares it
        return mapping

    def __del__(self) -> None:
        self._release(self._path, self._start + self._size)


class _Mapping(mmap.mmap):
    """A file mapped into memory; it keeps the file from being reused while a view exists."""

    spooled_bytes: SpooledBytes


class Segment(NamedTuple):
    """A segment of the bytes of an array: ``content`` from the offset ``start`` to its end."""

    content: SpooledBytes | bytes | memoryview
    start: int = 0

    def __len__(self) -> int:
        return len(self.content) - self.start

    def read(self) -> bytes | memoryview:
        """The bytes; those in memory are not copied."""
        if isinstance(self.content, SpooledBytes):
            return self.content.read(self.start)
        return self.view()

    def view(self, start: int = 0, end: int | None = None) -> memoryview:
        """The bytes from ``start`` up to ``end``, without a copy.

        The process has a file of those on disk open for as long as the view exists.
        """
        start, end = self.start + start, None if end is None else self.start + end
        if isinstance(self.content, SpooledBytes):
            return self.content.view(start, end)
        return memoryview(self.content)[start:end]


class SegmentedArray(Array):
    """A :class:`flwr.app.Array` in segments, which are joined at each access to ``data``."""

    def __init__(
        self, dtype: str, shape: tuple[int, ...], stype: str, segments: tuple[Segment, ...]
    ):
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype)
        self.segments = segments

    @property
    def data(self) -> bytes:  # type: ignore[override]
        match self.segments:
            case [Segment(bytes() as content, 0)]:
                return content
        return b"".join(segment.read() for segment in self.segments)

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)  # a copy has no file


SegmentedArray.__qualname__ = Array.__qualname__  # Flower tells what an object is by this name


def segments_of(array: Array) -> tuple[Segment, ...]:
    """The segments of an array; of Flower's own array, one."""
    return array.segments if isinstance(array, SegmentedArray) else (Segment(array.data),)


def num_bytes(array: Array) -> int:
    """The number of bytes of an array, without reading them."""
    return len(array) if isinstance(array, SegmentedArray) else len(array.data)


def array_values(array: Array) -> np.ndarray:
    """The values of an array in NumPy's format, without a copy where one segment has them all."""
    segments = segments_of(array)
    data = segments[0].view() if len(segments) == 1 else memoryview(array.data)
    # NumPy would parse the header with Python's ast, which fails when two threads do it at once.
    start = 10 + int.from_bytes(data[8:10], "little")
    order: Any = "F" if b"'fortran_order': True" in bytes(data[10:start]) else "C"
    return np.frombuffer(data, array.dtype, offset=start).reshape(array.shape, order=order)


def records_in(content: RecordDict, kind: type[_Record]) -> dict[str, _Record]:
    """The records of a type in a message, by name.

    Flower's properties for it leave a cycle of references, which keeps a message's arrays in memory
    or on disk until the next garbage collection.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def copy_record(record: ArrayRecord) -> ArrayRecord:
    """A shallow copy of a record; Flower's own way would read the arrays from disk."""
    copy = ArrayRecord()
    for name, array in record.items():
        copy[name] = array
    return copy
