"""Memory of a build's stages and of a session, part by part.

On ONNX Runtime and for the export it is counted where shapes say it, with factors that were
measured (`benchmarks/bench_estimate.py`). On a GPU it is counted from shapes; nothing was measured.
Axes as in `tensors`: F frames of a chunk, N = W*G patches of a frame, D vision width, H heads,
I inner width of a feed-forward, C decoder width, L tokens of a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from stts_export.config import ModelConfig
from stts_export.engines.library import BACKENDS, ONNXRUNTIME, TENSORRT
from stts_export.engines.onnxruntime import COPIES, ROOM
from stts_export.errors import InputError
from stts_export.limits import DEFAULT_MAX_FRAMES
from stts_export.probe import CHECKED_FRAMES
from stts_export.sizes import BYTES, Weights, cache_bytes
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    GATHER_WINDOWS,
    LOWER_CHUNK,
    PRECISIONS,
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

    precision: Precision = "fp32"
    max_frames: int = DEFAULT_MAX_FRAMES
    max_tokens: int | None = None
    """What the longest clip needs when None."""
    min_prune_ratio: float = 0.0
    backend: str = ONNXRUNTIME
    decomposed: bool = False
    """Whether engines are built from the decomposed graphs, for TensorRT before 10.15."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision {self.precision!r}", where="estimate", allowed=" or ".join(PRECISIONS)
            )
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
    held: dict[str, Weights] = field(repr=False)
    tied: bool
    room: int | None = None
    """Memory that a session finds free on ONNX Runtime; enough for copies of weights when None."""

    @property
    def size(self) -> int:
        """Bytes of an activation in the graphs' type."""
        return BYTES[self.settings.precision]

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
_ARENA = 1.25
"""Memory that ONNX Runtime's arena holds, per byte that is in use at the peak of a call."""


def cpu_parts(plan: Plan) -> Iterator[Part]:
    """Memory of a process that runs a bundle on ONNX Runtime's CPU provider.

    What a call has used stays with the graph, for the next one. Not so where weights stay in their
    file: there no arena is kept, and fp16 weights of an operator are converted when it runs.
    """
    lean = lean_graphs(plan)
    text, precision = plan.config.text, plan.settings.precision
    half = precision == "fp16"
    yield Part("Python and libraries", PROCESS)
    for name in _SESSION_GRAPHS:
        yield Part(f"{name}: weights", 0 if name in lean else _copies(plan, name))
    if half and DECODER not in lean:  # it is packed while its conversion is held
        yield Part(f"{DECODER}: output head, converted", _head(plan), "open")
    yield Part("frames", plan.pixels, "encode")
    yield Part("hidden states of the clip", plan.hidden, "encode")
    for name, count, unit, call in (
        (VISION_LOWER, plan.lower_frames, "frames", _cpu_lower(plan)),
        (VISION_UPPER, plan.upper_bins, "bins", _cpu_upper(plan)),
    ):
        title = f"{name}: a call of {count} {unit}"
        if name in lean:
            yield Part(title, int(call + _largest_product(plan, name)), "encode")
        else:
            yield Part(title, int(call * _ARENA), "called")
    yield Part("features", plan.features, "called")
    cache = cache_bytes(plan.config, precision, plan.tokens)
    yield Part(f"KV cache of {plan.tokens} tokens", cache, "answer")
    title, call = f"{DECODER}: prefill of {plan.tokens} tokens", _cpu_prefill(plan)
    if DECODER not in lean:
        yield Part(title, int(call * _ARENA), "called")
        return
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
        if COPIES * plan.held[graph].nbytes(plan.settings.precision) > ROOM * free:
            lean.add(graph)
        else:
            free -= _copies(plan, graph)
    return frozenset(lean)


def _copies(plan: Plan, graph: str) -> int:
    """Bytes of a graph's weights when all matrices are packed to be multiplied."""
    return plan.held[graph].on_cpu() + (_head(plan) if graph == DECODER and plan.tied else 0)


def _head(plan: Plan) -> int:
    """Bytes in fp32 of what the head multiplies with: of a tied one the whole table."""
    text = plan.config.text
    rows = text.vocab_size + (text.additional_vocab_size if plan.tied else 0)
    return rows * text.hidden_size * _FLOAT


def _largest_product(plan: Plan, graph: str) -> int:
    """Bytes in fp32 of the largest matrix that is converted for a call, but for the head."""
    if plan.settings.precision == "fp32":
        return 0
    matrices = (t for t in plan.held[graph].tensors if t.transposed and not t.is_fp32)
    return max(tensor.count for tensor in matrices) * _FLOAT


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
    return _CASTS if plan.settings.precision == "fp16" else 1.0


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
    cache = cache_bytes(config, plan.settings.precision, plan.tokens)
    yield Part(f"KV cache of {plan.tokens} tokens", buffers * cache, "answer")
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
        head = 0 if plan.settings.precision == "fp32" else _head(plan)
        layer = sum(t.count for t in plan.held[DECODER].tensors if t.transposed) // text.num_layers
        held = max(head, layer * _FLOAT)
    return _EXPORTER + traced * _TRACED + held


def build_stages(
    plan: Plan, files: dict[str, int], engines: dict[str, int], exported: bool
) -> Iterator[Stage]:
    """Steps of a build in their order; memory of each on its own."""
    if exported:
        yield Stage("copy the graphs", PROCESS, sum(files.values()))
    else:
        folders = dict.fromkeys(file.partition("/")[0] for file in files)
        for folder in folders:
            disk = sum(size for file, size in files.items() if file.startswith(f"{folder}/"))
            yield Stage(f"{folder}: export and check", _export_memory(plan, folder), disk)
    base, factor = _BUILDER
    for name, size in engines.items():
        yield Stage(f"{name}: build the engine", base + int(size * factor), size, False)
