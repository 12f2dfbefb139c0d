"""The losses of a training step: answers, neighbour similarity, and what windows show.

Windows are removed in the forward pass exactly as at run time. The choice itself has no gradient:
scores learn through the log-bias of block `prune_at + 1`, and from the similarity loss.
Axes: F frames of all clips, W windows, G patches of a window, D vision width, K kept windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stts_export.model.pruning import n_prune, pack, select
from stts_export.model.vision import VisionTower
from stts_export.model.vlm import SttsModel
from stts_export.training.batches import Example, LabelledFrames, SequenceBuilder
from stts_export.training.clips import COLOURS, DIRECTIONS, SHAPES


class WindowLabels(nn.Module):
    """Says what a window shows, where, when, and how it moves; used in training only.

    Colour, shape and place are read from the features, which know one frame; time and motion from
    the decoder's output at the same tokens, which have seen all frames.

    Args:
        width: C, channels of a feature.
        windows: W, windows of a frame.
        max_frames: upper limit of T.
    """

    def __init__(self, width: int, windows: int, max_frames: int) -> None:
        super().__init__()
        self.colour = nn.Linear(width, 1 + len(COLOURS))
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.place = nn.Linear(width, windows)
        self.time = nn.Linear(width, max_frames)
        self.motion = nn.Linear(width, 1 + len(DIRECTIONS))

    def appearance(
        self, features: Tensor, colours: Tensor, shapes: Tensor, places: Tensor
    ) -> Tensor:
        """Mean cross-entropy of features (K, C) against three labels (K,) each; a scalar."""
        return (
            F.cross_entropy(self.colour(features), colours)
            + F.cross_entropy(self.shape(features), shapes)
            + F.cross_entropy(self.place(features), places)
        )

    def change(self, outputs: Tensor, times: Tensor, motions: Tensor) -> Tensor:
        """Mean cross-entropy of decoder outputs (K, C) against two labels (K,); a scalar.

        Motion counts where a window shows an object: `motions` is -1 elsewhere.
        """
        motion_loss = F.cross_entropy(
            self.motion(outputs), motions, ignore_index=-1, reduction="sum"
        ) / (motions >= 0).sum().clamp(min=1)
        return F.cross_entropy(self.time(outputs), times) + motion_loss


class _Float32Attention(TorchFunctionMode):
    """Keeps attention in float32 under autocast: on the CPU its bfloat16 gradient is the slower."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(tensor.float() for tensor in args), **(kwargs or {}))


@contextmanager
def mixed_precision(bfloat16: bool) -> Iterator[None]:
    """Run linear layers in bfloat16 where asked to; attention stays in float32."""
    if not bfloat16:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _Float32Attention():
        yield


@dataclass(frozen=True)
class EncodedBatch:
    """Vision output of several clips."""

    features: Tensor
    """(K, C) of all clips, clip after clip, frame-major."""
    keeps: list[Tensor]
    """(T, W) bool of each clip."""
    scores: list[Tensor]
    """(T, W) f32 of each clip."""
    similarity_loss: Tensor
    """Scalar; 0 where nothing is removed."""


@dataclass(frozen=True)
class StepResult:
    """Losses of one batch (scalars), and how its questions were answered."""

    answer_loss: Tensor
    similarity_loss: Tensor
    label_loss: Tensor
    types: tuple[str, ...]
    correct: Tensor
    """(Q,) bool: the answer is the most likely token of all."""
    encoded: EncodedBatch


def similarity_loss(hidden: Tensor, scores: Tensor, fresh: Tensor) -> Tensor:
    """Mean of (score - (1 - cosine with the same window one frame before))^2 (spec 2.10).

    Only frames that are not fresh count: unlike in the reference, the first frame of a clip is not
    compared with the last frame of the clip before it in the batch.

    Args:
        hidden: (F, W*G, D) after block `prune_at`; gradients flow into it.
        scores: (F, W).
        fresh: (F,) bool.
    """
    if bool(fresh.all()):
        return scores.new_zeros(())
    windows = hidden.float().reshape(*scores.shape, -1)  # (F, W, G*D)
    unit = F.normalize(windows, dim=-1)
    cosine = (unit[1:] * unit[:-1]).sum(-1)
    error = (scores[1:] - (1 - cosine)) ** 2
    return error[~fresh[1:]].mean()


