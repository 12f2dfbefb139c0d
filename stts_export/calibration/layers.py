"""The linear layers of a model, by name and by group, and how one of them is quantised.

A layer has the name of its PyTorch module, such as `vision.blocks.3.attention.wq`. Names are the
same in every graph and variant, so scales are found once and serve all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stts_export.calibration.cache_scales import CacheScales
from stts_export.config import ModelConfig
from stts_export.tensors import KvCache, Precision

Format = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
QUANTISED: tuple[Format, ...] = ("fp8", "int8", "int4", "nvfp4")
"""Formats that need scales. fp8 (E4M3) and int8 hold weights and inputs; int4 weights alone; nvfp4
both, in blocks of 16 with a scale each."""

SCORING, VISION, CONNECTOR, DECODER, HEAD = "scoring", "vision", "connector", "decoder", "head"
GROUPS = (SCORING, VISION, CONNECTOR, DECODER, HEAD)
"""Names for several layers. `scoring`: blocks whose output the scorer reads, 0 to prune_at; empty
without a scorer. `vision`: the blocks above. `head`: the decoder's last product."""

_DECODER_HALVES = (("att_proj", "attn_out"), ("ff_proj", "ff_out"))
NVFP4_BLOCK = 16
"""Weights and inputs that share a scale."""


def layer_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of all layers that may have a format, in the order in which they run."""
    return tuple(name for names in layers_by_group(config).values() for name in names)


def layers_by_group(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Layers of every group, in the order in which they run."""
    vision = config.vision
    scoring = vision.split_at - 1 if vision.pruning is not None else 0
    block = [f"attention.{part}" for part in ("wq", "wk", "wv", "wo")]
    block += ["feed_forward.w1", "feed_forward.w2"]
    blocks = [
        tuple(f"vision.blocks.{index}.{part}" for part in block)
        for index in range(vision.num_layers)
    ]
    pooling = [f"pooling.{part}" for part in ("wq", "wk", "wv", "wo")]
    decoder = ("att_proj", "attn_out", "ff_proj", "ff_out")
    return {
        SCORING: sum(blocks[:scoring], ()),
        VISION: sum(blocks[scoring:], ()),
        CONNECTOR: tuple(f"vision.connector.{part}" for part in (*pooling, "w1", "w3", "w2")),
        DECODER: tuple(
            f"language.blocks.{index}.{part}"
            for index in range(config.text.num_layers)
            for part in decoder
        ),
        HEAD: ("language.lm_head",),
    }


def input_groups(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Layers that read the same tensor, side by side; every layer is in one group.

    Statistics of an input are collected for the first of them, and they share its scales: the
    input is then quantised once.
    """
    together: dict[str, list[str]] = {}
    for name in layer_names(config):
        parent, _, part = name.rpartition(".")
        shares = part in ("wq", "wk", "wv") and parent.endswith("attention")
        shares |= part in ("wk", "wv") and parent.endswith("pooling")
        shares |= name in ("vision.connector.w1", "vision.connector.w3")
        together.setdefault(parent if shares else name, []).append(name)
    return tuple(tuple(names) for names in together.values())


def protected_layers(config: ModelConfig) -> dict[str, str]:
    """Layers that no recipe may touch, and why; the names end in `*` where they are many."""
    scores = "a score decides which windows stay, and an error there cannot be mended later"
    protected = {
        "vision.embedding.projection": "every score depends on it, and rounding it moves windows",
    }
    if config.vision.pruning is not None:
        protected["vision.scorer.*"] = scores
    return protected


def modules_with(layer: str) -> tuple[str, ...]:
    """Names of the modules that stay fp32 with a layer: one, or two linear layers of the decoder.

    Between the layers of a part, values go on as they are.
    """
    parent, _, name = layer.rpartition(".")
    if layer.startswith("vision.connector."):
        return ("vision.connector",)
    for half in _DECODER_HALVES:
        if name in half:
            return tuple(f"{parent}.{one}" for one in half)
    return (layer,) if parent == "language" else (parent,)


def fp32_with(names: Collection[str], config: ModelConfig) -> tuple[str, ...]:
    """Return the layers that stay fp32 beside a half precision when some do: all of a part.

    Args:
        names: layers that are to stay fp32.
        config: of the model.

    Returns:
        These and the others, in the order in which they run.
    """
    kept = {module for name in names for module in modules_with(name)}
    return tuple(name for name in layer_names(config) if kept.issuperset(modules_with(name)))


@dataclass(frozen=True)
class LayerQuantization:
    """How a linear layer y = x W^T is quantised: y = DQ(Q(x * smooth)) DQ(Q(W / smooth))^T.

    Q divides by a scale, rounds half to even and saturates (ONNX QuantizeLinear-23); zero points
    are 0. int4 leaves x * smooth as it is. Scales are rounded to the type of the graph first.
    """

    format: Format
    """One of `QUANTISED`."""
    weight_scale: NDArray[np.float32]
    """(out,) for int8 and fp8; (out, in / block) for int4 and nvfp4. Of nvfp4, before the scales
    themselves are rounded to fp8."""
    input_scale: float | None = None
    """Of int8 and fp8, for the whole tensor: largest magnitude / `LARGEST`. Of nvfp4, the scale of
    the blocks' scales: largest magnitude / (6 * 448). None for int4."""
    smooth: NDArray[np.float32] | None = None
    """(in,) what the input is multiplied with (SmoothQuant, AWQ); None for 1."""
    block: int | None = None
    """Inputs that share a weight's scale; int4 and nvfp4 only."""


LARGEST: dict[Format, float] = {"int8": 127.0, "fp8": 448.0, "int4": 7.0, "nvfp4": 6.0}
"""What a scale maps the largest magnitude to; the lowest value of int8 and int4 has no opposite."""
NVFP4_SCALE_LARGEST = LARGEST["fp8"]
"""What nvfp4's scale of scales maps the largest scale of a block to."""


@dataclass(frozen=True)
class Numerics:
    """The number formats of a model's graphs."""

    precision: Precision = "fp32"
    """Of inputs, outputs and everything that the next two do not name."""
    layers: Mapping[str, LayerQuantization] = field(default_factory=dict)
    """Quantised layers, by name."""
    fp32_layers: frozenset[str] = frozenset()
    """Layers that stay fp32, each with the part that it belongs to; see `graphs.module_for`."""
    cache: CacheScales | None = None
    """Of a KV cache in int8; None for one at `precision`."""

    def digest(self) -> str:
        """SHA-256 of all that decides what the graphs hold."""
        total = hashlib.sha256(f"{self.precision} {sorted(self.fp32_layers)}".encode())
        for name, layer in sorted(self.layers.items()):
            total.update(f"{name} {layer.format} {layer.input_scale} {layer.block}".encode())
            for array in (layer.weight_scale, layer.smooth):
                total.update(b"-" if array is None else array.tobytes())
        if self.cache is not None:
            total.update(self.cache.keys.tobytes() + self.cache.values.tobytes())
        return total.hexdigest()

    @property
    def kv_cache(self) -> KvCache:
        """Type of the decoder's cache."""
        return "base" if self.cache is None else "int8"
