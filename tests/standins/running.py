"""From an engine file to answers: runtime, engine, execution context.

Engines run through ONNX Runtime, on the memory of the CUDA stand-in and in the order of its
streams. Addresses, sizes, alignment and aliasing are checked when work is enqueued.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.standins import onnx_model, select_pack
from tests.standins.api import DimsValue
from tests.standins.cuda import StatusError
from tests.standins.plan import Plan, TensorInfo, volume
from tests.standins.plugins import PluginRegistry
from tests.standins.state import Part, State

ALIGNMENT = 256
"""Bytes; what `setTensorAddress` asks of an address."""
_NUMPY = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "BOOL": np.bool_, "INT8": np.int8,
}  # fmt: skip
_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1,
          "UINT8": 1, "FP8": 1, "INT4": 0.5, "FP4": 0.5, "E8M0": 1}  # fmt: skip

Arrays = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


def nptype(trt_type: Any) -> Any:
    """NumPy type of a DataType, as `tensorrt.nptype`."""
    if trt_type.name in _NUMPY:
        return _NUMPY[trt_type.name]
    raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")


def itemsize(trt_type: Any) -> float:
    """Bytes of an element."""
    return _BYTES[trt_type.name]


class Program:
    """What an engine computes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._run: Callable[[Arrays], Arrays] | None = None

    def __call__(self, inputs: Arrays) -> Arrays:
        if self._run is None:
            self._run = self._select_pack() if self._plan.plugins else self._onnx_runtime()
        return self._run(inputs)

    def _onnx_runtime(self) -> Callable[[Arrays], Arrays]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(
            self._plan.model, options, providers=["CPUExecutionProvider"]
        )
        names = [tensor.name for tensor in self._plan.outputs]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))

    def _select_pack(self) -> Callable[[Arrays], Arrays]:
        (node,) = onnx.load_from_string(self._plan.model).graph.node
        refill = bool(onnx_model.attributes(node).get("refill", 1))

        def run(inputs: Arrays) -> Arrays:
            values = select_pack.run(*(inputs[name] for name in node.input), refill=refill)
            return dict(zip(node.output, values, strict=True))

        return run


@dataclass
class Pending:
    """Runs of a context that are enqueued but not done."""

    count: int = 0


class Runtime(Part):
    API = "Runtime"

    def __init__(self, logger: Any) -> None:
        self.state.use_logger(logger)
        if not self.state.is_rtx:
            self.state.need_device("createInferRuntime")
        self._logger = logger
        self.registry = PluginRegistry(self.state, parent=self.state.registry)
        self.error_recorder: Any = None
        self.max_threads = 1
        self.DLA_core = -1
        self.num_DLA_cores = 0
        self.engine_host_code_allowed = False
        self.temporary_directory = "/tmp"
        self.tempfile_control_flags = 3

    @property
    def logger(self) -> Any:
        return self._logger

    def get_plugin_registry(self) -> Any:
        return self.registry

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        with memoryview(serialized_engine) as view:
            data = view.tobytes()
        try:
            plan = Plan.unpack(data)
        except ValueError as error:
            return self._fail(
                f"Error Code 1: Serialization (Serialization assertion magicTagRead =="
                f" kMAGIC_TAG failed. {error})"
            )
        if (plan.package, plan.version) != (self.state.package, self.state.version):
            return self._fail(
                "Error Code 1: Serialization (Serialization assertion stdVersionRead =="
                " kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current"
                f" Version: {self.state.package} {self.state.version}, Serialized Engine Version:"
                f" {plan.package} {plan.version})"
            )
        if not self.state.cuda.driver or not self.state.cuda.devices:
            return self._fail("Error Code 1: Cuda Runtime (cudaError 35)")
        if self.state.cuda.sm not in plan.targets:
            return self._fail(
                "Error Code 6: API Usage Error (The engine plan file is generated on an"
                f" incompatible device, expecting compute {self.state.cuda.sm} got compute"
                f" {', '.join(plan.targets)}, please rebuild.)"
            )
        for name, version, namespace in plan.plugins:
            if not self.registry.has(name, version, namespace):
                return self._fail(
                    f"Error Code 4: Internal Error (Cannot get plugin creator: {name} version:"
                    f" {version} namespace: {namespace})"
                )
        try:
            weights = self.state.cuda.allocate(len(plan.model))
        except StatusError:
            return self._fail(
                f"Error Code 2: OutOfMemory (Requested size was {len(plan.model)} bytes.)"
            )
        return self.make(Engine, self, plan, weights)

    def _fail(self, text: str) -> None:
        self.state.error(f"IRuntime::deserializeCudaEngine: {text}")


