"""What is traced: one module per graph, positional arguments in the order of `tensors`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stts_export.model.language import Decoder, attention_mask
from stts_export.model.layers import LayerNorm, RMSNorm
from stts_export.model.pruning import Scorer
from stts_export.model.vision import Connector, PatchEmbedding, VisionTower
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    Precision,
)


class VisionLower(nn.Module):
    """`vision_lower` of a tower with a scorer."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self, frames: Tensor, fresh: Tensor, prev_pooled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VisionTower.lower`."""
        hidden, scores, last_pooled = self.tower.lower(frames, fresh, prev_pooled)
        return hidden.to(self.tower.weight_type), scores, last_pooled


class VisionLowerPlain(nn.Module):
    """`vision_lower` of a tower without a scorer."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, frames: Tensor) -> tuple[Tensor]:
        """See `VisionTower.lower_plain`."""
        return (self.tower.lower_plain(frames).to(self.tower.weight_type),)


class VisionUpper(nn.Module):
    """`vision_upper`: bins with a segment mask."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, bins: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionTower.upper` and `VisionTower.tapped`."""
        tapped = self.tower.tapped(bins, segment)
        return self.tower.connect(tapped), tapped


class VisionUpperFrames(nn.Module):
    """`vision_upper-frames`: each row of the batch is one frame, so there is no mask."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, bins: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionTower.upper` and `VisionTower.tapped`."""
        tapped = self.tower.tapped(bins)
        return self.tower.connect(tapped), tapped


class ConnectorAlone(nn.Module):
    """`connector`: tokens from any patches."""

    def __init__(self, connector: Connector) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, patches: Tensor, pooled_patches: Tensor) -> tuple[Tensor]:
        """See `Connector.pool`."""
        return (self.connector.pool(patches, pooled_patches),)


class DecoderStep(nn.Module):
    """`decoder`: one call on new tokens, keys and values written into the cache in place."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        visual_group: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        """Logits (1, V) of the last token, then the updated cache.

        Args:
            input_ids: (1, L).
            features: (M, C); see `Decoder.embed`.
            visual_group: (1, L); see `Decoder.forward`.
            position_ids: (1, L), of the rotary embedding; the mask goes by `cache_position`.
            cache_position: (1,), tokens already in the cache.
            cache: per layer key and value, (1, kv_heads, capacity, d).
        """
        length, capacity = input_ids.shape[1], cache[0].shape[2]
        offset = torch.arange(capacity, device=input_ids.device) - cache_position  # of this call
        in_call = (offset >= 0) & (offset < length)
        group = visual_group.index_select(1, offset.clamp(0, length - 1))
        # Clips lie within one call, so what is cached from earlier calls counts as text.
        key_group = torch.where(in_call[None], group, torch.full_like(group, -1))
        mask = attention_mask(
            (cache_position + torch.arange(length, device=input_ids.device))[None],
            visual_group,
            torch.arange(capacity, device=input_ids.device)[None],
            key_group,
            self.decoder.config.bidirectional_visual,
        )
        present = list(cache)

        def write(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            for index, update in ((2 * layer, key), (2 * layer + 1, value)):
                present[index] = _tensor_scatter(cache[index], update, cache_position)
            return present[2 * layer], present[2 * layer + 1]

        x = self.decoder.embed(input_ids, features)
        x = self.decoder.transform(x, position_ids, mask, write, torch.onnx.ops.rotary_embedding)
        return self.decoder.lm_head(x[:, -1]).float(), *present


def _tensor_scatter(past: Tensor, update: Tensor, position: Tensor) -> Tensor:
    """ONNX TensorScatter-24, linear: write `update` (1, h, L, d) at `position` of axis -2."""
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (past, update, position),
        {"axis": -2, "mode": "linear"},
        dtype=past.dtype,
        shape=past.shape,
        version=24,
    )


def module_for(graph: str, model: SttsModel) -> nn.Module:
    """Wrap the part of the model that a graph is traced from."""
    if graph == VISION_LOWER:
        return (VisionLower if model.config.vision.pruning else VisionLowerPlain)(model.vision)
    if graph == VISION_UPPER:
        return VisionUpper(model.vision)
    if graph == VISION_UPPER_FRAMES:
        return VisionUpperFrames(model.vision)
    if graph == CONNECTOR:
        return ConnectorAlone(model.vision.connector)
    if graph == DECODER:
        return DecoderStep(model.language)
    raise KeyError(graph)


def at_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """Return the module with its weights at a precision.

    The graph is strongly typed: at fp16 the matmuls and attention of the blocks are fp16, while
    patch embedding (the largest part of the scores' error), the residual stream below the scorer,
    norms, rotary embedding and the scorer stay fp32.
    """
    if precision == "fp32":
        return module
    half = copy.deepcopy(module)
    _halve(half)
    return half


def _halve(module: nn.Module) -> None:
    """Cast parameters to fp16 except in parts that stay fp32 (never rounded, not cast back)."""
    if isinstance(module, (LayerNorm, RMSNorm, PatchEmbedding, Scorer)):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.half()
    for child in module.children():
        _halve(child)
