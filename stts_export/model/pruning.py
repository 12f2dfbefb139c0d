"""Scoring, selection and packing of windows: the oracle.

Written to be read beside the reference (`olmo/nn/temporal_image_vit.py` in allenai/molmo2), not to
be fast; `runtime.planner` and the TensorRT plugin compute the same and are tested against this.
Axes: F frames of a batch, T frames of one clip, W windows of a frame, G patches of a window,
D vision width, B bins, K kept windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts_export.config import VisionConfig
from stts_export.model.layers import MultiHeadAttention

FIRST_FRAME_SCORE = 100.0


class Scorer(nn.Module):
    """Rates every window from its frame and the frame before (reference: `TemporalTokenScorer`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.pooler = MultiHeadAttention(width, width, config.num_heads, config.head_dim)
        self.w1 = nn.Linear(2 * width, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.intermediate_size)
        self.w3 = nn.Linear(config.intermediate_size, 1)

    def forward(self, windows: Tensor, fresh: Tensor, prev_pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Score windows.

        Args:
            windows: (F, W, G, D) residual stream after block `prune_at`.
            fresh: (F,) bool, True for a frame that has no predecessor.
            prev_pooled: (1, W, D) `last_pooled` of the frames before these.

        Returns:
            scores (F, W) f32 in (0, 1), high = important; last_pooled (1, W, D) f32.
        """
        windows = windows.float()
        frames, count, _, width = windows.shape
        flat = windows.flatten(0, 1)  # (F*W, G, D)
        pooled = self.pooler(flat.mean(1, keepdim=True), flat).reshape(frames, count, width)
        previous = torch.cat([prev_pooled, pooled[:-1]])
        previous = torch.where(fresh[:, None, None], torch.zeros_like(previous), previous)
        x = torch.cat([previous, pooled], dim=-1)
        x = self.w3(F.silu(self.w2(F.silu(self.w1(x)))))
        return torch.sigmoid(x.squeeze(-1)), pooled[-1:]


def log_score_bias(
    scores: Tensor, fresh: Tensor, window_columns: int, rescale_bias_min: float
) -> Tensor:
    """Key bias of block `prune_at + 1`: log of the scores, rescaled per row of windows.

    s' = m + (s - min_row)(1 - m) / (max_row - min_row + 1e-6), bias = log s'; rows of the window
    grid, not frames (spec 2.6).

    Args:
        scores: (F, W).
        fresh: (F,) bool; these frames get no bias.
        window_columns: windows in a row of the grid.
        rescale_bias_min: m, the smallest rescaled score.

    Returns:
        (F, W) in [log m, 0].
    """
    rows = scores.unflatten(1, (-1, window_columns))
    low = rows.amin(-1, keepdim=True)
    high = rows.amax(-1, keepdim=True)
    rescaled = rescale_bias_min + (rows - low) * (1 - rescale_bias_min) / (high - low + 1e-6)
    bias = torch.log(rescaled).flatten(1)
    return torch.where(fresh[:, None], torch.zeros_like(bias), bias)


def n_prune(windows: int, frames: int, prune_ratio: float) -> int:
    """Windows to remove from a clip: trunc(f32(f32(W * ratio) * f32(T))) (spec 2.3)."""
    per_frame = torch.tensor(windows * prune_ratio, dtype=torch.float32)
    return int((per_frame * torch.tensor(frames, dtype=torch.float32)).item())


def select(scores: Tensor, count: int) -> Tensor:
    """Choose the windows that survive, globally over a clip.

    The first frame counts as score 100; of equal scores the lower index is removed first.

    Args:
        scores: (T, W).
        count: windows to remove.

    Returns:
        keep, (T, W) bool.
    """
    raised = scores.detach().clone()
    raised[0] = FIRST_FRAME_SCORE
    order = raised.flatten().sort(stable=True).indices
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:count]] = False
    return keep.unflatten(0, scores.shape)


@dataclass(frozen=True)
class PackPlan:
    """Where windows go; see `pack`."""

    gather_window: Tensor
    """(B, W) i64: row of the clip's T*W windows that fills a slot; 0 for free slots."""
    segment: Tensor
    """(B, W) i64: frame a slot belongs to, -1 for free slots. Slots attend within a segment."""
    kept_slot: Tensor
    """(K,) i64 into B*W: the slots of kept windows, frame-major."""
    refilled: Tensor
    """(T,) bool: frames whose removed windows came back as context."""


def pack(keep: Tensor, *, refill: bool = True) -> PackPlan:
    """Pack kept windows first-fit descending into bins of W slots (spec 2.7).

    Frames are placed by kept count, descending, ties by index, each into the first bin with room.
    With `refill` a frame that ends up alone in its bin gets its removed windows back: they are
    context for the later blocks and are dropped after them.

    Args:
        keep: (T, W) bool.
        refill: the reference's behaviour; False packs kept windows only.
    """
    frames, windows = keep.shape
    counts = keep.sum(1).tolist()
    bins: list[list[int]] = []
    room: list[int] = []
    for frame in sorted(range(frames), key=lambda f: (-counts[f], f)):
        if counts[frame] == 0:
            continue
        index = next((b for b, free in enumerate(room) if free >= counts[frame]), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(windows)
        bins[index].append(frame)
        room[index] -= counts[frame]

    gather = torch.zeros((len(bins), windows), dtype=torch.long)
    segment = torch.full((len(bins), windows), -1, dtype=torch.long)
    refilled = torch.zeros(frames, dtype=torch.bool)
    slot_of_window = torch.full((frames, windows), -1, dtype=torch.long)
    for b, members in enumerate(bins):
        start = 0
        for frame in members:
            alone = refill and len(members) == 1
            refilled[frame] = alone and counts[frame] < windows
            chosen = torch.arange(windows) if alone else keep[frame].cpu().nonzero().squeeze(1)
            stop = start + len(chosen)
            gather[b, start:stop] = frame * windows + chosen
            segment[b, start:stop] = frame
            slot_of_window[frame, chosen] = b * windows + torch.arange(start, stop)
            start = stop
    kept_slot = slot_of_window[keep.cpu()]
    device = keep.device
    return PackPlan(
        gather.to(device), segment.to(device), kept_slot.to(device), refilled.to(device)
    )