def encode_batch(
    vision: VisionTower, examples: Sequence[Example], *, bfloat16: bool = False
) -> EncodedBatch:
    """Encode clips, each packed alone, with the bins of all in one pass through the upper part."""
    shape = vision.config
    frames = torch.from_numpy(np.concatenate([example.frames for example in examples]))
    lengths = [len(example.frames) for example in examples]
    removed = [
        n_prune(shape.windows, length, example.prune_ratio)
        for length, example in zip(lengths, examples, strict=True)
    ]
    fresh = torch.cat(
        [
            torch.arange(length) < (1 if count else length)
            for length, count in zip(lengths, removed, strict=True)
        ]
    )
    with mixed_precision(bfloat16):
        x = vision.before_scoring(frames)
        with torch.autocast("cpu", enabled=False):
            start = torch.zeros(1, shape.windows, shape.hidden_size)
            scores, _ = vision.score(x.float(), fresh, start)
            similarity = similarity_loss(x, scores, fresh)
        hidden = vision.after_scoring(x, scores, fresh)
        keeps, gathers, segments, kept_slots = [], [], [], []
        offset, slots = 0, 0
        for own, count in zip(scores.split(lengths), removed, strict=True):
            keeps.append(select(own, count))
            plan = pack(keeps[-1])
            gathers.append(plan.gather_window + offset)
            segments.append(plan.segment)
            kept_slots.append(plan.kept_slot + slots)
            offset += own.numel()
            slots += plan.gather_window.numel()
        windows = hidden.unflatten(1, (shape.windows, -1)).flatten(0, 1)  # (F*W, G, D)
        bins = windows[torch.cat(gathers)].flatten(1, 2)  # (B, W, G, D) -> (B, W*G, D)
        packed = vision.upper(bins, torch.cat(segments)).flatten(0, 1)
    features = packed.float()[torch.cat(kept_slots)]
    return EncodedBatch(features, keeps, list(scores.split(lengths)), similarity)


def label_batch(
    vision: VisionTower, labels: WindowLabels, batch: LabelledFrames, *, bfloat16: bool = False
) -> tuple[Tensor, Tensor]:
    """Name what the windows of single frames show; nothing is removed.

    Returns:
        The loss (scalar), and for every window that shows an object whether its shape was right.
    """
    frames = torch.from_numpy(batch.frames)
    colours = torch.from_numpy(batch.colours).flatten()
    shapes = torch.from_numpy(batch.shapes).flatten()
    fresh = torch.ones(len(frames), dtype=torch.bool)
    with mixed_precision(bfloat16):
        x = vision.before_scoring(frames)
        x = vision.after_scoring(x, torch.zeros(len(frames), vision.config.windows), fresh)
        features = vision.upper(x).flatten(0, 1).float()
    right = labels.shape(features).argmax(-1) == shapes
    places = torch.arange(vision.config.windows).repeat(len(frames))
    return labels.appearance(features, colours, shapes, places), right[shapes > 0]


def run_batch(
    model: SttsModel,
    labels: WindowLabels,
    sequences: SequenceBuilder,
    examples: Sequence[Example],
    *,
    bfloat16: bool = False,
) -> StepResult:
    """Encode clips, answer their questions, and compute all losses."""
    encoded = encode_batch(model.vision, examples, bfloat16=bfloat16)
    batch = sequences.build(examples, encoded.keeps)
    with mixed_precision(bfloat16):
        x = model.language.embed(batch.ids, encoded.features)
        x = model.language.transform(x, batch.positions, batch.mask, lambda _, k, v: (k, v))
        x = x.flatten(0, 1)
        logits = model.language.lm_head(x[batch.predict_at]).float()  # (Q, 2, V)
    answer_loss = F.cross_entropy(logits[:, 0], batch.targets[:, 0])
    end_loss = F.cross_entropy(logits[:, 1], batch.targets[:, 1])
    outputs = x[batch.ids.flatten() == model.config.tokens.im_patch].float()
    label_loss = _label_loss(labels, examples, encoded, outputs)
    return StepResult(
        answer_loss + 0.1 * end_loss,
        encoded.similarity_loss,
        label_loss,
        batch.types,
        logits[:, 0].argmax(-1) == batch.targets[:, 0],
        encoded,
    )


def _label_loss(
    labels: WindowLabels, examples: Sequence[Example], encoded: EncodedBatch, outputs: Tensor
) -> Tensor:
    """All labels of the kept windows; `outputs` (K, C) of the decoder at their tokens."""
    kept = torch.cat(encoded.keeps)  # (F, W)
    colours, shapes, motions = (
        torch.from_numpy(np.concatenate(arrays))[kept]
        for arrays in zip(*(example.contents for example in examples), strict=True)
    )
    places = torch.arange(kept.shape[1]).expand_as(kept)[kept]
    frame = torch.cat([torch.arange(len(example.frames)) for example in examples])
    times = frame[:, None].expand_as(kept)[kept]
    of_objects = torch.where(colours > 0, motions, -1)
    return labels.appearance(encoded.features, colours, shapes, places) + labels.change(
        outputs, times, of_objects
    )
