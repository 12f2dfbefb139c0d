"""The contract: inputs and outputs of every graph, with types, symbolic axes and their ranges.

Export, engines and runtime take names from here; nobody retypes one.
Axes that are names are free at run time: `frames` of a chunk (of a clip in select_pack and
gather_windows), `bins` of a chunk (of a clip in select_pack), `slots` of a bin, `patches` =
slots * G, `kept` windows, `tokens` of a call, `rows` of features (of patches in connector),
`capacity` of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stts_export.config import ModelConfig

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")

ACTIVATION: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "float32"}
"""NumPy name of the type that a graph's inputs and outputs have at a precision, the cache too;
scores are always float32. NumPy has no bfloat16: at bf16, products and attention are in it, and the
residual stream and all that passes from graph to graph is float32."""

KvCache = Literal["base", "int8"]
"""Type of the decoder's cache: that of activations, or int8 with a scale per layer and head."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: str
    """NumPy name."""
    shape: tuple[int | str, ...]
    is_shape: bool = False
    """Its values decide other tensors' shapes (a "shape tensor" of TensorRT, in host memory)."""


@dataclass(frozen=True)
class GraphSpec:
    """A graph's interface; `graph_file` says where it lies in the bundle."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


VISION_LOWER = "vision_lower"
VISION_UPPER = "vision_upper"
VISION_UPPER_FRAMES = "vision_upper-frames"
"""Variant of vision_upper without a mask: a row of the batch is one frame's windows."""
CONNECTOR = "connector"
"""The connector alone, on any patches: for images, whose tokens are not the windows of video."""
DECODER = "decoder"
SELECT_PACK = "select_pack"
"""Selection, packing and gather on the device, by the plugin of `trt_plugins`; no weights."""
GATHER_WINDOWS = "gather_windows"
"""Gather of a plan made on the host, for engines without the plugin; no weights."""
DECOMPOSED = "decomposed"
"""Variant of a graph in operators of ONNX opset 20, for TensorRT older than 10.15: attention as
MatMul and Softmax, the cache as a new tensor in place of an update."""
FIXED = "fixed"
"""Variant of the decoder whose cache capacity is a number, the bundle's longest sequence. TensorRT
updates a cache in place only then. It is written when an engine is built from it."""
SPLIT = "split"
"""Variant of the decoder that ONNX Runtime runs: attention takes the queries of a long call in
turns, so that memory does not grow with queries times keys. It needs Loop, which no CUDA graph
holds, so engines do not take it."""
SCORES = 2**26
"""Attention scores, heads times queries times keys, that a turn of `decoder-split` may have: 256 MB
in fp32. At 32 heads and 36,000 tokens a turn has 58 queries; a call with fewer is one turn."""
CAPACITY = "capacity"
"""Axis of the decoder's cache."""

LOWER_CHUNK = 8
"""Frames per call of vision_lower."""
UPPER_CHUNK = 8
"""Bins' worth of windows per call of vision_upper."""
CONNECTOR_CHUNK = 512
"""Tokens per call of connector."""
IMAGE_POOL = 2
"""Side, in patches, of what becomes one token of an image."""
MAX_CROPS = 64
"""Most crops of an image in engines."""
UPPER_LADDER = (1, 2, 4, 8)
"""Bins per call where shapes are fixed (CUDA graphs): the smallest step that holds the rest."""

DATA_FILE = "model.onnx.data"
"""Weights of a graph; its variants refer to the same file."""
DATA_ALIGNMENT = 2**16
"""Bytes: what a tensor of at least as many begins at a multiple of in that file. A page, or what is
mapped at once elsewhere: then a runtime can use a tensor where it lies."""


def graph_file(name: str) -> str:
    """Where a graph lies below `onnx/`: a variant beside the graph whose weights it shares."""
    graph, _, variant = name.partition("-")
    return f"{graph}/model-{variant}.onnx" if variant else f"{graph}/model.onnx"


def variant(graph: str, name: str) -> str:
    """Name of a graph's variant."""
    return f"{graph}-{name}"


def past_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache inputs (key, value)."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache outputs (key, value)."""
    return f"present.{layer}.key", f"present.{layer}.value"


def cache_dtype(precision: Precision, kv_cache: KvCache) -> str:
    """NumPy name of the type of the decoder's cache."""
    return "int8" if kv_cache == "int8" else ACTIVATION[precision]


