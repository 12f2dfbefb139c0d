"""Sources of examples for tests, apart from them: workers import little that way."""

from __future__ import annotations

import numpy as np

from stts_export.errors import MissingDependencyError
from stts_export.training.decoding import BrokenClip
from stts_export.training.examples import Example, Question, VideoInput


class Numbers:
    """An endless source: the example's frames and name say which one it is."""

    length = None

    def example(self, index: int, position: int) -> Example:
        if index % 10 == 7:
            raise BrokenClip(f"number {index}", "it ends with 7")
        frames = np.full((2, 3, 3, 3), index % 256, dtype=np.uint8)
        question = Question("", f"at {position}?", str(index))
        return Example(VideoInput(frames, (0.0, 0.5)), (question,), name=str(index))


class Failing:
    """Fails at the fourth position."""

    length = 5

    def example(self, index: int, position: int) -> Example:
        if position == 3:
            raise MissingDependencyError("no such thing", where="here", fix="get one")
        return Example(None, (Question("", "q", "a"),))
