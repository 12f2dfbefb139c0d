"""The losses of a training step: answers, neighbour similarity, and what windows show.

Windows are removed in the forward pass exactly as at run time. The choice itself has no gradient:
scores learn through the log-bias of block `prune_at + 1`, and from the similarity loss.
Losses are sums beside counts, so that micro-batches and processes add up to the loss of the whole.
Axes: F frames and crops of a micro-batch, W windows, G patches of a window, D vision width,
K kept windows, M visual tokens, C decoder width.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stts_export.config import VisionConfig
from stts_export.model.vision import VisionTower
from stts_export.model.vlm import SttsModel
from stts_export.runtime.planner import FREE, pack
from stts_export.training.clips import COLOURS, DIRECTIONS, SHAPES
from stts_export.training.examples import Example, ImageInput, LabelledFrames
from stts_export.training.selectors import (
    Selection,
    after_tower,
    needs_hidden,
    select_features,
    select_windows,
)
from stts_export.training.sequences import Packed, SequenceBuilder, removed_windows

_MOTION_WEIGHT = 20.0  # a window in twenty or so shows something that moves


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
        """Summed cross-entropy of features (K, C) against three labels (K,) each; a scalar."""
        return (
            _cross_entropy(self.colour(features), colours)
            + _cross_entropy(self.shape(features), shapes)
            + _cross_entropy(self.place(features), places)
        )

    def change(self, outputs: Tensor, times: Tensor, motions: Tensor) -> Tensor:
        """Summed cross-entropy of decoder outputs (K, C) against two labels (K,); a scalar.

        Motion counts where a window shows an object: `motions` is -1 elsewhere.
        """
        moving = F.cross_entropy(self.motion(outputs), motions, ignore_index=-1, reduction="sum")
        return _cross_entropy(self.time(outputs), times) + _MOTION_WEIGHT * moving


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


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
def mixed_precision(bfloat16: bool, device: str = "cpu") -> Iterator[None]:
    """Run matrix products in bfloat16 where asked to; on the CPU attention stays in float32."""
    if not bfloat16:
        yield
    elif device == "cpu":
        with torch.autocast("cpu", torch.bfloat16), _Float32Attention():
            yield
    else:
        with torch.autocast(device, torch.bfloat16):
            yield


def similarity_loss(hidden: Tensor, scores: Tensor, counted: Tensor) -> Tensor:
    """Sum of (score - (1 - cosine with the same window one frame before))^2 (spec 2.10).

    A window is the concatenation of its patches. Only the cosines that are used are computed.
    Unlike in the reference, the first frame of a clip is not compared with the last frame of the
    clip before it in the batch.

    Args:
        hidden: (F, W*G, D) after block `prune_at`; gradients flow into it.
        scores: (F, W).
        counted: (F,) bool: frames that are compared with the frame before.
    """
    now = counted.nonzero().squeeze(1)
    windows = hidden.float().reshape(*scores.shape, -1)  # (F, W, G*D)
    cosine = F.cosine_similarity(windows[now], windows[now - 1], dim=-1, eps=1e-12)
    return ((scores[now] - (1 - cosine)) ** 2).sum()


@dataclass(frozen=True)
class Encoded:
    """Vision output of a micro-batch."""

    features: Tensor
    """(M, C) of all examples, one after the other."""
    keeps: list[NDArray[np.bool_]]
    """(T, W) of each clip; of anything else, empty."""
    scores: list[Tensor | None]
    """(T, W) f32 of each clip; None of anything else, and without a scorer."""
    similarity: Tensor
    """Summed similarity loss; 0 where nothing is removed."""


@dataclass(frozen=True)
class _Layout:
    """Where the frames and crops of examples lie in one row of frames."""

    frames: NDArray[np.uint8]
    spans: list[slice]
    """Of each example."""
    removed: list[int]
    """Windows to remove from each example."""

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(F,) frames of clips that are pruned, without each first one."""
        counted = np.zeros(len(self.frames), dtype=np.bool_)
        for span, count in zip(self.spans, self.removed, strict=True):
            if count:
                counted[span.start + 1 : span.stop] = True
        return counted


