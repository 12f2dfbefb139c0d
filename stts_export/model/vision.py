"""The vision tower: SigLIP2-style blocks, removal of windows in the middle, and the connector.

Patches are put in window-major order once, at the patch embedding: the G patches of a window are
adjacent. Attention does not care about order and positions are added before, so scoring, selection
and packing become reshapes and gathers of contiguous rows.
Axes: F frames, W windows, G patches of a window, D vision width, C decoder width, b bins, S slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts_export.config import ConnectorConfig, ModelConfig, VisionConfig
from stts_export.model.layers import LayerNorm, MultiHeadAttention
from stts_export.model.pruning import Scorer, log_score_bias


class FeedForward(nn.Module):
    """W2 gelu_tanh(W1 x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width) in the type of the weights."""
        return self.w2(F.gelu(self.w1(x.to(self.w1.weight.dtype)), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block.

    The residual stream keeps the type it comes in, or widens to that of a part that is kept in
    fp32: what such a part adds may be too large for fp16.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = MultiHeadAttention(width, width, config.num_heads, config.head_dim)
        self.ffn_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(width, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, L, D) to (N, L, D); `mask` as in `MultiHeadAttention`."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class PatchEmbedding(nn.Module):
    """Pixels to patch tokens in window-major order, positions added (spec 1.1, 1.3)."""

    window_major: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.projection = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.positional = nn.Parameter(torch.zeros(rows * columns, config.hidden_size))
        # On the CPU even under the meta device: buffers come from no checkpoint.
        grid = torch.arange(rows * columns, device="cpu").reshape(rows, columns)
        self.register_buffer("window_major", _windows_first(grid, config.pool), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Embed frames.

        Args:
            frames: (F, height, width, 3) uint8 RGB at the model's size.

        Returns:
            (F, W*G, D) f32 at every precision: scores follow from a fp32 residual stream.
        """
        patch, pool = self.config.patch_size, self.config.pool
        window_rows, window_columns = self.config.window_grid
        pixels = (frames.float() / 255 * 2 - 1).to(self.projection.weight.dtype)
        # (F, H, W, 3) -> (F, window row, patch row, y, window column, patch column, x * 3)
        tiles = pixels.reshape(-1, window_rows, pool, patch, window_columns, pool, patch * 3)
        # -> (F, window row, window column, patch row, patch column, y, x * 3)
        tiles = tiles.permute(0, 1, 4, 2, 5, 3, 6)
        windows = window_rows * window_columns
        patches = tiles.reshape(-1, windows * pool * pool, patch * patch * 3)
        positions = self.positional.index_select(0, self.window_major)
        return self.projection(patches).float() + positions.float()


