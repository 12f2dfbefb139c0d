"""What is traced: one module per graph, positional arguments in the order of `tensors`."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from stts_export.calibration.layers import layer_names, modules_with
from stts_export.calibration.rounding import BASE_TYPE
from stts_export.model.language import Decoder, attention_mask
from stts_export.model.layers import LayerNorm, RMSNorm
from stts_export.model.pruning import Scorer
from stts_export.model.vision import Connector, PatchEmbedding, VisionTower
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    ACTIVATION,
    CONNECTOR,
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    Precision,
)


class VisionLower(nn.Module):
    """`vision_lower` of a tower with a scorer."""

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(
        self, frames: Tensor, fresh: Tensor, prev_pooled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VisionTower.lower`."""
        hidden, scores, last_pooled = self.tower.lower(frames, fresh, prev_pooled)
        return hidden.to(self.dtype), scores, last_pooled


class VisionLowerPlain(nn.Module):
    """`vision_lower` of a tower without a scorer."""

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, frames: Tensor) -> tuple[Tensor]:
        """See `VisionTower.lower_plain`."""
        return (self.tower.lower_plain(frames).to(self.dtype),)


class VisionUpper(nn.Module):
    """`vision_upper`: bins with a segment mask."""

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, bins: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionTower.upper` and `VisionTower.tapped`."""
        tapped = self.tower.tapped(bins, segment)
        return self.tower.connect(tapped).to(self.dtype), tapped.to(self.dtype)


class VisionUpperFrames(nn.Module):
    """`vision_upper-frames`: each row of the batch is one frame, so there is no mask."""

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, bins: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionTower.upper` and `VisionTower.tapped`."""
        tapped = self.tower.tapped(bins)
        return self.tower.connect(tapped).to(self.dtype), tapped.to(self.dtype)


class ConnectorAlone(nn.Module):
    """`connector`: tokens from any patches."""

    def __init__(self, connector: Connector, dtype: torch.dtype) -> None:
        super().__init__()
        self.connector, self.dtype = connector, dtype

    def forward(self, patches: Tensor, pooled_patches: Tensor) -> tuple[Tensor]:
        """See `Connector.pool`."""
        return (self.connector.pool(patches, pooled_patches).to(self.dtype),)


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
                update = update.to(cache[index].dtype)
                present[index] = _tensor_scatter(cache[index], update, cache_position)
            return present[2 * layer].to(key.dtype), present[2 * layer + 1].to(value.dtype)

        x = self.decoder.embed(input_ids, features)
        x = self.decoder.transform(x, position_ids, mask, write, torch.onnx.ops.rotary_embedding)
        # With -1, TensorRT for RTX 1.7.1 fails at bf16 and 8-bit decoders: CHECK(is_const()).
        return self.decoder.lm_head(x[:, length - 1]).float(), *present


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


def module_for(
    graph: str,
    model: SttsModel,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = frozenset(),
) -> nn.Module:
    """Return what a graph is traced from.

    Its inputs and outputs, and the cache, have the type that `ACTIVATION` says, whatever the parts
    inside have.

    Args:
        graph: name of a graph, or of its variant without a mask.
        model: see `model_at`, also for the other arguments.
        precision: type of weights and activations.
        fp32_layers: what stays fp32.

    Raises:
        KeyError: no such graph, or no such layer.
    """
    cast = model_at(model, precision, fp32_layers)
    tower, dtype = cast.vision, getattr(torch, ACTIVATION[precision])
    if graph == VISION_LOWER:
        return (VisionLower if model.config.vision.pruning else VisionLowerPlain)(tower, dtype)
    if graph == VISION_UPPER:
        return VisionUpper(tower, dtype)
    if graph == VISION_UPPER_FRAMES:
        return VisionUpperFrames(tower, dtype)
    if graph == CONNECTOR:
        return ConnectorAlone(tower.connector, dtype)
    if graph == DECODER:
        return DecoderStep(cast.language)
    raise KeyError(graph)


def model_at(
    model: SttsModel, precision: Precision, fp32_layers: Collection[str] = frozenset()
) -> SttsModel:
    """Return a model with its weights at a precision.

    It is strongly typed: at fp16 and bf16 the matmuls and attention of the blocks are, while patch
    embedding (the largest part of the scores' error), the residual stream below the scorer, norms,
    rotary embedding and the scorer stay fp32.

    Args:
        model: fp32. It stays as it is; what is fp32 in both is shared.
        precision: of weights and activations.
        fp32_layers: names of linear layers that stay fp32. The part that one belongs to stays fp32
            as a whole: an attention, a feed-forward, the connector, or the decoder's head.

    Raises:
        KeyError: no such layer.
    """
    unknown = set(fp32_layers).difference(layer_names(model.config))
    if unknown:
        raise KeyError(*sorted(unknown))
    if precision == "fp32":
        return model
    kept = {module for layer in fp32_layers for module in modules_with(layer)}
    cast = _cast(model, "", BASE_TYPE[precision], kept)
    assert isinstance(cast, SttsModel)
    return cast


def _cast(module: nn.Module, prefix: str, dtype: torch.dtype, kept: Collection[str]) -> nn.Module:
    """Copy a module with its parameters at a type; parts that stay fp32 are the module's own.

    No deep copy: that would copy the weights of the whole model before they are cast.
    """
    is_kept = prefix.removesuffix(".") in kept
    if is_kept or isinstance(module, (LayerNorm, RMSNorm, PatchEmbedding, Scorer)):
        return module
    cast = copy.copy(module)
    cast._buffers = dict(module._buffers)
    cast._parameters = {
        key: None if value is None else nn.Parameter(value.to(dtype), requires_grad=False)
        for key, value in module._parameters.items()
    }
    cast._modules = {
        key: None if child is None else _cast(child, f"{prefix}{key}.", dtype, kept)
        for key, child in module._modules.items()
    }
    return cast
