"""ONNX file to serialized engine, for TensorRT and TensorRT for RTX alike.

Runs in a process of its own (`worker`): the libraries abort on some inputs, and keep memory.
Both have the same Python API; the module is passed in as `trt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from stts_export.engines import cuda
from stts_export.engines.plugin import load_plugin
from stts_export.errors import InputError, MissingDependencyError
from stts_export.files import whole
from stts_export.tensors import GraphSpec, Profile, Range, TensorSpec

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
# What the libraries say on a machine without a GPU whatever they are asked to do.
_NO_GPU = "cudaError 35"
# Phrases of the libraries, each with what helps.
_REMEDIES = (
    (
        ("workspace limit", "insufficient workspace"),
        "allow more with --memory-limit, or build for shorter clips: --max-frames, --max-tokens",
    ),
    (
        ("out of memory", "OutOfMemory", "bad_alloc"),
        "free memory of the GPU, or build for shorter clips: --max-frames, --max-tokens",
    ),
    (
        ("lugin not found", "No importer registered", "importer not found"),
        "use a newer version of it, which may have the operator",
    ),
)


@dataclass(frozen=True)
class EngineJob:
    """One engine to build."""

    module: str
    """Python module of the library: tensorrt or tensorrt_rtx."""
    spec: GraphSpec
    onnx: Path
    engine: Path
    """File to write."""
    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...] = ()
    """Such as SM89; the GPU of this machine when empty."""
    memory_limit: int | None = None
    """Device memory for temporary results of a layer, in bytes; all there is when None."""
    timing_cache: Path | None = None
    """File of measured times: read when it is there, written after the build."""
    plugin: Path | None = None


@dataclass(frozen=True)
class Built:
    """What an engine takes and gives, as the library sees it; shapes have -1 for free axes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    warnings: tuple[str, ...] = field(default=())
    read_back: bool = True
    """Whether the engine was loaded for this; of an engine for another GPU, the network says it."""


OnStep = Callable[[float], bool]
"""Called with the finished fraction; returns False to stop the build."""