def _layout(vision: VisionConfig, examples: Sequence[Example]) -> _Layout:
    pixels, spans, removed = [], [], []
    start = 0
    for example in examples:
        own = _pixels(example)
        if own is not None:
            pixels.append(own)
        stop = start + (0 if own is None else len(own))
        spans.append(slice(start, stop))
        removed.append(removed_windows(example, vision.windows))
        start = stop
    if not pixels:
        # Every process runs every part of the model, whatever its examples are: sharded weights
        # are gathered by all of them together.
        pixels.append(np.zeros((1, *vision.image_size, 3), dtype=np.uint8))
    return _Layout(np.concatenate(pixels), spans, removed)


def _pixels(example: Example) -> NDArray[np.uint8] | None:
    if isinstance(example.visual, ImageInput):
        return example.visual.crops
    return None if example.visual is None else example.visual.frames


def encode(
    vision: VisionTower,
    examples: Sequence[Example],
    *,
    selector: str = "stts",
    refill: bool = True,
    seed: Sequence[int] = (0,),
    bfloat16: bool = False,
) -> Encoded:
    """Encode clips, each pruned and packed alone, and images, in one pass through every block.

    Args:
        vision: the tower.
        examples: their ratios say how much is removed.
        selector: what chooses windows; see `selectors`.
        refill: see `planner.pack`.
        seed: of selectors that draw; an example has the same chance in every micro-batch.
        bfloat16: see `mixed_precision`.
    """
    device = vision.connector.w2.weight.device
    layout = _layout(vision.config, examples)
    frames = torch.from_numpy(layout.frames).to(device)
    counted = layout.counted & (not after_tower(selector))
    with mixed_precision(bfloat16, device.type):
        hidden, scores, similarity = _lower(vision, frames, torch.from_numpy(counted).to(device))
        choices = _choose(vision.config, examples, layout, hidden, scores, selector, seed)
        hidden = _merged(hidden, choices, layout, vision.config)
        features, keeps = _upper(vision, hidden, examples, layout, choices, refill)
    per_example: list[Tensor | None] = [
        scores[span] if example.clip is not None and scores is not None else None
        for example, span in zip(examples, layout.spans, strict=True)
    ]
    return Encoded(features, keeps, per_example, similarity)


