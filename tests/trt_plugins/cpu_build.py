"""Builds the plugin for the CPU: its kernels on an emulated GPU, as a library for ctypes.

Needs a C++17 compiler, and nothing of CUDA, TensorRT or CMake. `trt_plugins/tests/CMakeLists.txt`
builds the same library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "trt_plugins"
LIBRARY = "libstts_emulated_plugin.so"

UNITS = (
    "plugin_library.cpp",
    "plugin_log.cpp",
    "select_pack/select_pack_creator.cpp",
    "select_pack/select_pack_plugin.cpp",
    "tests/emulated_plugin.cpp",
    "tests/emulation/emulator.cpp",
    "tests/plan_cpu.cpp",
)
# emulation/ comes first: it stands in for CUDA's headers.
_INCLUDES = ("tests/emulation", "tests", ".")
_OPTIONS = (
    "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror",
    "-DSTTS_OWN_TENSORRT_INTERFACE", '-DSTTS_PLUGINS_VERSION="test"',
)  # fmt: skip


def build_cpu_library(out_dir: Path, source_root: Path = SOURCES) -> Path:
    """Compile the library into a folder; about two seconds.

    Args:
        out_dir: existing folder for the library.
        source_root: `trt_plugins`, or a changed copy of it.

    Raises:
        RuntimeError: there is no C++ compiler, or it refuses the sources.
    """
    library = out_dir / LIBRARY
    units = [str(source_root / unit) for unit in UNITS]
    _compile(source_root, ["-shared", "-fvisibility=hidden", *units], library)
    return library


def build_device_program(out_dir: Path) -> Path:
    """Compile `trt_plugins/device` for the CPU, its device memory being the host's.

    Args:
        out_dir: existing folder for the program.

    Raises:
        RuntimeError: there is no C++ compiler, or it refuses the sources.
    """
    program = out_dir / "select_pack_device"
    kernels = ("device/select_pack_device.cu", "select_pack/select_pack_kernel.cu")
    _compile(
        SOURCES,
        [
            "-include", "emulation/cuda_host_memory.h",
            "-x", "c++", *(str(SOURCES / unit) for unit in kernels),
            "-x", "none", str(SOURCES / "tests/emulation/emulator.cpp"),
        ],
        program,
    )  # fmt: skip
    return program


def _compile(source_root: Path, what: list[str], output: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError("no C++ compiler; on Debian and Ubuntu: apt-get install g++")
    includes = [f"-I{source_root / folder}" for folder in _INCLUDES]
    command = [compiler, *_OPTIONS, *includes, *what, "-ldl", "-o", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{compiler} failed:\n{done.stderr}")
