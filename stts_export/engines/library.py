"""Names of the back ends; and TensorRT and TensorRT for RTX as Python packages."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from stts_export.errors import MissingDependencyError

ONNXRUNTIME = "onnxruntime"
TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"
ENGINE_BACKENDS = (TENSORRT, TENSORRT_RTX)
BACKENDS = (ONNXRUNTIME, *ENGINE_BACKENDS)
"""What runs bundles: their graphs, or engines that are built from them."""
MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
"""Python module by back end."""
INSTALL = {
    TENSORRT: "on Jetson use JetPack's own (python3-libnvinfer), in a virtual environment "
    "made with --system-site-packages; elsewhere "
    "pip install 'stts-export[trt]' --extra-index-url https://pypi.nvidia.com",
    TENSORRT_RTX: "pip install 'stts-export[trt-rtx]'",
}
"""How to get it, by back end."""


def import_library(backend: str) -> ModuleType:
    """Import the library of a back end.

    Raises:
        MissingDependencyError: it is not installed, or cannot be loaded.
    """
    try:
        return import_module(MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: a library of the package does not load
        raise MissingDependencyError(
            f"is not installed ({error})", where=backend, fix=INSTALL[backend]
        ) from None
