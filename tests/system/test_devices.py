"""Where MLX computes, and the BLAS that is loaded before it."""

from __future__ import annotations

import os
import sys

import mlx.core as mx
import pytest

from mlx_fed.system import devices
from mlx_fed.system.devices import DeviceError

from ..conftest import ROOT, python

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has its own BLAS")


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
        from tests.helpers.simulated import simulate
        from pathlib import Path
        told = lambda event: event.name == "note" and print(event.text)
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
        from tests.helpers.simulated import simulate
        import mlx.core as mx
        from pathlib import Path
        mx.set_default_device(mx.Device(mx.cpu, 1))
        simulate(None, Path("."), num_clients=1, num_rounds=1, device="cpu")
        print(mx.default_device())
        """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    assert python(code, cwd=tmp_path, PYTHONPATH=path).stdout == "Device(cpu, 1)\n"
