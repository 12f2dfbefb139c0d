"""The GPU lane: `make test-gpu`. Needs a GPU; imports neither torch nor onnx, so a Jetson runs it.

Environment:
    STTS_GPU_KIT     folder of `tests.gpu.kit`; without it one is made where torch is, else
                     build/gpu_kit is taken
    STTS_GPU_BUILD   build folder of the kernels' test program (default build/gpu)
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from stts_export import __version__
from tests.gpu.kit import kit_version

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


def _architecture() -> str:
    """Of the first GPU, as 87."""
    driver, digits = ctypes.CDLL("libcuda.so.1"), []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int(0)
        assert driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        digits.append(str(value.value))
    return "".join(digits)


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    missing = _gpu_missing()
    if missing:
        pytest.skip(f"needs a GPU: {missing}")


@pytest.fixture(scope="session")
def device_program(_gpu: None) -> Path:
    """The kernels without TensorRT: `trt_plugins/device`, built for this GPU."""
    build = Path(os.environ.get("STTS_GPU_BUILD", ROOT / "build" / "gpu"))
    _build("gpu", build, f"-DCMAKE_CUDA_ARCHITECTURES={_architecture()}-real")
    return build / "select_pack_device"


@pytest.fixture(scope="session")
def plugin(_gpu: None) -> Path:
    """The plugin of this checkout."""
    build = ROOT / "build" / "release"
    _build("release", build)
    return build / "libstts_plugins.so"


def _build(preset: str, folder: Path, *settings: str) -> None:
    for command in (
        ["cmake", "--preset", preset, "-B", str(folder), *settings],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def kit(_gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden bundles and what ONNX Runtime computes on them: made here, or brought here."""
    given = os.environ.get("STTS_GPU_KIT")
    if given is None and all(find_spec(name) for name in ("torch", "onnx", "onnxruntime")):
        from tests.gpu.kit import make_kit

        folder = tmp_path_factory.mktemp("gpu_kit")
        make_kit(folder)
        return folder
    folder = Path(given) if given else ROOT / "build" / "gpu_kit"
    found = kit_version(folder)
    if found != __version__:
        pytest.skip(
            f"needs a kit of stts-export {__version__} in {folder}, where there is "
            f"{found or 'none'}: run `make gpu-kit` where PyTorch is and copy build/gpu_kit here"
        )
    return folder
