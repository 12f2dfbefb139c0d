"""Memory of a build's stages and of a session, part by part.

On ONNX Runtime and for the export it is counted where shapes say it, with factors that were
measured (`benchmarks/bench_estimate.py`). On a GPU it is counted from shapes; nothing was measured.
Axes as in `tensors`: F frames of a chunk, N = W*G patches of a frame, D vision width, H heads,
I inner width of a feed-forward, C decoder width, L tokens of a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from stts_export.calibration.formats import needs_engines
from stts_export.calibration.layers import Format, input_groups
from stts_export.calibration.recipe import LayerRule, Recipe
from stts_export.config import ModelConfig
from stts_export.engines.library import BACKENDS, ONNXRUNTIME, TENSORRT
from stts_export.engines.onnxruntime import COPIES, ROOM, converts_weights
from stts_export.errors import InputError
from stts_export.limits import DEFAULT_MAX_FRAMES
from stts_export.probe import CHECKED_FRAMES
from stts_export.sizes import BYTES, Tensor, Weights, cache_bytes
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    GATHER_WINDOWS,
    LOWER_CHUNK,
    SCORES,
    SELECT_PACK,
    UPPER_CHUNK,
    VISION_LOWER,
    VISION_UPPER,
    Precision,
)

_FLOAT = 4
ENGINE_CODE = 6_000_000
"""Of an engine beside its weights; 5 to 6 MB in `benchmarks/results/engine_build_cpu.json`."""
_BUILDER = (250_000_000, 3.35)
"""Bytes of an engine build, and per byte of its weights: the two builds of TensorRT for RTX in that
file are on this line. TensorRT is taken to be alike."""


@dataclass(frozen=True)
class Part:
    """A part of a session's memory."""

    name: str
    bytes: int
    when: str = "always"
    """"always"; from the first call on ("called"), or only while a session is opened ("open"), a
    clip is encoded ("encode"), or an answer is made ("answer")."""


def peak(parts: Iterable[Part]) -> int:
    """Memory of a session at its peak."""
    held = dict.fromkeys(("always", "called", "open", "encode", "answer"), 0)
    for part in parts:
        held[part.when] += part.bytes
    running = held["called"] + max(held["encode"], held["answer"])
    return held["always"] + max(held["open"], running)


@dataclass(frozen=True)
class Stage:
    """A step of a build."""

    name: str
    memory: int
    """Bytes of memory at its peak, of the process and what it starts; not the files it reads, which
    the system can drop."""
    disk: int
    """Bytes that it adds to the output."""
    is_counted: bool = True
    """Whether its memory follows from what it holds; that of an engine's builder is drawn from a
    few builds, which is no reason to refuse one."""


@dataclass(frozen=True)
class Settings:
    """What is planned; see `BuildSpec` for the words."""

    recipe: Recipe = field(default_factory=lambda: Recipe.plain("fp32"))
    max_frames: int = DEFAULT_MAX_FRAMES
    max_tokens: int | None = None
    """What the longest clip needs when None."""
    min_prune_ratio: float = 0.0
    backend: str = ONNXRUNTIME
    decomposed: bool = False
    """Whether engines are built from the decomposed graphs, for TensorRT before 10.15."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(
                f"back end {self.backend!r}", where="estimate", allowed=" or ".join(BACKENDS)
            )
        for name, value in (("max_frames", self.max_frames), ("max_tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}", where="estimate", allowed="1 or more")
        if not 0 <= self.min_prune_ratio < 1:
            raise InputError(
                f"min_prune_ratio is {self.min_prune_ratio}", where="estimate", allowed="[0, 1)"
            )


@dataclass(frozen=True)
class Plan:
    """What memory follows from."""

    config: ModelConfig
    settings: Settings
    tokens: int
    windows: int
    rules: dict[str, LayerRule] = field(repr=False)
    """Of layers whose format is not the base."""
    held: dict[str, Weights] = field(repr=False)
    tied: bool
    room: int | None = None
    """Memory that a session finds free on ONNX Runtime; enough for copies of weights when None."""
    free: int | None = None
    """Memory that a build finds free; enough for all weights in fp32 when None."""

    @property
    def precision(self) -> Precision:
        """Type of the graphs."""
        return self.settings.recipe.base

    @property
    def size(self) -> int:
        """Bytes of an activation in the graphs' type."""
        return BYTES[self.precision]

    @property
    def is_quantised(self) -> bool:
        """Whether scales have to be found."""
        return self.settings.recipe.needs_scales(self.rules.values())

    @property
    def cache(self) -> int:
        """Bytes of the keys and values of the longest sequence."""
        kv_cache = self.settings.recipe.kv_cache
        return cache_bytes(self.config, self.precision, self.tokens, kv_cache)

    @property
    def patches(self) -> int:
        """N: patches of a frame."""
        return self.config.vision.windows * self.config.vision.patches_per_window

    @property
    def lower_frames(self) -> int:
        """Frames of a call of vision_lower."""
        return min(LOWER_CHUNK, self.settings.max_frames)

    @property
    def upper_bins(self) -> int:
        """Bins of a call of vision_upper."""
        return min(UPPER_CHUNK, self.settings.max_frames)

    @property
    def hidden(self) -> int:
        """Bytes of what the lower part of the tower leaves of a clip."""
        width = self.config.vision.hidden_size
        return self.settings.max_frames * self.patches * width * self.size

    @property
    def pixels(self) -> int:
        """Bytes of a clip's frames at the model's size."""
        height, width = self.config.vision.image_size
        return self.settings.max_frames * height * width * 3

    @property
    def features(self) -> int:
        """Bytes of a clip's features."""
        return self.windows * self.config.text.hidden_size * self.size


