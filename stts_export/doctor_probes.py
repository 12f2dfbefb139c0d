"""What `doctor` finds out in child processes: libraries that may abort the process that loads them.

Each probe prints nothing and returns plain values; `main` writes them to a file descriptor. Nothing
but the standard library is imported with this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

Values = dict[str, Any]

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute

# An ONNX model of one Identity node, of opset 13, as `onnx.helper` makes it.
_IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a02"
    "0801620f0a0179120a0a08080112040a02080142040a00100d"
)


def cuda_driver() -> Values:
    """Driver and GPUs as libcuda sees them, without cuda-python.

    Raises:
        OSError: there is no driver library.
        RuntimeError: the driver does not start.
    """
    library = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        status = getattr(library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode() or status}")

    number, count = ctypes.c_int(), ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        device, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        numbers = []
        for attribute in (_MAJOR, _MINOR, _INTEGRATED):
            call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        gpus.append({"name": name.value.decode(errors="replace"), "memory": size.value,
                     "sm": f"sm{numbers[0]}{numbers[1]}", "unified": bool(numbers[2])})  # fmt: skip
    return {"cuda": cuda, "gpus": gpus}


def cuda_python() -> Values:
    """The same through cuda-python, which is what runs engines.

    Raises:
        SttsError: it is not installed, or there is no driver or GPU.
    """
    from stts_export.engines import cuda

    version = getattr(import_module("cuda.bindings"), "__version__", "unknown")
    driver = cuda.driver_version()
    count = int(cuda.call("cudaGetDeviceCount"))
    gpus = []
    for index in range(count):
        major, minor = cuda.compute_capability(index)
        gpus.append({"name": f"GPU {index}", "memory": None, "sm": f"sm{major}{minor}"})
    return {"version": version, "cuda": driver, "gpus": gpus}


def library(module: str) -> Values:
    """TensorRT or TensorRT for RTX: its version, and whether builder and runtime start."""
    trt: Any = import_module(module)
    found: Values = {"version": str(trt.__version__), "builder": None, "runtime": None}
    severity = getattr(trt.ILogger, "Severity", trt.ILogger)

    class Quiet(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, level: Any, msg: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.said.append(msg.strip())

    for what, start in (("builder", "Builder"), ("runtime", "Runtime")):
        logger = Quiet()
        try:
            getattr(trt, start)(logger)
        except Exception as error:  # whatever the bindings raise
            found[what] = "; ".join(logger.said) or str(error)
    return found


def plugin(path: str) -> Values:
    """Load the plugin into TensorRT's registry."""
    from stts_export.engines.plugin import load_plugin

    load_plugin(import_module("tensorrt"), Path(path))
    return {}


def onnxruntime() -> Values:
    """Version and providers of what `import onnxruntime` gives; and whether CUDA really starts."""
    ort: Any = import_module("onnxruntime")
    found: Values = {"version": str(ort.__version__), "providers": ort.get_available_providers()}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    started = []
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        if provider in found["providers"]:  # the GPU wheel lists CUDA where there is none
            session = ort.InferenceSession(_IDENTITY, options, providers=[provider])
            started += [name for name in session.get_providers() if name == provider]
    return {**found, "started": started}


def hardware_decode() -> Values:
    """Decode a frame on a GPU.

    Raises:
        Exception: whatever PyAV raises where that is not possible.
    """
    av: Any = import_module("av")
    hwaccel: Any = import_module("av.codec.hwaccel")
    np: Any = import_module("numpy")
    clip = io.BytesIO()
    with av.open(clip, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=2)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((256, 256, 3), np.uint8), format="rgb24")
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    clip.seek(0)
    accelerator = hwaccel.HWAccel("cuda", allow_software_fallback=False)
    with av.open(clip, hwaccel=accelerator) as source:
        next(iter(source.decode(video=0)))
    return {"device": "cuda"}


PROBES: Mapping[str, Callable[..., Values]] = {
    probe.__name__: probe
    for probe in (cuda_driver, cuda_python, library, plugin, onnxruntime, hardware_decode)
}


def main(name: str, answers: int, arguments: list[str]) -> None:
    """Run a probe; write its values, or what it raised, as JSON to a file descriptor."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            answer: Values = {"values": PROBES[name](*arguments)}
        except Exception as error:  # a probe must say what is wrong, whatever it is
            text = getattr(error, "message", None) or str(error) or type(error).__name__
            answer = {"error": f"{text}".strip(), "type": type(error).__name__}
    with os.fdopen(answers, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(answer))
