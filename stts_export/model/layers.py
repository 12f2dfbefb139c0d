"""Layers that several parts of the model share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention with separate, biased projections (reference: `ViTMultiHeadDotProduct`).

    Args:
        in_width: channels of the inputs.
        width: channels of the output.
        num_heads: attention heads.
        head_dim: channels of a head; scores are scaled by its inverse square root.
    """

    def __init__(self, in_width: int, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.wq = nn.Linear(in_width, inner)
        self.wk = nn.Linear(in_width, inner)
        self.wv = nn.Linear(in_width, inner)
        self.wo = nn.Linear(inner, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, L, H*d) -> (N, H, L, d)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `query` (N, Lq, in_width) to `keys` (N, Lk, in_width).

        Args:
            query: where to attend from.
            keys: where keys and values are projected from.
            mask: broadcastable to (N, H, Lq, Lk); bool (True = may attend) or added to the logits.

        Returns:
            (N, Lq, width) in the type of the weights.
        """
        dtype = self.wq.weight.dtype
        query, keys = query.to(dtype), keys.to(dtype)
        q, k, v = (
            self._heads(self.wq(query)),
            self._heads(self.wk(keys)),
            self._heads(self.wv(keys)),
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(attended.transpose(1, 2).flatten(2))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the type of its weights, whatever the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`; returns the type of the weights."""
        return super().forward(x.to(self.weight.dtype))


class RMSNorm(nn.RMSNorm):
    """RMS norm in the type of its weights, whatever the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`; returns the type of the weights."""
        return super().forward(x.to(self.weight.dtype))