def plain_engines(backend: str) -> tuple[str, ...]:
    """Engines without weights."""
    return (SELECT_PACK, GATHER_WINDOWS) if backend == TENSORRT else (GATHER_WINDOWS,)


# --- A session on a CPU -------------------------------------------------------------------------

PROCESS = 42_000_000
"""Python with NumPy, PyAV, tokenizers and ONNX Runtime, before a bundle is opened."""
GPU_HOST = 700_000_000
"""What CUDA's context and TensorRT's libraries hold of the host's memory; from NVIDIA's forums, not
measured here."""
_TURN = 1.6
"""Memory of a turn of the decoder's attention, per score of it."""
_CASTS = 1.16
_CONVERTED = 1.9
"""Memory of a prefill whose weights are converted on every call, to that of one whose are not."""
_INT4 = 1.2
"""Bytes of a weight in int4 when it is packed, with its scales."""
_TWICE = 2 * _FLOAT
"""Bytes of a weight in 8 bits while it is converted to fp32; of an fp16 graph, where it becomes
fp16 first, twice as many. `benchmarks/bench_estimate.py` compares quantised models as well."""
_ARENA = 1.25
"""Memory that ONNX Runtime's arena holds, per byte that is in use at the peak of a call."""


def cpu_parts(plan: Plan) -> Iterator[Part]:
    """Memory of a process that runs a bundle on ONNX Runtime's CPU provider.

    What a call has used stays with the graph, for the next one. Not so where weights stay in their
    file: there no arena is kept, and fp16 weights of an operator are converted when it runs. Nor
    where 8-bit weights are converted on every call.
    """
    lean = lean_graphs(plan)
    formats = {rule.format for rule in plan.rules.values()}
    unkept = set(_SESSION_GRAPHS) if converts_weights(plan.precision, formats) else lean
    text, half = plan.config.text, plan.precision == "fp16"
    yield Part("Python and libraries", PROCESS)
    for name in _SESSION_GRAPHS:
        yield Part(f"{name}: weights", _copies(plan, name, lean=name in lean))
    if half and DECODER not in lean:  # it is packed while its conversion is held
        yield Part(f"{DECODER}: output head, converted", _head(plan), "open")
    yield Part("frames", plan.pixels, "encode")
    yield Part("hidden states of the clip", plan.hidden, "encode")
    for name, count, unit, call in (
        (VISION_LOWER, plan.lower_frames, "frames", _cpu_lower(plan)),
        (VISION_UPPER, plan.upper_bins, "bins", _cpu_upper(plan)),
    ):
        title = f"{name}: a call of {count} {unit}"
        if name in unkept:
            yield Part(title, int(call + _largest_product(plan, name)), "encode")
        else:
            yield Part(title, int(call * _ARENA), "called")
    yield Part("features", plan.features, "called")
    yield Part(f"KV cache of {plan.tokens} tokens", plan.cache, "answer")
    title, call = f"{DECODER}: prefill of {plan.tokens} tokens", _cpu_prefill(plan)
    if DECODER not in unkept:
        yield Part(title, int(call * _ARENA), "called")
        return
    if DECODER not in lean:
        call = int(call * _CONVERTED)
    at_head = plan.tokens * text.hidden_size * _FLOAT + (_head(plan) if half else 0)
    yield Part(title, max(call + _largest_product(plan, DECODER), at_head), "answer")


