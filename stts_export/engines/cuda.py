"""CUDA through cuda-python: a stream, memory of a GPU, and arrays in it; every status is checked.

The package `cuda.bindings` is imported with the first call, not with this module.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stts_export.errors import InputError, MissingDependencyError, SttsError
from stts_export.files import readable_size

ALIGNMENT = 256
"""Bytes; what TensorRT asks of a tensor's address, and what cudaMalloc gives."""

_INSTALL = "pip install 'cuda-python>=12.6.2' (a version not newer than the driver's CUDA)"
_NO_DEVICE = (
    "cudaErrorNoDevice",
    "cudaErrorInsufficientDriver",
    "cudaErrorStubLibrary",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorSystemNotReady",
    "cudaErrorCompatNotSupportedOnDevice",
    "cudaErrorDevicesUnavailable",
    "cudaErrorOperatingSystem",
)
_MEMORY = "cudaErrorMemoryAllocation"
_DRIVER = "check `nvidia-smi` (Jetson: `tegrastats`); install or update the NVIDIA driver"


class CudaError(SttsError):
    """A CUDA call failed on a device that is there.

    Args:
        call: name of the CUDA function.
        name: name of the CUDA error, as "cudaErrorIllegalAddress".
        text: CUDA's description of it.
    """

    def __init__(self, call: str, name: str, text: str) -> None:
        self.name = name
        fix = "end other programs on the GPU, or pass less at a time" if name == _MEMORY else None
        super().__init__(f"{call} failed: {name} ({text})", where="CUDA", fix=fix)


def runtime() -> ModuleType:
    """Return `cuda.bindings.runtime`.

    Raises:
        MissingDependencyError: cuda-python is not installed, or is older than 12.6.2.
    """
    try:
        module = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            f"cuda-python is not installed or too old ({error})", where="CUDA", fix=_INSTALL
        ) from None
    return module


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime.

    Returns:
        Its result: None, one value, or a tuple.

    Raises:
        MissingDependencyError: no driver or no device.
        CudaError: anything else went wrong.
    """
    cuda = runtime()
    try:
        status, *values = getattr(cuda, name)(*arguments)
    except RuntimeError as error:  # how cuda-python says that it cannot load the driver's library
        raise MissingDependencyError(
            f"the CUDA driver cannot be loaded ({error})", where="CUDA", fix=_DRIVER
        ) from None
    if status != cuda.cudaError_t.cudaSuccess:
        raise _error(cuda, name, status)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(cuda: Any, call_name: str, status: Any) -> SttsError:
    name = _text(cuda.cudaGetErrorName(status), str(status))
    text = _text(cuda.cudaGetErrorString(status), "no description")
    if name in _NO_DEVICE:
        return MissingDependencyError(
            f"no usable NVIDIA GPU: {name} ({text})", where="CUDA", fix=_DRIVER
        )
    return CudaError(call_name, name, text)


def _text(answer: Any, otherwise: str) -> str:
    status, value = answer
    return value.decode() if int(status) == 0 and value else otherwise


def check_device(device: int) -> None:
    """Refuse a device that is not there.

    Raises:
        MissingDependencyError: no driver, no device, or fewer than this one.
    """
    count = int(call("cudaGetDeviceCount"))
    if not 0 <= device < count:
        raise MissingDependencyError(
            f"device cuda:{device} of {count}",
            where="CUDA",
            allowed=f"cuda:0 to cuda:{count - 1}" if count else None,
            fix="choose another --device" if count else _DRIVER,
        )


def compute_capability(device: int = 0) -> tuple[int, int]:
    """Major and minor number of a GPU's architecture: (8, 7) is Orin.

    Raises:
        MissingDependencyError: no driver, or no such device.
    """
    check_device(device)
    attributes = runtime().cudaDeviceAttr
    major = call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, device)
    minor = call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, device)
    return int(major), int(minor)


def driver_version() -> str:
    """The newest CUDA that the driver supports, as "12.6".

    Raises:
        MissingDependencyError: no driver.
    """
    number = int(call("cudaDriverGetVersion"))
    if number == 0:
        raise MissingDependencyError("no CUDA driver is installed", where="CUDA", fix=_DRIVER)
    return f"{number // 1000}.{number % 1000 // 10}"


class Stream:
    """A stream of a device; work on it runs in order.

    Args:
        device: number of the GPU.

    Raises:
        MissingDependencyError: no driver, or no such device.
    """

    def __init__(self, device: int = 0) -> None:
        check_device(device)
        self.device = device
        self.activate()
        self._stream = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def activate(self) -> None:
        """Make the device current in the calling thread."""
        call("cudaSetDevice", self.device)

    def synchronize(self) -> None:
        """Wait until all work is done."""
        call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Wait for the work, then destroy the stream; further calls do nothing."""
        if self.handle:
            with suppress(CudaError):  # a fault in a kernel was reported where it was noticed
                self.synchronize()
            with suppress(CudaError):
                call("cudaStreamDestroy", self.handle)
            self.handle = 0

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is enqueued within the block instead of running it.

        Yields:
            A graph, which can be launched after the block.

        Raises:
            CudaError: something in the block cannot be captured.
        """
        graph = Graph()
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)
        try:
            yield graph
        except BaseException:
            with suppress(CudaError):
                call("cudaGraphDestroy", call("cudaStreamEndCapture", self.handle))
            raise
        captured = call("cudaStreamEndCapture", self.handle)
        try:
            graph.executable = call("cudaGraphInstantiate", captured, 0)
        finally:
            call("cudaGraphDestroy", captured)


class Graph:
    """Work that was captured from a stream."""

    def __init__(self) -> None:
        self.executable: Any = None

    def launch(self, stream: Stream) -> None:
        """Enqueue the captured work."""
        call("cudaGraphLaunch", self.executable, stream.handle)

    def close(self) -> None:
        """Destroy it; further calls do nothing."""
        if self.executable is not None:
            call("cudaGraphExecDestroy", self.executable)
            self.executable = None


class Event:
    """A point in a stream's work."""

    def __init__(self) -> None:
        self._event = call("cudaEventCreateWithFlags", runtime().cudaEventDisableTiming)

    def record(self, stream: Stream) -> None:
        """Mark the end of what is enqueued now."""
        call("cudaEventRecord", self._event, stream.handle)

    def wait(self) -> None:
        """Block the host until the marked work is done."""
        call("cudaEventSynchronize", self._event)

    def close(self) -> None:
        """Destroy it."""
        call("cudaEventDestroy", self._event)