class Engine(Part):
    API = "ICudaEngine"

    def __init__(self, runtime: Any, plan: Plan, weights: int) -> None:
        self._runtime = runtime  # the bindings keep it alive
        self._weights = weights
        self.plan = plan
        self.program = Program(plan)
        self.tensors = {t.name: t for t in (*plan.inputs, *plan.outputs)}
        self.input_names = {t.name for t in plan.inputs}
        self.error_recorder: Any = None

    def __del__(self) -> None:
        self.state.cuda.release(self._weights)

    name = property(lambda self: self.plan.name)
    num_io_tensors = property(lambda self: len(self.tensors))
    num_layers = property(lambda self: 1)
    num_aux_streams = property(lambda self: 0)
    num_optimization_profiles = property(lambda self: max(1, len(self.plan.profiles)))
    device_memory_size = property(lambda self: self.state.context_bytes)
    device_memory_size_v2 = property(lambda self: self.state.context_bytes)
    streamable_weights_size = property(lambda self: len(self.plan.model))
    refittable = property(lambda self: False)
    has_implicit_batch_dimension = property(lambda self: False)
    hardware_compatibility_level = property(
        lambda self: self.state.member("HardwareCompatibilityLevel", "NONE")
    )
    profiling_verbosity = property(
        lambda self: self.state.member("ProfilingVerbosity", "LAYER_NAMES_ONLY")
    )
    engine_capability = property(lambda self: self.state.member("EngineCapability", "STANDARD"))

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self.state.context_bytes

    get_device_memory_size_for_profile_v2 = get_device_memory_size_for_profile

    def get_tensor_name(self, index: int) -> Any:
        names = list(self.tensors)
        if 0 <= index < len(names):
            return names[index]
        return self._missing(f"index {index}", None)

    def __getitem__(self, index: int) -> Any:
        return self.get_tensor_name(index)

    def get_tensor_mode(self, name: str) -> Any:
        if name not in self.tensors:
            return self._missing(name, self.state.member("TensorIOMode", "NONE"))
        mode = "INPUT" if name in self.input_names else "OUTPUT"
        return self.state.member("TensorIOMode", mode)

    def get_tensor_dtype(self, name: str) -> Any:
        if name not in self.tensors:
            return self._missing(name, self.state.member("DataType", "FLOAT"))
        return self.state.member("DataType", self.tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> Any:
        if name not in self.tensors:
            return self._missing(name, DimsValue())
        return DimsValue(self.tensors[name].runtime_shape)

    def get_tensor_location(self, name: str) -> Any:
        on_host = name in self.tensors and self.tensors[name].is_shape
        return self.state.member("TensorLocation", "HOST" if on_host else "DEVICE")

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].is_shape

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        return self.state.member("TensorFormat", "LINEAR")

    def get_tensor_bytes_per_component(self, name: str, profile_index: int = 0) -> int:
        return int(_BYTES[self.tensors[name].dtype])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        tensor = self.tensors.get(name)
        if tensor is None or name not in self.input_names or not self._has(profile_index):
            return self._missing(f"{name} in profile {profile_index}", [])
        if tensor.is_shape or name not in self.plan.profiles[profile_index]:
            return [DimsValue(tensor.runtime_shape)] * 3
        return [DimsValue(s) for s in self.plan.profiles[profile_index][name]]

    def get_tensor_profile_values(self, name: int, profile_index: str) -> Any:
        # the bindings name the two the wrong way round, and check their types
        profile, tensor = name, profile_index
        if not self.is_shape_inference_io(tensor) or tensor not in self.input_names:
            raise RuntimeError("Binding index does not correspond to an input shape tensor.")
        if not self._has(profile):
            return self._missing(f"profile {profile}", [])
        return self.plan.profiles[profile][tensor]

    def _has(self, profile: int) -> bool:
        return 0 <= profile < len(self.plan.profiles)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.plan.aliases.get(name)

    def _missing(self, what: str, answer: Any) -> Any:
        self.state.error(f"ICudaEngine: Error Code 3: API Usage Error ({what} does not exist)")
        return answer

    def create_execution_context(self, strategy: Any = None) -> Any:
        chosen = strategy or self.state.member("ExecutionContextAllocationStrategy", "STATIC")
        scratch = 0
        if chosen.name != "USER_MANAGED":
            try:
                scratch = self.state.cuda.allocate(self.state.context_bytes)
            except StatusError:
                self.state.error(
                    "ICudaEngine::createExecutionContext: Error Code 2: OutOfMemory (Requested"
                    f" size was {self.state.context_bytes} bytes.)"
                )
                return None
        return self.make(Context, self, scratch)

    def create_execution_context_without_device_memory(self) -> Any:
        return self.make(Context, self, 0)

    def serialize(self) -> Any:
        return self.state.module.IHostMemory(self.plan.pack())