_SESSION_GRAPHS = (VISION_LOWER, VISION_UPPER, DECODER)
"""What a session opens, in this order."""


def lean_graphs(plan: Plan) -> frozenset[str]:
    """Graphs whose weights a session leaves in their file; see `onnxruntime.open_graph`."""
    if plan.room is None:
        return frozenset()
    lean, free = set(), plan.room - PROCESS
    for graph in _SESSION_GRAPHS:
        if COPIES * plan.held[graph].nbytes(plan.precision) > ROOM * free:
            lean.add(graph)
        else:
            free -= _copies(plan, graph)
    return frozenset(lean)


def _copies(plan: Plan, graph: str, *, lean: bool = False) -> int:
    """Bytes of a graph's weights when all matrices are packed to be multiplied.

    Those in int4 are packed even where the others stay in their file.
    """
    tensors = [t for t in plan.held[graph].tensors if not lean or t.format == "int4"]
    held = sum(_copy(plan, tensor) for tensor in tensors)
    return held + (_head(plan) if graph == DECODER and plan.tied and not lean else 0)


def _copy(plan: Plan, tensor: Tensor) -> int:
    """Bytes in memory of a tensor, which the CPU multiplies in fp32 if it is no integer.

    Tables are read from their file, whose pages the system can drop, and so are weights that are
    converted on every call. Scales count as a part of what they scale.
    """
    if tensor.kind in ("table", "scale") or (tensor.format and _converts(plan, tensor.format)):
        return 0
    if tensor.format == "int4":
        return int(tensor.count * _INT4)
    return tensor.count * (1 if tensor.format == "int8" else _FLOAT)


def _converts(plan: Plan, stored: Format) -> bool:
    return converts_weights(plan.precision, (stored,))


def _head(plan: Plan) -> int:
    """Bytes in fp32 of what the head multiplies with: of a tied one the whole table."""
    text = plan.config.text
    rows = text.vocab_size + (text.additional_vocab_size if plan.tied else 0)
    return rows * text.hidden_size * _FLOAT


def _largest_product(plan: Plan, graph: str) -> int:
    """Bytes of the largest matrix that is converted for a call, but for the head."""
    matrices = (t for t in plan.held[graph].tensors if t.transposed and t.format != "fp32")
    return max((_conversion(plan, tensor) for tensor in matrices), default=0)


def _conversion(plan: Plan, tensor: Tensor) -> int:
    """Bytes that a matrix takes while it is converted to fp32."""
    if tensor.format and _converts(plan, tensor.format):
        return tensor.count * (_TWICE if plan.precision == "fp32" else 2 * _TWICE)
    return 0 if plan.precision == "fp32" and tensor.format is None else tensor.count * _FLOAT


def _cpu_lower(plan: Plan) -> int:
    vision = plan.config.vision
    height, width = vision.image_size
    frame = _cpu_block(plan) + 3 * height * width * _FLOAT + plan.patches**2 * _FLOAT
    return int(plan.lower_frames * frame * _casts(plan))


def _cpu_upper(plan: Plan) -> int:
    taps = len(plan.config.vision.taps) * plan.patches * plan.config.vision.hidden_size * _FLOAT
    return int(plan.upper_bins * (_cpu_block(plan) + 2 * taps) * _casts(plan))


def _casts(plan: Plan) -> float:
    """What fp16 adds: the CPU computes in fp32, and holds both."""
    return _CASTS if plan.precision == "fp16" else 1.0


def _cpu_block(plan: Plan) -> int:
    """Bytes of a frame at the peak of a block: inside the attention, which holds all scores."""
    vision, N = plan.config.vision, plan.patches
    inner = vision.num_heads * vision.head_dim
    scores = vision.num_heads * N * N
    attention = 2 * scores + N * (2 * vision.hidden_size + 6 * inner)
    feed_forward = N * (2 * vision.hidden_size + 2 * vision.intermediate_size)
    return max(attention, feed_forward) * _FLOAT


def _cpu_prefill(plan: Plan) -> int:
    """Bytes at the peak of a call on the longest sequence: in the attention or the feed-forward.

    The attention takes the queries in turns of up to `SCORES` scores, which it holds with their
    mask and results.
    """
    text, L = plan.config.text, plan.tokens
    inner, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    scores = min(text.num_heads * L * L, max(SCORES, text.num_heads * L))
    attention = int(_TURN * scores) + L * (2 * text.hidden_size + 3 * inner + kv)
    feed_forward = L * (2 * text.hidden_size + 4 * text.intermediate_size)
    return int(max(attention, feed_forward) * _FLOAT)


