"""Sizes that follow from a model's configuration and a recipe: weights, files, KV cache.

Counted, not estimated; nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from stts_export.calibration.layers import NVFP4_BLOCK, QUANTISED, Format, fp32_with, input_groups
from stts_export.calibration.recipe import LayerRule, block_of, check_nvfp4
from stts_export.config import ModelConfig
from stts_export.tensors import (
    ACTIVATION,
    CONNECTOR,
    DATA_ALIGNMENT,
    DATA_FILE,
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    KvCache,
    Precision,
    graph_file,
    graph_specs,
)

BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
_FLOAT = 4
BITS: dict[Format, int] = {
    "fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4,
}  # fmt: skip
"""Of a number, without scales."""
_HEAD = "language.lm_head"
_NOTHING: Mapping[str, LayerRule] = {}


@dataclass(frozen=True)
class Tensor:
    """One of a graph's weights."""

    count: int
    """Numbers."""
    kind: str
    """"product": a matrix that activations are multiplied with; "table": rows are read from it;
    "scale": what a quantised matrix or its input is scaled with; "vector": anything else."""
    format: Format | None = None
    """At every precision, as norms, patch embedding and scorer stay fp32; the graph's when None."""
    transposed: bool = False
    """Whether it is stored transposed."""
    layer: str = ""
    """The linear layer that it is the matrix of, if a recipe may quantise that."""
    inputs: int = 0
    """Of the layer."""

    def nbytes(self, precision: Precision) -> int:
        """Bytes in a file."""
        return -(-self.count * BITS[self.format or precision] // 8)


@dataclass(frozen=True)
class Weights:
    """The weights of a graph, in the order of its file but for its parts; see `_place`."""

    tensors: tuple[Tensor, ...] = ()

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.tensors + other.tensors)

    def times(self, count: int) -> Weights:
        """The same several times."""
        return Weights(self.tensors * count)

    @property
    def count(self) -> int:
        """Numbers, but for scales."""
        return sum(tensor.count for tensor in self.tensors if tensor.kind != "scale")

    def fp32(self) -> Weights:
        """The same in fp32 at every precision."""
        return Weights(tuple(replace(tensor, format="fp32") for tensor in self.tensors))

    def nbytes(self, precision: Precision) -> int:
        """Bytes of the data file."""
        end = 0
        for tensor in sorted(self.tensors, key=_place):
            size = tensor.nbytes(precision)
            if size >= DATA_ALIGNMENT:
                end = -(-end // DATA_ALIGNMENT) * DATA_ALIGNMENT
            end += size
        return end


def _place(tensor: Tensor) -> int:
    """Which part of a data file it is in: what is made later comes later."""
    if tensor.kind == "scale" or tensor.format in QUANTISED:
        return 2
    return int(tensor.transposed)


def _quantised(held: Weights, rules: Mapping[str, LayerRule], first: Mapping[str, str]) -> Weights:
    """The same with layers in other formats, and with their scales.

    Layers that read the same tensor have one vector that smooths it: that of the `first` of them.
    """
    kept: list[Tensor] = []
    quantised: list[Tensor] = []
    smoothed: set[str] = set()
    for tensor in held.tensors:
        rule = rules.get(tensor.layer)
        if rule is None or rule.format not in QUANTISED:
            kept.append(tensor if rule is None else replace(tensor, format=rule.format))
            continue
        if rule.method in ("smoothquant", "awq") and first[tensor.layer] not in smoothed:
            smoothed.add(first[tensor.layer])
            quantised.append(Tensor(tensor.inputs, "scale"))
        quantised += [replace(tensor, format=rule.format), _scales(tensor, rule)]
    return Weights((*kept, *quantised))


def _scales(tensor: Tensor, rule: LayerRule) -> Tensor:
    """Scales of a quantised matrix."""
    if rule.format == "nvfp4":
        check_nvfp4(tensor.inputs, tensor.layer)
        return Tensor(tensor.count // NVFP4_BLOCK, "scale", "fp8")
    if rule.format == "int4":
        return Tensor(tensor.count // block_of(tensor.inputs, rule.block, tensor.layer), "scale")
    return Tensor(tensor.count // tensor.inputs, "scale")


def _vectors(*counts: int) -> Weights:
    return Weights(tuple(Tensor(count, "vector") for count in counts))


def _linear(inputs: int, outputs: int, layer: str = "", *, bias: bool = True) -> Weights:
    matrix = Tensor(inputs * outputs, "product", None, True, layer, inputs)
    return Weights((matrix,)) + (_vectors(outputs) if bias else Weights())


def _attention(inputs: int, outputs: int, inner: int, name: str = "") -> Weights:
    """`layers.MultiHeadAttention`."""
    parts = [_linear(inputs, inner, name and f"{name}.{part}") for part in ("wq", "wk", "wv")]
    return sum(parts, Weights()) + _linear(inner, outputs, name and f"{name}.wo")


def weights(
    config: ModelConfig, *, tied: bool = False, rules: Mapping[str, LayerRule] = _NOTHING
) -> dict[str, Weights]:
    """Weights in each graph's data file, by graph; what variants share is there once.

    Args:
        config: the model.
        tied: whether the checkpoint has no head of its own: the embedding is used as one.
        rules: of layers whose format is not the graphs'; see `calibration.Recipe.plan`.

    Raises:
        InputError: as `calibration.recipe.block_of`.
    """
    fp32 = [name for name, rule in rules.items() if rule.format == "fp32"]
    rules = {**rules, **dict.fromkeys(fp32_with(fp32, config), LayerRule(("*",), "fp32"))}
    plain = _plain(config, tied and _HEAD not in rules)
    if not rules:
        return plain
    first = {name: group[0] for group in input_groups(config) for name in group}
    return {graph: _quantised(held, rules, first) for graph, held in plain.items()}


def _plain(config: ModelConfig, tied: bool) -> dict[str, Weights]:
    vision = config.vision
    D, inner = vision.hidden_size, vision.num_heads * vision.head_dim
    blocks = [_block(config, index) for index in range(vision.num_layers)]
    rows, columns = vision.grid
    table = Weights((Tensor(rows * columns * D, "table"),))
    scorer = Weights()
    if vision.pruning is not None:
        hidden = vision.intermediate_size
        scorer = _attention(D, D, inner) + _linear(2 * D, hidden) + _linear(hidden, hidden)
        scorer = (scorer + _linear(hidden, 1)).fp32()
    embedding = (table + _linear(3 * vision.patch_size**2, D)).fp32()
    pooling = _connector(config)
    below = sum(blocks[: vision.split_at - 1], Weights())
    return {
        VISION_LOWER: embedding + below + scorer + blocks[vision.split_at - 1],
        VISION_UPPER: sum(blocks[vision.split_at :], Weights()) + pooling,
        CONNECTOR: pooling,
        DECODER: _decoder(config, tied),
    }


def _block(config: ModelConfig, index: int) -> Weights:
    vision, name = config.vision, f"vision.blocks.{index}"
    D, hidden = vision.hidden_size, vision.intermediate_size
    return (
        _vectors(D, D).fp32()
        + _attention(D, D, vision.num_heads * vision.head_dim, f"{name}.attention")
        + _vectors(D, D).fp32()
        + _linear(D, hidden, f"{name}.feed_forward.w1")
        + _linear(hidden, D, f"{name}.feed_forward.w2")
    )


def _connector(config: ModelConfig) -> Weights:
    connector, name = config.connector, "vision.connector"
    pooled, width = connector.hidden_size, config.vision.hidden_size * len(config.vision.taps)
    hidden = connector.intermediate_size
    inner = connector.num_heads * connector.head_dim
    return (
        _attention(width, pooled, inner, f"{name}.pooling")
        + _linear(pooled, hidden, f"{name}.w1", bias=False)
        + _linear(pooled, hidden, f"{name}.w3", bias=False)
        + _linear(hidden, config.text.hidden_size, f"{name}.w2", bias=False)
    )


def _decoder(config: ModelConfig, tied: bool) -> Weights:
    text = config.text
    C = text.hidden_size
    layers = [_layer(config, index) for index in range(text.num_layers)]
    table = Weights((Tensor((text.vocab_size + text.additional_vocab_size) * C, "table"),))
    head = Weights((Tensor(text.vocab_size * C, "product", None, False, _HEAD, C),))
    body = sum(layers, Weights()) + _vectors(C).fp32()
    return body + table if tied else body + head + table  # which is made of two


def _layer(config: ModelConfig, index: int) -> Weights:
    text, name = config.text, f"language.blocks.{index}"
    C, d, hidden = text.hidden_size, text.head_dim, text.intermediate_size
    heads = text.num_heads + 2 * text.num_kv_heads
    return (
        _vectors(C, d, d, C).fp32()
        + _linear(C, heads * d, f"{name}.att_proj", bias=False)
        + _linear(text.num_heads * d, C, f"{name}.attn_out", bias=False)
        + _linear(C, 2 * hidden, f"{name}.ff_proj", bias=False)
        + _linear(hidden, C, f"{name}.ff_out", bias=False)
    )


# Bytes of a graph without its weights: fixed part, and per block of the tower or layer. Measured on
# the golden checkpoint; they are a thousandth of a real bundle.
_GRAPH_BYTES = {
    VISION_LOWER: (22_000, 8_000),
    VISION_UPPER: (15_000, 7_000),
    CONNECTOR: (9_000, 0),
    DECODER: (14_000, 7_000),
}
_PLAIN_BYTES = 500
_SCALED_BYTES = 1_000
"""Nodes of a quantised product, per tensor of scales."""


def graph_bytes(
    config: ModelConfig,
    precision: Precision,
    *,
    tied: bool = False,
    rules: Mapping[str, LayerRule] = _NOTHING,
) -> dict[str, int]:
    """Bytes below `onnx/` in a bundle, by file; of graphs without their weights about.

    Args and errors as `weights`; `precision` is that of the graphs.
    """
    blocks = {
        VISION_LOWER: config.vision.split_at,
        VISION_UPPER: config.vision.num_layers - config.vision.split_at,
        DECODER: config.text.num_layers,
    }
    files: dict[str, int] = {}
    held = weights(config, tied=tied, rules=rules)
    for name in graph_specs(config, precision):
        graph = name.partition("-")[0]
        fixed, each = _GRAPH_BYTES.get(graph, (_PLAIN_BYTES, 0))
        scales = 0
        if graph in held:
            files[f"{graph}/{DATA_FILE}"] = held[graph].nbytes(precision)
            scales = sum(tensor.kind == "scale" for tensor in held[graph].tensors)
        files[graph_file(name)] = fixed + each * blocks.get(graph, 0) + _SCALED_BYTES * scales
    return files


def looks_tied(
    config: ModelConfig,
    precision: Precision,
    stored: int,
    rules: Mapping[str, LayerRule] = _NOTHING,
) -> bool:
    """Whether a decoder's data file of `stored` bytes has no head of its own; see `weights`."""
    tied, own = (
        weights(config, tied=tied, rules=rules)[DECODER].nbytes(precision) for tied in (True, False)
    )
    return abs(tied - stored) < abs(own - stored)


def cache_bytes(
    config: ModelConfig, precision: Precision, tokens: int, kv_cache: KvCache = "base"
) -> int:
    """Bytes of the keys and values of a sequence."""
    text = config.text
    size = 1 if kv_cache == "int8" else np.dtype(ACTIVATION[precision]).itemsize
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * size * tokens
