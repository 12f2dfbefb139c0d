"""From records to examples: videos and images decoded as a deployed model gets them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.preprocessing import DEFAULT_MAX_FPS, ImagePreprocessing
from stts_export.runtime.demux import UnreliableTimesError
from stts_export.runtime.images import image_crops
from stts_export.runtime.prompt import ImageTokens, multiple_choice
from stts_export.runtime.sampling import sample_times
from stts_export.runtime.video import VideoClip, read_video
from stts_export.tensors import IMAGE_POOL
from stts_export.training.examples import Example, ImageInput, Question, VideoInput
from stts_export.training.records import Record


class BrokenClip(Exception):  # noqa: N818 - found in data and counted, it ends nothing
    """A video or image that cannot be decoded.

    Args:
        name: of the record.
        reason: the file and what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def as_asked(question: Question) -> Question:
    """Return a question in the form that the model is asked and answers.

    Args:
        question: one with choices becomes Molmo2's multiple-choice form, and its answer and
            choices become their letters; an open one stays as it is.

    Raises:
        InputError: the answer is not among the choices, or there are too many.
    """
    if not question.choices:
        return question
    if question.answer not in question.choices:
        raise InputError(
            f"the answer {question.answer!r} is not among the choices {list(question.choices)}",
            where=question.text,
        )
    letters = tuple(string.ascii_uppercase[: len(question.choices)])
    return Question(
        question.type,
        multiple_choice(question.text, question.choices),
        letters[question.choices.index(question.answer)],
        letters,
    )


@dataclass(frozen=True)
class Decoder:
    """Makes examples of records for a model.

    Raises:
        InputError: a limit is not positive.
    """

    config: ModelConfig
    max_frames: int
    """Upper limit of the samples T of a video."""
    max_fps: float = DEFAULT_MAX_FPS
    """Upper limit of samples a second."""
    images: ImagePreprocessing = field(default_factory=ImagePreprocessing)
    """How images are cut into crops."""
    max_questions: int | None = None
    """Upper limit of the questions of an example; which ones depends on the seed."""

    def __post_init__(self) -> None:
        sample_times(0.0, self.max_frames, self.max_fps)
        if self.max_questions is not None and self.max_questions < 1:
            raise InputError(
                f"max_questions is {self.max_questions}", where="decoding", allowed="1 or more"
            )

    def example(
        self, record: Record, prune_ratio: float = 0.0, seed: int | Sequence[int] = 0
    ) -> Example:
        """Decode the file of a record, sampled and resized as `Session` does it.

        Args:
            record: what to decode. A video file that holds a single picture is taken as an image.
            prune_ratio: fraction of windows to remove; images and text get 0.
            seed: decides which questions are asked when there are more than `max_questions`.

        Returns:
            The example; questions with choices are in the form of `as_asked`.

        Raises:
            BrokenClip: the file is missing, damaged or not what the record says.
            InputError: the model's size is not one that images can be cut into.
        """
        visual = self._visual(record)
        return Example(
            visual,
            tuple(map(as_asked, self._chosen(record.questions, seed))),
            prune_ratio if isinstance(visual, VideoInput) else 0.0,
            name=record.name,
        )

    def _chosen(
        self, questions: tuple[Question, ...], seed: int | Sequence[int]
    ) -> Sequence[Question]:
        if self.max_questions is None or len(questions) <= self.max_questions:
            return questions
        rng = np.random.default_rng(seed)
        places = rng.choice(len(questions), self.max_questions, replace=False)
        return [questions[place] for place in sorted(places.tolist())]

    def _visual(self, record: Record) -> VideoInput | ImageInput | None:
        if record.visual is None:
            return None
        clip = self._read(record.visual, record.name)
        if clip.is_image:
            return self._image(clip.frames[0])
        if record.image is not None:
            raise BrokenClip(record.name, f"{record.image}: is a video, not an image")
        return VideoInput(clip.frames, tuple(clip.timestamps.tolist()))

    def _read(self, file: Path, name: str) -> VideoClip:
        try:
            return read_video(
                file,
                max_frames=self.max_frames,
                max_fps=self.max_fps,
                size=self.config.vision.image_size,
            )
        except InputError as error:
            raise BrokenClip(name, f"{error.where or file}: {error.message}") from None
        except (av.FFmpegError, OSError, UnreliableTimesError) as error:
            raise BrokenClip(name, f"{file}: {error}") from None

    def _image(self, pixels: NDArray[np.uint8]) -> ImageInput:
        cut = image_crops(
            pixels,
            self.config.vision.image_size,
            self.config.vision.patch_size,
            max_crops=self.images.max_crops,
            overlap_margins=self.images.overlap_margins,
            pool=IMAGE_POOL,
        )
        return ImageInput(cut.crops, cut.pooled_patches, ImageTokens(cut.grid))
