"""MLX's device: the GPU or the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FedError
from .blas import load_fast_blas


class DeviceError(FedError):
    """The requested device does not exist on this machine."""


def require_backend() -> None:
    """Checks that MLX has a backend, which on Linux is installed by an extra.

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
        importlib.import_module("mlx.core")  # a local build has other files
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
def restore_default() -> Iterator[None]:
    """Restores MLX's default device at the end, which the user's code may change."""
    import mlx.core as mx

    before = mx.default_device()
    try:
        yield
    finally:
        mx.set_default_device(before)


def is_slow(device: str) -> bool:
    """Whether the device, in the words of :func:`use`, could be a faster one."""
    return device != "gpu" and bool(load_fast_blas().hint)
