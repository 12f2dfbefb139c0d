"""Streams, arrays and memory of a GPU, on a stand-in for cuda-python in host memory."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import pytest

from stts_export.engines import cuda
from stts_export.engines.cuda import DeviceArray, Memory, Stream
from stts_export.errors import InputError, MissingDependencyError
from tests.standins.cuda import CudaStandin
from tests.standins.fixtures import cuda_standin, install_cuda, uninstall  # noqa: F401

MB = 1 << 20


@pytest.fixture
def device(cuda_standin: CudaStandin) -> CudaStandin:  # noqa: F811
    return cuda_standin


@pytest.fixture
def memory(device: CudaStandin) -> Any:
    memory = Memory(Stream())
    yield memory
    memory.close()
    device.assert_clean()


def test_arrays_go_to_the_device_and_back(memory: Memory):
    values = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    array = memory.empty((4, 2, 3), np.float16)
    array.copy_from_host(values)
    np.testing.assert_array_equal(array.to_host(), values)
    np.testing.assert_array_equal(array[1:3].to_host(), values[1:3])
    np.testing.assert_array_equal(array[3:].reshape(-1, 3).to_host(), values[3])
    assert (array.ndim, array.size, array.nbytes, len(array[4:])) == (3, 24, 48, 0)
    array[1:2].zero()
    values[1] = 0
    np.testing.assert_array_equal(array.to_host(), values)
    other = memory.zeros((8, 3), np.float16)
    assert not other.to_host().any()
    other.copy_from(array)
    np.testing.assert_array_equal(other.to_host(), values.reshape(8, 3))


def test_arrays_that_do_not_fit_are_refused(memory: Memory):
    array = memory.zeros((4, 3), np.float32)
    for values in (np.zeros((4, 2), np.float32), np.zeros((4, 3))):
        with pytest.raises(ValueError, match="does not fit into float32"):
            array.copy_from_host(values)
    with pytest.raises(ValueError, match="does not fit into float32"):
        array.copy_from(memory.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"cannot be viewed as \(5, -1\)"):
        array.reshape(5, -1)
    with pytest.raises(ValueError, match=r"cannot be viewed as \(2, 3\)"):
        array.reshape(2, 3)
    with pytest.raises(ValueError, match="consecutive"):
        array[::2]
    with pytest.raises(TypeError, match="slice"):
        array[0]  # type: ignore[index]


def test_memory_that_is_dropped_is_used_again(device: CudaStandin, memory: Memory):
    first = memory.empty((1000,), np.float32)
    pointer = first.pointer
    view = first[10:20]
    del first
    other = memory.empty((1000,), np.float32)
    assert other.pointer != pointer  # the view still needs it
    del view
    again = memory.empty((900,), np.float32)
    assert again.pointer == pointer
    assert memory.empty((10,), np.float32).pointer not in (pointer, 0)
    assert len(device.called("cudaMalloc")) == 3


def test_small_arrays_do_not_take_large_memory(memory: Memory):
    large = memory.empty((MB,), np.uint8)
    pointer = large.pointer
    del large
    assert memory.empty((MB // 4,), np.uint8).pointer != pointer
    assert memory.empty((MB // 2,), np.uint8).pointer == pointer


def test_unused_memory_is_freed_before_giving_up(device: CudaStandin, memory: Memory):
    device.total_memory = 8 * MB
    held = memory.empty((2 * MB,), np.uint8)
    dropped = memory.empty((4 * MB,), np.uint8)
    del dropped
    large = memory.empty((6 * MB,), np.uint8)  # fits only without the dropped 4 MB
    assert memory.allocated == held.nbytes + large.nbytes == 8 * MB
    with pytest.raises(InputError, match=r"1\.0 MB do not fit: 0\.0 MB of 8\.4 MB are") as error:
        memory.empty((MB,), np.uint8)
    assert "this session holds 8.4 MB" in str(error.value)
    assert "--max-frames" in str(error.value)


def test_closing_frees_everything_at_once(device: CudaStandin):
    memory = Memory(Stream())
    array, pinned = memory.zeros((100,), np.float32), memory.pinned(1000)
    pinned.view(8, (3,), np.dtype(np.int64))[...] = 1
    assert device.live_bytes > 0
    assert device.live_host_bytes >= 1000
    memory.close()
    memory.close()
    device.assert_clean()
    del array


def test_pinned_memory_can_be_given_back(device: CudaStandin, memory: Memory):
    memory.unpin(memory.pinned(1000))
    assert device.live_host_bytes == 0


def test_captured_work_runs_when_it_is_launched(memory: Memory):
    source, target = memory.zeros((4,), np.float32), memory.zeros((4,), np.float32)
    memory.stream.synchronize()
    with memory.stream.capture() as graph:
        target.copy_from(source)
    source.copy_from_host(np.ones(4, np.float32))
    assert not target.to_host().any()
    graph.launch(memory.stream)
    assert target.to_host().all()
    graph.close()
    graph.close()


def test_what_cannot_be_captured_is_named(memory: Memory):
    array = memory.zeros((4,), np.float32)
    memory.stream.synchronize()
    with (
        pytest.raises(cuda.CudaError, match="cudaErrorStreamCapture"),
        memory.stream.capture(),
    ):
        array.to_host()


def test_an_error_while_capturing_leaves_the_stream_usable(memory: Memory):
    with pytest.raises(KeyError), memory.stream.capture():
        raise KeyError
    assert not memory.zeros((3,), np.float32).to_host().any()


def test_the_device_and_its_driver(monkeypatch: pytest.MonkeyPatch):
    install_cuda(monkeypatch, compute_capability=(8, 9), driver=12060)
    assert cuda.compute_capability() == (8, 9)
    assert cuda.driver_version() == "12.6"


@pytest.mark.parametrize(
    ("knobs", "text"),
    [({"driver": 0}, "cudaErrorInsufficientDriver"), ({"devices": 0}, "no usable|of 0")],
)
def test_machines_without_a_gpu(monkeypatch: pytest.MonkeyPatch, knobs: Any, text: str):
    install_cuda(monkeypatch, **knobs)
    for use in (Stream, cuda.compute_capability):
        with pytest.raises(MissingDependencyError, match=text) as error:
            use()
        assert "nvidia-smi" in str(error.value)
    if knobs == {"driver": 0}:
        with pytest.raises(MissingDependencyError, match="no CUDA driver"):
            cuda.driver_version()


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    install_cuda(monkeypatch, devices=2)
    with pytest.raises(MissingDependencyError, match="cuda:2 of 2") as error:
        Stream(2)
    assert "cuda:0 to cuda:1" in str(error.value)


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "cuda")
    with pytest.raises(MissingDependencyError, match="cuda-python is not installed") as error:
        cuda.driver_version()
    assert "pip install" in str(error.value)


def test_a_driver_library_that_does_not_load(device: CudaStandin, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaGetDeviceCount", fail)
    with pytest.raises(MissingDependencyError, match=r"libcuda\.so\.1"):
        cuda.compute_capability()


def test_other_errors_carry_cudas_name(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    bindings = sys.modules["cuda.bindings.runtime"]
    with monkeypatch.context() as patched:
        fault = bindings.cudaError_t.cudaErrorIllegalAddress
        patched.setattr(bindings, "cudaMemsetAsync", lambda *_: (fault,))
        with pytest.raises(cuda.CudaError, match=r"Memset\w+ failed: .*IllegalAddress") as error:
            memory.zeros((4,), np.float32)
    assert error.value.name == "cudaErrorIllegalAddress"


class Foreign:
    """An array of another library, by way of `__cuda_array_interface__`."""

    def __init__(self, array: DeviceArray, **changes: Any) -> None:
        interface = {**array.__cuda_array_interface__, **changes}
        self.__cuda_array_interface__ = {k: v for k, v in interface.items() if v != "drop"}


def test_arrays_of_other_libraries_are_used_where_they_lie(memory: Memory):
    theirs = memory.zeros((2, 3), np.uint8)
    theirs.copy_from_host(np.arange(6, dtype=np.uint8).reshape(2, 3))
    for given in (
        Foreign(theirs),
        Foreign(theirs, stream="drop"),
        Foreign(theirs, strides=(3, 1)),
        DlpackArray(theirs),
        DlpackArray(theirs, strides=(3, 1)),
    ):
        assert cuda.is_on_device(given)
        array = cuda.from_device(given, memory.stream)
        assert (array.pointer, array.shape) == (theirs.pointer, (2, 3))
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array.to_host(), theirs.to_host())


def test_which_arrays_are_on_a_device(memory: Memory):
    assert not cuda.is_on_device(np.zeros(3))
    assert not cuda.is_on_device([1, 2])
    assert cuda.is_on_device(memory.zeros((3,), np.uint8))


def test_arrays_of_other_libraries_that_cannot_be_used(memory: Memory):
    theirs = memory.zeros((2, 3), np.uint8)
    for given, text in (
        (Foreign(theirs, strides=(1, 2)), "C-contiguous"),
        (Foreign(theirs, mask=theirs), "mask"),
        (DlpackArray(theirs, strides=(1, 2)), "C-contiguous"),
        (DlpackArray(theirs, device_id=1), "device 1"),
        (DlpackArray(theirs, lanes=4), "type"),
        (DlpackArray(theirs, code=4), "type"),
    ):
        with pytest.raises(InputError, match=text):
            cuda.from_device(given, memory.stream)


def test_arrays_of_another_gpu_are_refused(monkeypatch: pytest.MonkeyPatch):
    install_cuda(monkeypatch, devices=2)
    theirs, ours = Memory(Stream(1)), Stream(0)
    theirs.stream.activate()
    array, empty = theirs.zeros((2, 3), np.uint8), theirs.zeros((0, 3), np.uint8)
    with pytest.raises(InputError, match="the array lies on device 1") as error:
        cuda.from_device(Foreign(array), ours)
    assert "cuda:0" in str(error.value)
    assert len(cuda.from_device(Foreign(empty, data=(0, False)), ours)) == 0
    theirs.close()
    ours.close()


class DlpackArray:
    """An array of another library, by way of DLPack; counts what is freed."""

    freed = 0

    class Managed(ctypes.Structure):
        _fields_ = (
            ("tensor", cuda._DLTensor),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        )

    def __init__(self, array: DeviceArray, strides: Any = None, **changes: int) -> None:
        self.array = array
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        steps = (ctypes.c_int64 * array.ndim)(*(strides or ()))
        self.kept = shape, steps
        tensor = cuda._DLTensor(
            array.pointer - 64, 2, 0, array.ndim, 1, 8, 1,
            shape, steps if strides else None, 64,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(tensor, name, value)
        self.managed = self.Managed(tensor, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream == self.array.stream.handle
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self.managed), b"dltensor", None)
