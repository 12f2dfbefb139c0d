"""Accuracies and differences of the evidence, with intervals.

Two kinds of 95 % intervals, which answer different questions:

* of an accuracy: Student's t over the accuracies of the seeds. Every seed has a training run and
  test clips of its own, so it contains both.
* of a difference: a bootstrap over the test clips of each seed, with the seeds' models as they are.
  Both sides answer the same questions about the same clips, and questions about one clip stay
  together. It does not contain what other seeds would change: differences by seed stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.training.evaluation import ALL_WINDOWS
from stts_export.training.exam import ALL

RESAMPLES = 10_000
_BOOTSTRAP_SEED = 20261129

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7).
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model and what is kept of the clips it is asked about."""

    variant: str
    ratio: float
    selector: str
    """Any at ratio 0, where all windows are kept."""
    frames: int | None = None
    """Sampled frames at most; as the checkpoint says when None."""


@dataclass(frozen=True)
class Mean:
    """An accuracy over seeds, 0 to 1."""

    by_seed: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.by_seed))

    @cached_property
    def reach(self) -> float | None:
        """Half of the 95 % interval; None for one seed, or more than there are quantiles for."""
        count = len(self.by_seed)
        if not 2 <= count <= len(_T_95) + 1:
            return None
        return _T_95[count - 2] * float(np.std(self.by_seed, ddof=1)) / math.sqrt(count)


@dataclass(frozen=True)
class Difference:
    """How much more often one setting is right than another, -1 to 1."""

    value: float
    """Mean over seeds."""
    low: float
    high: float
    """95 %."""
    by_seed: tuple[float, ...]


class Evidence:
    """What `benchmarks/evidence.py` found.

    Args:
        results: its JSON.

    Raises:
        InputError: it was written by another version, or its parts contradict each other.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        if results.get("benchmark") != "evidence":
            raise InputError("is not of benchmarks/evidence.py", where="evidence")
        self.seeds: tuple[int, ...] = tuple(results["settings"]["seeds"])
        self.variants = tuple(dict.fromkeys(run["variant"] for run in results["runs"]))
        self._marks: dict[tuple[int, Setting], NDArray[np.bool_]] = {}
        self._rows: dict[tuple[int, Setting], Mapping[str, Any]] = {}
        for evaluation in results["evaluations"]:
            for row in evaluation["rows"]:
                self._add(evaluation, row)

    def _add(self, evaluation: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        seed = evaluation["seed"]
        setting = Setting(
            evaluation["variant"], row["prune_ratio"], row["selector"], evaluation["max_frames"]
        )
        marks = np.array([mark == "1" for mark in row["marks"]])
        if len(marks) != len(self.types(seed)) or marks.sum() != row["right"]:
            raise InputError(
                f"marks of {setting} do not fit the questions of seed {seed}", where="evidence"
            )
        self._marks[seed, setting] = marks
        self._rows[seed, setting] = row

    def types(self, seed: int) -> NDArray[np.str_]:
        """(Q,) type of each test question of a seed."""
        return np.array([kind for clip in self._exam(seed) for kind in clip])

    def _exam(self, seed: int) -> list[list[str]]:
        return [clip.split() for clip in self.results["exams"][str(seed)]]

    @property
    def type_names(self) -> tuple[str, ...]:
        """Types of questions, in order."""
        return tuple(sorted({str(kind) for seed in self.seeds for kind in self.types(seed)}))

    @property
    def questions(self) -> int:
        """Test questions of all seeds together."""
        return sum(len(self.types(seed)) for seed in self.seeds)

    @property
    def clips(self) -> int:
        """Test clips of all seeds together."""
        return sum(len(self._exam(seed)) for seed in self.seeds)

    def has(self, *settings: Setting) -> bool:
        """Whether every seed has all of these."""
        return all(
            (seed, self._stored(setting)) in self._marks
            for setting in settings
            for seed in self.seeds
        )

    @staticmethod
    def _stored(setting: Setting) -> Setting:
        """Name what keeps everything as `evaluate` does."""
        if setting.ratio > 0:
            return setting
        return Setting(setting.variant, setting.ratio, ALL_WINDOWS, setting.frames)

    def marks(self, seed: int, setting: Setting) -> NDArray[np.bool_]:
        """(Q,) which questions a setting answers right."""
        return self._marks[seed, self._stored(setting)]

    def accuracy(self, setting: Setting, kind: str = ALL) -> Mean:
        """Return the accuracy of a setting that `has` knows, over questions of one type or all."""
        shares = []
        for seed in self.seeds:
            counted = self.types(seed) == kind if kind != ALL else slice(None)
            shares.append(float(self.marks(seed, setting)[counted].mean()))
        return Mean(tuple(shares))

    def windows(self, setting: Setting) -> tuple[float, float]:
        """Return the windows kept, and all there are, of a clip in the mean."""
        rows = [self._rows[seed, self._stored(setting)] for seed in self.seeds]
        kept, total = (
            sum(row[f"{name}_windows"] for row in rows) / self.clips for name in ("kept", "total")
        )
        return kept, total

    def difference(self, one: Setting, other: Setting) -> Difference:
        """Return how much more often `one` is right than `other`, question by question."""
        by_seed, resampled = [], []
        for seed in self.seeds:
            # In integers: sums are exact, and no BLAS divides them among threads.
            gain = self.marks(seed, one).astype(np.int64) - self.marks(seed, other)
            by_seed.append(float(gain.mean()))
            sizes = np.array([len(clip) for clip in self._exam(seed)])
            gains = np.add.reduceat(gain, np.cumsum(sizes) - sizes)
            weights = self._resampling[seed]
            resampled.append((weights @ gains) / (weights @ sizes))
        means = np.mean(resampled, axis=0)
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
        return Difference(float(np.mean(by_seed)), low, high, tuple(by_seed))

    @cached_property
    def _resampling(self) -> dict[int, NDArray[np.int64]]:
        """Seed -> (RESAMPLES, clips) how often each of its clips is drawn, with replacement."""
        weights = {}
        for seed in self.seeds:
            count = len(self._exam(seed))
            rng = np.random.default_rng((_BOOTSTRAP_SEED, seed))
            weights[seed] = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        return weights

    def chance(self) -> Mapping[str, float]:
        """Share of right answers of who guesses, by type."""
        chance: Mapping[str, float] = self.results["chance"]
        return chance


def same_tokens(evidence: Evidence, settings: Sequence[Setting]) -> None:
    """Refuse results in which settings that are compared kept different numbers of windows.

    Raises:
        InputError: they did.
    """
    kept = {evidence.windows(setting) for setting in settings}
    if len(kept) > 1:
        raise InputError(f"unequal numbers of windows: {kept}", where="evidence")
