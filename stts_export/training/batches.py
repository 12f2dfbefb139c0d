"""From clips to what a training step takes: frames, labels and token sequences.

Axes: T frames of a clip, W windows of a frame, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stts_export.config import ModelConfig
from stts_export.runtime.prompt import PromptBuilder, VideoTokens, kept_positions
from stts_export.runtime.sampling import sample_times
from stts_export.training.clips import (
    TOP_LEVEL,
    Clip,
    Frames,
    Question,
    WindowContents,
    degrade,
    frame_times,
    make_clip,
    render,
    split_seed,
    window_contents,
)
from stts_export.training.config import TrainConfig
from stts_export.training.tokenizer import CHAT_START, answer_ids


@dataclass(frozen=True)
class Example:
    """One clip as the model sees it, with the questions that are asked."""

    frames: Frames
    """(T, side, side, 3) at the model's size."""
    timestamps: tuple[float, ...]
    """(T,) seconds, as printed in the prompt."""
    questions: tuple[Question, ...]
    prune_ratio: float
    contents: WindowContents


def make_example(
    clip: Clip,
    questions: Sequence[Question],
    prune_ratio: float,
    config: ModelConfig,
    max_frames: int,
) -> Example:
    """Sample, draw and degrade a clip as a file of it would be sampled and decoded."""
    times = sample_times(clip.duration, max_frames)
    drawn_at = frame_times(clip, times.tolist())
    frames = degrade(
        render(clip, drawn_at, config.vision.image_size[0]), np.random.default_rng((clip.seed, 13))
    )
    contents = window_contents(clip, drawn_at, config.vision.window_grid)
    return Example(frames, tuple(times.tolist()), tuple(questions), prune_ratio, contents)


@dataclass(frozen=True)
class LabelledFrames:
    """Single frames of different clips, with what each window shows."""

    frames: Frames
    """(F, side, side, 3)."""
    colours: NDArray[np.int64]
    """(F, W); see `WindowContents`."""
    shapes: NDArray[np.int64]
    """(F, W)."""


# Clips of the two stages differ: far more than a run ever takes from the start of the split.
_LABEL_CLIPS = 5 * 10**8


def labelled_frames(config: TrainConfig, model: ModelConfig, step: int) -> LabelledFrames:
    """Return the frames of one step of the first stage; they depend on the arguments only."""
    drawn, colours, shapes = [], [], []
    for index in range(config.data.label_frames):
        number = _LABEL_CLIPS + step * config.data.label_frames + index
        seed = split_seed("train", number)
        rng = np.random.default_rng((config.seed, seed))
        clip = make_clip(seed, level=int(rng.integers(TOP_LEVEL + 1)))
        shown = clip.things[int(rng.integers(len(clip.things)))]
        time = float(rng.uniform(shown.start, min(shown.end, clip.duration)))
        drawn.append(degrade(render(clip, [time], model.vision.image_size[0]), rng))
        contents = window_contents(clip, [time], model.vision.window_grid)
        colours.append(contents.colour)
        shapes.append(contents.shape)
    return LabelledFrames(np.concatenate(drawn), np.concatenate(colours), np.concatenate(shapes))


def train_examples(config: TrainConfig, model: ModelConfig, step: int, level: int) -> list[Example]:
    """Return the examples of one step; they depend on the arguments only."""
    data, pruning = config.data, config.pruning
    middle = (pruning.min_ratio + pruning.max_ratio) / 2
    examples = []
    for index in range(data.clips_per_step):
        seed = split_seed("train", step * data.clips_per_step + index)
        rng = np.random.default_rng((config.seed, seed))
        easier = level > 0 and rng.random() < data.easier_share
        clip = make_clip(seed, level=int(rng.integers(level)) if easier else level)
        ratio = float(rng.triangular(pruning.min_ratio, middle, pruning.max_ratio))
        if rng.random() < pruning.full_share:
            ratio = 0.0
        chosen = rng.permutation(len(clip.questions))[: data.questions_per_clip]
        questions = [clip.questions[int(number)] for number in chosen]
        examples.append(make_example(clip, questions, ratio, model, data.max_frames))
    return examples


def dev_examples(
    config: TrainConfig, model: ModelConfig, level: int, prune_ratio: float
) -> Iterator[list[Example]]:
    """Yield batches of dev clips with all their questions; the same at every call."""
    for start in range(0, config.dev_clips, config.data.clips_per_step):
        stop = min(start + config.data.clips_per_step, config.dev_clips)
        clips = [make_clip(split_seed("dev", index), level=level) for index in range(start, stop)]
        yield [
            make_example(clip, clip.questions, prune_ratio, model, config.data.max_frames)
            for clip in clips
        ]


