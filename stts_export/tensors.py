"""The contract: inputs and outputs of every graph, with types and symbolic axes.

Export, engines and runtime take names from here; nobody retypes one.
Axes that are names are free at run time: `frames` of a chunk, `bins` of a chunk, `slots` of a bin,
`patches` = slots * G, `tokens` of a call, `rows` of features, `capacity` of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stts_export.config import ModelConfig

Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

ACTIVATION: dict[str, str] = {"fp32": "float32", "fp16": "float16"}
"""NumPy name of the type that activations have at a precision; scores are always float32."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: str
    """NumPy name."""
    shape: tuple[int | str, ...]


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
DECODER = "decoder"

DATA_FILE = "model.onnx.data"
"""Weights of a graph; its variants refer to the same file."""


def graph_file(name: str) -> str:
    """Where a graph lies below `onnx/`: a variant beside the graph whose weights it shares."""
    graph, _, variant = name.partition("-")
    return f"{graph}/model-{variant}.onnx" if variant else f"{graph}/model.onnx"


def past_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache inputs (key, value)."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache outputs (key, value)."""
    return f"present.{layer}.key", f"present.{layer}.value"


def graph_specs(config: ModelConfig, precision: Precision) -> dict[str, GraphSpec]:
    """All graphs of a model at a precision, by name."""
    specs = (
        _vision_lower(config, precision),
        _vision_upper(config, precision, VISION_UPPER),
        _vision_upper(config, precision, VISION_UPPER_FRAMES),
        _decoder(config, precision),
    )
    return {spec.name: spec for spec in specs}


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
    if name == VISION_UPPER_FRAMES:
        return GraphSpec(
            name,
            (TensorSpec("bins", dtype, ("frames", "patches", D)),),
            (TensorSpec("packed_features", dtype, ("frames", "slots", C)),),
        )
    W = vision.windows
    return GraphSpec(
        name,
        (
            TensorSpec("bins", dtype, ("bins", W * vision.patches_per_window, D)),
            TensorSpec("segment", "int32", ("bins", W)),
        ),
        (TensorSpec("packed_features", dtype, ("bins", W, C)),),
    )


def _decoder(config: ModelConfig, precision: Precision) -> GraphSpec:
    text, dtype = config.text, ACTIVATION[precision]
    cache = (1, text.num_kv_heads, "capacity", text.head_dim)
    layers = range(text.num_layers)
    return GraphSpec(
        DECODER,
        (
            TensorSpec("input_ids", "int64", (1, "tokens")),
            TensorSpec("features", dtype, ("rows", text.hidden_size)),
            TensorSpec("visual_group", "int32", (1, "tokens")),
            TensorSpec("cache_position", "int64", (1,)),
            *(TensorSpec(name, dtype, cache) for i in layers for name in past_names(i)),
        ),
        (
            TensorSpec("logits", "float32", (1, text.vocab_size)),
            *(TensorSpec(name, dtype, cache) for i in layers for name in present_names(i)),
        ),
    )
