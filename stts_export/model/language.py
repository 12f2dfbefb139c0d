"""The Qwen3-style decoder (spec 1.6, 1.7).

Axes: N sequences, L tokens, C width, V vocabulary, M feature rows, d head dim, P cache capacity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts_export.config import ModelConfig, TextConfig
from stts_export.model.layers import RMSNorm

WriteCache = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, key, value) each (N, kv_heads, L, d) -> the keys and values to attend to."""

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (N, heads, L, d), cos, sin each (N, L, d/2)) -> rotated x."""


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over halves of the head (ONNX RotaryEmbedding-23, interleaved = 0)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class DecoderBlock(nn.Module):
    """Attention with per-head RMS norms of q and k, and SwiGLU; no biases."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width, d = config.hidden_size, config.head_dim
        self.attn_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.att_proj = nn.Linear(
            width, (config.num_heads + 2 * config.num_kv_heads) * d, bias=False
        )
        self.q_norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.attn_out = nn.Linear(config.num_heads * d, width, bias=False)
        self.ff_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.ff_out = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        rotate: Rotate,
    ) -> Tensor:
        """Map `x` (N, L, C) to (N, L, C); see `attend`."""
        x = x + self.attend(self.attn_norm(x), rotary, mask, write, rotate)
        return x + self.feed_forward(self.ff_norm(x))

    def attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        rotate: Rotate,
    ) -> Tensor:
        """Self-attention of normed `x` (N, L, C); `mask` (N, 1, L, keys) bool as in SDPA."""
        d, heads, kv_heads = self.config.head_dim, self.config.num_heads, self.config.num_kv_heads
        dtype = self.att_proj.weight.dtype
        q, k, v = self.att_proj(x.to(dtype)).split([heads * d, kv_heads * d, kv_heads * d], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, d)) for part in (q, k, v))
        q = rotate(self.q_norm(q).transpose(1, 2), *rotary).to(dtype)
        k = rotate(self.k_norm(k).transpose(1, 2), *rotary).to(dtype)
        k, v = write(k, v.transpose(1, 2))
        grouped = heads != kv_heads
        if grouped and q.is_cuda:
            # With a mask, no fused kernel takes keys of fewer heads there.
            k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU; the second half of `ff_proj` is the gate."""
        up, gate = self.ff_proj(x.to(self.ff_proj.weight.dtype)).chunk(2, dim=-1)
        return self.ff_out(F.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids and window features in, logits out."""

    inverse_frequency: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.embedding = nn.Parameter(torch.zeros(text.vocab_size, text.hidden_size))
        self.new_embedding = nn.Parameter(torch.zeros(text.additional_vocab_size, text.hidden_size))
        self.blocks = nn.ModuleList(DecoderBlock(text) for _ in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        # On the CPU even under the meta device: buffers come from no checkpoint.
        pairs = torch.arange(0, text.head_dim, 2, dtype=torch.float32, device="cpu")
        exponent = pairs / text.head_dim
        self.register_buffer("inverse_frequency", text.rope_theta**-exponent, persistent=False)

    def embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Embed ids and add features to `<im_patch>` positions, in order.

        Args:
            ids: (N, L) integer.
            features: (M, C), one row per `<im_patch>` of the flattened ids; a single zero row
                where there are none.

        Returns:
            (N, L, C).
        """
        is_patch = ids == self.config.tokens.im_patch
        row = is_patch.flatten().long().cumsum(0) - 1
        added = features.index_select(0, row.clamp(0, features.shape[0] - 1))
        added = torch.where(is_patch.flatten()[:, None], added, torch.zeros_like(added))
        return self.lookup(ids) + added.reshape(*ids.shape, -1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the embeddings, the new ones below the others; (N, L) to (N, L, C)."""
        return F.embedding(ids, torch.cat([self.embedding, self.new_embedding]))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (N, L, d/2) f32 for integer positions (N, L)."""
        angle = positions[..., None].float() * self.inverse_frequency.float()
        return angle.cos(), angle.sin()

    def transform(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        write: WriteCache,
        rotate: Rotate = rotate_half,
    ) -> Tensor:
        """Run all blocks and the final norm on embeddings (N, L, C).

        Returns:
            (N, L, C) in the type of the head, which takes it.
        """
        rotary = self.rotary(positions)
        for index, block in enumerate(self.blocks):

            def write_layer(k: Tensor, v: Tensor, layer: int = index) -> tuple[Tensor, Tensor]:
                return write(layer, k, v)

            x = block(x, rotary, mask, write_layer, rotate)
        return self.norm(x).to(self.lm_head.weight.dtype)

    def forward(
        self, ids: Tensor, features: Tensor, visual_group: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Logits of whole sequences, without a cache.

        Args:
            ids: (N, L) integer.
            features: (M, C); see `embed`.
            visual_group: (N, L) integer, the clip that a visual token belongs to, -1 for text.
                Tokens of one group see each other in both directions when the model says so.
            positions: (N, L) integer, of the rotary embedding; 0, 1, ... when None. Which token
                comes before which is the order of the sequence, whatever they are.

        Returns:
            (N, L, V) f32.
        """
        order = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        mask = attention_mask(
            order, visual_group, order, visual_group, self.config.bidirectional_visual
        )
        positions = order if positions is None else positions
        x = self.transform(self.embed(ids, features), positions, mask, lambda _, k, v: (k, v))
        return self.lm_head(x).float()


def attention_mask(
    query_position: Tensor,
    query_group: Tensor,
    key_position: Tensor,
    key_group: Tensor,
    bidirectional_visual: bool,
) -> Tensor:
    """Causal, or both tokens in the same visual group; (N, L) each to (N, 1, Lq, Lk) bool.

    Source: `token_type_ids_mask_function` of the Hugging Face Molmo2 (spec 1.6).
    """
    mask = key_position[:, None, :] <= query_position[:, :, None]
    if bidirectional_visual:
        same = query_group[:, :, None] == key_group[:, None, :]
        mask = mask | (same & (query_group >= 0)[:, :, None])
    return mask[:, None]
