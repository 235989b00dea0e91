"""Checkpoints of a run: its state after a round, on disk, from which it can be resumed.

Each is one file of safetensors, ``checkpoints/00012-<checksum>.safetensors``. It is written under
another name, forced to the disk, and given its own name last, so that a crash at any byte leaves
whole checkpoints only; and one whose bytes are no longer those that were written is known by its
name, before anything in it is read.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import mlx.core as mx
import numpy as np
from flwr.app import ArrayRecord

from ..arrays import safetensors
from ..arrays.named_arrays import Arrays
from ..arrays.spool import Spool
from ..errors import FedError
from ..runs.history import errors_named
from ..system.atomic_files import commit, sync_folder
from .strategy_state import State

_NAME = re.compile(r"(\d{5,})-([0-9a-f]{8})\.safetensors")
_KINDS = ("parameters", "statistics", "strategy")


class CheckpointError(FedError):
    """A checkpoint from which no run can be resumed."""


class Best(NamedTuple):
    """The best round so far: of those with the smallest share of nodes whose loss is undefined,
    the one with the lowest loss.

    The mean loss is over the nodes that have one: without those where the model diverged a round
    would look better than it is.
    """

    round: int
    loss: float
    undefined: float = 0.0


class Checkpoint(NamedTuple):
    """State of a run after a round.

    Attributes:
        round (int): The round.
        masters (ArrayRecord): The parameters as the strategy computes with them, in float32.
        statistics (dict): The model's running statistics.
        strategy (State): The strategy's own state.
        best (Best, optional): The best round so far.
        identity (dict): What the run trains, and how: a run that goes on has the same.
    """

    round: int
    masters: ArrayRecord
    statistics: Arrays
    strategy: State
    best: Best | None
    identity: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder (Path): The run's.
        keep (int): How many of the last ones are kept, beside the best; 0 writes none.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder / "checkpoints", keep
        self._writer = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: futures.Future[None] | None = None

    def save(self, checkpoint: Checkpoint, before: Callable[[], None]) -> None:
        """Writes a checkpoint beside what comes next; :meth:`wait` for the one before it first.

        Args:
            checkpoint (Checkpoint): What to write; nothing of it changes any more.
            before (callable): Called first, to bring to disk what belongs to it.
        """
        self._writing = self._writer.submit(self._save, checkpoint, before)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            HistoryError: If it could not be written.
        """
        if self._writing is not None:
            futures.wait([self._writing])  # Ctrl-C leaves it to the next one who waits
            writing, self._writing = self._writing, None
            writing.result()

    def _save(self, checkpoint: Checkpoint, before: Callable[[], None]) -> None:
        before()
        number = checkpoint.round
        draft = self.folder / f"{number:05}.part"
        with errors_named(draft):
            try:
                if not self.folder.exists():
                    self.folder.mkdir()
                    sync_folder(self.folder.parent)
                with draft.open("wb") as file:
                    writer = _Checked(file)
                    _write(writer, checkpoint)
                path = self.folder / f"{number:05}-{writer.checksum:08x}.safetensors"
                commit(draft, path)
            finally:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
            self._prune(path, checkpoint.best)

    def _prune(self, newest: Path, best: Best | None) -> None:
        """Deletes all checkpoints but the newest, those before it, and the best."""
        paths = self.paths()
        number = _round_of(newest)
        # Those of later rounds are from before the run went on from an earlier one.
        earlier = [path for path in paths if _round_of(path) < number]
        retained_paths = {newest, *earlier[: self.keep - 1]}
        retained_paths |= {path for path in earlier if best and _round_of(path) == best.round}
        # A process that was killed leaves the half of one.
        drafts = [draft for draft in self.folder.glob("*.part") if draft.stem < f"{number:05}"]
        for path in {*paths, *drafts} - retained_paths:
            path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        paths = [path for path in self.folder.glob("*.safetensors") if _NAME.fullmatch(path.name)]
        return sorted(paths, key=lambda path: (_round_of(path), path.name), reverse=True)

    def last(
        self, report: Callable[[Path, str], None], spool: Spool | None = None
    ) -> Checkpoint | None:
        """The newest that is whole, or None if there is none.

        Args:
            report (callable): Told of each newer one that is not, and why.
            spool (Spool, optional): Where its large parameters wait.
        """
        for path in self.paths():
            try:
                return read(path, spool)
            except CheckpointError as error:
                report(path, str(error))
        return None

    def state_after(self, number: int) -> State | None:
        """The strategy's state after a round, if its checkpoint is there and whole."""
        for path in self.paths():
            if _round_of(path) == number:
                with suppress(CheckpointError):
                    return read(path).strategy
        return None

    def best(self, best: Best, spool: Spool) -> Checkpoint | None:
        """The checkpoint of the best round, if it is there and whole."""
        for path in self.paths():
            if _round_of(path) == best.round:
                with suppress(CheckpointError):
                    return read(path, spool)
        return None


def read(path: Path, spool: Spool | None = None) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path (Path): The file.
        spool (Spool, optional): Where large parameters wait, one of which is in memory at a time.
            Default: all stay in memory.

    Raises:
        CheckpointError: If its bytes are not those that were written.
    """
    match = _NAME.fullmatch(path.name)
    spool = spool or Spool()
    try:
        with path.open("rb") as file:
            if match is None or _checksum(file) != int(match[2], 16):
                raise CheckpointError("its bytes do not have the checksum of its name")
        contents: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = contents
        kinds: dict[str, Arrays] = {kind: {} for kind in _KINDS}
        for name in list(arrays):
            kind, _, key = name.partition("/")
            kinds[kind][key] = arrays.pop(name)
        header = json.loads(metadata["run"])
        masters = ArrayRecord()
        for name in header["order"]:  # MLX reads each as it is asked for, and it is released then
            masters[name] = spool.put_values(np.asarray(kinds["parameters"].pop(name)))
        mx.eval(kinds["statistics"], kinds["strategy"])
        return Checkpoint(
            int(metadata["round"]),
            masters,
            {name: kinds["statistics"][name] for name in header["statistics"]},
            State(json.loads(metadata["strategy"]), kinds["strategy"]),
            Best(*header["best"]) if header["best"] else None,
            header["identity"],
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"it cannot be read: {error}") from error


class _Checked:
    """A file to write to, and the checksum of what was to be written."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.checksum = 0

    def write(self, data: bytes | memoryview) -> None:
        self.checksum = zlib.crc32(data, self.checksum)
        self.file.write(data)


def _write(file: _Checked, checkpoint: Checkpoint) -> None:
    header = {
        "order": list(checkpoint.masters),
        "statistics": list(checkpoint.statistics),
        "best": checkpoint.best,
        "identity": checkpoint.identity,
    }
    metadata = {
        "format": "mlx",
        "round": str(checkpoint.round),
        "run": json.dumps(header),
        "strategy": json.dumps(checkpoint.strategy.tree),
    }
    arrays: dict[str, safetensors.Values] = {
        **{f"parameters/{name}": array for name, array in checkpoint.masters.items()},
        **{f"statistics/{name}": array for name, array in checkpoint.statistics.items()},
        **{f"strategy/{name}": array for name, array in checkpoint.strategy.arrays.items()},
    }
    for chunk in safetensors.serialize(arrays, metadata):
        file.write(chunk)


def _checksum(file: IO[bytes]) -> int:
    checksum = 0
    while data := file.read(2**20):
        checksum = zlib.crc32(data, checksum)
    return checksum


def _round_of(path: Path) -> int:
    return int(path.name.partition("-")[0])