def build_engine(trt: Any, job: EngineJob, on_step: OnStep) -> Built:
    """Build an engine and write it; the file is there when it is complete, or not at all.

    Raises:
        InputError: the library refuses the graph or the profiles, runs out of memory, or was told
            to stop; with the library's own words.
    """
    logger = _logger(trt)
    if job.plugin is not None:
        load_plugin(trt, job.plugin)
    builder = _made(partial(trt.Builder, logger), job, logger)
    network, _parser = _parse(trt, builder, job, logger)  # the parser owns the weights
    inputs, outputs = _check_interface(network, job)
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, job, on_step)
    profiles = tuple(
        _add_profile(builder, config, job, profile, logger) for profile in job.profiles
    )
    warnings = _attach_timing_cache(config, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failure("cannot be built", job, logger)
    if job.timing_cache is not None:
        with whole(job.timing_cache) as file:
            file.write_bytes(config.get_timing_cache().serialize())
    with whole(job.engine) as file:
        file.write_bytes(plan)
        if not _loads_here(job):
            _look_for_names(file, job)
            return Built(inputs, outputs, profiles, warnings, read_back=False)
        return replace(_inspect(trt, plan, job, logger), warnings=warnings)


def _logger(trt: Any) -> Any:
    """Make a logger that keeps errors for the message of a failure."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            worst = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            if severity in worst and _NO_GPU not in msg:
                self.errors.append(msg.strip())

    return Collector()


def _made(make: Callable[[], Any], job: EngineJob, logger: Any) -> Any:
    try:
        return make()
    except TypeError as error:  # how the bindings pass on that there is none
        raise _failure("cannot be built", job, logger, (str(error),)) from None


def _failure(
    what: str, job: EngineJob, logger: Any, told: tuple[str, ...] = (), fix: str | None = None
) -> InputError:
    """Make the one error of a failed build from everything that the library said.

    `fix` is for words of the library that no remedy is known for.
    """
    words = list(dict.fromkeys([*told, *logger.errors]))
    said = "; ".join(words) or "the library gave no reason"
    fixes = [fix for phrases, fix in _REMEDIES if any(phrase in said for phrase in phrases)]
    return InputError(
        f"{what} by {job.module}: {said}", where=str(job.onnx), fix="; ".join(fixes) or fix
    )


def _parse(trt: Any, builder: Any, job: EngineJob, logger: Any) -> tuple[Any, Any]:
    # TensorRT 10 has to be told; in TensorRT 11 and RTX networks are strongly typed anyway.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.onnx)):  # from a file, so that weights are found
        fix = f"build the bundle again with this stts-export, or use another {job.module}"
        raise _failure("cannot be read", job, logger, tuple(_parser_errors(parser)), fix)
    return network, parser


def _parser_errors(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        lines = [line for line in error.desc().splitlines() if _NO_GPU not in line]
        yield f"node {error.node_name()} ({error.node_operator()}): {' '.join(lines)}"


def _check_interface(
    network: Any, job: EngineJob
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Compare the network's inputs and outputs with the contract, and return them."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    got = tuple(_tensor(tensor) for tensor in inputs), tuple(_tensor(tensor) for tensor in outputs)
    for found, expected in zip(got, (job.spec.inputs, job.spec.outputs), strict=True):
        fits = len(found) == len(expected) and all(map(_fits, found, expected))
        if not fits:
            raise InputError(
                f"has {', '.join(map(_text, found))}",
                where=str(job.onnx),
                allowed=", ".join(map(_text, expected)),
                fix="build the bundle again with this version of stts-export",
            )
    return got


def _tensor(tensor: Any) -> TensorSpec:
    return TensorSpec(
        tensor.name, _dtype(tensor.dtype), tuple(tensor.shape), bool(tensor.is_shape_tensor)
    )


def _dtype(dtype: Any) -> str:
    return _DTYPES.get(dtype.name, str(dtype.name))


def _fits(found: TensorSpec, expected: TensorSpec) -> bool:
    """Whether a network tensor is the contract's; an output's axis may be known more narrowly."""
    return (
        (found.name, found.dtype) == (expected.name, expected.dtype)
        and len(found.shape) == len(expected.shape)
        and found.is_shape <= expected.is_shape
        and all(
            have in (-1, want) or isinstance(want, str)
            for have, want in zip(found.shape, expected.shape, strict=True)
        )
    )


def _text(tensor: TensorSpec) -> str:
    values = " (values)" if tensor.is_shape else ""
    return f"{tensor.name} {tensor.dtype}({', '.join(map(str, tensor.shape))}){values}"


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention run as several kernels where no fused one fits (fp32 has none)."""
    if not hasattr(trt, "IAttentionOutputLayer"):
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, job: EngineJob, on_step: OnStep) -> None:
    # TF32 rounds fp32 products to 10 bits, which moves scores as fp16 does.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.progress_monitor = _monitor(trt, on_step)
    if job.memory_limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.memory_limit)
    if job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
        for index, name in enumerate(job.compute_capabilities):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                raise InputError(f"does not build for {name}", where=job.module)


@dataclass
class Phase:
    """A phase of a build and how far it is; phases are nested."""

    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Turns the library's nested phases into one fraction that never falls."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase."""
        self._phases[name] = Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> float:
        """Finish a step (counted from 0) of a phase; return the fraction of the whole."""
        if name in self._phases:
            self._phases[name].done = step + 1
        roots = (name for name, phase in self._phases.items() if phase.parent is None)
        self._fraction = max([self._fraction, *map(self._of, roots)])
        return min(self._fraction, 1.0)

    def finish(self, name: str) -> None:
        """End a phase."""
        phase = self._phases.get(name)
        if phase is not None and phase.parent is not None:
            del self._phases[name]

    def _of(self, name: str) -> float:
        phase = self._phases[name]
        inner = sum(self._of(n) for n, child in self._phases.items() if child.parent == name)
        return min((phase.done + min(inner, 1.0)) / phase.steps, 1.0)


