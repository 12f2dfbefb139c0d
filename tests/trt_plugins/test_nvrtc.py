"""The kernels through the compiler of CUDA 12.6 (JetPack 6), which pip can only give as NVRTC.

    pip install --no-deps --target build/nvrtc 'nvidia-cuda-nvrtc-cu12==12.6.*'      # 23 MB
    export STTS_NVRTC=build/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
    pytest tests/trt_plugins/test_nvrtc.py

It compiles the device code alone: the launches of select_pack_kernel.cu are not in it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest

from tests.trt_plugins.conftest import ROOT

LIBRARY = os.environ.get("STTS_NVRTC", "")
PROGRAM = b"""
#include "select_pack/block.cuh"
#include "select_pack/gather.cuh"
#include "select_pack/plan.cuh"
namespace stts {
__global__ void planClip(PlanInput input, PlanOutput output, PlanWorkspace work) {
    __shared__ PlanShared plan_shared;
    __shared__ CudaBlock::Shared block_shared;
    CudaBlock block(block_shared);
    planPacking(block, input, output, work, plan_shared);
}
template __global__ void gatherWindows<uint4>(
    const uint4*, const int32_t*, const int32_t*, int32_t, int32_t, uint4*);
template __global__ void gatherWindows<uint16_t>(
    const uint16_t*, const int32_t*, const int32_t*, int32_t, int32_t, uint16_t*);
}
"""
# NVRTC has no C++ library.
HEADERS = {
    b"cuda_runtime.h": b"",
    b"cstdint": b"using int32_t = int; using uint32_t = unsigned; using uint16_t = unsigned short;"
    b"using int64_t = long long; using uint64_t = unsigned long long;"
    b"using size_t = unsigned long;",
    b"cstring": b"namespace std { using ::memcpy; }",
}

pytestmark = pytest.mark.skipif(
    not LIBRARY, reason="STTS_NVRTC names no libnvrtc.so.12 (see the top of this file)"
)


@pytest.fixture
def nvrtc() -> ctypes.CDLL:
    return ctypes.CDLL(LIBRARY)


@pytest.fixture
def program(nvrtc: ctypes.CDLL) -> Iterator[ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    array = ctypes.c_char_p * len(HEADERS)
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(handle), PROGRAM, b"select_pack.cu",
        len(HEADERS), array(*HEADERS.values()), array(*HEADERS.keys()),
    )  # fmt: skip
    assert status == 0
    yield handle
    nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))


def text(function: str, nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> bytes:
    """What nvrtcGetSomething gives."""
    size = ctypes.c_size_t()
    assert nvrtc[f"{function}Size"](program, ctypes.byref(size)) == 0
    data = ctypes.create_string_buffer(size.value)
    assert nvrtc[function](program, data) == 0
    return data.raw


@pytest.mark.parametrize("architecture", [80, 86, 87, 89, 90])
def test_kernels_compile(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, architecture: int) -> None:
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", f"-I{ROOT / 'trt_plugins'}"]
    array = ctypes.c_char_p * len(options)
    encoded = [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(program, len(options), array(*encoded))
    log = text("nvrtcGetProgramLog", nvrtc, program).decode()
    assert status == 0, log
    assert "warning" not in log
    cubin = text("nvrtcGetCUBIN", nvrtc, program)
    assert cubin[:4] == b"\x7fELF"
    (flags,) = struct.unpack_from("<I", cubin, 48)
    assert flags & 0xFF == architecture
    assert cubin.count(b".text._ZN4stts") >= 3
