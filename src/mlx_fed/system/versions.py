"""Versions of what a computation's bits depend on, by name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from .blas import load_fast_blas

_PACKAGES = ("mlx-fed", "mlx", "numpy", "flwr")


def versions() -> dict[str, str]:
    """Versions of packages and Python, the BLAS, and the kind of machine.

    Example:
        >>> versions()["python"]
        '3.12.4'
    """
    blas = load_fast_blas()
    return {
        **{name: _version_of(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "blas": blas.version or blas.name,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def difference(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Which versions of another machine are not those of this one, in words; empty if none."""
    texts = [
        f"{name} {str(theirs[name])[:100]}, here {ours[name]}"
        for name in ours
        if name in theirs and theirs[name] != ours[name]
    ]
    return "; ".join(texts)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