def _monitor(trt: Any, on_step: OnStep) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._tree = PhaseTree()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tree.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return on_step(self._tree.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            self._tree.finish(phase_name)

    return Monitor()


def _add_profile(
    builder: Any, config: Any, job: EngineJob, ranges: Profile, logger: Any
) -> Profile:
    profile = builder.create_optimization_profile()
    profile.extra_memory_target = 0  # no weights of its own beside those of the first
    shape_tensors = {tensor.name for tensor in job.spec.inputs if tensor.is_shape}
    try:
        for name, values in ranges.items():
            add = profile.set_shape_input if name in shape_tensors else profile.set_shape
            add(name, values.min, values.opt, values.max)
    except (ValueError, RuntimeError, TypeError) as error:
        raise _failure("has a profile that is refused", job, logger, (str(error),)) from None
    if config.add_optimization_profile(profile) < 0:
        raise _failure("has a profile that is refused", job, logger)
    return ranges


def _attach_timing_cache(config: Any, job: EngineJob) -> tuple[str, ...]:
    """Start from the times measured before; return a warning when they are of no use."""
    if job.timing_cache is None:
        return ()
    try:
        stored = job.timing_cache.read_bytes()
    except FileNotFoundError:
        stored = b""
    cache = config.create_timing_cache(stored)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return ()
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return (f"{job.timing_cache} is damaged or of another GPU or TensorRT: measured again",)


def _loads_here(job: EngineJob) -> bool:
    """Whether the engine is for this machine's GPU."""
    if not job.compute_capabilities:
        return True
    try:
        major, minor = cuda.compute_capability()
    except MissingDependencyError:
        return False
    return f"SM{major}{minor}" in job.compute_capabilities


def _look_for_names(file: Path, job: EngineJob) -> None:
    """Check that an engine that cannot be loaded here has the tensors of the contract."""
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as plan:
        tensors = (*job.spec.inputs, *job.spec.outputs)
        missing = [tensor.name for tensor in tensors if plan.find(tensor.name.encode()) < 0]
    if missing:
        raise InputError(
            f"was built by {job.module} without {', '.join(missing)}", where=str(job.engine)
        )


def _inspect(trt: Any, plan: Any, job: EngineJob, logger: Any) -> Built:
    """Load the engine and read back what it takes and gives."""
    engine = _made(partial(trt.Runtime, logger), job, logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise _failure("was built, but the engine cannot be loaded", job, logger)
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected = {tensor.name for tensor in (*job.spec.inputs, *job.spec.outputs)}
    if names != expected or engine.num_optimization_profiles != max(1, len(job.profiles)):
        raise InputError(
            f"was built by {job.module} with {engine.num_optimization_profiles} profiles of "
            f"{', '.join(sorted(names))}",
            where=str(job.engine),
            allowed=f"{len(job.profiles)} profiles of {', '.join(sorted(expected))}",
        )

    def read(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(
                tensor,
                dtype=_dtype(engine.get_tensor_dtype(tensor.name)),
                shape=tuple(engine.get_tensor_shape(tensor.name)),
            )
            for tensor in tensors
        )

    profiles = tuple(
        {name: _range(engine, name, index, job.spec, asked) for name, asked in profile.items()}
        for index, profile in enumerate(job.profiles)
    )
    return Built(read(job.spec.inputs), read(job.spec.outputs), profiles)


def _range(engine: Any, name: str, profile: int, spec: GraphSpec, asked: Range) -> Range:
    if any(tensor.name == name and tensor.is_shape for tensor in spec.inputs):
        values = engine.get_tensor_profile_values(profile, name)
        if not values:  # the bindings' way to say that there are none to be read
            return asked
    else:
        values = engine.get_tensor_profile_shape(name, profile)
    low, opt, high = (tuple(value) for value in values)
    return Range(low, opt, high)
