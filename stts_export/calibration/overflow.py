"""Whether fp16 can hold what passes through a model, and which layers must stay fp32 where not.

What may overflow: what a linear layer gives; what it reads, as the product of two numbers in
SwiGLU; and the residual stream above the removal and in the decoder, where it is fp16. Norms take
and give fp32, and the stream below the removal is fp32. Logits of attention are left out: queries
are scaled before the product, and what bounds it follows from no range of queries or keys alone.

Ranges are largest magnitudes by name: "NAME" of what a linear layer gives, "NAME:in" of what a
layer or a norm takes, and "hidden" of that output of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stts_export.calibration.layers import layer_names, modules_with
from stts_export.calibration.statistics import ModelStatistics
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from stts_export.tensors import present_names

LARGEST_FP16 = float(np.finfo(np.float16).max)
AT_RISK = LARGEST_FP16 / 4
"""Other clips may go further than those that ranges are known from."""

_TAPPED = "vision.connector.pooling.wk:in"
"""The connector reads what is tapped; no norm lies between."""


@torch.no_grad()
def ranges_of(
    model: SttsModel, frames: Sequence[NDArray[np.uint8]], ratio: float
) -> dict[str, float]:
    """Find the ranges of the vision side of a model, with windows removed as it is deployed.

    Args:
        model: fp32; its weights may be on disk (`streamed_model`).
        frames: one or more clips, (T, height, width, 3) at the model's size.
        ratio: fraction of windows to remove.

    Returns:
        Ranges of what every linear layer takes and gives, of what every norm takes, and of `hidden`
        of all windows: at another ratio other windows survive.

    Raises:
        InputError: an activation is NaN or infinite.
    """
    ranges: dict[str, float] = {}
    hooks = []
    for name, module in model.vision.named_modules(prefix="vision"):
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
            hooks.append(module.register_forward_hook(_hook(ranges, name)))
    device = model.vision.embedding.positional.device
    try:
        for clip in frames:
            encoded = model.encode(torch.from_numpy(clip).to(device), ratio)
            _note(ranges, "hidden", encoded.hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def _hook(ranges: dict[str, float], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        _note(ranges, f"{name}:in", inputs[0])
        if isinstance(module, nn.Linear):
            _note(ranges, name, output)

    return note


def _note(ranges: dict[str, float], key: str, values: Tensor) -> None:
    largest = float(torch.stack(values.aminmax()).abs().amax())
    if not math.isfinite(largest):
        raise InputError(
            f"{key} has NaN or infinite values",
            where="checkpoint",
            fix="the weights are damaged, or training went wrong: use another checkpoint",
        )
    ranges[key] = max(largest, ranges.get(key, 0.0))


def known_ranges(statistics: ModelStatistics) -> dict[str, float]:
    """Ranges that calibration has found, of the decoder too.

    An input that several layers share is there under the name of the first. The cache's ranges have
    the names of the decoder's outputs.
    """
    ranges = dict(statistics.ranges)
    for name, taken in statistics.inputs.items():
        ranges[f"{name}:in"] = float(taken.amax.max())
    for layer, keys in statistics.keys.items():
        cached = (keys, statistics.values[layer])
        for name, largest in zip(present_names(layer), cached, strict=True):
            ranges[name] = float(largest.max())
    return ranges


def layers_at_risk(
    ranges: Mapping[str, float], config: ModelConfig, limit: float = AT_RISK
) -> dict[str, float]:
    """Find the linear layers that are not safe in fp16, with the largest magnitude of each.

    Where the residual stream of a graph is too large, it is the layer that adds to it first: when
    that is fp32, so is the stream from there on.

    Args:
        ranges: of `ranges_of`, `known_ranges` or `ModelStatistics`; what they lack passes.
        config: the model's.
        limit: largest magnitude that is safe.
    """
    at_risk = {}
    for name in layer_names(config):
        largest = max(ranges.get(name, 0.0), ranges.get(f"{name}:in", 0.0))
        if largest > limit:
            at_risk[name] = largest
    kept = {module for name in at_risk for module in modules_with(name)}
    for additions in (_upper_stream(config), _decoder_stream(config)):
        for name, after in additions:
            if kept.issuperset(modules_with(name)):
                break
            if ranges.get(after, 0.0) > limit:
                at_risk[name] = ranges[after]
                break
    return at_risk


def _upper_stream(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Layers that add to the residual stream above the removal, and the ranges of the sums."""
    vision = config.vision
    for index in range(vision.split_at, vision.num_layers):
        block = f"vision.blocks.{index}"
        yield f"{block}.attention.wo", f"{block}.ffn_norm:in"
        is_last = index + 1 == vision.num_layers
        following = _TAPPED if is_last else f"vision.blocks.{index + 1}.attention_norm:in"
        yield f"{block}.feed_forward.w2", following


def _decoder_stream(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """The same of the decoder."""
    layers = config.text.num_layers
    for index in range(layers):
        block = f"language.blocks.{index}"
        yield f"{block}.attn_out", f"{block}.ff_norm:in"
        is_last = index + 1 == layers
        following = "norm" if is_last else f"blocks.{index + 1}.attn_norm"
        yield f"{block}.ff_out", f"language.{following}:in"


def check_interface(ranges: Mapping[str, float], config: ModelConfig) -> None:
    """Refuse fp16 where it cannot hold what graphs hand on to each other.

    Args:
        ranges: of `ranges_of` or `known_ranges`; the cache is checked where they have it.
        config: the model's.

    Raises:
        InputError: an output of a graph is larger than any number of fp16.
    """
    survivors = ranges[f"vision.blocks.{config.vision.split_at}.attention_norm:in"]
    handed_on = {
        "hidden": max(survivors, ranges.get("hidden", 0.0)),
        "tapped": ranges[_TAPPED],
        "packed_features": ranges["vision.connector.w2"],
    }
    for layer in range(config.text.num_layers):
        for name in present_names(layer):
            handed_on[name] = ranges.get(name, 0.0)
    beyond = {name: largest for name, largest in handed_on.items() if largest > LARGEST_FP16}
    if beyond:
        listed = ", ".join(f"{name} reaches {largest:.3g}" for name, largest in beyond.items())
        raise InputError(
            f"{listed}: graphs hand that on in fp16, whatever is fp32 inside",
            where="precision fp16",
            allowed=f"up to {LARGEST_FP16:g}",
            fix="build with --precision bf16 or fp32",
        )
