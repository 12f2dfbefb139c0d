"""A stand-in for `cuda.bindings.runtime` whose device memory is host memory.

Names, arguments and enums are those of `api/cuda-*.json`; anything else is an AttributeError or a
TypeError. What the real runtime reports, the stand-in reports by the same status; what on a device
would read or write memory that is not yours raises `MisuseError` and stays in `violations`.

Streams are lazy: work runs when something waits for it (a synchronisation, a free, a pageable copy
to the host), so a result that is read too early is not there yet.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import inspect
import itertools
import json
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

API = Path(__file__).parent / "api"
ALIGNMENT = 256
GUARD = 256
"""Bytes before and after an allocation that nobody may write."""
GUARD_BYTE = 0xA5
FRESH_BYTE = 0xCD
"""New memory is not zero."""


class MisuseError(AssertionError):
    """What would corrupt memory, or be undefined, on a device."""


@dataclass
class Allocation:
    """Live memory; `device` tells a device's from pinned host memory, `ordinal` whose it is."""

    address: int
    size: int
    device: bool
    buffer: Any
    ordinal: int

    @property
    def end(self) -> int:
        return self.address + self.size

    def guards(self) -> Iterator[tuple[int, bytes]]:
        yield self.address - GUARD, ctypes.string_at(self.address - GUARD, GUARD)
        yield self.end, ctypes.string_at(self.end, GUARD)


@dataclass
class Stream:
    """Work in order; `captured` is a list while a graph is being captured."""

    flags: int = 0
    pending: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None
    capture_broken: bool = False


@dataclass
class Event:
    flags: int
    stream: Stream | None = None
    position: Callable[[], None] | None = None


@dataclass
class Graph:
    work: list[Callable[[], None]]


