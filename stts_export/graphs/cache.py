"""The KV cache in int8: Q/DQ nodes around each cache update, and the same rounding in PyTorch.

    key -> QuantizeLinear -> TensorScatter (past, int8) -> DequantizeLinear -> Attention

A call attends to its own tokens as they are cached, so that it makes no difference how a sequence
is cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stts_export.calibration.cache_scales import CacheScales
from stts_export.calibration.rounding import quantise, rounded_scale
from stts_export.errors import VerificationError
from stts_export.graphs.weights import add_initializer
from stts_export.model.vlm import SttsModel
from stts_export.tensors import DECODER, Precision, past_names

_HEADS = 1
"""Axis of (1, kv_heads, tokens or capacity, d)."""


def quantise_cache(graph: ir.Graph, scales: CacheScales, precision: Precision) -> None:
    """Put Q/DQ nodes in the place of the casts to and from the type of the cache.

    Args:
        graph: `decoder`, traced with an int8 cache and optimised.
        scales: of its layers.
        precision: of the graph.

    Raises:
        VerificationError: the graph does not write and read its cache by such casts.
    """
    wanted = {
        past: _stored(scale, precision)
        for layer, pair in enumerate(scales.layers())
        for past, scale in zip(past_names(layer), pair, strict=True)
    }
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        past = node.inputs[0]
        if past is not None and past.name in wanted:
            _quantise(graph, node, past.name, wanted.pop(past.name))
    if wanted:
        raise _refused(f"no update of {', '.join(wanted)}")


def _quantise(graph: ir.Graph, scatter: ir.Node, past: str, scale: NDArray[np.float32]) -> None:
    """Replace the casts around the update of a cache; `scale` is (kv_heads,)."""
    update = scatter.inputs[1]
    write = None if update is None else update.producer()
    reads = list(scatter.outputs[0].consumers())
    if write is None or not reads or {node.op_type for node in (write, *reads)} != {"Cast"}:
        raise _refused(f"{past} is written or read without a cast")
    x = write.inputs[0]
    assert x is not None
    if {node.outputs[0].dtype for node in reads} != {x.dtype} or x.dtype is None:
        raise _refused(f"{past} is written from {x.dtype} and read as another type")
    constants = [
        _initializer(graph, f"{past}.scale", scale.astype(x.dtype.numpy())),
        _initializer(graph, f"{past}.zero", np.zeros(scale.shape, np.int8)),
    ]
    for cast in (write, *reads):
        kind = "QuantizeLinear" if cast is write else "DequantizeLinear"
        node = ir.node(kind, [cast.inputs[0], *constants], {"axis": _HEADS}, name=cast.name)
        ir.convenience.replace_nodes_and_values(
            graph, cast, [cast], [node], cast.outputs, node.outputs
        )


def _refused(got: str) -> VerificationError:
    return VerificationError(
        got,
        where=f"int8 cache of {DECODER}",
        allowed="one cast to int8 before each update of the cache, and one back behind it",
        fix="report this export, with the versions of torch and onnxscript",
    )


def _initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    return add_initializer(graph, ir.tensor(array, name=name))


def _stored(scale: NDArray[np.float32], precision: Precision) -> NDArray[np.float32]:
    """Scales as the graph has them."""
    rounded: NDArray[np.float32] = rounded_scale(torch.from_numpy(scale), precision).numpy()
    return rounded


def round_cache(model: SttsModel, scales: CacheScales, precision: Precision) -> None:
    """Have the decoder of a model attend to keys and values as an int8 cache holds them.

    Args:
        model: changed in place; a copy that shares weights is what `rounded_model` makes.
        scales: of its layers.
        precision: of the graph that it is compared with.
    """
    for block, pair in zip(model.language.blocks, scales.layers(), strict=True):
        keys, values = (
            torch.from_numpy(_stored(scale, precision))[:, None, None] for scale in pair
        )
        block.register_forward_pre_hook(_rounding(keys, values))


def _rounding(
    key_scale: Tensor, value_scale: Tensor
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Hook of a decoder block: what it writes into the cache is rounded; scales (heads, 1, 1)."""

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.to(x.device)
        return (quantise(x, scale, "int8") * scale).to(x.dtype)

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, rotary, mask, write, rotate = arguments

        def write_rounded(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            kept: tuple[Tensor, Tensor] = write(
                rounded(key, key_scale), rounded(value, value_scale)
            )
            return kept

        return x, rotary, mask, write_rounded, rotate

    return hook