def graph_specs(
    config: ModelConfig, precision: Precision, kv_cache: KvCache = "base"
) -> dict[str, GraphSpec]:
    """All graphs of a model at a precision, by name; a variant follows the graph it varies.

    With an int8 cache the decoder has no decomposed variant: that one gathers and selects rows of
    the cache, for which TensorRT 10.3 lists no int8.
    """
    lower = _vision_lower(config, precision)
    upper = _vision_upper(config, precision, VISION_UPPER)
    connector = _connector(config, precision)
    decoder = _decoder(config, precision, kv_cache)
    specs = [
        lower,
        _decomposed(lower),
        upper,
        _decomposed(upper),
        _vision_upper(config, precision, VISION_UPPER_FRAMES),
        connector,
        _decomposed(connector),
        decoder,
        *([] if kv_cache == "int8" else [_decomposed(decoder)]),
        GraphSpec(variant(DECODER, SPLIT), decoder.inputs, decoder.outputs),
    ]
    if config.vision.pruning is not None:
        specs += [_select_pack(config, precision), _gather_windows(config, precision)]
    return {spec.name: spec for spec in specs}


def _decomposed(spec: GraphSpec) -> GraphSpec:
    return GraphSpec(variant(spec.name, DECOMPOSED), spec.inputs, spec.outputs)


def _select_pack(config: ModelConfig, precision: Precision) -> GraphSpec:
    vision, dtype = config.vision, ACTIVATION[precision]
    W, D = vision.windows, vision.hidden_size
    patches = W * vision.patches_per_window
    return GraphSpec(
        SELECT_PACK,
        (
            TensorSpec("scores", "float32", ("frames", W)),
            TensorSpec("hidden", dtype, ("frames", patches, D)),
            TensorSpec("kept_count", "int64", (1,), is_shape=True),
        ),
        (
            TensorSpec("bins", dtype, ("bins", patches, D)),
            TensorSpec("segment", "int32", ("bins", W)),
            TensorSpec("kept_slot", "int32", ("kept",)),
            TensorSpec("kept_window", "int32", ("kept",)),
            TensorSpec("bin_count", "int32", ()),
        ),
    )


def _gather_windows(config: ModelConfig, precision: Precision) -> GraphSpec:
    vision, dtype = config.vision, ACTIVATION[precision]
    W, D = vision.windows, vision.hidden_size
    patches = W * vision.patches_per_window
    return GraphSpec(
        GATHER_WINDOWS,
        (
            TensorSpec("hidden", dtype, ("frames", patches, D)),
            TensorSpec("gather_window", "int32", ("bins", W)),
        ),
        (TensorSpec("bins", dtype, ("bins", patches, D)),),
    )


def _vision_lower(config: ModelConfig, precision: Precision) -> GraphSpec:
    vision = config.vision
    W, D = vision.windows, vision.hidden_size
    frames = TensorSpec("frames", "uint8", ("frames", *vision.image_size, 3))
    hidden = TensorSpec(
        "hidden", ACTIVATION[precision], ("frames", W * vision.patches_per_window, D)
    )
    if vision.pruning is None:
        return GraphSpec(VISION_LOWER, (frames,), (hidden,))
    return GraphSpec(
        VISION_LOWER,
        (
            frames,
            TensorSpec("fresh", "bool", ("frames",)),
            TensorSpec("prev_pooled", "float32", (1, W, D)),
        ),
        (
            hidden,
            TensorSpec("scores", "float32", ("frames", W)),
            TensorSpec("last_pooled", "float32", (1, W, D)),
        ),
    )


def _vision_upper(config: ModelConfig, precision: Precision, name: str) -> GraphSpec:
    vision, dtype = config.vision, ACTIVATION[precision]
    D, C = vision.hidden_size, config.text.hidden_size
    tapped = D * len(vision.taps)
    if name == VISION_UPPER_FRAMES:
        return GraphSpec(
            name,
            (TensorSpec("bins", dtype, ("frames", "patches", D)),),
            (
                TensorSpec("packed_features", dtype, ("frames", "slots", C)),
                TensorSpec("tapped", dtype, ("frames", "patches", tapped)),
            ),
        )
    W = vision.windows
    patches = W * vision.patches_per_window
    return GraphSpec(
        name,
        (
            TensorSpec("bins", dtype, ("bins", patches, D)),
            TensorSpec("segment", "int32", ("bins", W)),
        ),
        (
            TensorSpec("packed_features", dtype, ("bins", W, C)),
            TensorSpec("tapped", dtype, ("bins", patches, tapped)),
        ),
    )