# --- A session on a GPU -------------------------------------------------------------------------


def gpu_parts(plan: Plan, engines: dict[str, int]) -> Iterator[Part]:
    """Memory of the GPU that a session's engines, buffers and activations take (see `runner`)."""
    config, vision = plan.config, plan.config.vision
    for name, size in engines.items():
        yield Part(f"{name}: engine", size)
    scratch = max(_gpu_lower(plan), _gpu_upper(plan), _gpu_prefill(plan))
    yield Part("activations, shared by all engines", scratch)
    yield Part("frames of a call", plan.lower_frames * plan.pixels // plan.settings.max_frames)
    yield Part("hidden states of the clip", plan.hidden, "encode")
    if SELECT_PACK in engines:  # its output has room for as many bins as the clip has frames
        yield Part("bins of the clip", plan.hidden)
    else:
        share = plan.upper_bins / plan.settings.max_frames
        yield Part("bins of a call", int(plan.hidden * share), "encode")
    width = config.text.hidden_size + vision.patches_per_window * vision.hidden_size * len(
        vision.taps
    )
    yield Part("results of a call", plan.upper_bins * vision.windows * width * plan.size)
    yield Part("features of a prompt", plan.features, "answer")
    buffers = 2 if plan.settings.decomposed else 1
    yield Part(f"KV cache of {plan.tokens} tokens", buffers * plan.cache, "answer")
    yield Part("logits", config.text.vocab_size * _FLOAT)


def _gpu_block(plan: Plan, residual: int) -> int:
    """Bytes of a frame at the peak of a block whose residual stream has numbers of `residual`."""
    vision, N = plan.config.vision, plan.patches
    inner = vision.num_heads * vision.head_dim
    attention = 4 * N * inner * plan.size
    if plan.settings.decomposed:  # the scores, and their softmax in fp32
        attention += vision.num_heads * N * N * (plan.size + _FLOAT)
    feed_forward = 2 * N * vision.intermediate_size * plan.size
    return 2 * N * vision.hidden_size * residual + max(attention, feed_forward)


def _gpu_lower(plan: Plan) -> int:
    height, width = plan.config.vision.image_size
    frame = _gpu_block(plan, _FLOAT) + 3 * height * width * _FLOAT + plan.patches**2 * plan.size
    return plan.lower_frames * frame


def _gpu_upper(plan: Plan) -> int:
    taps = len(plan.config.vision.taps) * plan.patches * plan.config.vision.hidden_size * plan.size
    return plan.upper_bins * (_gpu_block(plan, plan.size) + 2 * taps + plan.patches**2)


def _gpu_prefill(plan: Plan) -> int:
    text, L = plan.config.text, plan.tokens
    inner, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention = L * (2 * inner + 2 * kv) * plan.size
    if plan.settings.decomposed:
        attention += text.num_heads * L * L * (plan.size + _FLOAT)
    feed_forward = 3 * L * text.intermediate_size * plan.size
    return 2 * L * text.hidden_size * _FLOAT + L * L + max(attention, feed_forward)


# --- A build ------------------------------------------------------------------------------------

_EXPORTER = 360_000_000
"""Python with torch, onnx and the exporter, once a graph was traced."""
WHOLE_MODEL_ROOM = 2
"""A checkpoint is loaded whole where this many times its weights in fp32 are free."""
_CALIBRATOR = 420_000_000
"""Python with torch and modelopt."""
_SAMPLES = 256
"""Rows of a layer's input that calibration samples; `calibration.statistics.ROWS`."""
_TRACED = 3_400_000
"""What stays with the process of each block or layer that was traced. This and the former were
fitted to the stages of `benchmarks/results/full_size_4b.json`."""


def _export_memory(plan: Plan, graph: str) -> int:
    """Bytes at the peak of a graph's export: when it is compared, with a layer in memory at a time.

    Weights go from file to file. PyTorch has a layer of them in fp32, and of a fp16 graph ONNX
    Runtime converts the decoder's head; the two hold them one after the other.
    """
    vision, text = plan.config.vision, plan.config.text
    upper = vision.num_layers - vision.split_at
    frames = min(CHECKED_FRAMES, plan.settings.max_frames) * _cpu_block(plan)
    block = (plan.held[VISION_UPPER].count - plan.held[CONNECTOR].count) // upper
    if graph == VISION_LOWER:
        own = plan.held[VISION_LOWER].count - vision.split_at * block
        traced, held = vision.split_at, max(own, block) * _FLOAT + frames
    elif graph == VISION_UPPER:
        own = plan.held[CONNECTOR].count
        traced, held = vision.num_layers, max(own, block) * _FLOAT + frames
    elif graph == CONNECTOR:
        traced, held = vision.num_layers, plan.held[CONNECTOR].count * _FLOAT
    else:
        traced, held = vision.num_layers + text.num_layers, 0
    if graph == DECODER:
        head = 0 if plan.precision == "fp32" else _head(plan)
        layer = sum(t.count for t in plan.held[DECODER].tensors if t.transposed) // text.num_layers
        held = max(head, layer * _FLOAT)
    if plan.is_quantised:  # what was calibrated stays for the gates
        held += _CALIBRATOR - _EXPORTER + _reference(plan)
    return _EXPORTER + traced * _TRACED + held


def _answering(plan: Plan) -> int:
    """Bytes at the peak of the checkpoint in fp32 that answers about clips.

    The tower takes a clip at once. Its activations, and the decoder's, are taken to be those of
    ONNX Runtime.
    """
    fp32 = replace(plan, settings=replace(plan.settings, recipe=Recipe.plain("fp32")))
    tower = fp32.settings.max_frames * _cpu_block(fp32) + fp32.pixels * _FLOAT + fp32.hidden
    activations = int(_ARENA * max(tower, _cpu_prefill(fp32)))
    return _CALIBRATOR + _reference(plan) + activations


def _reference(plan: Plan) -> int:
    """Bytes of the checkpoint's weights in fp32: all, or one where they stay on disk.

    See `calibration.calibrate.reference_model`.
    """
    whole = sum(plan.held[name].count for name in _SESSION_GRAPHS) * _FLOAT
    if plan.free is None or whole * WHOLE_MODEL_ROOM <= plan.free:
        return whole
    tensors = (t for name in _SESSION_GRAPHS for t in plan.held[name].tensors)
    return max(tensor.count for tensor in tensors) * _FLOAT


def _candidate(plan: Plan) -> int:
    """Bytes of what is compared with it: a session, or PyTorch where ONNX Runtime has no kernels.

    A session's graphs are opened a second time, without copies, to show what layers give. Of
    PyTorch the rounded weights are held, and they at the graphs' type.
    """
    if needs_engines(plan.settings.recipe):
        numbers = sum(plan.held[name].count for name in _SESSION_GRAPHS)
        return numbers * (_FLOAT + BYTES[plan.precision])
    left = None if plan.free is None else plan.free - _reference(plan)
    tapped = sum(_copies(plan, name, lean=True) for name in _SESSION_GRAPHS)
    return peak(cpu_parts(replace(plan, room=left))) - PROCESS + tapped


def _statistics(plan: Plan) -> int:
    """Bytes of the samples that calibration keeps of every layer's input."""
    inputs = {t.layer: t.inputs for held in plan.held.values() for t in held.tensors if t.layer}
    first = (names[0] for names in input_groups(plan.config))
    return sum(inputs.get(name, 0) for name in first) * _SAMPLES * _FLOAT


def build_stages(
    plan: Plan,
    files: dict[str, int],
    engines: dict[str, int],
    *,
    exported: bool,
    calibrated: bool = False,
) -> Iterator[Stage]:
    """Steps of a build in their order; memory of each on its own.

    Args:
        plan: what is built.
        files: see `sizes.graph_bytes`.
        engines: bytes of engine files.
        exported: whether the graphs are there already.
        calibrated: whether the scales are there already.
    """
    if exported:
        yield Stage("copy the graphs", PROCESS, sum(files.values()))
    else:
        if plan.precision == "fp16":
            memory = _export_memory(plan, VISION_LOWER)
            yield Stage("check the ranges of activations", memory, 0)
        if plan.is_quantised and not calibrated:
            samples = _statistics(plan)  # of the clips one by one, and together
            yield Stage("calibrate", _answering(plan) + 2 * samples, samples)
        folders = dict.fromkeys(file.partition("/")[0] for file in files)
        for folder in folders:
            disk = sum(size for file, size in files.items() if file.startswith(f"{folder}/"))
            yield Stage(f"{folder}: export and check", _export_memory(plan, folder), disk)
    base, factor = _BUILDER
    for name, size in engines.items():
        yield Stage(f"{name}: build the engine", base + int(size * factor), size, False)
    if plan.settings.recipe.gates is not None and not exported:
        yield Stage("judge on held-out clips", _answering(plan) + _candidate(plan), 0)
