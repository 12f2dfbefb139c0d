"""A model whose weights stay on disk: each layer reads its own when it runs, and lets them go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts_export.checkpoint.stored import Checkpoint, StoredTensor
from stts_export.model.language import Decoder
from stts_export.model.vlm import SttsModel

# The rows of a layer that are cast at once; only the largest heads have more.
_PIECE_BYTES = 2**28


class Source(Protocol):
    """Where the values of a parameter lie."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    def load(self) -> Tensor:
        """All values, as stored."""

    def check(self, part: Tensor) -> Tensor:
        """Return a part of what `load` gave; refuse NaN and infinity."""


class StreamedModel(SttsModel):
    """A model that computes as the fp32 model does, in the memory of one layer's weights.

    Matrices are on the meta device; norms, biases and positions are loaded.

    Args:
        checkpoint: its tensors must have been checked.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        stored = checkpoint.parameters()
        with torch.device("meta"):
            super().__init__(checkpoint.config)
            self.language = _StreamedDecoder(checkpoint, stored["language.embedding"])
            streamed = {"language.embedding"}
            for name, module in list(self.named_modules()):
                if type(module) is nn.Linear:
                    parent, _, key = name.rpartition(".")
                    weight = stored[f"{name}.weight"]
                    layer = _StreamedLinear(module, weight)
                    setattr(self.get_submodule(parent), key, layer)
                    streamed.add(f"{name}.weight")
        small = {name: stored[name].load_fp32() for name in stored if name not in streamed}
        self.load_state_dict(small, strict=False, assign=True)
        self.stored = stored


def streamed_model(checkpoint: Checkpoint) -> SttsModel:
    """Return a model with the results of `model_from_checkpoint` that reads weights as it runs.

    Raises:
        InputError: a tensor has NaN or infinite values; then also when the model runs.
    """
    return StreamedModel(checkpoint).eval()


def sources(model: SttsModel) -> dict[str, Source]:
    """Where the values of a model's parameters lie, by name."""
    if isinstance(model, StreamedModel):
        return dict(model.stored)
    return {name: _InMemory(name, value.detach()) for name, value in model.named_parameters()}


class _InMemory:
    """A parameter that is loaded."""

    def __init__(self, name: str, value: Tensor) -> None:
        self.name = name
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def load(self) -> Tensor:
        return self.value

    def check(self, part: Tensor) -> Tensor:
        return part


class _StreamedLinear(nn.Linear):
    """A linear layer whose matrix is read on each call."""

    def __init__(self, layer: nn.Linear, stored: StoredTensor) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.stored = stored

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        parts = []
        for rows, weight in _fp32_rows(self.stored):
            bias = None if self.bias is None else self.bias[rows]
            parts.append(F.linear(x, weight.to(x.dtype), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _fp32_rows(stored: StoredTensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix as fp32, all at once unless they are many."""
    values = stored.load()
    step = max(1, _PIECE_BYTES // (4 * values.shape[1]))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        yield rows, stored.check(values[rows]).float()


class _StreamedDecoder(Decoder):
    """A decoder that reads the rows of the embedding that it needs."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredTensor) -> None:
        super().__init__(checkpoint.config)
        self.stored = stored

    def lookup(self, ids: Tensor) -> Tensor:
        """See `Decoder.lookup`."""
        base = self.stored.shape[0]
        is_new = ids >= base
        rows = self.stored.check(self.stored.load()[ids.masked_fill(is_new, 0)]).float()
        new = self.new_embedding[(ids - base).clamp(min=0)]
        return torch.where(is_new[..., None], new, rows)
