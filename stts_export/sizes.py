"""Sizes that follow from a model's configuration: weights, files, KV cache. Counted, not estimated.

Nothing is read but the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stts_export.config import ModelConfig
from stts_export.tensors import (
    ACTIVATION,
    CONNECTOR,
    DATA_ALIGNMENT,
    DATA_FILE,
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    Precision,
    graph_file,
    graph_specs,
)

BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
_FLOAT = 4


@dataclass(frozen=True)
class Tensor:
    """One of a graph's weights."""

    count: int
    """Numbers."""
    kind: str
    """"product": a matrix that activations are multiplied with; "table": rows are read from it;
    "vector": anything else."""
    is_fp32: bool = False
    """Whether it stays fp32 at every precision, as norms, patch embedding and scorer do."""
    transposed: bool = False
    """Whether it is stored transposed; these come last in a file."""

    def nbytes(self, precision: Precision) -> int:
        """Bytes in a file."""
        return self.count * (_FLOAT if self.is_fp32 else BYTES[precision])


@dataclass(frozen=True)
class Weights:
    """The weights of a graph, in the order of its file but for those that are transposed."""

    tensors: tuple[Tensor, ...] = ()

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.tensors + other.tensors)

    def times(self, count: int) -> Weights:
        """The same several times."""
        return Weights(self.tensors * count)

    @property
    def count(self) -> int:
        """Numbers."""
        return sum(tensor.count for tensor in self.tensors)

    def fp32(self) -> Weights:
        """The same in fp32 at every precision."""
        return Weights(tuple(replace(tensor, is_fp32=True) for tensor in self.tensors))

    def nbytes(self, precision: Precision) -> int:
        """Bytes of the data file."""
        end = 0
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.transposed):
            size = tensor.nbytes(precision)
            if size >= DATA_ALIGNMENT:
                end = -(-end // DATA_ALIGNMENT) * DATA_ALIGNMENT
            end += size
        return end

    def on_cpu(self) -> int:
        """Bytes in memory in ONNX Runtime on a CPU, which multiplies in fp32 whatever is stored.

        Tables are read from their file, whose pages the system can drop.
        """
        return sum(tensor.count * _FLOAT for tensor in self.tensors if tensor.kind != "table")


def _vectors(*counts: int) -> Weights:
    return Weights(tuple(Tensor(count, "vector") for count in counts))


def _linear(inputs: int, outputs: int, bias: bool = True) -> Weights:
    matrix = Weights((Tensor(inputs * outputs, "product", transposed=True),))
    return matrix + _vectors(outputs) if bias else matrix


def _attention(inputs: int, outputs: int, inner: int) -> Weights:
    """`layers.MultiHeadAttention`."""
    return _linear(inputs, inner).times(3) + _linear(inner, outputs)


def weights(config: ModelConfig, *, tied: bool = False) -> dict[str, Weights]:
    """Weights in each graph's data file, by graph; what variants share is there once.

    Args:
        config: the model.
        tied: whether the checkpoint has no head of its own: the embedding is used as one.
    """
    vision = config.vision
    D, inner = vision.hidden_size, vision.num_heads * vision.head_dim
    block = (
        _vectors(D, D).fp32()
        + _attention(D, D, inner)
        + _vectors(D, D).fp32()
        + _linear(D, vision.intermediate_size)
        + _linear(vision.intermediate_size, D)
    )
    rows, columns = vision.grid
    table = Weights((Tensor(rows * columns * D, "table"),))
    scorer = Weights()
    if vision.pruning is not None:
        hidden = vision.intermediate_size
        scorer = _attention(D, D, inner) + _linear(2 * D, hidden) + _linear(hidden, hidden)
        scorer = (scorer + _linear(hidden, 1)).fp32()
    embedding = (table + _linear(3 * vision.patch_size**2, D)).fp32()
    pooling = _connector(config)
    return {
        VISION_LOWER: embedding + block.times(vision.split_at - 1) + scorer + block,
        VISION_UPPER: block.times(vision.num_layers - vision.split_at) + pooling,
        CONNECTOR: pooling,
        DECODER: _decoder(config, tied),
    }


def _connector(config: ModelConfig) -> Weights:
    connector = config.connector
    pooled, width = connector.hidden_size, config.vision.hidden_size * len(config.vision.taps)
    return (
        _attention(width, pooled, connector.num_heads * connector.head_dim)
        + _linear(pooled, connector.intermediate_size, bias=False).times(2)
        + _linear(connector.intermediate_size, config.text.hidden_size, bias=False)
    )


def _decoder(config: ModelConfig, tied: bool) -> Weights:
    text = config.text
    C, d = text.hidden_size, text.head_dim
    layer = (
        _vectors(C, d, d, C).fp32()
        + _linear(C, (text.num_heads + 2 * text.num_kv_heads) * d, bias=False)
        + _linear(text.num_heads * d, C, bias=False)
        + _linear(C, 2 * text.intermediate_size, bias=False)
        + _linear(text.intermediate_size, C, bias=False)
    )
    table = Weights((Tensor((text.vocab_size + text.additional_vocab_size) * C, "table"),))
    head = Weights((Tensor(text.vocab_size * C, "product"),))
    body = layer.times(text.num_layers) + _vectors(C).fp32()
    return body + table if tied else body + head + table  # which is made of two


# Bytes of a graph without its weights: fixed part, and per block of the tower or layer. Measured on
# the golden checkpoint; they are a thousandth of a real bundle.
_GRAPH_BYTES = {
    VISION_LOWER: (22_000, 8_000),
    VISION_UPPER: (15_000, 7_000),
    CONNECTOR: (9_000, 0),
    DECODER: (14_000, 7_000),
}
_PLAIN_BYTES = 500


def graph_bytes(config: ModelConfig, precision: Precision, *, tied: bool = False) -> dict[str, int]:
    """Bytes below `onnx/` in a bundle, by file; of graphs without their weights about."""
    blocks = {
        VISION_LOWER: config.vision.split_at,
        VISION_UPPER: config.vision.num_layers - config.vision.split_at,
        DECODER: config.text.num_layers,
    }
    files: dict[str, int] = {}
    held = weights(config, tied=tied)
    for name in graph_specs(config, precision):
        graph = name.partition("-")[0]
        fixed, each = _GRAPH_BYTES.get(graph, (_PLAIN_BYTES, 0))
        files[graph_file(name)] = fixed + each * blocks.get(graph, 0)
        if graph in held:
            files[f"{graph}/{DATA_FILE}"] = held[graph].nbytes(precision)
    return files


def looks_tied(config: ModelConfig, precision: Precision, stored: int) -> bool:
    """Whether a decoder's data file of `stored` bytes has no head of its own."""
    tied, own = (weights(config, tied=tied)[DECODER].nbytes(precision) for tied in (True, False))
    return abs(tied - stored) < abs(own - stored)


def cache_bytes(config: ModelConfig, precision: Precision, tokens: int) -> int:
    """Bytes of the keys and values of a sequence."""
    text, size = config.text, np.dtype(ACTIVATION[precision]).itemsize
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * size * tokens
