"""What a model keeps, says and gets right on the test clips, and how that differs from fp32's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.precision_plan import RATIO
from stts_export.calibration.distances import flips
from stts_export.config import ModelConfig
from stts_export.runtime.video import VideoClip
from stts_export.runtime.visuals import Encoded, EncodedClip, EncodedImage
from stts_export.training.answerers import Answerer, Tower
from stts_export.training.evaluation import evaluate
from stts_export.training.exam import ALL, Exam
from stts_export.training.selectors import STTS

_KEPT_OF_ROWS = ("prune_ratio", "kept_windows", "total_windows", "marks")


@dataclass
class Seen:
    """A test clip in one model."""

    scores: NDArray[np.float32]
    """(T, W)."""
    keep: NDArray[np.bool_]
    """(T, W) at `RATIO`."""
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Prune ratio, as text -> an answer to each question."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "frames": len(self.keep),
            "scores": self.scores.ravel().tolist(),
            "keep": "".join("01"[bit] for bit in self.keep.ravel().tolist()),
            "answers": self.answers,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Seen:
        """Read what `to_dict` returned."""
        shape = (values["frames"], -1)
        keep = np.array([bit == "1" for bit in values["keep"]]).reshape(shape)
        scores = np.array(values["scores"], np.float32).reshape(shape)
        return Seen(scores, keep, values["answers"])


class Witness:
    """An answerer that remembers what it scored, kept and said; see `training.answerers.Answerer`.

    Args:
        answerer: who is asked, of a model with a scorer; about videos only.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._tower: Tower | None = None
        self.prompts = answerer.prompts
        self.max_frames = answerer.max_frames
        self.clips: list[Seen] = []

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self._answerer.config

    @property
    def description(self) -> dict[str, Any]:
        """What answers."""
        return self._answerer.description

    def check_ratio(self, ratio: float) -> None:
        """Refuse a ratio that the model does not take."""
        self._answerer.check_ratio(ratio)

    def read(self, file: Path) -> VideoClip:
        """Read a video."""
        return self._answerer.read(file)

    def tower(self, clip: VideoClip) -> Tower:
        """See a video, the next one that is asked about."""
        self._tower = self._answerer.tower(clip)
        scores = self._tower.scores()
        assert scores is not None
        self.clips.append(Seen(scores.copy(), np.ones(scores.shape, np.bool_)))
        return self._tower

    def image(self, clip: VideoClip) -> EncodedImage:
        """See an image."""
        return self._answerer.image(clip)

    def answers(
        self, encoded: Encoded | None, prompts: Sequence[str], limits: Sequence[int]
    ) -> list[str]:
        """Answer questions about the video that was seen last."""
        assert isinstance(encoded, EncodedClip)
        found = self._answerer.answers(encoded, prompts, limits)
        self.clips[-1].answers[f"{encoded.prune_ratio:g}"] = found
        if encoded.prune_ratio > 0:
            self.clips[-1].keep = encoded.keep.copy()
        return found


def examine(answerer: Answerer, exam: Exam) -> dict[str, Any]:
    """Ask a model all questions, with all windows and at `RATIO`.

    Args:
        answerer: of a model with a scorer.
        exam: about videos.

    Returns:
        `chance`, `rows` of `evaluate` (`accuracy`, `interval` and `right` of all types together),
        and `seen`, `Seen.to_dict` of each clip.

    Raises:
        InputError: as `evaluate`.
    """
    witness = Witness(answerer)
    results = evaluate(witness, exam, ratios=(0.0, RATIO), selectors=(STTS,), max_broken=0)
    rows = [
        {
            **{key: row[key] for key in _KEPT_OF_ROWS},
            **{key: row[key][ALL] for key in ("right", "accuracy", "interval")},
        }
        for row in results["rows"]
    ]
    return {
        "chance": results["chance"],
        "rows": rows,
        "seen": [clip.to_dict() for clip in witness.clips],
    }


def agreement(reference: Sequence[Seen], got: Sequence[Seen]) -> dict[str, Any]:
    """Compare what two models kept and said about the same clips.

    Args:
        reference: fp32, by clip.
        got: another precision.

    Returns:
        `jaccard`, mean over clips of kept windows in both over those in either; `flipped` and
        `windows`, of all clips; `score_error`, the largest; `distance` of a flipped window's score
        in the reference from the threshold, the largest; and `changed`, answers that are other
        texts, by ratio.
    """
    pairs = list(zip(reference, got, strict=True))
    shared = [float((a.keep & b.keep).sum() / (a.keep | b.keep).sum()) for a, b in pairs]
    apart = [flips(a.scores, a.keep, b.scores, b.keep) for a, b in pairs]
    return {
        "jaccard": float(np.mean(shared)),
        "flipped": sum(int((a.keep != b.keep).sum()) for a, b in pairs),
        "windows": sum(a.keep.size for a, _ in pairs),
        "score_error": max(error for error, _ in apart),
        "distance": max(distance for _, distance in apart),
        "changed": {
            ratio: sum(_changed(a, b, ratio) for a, b in pairs) for ratio in ("0", f"{RATIO:g}")
        },
    }


def _changed(one: Seen, other: Seen, ratio: str) -> int:
    """Answers that differ; a clip so short that nothing is removed has one for both ratios."""
    pairs = zip(
        one.answers.get(ratio, one.answers["0"]),
        other.answers.get(ratio, other.answers["0"]),
        strict=True,
    )
    return sum(a != b for a, b in pairs)