def _lower(
    vision: VisionTower, frames: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Hidden (F, W*G, D) after block `prune_at + 1`, scores (F, W), similarity loss."""
    x = vision.before_scoring(frames)
    if vision.scorer is None:
        return vision.blocks[vision.config.split_at - 1](x), None, x.new_zeros(())
    with torch.autocast(frames.device.type, enabled=False):
        start = x.new_zeros((1, vision.config.windows, vision.config.hidden_size)).float()
        scores, _ = vision.score(x.float(), ~counted, start)
        similarity = similarity_loss(x, scores, counted)
    return vision.after_scoring(x, scores, ~counted), scores, similarity


def _choose(
    vision: VisionConfig,
    examples: Sequence[Example],
    layout: _Layout,
    hidden: Tensor,
    scores: Tensor | None,
    selector: str,
    seed: Sequence[int],
) -> list[Selection | None]:
    """What stays of each clip that is pruned before the upper part."""
    if after_tower(selector) or not any(layout.removed):
        return [None] * len(layout.removed)
    on_host = None if scores is None else scores.detach().float().cpu().numpy()
    choices: list[Selection | None] = []
    for example, span, count in zip(examples, layout.spans, layout.removed, strict=True):
        if not count:
            choices.append(None)
            continue
        rows = None
        if needs_hidden(selector):
            windows = hidden[span].detach().float().unflatten(1, (vision.windows, -1))
            rows = windows.mean(2).flatten(0, 1).cpu().numpy()  # (T, W, G, D) -> (T*W, D)
        choices.append(
            select_windows(
                selector,
                (span.stop - span.start, vision.windows),
                count,
                scores=None if on_host is None else on_host[span],
                hidden=rows,
                # An example's own chance, whatever else is in its micro-batch.
                rng=np.random.default_rng((*seed, zlib.crc32(example.name.encode()))),
            )
        )
    return choices


def _merged(
    hidden: Tensor, choices: Sequence[Selection | None], layout: _Layout, vision: VisionConfig
) -> Tensor:
    """Average windows into those that they were merged into."""
    if not any(choice is not None and choice.merged_into is not None for choice in choices):
        return hidden
    windows = hidden.reshape(len(hidden) * vision.windows, -1)  # (F*W, G*D)
    into = np.arange(len(windows))
    for span, choice in zip(layout.spans, choices, strict=True):
        if choice is not None and choice.merged_into is not None:
            first = span.start * vision.windows
            into[first : first + choice.keep.size] = first + choice.merged_into
    # Refill may give back what was merged away: it stays as it was.
    stays = torch.from_numpy(into == np.arange(len(into))).to(hidden.device)
    size = torch.from_numpy(np.bincount(into, minlength=len(into))).to(hidden)
    sums = torch.zeros_like(windows).index_add(0, torch.from_numpy(into).to(hidden.device), windows)
    averages = sums / size.clamp(min=1)[:, None]
    return torch.where(stays[:, None], averages, windows).reshape(hidden.shape)


def _upper(
    vision: VisionTower,
    hidden: Tensor,
    examples: Sequence[Example],
    layout: _Layout,
    choices: Sequence[Selection | None],
    refill: bool,
) -> tuple[Tensor, list[NDArray[np.bool_]]]:
    """Features (M, C) of what stays, and keep of each clip."""
    width = vision.config.windows
    gathers, segments, wanted = [], [], []
    bins = 0
    for example, span, choice in zip(examples, layout.spans, choices, strict=True):
        rows = np.arange(span.start * width, span.stop * width).reshape(-1, width)
        if choice is None:
            gathers.append(rows)
            segments.append(np.zeros_like(rows))
            wanted.append(_wanted(vision, example, bins))
        else:
            plan = pack(choice.keep, refill=refill)
            gathers.append(rows.reshape(-1)[plan.gather_window])
            segments.append(plan.segment)
            wanted.append(_patches(vision.config, bins * width + plan.kept_slot))
        bins += len(gathers[-1])
    device = hidden.device
    if not bins:  # the frame that stands for no visual at all
        gathers, segments = [np.arange(width)[None]], [np.zeros((1, width), np.int64)]
        wanted = [_patches(vision.config, np.arange(1))]
    windows = hidden.unflatten(1, (width, -1)).flatten(0, 1)  # (F*W, G, D)
    gather = torch.from_numpy(np.concatenate(gathers)).to(device)
    filled = windows[gather].flatten(1, 2)  # (B, W, G, D) -> (B, W*G, D)
    segment = np.concatenate(segments)
    whole = bool((segment == segment[:, :1]).all()) and not bool((segment == FREE).any())
    mask = None if whole else torch.from_numpy(segment).to(device)
    features = _connected(vision, vision.tapped(filled, mask).flatten(0, 1), wanted)
    features = features.float()
    if not bins:
        return features[:0] + 0 * features.sum(), [np.ones((0, width), np.bool_)] * len(examples)
    return _drop_features(features, examples, layout, choices, width)


def _patches(vision: VisionConfig, slots: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Rows (n, G) of patches of window slots (n,)."""
    group = vision.patches_per_window
    return slots.astype(np.int64)[:, None] * group + np.arange(group)


def _wanted(vision: VisionTower, example: Example, bins: int) -> NDArray[np.int64]:
    """Rows of patches (N, P) of an example from which nothing is removed in the tower."""
    width = vision.config.windows
    if example.clip is not None:
        return _patches(vision.config, bins * width + np.arange(len(example.clip.frames) * width))
    if not isinstance(example.visual, ImageInput):
        return np.zeros((0, vision.config.patches_per_window), np.int64)
    index = torch.from_numpy(example.visual.pooled_patches.astype(np.int64))
    moved = vision.in_window_order(index.to(vision.embedding.window_major.device)).cpu().numpy()
    return np.where(moved < 0, -1, moved + bins * width * vision.config.patches_per_window)


def _connected(vision: VisionTower, tapped: Tensor, wanted: Sequence[NDArray[np.int64]]) -> Tensor:
    """Features (M, C) of patches (R, D * taps); one call of the connector, whatever is asked."""
    sizes = {rows.shape[1] for rows in wanted}
    if vision.connector.masks_missing:
        group = max(sizes)
        padded = [np.pad(r, ((0, 0), (0, group - r.shape[1])), constant_values=-1) for r in wanted]
    else:
        # Means and attention over patches stay the same when all of them come equally often.
        group = math.lcm(*sizes)
        padded = [np.tile(r, (1, group // r.shape[1])) for r in wanted]
    index = np.concatenate(padded)
    rows = torch.from_numpy(index).to(tapped.device)
    if (index >= 0).all():
        return vision.connector(tapped[rows])
    return vision.connector.pool(tapped, rows)


def _drop_features(
    features: Tensor,
    examples: Sequence[Example],
    layout: _Layout,
    choices: Sequence[Selection | None],
    width: int,
) -> tuple[Tensor, list[NDArray[np.bool_]]]:
    """Remove what a selector removes after the tower; all keeps."""
    keeps, stays = [], []
    start = 0
    for example, count, choice in zip(examples, layout.removed, choices, strict=True):
        if example.clip is None:
            keep = np.ones((0, width), dtype=np.bool_)
            image = example.visual
            size = len(image.pooled_patches) if isinstance(image, ImageInput) else 0
            stays.append(np.arange(start, start + size))
        elif choice is not None:
            keep = choice.keep
            size = int(keep.sum())
            stays.append(np.arange(start, start + size))
        else:
            frames = len(example.clip.frames)
            size = frames * width
            keep = np.ones((frames, width), dtype=np.bool_)
            if count:
                own = features[start : start + size].detach().cpu().numpy()
                keep = select_features(own, (frames, width), count).keep
            stays.append(start + np.flatnonzero(keep))
        keeps.append(keep)
        start += size
    index = np.concatenate(stays)
    if len(index) == len(features):
        return features, keeps
    return features[torch.from_numpy(index).to(features.device)], keeps


@dataclass(frozen=True)
class Counts:
    """What the losses of some examples are divided by; known before anything is run."""

    answers: int
    """Answer tokens, with the ends."""
    pairs: int
    """Windows that are compared with the frame before."""
    kept: int
    """Kept windows of clips."""

    @staticmethod
    def of(examples: Sequence[Example], sequences: SequenceBuilder) -> Counts:
        """Count for a process's share of a step."""
        windows = sequences.config.vision.windows
        pairs = kept = 0
        for example in examples:
            if example.clip is None:
                continue
            frames, removed = len(example.clip.frames), removed_windows(example, windows)
            kept += frames * windows - removed
            pairs += (frames - 1) * windows if removed else 0
        return Counts(sequences.answer_tokens(examples), pairs, kept)


@dataclass(frozen=True)
class Outcome:
    """Losses of a micro-batch (summed, scalars), and how its questions were answered."""

    answer: Tensor
    similarity: Tensor
    label: Tensor
    correct: Tensor
    """(Q,) bool: every token of the answer is the most likely one, given those before it."""
    packed: Packed
    encoded: Encoded


class Trainee(nn.Module):
    """The model, and heads that exist in training only, as one module to wrap and to call.

    Args:
        model: what is trained.
        labels: heads that name what windows show; None without them.
        sequences: makes token sequences.
        selector: see `encode`.
        refill: see `encode`.
        bfloat16: see `mixed_precision`.
    """

    def __init__(
        self,
        model: SttsModel,
        labels: WindowLabels | None,
        sequences: SequenceBuilder,
        *,
        selector: str = "stts",
        refill: bool = True,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.sequences = sequences
        self.selector = selector
        self.refill = refill
        self.in_bfloat16 = bfloat16

    def forward(
        self,
        batch: Sequence[Example] | LabelledFrames,
        seed: Sequence[int] = (0,),
    ) -> Outcome | tuple[Tensor, Tensor]:
        """Run a micro-batch; see `answer_questions` and `name_windows`."""
        if isinstance(batch, LabelledFrames):
            return self.name_windows(batch)
        return self.answer_questions(batch, seed)

    def answer_questions(self, examples: Sequence[Example], seed: Sequence[int] = (0,)) -> Outcome:
        """Encode visuals, answer their questions, and compute all losses."""
        vision, language = self.model.vision, self.model.language
        encoded = encode(
            vision,
            examples,
            selector=self.selector,
            refill=self.refill,
            seed=seed,
            bfloat16=self.in_bfloat16,
        )
        device = encoded.features.device
        packed = self.sequences.build(examples, encoded.keeps)
        ids, predict_at = packed.ids.to(device), packed.predict_at.to(device)
        with mixed_precision(self.in_bfloat16, device.type):
            x = language.lookup(ids).flatten(0, 1)
            x = x.index_add(0, packed.patch_at.to(device), encoded.features.to(x.dtype))
            x = language.transform(
                x.unflatten(0, ids.shape),
                packed.positions.to(device),
                packed.mask.to(device),
                lambda _, k, v: (k, v),
            ).flatten(0, 1)
            logits = language.lm_head(x[predict_at]).float()  # (A, V)
        targets = packed.targets.to(device)
        right = logits.argmax(-1) == targets
        answer = F.cross_entropy(logits, targets, reduction="sum")
        label = answer.new_zeros(())
        if self.labels is not None:
            outputs = x[packed.patch_at.to(device)].float()
            label = _label_loss(self.labels, examples, encoded, outputs)
        correct = torch.ones(len(packed.types), dtype=torch.bool, device=device)
        correct = correct.index_put((packed.question.to(device)[~right],), torch.tensor(False))
        return Outcome(answer, encoded.similarity, label, correct, packed, encoded)

    def name_windows(self, batch: LabelledFrames) -> tuple[Tensor, Tensor]:
        """Name what the windows of single frames show; nothing is removed.

        Returns:
            The summed loss (scalar), and for every window that shows an object whether its shape
            was right.
        """
        assert self.labels is not None
        vision = self.model.vision
        device = vision.connector.w2.weight.device
        frames, colours, shapes = (
            torch.from_numpy(values).to(device)
            for values in (batch.frames, batch.colours, batch.shapes)
        )
        with mixed_precision(self.in_bfloat16, device.type):
            x = vision.before_scoring(frames)
            x = vision.upper(vision.blocks[vision.config.split_at - 1](x))
        features = x.flatten(0, 1).float()
        colours, shapes = colours.flatten(), shapes.flatten()
        places = torch.arange(vision.config.windows, device=device).repeat(len(frames))
        right = self.labels.shape(features).argmax(-1) == shapes
        return self.labels.appearance(features, colours, shapes, places), right[shapes > 0]


def _label_loss(
    labels: WindowLabels, examples: Sequence[Example], encoded: Encoded, outputs: Tensor
) -> Tensor:
    """All labels of kept windows, where there are any; `outputs` (M, C) of the decoder."""
    found = [np.zeros((0, 6), dtype=np.int64)]
    start = 0
    for example, keep in zip(examples, encoded.keeps, strict=True):
        size = int(keep.sum())
        if example.contents is not None:
            time, place = keep.nonzero()
            colour, shape, motion = (values[keep] for values in example.contents)
            motion = np.where(colour > 0, motion, -1)
            row = start + np.arange(size)
            found.append(np.stack([row, colour, shape, place, time, motion], axis=1))
        image = example.visual
        start += len(image.pooled_patches) if isinstance(image, ImageInput) else size
    on_device = torch.from_numpy(np.concatenate(found)).to(outputs.device)
    rows, colours, shapes, places, times, motions = on_device.unbind(1)
    return labels.appearance(encoded.features[rows], colours, shapes, places) + labels.change(
        outputs[rows], times, motions
    )