class Handle:
    """Base of cudaStream_t and the like: an integer in a class of its own."""

    def __init__(self, init_value: int = 0) -> None:
        self._value = int(init_value)

    def __int__(self) -> int:
        return self._value

    def __index__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and int(other) == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def getPtr(self) -> int:  # noqa: N802
        return id(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"


class StatusError(Exception):
    """Carries a cudaError_t out of an implementation."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@functools.cache
def load_api(version: str) -> dict[str, Any]:
    """Names that a version has (`13.4`)."""
    api: dict[str, Any] = json.loads((API / f"cuda-{version}.json").read_text())
    return api


@functools.cache
def make_types(version: str) -> tuple[dict[str, Any], dict[str, type[Handle]]]:
    """Enums and handle classes of a version."""
    api = load_api(version)
    enums = {name: enum.IntEnum(name, members) for name, members in api["enums"].items()}
    handles = {name: type(name, (Handle,), {}) for name in api["handles"]}
    for kind in (*enums.values(), *handles.values()):
        kind.__module__ = "cuda.bindings.runtime"
    return enums, handles


class CudaStandin:
    """The device and its memory; `make_cuda` puts a module before it.

    Args:
        version: of cuda-python, "12.6" or "13.4".
        compute_capability: (major, minor) of the device.
        total_memory: bytes; an allocation beyond them is cudaErrorMemoryAllocation.
        driver: version as CUDA counts (13000), 0 for a machine without a driver.
        devices: number of devices.
        name: of the device.
        capturable: False makes captures fail, as with work that cannot be captured.
    """

    def __init__(
        self,
        version: str = "13.4",
        *,
        compute_capability: tuple[int, int] = (8, 7),
        total_memory: int = 1 << 30,
        driver: int = 13000,
        devices: int = 1,
        name: str = "Stand-in GPU",
        capturable: bool = True,
    ) -> None:
        self.api = load_api(version)
        self.compute_capability = compute_capability
        self.total_memory = total_memory
        self.driver = driver
        self.devices = devices
        self.name = name
        self.capturable = capturable
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.violations: list[str] = []
        self.peak_bytes = 0
        self.enums, self.handles = make_types(version)
        self._allocations: dict[int, Allocation] = {}
        self._handles = itertools.count(0x5000_0000, 0x10)
        self._legacy = Stream()
        self._objects: dict[int, Any] = {}
        self._local = threading.local()
        self._last_error: str | None = None

    # -- for tests -----------------------------------------------------------------------------

    @property
    def sm(self) -> str:
        """E.g. "sm87"."""
        major, minor = self.compute_capability
        return f"sm{major}{minor}"

    @property
    def live_bytes(self) -> int:
        """Device memory that is allocated now."""
        return sum(a.size for a in self._allocations.values() if a.device)

    @property
    def live_host_bytes(self) -> int:
        """Pinned host memory that is allocated now."""
        return sum(a.size for a in self._allocations.values() if not a.device)

    @property
    def live_objects(self) -> list[str]:
        """Streams, events and graphs that nobody destroyed."""
        return [type(value).__name__ for value in self._objects.values()]

    def called(self, function: str) -> list[dict[str, Any]]:
        """Arguments of every call of a function."""
        return [arguments for name, arguments in self.calls if name == function]

    def assert_clean(self) -> None:
        """Everything was freed and nothing was misused."""
        self.assert_no_violation()
        assert self.live_bytes == 0, f"{self.live_bytes} bytes of device memory leaked"
        assert self.live_host_bytes == 0, f"{self.live_host_bytes} bytes of pinned memory leaked"
        assert not self.live_objects, f"not destroyed: {self.live_objects}"

    def assert_no_violation(self) -> None:
        """Nothing was misused, and no guard zone of a live allocation was written."""
        for allocation in self._allocations.values():
            self._check_guards(allocation)
        assert not self.violations, self.violations

    def allocation_at(self, address: int) -> Allocation | None:
        """Live allocation that holds an address."""
        for allocation in self._allocations.values():
            inside = allocation.address <= address < allocation.end
            if inside or address == allocation.address:
                return allocation
        return None

    def check_device_range(self, address: int, size: int, what: str) -> None:
        """Misuse unless `size` bytes from an address lie inside one live device allocation."""
        allocation = self.allocation_at(address)
        if allocation is None or not allocation.device:
            kind = "no live device memory" if allocation is None else "pinned host memory"
            raise self.misuse(f"{what}: address {address:#x} is {kind}")
        if address + size > allocation.end:
            raise self.misuse(
                f"{what}: {size} bytes at {address:#x} overrun an allocation of"
                f" {allocation.size} bytes by {address + size - allocation.end}"
            )

    def misuse(self, message: str) -> MisuseError:
        """Note a violation; raise what this returns."""
        self.violations.append(message)
        return MisuseError(message)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Put work of another library (an engine) on a stream."""
        self._enqueue(self._stream(stream), work)

    def break_capture(self, stream: int) -> None:
        """Make the capture of a stream end in an error."""
        self._stream(stream).capture_broken = True

    def is_capturing(self, stream: int) -> bool:
        """Whether work on a stream is being captured into a graph."""
        return self._stream(stream).captured is not None

    # -- plumbing ------------------------------------------------------------------------------

    def _check_guards(self, allocation: Allocation) -> None:
        for address, found in allocation.guards():
            if found != bytes([GUARD_BYTE]) * GUARD:
                raise self.misuse(
                    f"memory around {allocation.size} bytes at {allocation.address:#x} was"
                    f" written (near {address:#x})"
                )

    def _pointer(self, value: Any, name: str) -> int:
        if value is None:
            return 0
        if type(value) is int:
            return value
        if isinstance(value, (bytes, bytearray, memoryview)) or type(value).__name__ == "ndarray":
            if isinstance(value, bytes):
                return ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value or 0
            if hasattr(value, "ctypes"):
                return int(value.ctypes.data)
            return ctypes.addressof((ctypes.c_char * len(value)).from_buffer(value))
        raise TypeError(
            f"Provided pointer is of type {type(value)} but expected Type"
            f" (NULL, int, buffer): {name}"
        )

    def _stream(self, stream: Any) -> Stream:
        if stream is None:
            return self._legacy
        if not isinstance(stream, (int, self.handles["cudaStream_t"])):
            raise TypeError(f"stream is {type(stream)}, not an int or a cudaStream_t")
        if int(stream) in (0, 1, 2):
            return self._legacy
        found = self._objects.get(int(stream))
        if not isinstance(found, Stream):
            raise self.misuse(f"{int(stream):#x} is no live stream")
        return found

    def _object(self, handle: Any, kind: type[Any], handle_type: str) -> Any:
        if not isinstance(handle, (int, self.handles[handle_type])):
            raise TypeError(f"{type(handle)} is not a {handle_type}")
        found = self._objects.get(int(handle))
        if not isinstance(found, kind):
            raise self.misuse(f"{int(handle):#x} is no live {handle_type}")
        return found

    def _new(self, value: Any, handle_type: str) -> Handle:
        number = next(self._handles)
        self._objects[number] = value
        return self.handles[handle_type](number)

    def _enqueue(self, stream: Stream, work: Callable[[], None]) -> None:
        if stream.captured is not None:
            stream.captured.append(work)
            return
        if stream is self._legacy:
            self._drain_all()
        stream.pending.append(work)

    def _drain(self, stream: Stream) -> None:
        while stream.pending:
            stream.pending.pop(0)()

    def _drain_all(self) -> None:
        for stream in [self._legacy, *self._objects.values()]:
            if isinstance(stream, Stream):
                self._drain(stream)

    def _forbid_capture(self, stream: Stream | None = None) -> None:
        """A call that would wait breaks captures."""
        streams = [s for s in self._objects.values() if isinstance(s, Stream)]
        for capturing in [stream] if stream else streams:
            if capturing.captured is not None:
                capturing.capture_broken = True
                raise StatusError("cudaErrorStreamCaptureUnsupported")

    def _need_device(self) -> None:
        if not self.driver:
            raise StatusError("cudaErrorInsufficientDriver")
        if not self.devices:
            raise StatusError("cudaErrorNoDevice")

    def allocate(self, size: int, device: bool = True) -> int:
        """Memory between guard zones; `device` or pinned."""
        if type(size) is not int:
            raise TypeError("an integer is required")
        if size < 0:
            raise OverflowError("can't convert negative value to size_t")
        if size == 0:
            return 0
        if device and self.live_bytes + size > self.total_memory:
            raise StatusError("cudaErrorMemoryAllocation")
        buffer = (ctypes.c_ubyte * (size + 2 * GUARD + ALIGNMENT))()
        start = ctypes.addressof(buffer) + GUARD
        address = -(-start // ALIGNMENT) * ALIGNMENT
        ctypes.memset(address - GUARD, GUARD_BYTE, GUARD)
        ctypes.memset(address + size, GUARD_BYTE, GUARD)
        ctypes.memset(address, FRESH_BYTE, size)
        self._allocations[address] = Allocation(address, size, device, buffer, self._current)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return address

    def release(self, pointer: Any, device: bool = True) -> None:
        """Free what `allocate` gave."""
        address = self._pointer(pointer, "devPtr")
        if address == 0:
            return
        allocation = self._allocations.get(address)
        if allocation is None or allocation.device is not device:
            self.violations.append(f"{address:#x} was freed but is not allocated")
            raise StatusError("cudaErrorInvalidValue")
        self._check_guards(allocation)
        del self._allocations[address]

    def _copy(self, dst: Any, src: Any, count: int, kind: int) -> tuple[int, int]:
        names = self.enums["cudaMemcpyKind"]
        if not isinstance(kind, names):
            raise TypeError(f"kind is {type(kind)}, not a cudaMemcpyKind")
        target, source = self._pointer(dst, "dst"), self._pointer(src, "src")
        to_device = kind in (names.cudaMemcpyHostToDevice, names.cudaMemcpyDeviceToDevice)
        from_device = kind in (names.cudaMemcpyDeviceToHost, names.cudaMemcpyDeviceToDevice)
        sides = (("to", target, to_device), ("from", source, from_device))
        for side, address, is_device in sides if count else ():
            found = self.allocation_at(address)
            if kind == names.cudaMemcpyDefault:
                is_device = found is not None and found.device
            if is_device:
                self.check_device_range(address, count, f"copy {side} the device")
            elif found is not None and found.device:
                raise self.misuse(f"copy {side} the host: {address:#x} is device memory")
            elif found is not None and address + count > found.end:
                raise self.misuse(f"copy {side} pinned memory: {count} bytes overrun it")
        return target, source

    def _is_pageable(self, address: int) -> bool:
        return self.allocation_at(address) is None

    # -- functions of the module ---------------------------------------------------------------

    def cudaDriverGetVersion(self) -> int:  # noqa: N802
        return self.driver

    def cudaRuntimeGetVersion(self) -> int:  # noqa: N802
        major, minor = self.api["version"].split(".")[:2]
        return int(major) * 1000 + int(minor) * 10

    def getLocalRuntimeVersion(self) -> int:  # noqa: N802
        return self.cudaRuntimeGetVersion()

    def cudaGetDeviceCount(self) -> int:  # noqa: N802
        self._need_device()
        return self.devices

    def cudaGetErrorName(self, error: Any) -> bytes:  # noqa: N802
        return str(self._error(error).name).encode()

    def cudaGetErrorString(self, error: Any) -> bytes:  # noqa: N802
        return f"stand-in text of {self._error(error).name}".encode()

    def _error(self, error: Any) -> Any:
        if not isinstance(error, self.enums["cudaError_t"]):
            raise TypeError(f"error is {type(error)}, not a cudaError_t")
        return error

    def cudaGetLastError(self) -> None:  # noqa: N802
        self._raise_last_error(clear=True)

    def cudaPeekAtLastError(self) -> None:  # noqa: N802
        self._raise_last_error(clear=False)

    def _raise_last_error(self, *, clear: bool) -> None:
        name = self._last_error
        if clear:
            self._last_error = None
        if name:
            raise StatusError(name)

    def _check_ordinal(self, device: int) -> None:
        self._need_device()
        if not 0 <= device < self.devices:
            raise StatusError("cudaErrorInvalidDevice")

    def cudaSetDevice(self, device: int) -> None:  # noqa: N802
        self._check_ordinal(device)
        self._local.device = device

    def cudaGetDevice(self) -> int:  # noqa: N802
        self._need_device()
        return self._current

    @property
    def _current(self) -> int:
        device: int = getattr(self._local, "device", 0)
        return device

    def cudaFree(self, devPtr: Any) -> None:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        self._drain_all()
        self.release(devPtr, device=True)

    def cudaMalloc(self, size: int) -> int:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        return self.allocate(size, device=True)

    def cudaMallocAsync(self, size: int, hStream: Any) -> int:  # noqa: N802
        self._need_device()
        self._stream(hStream)
        return self.allocate(size, device=True)

    def cudaFreeAsync(self, devPtr: Any, hStream: Any) -> None:  # noqa: N802
        self._drain(self._stream(hStream))
        self.release(devPtr, device=True)

    def cudaMallocHost(self, size: int) -> int:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        return self.allocate(size, device=False)

    def cudaHostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        return self.allocate(size, device=False)

    def cudaFreeHost(self, ptr: Any) -> None:  # noqa: N802
        self._forbid_capture()
        self._drain_all()
        self.release(ptr, device=False)

    def cudaMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        self._need_device()
        return self.total_memory - self.live_bytes, self.total_memory

    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: Any) -> None:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        target, source = self._copy(dst, src, count, kind)
        self._drain_all()
        ctypes.memmove(target, source, count)

    def cudaMemcpyAsync(  # noqa: N802
        self, dst: Any, src: Any, count: int, kind: Any, stream: Any
    ) -> None:
        self._need_device()
        target, source = self._copy(dst, src, count, kind)
        queue = self._stream(stream)
        names = self.enums["cudaMemcpyKind"]
        to_host = kind == names.cudaMemcpyDeviceToHost
        pageable = count > 0 and self._is_pageable(target if to_host else source)
        if queue.captured is not None and pageable and kind != names.cudaMemcpyDeviceToDevice:
            queue.capture_broken = True
            raise StatusError("cudaErrorStreamCaptureUnsupported")
        if kind == names.cudaMemcpyHostToDevice and pageable:
            staged = ctypes.string_at(source, count)  # as the driver does before it returns

            def work() -> None:
                ctypes.memmove(target, staged, count)
        else:

            def work() -> None:
                self._copy(target, source, count, kind)  # both may have been freed since
                ctypes.memmove(target, source, count)

        self._enqueue(queue, work)
        if to_host and pageable:
            self._drain(queue)

    def cudaMemset(self, devPtr: Any, value: int, count: int) -> None:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        address = self._pointer(devPtr, "devPtr")
        if count:
            self.check_device_range(address, count, "memset")
        self._drain_all()
        ctypes.memset(address, value, count)

    def cudaMemsetAsync(  # noqa: N802
        self, devPtr: Any, value: int, count: int, stream: Any
    ) -> None:
        self._need_device()
        address = self._pointer(devPtr, "devPtr")
        if count:
            self.check_device_range(address, count, "memset")

        def work() -> None:
            if count:
                self.check_device_range(address, count, "memset when it ran")
            ctypes.memset(address, value, count)

        self._enqueue(self._stream(stream), work)

    def cudaPointerGetAttributes(self, ptr: Any) -> Any:  # noqa: N802
        self._need_device()
        address = self._pointer(ptr, "ptr")
        found = self.allocation_at(address)
        kinds = self.enums["cudaMemoryType"]
        kind = kinds.cudaMemoryTypeUnregistered
        if found is not None:
            kind = kinds.cudaMemoryTypeDevice if found.device else kinds.cudaMemoryTypeHost
        known = {
            "type": kind,
            "device": found.ordinal if found is not None else -2,
            "devicePointer": address if found is not None else 0,
            "hostPointer": address if found is not None and not found.device else 0,
        }
        return self._struct("cudaPointerAttributes", known)

    def _struct(self, name: str, known: dict[str, Any]) -> types.SimpleNamespace:
        fields = self.api["structs"][name]
        assert set(known) <= set(fields), set(known) - set(fields)
        return types.SimpleNamespace(**known)

    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        self._check_ordinal(device)
        major, minor = self.compute_capability
        known = {
            "name": self.name.encode(), "major": major, "minor": minor,
            "totalGlobalMem": self.total_memory, "multiProcessorCount": 16,
            "integrated": int(self.compute_capability == (8, 7)), "l2CacheSize": 4 << 20,
        }  # fmt: skip
        return self._struct("cudaDeviceProp", known)

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:  # noqa: N802
        names = self.enums["cudaDeviceAttr"]
        if not isinstance(attr, names):
            raise TypeError(f"attr is {type(attr)}, not a cudaDeviceAttr")
        self._check_ordinal(device)
        known = {
            names.cudaDevAttrComputeCapabilityMajor: self.compute_capability[0],
            names.cudaDevAttrComputeCapabilityMinor: self.compute_capability[1],
            names.cudaDevAttrMultiProcessorCount: 16,
            names.cudaDevAttrIntegrated: int(self.compute_capability == (8, 7)),
            names.cudaDevAttrMemoryPoolsSupported: 1,
            names.cudaDevAttrL2CacheSize: 4 << 20,
            names.cudaDevAttrUnifiedAddressing: 1,
        }
        if attr not in known:
            raise NotImplementedError(f"the stand-in has no value for {attr.name}")
        return known[attr]

    def cudaDeviceSynchronize(self) -> None:  # noqa: N802
        self._need_device()
        self._forbid_capture()
        self._drain_all()

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[int, int]:  # noqa: N802
        self._need_device()
        return 0, -5

    def cudaStreamCreate(self) -> Handle:  # noqa: N802
        self._need_device()
        return self._new(Stream(), "cudaStream_t")

    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:  # noqa: N802
        self._need_device()
        return self._new(Stream(flags), "cudaStream_t")

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> Handle:  # noqa: N802
        self._need_device()
        return self._new(Stream(flags), "cudaStream_t")

    def cudaStreamDestroy(self, stream: Any) -> None:  # noqa: N802
        found = self._stream(stream)
        if found is self._legacy:
            raise StatusError("cudaErrorInvalidResourceHandle")
        self._drain(found)
        del self._objects[int(stream)]

    def cudaStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        self._need_device()
        found = self._stream(stream)
        self._forbid_capture(found)
        self._drain(found)

    def cudaStreamQuery(self, stream: Any) -> None:  # noqa: N802
        found = self._stream(stream)
        self._forbid_capture(found)
        if found.pending:
            self._drain(found)  # it will have ended by the next question
            raise StatusError("cudaErrorNotReady")

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:  # noqa: N802
        waited: Event = self._object(event, Event, "cudaEvent_t")
        self._enqueue(self._stream(stream), lambda: self._drain_to(waited))

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:  # noqa: N802
        if not isinstance(mode, self.enums["cudaStreamCaptureMode"]):
            raise TypeError(f"mode is {type(mode)}, not a cudaStreamCaptureMode")
        found = self._stream(stream)
        if found is self._legacy:
            raise StatusError("cudaErrorStreamCaptureUnsupported")
        if found.captured is not None:
            raise StatusError("cudaErrorIllegalState")
        found.captured, found.capture_broken = [], False

    def cudaStreamIsCapturing(self, stream: Any) -> Any:  # noqa: N802
        names = self.enums["cudaStreamCaptureStatus"]
        found = self._stream(stream)
        if found.captured is None:
            return names.cudaStreamCaptureStatusNone
        if found.capture_broken:
            return names.cudaStreamCaptureStatusInvalidated
        return names.cudaStreamCaptureStatusActive

    def cudaStreamEndCapture(self, stream: Any) -> Handle:  # noqa: N802
        found = self._stream(stream)
        if found.captured is None:
            raise StatusError("cudaErrorIllegalState")
        work, found.captured = found.captured, None
        if found.capture_broken or not self.capturable:
            raise StatusError("cudaErrorStreamCaptureInvalidated")
        return self._new(Graph(work), "cudaGraph_t")

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Handle:  # noqa: N802
        found: Graph = self._object(graph, Graph, "cudaGraph_t")
        return self._new(Graph(list(found.work)), "cudaGraphExec_t")

    def cudaGraphInstantiateWithFlags(self, graph: Any, flags: int) -> Handle:  # noqa: N802
        return self.cudaGraphInstantiate(graph, flags)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:  # noqa: N802
        found: Graph = self._object(graphExec, Graph, "cudaGraphExec_t")
        queue = self._stream(stream)
        for work in found.work:
            self._enqueue(queue, work)

    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> None:  # noqa: N802
        self._object(graphExec, Graph, "cudaGraphExec_t")
        self._stream(stream)

    def cudaGraphDestroy(self, graph: Any) -> None:  # noqa: N802
        self._object(graph, Graph, "cudaGraph_t")
        del self._objects[int(graph)]

    def cudaGraphExecDestroy(self, graphExec: Any) -> None:  # noqa: N802
        self._object(graphExec, Graph, "cudaGraphExec_t")
        del self._objects[int(graphExec)]

    def cudaEventCreate(self) -> Handle:  # noqa: N802
        self._need_device()
        return self._new(Event(0), "cudaEvent_t")

    def cudaEventCreateWithFlags(self, flags: int) -> Handle:  # noqa: N802
        self._need_device()
        return self._new(Event(flags), "cudaEvent_t")

    def cudaEventRecord(self, event: Any, stream: Any) -> None:  # noqa: N802
        found: Event = self._object(event, Event, "cudaEvent_t")
        queue = self._stream(stream)

        def reached() -> None:
            return None

        found.stream, found.position = queue, reached
        self._enqueue(queue, reached)

    def _drain_to(self, event: Event) -> None:
        queue = event.stream
        while queue is not None and event.position in queue.pending:
            queue.pending.pop(0)()

    def cudaEventSynchronize(self, event: Any) -> None:  # noqa: N802
        self._forbid_capture()
        self._drain_to(self._object(event, Event, "cudaEvent_t"))

    def cudaEventQuery(self, event: Any) -> None:  # noqa: N802
        found: Event = self._object(event, Event, "cudaEvent_t")
        if found.stream is not None and found.position in found.stream.pending:
            self._drain_to(found)  # it will have been reached by the next question
            raise StatusError("cudaErrorNotReady")

    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:  # noqa: N802
        timed: list[Event] = [self._object(e, Event, "cudaEvent_t") for e in (start, end)]
        for event in timed:
            if event.stream is None or event.flags & self.api["values"]["cudaEventDisableTiming"]:
                raise StatusError("cudaErrorInvalidResourceHandle")
            if event.position in event.stream.pending:
                raise StatusError("cudaErrorNotReady")
        return 1.0

    def cudaEventDestroy(self, event: Any) -> None:  # noqa: N802
        self._object(event, Event, "cudaEvent_t")
        del self._objects[int(event)]


def _function(standin: CudaStandin, name: str, arguments: list[str]) -> Callable[..., Any]:
    """Bind arguments as the real function does, record the call, and answer with a status."""
    implementation = getattr(standin, name, None)
    signature = inspect.Signature(
        [
            inspect.Parameter(text.partition(":")[0], inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for text in arguments
        ]
    )
    errors = standin.enums["cudaError_t"]

    @functools.wraps(implementation or (lambda: None))
    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        bound = signature.bind(*args, **kwargs).arguments
        standin.calls.append((name, dict(bound)))
        if not standin.driver and standin.api["version"] < "13" and name not in WITHOUT_DRIVER:
            raise RuntimeError("Failed to dlopen libcuda.so.1")
        if implementation is None:
            raise NotImplementedError(f"the stand-in for CUDA does not have {name} yet")
        try:
            result = implementation(**bound)
        except StatusError as status:
            if status.name != "cudaErrorNotReady" and "LastError" not in name:
                standin._last_error = status.name
            # cuda-python answers with as many values as on success
            return (errors[status.name], *[None] * VALUES.get(name, 1 - _is_void(implementation)))
        if result is None:
            return (errors.cudaSuccess,)
        return (errors.cudaSuccess, *(result if isinstance(result, tuple) else (result,)))

    call.__name__ = name
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


WITHOUT_DRIVER = {
    "cudaGetErrorName", "cudaGetErrorString", "cudaRuntimeGetVersion", "getLocalRuntimeVersion",
}  # fmt: skip
"""What cuda-python 12 can answer on a machine without a driver; 13 answers every call."""
VALUES = {"cudaMemGetInfo": 2, "cudaDeviceGetStreamPriorityRange": 2}


def _is_void(implementation: Callable[..., Any]) -> bool:
    return inspect.signature(implementation).return_annotation in ("None", None)


class _Module(types.ModuleType):
    """Says which version lacks a name."""

    standin: CudaStandin

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module 'cuda.bindings.runtime' has no attribute {name!r}")


def make_cuda(version: str = "13.4", **knobs: Any) -> types.ModuleType:
    """A module for `sys.modules["cuda.bindings.runtime"]`; its `standin` is the `CudaStandin`."""
    standin = CudaStandin(version, **knobs)
    module = _Module("cuda.bindings.runtime")
    for name, arguments in standin.api["functions"].items():
        setattr(module, name, _function(standin, name, arguments))
    for name, value in standin.api["values"].items():
        setattr(module, name, value)
    for name, kind in {**standin.enums, **standin.handles}.items():
        setattr(module, name, kind)
    module.standin = standin
    return module
