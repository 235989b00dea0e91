"""Where arrays wait on disk: replies before it is their turn, and masters until they are used.

What is small stays in memory. A file that nothing refers to any more is written over by the next of
its size, which takes a fraction of the time that a new one takes; the folder goes with the run, and
a run that was killed finds it empty when it goes on.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_SMALL = 2**18
"""Bytes that are not worth a file."""
_MOST_SPARE = 4 * 2**30
"""Bytes of files that are kept to be written over."""
_ALIGNMENT = 64
"""Bytes at whose multiples numbers begin."""

_numbers = count(1)
_Record = TypeVar("_Record", ArrayRecord, ConfigRecord, MetricRecord)
log = logging.getLogger("mlx_fed")


class OnDisk:
    """Bytes in a file of their own, which are there as long as this object or a view of them.

    Args:
        path (Path): The file.
        start (int): Where the bytes begin in it.
        size (int): How many they are.
        spool (Spool): What gets the file in the end.
    """

    def __init__(self, path: Path, start: int, size: int, spool: Spool):
        self._path, self._start, self._size, self._spool = path, start, size, spool
        self._mapped: Callable[[], _Mapped | None] = lambda: None

    def __len__(self) -> int:
        return self._size

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """A copy of the bytes from ``start`` up to ``end``."""
        return bytes(self.view(start, end))

    def view(self, start: int = 0, end: int | None = None) -> memoryview:
        """The bytes from ``start`` up to ``end``, where the system has them: none is copied."""
        end = self._size if end is None else min(end, self._size)
        mapped = self._mapped() or self._map()
        return memoryview(mapped)[self._start + start : self._start + end]

    def _map(self) -> _Mapped:
        try:
            with self._path.open("rb", buffering=0) as file:
                mapped = _Mapped(file.fileno(), self._start + self._size, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise OSError(f"{self._path} is not what was written") from error
        mapped.of = self
        self._mapped = weakref.ref(mapped)  # for the next view, if somebody still looks at this
        return mapped

    def __del__(self) -> None:
        self._spool.let_go(self._path, self._start + self._size)


class _Mapped(mmap.mmap):
    """A file as memory, which is not written over as long as somebody looks at it."""

    of: OnDisk


class Part(NamedTuple):
    """A part of an array's bytes: what a file or memory holds from ``start`` on."""

    held: OnDisk | bytes | memoryview
    start: int = 0

    def __len__(self) -> int:
        return len(self.held) - self.start

    def read(self) -> bytes | memoryview:
        """The bytes; those in memory are not copied."""
        return self.held.read(self.start) if isinstance(self.held, OnDisk) else self.view()

    def view(self, start: int = 0, end: int | None = None) -> memoryview:
        """The bytes from ``start`` up to ``end``, where they lie.

        Of those on disk the process has a file open for as long as somebody looks at them.
        """
        start, end = self.start + start, None if end is None else self.start + end
        if isinstance(self.held, OnDisk):
            return self.held.view(start, end)
        return memoryview(self.held)[start:end]


