"""Where MLX computes: the GPU or CPU, and on Linux a BLAS that is worth having.

The Linux wheel of MLX is linked against the reference BLAS, whose matrix products run at a
twentieth or less of the machine's speed. An OpenBLAS that is loaded first takes its place.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .errors import FedError


class DeviceError(FedError):
    """The device that was asked for is not there."""


class Blas(NamedTuple):
    """The BLAS that MLX uses on the CPU, and a hint where it could be a faster one."""

    name: str
    hint: str = ""


def _candidates() -> Iterator[str]:
    """Libraries to try in order: the user's own, the one that pip installs, the system's."""
    own = os.environ.get("MLX_FED_BLAS")
    if own:
        yield own
        return
    pip = (Path(p, "cmeel.prefix", "lib", "libopenblas.so.0") for p in sys.path if p)
    yield from (str(path) for path in pip if path.exists())
    if system := ctypes.util.find_library("openblas"):  # which asks the compiler
        yield system


@cache
def load_fast_blas() -> Blas:
    """Loads an OpenBLAS before MLX does its own, where there is one. Never raises.

    It has an effect only before the first ``import mlx.core`` of a process, which is why
    ``import mlx_fed`` calls it. One thread a process unless ``OPENBLAS_NUM_THREADS`` says
    otherwise: clients on one machine would slow each other down many times over. Set
    ``MLX_FED_BLAS`` to the path of another library with CBLAS names to use that, or to ``off``
    to leave MLX as it is.
    """
    if sys.platform != "linux":
        return Blas("Accelerate" if sys.platform == "darwin" else "MLX's own")
    if os.environ.get("MLX_FED_BLAS") == "off":
        return Blas("reference BLAS", "MLX_FED_BLAS=off")
    if "mlx.core" in sys.modules:
        hint = "import mlx_fed before mlx.core, which then computes many times faster on the CPU"
        if any(_candidates()):
            warnings.warn(f"MLX was imported first: {hint}.", stacklevel=3)
        return Blas("as MLX was imported", hint)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    failures = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018 - raises where the names carry a prefix
        except (OSError, AttributeError) as error:
            failures.append(str(error))
        else:
            return Blas(f"OpenBLAS ({path})")
    if any("libgfortran" in failure for failure in failures):
        return Blas("reference BLAS", "OpenBLAS needs libgfortran5: apt install libgfortran5")
    hint = failures[0] if failures else "OpenBLAS is not installed: mlx-fed's extra cpu brings it"
    return Blas("reference BLAS", hint)


def require_backend() -> None:
    """Says what to install where MLX's own part is missing, as it is on Linux without an extra.

    Raises:
        ImportError: If MLX cannot be imported.
    """
    if sys.platform != "linux":
        return
    spec = importlib.util.find_spec("mlx")
    folders = spec.submodule_search_locations if spec else None
    if any(Path(folder, "lib", "libmlx.so").exists() for folder in folders or ()):
        return
    try:
        importlib.import_module("mlx.core")  # one that was built otherwise is as good
    except ImportError as error:
        raise ImportError(
            f"MLX has no backend here ({error}). On Linux, install mlx-fed with one of its extras "
            'cpu, cuda12 and cuda13: pip install -e ".[cpu,digits]" in its repository, or '
            'poetry install --extras "cpu digits", or uv sync --extra cpu --extra digits.'
        ) from error


def use(device: str | None) -> str:
    """Makes ``"gpu"`` or ``"cpu"`` MLX's default device; ``None`` leaves MLX's own choice.

    Returns:
        str: The device in words, such as ``"gpu"`` or ``"cpu, OpenBLAS (...)"``.

    Raises:
        DeviceError: If there is no such device, or no GPU that this MLX can use.
    """
    import mlx.core as mx

    if device not in ("gpu", "cpu", None):
        raise DeviceError(f'There is no device {device!r}: it is "gpu", "cpu" or None.')

    if device == "gpu" and not mx.is_available(mx.gpu):
        remedy = (
            "Metal needs Apple silicon and a native Python"
            if sys.platform == "darwin"
            else "for CUDA, install mlx-fed with its extra cuda12 or cuda13 in place of cpu"
        )
        raise DeviceError(f"MLX has no GPU here ({remedy}). Without --gpu it uses the CPU.")
    if device is not None:
        mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    if mx.default_device() == mx.Device(mx.gpu):
        return "gpu"
    blas = load_fast_blas()
    return f"cpu, {blas.name}" + (f" ({blas.hint})" if blas.hint else "")


@contextmanager
def put_back() -> Iterator[None]:
    """Puts MLX's default device back at the end, as it was before somebody else's code ran."""
    import mlx.core as mx

    before = mx.default_device()
    try:
        yield
    finally:
        mx.set_default_device(before)


def is_slow(device: str) -> bool:
    """Whether the device, in the words of :func:`use`, could be a faster one."""
    return device != "gpu" and bool(load_fast_blas().hint)
