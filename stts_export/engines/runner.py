"""Engines of TensorRT and of TensorRT for RTX: loading the set that fits this machine, running.

Everything of a session is enqueued on one stream, so engines share one block of memory for
activations and buffers are handed from one call to the next without waiting.
"""

from __future__ import annotations

import logging
import math
import mmap
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stts_export.engines import cuda
from stts_export.engines.cuda import ALIGNMENT, DeviceArray, Event, Memory, PinnedBuffer, Stream
from stts_export.engines.engine_set import ENGINE_FOLDER, EngineInfo, EngineSet, folder_name
from stts_export.engines.library import TENSORRT, TENSORRT_RTX, import_library
from stts_export.errors import InputError, MissingDependencyError, SttsError
from stts_export.tensors import SELECT_PACK, Profile, past_names, present_names

_log = logging.getLogger(__name__)


class EngineError(SttsError):
    """TensorRT refused a call; its own words are in the message."""


class Runner:
    """A loaded engine; call it with named arrays of the host or of the GPU.

    Args:
        engine: an `ICudaEngine`.
        contexts: one `IExecutionContext` per optimisation profile.
        info: tensors and profiles of the engine.
        memory: of the session.
        words: what TensorRT has to say about errors.
    """

    def __init__(
        self, engine: Any, contexts: list[Any], info: EngineInfo, memory: Memory, words: _Words
    ) -> None:
        self._contexts = contexts
        self._memory = memory
        self._words = words
        self._info = info
        self._where = _where(info)
        self._inputs = {tensor.name: tensor for tensor in info.inputs}
        self._outputs = {tensor.name: tensor for tensor in info.outputs}
        names = (*self._inputs, *self._outputs)
        host = [name for name in names if engine.get_tensor_location(name).name == "HOST"]
        self._on_host = frozenset(host)
        self._sent = _Arena(memory)
        self._received = _Arena(memory)
        self._bounded: dict[str, DeviceArray] = {}
        self.updates_in_place = _updates_in_place(engine, names)
        """Whether a cache output must be bound to the memory of its input (KV-cache update);
        otherwise the two must not overlap."""
        cache = self._inputs.get(past_names(0)[0])
        fixed = cache is not None and cache.shape[2] != -1
        self.cache_capacity = int(cache.shape[2]) if cache and fixed else None
        """Tokens of a cache where the engine takes only one size."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Array of zeros on the GPU.

        Raises:
            InputError: the GPU has too little memory.
        """
        self._memory.stream.activate()
        return self._memory.zeros(shape, dtype)

    @staticmethod
    def to_host(array: DeviceArray) -> NDArray[Any]:
        """Wait for an array and copy it to the host."""
        array.stream.activate()  # another thread may have another GPU
        return array.to_host()

    def copy(self, target: DeviceArray, source: DeviceArray | NDArray[Any]) -> None:
        """Copy an array of the host, or enqueue the copy of one on the GPU."""
        self._memory.stream.activate()
        if isinstance(source, DeviceArray):
            target.copy_from(source)
        else:
            target.copy_from_host(source)

    def close(self) -> None:
        """Release the engine; its memory is the session's."""
        self._contexts = []
        self._bounded = {}
        for arena in (self._sent, self._received):
            arena.close()

    def __call__(
        self,
        inputs: Mapping[str, NDArray[Any] | DeviceArray],
        in_place: Mapping[str, DeviceArray] | None = None,
    ) -> dict[str, Any]:
        """Run the engine.

        Where all inputs are on the GPU and all outputs in place, nothing is waited for and the
        call can be captured into a CUDA graph.

        Args:
            inputs: C-contiguous arrays by name, of the contract's types.
            in_place: outputs to write into these arrays; one may also be an input.

        Returns:
            The other outputs by name: NumPy arrays, except those whose first axis depends on the
            data. These stay on the GPU at their upper bound, until the next call.

        Raises:
            InputError: a shape is in no profile of the engine, or the GPU has too little memory.
            EngineError: TensorRT failed.
        """
        self._memory.stream.activate()
        in_place = in_place or {}
        self._check(inputs)
        context = self._contexts[fitting_profile(self._info, inputs)]
        self._words.clear()
        moved = self._send(context, inputs)
        outputs = self._bind_outputs(context, in_place)
        handle = self._memory.stream.handle
        self._demand(context.execute_async_v3(handle), "cannot be run")
        if self._on_host:
            self._sent.keep()  # the run reads from it
        del moved  # later work on this stream may have it
        for target, source in outputs.late:
            target.copy_from(source)
        return {**self._receive(outputs.returned), **outputs.bounded}

    def _check(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> None:
        if inputs.keys() != self._inputs.keys():
            raise ValueError(f"{self._where}: inputs {sorted(inputs)}, not {sorted(self._inputs)}")
        for name, array in inputs.items():
            tensor = self._inputs[name]
            fits = len(array.shape) == len(tensor.shape) and all(
                axis in (-1, side) for axis, side in zip(tensor.shape, array.shape, strict=True)
            )
            fits = fits and not (name in self._on_host and isinstance(array, DeviceArray))
            if not fits or array.dtype != np.dtype(tensor.dtype):
                raise ValueError(
                    f"{self._where}: {name} is {array.dtype} {array.shape}, "
                    f"not {tensor.dtype} {tensor.shape}"
                )

    def _send(
        self, context: Any, inputs: Mapping[str, NDArray[Any] | DeviceArray]
    ) -> list[DeviceArray]:
        """Set shapes and addresses of the inputs, copying those that lie on the host.

        Returns:
            Copies of inputs that TensorRT does not take where they lie, to be kept for the call.
        """
        from_host: dict[str, NDArray[Any]] = {
            name: array for name, array in inputs.items() if not isinstance(array, DeviceArray)
        }
        places = self._sent.place({name: array.nbytes for name, array in from_host.items()})
        for name, values in from_host.items():
            self._sent.host(places[name], values.shape, values.dtype)[...] = values
        if any(name not in self._on_host for name in from_host):
            self._sent.send()
        moved: list[DeviceArray] = []
        for name, array in inputs.items():
            if isinstance(array, DeviceArray):
                if array.pointer % ALIGNMENT:
                    moved.append(self._memory.empty(array.shape, array.dtype))
                    moved[-1].copy_from(array)
                    array = moved[-1]
                address = array.pointer
            elif name in self._on_host:
                address = self._sent.host_address(places[name])
            else:
                address = self._sent.device_address(places[name])
            shape = tuple(array.shape)
            self._demand(context.set_input_shape(name, shape), f"refuses {name} {shape}")
            self._demand(context.set_tensor_address(name, address), f"refuses {name}")
        return moved

    def _bind_outputs(self, context: Any, in_place: Mapping[str, DeviceArray]) -> _Outputs:
        """Give every output an address; a later copy where the given one does not do."""
        bound = _Outputs({}, {}, [])
        addresses: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for name, tensor in self._outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            if name in in_place:
                addresses[name] = self._bind_in_place(name, shape, in_place[name], bound)
            elif -1 in shape:
                bound.bounded[name] = self._bound(context, name, shape)
                addresses[name] = bound.bounded[name].pointer
            else:
                sizes[name] = math.prod(shape) * np.dtype(tensor.dtype).itemsize
                bound.returned[name] = (0, shape)
        for name, offset in self._received.place(sizes).items():
            bound.returned[name] = (offset, bound.returned[name][1])
            arena, on_host = self._received, name in self._on_host
            addresses[name] = (arena.host_address if on_host else arena.device_address)(offset)
        for name, address in addresses.items():
            self._demand(context.set_tensor_address(name, address), f"refuses {name}")
        return bound

    def _bind_in_place(
        self, name: str, shape: tuple[int, ...], target: DeviceArray, bound: _Outputs
    ) -> int:
        if target.shape != shape:
            raise ValueError(f"{self._where}: {name} is {shape}, not {target.shape}")
        if target.pointer % ALIGNMENT == 0:
            return target.pointer
        source = self._memory.empty(target.shape, target.dtype)
        bound.late.append((target, source))
        return source.pointer

    def _bound(self, context: Any, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """Memory for as many rows as an output can have."""
        dtype = np.dtype(self._outputs[name].dtype)
        row = math.prod(shape[1:]) * dtype.itemsize
        nbytes = int(context.get_max_output_size(name))
        self._demand(nbytes >= row > 0, f"gives no bound for {name} {shape}")
        rows = nbytes // row
        held = self._bounded.pop(name, None)
        if held is None or len(held) < rows:
            held = None  # so that its memory can be taken for the new one
            held = self._memory.empty((rows, *shape[1:]), dtype)
        self._bounded[name] = held
        return held[:rows]

    def _receive(self, returned: Mapping[str, _Place]) -> dict[str, NDArray[Any]]:
        """Wait for outputs and copy them out of the pinned memory."""
        if not returned:
            return {}
        views = {
            name: self._received.host(offset, shape, np.dtype(self._outputs[name].dtype))
            for name, (offset, shape) in returned.items()
        }
        for name, view in views.items():
            if name not in self._on_host:
                self._received.fetch(returned[name][0], view.nbytes)
        self._memory.stream.synchronize()
        return {name: view.copy() for name, view in views.items()}

    def _demand(self, fits: bool, problem: str) -> None:
        if not fits:
            raise self._words.error(problem, self._where)


def _where(info: EngineInfo) -> str:
    return f"{info.file} of TensorRT"


def fitting_profile(info: EngineInfo, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> int:
    """Index of the first profile of an engine that takes these inputs.

    Raises:
        InputError: none does.
    """
    misfit = None
    for index, profile in enumerate(info.profiles):
        misfit = _misfit(info, profile, inputs)
        if misfit is None:
            return index
    if misfit is not None:
        raise misfit
    return 0


def _misfit(
    info: EngineInfo, profile: Profile, inputs: Mapping[str, NDArray[Any] | DeviceArray]
) -> InputError | None:
    """What a profile does not take."""
    by_value = {tensor.name for tensor in info.inputs if tensor.is_shape}
    for name, limits in profile.items():
        array = inputs[name]
        got, what = array.shape, "has shape"
        if name in by_value and isinstance(array, np.ndarray):
            got, what = tuple(array.tolist()), "is"
        ranges = zip(limits.min, got, limits.max, strict=True)
        if not all(low <= side <= high for low, side, high in ranges):
            return InputError(
                f"{name} {what} {got}",
                where=_where(info),
                allowed=f"from {limits.min} to {limits.max}",
                fix="pass fewer frames, raise the prune ratio or shorten the prompt, or build "
                "the engines from a bundle with a larger --max-frames",
            )
    return None


_Place = tuple[int, tuple[int, ...]]
"""Offset in an arena, and shape."""


@dataclass(frozen=True)
class _Outputs:
    """Where the outputs of a call go."""

    returned: dict[str, _Place]
    """Copied to the host."""
    bounded: dict[str, DeviceArray]
    """Stay on the GPU, with more rows than may be used."""
    late: list[tuple[DeviceArray, DeviceArray]]
    """(target, source) of copies to make after the run."""


def _updates_in_place(engine: Any, names: Sequence[str]) -> bool:
    """Whether the engine wants a cache's output in the memory of its input."""
    past, present = past_names(0)[0], present_names(0)[0]
    aliased = getattr(engine, "get_aliased_input_tensor", None)  # since TensorRT 10.15
    return present in names and aliased is not None and aliased(present) == past


class _Arena:
    """Grow-only memory for arrays that go to or come from the host: pinned, and on the GPU."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pinned: PinnedBuffer | None = None
        self._device: DeviceArray | None = None
        self._busy: Event | None = None
        self._used = 0

    def place(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Wait until the pinned memory is free, and lay arrays of these sizes side by side."""
        offsets: dict[str, int] = {}
        self._used = 0
        if not sizes:
            return offsets  # nor may a stream that is captured be waited for
        if self._busy is not None:
            self._busy.wait()
        for name, nbytes in sizes.items():
            offsets[name] = self._used
            self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._used > self._capacity:
            self._grow(max(self._used, 2 * self._capacity))
        return offsets

    @property
    def _capacity(self) -> int:
        return self._device.nbytes if self._device is not None else 0

    def _grow(self, nbytes: int) -> None:
        self._device = None
        if self._pinned is not None:
            pinned, self._pinned = self._pinned, None
            self._memory.unpin(pinned)
        self._pinned = self._memory.pinned(nbytes)
        self._device = self._memory.empty((nbytes,), np.uint8)

    def host(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """View of the pinned memory."""
        assert self._pinned is not None
        return self._pinned.view(offset, shape, dtype)

    def host_address(self, offset: int) -> int:
        """Address in the pinned memory."""
        assert self._pinned is not None
        return self._pinned.pointer + offset

    def device_address(self, offset: int) -> int:
        """Address on the GPU."""
        assert self._device is not None
        return self._device.pointer + offset

    def send(self) -> None:
        """Enqueue the copy of all arrays to the GPU."""
        cuda.copy(
            self.device_address(0),
            self.host_address(0),
            self._used,
            "cudaMemcpyHostToDevice",
            self._memory.stream,
        )
        self.keep()

    def fetch(self, offset: int, nbytes: int) -> None:
        """Enqueue the copy of one array to the host; the caller waits for it."""
        cuda.copy(
            self.host_address(offset),
            self.device_address(offset),
            nbytes,
            "cudaMemcpyDeviceToHost",
            self._memory.stream,
        )

    def keep(self) -> None:
        """Leave the pinned memory alone until what is enqueued now is done."""
        if self._busy is None:
            self._busy = Event()
        self._busy.record(self._memory.stream)

    def close(self) -> None:
        """Drop everything; the memory is freed with the session's."""
        self._pinned = self._device = None
        if self._busy is not None:
            self._busy.close()
            self._busy = None


class _Words:
    """What TensorRT says: warnings go to the log, errors into our messages."""

    def __init__(self, trt: ModuleType) -> None:
        errors: list[str] = []
        levels = {"WARNING": logging.WARNING, "INFO": logging.INFO}

        class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity.name in ("ERROR", "INTERNAL_ERROR"):
                    errors.append(msg)
                _log.log(levels.get(severity.name, logging.DEBUG), "%s", msg)

        self.logger: Any = Logger()
        self._errors = errors

    def clear(self) -> None:
        """Forget what belongs to earlier calls."""
        self._errors.clear()

    def error(self, problem: str, where: str) -> SttsError:
        """What to raise after a call that failed."""
        words = "; ".join(self._errors) or "no reason given"
        if "out of memory" in words.lower() or "outofmemory" in words.lower():
            return InputError(
                f"{problem}, the GPU has too little memory: {words}",
                where=where,
                fix="end other programs on the GPU, pass fewer frames, or rebuild with a smaller "
                "--max-frames",
            )
        return EngineError(f"{problem}: {words}", where=where)


class Engines:
    """The engines of a bundle, loaded, with the memory they use.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        memory: of the session.
    """

    def __init__(self, backend: str, memory: Memory) -> None:
        self.backend = backend
        self.memory = memory
        self.runners: dict[str, Runner] = {}
        """By graph name."""
        self._held: list[Any] = []

    @property
    def stream(self) -> Stream:
        """Where all work is enqueued."""
        return self.memory.stream

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def close(self) -> None:
        """Release engines and memory; further calls do nothing."""
        if self.stream.handle:
            self.stream.activate()
            with suppress(cuda.CudaError):  # reported where it was noticed
                self.stream.synchronize()
        for runner in self.runners.values():
            runner.close()
        self.runners = {}
        while self._held:  # contexts, then engines, then the runtime
            self._held.pop()
        self.memory.close()

    def load(self, engines: EngineSet, trt: ModuleType, plugin: Path | None, bundle: Path) -> None:
        """Load every engine of a set.

        Raises:
            InputError: an engine cannot be loaded, or the GPU has too little memory.
            MissingDependencyError: TensorRT does not start, or the plugin is missing.
        """
        words = _Words(trt)
        self._held.append(words)
        if SELECT_PACK in engines.engines:
            from stts_export.engines.plugin import load_plugin

            load_plugin(trt, plugin, bundle)
        try:
            runtime = trt.Runtime(words.logger)
        except TypeError as error:  # how pybind11 passes on that there is none
            raise MissingDependencyError(
                f"does not start: {words.error(str(error), trt.__name__).message}",
                where=trt.__name__,
                fix="check `nvidia-smi`: TensorRT needs a driver of its CUDA version or newer",
            ) from None
        self._held.append(runtime)
        loaded: dict[str, Any] = {}
        for name, info in engines.engines.items():
            loaded[name] = _deserialize(runtime, engines, info, words)
            self._held.append(loaded[name])
        scratch = self.memory.empty(
            (max([1, *(int(engine.device_memory_size_v2) for engine in loaded.values())]),),
            np.uint8,
        )
        self._held.append(scratch)
        for name, engine in loaded.items():
            info = engines.engines[name]
            contexts = [
                self._context(trt, engine, index, scratch, words, info)
                for index in range(max(1, len(info.profiles)))
            ]
            self.runners[name] = Runner(engine, contexts, info, self.memory, words)
        self.stream.synchronize()

    def _context(
        self, trt: Any, engine: Any, profile: int, scratch: DeviceArray, words: _Words,
        info: EngineInfo,
    ) -> Any:  # fmt: skip
        """Context of a profile; its activations lie in the memory that all contexts share."""
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(strategy)
        if context is None:
            raise words.error("cannot be started", info.file)
        context.set_device_memory(scratch.pointer, scratch.nbytes)
        try:
            context.set_optimization_profile_async(profile, self.stream.handle)
        except RuntimeError:  # the bindings' way of saying False
            raise words.error(f"does not start with profile {profile}", info.file) from None
        return context


def open_engines(
    bundle: Path,
    targets: Sequence[str],
    backend: str,
    *,
    device: str | None = None,
    threads: int | None = None,
    plugin: Path | None = None,
) -> Engines:
    """Load the engines of a bundle that were built for this GPU and this TensorRT.

    Args:
        bundle: the bundle's folder.
        targets: what the bundle was built for, by engine folder.
        backend: "tensorrt" or "tensorrt-rtx".
        device: "cuda" (default) or "cuda:N".
        threads: must be None; the GPU has no such setting.
        plugin: library to load in place of the one that would be found.

    Raises:
        InputError: a setting that does not fit, no engines for this machine, damaged engines, or
            too little memory on the GPU.
        MissingDependencyError: TensorRT, its driver, the GPU or the plugin is not there.
    """
    number = _device(device, backend)
    if threads is not None:
        raise InputError(
            f"{threads} threads", where=backend, allowed="none: engines run on the GPU",
            fix="leave threads out",
        )  # fmt: skip
    if plugin is not None and backend != TENSORRT:
        raise InputError(f"plugin {plugin}", where=backend, allowed="plugins of tensorrt only")
    trt = import_library(backend)
    major, minor = cuda.compute_capability(number)
    folder = _fitting(bundle, targets, backend, trt.__version__, f"sm{major}{minor}")
    engine_set = EngineSet.read(folder)
    engines = Engines(backend, Memory(Stream(number)))
    try:
        engines.load(engine_set, trt, plugin, bundle)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold engines, which are to go
        engines.close()
        raise
    return engines


def _device(device: str | None, backend: str) -> int:
    name, _, number = (device or "cuda").partition(":")
    if name == "cuda" and (device in (None, "cuda") or (number.isascii() and number.isdigit())):
        return int(number or 0)
    raise InputError(f"device {device!r}", where=backend, allowed="cuda, or cuda:N for GPU N")


def backend_of(target: str) -> str:
    """Back end that a target of a manifest belongs to: an engine folder's name starts with it."""
    for backend in (TENSORRT_RTX, TENSORRT):
        if target.startswith(f"{backend}-"):
            return backend
    return target


def _fitting(bundle: Path, targets: Sequence[str], backend: str, version: str, target: str) -> Path:
    """Folder of the engines built by this version for this GPU."""
    wanted = folder_name(backend, version, target)
    if wanted in targets:
        return bundle / ENGINE_FOLDER / wanted
    there = [name for name in targets if backend_of(name) == backend]
    raise InputError(
        f"has no engines for {backend} {version} on {target}, which this machine has",
        where=str(bundle),
        allowed=", ".join(there),
        fix=_build_command(bundle, backend, target),
    )


def _build_command(bundle: Path, backend: str, target: str) -> str:
    command = f"stts-export build {bundle} -o NEW_BUNDLE --backend {backend}"
    if backend == TENSORRT_RTX:
        return f"{command} --target {target}"
    return f"{command} (on this machine)"


def _deserialize(runtime: Any, engines: EngineSet, info: EngineInfo, words: _Words) -> Any:
    file = engines.folder / info.file
    words.clear()
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            engine = runtime.deserialize_cuda_engine(content)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InputError(f"cannot be read: {error}", where=str(file)) from None
    fix = _build_command(engines.folder.parents[1], engines.backend, engines.target)
    if engine is None:
        problem = words.error("cannot be loaded", str(file))
        raise InputError(problem.message, where=str(file), fix=problem.fix or fix)
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    listed = {tensor.name for tensor in (*info.inputs, *info.outputs)}
    if names != listed or engine.num_optimization_profiles != max(1, len(info.profiles)):
        raise InputError(
            f"has {engine.num_optimization_profiles} profiles of {sorted(names)}",
            where=str(file),
            allowed=f"what engines.json lists: {len(info.profiles)} profiles of {sorted(listed)}",
            fix=fix,
        )
    return engine
