"""The stand-in for cuda-python: memory, streams, events, graphs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.standins.conftest import misuse
from tests.standins.cuda import CudaStandin, make_cuda


@pytest.fixture
def cuda() -> Iterator[Any]:
    """The module cuda.bindings.runtime."""
    module = make_cuda()
    yield module
    module.standin.assert_no_violation()


OK = 0


@pytest.mark.parametrize("version", ["12.6", "13.4"])
def test_cuda_has_the_names_of_its_version(version: str):
    cuda = make_cuda(version)
    assert cuda.cudaMemcpyKind.cudaMemcpyHostToDevice == 1
    assert isinstance(cuda.cudaStreamNonBlocking, int)
    assert hasattr(cuda, "cudaStreamGetCaptureInfo_v3") is (version == "12.6")
    assert hasattr(cuda, "cudaLogsCurrent") is (version == "13.4")
    with pytest.raises(AttributeError, match="cudaNoSuchThing"):
        cuda.cudaNoSuchThing()
    with pytest.raises(TypeError):
        cuda.cudaMalloc()
    with pytest.raises(TypeError):
        cuda.cudaMalloc(1, 2)
    with pytest.raises(TypeError):
        cuda.cudaMalloc(bytes=1)
    with pytest.raises(NotImplementedError, match="cudaCreateTextureObject"):
        cuda.cudaCreateTextureObject(None, None, None)


def test_every_function_that_is_there_is_a_real_one():
    for version in ("12.6", "13.4"):
        standin = CudaStandin(version)
        ours = [name for name in dir(standin) if name.startswith("cuda")]
        assert len(ours) > 40
        assert set(ours) <= set(standin.api["functions"])


def test_device_memory(cuda: Any):
    standin = cuda.standin
    status, address = cuda.cudaMalloc(100)
    assert status == cuda.cudaError_t.cudaSuccess
    assert address % 256 == 0
    assert standin.live_bytes == 100
    array = np.zeros(100, np.uint8)
    kinds = cuda.cudaMemcpyKind
    assert cuda.cudaMemcpy(array, address, 100, kinds.cudaMemcpyDeviceToHost)[0] == OK
    assert (array == 0xCD).all()  # not zeroed
    assert cuda.cudaMemset(address, 7, 100)[0] == OK
    cuda.cudaMemcpy(array.ctypes.data, address, 100, kinds.cudaMemcpyDeviceToHost)
    assert (array == 7).all()
    with pytest.raises(AssertionError, match="100 bytes of device memory leaked"):
        standin.assert_clean()
    assert cuda.cudaFree(address)[0] == OK
    standin.assert_clean()
    assert cuda.cudaFree(address)[0].name == "cudaErrorInvalidValue"
    assert standin.violations
    standin.violations.clear()


def test_copies_are_checked(cuda: Any):
    standin, kinds = cuda.standin, cuda.cudaMemcpyKind
    _, address = cuda.cudaMalloc(100)
    array = np.zeros(200, np.uint8)
    host = array.ctypes.data
    copy = cuda.cudaMemcpy
    for words, arguments in (
        ("overrun", (address, host, 101, kinds.cudaMemcpyHostToDevice)),
        ("overrun", (host, address + 1, 100, kinds.cudaMemcpyDeviceToHost)),
        ("no live device memory", (host, host, 4, kinds.cudaMemcpyHostToDevice)),
        ("is device memory", (host, address, 4, kinds.cudaMemcpyHostToDevice)),
        ("is device memory", (address, address, 4, kinds.cudaMemcpyDeviceToHost)),
        ("no live device memory", (address, host, 4, kinds.cudaMemcpyDeviceToDevice)),
    ):
        if words == "is device memory" and arguments[0] == host:
            continue  # the first side that is wrong is named
        misuse(standin, words, functools.partial(copy, *arguments))
    with pytest.raises(TypeError):
        copy(address, host, 4, 1)
    with pytest.raises(TypeError):
        copy(address, np.int64(host), 4, kinds.cudaMemcpyHostToDevice)
    cuda.cudaFree(address)
    misuse(standin, "no live", lambda: copy(address, host, 4, kinds.cudaMemcpyHostToDevice))


def test_guard_zones_are_watched():
    cuda = make_cuda()
    _, address = cuda.cudaMalloc(100)
    ctypes.memset(address + 100, 0, 1)
    misuse(cuda.standin, "was written", cuda.standin.assert_no_violation)
    misuse(cuda.standin, "was written", lambda: cuda.cudaFree(address))


def test_streams_are_lazy_and_in_order(cuda: Any):
    kinds = cuda.cudaMemcpyKind
    _, stream = cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)
    _, device = cuda.cudaMalloc(4)
    _, pinned = cuda.cudaMallocHost(4)
    view = np.ctypeslib.as_array((ctypes.c_uint8 * 4).from_address(pinned))
    view[:] = 1
    cuda.cudaMemcpyAsync(device, pinned, 4, kinds.cudaMemcpyHostToDevice, stream)
    view[:] = 2  # too early: the copy has not run
    cuda.cudaMemcpyAsync(pinned, device, 4, kinds.cudaMemcpyDeviceToHost, int(stream))
    view[:] = 3
    assert cuda.cudaStreamQuery(stream)[0].name == "cudaErrorNotReady"
    cuda.cudaStreamSynchronize(stream)
    assert view.tolist() == [3, 3, 3, 3]  # what the pinned memory held when the copy ran
    pageable = np.full(4, 9, np.uint8)
    cuda.cudaMemcpyAsync(device, pageable, 4, kinds.cudaMemcpyHostToDevice, stream)
    pageable[:] = 0  # was staged
    back = np.zeros(4, np.uint8)
    cuda.cudaMemcpyAsync(back, device, 4, kinds.cudaMemcpyDeviceToHost, stream)
    assert back.tolist() == [9, 9, 9, 9]  # copies to pageable memory wait
    del view
    for call in (cuda.cudaFree(device), cuda.cudaFreeHost(pinned), cuda.cudaStreamDestroy(stream)):
        assert call[0] == OK
    cuda.standin.assert_clean()


def test_events_order_streams(cuda: Any):
    (_, first), (_, second) = cuda.cudaStreamCreate(), cuda.cudaStreamCreate()
    (_, event), (_, device) = cuda.cudaEventCreate(), cuda.cudaMalloc(8)
    cuda.cudaMemsetAsync(device, 1, 8, first)
    cuda.cudaEventRecord(event, first)
    cuda.cudaMemsetAsync(device, 2, 4, first)
    cuda.cudaStreamWaitEvent(second, event, 0)
    cuda.cudaMemsetAsync(device, 3, 8, second)
    cuda.cudaStreamSynchronize(second)
    back = np.zeros(8, np.uint8)
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.cudaMemcpyAsync(back, device, 8, kind, second)
    assert back.tolist() == [3] * 8  # the first stream's second memset still waits
    cuda.cudaDeviceSynchronize()
    cuda.cudaMemcpy(back, device, 8, kind)
    assert back.tolist() == [2] * 4 + [3] * 4
    assert len(cuda.standin.live_objects) == 3
    cuda.cudaEventDestroy(event)
    misuse(cuda.standin, "no live cudaEvent_t", lambda: cuda.cudaEventRecord(event, first))


def test_waiting_breaks_a_capture(cuda: Any):
    _, stream = cuda.cudaStreamCreate()
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    for wait in (
        lambda: cuda.cudaStreamSynchronize(stream),
        lambda: cuda.cudaMalloc(4),
        cuda.cudaDeviceSynchronize,
    ):
        assert cuda.cudaStreamBeginCapture(stream, mode)[0] == OK
        assert wait()[0].name == "cudaErrorStreamCaptureUnsupported"
        status, graph = cuda.cudaStreamEndCapture(stream)
        assert status.name == "cudaErrorStreamCaptureInvalidated"
        assert graph is None


def test_limits_and_absences():
    cuda = make_cuda(total_memory=1000)
    assert cuda.cudaMalloc(600)[0] == OK
    status, address = cuda.cudaMalloc(600)
    assert (status.name, address) == ("cudaErrorMemoryAllocation", None)
    assert cuda.cudaGetErrorName(status)[1] == b"cudaErrorMemoryAllocation"
    assert cuda.cudaMemGetInfo()[1:] == (400, 1000)
    assert cuda.cudaGetLastError()[0] == status
    assert cuda.cudaGetLastError()[0] == OK
    assert make_cuda(driver=0).cudaGetDeviceCount()[0].name == "cudaErrorInsufficientDriver"
    assert make_cuda(driver=0).cudaDriverGetVersion()[1] == 0
    assert make_cuda(devices=0).cudaGetDeviceCount()[0].name == "cudaErrorNoDevice"
    assert make_cuda().cudaSetDevice(1)[0].name == "cudaErrorInvalidDevice"
    with pytest.raises(RuntimeError, match=r"libcuda\.so\.1"):
        make_cuda("12.6", driver=0).cudaGetDeviceCount()


def test_the_device_describes_itself():
    cuda = make_cuda(compute_capability=(8, 9))
    attributes = cuda.cudaDeviceAttr
    names = (attributes.cudaDevAttrComputeCapabilityMajor,
             attributes.cudaDevAttrComputeCapabilityMinor)  # fmt: skip
    assert [cuda.cudaDeviceGetAttribute(name, 0)[1] for name in names] == [8, 9]
    with pytest.raises(TypeError):
        cuda.cudaDeviceGetAttribute(75, 0)
    properties = cuda.cudaGetDeviceProperties(0)[1]
    assert (properties.major, properties.minor) == (8, 9)
    with pytest.raises(AttributeError):
        _ = properties.no_such_field