class WaitingArray(Array):
    """One of Flower's arrays, whose bytes are in parts, on disk or in memory, and are joined each
    time that they are asked for."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, parts: tuple[Part, ...]):
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype)
        self.parts = parts

    @property
    def data(self) -> bytes:  # type: ignore[override]
        match self.parts:
            case [Part(bytes() as whole, 0)]:
                return whole
        return b"".join(part.read() for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)  # a copy has no file


WaitingArray.__qualname__ = Array.__qualname__  # Flower tells what an object is by this name


class Spool:
    """A run's folder of bytes that wait.

    Args:
        folder (Path, optional): Where they wait; made when it is needed. Without, all stay in
            memory.

    Attributes:
        spare (dict): Files that nothing refers to any more, by their size.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.spare: dict[int, list[Path]] = defaultdict(list)
        self._spare_bytes = 0
        self._warned = False
        self._lock = threading.RLock()  # a collection of garbage may let go of a file at any time

    def put(self, *parts: bytes | memoryview, head: int = 0) -> OnDisk | bytes:
        """Bytes on disk, or in memory where they are few or the disk does not take them.

        Args:
            parts (bytes): The bytes, one part after another.
            head (int): How many bytes come before numbers, which are aligned for NumPy and BLAS.
        """
        if held := self._write(*parts, head=head):
            return held
        return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)

    def _write(self, *parts: bytes | memoryview, head: int = 0) -> OnDisk | None:
        """The parts in one file, or nothing where they are few or the disk does not take them."""
        size = sum(map(len, parts))
        if self.folder is None or size < _SMALL:
            return None
        start = -head % _ALIGNMENT
        while True:
            spare = self._take_spare(start + size)
            path = spare or self.folder / f"{os.getpid()}-{next(_numbers)}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with path.open("r+b" if spare else "xb", buffering=0) as file:
                    for part in (bytes(start), *parts):
                        view = memoryview(part)
                        while view:
                            view = view[file.write(view) :]
                return OnDisk(path, start, size, self)
            except OSError as error:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                if self._remove_spare():
                    continue  # their room may be enough
                if not self._warned:
                    log.warning("%s: what cannot wait there stays in memory", error)
                    self._warned = True
                return None

    def _take_spare(self, size: int) -> Path | None:
        with self._lock:
            if not self.spare[size]:
                return None
            self._spare_bytes -= size
            return self.spare[size].pop()

    def _remove_spare(self) -> bool:
        """Gives the room of files that nothing refers to back, if there are any."""
        with self._lock:
            paths = [path for paths in self.spare.values() for path in paths]
            self.spare.clear()
            self._spare_bytes = 0
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return bool(paths)

    def let_go(self, path: Path, size: int) -> None:
        """Keeps a file that nothing refers to any more for the next bytes, or removes it."""
        with self._lock:
            if self.folder is not None and self._spare_bytes + size <= _MOST_SPARE:
                self._spare_bytes += size
                self.spare[size].append(path)
                return
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def array(self, array: Array) -> Array:
        """An array that waits here, if it is large."""
        parts = parts_of(array)
        if any(isinstance(part.held, OnDisk) for part in parts):
            return array
        held = self._write(*(part.read() for part in parts))
        return _waiting(array, held) if held else array

    def values(self, values: np.ndarray) -> Array:
        """An array of these values, in the same bytes as Flower's own, that waits here."""
        if self.folder is not None and values.nbytes >= _SMALL and values.flags.c_contiguous:
            head = BytesIO()
            about = np.lib.format.header_data_from_array_1_0(values)
            np.lib.format.write_array_header_1_0(head, about)
            held = self._write(head.getvalue(), values.reshape(-1).view(np.uint8).data)
            if held:
                return _waiting(values, held)
        return Array(values)

    def record(self, arrays: Iterable[tuple[str, Array]]) -> ArrayRecord:
        """Arrays by name, each of which waits here as soon as it comes."""
        record = ArrayRecord()
        for name, array in arrays:
            record[name] = self.array(array)
        return record

    def hold(self, content: RecordDict) -> None:
        """Lets the arrays of a message wait here."""
        for record in records_in(content, ArrayRecord).values():
            for name, array in record.items():
                record[name] = self.array(array)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Empties the folder of what another process has left, and takes it away in the end."""
        self._remove()
        try:
            yield
        finally:
            self._remove()
            self.folder = None
            self.spare.clear()

    def _remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _waiting(like: Array | np.ndarray, held: OnDisk) -> WaitingArray:
    stype = like.stype if isinstance(like, Array) else "numpy.ndarray"
    return WaitingArray(str(like.dtype), tuple(like.shape), stype, (Part(held),))


def parts_of(array: Array) -> tuple[Part, ...]:
    """Where an array's bytes are."""
    return array.parts if isinstance(array, WaitingArray) else (Part(array.data),)


def num_bytes(array: Array) -> int:
    """The bytes of an array, without a look at them."""
    return len(array) if isinstance(array, WaitingArray) else len(array.data)


def records_in(content: RecordDict, kind: type[_Record]) -> dict[str, _Record]:
    """The records of a kind in a message, by name.

    Flower's properties for it leave a cycle of references each time, which keeps a message's arrays
    in memory or on disk until garbage is collected.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def copy_of(record: ArrayRecord) -> ArrayRecord:
    """Another record of the same arrays; Flower's own way reads those that wait on disk."""
    copy = ArrayRecord()
    for name, array in record.items():
        copy[name] = array
    return copy


def values_of(array: Array) -> np.ndarray:
    """The values of one of our arrays where they lie, after the header of NumPy's format."""
    parts = parts_of(array)
    data = parts[0].view() if len(parts) == 1 else memoryview(array.data)
    # NumPy would parse the header with Python's ast, which fails when two threads do it at once.
    start = 10 + int.from_bytes(data[8:10], "little")
    order: Any = "F" if b"'fortran_order': True" in bytes(data[10:start]) else "C"
    return np.frombuffer(data, array.dtype, offset=start).reshape(array.shape, order=order)