@dataclass(frozen=True)
class Sequences:
    """Token sequences of a batch, one per clip: the clip, then blocks with one question each.

    Every block sees the clip and itself, and continues the clip's positions: to each block the
    sequence looks exactly like the prompt with this question alone.
    """

    ids: Tensor
    """(N, L) i64."""
    positions: Tensor
    """(N, L) i64."""
    mask: Tensor
    """(N, 1, L, L) bool, True = may attend."""
    predict_at: Tensor
    """(Q, 2) i64 into N*L: where the answer and the end after it are predicted."""
    targets: Tensor
    """(Q, 2) i64: the answer and the end."""
    types: tuple[str, ...]
    """(Q,) question types."""


class SequenceBuilder:
    """Builds the training form of prompts.

    Args:
        prompts: makes the prompts that the runtime makes.
    """

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self._config = prompts.config
        self._answers = answer_ids(prompts.tokenizer)
        self._chat_start = prompts.tokenizer.token_to_id(CHAT_START)
        self._end = min(prompts.eos_token_ids)
        self._prefixes: dict[tuple[float, ...], NDArray[np.int64]] = {}
        self._suffixes: dict[str, NDArray[np.int64]] = {}

    def _prefix(self, timestamps: tuple[float, ...]) -> NDArray[np.int64]:
        if timestamps not in self._prefixes:
            visuals = [VideoTokens(timestamps, self._config.vision.windows)]
            whole = self._prompts.build("", visuals)
            cut = int(np.flatnonzero(whole == self._chat_start)[0])
            self._prefixes[timestamps] = whole[:cut]
        return self._prefixes[timestamps]

    def _suffix(self, question: str) -> NDArray[np.int64]:
        if question not in self._suffixes:
            self._suffixes[question] = self._prompts.build(question)[1:]
        return self._suffixes[question]

    def build(self, examples: Sequence[Example], keeps: Sequence[Tensor]) -> Sequences:
        """Lay out the questions of all examples, given which windows were kept, each (T, W)."""
        rows = [
            self._row(example, keep.cpu().numpy())
            for example, keep in zip(examples, keeps, strict=True)
        ]
        length = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), length), self._end, dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        # Padding forms a block of its own at the end, so that no row of the mask is empty.
        block = np.full((len(rows), length), -1, dtype=np.int64)
        predict_at, targets, types = [], [], []
        for row, (prefix_and_blocks, sizes) in enumerate(rows):
            ids[row, : len(prefix_and_blocks)] = prefix_and_blocks
            start = sizes[0]
            positions[row, :start] = np.arange(start)
            block[row, :start] = 0
            for number, (size, question) in enumerate(
                zip(sizes[1:], examples[row].questions, strict=True), start=1
            ):
                stop = start + size
                positions[row, start:stop] = sizes[0] + np.arange(size)
                block[row, start:stop] = number
                predict_at.append((row * length + stop - 2, row * length + stop - 1))
                targets.append((self._answers[question.answer], self._end))
                types.append(question.type)
                start = stop
        return Sequences(
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            self._mask(torch.from_numpy(ids), torch.from_numpy(block)),
            torch.tensor(predict_at),
            torch.tensor(targets),
            tuple(types),
        )

    def _row(
        self, example: Example, keep: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], list[int]]:
        """Return the tokens of one clip, and the sizes of its parts: the clip, then the blocks."""
        whole = self._prefix(example.timestamps)
        prefix = whole[kept_positions(whole, keep.reshape(-1), self._config.tokens.im_patch)]
        parts = [prefix]
        for question in example.questions:
            answer = np.array([self._answers[question.answer]])
            parts.append(np.concatenate([self._suffix(question.text), answer]))
        return np.concatenate(parts), [len(part) for part in parts]

    def _mask(self, ids: Tensor, block: Tensor) -> Tensor:
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same_block = block[:, :, None] == block[:, None, :]
        mask = causal & (same_block | (block == 0)[:, None, :])
        if self._config.bidirectional_visual:
            visual = torch.isin(ids, torch.tensor(self._config.tokens.visual)) & (block == 0)
            mask = mask | (visual[:, :, None] & visual[:, None, :])
        return mask[:, None]