def _windows_first(grid: Tensor, pool: int) -> Tensor:
    """Order a (rows, columns) grid window by window; returns (rows*columns,)."""
    rows, columns = grid.shape
    tiles = grid.reshape(rows // pool, pool, columns // pool, pool)
    return tiles.transpose(1, 2).flatten()


class Connector(nn.Module):
    """One token of several patches: attention pooling with a mean query, SwiGLU (spec 1.2)."""

    def __init__(self, config: ConnectorConfig, in_width: int, text_width: int) -> None:
        super().__init__()
        self.pooling = MultiHeadAttention(
            in_width, config.hidden_size, config.num_heads, config.head_dim
        )
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, text_width, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.masks_missing = config.pooling_attention_mask

    def forward(self, windows: Tensor) -> Tensor:
        """Map the windows of video (N, G, D * taps), which are all full, to (N, C)."""
        windows = self._widened(windows)
        return self._project(self.pooling(windows.mean(1, keepdim=True), windows))

    def pool(self, patches: Tensor, pooled_patches: Tensor) -> Tensor:
        """Pool any patches, as images do at the edges of their grids.

        Args:
            patches: (R, D * taps).
            pooled_patches: (N, P) integer rows of `patches`, -1 for none; no row is all -1.

        Returns:
            (N, C).
        """
        patches = self._widened(patches)
        there = pooled_patches >= 0
        row = torch.where(there, pooled_patches, torch.zeros_like(pooled_patches))
        gathered = patches.index_select(0, row.flatten()).unflatten(0, (-1, row.shape[1]))
        gathered = torch.where(there[..., None], gathered, torch.zeros_like(gathered))
        if not self.masks_missing:
            return self.forward(gathered)
        count = there.to(gathered.dtype).sum(1)[:, None, None]
        query = gathered.sum(1, keepdim=True) / count
        return self._project(self.pooling(query, gathered, there[:, None, None, :]))

    def _widened(self, patches: Tensor) -> Tensor:
        """Patches in a type that holds the weights' too, so that fp32 weights get a fp32 mean."""
        return patches.to(torch.promote_types(patches.dtype, self.w1.weight.dtype))

    def _project(self, pooled: Tensor) -> Tensor:
        """Map (N, 1, width) to (N, C)."""
        pooled = pooled.squeeze(1)
        return self.w2(F.silu(self.w1(pooled)) * self.w3(pooled))


class LowerOutput(NamedTuple):
    """What the lower part of the tower returns; all frame by frame."""

    hidden: Tensor
    """(F, W*G, D) after block prune_at + 1."""
    scores: Tensor
    """(F, W) f32 in (0, 1)."""
    last_pooled: Tensor
    """(1, W, D) f32, the scorer's view of the last frame."""


class VisionTower(nn.Module):
    """Vision transformer in two parts, with the scorer between and the connector on top."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.config = vision
        self.embedding = PatchEmbedding(vision)
        self.blocks = nn.ModuleList(Block(vision) for _ in range(vision.num_layers))
        self.scorer = Scorer(vision) if vision.pruning else None
        self.connector = Connector(
            config.connector, vision.hidden_size * len(vision.taps), config.text.hidden_size
        )

    def before_scoring(self, frames: Tensor) -> Tensor:
        """Run frames u8 (F, height, width, 3) through block `prune_at`; returns (F, W*G, D)."""
        x = self.embedding(frames)
        for block in self.blocks[: self.config.split_at - 1]:
            x = block(x)
        return x

    def score(self, x: Tensor, fresh: Tensor, prev_pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Score the output (F, W*G, D) of `before_scoring`; see `Scorer.forward`."""
        assert self.scorer is not None
        windows = x.unflatten(1, (self.config.windows, self.config.patches_per_window))
        return self.scorer(windows, fresh, prev_pooled)

    def after_scoring(self, x: Tensor, scores: Tensor, fresh: Tensor) -> Tensor:
        """Run block `prune_at + 1` with the log-score bias; (F, W*G, D) to (F, W*G, D)."""
        pruning = self.config.pruning
        assert pruning is not None
        block: Any = self.blocks[self.config.split_at - 1]
        bias = log_score_bias(
            scores, fresh, self.config.window_grid[1], pruning.rescale_bias_min
        ).to(block.attention.wq.weight.dtype)
        per_patch = bias.repeat_interleave(self.config.patches_per_window, dim=1)
        # ONNX Runtime's Attention wants the full (F, 1, N, N) bias, not a broadcast row.
        mask = per_patch[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        return block(x, mask)

    def lower(self, frames: Tensor, fresh: Tensor, prev_pooled: Tensor) -> LowerOutput:
        """Run the part before removal; causal over frames, so it can be called chunk by chunk.

        Args:
            frames: (F, height, width, 3) uint8.
            fresh: (F,) bool: no predecessor and no log-bias. True for a clip's first frame, and
                everywhere when nothing will be removed; the result then equals the plain model.
            prev_pooled: (1, W, D) f32, `last_pooled` of the chunk before.
        """
        x = self.before_scoring(frames)
        scores, last_pooled = self.score(x, fresh, prev_pooled)
        return LowerOutput(self.after_scoring(x, scores, fresh), scores, last_pooled)

    def lower_plain(self, frames: Tensor) -> Tensor:
        """Run the lower part of a tower that has no scorer; returns hidden (F, W*G, D)."""
        return self.blocks[self.config.split_at - 1](self.before_scoring(frames))

    def upper(self, bins: Tensor, segment: Tensor | None = None) -> Tensor:
        """Run the part after removal and the connector; arguments as in `tapped`.

        Returns:
            (b, S, C), one feature per slot.
        """
        return self.connect(self.tapped(bins, segment))

    def connect(self, tapped: Tensor) -> Tensor:
        """Pool the windows of video, (b, S*G, D * taps) to (b, S, C)."""
        group = self.config.patches_per_window
        windows = tapped.reshape(-1, group, tapped.shape[-1])  # (b*S, G, D * taps)
        return self.connector(windows).reshape(tapped.shape[0], -1, self.connector.w2.out_features)

    def tapped(self, bins: Tensor, segment: Tensor | None = None) -> Tensor:
        """Run the part after removal up to the connector.

        Args:
            bins: (b, S*G, D) packed windows.
            segment: (b, S) integer; slots attend to slots of the same value in their bin. None
                when each bin is one segment.

        Returns:
            (b, S*G, D * taps), the tapped blocks' outputs side by side.
        """
        group = self.config.patches_per_window
        mask = None
        if segment is not None:
            per_patch = segment.repeat_interleave(group, dim=1)
            mask = per_patch[:, None, :, None] == per_patch[:, None, None, :]
        tapped: dict[int, Tensor] = {}
        x = bins
        for index in range(self.config.split_at, self.config.num_layers):
            x = self.blocks[index](x, mask)
            if index in self.config.taps:
                tapped[index] = x
        # The stream may have widened on the way.
        return torch.cat([tapped[tap].to(x.dtype) for tap in self.config.taps], dim=-1)

    def in_window_order(self, pooled_patches: Tensor) -> Tensor:
        """Indices of patches in the towers' order, given row by row.

        Args:
            pooled_patches: (N, P) integer, into crops one after the other; -1 for none.
        """
        place = self.embedding.window_major.argsort()
        crop = pooled_patches // len(place)
        moved = crop * len(place) + place[pooled_patches % len(place)]
        return torch.where(pooled_patches < 0, pooled_patches, moved.to(pooled_patches.dtype))
