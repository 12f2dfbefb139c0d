"""Synthetic clips as training examples: drawn on the spot, endless, with labels of windows.

Axes: T frames of a clip, W windows of a frame, F single frames of a step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stts_export.config import VisionConfig
from stts_export.runtime.sampling import sample_times
from stts_export.training.clips import TOP_LEVEL, Clip, make_clip, split_seed
from stts_export.training.config import SourceSettings
from stts_export.training.examples import Example, LabelledFrames, Question, VideoInput
from stts_export.training.rendering import degrade, frame_times, render, window_contents

# Clips of single frames are others: far more than a run ever takes from the start of the split.
_LABEL_CLIPS = 5 * 10**8


@dataclass(frozen=True)
class SyntheticSource:
    """Clips of the train split, harder as the run goes on."""

    settings: SourceSettings
    vision: VisionConfig
    seed: int
    """Of the run."""
    batch_size: int
    """Examples of a step: which step it is decides the level."""
    max_frames: int
    """Upper limit of T."""

    @property
    def length(self) -> None:
        """There is no end."""
        return

    def level(self, step: int) -> int:
        """Return the hardest level that is drawn in a step."""
        return bisect_right(self.settings.level_steps, step) - 1

    def example(self, index: int, position: int) -> Example:
        """Make clip `index` of the run, with as many questions as are asked at once."""
        seed = split_seed("train", (self.seed * 10**7 + index) % _LABEL_CLIPS)
        rng = np.random.default_rng((self.seed, position))
        level = self.level(position // self.batch_size)
        if level > 0 and rng.random() < self.settings.easier_share:
            level = int(rng.integers(level))
        clip = make_clip(seed, level=level)
        chosen = rng.permutation(len(clip.questions))[: self.settings.max_questions]
        questions = [clip.questions[int(number)] for number in chosen]
        return clip_example(clip, questions, self.vision, self.max_frames)


def clip_example(
    clip: Clip,
    questions: Sequence[Question],
    vision: VisionConfig,
    max_frames: int,
    prune_ratio: float = 0.0,
) -> Example:
    """Sample, draw and degrade a clip as a file of it would be sampled and decoded."""
    times = sample_times(clip.duration, max_frames)
    drawn_at = frame_times(clip, times.tolist())
    rng = np.random.default_rng((clip.seed, 13))
    frames = degrade(render(clip, drawn_at, vision.image_size[0]), rng)
    return Example(
        VideoInput(frames, tuple(times.tolist())),
        tuple(questions),
        prune_ratio,
        window_contents(clip, drawn_at, vision.window_grid),
        name=f"synthetic clip {clip.seed}",
    )


def labelled_frames(
    vision: VisionConfig, seed: int, step: int, count: int, rank: int = 0, world: int = 1
) -> LabelledFrames:
    """Return one process's share of the single frames of a step.

    Args:
        vision: of the model.
        seed: of the run.
        step: of the run.
        count: F over all processes.
        rank: number of this process.
        world: number of processes.
    """
    drawn, contents = [], []
    for index in range(rank, count, world):
        number = _LABEL_CLIPS + (seed * 10**7 + step * count + index) % _LABEL_CLIPS
        rng = np.random.default_rng((seed, number))
        clip = make_clip(split_seed("train", number), level=int(rng.integers(TOP_LEVEL + 1)))
        shown = clip.things[int(rng.integers(len(clip.things)))]
        time = float(rng.uniform(shown.start, min(shown.end, clip.duration)))
        drawn.append(degrade(render(clip, [time], vision.image_size[0]), rng))
        contents.append(window_contents(clip, [time], vision.window_grid))
    return LabelledFrames(
        np.concatenate(drawn),
        np.concatenate([one.colour for one in contents]),
        np.concatenate([one.shape for one in contents]),
    )
