"""The GPU lane: `make test-gpu`. Needs a GPU; imports neither torch nor onnx, so a Jetson runs it.

Environment:
    STTS_GPU_KIT     folder of `tests.gpu.kit` (default build/gpu_kit, made here where torch is)
    STTS_GPU_BUILD   build folder of the kernels' test program (default build/gpu)
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _gpu_missing() -> str | None:
    """Why there is no GPU to test on, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return "the CUDA driver does not start"
    return None if count.value else "no CUDA device"


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    missing = _gpu_missing()
    if missing:
        pytest.skip(f"needs a GPU: {missing}")


@pytest.fixture(scope="session")
def device_program(_gpu: None) -> Path:
    """The kernels without TensorRT: `trt_plugins/device`, built for this GPU."""
    build = Path(os.environ.get("STTS_GPU_BUILD", ROOT / "build" / "gpu"))
    for command in (
        ["cmake", "--preset", "gpu", "-B", str(build)],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "select_pack_device"


@pytest.fixture(scope="session")
def kit(_gpu: None) -> Path:
    """Golden bundles and what ONNX Runtime computes on them."""
    folder = Path(os.environ.get("STTS_GPU_KIT", ROOT / "build" / "gpu_kit"))
    if not (folder / "kit.json").exists():
        missing = [name for name in ("torch", "onnx", "onnxruntime") if find_spec(name) is None]
        if missing:
            pytest.skip(
                f"needs {folder}, and {', '.join(missing)} is not installed to make it: run "
                "`make gpu-kit` on another machine and copy build/gpu_kit here"
            )
        from tests.gpu.kit import make_kit

        make_kit(folder)
    return folder