class Context(Part):
    API = "IExecutionContext"

    def __init__(self, engine: Any, scratch: int) -> None:
        self._engine = engine
        self._scratch = scratch
        self._user_memory: tuple[int, int] | None = None
        self._pending = Pending()
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._warm: object = None
        self.name = ""
        self.debug_sync = False
        self.enqueue_emits_profile = True
        self.error_recorder: Any = None
        self.profiler: Any = None
        self.nvtx_verbosity = self.state.member("ProfilingVerbosity", "LAYER_NAMES_ONLY")
        self.persistent_cache_limit = 0
        self._reset_shapes()

    def __del__(self) -> None:
        if self._pending.count:
            self.state.cuda.violations.append(
                f"a context of {self._engine.plan.name} was destroyed while it ran"
            )
        if self._scratch:
            self.state.cuda.release(self._scratch)

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    @property
    def _plan(self) -> Plan:
        plan: Plan = self._engine.plan
        return plan

    @property
    def _limits(self) -> dict[str, list[list[int]]]:
        return self._plan.profiles[self._profile] if self._plan.profiles else {}

    def _reset_shapes(self) -> None:
        self._shapes = {
            t.name: t.runtime_shape for t in self._plan.inputs if -1 not in t.runtime_shape
        }

    def _error(self, function: str, text: str) -> bool:
        self.state.error(f"IExecutionContext::{function}: Error Code 3: API Usage Error ({text})")
        return False

    def _tensor(self, function: str, name: str) -> TensorInfo | None:
        tensor: TensorInfo | None = self._engine.tensors.get(name)
        if tensor is None:
            self._error(function, f"Given invalid tensor name: {name}.")
        return tensor

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        problem = self.state.fail_execute
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            problem = f"profile {profile_index} does not exist"
        elif self.state.cuda.is_capturing(stream_handle):
            problem = "the stream is being captured"
        if problem is not None:
            self._error("setOptimizationProfileAsync", problem)
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = profile_index
        self._reset_shapes()
        self._warm = None
        self.state.cuda.enqueue(stream_handle, lambda: None)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.state.cuda.check_device_range(memory, size, "set_device_memory")
        if size < self.state.context_bytes:
            self._error("setDeviceMemoryV2", f"{size} bytes < {self.state.context_bytes}")
            return
        self._user_memory = (memory, size)

    @property
    def device_memory(self) -> int:
        return self._scratch

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self.set_device_memory(memory, self.state.context_bytes)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        where = "setInputShape"
        tensor = self._tensor(where, name)
        if tensor is None:
            return False
        if name not in self._engine.input_names:
            return self._error(where, f"{name} is not an input tensor")
        sides = tuple(int(side) for side in shape)
        limits = self._limits.get(name) if not tensor.is_shape else None
        if limits is None:
            limits = [list(tensor.runtime_shape)] * 3
        fits = len(sides) == len(limits[0]) and all(
            low <= side <= high for low, side, high in zip(limits[0], sides, limits[2], strict=True)
        )
        if not fits:
            return self._error(
                where,
                f"Set dimension {list(sides)} for tensor {name} does not satisfy any"
                f" optimization profiles. Valid range for profile {self._profile}:"
                f" {limits[0]}..{limits[2]}.",
            )
        if self._shapes.get(name) != sides:
            self._warm = None
        self._shapes[name] = sides
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        where = "setTensorAddress"
        tensor = self._tensor(where, name)
        if tensor is None:
            return False
        found = self.state.cuda.allocation_at(memory) if memory else None
        if tensor.is_shape:
            if found is not None and found.device:
                raise self.state.cuda.misuse(
                    f"{name} is a shape tensor: host memory, not the device's"
                )
        elif memory % ALIGNMENT:
            return self._error(where, f"{name}: {memory:#x} is not aligned to 256 bytes")
        elif memory and (found is None or not found.device):
            raise self.state.cuda.misuse(f"{name}: {memory:#x} is no live device memory")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        where = "setOutputAllocator"
        if self._tensor(where, name) is None:
            return False
        if name in self._engine.input_names:
            return self._error(where, f"{name} is not an output tensor")
        self._allocators[name] = output_allocator
        return True

    def get_output_allocator(self, name: str) -> Any:
        return self._allocators.get(name)

    @property
    def all_binding_shapes_specified(self) -> bool:
        return all(t.name in self._shapes for t in self._plan.inputs)

    @property
    def all_shape_inputs_specified(self) -> bool:
        return all(self._addresses.get(t.name) for t in self._plan.inputs if t.is_shape)

    def infer_shapes(self) -> list[str]:
        missing = [t.name for t in self._plan.inputs if t.name not in self._shapes]
        missing += [
            t.name for t in self._plan.inputs if t.is_shape and not self._addresses.get(t.name)
        ]
        if not missing:
            self._check_values()
        return missing

    def _values(self, name: str) -> np.ndarray[Any, np.dtype[Any]] | None:
        """Values of a shape tensor, as they are now in host memory."""
        tensor = self._engine.tensors[name]
        address = self._addresses.get(name, 0)
        if not address:
            return None
        return read(address, self._shapes[name], tensor.dtype)

    def _check_values(self) -> bool:
        for tensor in self._plan.inputs:
            if not tensor.is_shape:
                continue
            values = self._values(tensor.name)
            low, _, high = self._limits[tensor.name]
            if values is None or not (
                np.all(np.array(low) <= values.ravel()) and np.all(values.ravel() <= np.array(high))
            ):
                got = None if values is None else values.tolist()
                return self._error(
                    "inferShapes",
                    f"values {got} of shape tensor {tensor.name} do not satisfy profile"
                    f" {self._profile}: {low}..{high}",
                )
        return True

    def _symbols(self) -> dict[str, int]:
        """Sizes of the free axes that the inputs determine."""
        known: dict[str, int] = {}
        for tensor in self._plan.inputs:
            sides = self._shapes.get(tensor.name)
            axes = zip(tensor.shape, sides or (), strict=False)
            known.update((axis, side) for axis, side in axes if isinstance(axis, str))
            if tensor.is_shape and self._plan.plugins:
                values = self._values(tensor.name) if sides else None
                if values is not None:
                    known["kept"] = int(values.ravel()[0])
        return known

    def get_tensor_shape(self, name: str) -> Any:
        tensor = self._tensor("getTensorShape", name)
        if tensor is None:
            return DimsValue()
        if name in self._engine.input_names:
            return DimsValue(self._shapes.get(name, tensor.runtime_shape))
        known = self._symbols()
        if self._plan.plugins:
            known.pop("bins", None)
        return DimsValue(
            axis if isinstance(axis, int) else known.get(axis, -1) for axis in tensor.shape
        )

    def get_tensor_strides(self, name: str) -> Any:
        shape = self.get_tensor_shape(name)
        return DimsValue(volume(shape[i + 1 :]) for i in range(len(shape)))

    def get_max_output_size(self, name: str) -> int:
        tensor = self._tensor("getMaxOutputSize", name)
        if tensor is None:
            return -1
        known = self._symbols()
        if self._plan.plugins and "kept" in known:
            windows = next(t.shape[1] for t in self._plan.outputs if t.name == "segment")
            assert isinstance(windows, int)
            known["bins"] = min(known["frames"], 2 * known["kept"] // windows + 1)
        sides = [axis if isinstance(axis, int) else known.get(axis, -1) for axis in tensor.shape]
        if -1 in sides:
            return -1
        size = math.prod(sides) * int(_BYTES[tensor.dtype])
        return -(-size // ALIGNMENT) * ALIGNMENT

    def update_device_memory_size_for_shapes(self) -> int:
        return self.state.context_bytes

    def is_stream_capturable(self, stream: int) -> bool:
        return self.state.cuda.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        where = "enqueueV3"
        if self.state.fail_execute is not None:
            return self._error(where, self.state.fail_execute)
        if self.infer_shapes():
            return self._error(where, f"not all inputs are specified: {self.infer_shapes()}")
        if not self._check_values():
            return False
        if not self._scratch and self._user_memory is None and self.state.context_bytes:
            return self._error(where, "device memory was not set")
        if self._user_memory is not None:
            self.state.cuda.check_device_range(*self._user_memory, "activations")
        if not self._check_inputs() or not self._check_outputs():
            return False
        key = (tuple(self._shapes.items()), self._profile)
        capturable = self.state.cuda.capturable and self._warm == key
        if self.state.cuda.is_capturing(stream_handle) and not capturable:
            self.state.cuda.break_capture(stream_handle)
            return self._error(
                where, "shapes changed since the last enqueueV3 outside of a capture"
            )
        self._warm = key
        return self._enqueue(stream_handle)

    def _size(self, name: str) -> int:
        tensor = self._engine.tensors[name]
        return volume(self._shapes[name]) * int(_BYTES[tensor.dtype])

    def _check_inputs(self) -> bool:
        for tensor in self._plan.inputs:
            address = self._addresses.get(tensor.name, 0)
            if not address:
                return self._error("enqueueV3", f"Address is not set for input {tensor.name}.")
            if not tensor.is_shape:
                self.state.cuda.check_device_range(address, self._size(tensor.name), tensor.name)
        return True

    def _check_outputs(self) -> bool:
        ranges = {
            name: (self._addresses[name], self._size(name))
            for name in self._engine.input_names
            if not self._engine.tensors[name].is_shape
        }
        for tensor in self._plan.outputs:
            name = tensor.name
            address = self._addresses.get(name, 0)
            allocator = self._allocators.get(name)
            if not address and allocator is None:
                return self._error("enqueueV3", f"Address is not set for output {name}.")
            if allocator is not None:
                continue
            size = self._output_bytes(tensor)
            self.state.cuda.check_device_range(address, size, name)
            alias = self._plan.aliases.get(name)
            if alias is not None and address != self._addresses[alias]:
                return self._error(
                    "enqueueV3",
                    f"{name} is aliased to {alias}: both must have the same address",
                )
            for other, (start, length) in ranges.items():
                if other != alias and address < start + length and start < address + size:
                    raise self.state.cuda.misuse(f"output {name} overlaps {other}")
            ranges[name] = (address, size)
        return True

    def _output_bytes(self, tensor: TensorInfo) -> int:
        shape = self.get_tensor_shape(tensor.name)
        if -1 in tuple(shape):
            return self.get_max_output_size(tensor.name)
        return volume(shape) * int(_BYTES[tensor.dtype])

    def _enqueue(self, stream: int) -> bool:
        cuda = self.state.cuda
        allocators = {n: a for n, a in self._allocators.items() if a is not None}
        run = Run(
            self.state,
            self._engine,
            dict(self._shapes),
            dict(self._addresses),
            {t.name: self._values(t.name) for t in self._plan.inputs if t.is_shape},
            allocators,
            stream,
        )
        if cuda.is_capturing(stream):
            cuda.enqueue(stream, run)
            return True
        pending = self._pending
        pending.count += 1

        def counted() -> None:
            pending.count -= 1
            run()

        cuda.enqueue(stream, counted)
        if allocators:  # sizes must be known before the call returns
            cuda.cudaStreamSynchronize(stream)
        return True


@dataclass
class Run:
    """One run of an engine, as it was when it was enqueued."""

    state: State
    engine: Engine
    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    values: dict[str, Any]
    """Of shape tensors, which are read from host memory when work is enqueued."""
    allocators: dict[str, Any]
    stream: int

    def __call__(self) -> None:
        outputs = self.engine.program({t.name: self._input(t) for t in self.engine.plan.inputs})
        self.state.executions.append(self.engine.plan.name)
        for tensor in self.engine.plan.outputs:
            value = outputs[tensor.name]
            assert value.dtype == _NUMPY[tensor.dtype], tensor.name
            self._write(tensor.name, value)

    def _input(self, tensor: TensorInfo) -> Any:
        name = tensor.name
        if name in self.values:
            return self.values[name]
        size = volume(self.shapes[name]) * int(_BYTES[tensor.dtype])
        self.state.cuda.check_device_range(self.addresses[name], size, f"{name} when it ran")
        return read(self.addresses[name], self.shapes[name], tensor.dtype)

    def _write(self, name: str, value: Any) -> None:
        address = self.addresses.get(name, 0)
        if name in self.allocators:
            address = self._allocate(name, address, max(1, value.nbytes))
            self.allocators[name].notify_shape(name, DimsValue(value.shape))
        self.state.cuda.check_device_range(address, value.nbytes, f"{name} when it ran")
        ctypes.memmove(address, value.tobytes(), value.nbytes)

    def _allocate(self, name: str, address: int, size: int) -> int:
        allocator = self.allocators[name]
        if hasattr(allocator, "reallocate_output_async"):
            arguments = (name, address, size, ALIGNMENT, self.stream)
            return int(allocator.reallocate_output_async(*arguments) or 0)
        return int(allocator.reallocate_output(name, address, size, ALIGNMENT) or 0)


def read(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Copy of an array that lies at an address."""
    kind = np.dtype(_NUMPY[dtype])
    data = ctypes.string_at(address, volume(shape) * kind.itemsize)
    return np.frombuffer(data, kind).reshape(shape)


IMPLEMENTATIONS: tuple[type[Part], ...] = (Runtime, Engine, Context)
