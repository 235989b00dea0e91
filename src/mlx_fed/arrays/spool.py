"""Spool of a run on disk: replies before their turn, and master weights between uses.

Small arrays stay in memory. A file that nothing refers to is reused for the next content of its
size, which takes a fraction of the time of a new file. The folder is removed with the end of the
run, and emptied when a killed run is resumed.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from .flower_records import Segment, SegmentedArray, SpooledBytes, records_in, segments_of

_SMALL = 2**18
"""Bytes below which content stays in memory."""
_MAX_SPARE = 4 * 2**30
"""Bytes of spare files that are kept for reuse."""
_ALIGNMENT = 64
"""Alignment of numbers in a file, in bytes: NumPy and BLAS read them without a copy."""

_file_numbers = count(1)
log = logging.getLogger("mlx_fed")


class Spool:
    """A run's folder of spooled bytes.

    Args:
        folder (Path, optional): Created at the first use. Default: all bytes stay in memory.

    Attributes:
        spare (dict): Files for reuse, which nothing refers to, by size in bytes.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.spare: dict[int, list[Path]] = defaultdict(list)
        self._spare_bytes = 0
        self._has_warned = False
        self._lock = threading.RLock()  # garbage collection may release a file at any time

    def put(self, *chunks: bytes | memoryview, head: int = 0) -> SpooledBytes | bytes:
        """Bytes on disk, or in memory if they are few or cannot be written.

        Args:
            chunks (bytes): The content, one chunk after another.
            head (int): The number of bytes before the first number, which is aligned in the file.
        """
        if spooled_bytes := self._write(*chunks, head=head):
            return spooled_bytes
        return chunks[0] if len(chunks) == 1 and isinstance(chunks[0], bytes) else b"".join(chunks)

    def put_array(self, array: Array) -> Array:
        """A large array on disk; a small one unchanged."""
        segments = segments_of(array)
        if any(isinstance(segment.content, SpooledBytes) for segment in segments):
            return array
        spooled_bytes = self._write(*(segment.read() for segment in segments))
        if spooled_bytes is None:
            return array
        segment = Segment(spooled_bytes)
        return SegmentedArray(str(array.dtype), tuple(array.shape), array.stype, (segment,))

    def put_values(self, values: np.ndarray) -> Array:
        """Array record entry of these values, in the bytes of Flower's; on disk if it is large."""
        if self.folder is not None and values.nbytes >= _SMALL and values.flags.c_contiguous:
            head = BytesIO()
            header = np.lib.format.header_data_from_array_1_0(values)
            np.lib.format.write_array_header_1_0(head, header)
            spooled_bytes = self._write(head.getvalue(), values.reshape(-1).view(np.uint8).data)
            if spooled_bytes is not None:
                segments = (Segment(spooled_bytes),)
                return SegmentedArray(str(values.dtype), values.shape, "numpy.ndarray", segments)
        return Array(values)

    def put_record(self, arrays: Iterable[tuple[str, Array]]) -> ArrayRecord:
        """A record of arrays by name, each put on disk before the next is computed."""
        record = ArrayRecord()
        for name, array in arrays:
            record[name] = self.put_array(array)
        return record

    def put_message(self, content: RecordDict) -> None:
        """Replaces the large arrays of a message by arrays on disk."""
        for record in records_in(content, ArrayRecord).values():
            for name, array in record.items():
                record[name] = self.put_array(array)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Removes what a killed process left in the folder, and the folder at the end."""
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

    def _write(self, *chunks: bytes | memoryview, head: int = 0) -> SpooledBytes | None:
        """The chunks in one file, or None if they are few or cannot be written."""
        size = sum(map(len, chunks))
        if self.folder is None or size < _SMALL:
            return None
        start = -head % _ALIGNMENT
        while True:
            spare = self._take_spare(start + size)
            path = spare or self.folder / f"{os.getpid()}-{next(_file_numbers)}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with path.open("r+b" if spare else "xb", buffering=0) as file:
                    for chunk in (bytes(start), *chunks):
                        view = memoryview(chunk)
                        while view:
                            view = view[file.write(view) :]
                return SpooledBytes(path, start, size, self._release)
            except OSError as error:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                if self._remove_spare():
                    continue  # there may be room now
                if not self._has_warned:
                    log.warning("%s: arrays stay in memory instead", error)
                    self._has_warned = True
                return None

    def _take_spare(self, size: int) -> Path | None:
        with self._lock:
            if not self.spare[size]:
                return None
            self._spare_bytes -= size
            return self.spare[size].pop()

    def _remove_spare(self) -> bool:
        """Removes the spare files, and returns whether there were any."""
        with self._lock:
            paths = [path for paths in self.spare.values() for path in paths]
            self.spare.clear()
            self._spare_bytes = 0
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return bool(paths)

    def _release(self, path: Path, size: int) -> None:
        """Keeps a file that nothing refers to for reuse, or removes it."""
        with self._lock:
            if self.folder is not None and self._spare_bytes + size <= _MAX_SPARE:
                self._spare_bytes += size
                self.spare[size].append(path)
                return
        with suppress(OSError):
            path.unlink(missing_ok=True)
