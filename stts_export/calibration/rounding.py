"""What a quantised graph computes, in PyTorch: the same scales, the same rounding.

Graphs are compared with this right after they are written, and formats that ONNX Runtime has no
kernels for are measured with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts_export.calibration.layers import (
    LARGEST,
    NVFP4_BLOCK,
    NVFP4_SCALE_LARGEST,
    Format,
    LayerQuantization,
)
from stts_export.checkpoint.streamed import Source, sources
from stts_export.model.vlm import SttsModel
from stts_export.tensors import Precision

BASE_TYPE: dict[Precision, torch.dtype] = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
_SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal
_INTEGER_BOUNDS: dict[Format, tuple[int, int]] = {"int8": (-128, 127), "int4": (-8, 7)}
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def rounded_scale(scale: Tensor, precision: Precision) -> Tensor:
    """Round scales as the graph stores them, in f32; none is 0 or subnormal in fp16."""
    return scale.float().clamp(min=_SMALLEST_SCALE).to(BASE_TYPE[precision]).float()


def quantise(x: Tensor, scale: Tensor, target: Format) -> Tensor:
    """Divide by `scale`, which broadcasts, round half to even and saturate.

    Returns:
        f32 holding values of the format (ONNX QuantizeLinear-23).
    """
    scaled = x.float() / scale
    if target in _INTEGER_BOUNDS:
        return scaled.round().clamp(*_INTEGER_BOUNDS[target])
    if target == "fp8":
        bounded = scaled.clamp(-LARGEST["fp8"], LARGEST["fp8"])  # the cast alone gives NaN beyond
        return bounded.to(torch.float8_e4m3fn).float()
    return _to_fp4(scaled)


def _to_fp4(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to the even mantissa."""
    borders = torch.tensor(_FP4_BORDERS, device=x.device)
    magnitude = x.abs()
    down = torch.bucketize(magnitude, borders)  # at a border: the value below
    up = torch.bucketize(magnitude, borders, right=True)
    index = torch.where(down % 2 == 0, down, up)
    return torch.tensor(_FP4_VALUES, device=x.device)[index].copysign(x)


def block_scales(amax: Tensor, global_scale: Tensor) -> Tensor:
    """Scales of nvfp4 blocks: `amax` / 6 in fp8 times `global_scale`, f32."""
    relative = (amax / LARGEST["nvfp4"] / global_scale).clamp(max=NVFP4_SCALE_LARGEST)
    rounded = relative.to(torch.float8_e4m3fn).float() * global_scale
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def rounded_input(x: Tensor, layer: LayerQuantization, precision: Precision) -> Tensor:
    """Return x * smooth as the product sees it; (..., in) to f32 (..., in)."""
    x = x.to(BASE_TYPE[precision]).float()
    if layer.smooth is not None:
        smooth = _smooth(layer, precision).to(x.device)
        x = (x * smooth).to(BASE_TYPE[precision]).float()
    if layer.input_scale is None:
        return x
    scale = torch.tensor(layer.input_scale, device=x.device)
    if layer.format == "nvfp4":
        blocks = x.unflatten(-1, (-1, NVFP4_BLOCK))
        scales = block_scales(blocks.abs().amax(-1, keepdim=True), scale)
        return (quantise(blocks, scales, "nvfp4") * scales).flatten(-2)
    scale = rounded_scale(scale, precision)
    return quantise(x, scale, layer.format) * scale


def _smooth(layer: LayerQuantization, precision: Precision) -> Tensor:
    """(in,) as the graph has it, f32: inputs are multiplied and weights divided by the same."""
    assert layer.smooth is not None
    return torch.from_numpy(layer.smooth).to(BASE_TYPE[precision]).float()


def weight_scales(layer: LayerQuantization, precision: Precision) -> Tensor:
    """Scale of every weight, (out, 1) or (out, in / block), f32 as the graph has it."""
    scale = torch.from_numpy(layer.weight_scale)
    if layer.format == "nvfp4":
        return block_scales(scale * LARGEST["nvfp4"], scale.max() / NVFP4_SCALE_LARGEST)
    scale = rounded_scale(scale, precision)
    return scale[:, None] if scale.ndim == 1 else scale


def quantised_weight(
    weight: Tensor, layer: LayerQuantization, precision: Precision, columns: slice | None = None
) -> Tensor:
    """Values of the format that stand for W / smooth.

    Args:
        weight: (out, n), all inputs or those of `columns`.
        layer: how it is quantised.
        precision: of the graph.
        columns: inputs that `weight` has; begins and ends with a block.

    Returns:
        f32 (out, n).
    """
    part = columns or slice(0, weight.shape[1])
    weight = weight.float()
    if layer.smooth is not None:
        weight = weight / _smooth(layer, precision)[part].to(weight.device)
    scales = weight_scales(layer, precision).to(weight.device)
    if layer.block is None:
        return quantise(weight, scales, layer.format)
    scales = scales[:, part.start // layer.block : -(-part.stop // layer.block)]
    blocks = weight.unflatten(1, (-1, layer.block))
    return quantise(blocks, scales[..., None], layer.format).flatten(1)


class _RoundedLinear(nn.Module):
    """A linear layer whose input and weight are rounded."""

    def __init__(
        self, layer: nn.Linear, weight: Source, how: LayerQuantization, precision: Precision
    ) -> None:
        super().__init__()
        self.bias, self._source, self._how, self._precision = layer.bias, weight, how, precision
        self.out_features = layer.out_features
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)  # callers ask its type

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        stored = self._source.check(self._source.load())
        values = quantised_weight(stored, self._how, self._precision)
        scales = weight_scales(self._how, self._precision)
        weight = values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
        rounded = rounded_input(x, self._how, self._precision)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rounded, weight.to(x.device), bias).to(x.dtype)


def rounded_model(
    model: SttsModel, layers: Mapping[str, LayerQuantization], precision: Precision
) -> SttsModel:
    """Return a model that rounds the inputs and weights of layers as the graphs do.

    Args:
        model: fp32; its weights may be on disk (`streamed_model`). Shares what is not rounded.
        layers: how each is quantised, by name.
        precision: of the graphs; the rest of the model stays fp32.
    """
    weights = sources(model)
    shared = [*model.parameters(), *model.buffers(), *weights.values()]
    rounded = copy.deepcopy(model, {id(one): one for one in shared})
    for name, how in layers.items():
        parent, _, key = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(
            rounded.get_submodule(parent),
            key,
            _RoundedLinear(layer, weights[f"{name}.weight"], how, precision),
        )
    return rounded