def _connector(config: ModelConfig, precision: Precision) -> GraphSpec:
    vision, dtype = config.vision, ACTIVATION[precision]
    return GraphSpec(
        CONNECTOR,
        (
            TensorSpec("patches", dtype, ("rows", vision.hidden_size * len(vision.taps))),
            TensorSpec("pooled_patches", "int32", ("tokens", IMAGE_POOL**2)),
        ),
        (TensorSpec("features", dtype, ("tokens", config.text.hidden_size)),),
    )


def _decoder(config: ModelConfig, precision: Precision, kv_cache: KvCache) -> GraphSpec:
    text, dtype = config.text, ACTIVATION[precision]
    cache = cache_dtype(precision, kv_cache), (1, text.num_kv_heads, CAPACITY, text.head_dim)
    layers = range(text.num_layers)
    return GraphSpec(
        DECODER,
        (
            TensorSpec("input_ids", "int64", (1, "tokens")),
            TensorSpec("features", dtype, ("rows", text.hidden_size)),
            TensorSpec("visual_group", "int32", (1, "tokens")),
            TensorSpec("position_ids", "int64", (1, "tokens")),
            TensorSpec("cache_position", "int64", (1,)),
            *(TensorSpec(name, *cache) for i in layers for name in past_names(i)),
        ),
        (
            TensorSpec("logits", "float32", (1, text.vocab_size)),
            *(TensorSpec(name, *cache) for i in layers for name in present_names(i)),
        ),
    )


@dataclass(frozen=True)
class Range:
    """What an engine accepts for one input: shapes, or the values of a shape tensor."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = dict[str, Range]
"""An optimisation profile: a range for every input with free axes and every shape tensor."""


def profiles(
    spec: GraphSpec, config: ModelConfig, *, max_frames: int, max_tokens: int
) -> tuple[Profile, ...]:
    """Optimisation profiles of a graph; the runtime takes the first that fits a call.

    Args:
        spec: a graph that engines are built from (all but `vision_upper-frames`).
        config: the model.
        max_frames: longest clip.
        max_tokens: longest sequence.
    """
    graph = spec.name.partition("-")[0]
    clip = max_frames * config.vision.windows
    lower, upper = min(LOWER_CHUNK, max_frames), min(UPPER_CHUNK, max_frames)
    rows = min(clip, max_tokens)
    axes: tuple[dict[str, tuple[int, int, int]], ...]
    if graph == VISION_LOWER:
        axes = ({"frames": (1, lower, lower)},)
    elif graph == VISION_UPPER:
        axes = ({"bins": (1, upper, upper)},)
    elif graph == SELECT_PACK:
        axes = ({"frames": (1, max_frames, max_frames), "kept_count": (1, (clip + 1) // 2, clip)},)
    elif graph == GATHER_WINDOWS:
        axes = ({"frames": (1, max_frames, max_frames), "bins": (1, upper, upper)},)
    elif graph == CONNECTOR:
        patches = config.vision.windows * config.vision.patches_per_window
        tokens = (1, CONNECTOR_CHUNK, CONNECTOR_CHUNK)
        axes = ({"rows": (1, 9 * patches, MAX_CROPS * patches), "tokens": tokens},)
    else:
        capacity = (1, max_tokens, max_tokens)
        half = (max_tokens + 1) // 2
        axes = (
            {"tokens": (1, 1, 1), "rows": (1, 1, 1), CAPACITY: capacity},
            {
                "tokens": (1, half, max_tokens),
                # Of several videos and images together; tuned for a clip.
                "rows": (1, (rows + 1) // 2, max_tokens),
                CAPACITY: capacity,
            },
        )
    return tuple(
        {
            tensor.name: _range(tensor, free)
            for tensor in spec.inputs
            if tensor.is_shape or any(isinstance(axis, str) for axis in tensor.shape)
        }
        for free in axes
    )


def _range(tensor: TensorSpec, free: dict[str, tuple[int, int, int]]) -> Range:
    if tensor.is_shape:
        low, opt, high = free[tensor.name]
        return Range((low,), (opt,), (high,))
    low_shape, opt_shape, high_shape = (
        tuple(axis if isinstance(axis, int) else free[axis][i] for axis in tensor.shape)
        for i in range(3)
    )
    return Range(low_shape, opt_shape, high_shape)
