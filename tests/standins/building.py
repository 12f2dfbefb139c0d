"""From an ONNX file to an engine file: builder, network, parser, profiles, configuration.

Refusals and their texts are those of TensorRT for RTX 1.7, where the same mistakes were tried.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import onnx

from tests.standins import onnx_model
from tests.standins.api import DimsValue
from tests.standins.onnx_model import ParseFailure
from tests.standins.plan import Plan, TensorInfo
from tests.standins.plugins import PluginRegistry
from tests.standins.refusals import refusals
from tests.standins.state import Part, State

_TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT32: "INT32", onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.BFLOAT16: "BF16", onnx.TensorProto.INT8: "INT8",
}  # fmt: skip
_LAYER_TYPES = {
    "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX", "Cast": "CAST",
    "Gather": "GATHER", "Concat": "CONCATENATION", "Reshape": "SHUFFLE", "Transpose": "SHUFFLE",
    "Slice": "SLICE", "Shape": "SHAPE", "LayerNormalization": "NORMALIZATION",
    "RMSNormalization": "NORMALIZATION", "TopK": "TOPK", "Relu": "ACTIVATION",
    "RotaryEmbedding": "ROTARY_EMBEDDING", "TensorScatter": "KV_CACHE_UPDATE",
}  # fmt: skip
_PHASES = (
    # (phase, parent, steps) as TensorRT for RTX 1.7 goes through them
    ("Building engine", None, 6),
    ("Cloning network graph", "Building engine", 3),
    ("Preparing graph for optimization", "Building engine", 4),
    ("Building engine from subgraph", "Building engine", 1),
    ("Optimizing graph", "Building engine from subgraph", 30),
    ("Computing profile costs", "Building engine from subgraph", 5),
    ("Timing tactics", "Computing profile costs", 3),
    ("Timing graph nodes", "Timing tactics", 3),
)


class Tensor(Part):
    API = "ITensor"

    def __init__(self, info: TensorInfo, *, is_input: bool, shape_only: bool) -> None:
        self._info = info
        self.name = info.name
        self.dtype = self.state.member("DataType", info.dtype)
        self.is_shape_tensor = info.is_shape
        self.is_execution_tensor = not shape_only
        self.is_network_input = is_input
        self.is_network_output = not is_input
        self.allowed_formats = 1

    @property
    def shape(self) -> Any:
        return DimsValue(self._info.runtime_shape)

    def get_dimension_name(self, index: int) -> str:
        axis = self._info.shape[index]
        return axis if isinstance(axis, str) and not axis.startswith("?") else ""


class Attention(Part):
    API = "IAttention"

    def __init__(self, name: str) -> None:
        self.name = name
        self.decomposable = False


class Layer(Part):
    API = "ILayer"

    def __init__(self, name: str, kind: str, inputs: int, outputs: int) -> None:
        self.name = name
        self.type = self.state.member("LayerType", kind)
        self.num_inputs = inputs
        self.num_outputs = outputs
        self.metadata = f"[ONNX Layer: {name}]"


class AttentionLayer(Layer):
    def __init__(self, name: str, elem_type: int) -> None:
        super().__init__(f"{name}_AttentionOutput", "ATTENTION_OUTPUT", 1, 1)
        self.attention = self.make(Attention, name)
        self.elem_type = elem_type


class Network(Part):
    API = "INetworkDefinition"

    def __init__(self, builder: Any, flags: int) -> None:
        self.builder = builder
        self.flags = flags
        self.name = "Unnamed Network 0"
        self.error_recorder: Any = None
        self.model: Any = None
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.layers: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_strongly_typed(self) -> bool:
        bit = 1 << int(self.state.member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"))
        return self.state.is_rtx or self.state.numbers[0] >= 11 or bool(self.flags & bit)

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def get_input(self, index: int) -> Any:
        return self._at(self.inputs, index, "getInput")

    def get_output(self, index: int) -> Any:
        return self._at(self.outputs, index, "getOutput")

    def get_layer(self, index: int) -> Any:
        return self._at(self.layers, index, "getLayer")

    def __getitem__(self, index: int) -> Any:
        return self.get_layer(index)

    def __len__(self) -> int:
        return len(self.layers)

    def _at(self, values: list[Any], index: int, function: str) -> Any:
        if 0 <= index < len(values):
            return values[index]
        self.state.error(
            f"INetworkDefinition::{function}: Error Code 3: API Usage Error (Parameter check"
            f" failed, condition: (0) <= (index). Invalid index: {index})"
        )
        return None

    def fill(self, model: Any) -> None:
        graph = model.graph
        self.model = model
        values = onnx_model.shape_inputs(graph)
        initializers = {tensor.name for tensor in graph.initializer}
        for value in graph.input:
            if value.name not in initializers:
                info = tensor_info(value, is_shape=value.name in values)
                only = onnx_model.is_shape_only(graph, value.name)
                self.inputs.append(self.make(Tensor, info, is_input=True, shape_only=only))
        for value in graph.output:
            info = tensor_info(value)
            self.outputs.append(self.make(Tensor, info, is_input=False, shape_only=False))
        types = iter(onnx_model.attention_types(model))
        for node in graph.node:
            if node.op_type == "Attention":
                self.layers.append(
                    self.make(Layer, f"{node.name}_AttentionInput", "ATTENTION_INPUT", 3, 1)
                )
                self.layers.append(self.make(AttentionLayer, node.name, next(types)))
                continue
            kind = _LAYER_TYPES.get(node.op_type, "ELEMENTWISE")
            if node.domain in onnx_model.PLUGIN_DOMAINS:
                kind = "PLUGIN_V3"
            kinds = self.state.module.LayerType.__members__
            kind = kind if kind in kinds else "ELEMENTWISE"
            self.layers.append(self.make(Layer, node.name, kind, len(node.input), len(node.output)))


class ParserError(Part):
    API = "ParserError"

    def __init__(self, failure: ParseFailure) -> None:
        self._failure = failure

    def code(self) -> Any:
        return self.state.member("ErrorCode", self._failure.code)

    def desc(self) -> str:
        return self._failure.text

    def file(self) -> str:
        return "stand-in"

    def line(self) -> int:
        return 0

    def func(self) -> str:
        return "parse"

    def node(self) -> int:
        return self._failure.node

    def node_name(self) -> str:
        return self._failure.node_name

    def node_operator(self) -> str:
        return self._failure.operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __str__(self) -> str:
        f = self._failure
        return (
            f"In node {f.node} with name: {f.node_name} and operator: {f.operator}:"
            f" {f.code}: {f.text}"
        )

    __repr__ = __str__


class OnnxParser(Part):
    API = "OnnxParser"

    def __init__(self, network: Any, logger: Any) -> None:
        self.state.use_logger(logger)
        self._network = network
        self._errors: list[Any] = []
        self.flags = 0

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        if 0 <= index < len(self._errors):
            return self._errors[index]
        self.state.error(f"vector::_M_range_check: __n (which is {index})")
        return None

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        return op_name in self.state.operators().names

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def parse_from_file(self, model: str) -> bool:
        try:
            return self._parse(onnx_model.load(model))
        except OSError as error:
            text = f"Input file cannot be found, or is not a regular file: {model} ({error})"
            return self._fail([ParseFailure("INVALID_VALUE", f"Assertion failed: {text}")])
        except ValueError as error:
            return self._fail([ParseFailure("MODEL_DESERIALIZE_FAILED", str(error))])

    def parse(self, model: Any, path: str | None = None) -> bool:
        if path is not None:
            return self.parse_from_file(path)
        try:
            loaded = onnx.load_from_string(bytes(model))
        except Exception:  # protobuf's DecodeError lies in several places
            text = "Failed to parse the ONNX model."
            return self._fail([ParseFailure("MODEL_DESERIALIZE_FAILED", text)])
        return self._parse(loaded)

    def _parse(self, model: Any) -> bool:
        if not model.HasField("graph"):
            text = "Failed to parse the ONNX model."
            return self._fail([ParseFailure("MODEL_DESERIALIZE_FAILED", text)])
        if self.state.is_rtx and any(
            node.domain not in ("", "ai.onnx") for node in onnx_model.nodes(model.graph)
        ):
            # the real parser aborts the process
            raise self.state.cuda.misuse("a plugin node reached the parser of TensorRT for RTX")
        registry = self._network.builder.registry
        found = onnx_model.failures(model, self.state.operators(), registry.has)
        if found:
            return self._fail(found)
        self._network.fill(model)
        return True

    def _fail(self, found: list[ParseFailure]) -> bool:
        for failure in found:
            self._errors.append(self.make(ParserError, failure))
            self.state.error(str(self._errors[-1]))
        return False


class OptimizationProfile(Part):
    API = "IOptimizationProfile"

    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.values: dict[str, list[list[int]]] = {}
        self.extra_memory_target = 1.0

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        given = {"min": tuple(min), "opt": tuple(opt), "max": tuple(max)}
        for side, shape in given.items():
            if len(shape) > 8 or any(axis < 0 for axis in shape):
                raise RuntimeError(f"Shape provided for {side} is inconsistent with other shapes.")
        self.shapes[input] = [tuple(int(a) for a in shape) for shape in given.values()]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
        values = [list(map(int, v)) for v in (min, opt, max)]
        limit = 2**31 if self.state.numbers < (10, 11) and not self.state.is_rtx else 2**63
        for side, numbers in zip(("min", "opt", "max"), values, strict=True):
            if any(not -limit <= number < limit for number in numbers):
                raise TypeError("set_shape_input(): incompatible function arguments.")
            if len(numbers) != len(values[0]):
                raise RuntimeError(
                    f"{side} input provided for shape tensor is inconsistent with other inputs."
                )
        self.values[input] = values

    def get_shape(self, input: str) -> list[Any]:
        if input not in self.shapes:
            self.state.error(
                "IOptimizationProfile::getDimensions: Error Code 4: API Usage Error (Cannot"
                f" get dimensions for input: {input}.)"
            )
            return []
        return [DimsValue(shape) for shape in self.shapes[input]]

    def get_shape_input(self, input: str) -> list[list[int]]:
        return self.values.get(input, [])

    def __bool__(self) -> bool:
        ranges: dict[str, Any] = {**self.shapes, **self.values}
        for name, (low, opt, high) in ranges.items():
            if len({len(low), len(opt), len(high)}) > 1 or not all(
                a <= b <= c for a, b, c in zip(low, opt, high, strict=True)
            ):
                self.state.error(
                    "IOptimizationProfile::isValid: Error Code 4: API Usage Error (Invalid"
                    f" optimization profiles for input tensors {name}, please ensure that the"
                    " optimization profiles satisfy MIN<=OPT<=MAX.)"
                )
                return False
        return True

    __nonzero__ = __bool__


class TimingCache(Part):
    API = "ITimingCache"

    def __init__(self, entries: dict[str, str], key: str) -> None:
        self.entries = entries
        self.key = key

    def serialize(self) -> Any:
        return self.state.host_memory(
            json.dumps({"key": self.key, "entries": self.entries}).encode()
        )

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if input_cache.key != self.key and not ignore_mismatch:
            return False
        self.entries.update(input_cache.entries)
        return True

    def reset(self) -> bool:
        self.entries.clear()
        return True


class BuilderConfig(Part):
    API = "IBuilderConfig"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.profiles: list[Any] = []
        self.flags = 1 << int(self.state.member("BuilderFlag", "TF32"))
        self.progress_monitor: Any = None
        self.builder_optimization_level = 3
        self.profiling_verbosity = self.state.member("ProfilingVerbosity", "LAYER_NAMES_ONLY")
        self.hardware_compatibility_level = self.state.member("HardwareCompatibilityLevel", "NONE")
        self.engine_capability = self.state.member("EngineCapability", "STANDARD")
        self.runtime_platform = self.state.member("RuntimePlatform", "SAME_AS_BUILD")
        self.plugins_to_serialize: list[str] = []
        self.max_aux_streams = -1
        self.avg_timing_iterations = 1
        self.max_num_tactics = -1
        self.profile_stream = 0
        self._pools: dict[int, int] = {}
        self._cache: Any = None
        self._features: set[int] = set()
        self._targets: list[Any] = []

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def add_optimization_profile(self, profile: Any) -> int:
        if not profile:
            self.state.error(
                "IBuilderConfig::addOptimizationProfile: Error Code 3: API Usage Error"
                " (Parameter check failed, condition: profile->isValid().)"
            )
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[int(pool)] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(int(pool), self.state.cuda.total_memory)

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        change = self._features.add if enable else self._features.discard
        change(int(feature))

    def get_preview_feature(self, feature: Any) -> bool:
        return int(feature) in self._features

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        data = bytes(serialized_timing_cache)
        if not data:
            return self.make(TimingCache, {}, cache_key(self.state))
        try:
            values = json.loads(data)
            return self.make(TimingCache, dict(values["entries"]), str(values["key"]))
        except (ValueError, KeyError, TypeError):
            self.state.error(
                "IBuilderConfig::createTimingCache: Error Code 4: Internal Error (The timing"
                " cache is corrupted.)"
            )
            return None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache is None:
            self._cache = None
            return True
        if cache.key != cache_key(self.state) and not ignore_mismatch:
            self.state.error(
                "IBuilderConfig::setTimingCache: Error Code 4: API Usage Error (The timing"
                f" cache was created for {cache.key}, this is {cache_key(self.state)}.)"
            )
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._targets = [None] * count

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        if not 0 <= index < len(self._targets):
            self.state.error(f"setComputeCapability: index {index} of {len(self._targets)}")
            return False
        self._targets[index] = compute_capability
        return True

    def get_compute_capability(self, index: int) -> Any:
        return self._targets[index]

    @property
    def targets(self) -> tuple[str, ...]:
        names = tuple(f"sm{t.name.removeprefix('SM')}" for t in self._targets if t is not None)
        return names or (self.state.cuda.sm,)


class Builder(Part):
    API = "Builder"

    def __init__(self, logger: Any) -> None:
        self.state.use_logger(logger)
        if not self.state.is_rtx:
            self.state.need_device("createInferBuilder")
        self._logger = logger
        self.max_threads = 1
        self.error_recorder: Any = None
        self.num_DLA_cores = 0
        self.max_DLA_batch_size = 4096
        self.platform_has_fast_fp16 = True
        self.platform_has_fast_int8 = True
        self.platform_has_tf32 = self.state.cuda.compute_capability >= (8, 0)
        self.registry = PluginRegistry(self.state, parent=self.state.registry)

    @property
    def logger(self) -> Any:
        return self._logger

    def get_plugin_registry(self) -> Any:
        return self.registry

    def create_network(self, flags: int = 0) -> Any:
        return self.make(Network, self, int(flags))

    def create_builder_config(self) -> Any:
        return self.make(BuilderConfig)

    def create_optimization_profile(self) -> Any:
        return self.make(OptimizationProfile)

    def reset(self) -> None:
        return None

    def is_network_supported(self, network: Any, config: Any) -> bool:
        return next(refusals(network, config), None) is None

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        for severity, text in self.state.build_messages:
            self.state.log(severity, text)
        problem = next(refusals(network, config), None)
        if problem is None:
            problem = run_phases(config.progress_monitor, self.state.module.IProgressMonitor)
        if problem is not None:
            self.state.error(f"IBuilder::buildSerializedNetwork: {problem}")
            return None
        plan = plan_of(network, config)
        if config.get_timing_cache() is not None:
            entry = hashlib.sha256(plan.model).hexdigest()
            config.get_timing_cache().entries[entry] = network.name
        return self.state.host_memory(plan.pack())


def cache_key(state: State) -> str:
    """What a timing cache is good for."""
    return f"{state.package} {state.version} {state.cuda.sm}"


def tensor_info(value: Any, *, is_shape: bool = False) -> TensorInfo:
    dtype = _TYPES[value.type.tensor_type.elem_type]
    return TensorInfo(value.name, dtype, onnx_model.dims(value), is_shape)


def plan_of(network: Any, config: Any) -> Plan:
    model = network.model
    plugins = []
    for node in model.graph.node:
        if node.domain in onnx_model.PLUGIN_DOMAINS:
            known = onnx_model.attributes(node)
            plugins.append(
                (node.op_type, known.get("plugin_version", "1"), known["plugin_namespace"])
            )
    return Plan(
        network.state.package,
        network.state.version,
        config.targets,
        network.name,
        tuple(tensor._info for tensor in network.inputs),
        tuple(tensor._info for tensor in network.outputs),
        tuple(
            {
                **{name: [list(s) for s in shapes] for name, shapes in p.shapes.items()},
                **p.values,
            }
            for p in config.profiles
        ),
        onnx_model.aliases(model.graph),
        tuple(plugins),
        model.SerializeToString(),
    )


def run_phases(monitor: Any, interface: Any) -> str | None:
    """Drive a progress monitor; return the error of a build that was cancelled."""
    if monitor is None:
        return None
    for name in ("phase_start", "step_complete", "phase_finish"):
        if getattr(type(monitor), name) is getattr(interface, name):
            raise RuntimeError(f'Tried to call pure virtual function "IProgressMonitor::{name}"')
    started: list[str] = []
    cancelled = False

    def call(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:  # C++ cannot pass it on
            print(f"[ERROR] Exception caught in {function.__name__}(): {error!r}", file=sys.stderr)
            return False

    children: dict[str | None, list[tuple[str, int]]] = {}
    for name, parent, steps in _PHASES:
        children.setdefault(parent, []).append((name, steps))

    def phase(name: str, parent: str | None, steps: int) -> None:
        nonlocal cancelled
        call(monitor.phase_start, name, parent, steps)
        started.append(name)
        inner = list(children.get(name, []))
        for step in range(steps):
            if inner and not cancelled:
                child, child_steps = inner.pop(0)
                phase(child, name, child_steps)
            if cancelled:
                break
            answer = call(monitor.step_complete, name, step)
            if answer is not True and answer is not False:
                print(f"[ERROR] step_complete returned {answer!r}, no bool", file=sys.stderr)
                answer = False
            cancelled = not answer
        call(monitor.phase_finish, name)

    phase(*_PHASES[0])
    return "Error Code 7: BuildCanceled (Build canceled by user)" if cancelled else None


IMPLEMENTATIONS: tuple[type[Part], ...] = (
    Tensor, Attention, Layer, AttentionLayer, Network, ParserError, OnnxParser,
    OptimizationProfile, TimingCache, BuilderConfig, Builder,
)  # fmt: skip