class Block:
    """Device memory of a pool; goes back to it with the last array that uses it."""

    def __init__(self, memory: Memory, pointer: int, size: int) -> None:
        self._memory = memory
        self.pointer = pointer
        self.size = size

    def __del__(self) -> None:
        self._memory.give_back(self.pointer, self.size)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array in the memory of a GPU."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: Stream
    """Orders the work on it."""
    owner: object
    """Keeps the memory alive."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the protocol."""
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream.handle,
        }

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """View of consecutive rows of the first axis."""
        if not isinstance(rows, slice):
            raise TypeError(f"rows are taken by a slice, not by {rows!r}")
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"step {step}: rows must be consecutive")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (max(0, stop - start), *self.shape[1:])
        pointer = self.pointer + start * row_bytes
        return DeviceArray(pointer, shape, self.dtype, self.stream, self.owner)

    def reshape(self, *shape: int) -> DeviceArray:
        """View of another shape; one side may be -1."""
        known = math.prod(side for side in shape if side != -1)
        if shape.count(-1) == 1 and known and self.size % known == 0:
            shape = tuple(self.size // known if side == -1 else side for side in shape)
        if -1 in shape or math.prod(shape) != self.size:
            raise ValueError(f"{self.shape} cannot be viewed as {shape}")
        return DeviceArray(self.pointer, shape, self.dtype, self.stream, self.owner)

    def copy_from_host(self, array: NDArray[Any]) -> None:
        """Copy an array of the same shape and type, and wait for that."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"{array.dtype} {array.shape} does not fit into {self.dtype} {self.shape}"
            )
        array = np.ascontiguousarray(array)
        self._copy(self.pointer, array.ctypes.data, "cudaMemcpyHostToDevice")
        self.stream.synchronize()  # a contiguous copy would be gone with this call

    def copy_from(self, array: DeviceArray) -> None:
        """Enqueue a copy of an array of the same size and type."""
        if array.size != self.size or array.dtype != self.dtype:
            raise ValueError(
                f"{array.dtype} {array.shape} does not fit into {self.dtype} {self.shape}"
            )
        self._copy(self.pointer, array.pointer, "cudaMemcpyDeviceToDevice")

    def to_host(self) -> NDArray[Any]:
        """Wait for the array and return a copy in host memory."""
        host = np.empty(self.shape, self.dtype)
        self._copy(host.ctypes.data, self.pointer, "cudaMemcpyDeviceToHost")
        self.stream.synchronize()
        return host

    def zero(self) -> None:
        """Enqueue filling it with zeros."""
        if self.nbytes:
            call("cudaMemsetAsync", self.pointer, 0, self.nbytes, self.stream.handle)

    def _copy(self, target: int, source: int, kind: str) -> None:
        copy(target, source, self.nbytes, kind, self.stream)


def copy(target: int, source: int, nbytes: int, kind: str, stream: Stream) -> None:
    """Enqueue a copy.

    Args:
        target: address.
        source: address.
        nbytes: 0 enqueues nothing.
        kind: name in `cudaMemcpyKind`.
        stream: orders the copy.
    """
    if nbytes:
        kinds = runtime().cudaMemcpyKind
        call("cudaMemcpyAsync", target, source, nbytes, getattr(kinds, kind), stream.handle)


class Memory:
    """Memory that a session uses on a GPU: arrays that are dropped are reused, not freed.

    All arrays belong to one stream, so memory may be handed on while work on it is still enqueued.

    Args:
        stream: where all work on the arrays is enqueued.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._blocks: dict[int, int] = {}
        """Everything allocated: pointer -> bytes."""
        self._free: list[tuple[int, int]] = []
        """(bytes, pointer) of what no array uses."""
        self._pinned: list[int] = []

    @property
    def allocated(self) -> int:
        """Bytes of device memory held, in use or not."""
        return sum(self._blocks.values())

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Array with undefined content.

        Raises:
            InputError: the GPU has too little memory.
        """
        kind = np.dtype(dtype)
        block = self._take(max(1, math.prod(shape) * kind.itemsize))
        return DeviceArray(block.pointer, tuple(shape), kind, self.stream, block)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Array of zeros.

        Raises:
            InputError: the GPU has too little memory.
        """
        array = self.empty(shape, dtype)
        array.zero()
        return array

    def _take(self, nbytes: int) -> Block:
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        fitting = [entry for entry in self._free if size <= entry[0] <= 2 * size]
        if fitting:
            best = min(fitting)
            self._free.remove(best)
            return Block(self, best[1], best[0])
        try:
            pointer = int(call("cudaMalloc", size))
        except CudaError as error:
            if error.name != _MEMORY:
                raise
            self._free_unused()
            pointer = self._last_try(size)
        self._blocks[pointer] = size
        return Block(self, pointer, size)

    def _last_try(self, size: int) -> int:
        try:
            return int(call("cudaMalloc", size))
        except CudaError as error:
            if error.name != _MEMORY:
                raise
        free, total = call("cudaMemGetInfo")
        raise InputError(
            f"{readable_size(size)} do not fit: {readable_size(int(free))} of "
            f"{readable_size(int(total))} are free, this session holds "
            f"{readable_size(self.allocated)}",
            where=f"memory of cuda:{self.stream.device}",
            fix="pass fewer frames or raise the prune ratio, end other programs on the GPU, or "
            "rebuild with a smaller --max-frames",
        ) from None

    def _free_unused(self) -> None:
        self.stream.synchronize()  # cudaFree would wait as well
        for _, pointer in self._free:
            call("cudaFree", pointer)
            del self._blocks[pointer]
        self._free.clear()

    def give_back(self, pointer: int, size: int) -> None:
        """Take memory back that no array uses any more."""
        if pointer in self._blocks:  # not after close
            self._free.append((size, pointer))

    def pinned(self, nbytes: int) -> PinnedBuffer:
        """Host memory that the GPU copies from and to without a detour; lasts until `close`.

        Raises:
            InputError: the host has too little memory that can be pinned.
        """
        try:
            pointer = int(call("cudaMallocHost", nbytes))
        except CudaError as error:
            if error.name != _MEMORY:
                raise
            raise InputError(
                f"{readable_size(nbytes)} of host memory cannot be pinned",
                where="memory of the host",
                fix="end other programs, or raise the limit of `ulimit -l`",
            ) from None
        self._pinned.append(pointer)
        raw = (ctypes.c_uint8 * nbytes).from_address(pointer)
        return PinnedBuffer(pointer, np.ctypeslib.as_array(raw))

    def unpin(self, buffer: PinnedBuffer) -> None:
        """Free pinned memory; the caller has waited for copies that use it."""
        self._pinned.remove(buffer.pointer)
        call("cudaFreeHost", buffer.pointer)

    def close(self) -> None:
        """Wait for the stream, free everything and destroy the stream."""
        if not self.stream.handle:
            return
        self.stream.activate()
        with suppress(CudaError):
            self.stream.synchronize()
        blocks, self._blocks = self._blocks, {}
        pinned, self._pinned = self._pinned, []
        self._free.clear()
        # After a fault in a kernel CUDA refuses to free; the fault itself was reported before.
        for pointer in blocks:
            with suppress(CudaError):
                call("cudaFree", pointer)
        for pointer in pinned:
            with suppress(CudaError):
                call("cudaFreeHost", pointer)
        self.stream.close()


class PinnedBuffer(NamedTuple):
    """Page-locked host memory."""

    pointer: int
    data: NDArray[np.uint8]

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Array that lies `offset` bytes from the start."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self.data[offset : offset + nbytes].view(dtype).reshape(shape)


_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # kDLInt, kDLUInt, kDLFloat, kDLBool


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def is_on_device(values: object) -> bool:
    """Whether an object says that its data lies in the memory of an NVIDIA GPU."""
    where = getattr(values, "__dlpack_device__", None)
    if where is not None:
        return int(where()[0]) in _DLPACK_CUDA
    return hasattr(values, "__cuda_array_interface__")


def from_device(values: Any, stream: Stream) -> DeviceArray:
    """Use an array of another library where it lies.

    Args:
        values: has `__dlpack__` or `__cuda_array_interface__`; its own stream's work on the data
            comes before what is enqueued on `stream` from now on.
        stream: where the array will be used.

    Raises:
        InputError: not contiguous, of another device, or of a type that NumPy does not have.
    """
    stream.activate()
    if hasattr(values, "__dlpack__"):
        return _from_dlpack(values, stream)
    return _from_interface(values, stream)


def _from_dlpack(values: Any, stream: Stream) -> DeviceArray:
    capsule = values.__dlpack__(stream=stream.handle)
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(get_pointer(capsule, b"dltensor"))
    if tensor.device_type not in _DLPACK_CUDA or tensor.device_id != stream.device:
        raise InputError(
            f"the array lies on device {tensor.device_id} of kind {tensor.device_type}",
            where="frames",
            allowed=f"the session's device, cuda:{stream.device}",
        )
    if tensor.lanes != 1 or tensor.code not in _DLPACK_KINDS:
        raise InputError(
            f"the array's DLPack type is ({tensor.code}, {tensor.bits}, {tensor.lanes})",
            where="frames",
            allowed="a type that NumPy has",
        )
    dtype = np.dtype(f"{_DLPACK_KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        strides = [step * dtype.itemsize for step in tensor.strides[: tensor.ndim]]
        _check_strides(shape, strides, dtype)
    # A capsule that nobody consumed frees the tensor when it is collected.
    pointer = (tensor.data or 0) + tensor.byte_offset
    return DeviceArray(pointer, shape, dtype, stream, capsule)


def _from_interface(values: Any, stream: Stream) -> DeviceArray:
    interface: Mapping[str, Any] = values.__cuda_array_interface__
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if interface.get("strides") is not None:
        _check_strides(shape, interface["strides"], dtype)
    if interface.get("mask") is not None:
        raise InputError("a masked array", where="frames", allowed="an array without a mask")
    pointer = int(interface["data"][0])
    if pointer:  # of an empty array it may be 0
        device = int(call("cudaPointerGetAttributes", pointer).device)
        if device != stream.device:
            raise InputError(
                f"the array lies on device {device}",
                where="frames",
                allowed=f"the session's device, cuda:{stream.device}",
            )
    writer = interface.get("stream")
    if writer is not None:
        call("cudaStreamSynchronize", int(writer))
    return DeviceArray(pointer, shape, dtype, stream, values)


def _check_strides(shape: tuple[int, ...], strides: Any, dtype: np.dtype[Any]) -> None:
    """Refuse gaps; sides of length 1 may have any stride."""
    step = dtype.itemsize
    for side, stride in zip(reversed(shape), reversed(tuple(strides)), strict=True):
        if side > 1 and stride != step:
            raise InputError(
                f"an array of shape {shape} and strides {tuple(strides)} bytes",
                where="frames",
                allowed="a C-contiguous array",
                fix="make it contiguous first, as with .contiguous() in PyTorch",
            )
        step *= side
