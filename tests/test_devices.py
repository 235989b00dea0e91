"""Where MLX computes, and the BLAS that is loaded before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fed import devices
from mlx_fed.devices import DeviceError

from .conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has its own BLAS")


def python(code: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, in which nothing is imported yet."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_FED_BLAS"} | env
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def has_fast_blas() -> bool:
    return any(devices._candidates())


REPORT = """
import sys
assert "mlx.core" not in sys.modules
import mlx_fed
from mlx_fed import devices
assert "mlx.core" not in sys.modules
blas = devices.load_fast_blas()
import mlx.core as mx
a = mx.arange(6.0).reshape(2, 3)
assert mx.array_equal(a @ a.T, mx.array([[5.0, 14.0], [14.0, 50.0]]))
print(blas.name, blas.hint, sep="|")
print(any("openblas" in line for line in open("/proc/self/maps")))
"""


@linux
@pytest.mark.skipif(not has_fast_blas(), reason="needs an OpenBLAS")
def test_an_openblas_is_loaded_before_mlx():
    done = python(REPORT)
    name, loaded = done.stdout.splitlines()
    assert name.startswith("OpenBLAS (")
    assert loaded == "True"
    assert "MLX was imported first" not in done.stderr


@linux
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


@linux
def test_a_library_without_matrix_products_is_passed_over():
    name, _ = python(REPORT, MLX_FED_BLAS="libm.so.6").stdout.splitlines()
    assert name.startswith("reference BLAS|")
    assert "cblas_sgemm" in name


@linux
@pytest.mark.skipif(not has_fast_blas(), reason="needs an OpenBLAS")
def test_too_late_is_told_once():
    done = python(
        "import mlx.core\nimport mlx_fed\nfrom mlx_fed import devices\n"
        "print(devices.load_fast_blas().hint)\nprint(devices.use('cpu'))"
    )
    assert done.stderr.count("import mlx_fed before mlx.core") == 1
    assert "<string>:2: UserWarning" in done.stderr  # where the program can be mended
    assert done.stdout.count("import mlx_fed before mlx.core") == 2


@linux
def test_too_late_for_nothing_is_no_warning():
    done = python("import mlx.core\nimport mlx_fed", MLX_FED_BLAS="off")
    assert "UserWarning" not in done.stderr


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    before = mx.default_device()
    with pytest.raises(DeviceError, match=r"no GPU here \(.*\)\. Without --gpu it uses the CPU"):
        devices.use("gpu")
    assert mx.default_device() == before


@pytest.mark.parametrize("device", ["metal", "GPU", "cuda", ""])
def test_a_device_of_another_name_is_an_error(device: str):
    with pytest.raises(DeviceError, match=r'no device .*: it is "gpu", "cpu" or None'):
        devices.use(device)


@linux
def test_a_slow_blas_is_told_of_in_a_run(tmp_path):
    code = """if True:
        import mlx_fed as fed
        from tests.simulated import simulate
        from pathlib import Path
        told = lambda event, fields: event == "note" and print(fields["text"])
        simulate(None, Path("."), num_clients=1, num_rounds=1, device="cpu", listeners=(told,))
        """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"MLX_FED_BLAS": "off", "PYTHONPATH": path}
    shown = python(code, cwd=tmp_path, **environment).stdout.splitlines()
    assert shown == ["computing on cpu, reference BLAS (MLX_FED_BLAS=off)"]


def test_the_cpu_says_which_blas():
    before = mx.default_device()
    try:
        assert devices.use("cpu") == devices.use(None)
        assert devices.use("cpu").startswith("cpu, ")
        assert mx.default_device() == mx.Device(mx.cpu)
    finally:
        mx.set_default_device(before)


def test_who_simulates_has_their_own_default_device_again(tmp_path):
    code = """if True:
        from tests.simulated import simulate
        import mlx.core as mx
        from pathlib import Path
        mx.set_default_device(mx.Device(mx.cpu, 1))
        simulate(None, Path("."), num_clients=1, num_rounds=1, device="cpu")
        print(mx.default_device())
        """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    assert python(code, cwd=tmp_path, PYTHONPATH=path).stdout == "Device(cpu, 1)\n"
