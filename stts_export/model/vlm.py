"""The whole model: clip in, window features and answers out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stts_export.config import ModelConfig
from stts_export.model.language import Decoder
from stts_export.model.pruning import PackPlan, n_prune, pack, select
from stts_export.model.vision import VisionTower


@dataclass(frozen=True)
class EncodedClip:
    """Vision output of one clip."""

    hidden: Tensor
    """(T, W*G, D) after block prune_at + 1."""
    scores: Tensor | None
    """(T, W) f32; None when the checkpoint has no scorer."""
    keep: Tensor
    """(T, W) bool."""
    features: Tensor
    """(K, C), frame-major: what is added to the `<im_patch>` embeddings."""
    plan: PackPlan | None
    """None when nothing was removed."""


class SttsModel(nn.Module):
    """Vision tower with pruning, and decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.language = Decoder(config)

    def encode(
        self,
        frames: Tensor,
        prune_ratio: float,
        *,
        refill: bool = True,
        keep: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> EncodedClip:
        """Encode one clip.

        Args:
            frames: (T, height, width, 3) uint8 at the model's size.
            prune_ratio: fraction of windows to remove, in [0, 1).
            refill: see `pruning.pack`.
            keep: (T, W) bool; decides in place of the scores, for comparisons given a mask.
            scores: (T, W) taken in place of the scorer's, for comparisons given scores: the
                rescaled bias magnifies rounding of scores where a row of them is nearly constant.
        """
        vision = self.vision.config
        count = n_prune(vision.windows, len(frames), prune_ratio) if vision.pruning else 0
        if keep is not None:
            count = int((~keep).sum())
        if vision.pruning:
            fresh = self._fresh(frames, count)
            x = self.vision.before_scoring(frames)
            if scores is None:
                scores = self._score(x, fresh)
            hidden = self.vision.after_scoring(x, scores, fresh)
        else:
            hidden = self.vision.lower_plain(frames)
        if count == 0:
            full = torch.ones(len(frames), vision.windows, dtype=torch.bool, device=frames.device)
            return EncodedClip(hidden, scores, full, self.vision.upper(hidden).flatten(0, 1), None)
        assert scores is not None
        if keep is None:
            keep = select(scores, count)
        plan = pack(keep, refill=refill)
        windows = hidden.unflatten(1, (vision.windows, -1)).flatten(0, 1)  # (T*W, G, D)
        bins = windows[plan.gather_window].flatten(1, 2)  # (B, W, G, D) -> (B, W*G, D)
        features = self.vision.upper(bins, plan.segment).flatten(0, 1)[plan.kept_slot]
        return EncodedClip(hidden, scores, keep, features, plan)

    def encode_images(self, crops: Tensor, pooled_patches: Tensor) -> Tensor:
        """Encode the crops of images, from which nothing is ever removed.

        Args:
            crops: (n, height, width, 3) uint8 at the model's size.
            pooled_patches: (N, P) integer, the patches that make up a token: indices into the
                patches of all crops, row by row in each; -1 for none.

        Returns:
            (N, C): what is added to the `<im_patch>` embeddings.
        """
        if self.config.vision.pruning:
            x = self.vision.before_scoring(crops)
            fresh = self._fresh(crops, 0)
            hidden = self.vision.after_scoring(x, self._score(x, fresh), fresh)
        else:
            hidden = self.vision.lower_plain(crops)
        tapped = self.vision.tapped(hidden).flatten(0, 1)
        return self.vision.connector.pool(tapped, self.vision.in_window_order(pooled_patches))

    def choose(self, frames: Tensor, prune_ratio: float) -> tuple[Tensor, Tensor]:
        """Score a clip and select its windows, as `encode` does, without the rest of the tower.

        Args:
            frames: (T, height, width, 3) uint8 at the model's size.
            prune_ratio: fraction of windows to remove, in [0, 1).

        Returns:
            scores (T, W) f32, and keep (T, W) bool.
        """
        count = n_prune(self.vision.config.windows, len(frames), prune_ratio)
        scores = self._score(self.vision.before_scoring(frames), self._fresh(frames, count))
        return scores, select(scores, count)

    def _fresh(self, frames: Tensor, count: int) -> Tensor:
        """Frames without predecessor and bias, (T,) bool: all of them when nothing is removed."""
        fresh = torch.full((len(frames),), count == 0, device=frames.device)
        fresh[0] = True
        return fresh

    def _score(self, x: Tensor, fresh: Tensor) -> Tensor:
        vision = self.vision.config
        nothing_before = torch.zeros(1, vision.windows, vision.hidden_size, device=x.device)
        return self.vision.score(x, fresh, nothing_before)[0]

    def visual_groups(self, ids: Tensor) -> Tensor:
        """0 for visual tokens, -1 for text; for prompts with one clip. (N, L) to (N, L)."""
        visual = torch.tensor(self.config.tokens.visual, device=ids.device)
        return torch.isin(ids, visual).long() - 1

    def greedy(
        self,
        ids: Tensor,
        features: Tensor,
        max_new_tokens: int,
        positions: Tensor | None = None,
    ) -> list[int]:
        """Continue one prompt by the most likely token; recomputes all of it, so for checks.

        Args:
            ids: (L,), without the tokens of removed windows.
            features: see `Decoder.embed`.
            max_new_tokens: new tokens; the end of an answer stops nothing.
            positions: (L,) rotary positions of the prompt, 0, 1, ... when None; new tokens go on
                after the last of them.
        """
        sequence = ids[None]
        groups = self.visual_groups(sequence)
        places = torch.arange(len(ids), device=ids.device) if positions is None else positions
        places = places[None]
        for _ in range(max_new_tokens):
            logits = self.language(sequence, features, groups, places)
            token = logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, token], dim=1)
            groups = torch.cat([groups, torch.full_like(token, -1)], dim=1)
            places = torch.cat([places, places[:, -1:] + 1], dim=1)
        return sequence[0, len(ids) :].tolist()
