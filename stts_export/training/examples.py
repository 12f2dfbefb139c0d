"""What a training example is, wherever it comes from.

Axes: T frames of a clip, W windows of a frame; n crops of an image, N its tokens, P patches of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stts_export.runtime.prompt import ImageTokens


@dataclass(frozen=True)
class Question:
    """A question with its answer, both as the model reads and writes them."""

    type: str
    """For accuracy by type; may be empty."""
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    """What the answer is one of, in the question's own order; empty for open answers."""


class WindowContents(NamedTuple):
    """What each window of each frame of a synthetic clip shows, (T, W) each; 0 is background."""

    colour: NDArray[np.int64]
    """1 + index into `clips.COLOURS`."""
    shape: NDArray[np.int64]
    """1 + index into `clips.SHAPES`."""
    motion: NDArray[np.int64]
    """1 + index into `clips.DIRECTIONS`; 0 for what rests."""


@dataclass(frozen=True)
class VideoInput:
    """Sampled frames of a clip."""

    frames: NDArray[np.uint8]
    """(T, height, width, 3) RGB at the model's size."""
    timestamps: tuple[float, ...]
    """(T,) seconds, as printed in the prompt."""


@dataclass(frozen=True)
class ImageInput:
    """Crops of an image; nothing is ever removed from them."""

    crops: NDArray[np.uint8]
    """(n, height, width, 3) RGB at the model's size."""
    pooled_patches: NDArray[np.int32]
    """(N, P) patches of each token; -1 for none (see `SttsModel.encode_images`)."""
    tokens: ImageTokens
    """How the tokens are laid out in a prompt."""


@dataclass(frozen=True)
class Example:
    """A clip, an image or nothing, and questions that are asked of it one by one."""

    visual: VideoInput | ImageInput | None
    questions: tuple[Question, ...]
    """At least one. Each sees the visual and itself, not the other questions."""
    prune_ratio: float = 0.0
    """Fraction of the clip's windows to remove; 0 for images and text."""
    contents: WindowContents | None = None
    """Of synthetic clips, for the labels of windows."""
    name: str = ""
    """Where it came from, for messages."""

    @property
    def clip(self) -> VideoInput | None:
        """The visual if it is a video."""
        return self.visual if isinstance(self.visual, VideoInput) else None


@dataclass(frozen=True)
class LabelledFrames:
    """Single frames of different clips, with what each window shows."""

    frames: NDArray[np.uint8]
    """(F, side, side, 3)."""
    colours: NDArray[np.int64]
    """(F, W); see `WindowContents`."""
    shapes: NDArray[np.int64]
    """(F, W)."""

    def examples(self) -> list[Example]:
        """Return each frame as a clip with a question that says nothing, to be kept in a file."""
        at_rest = np.zeros_like(self.colours)
        return [
            Example(
                VideoInput(self.frames[index : index + 1], (0.0,)),
                (Question("", "", ""),),
                contents=WindowContents(
                    *(values[index : index + 1] for values in (self.colours, self.shapes, at_rest))
                ),
                name=f"single frame {index}",
            )
            for index in range(len(self.frames))
        ]
