"""Distances between two models: of layers, scores, windows, features and distributions.

Axes: T frames, W windows of a frame, K kept windows, C decoder width, V vocabulary, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stts_export.runtime import planner
from stts_export.tolerances import difference


@dataclass
class SquareSums:
    """Squares of a layer's outputs and of their errors, added up over calls and clips."""

    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0

    def add(self, reference: NDArray[np.float32], got: NDArray[np.float32]) -> None:
        """Add rows (R, out) of both models.

        Raises:
            ValueError: they are not as many, so they are not the same ones.
        """
        if reference.shape != got.shape:
            raise ValueError(f"rows {got.shape} beside {reference.shape}: other calls were made")
        self.rows += len(reference)
        expected = reference.astype(np.float64)
        self.signal += float(np.square(expected).sum())
        self.noise += float(np.square(expected - got).sum())

    def decibels(self) -> float:
        """Return 10 log10(signal / noise): inf if equal, -inf if a number is not finite."""
        if not math.isfinite(self.noise):
            return -math.inf
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


def flips(
    scores: NDArray[np.float32] | None,
    keep: NDArray[np.bool_],
    got_scores: NDArray[np.float32] | None,
    got_keep: NDArray[np.bool_],
) -> tuple[float, float]:
    """How far scores are apart, and windows that are decided otherwise from the threshold.

    Args:
        scores: (T, W) of the reference; None when nothing was removed.
        keep: (T, W) windows that the reference keeps.
        got_scores: (T, W) of the candidate.
        got_keep: (T, W) windows that it keeps.

    Returns:
        The largest score error, infinite if a score is not finite; and the largest distance of a
        flipped window's reference score from the lowest that is kept, 0 without flips. Rounding
        alone explains twice the error.
    """
    if scores is None or got_scores is None:
        return 0.0, 0.0
    raised = scores.astype(np.float64)
    raised[0] = planner.FIRST_FRAME_SCORE
    distances = np.abs(raised - raised[keep].min())[keep != got_keep]
    return difference(got_scores, scores, "max"), float(distances.max(initial=0.0))


def cosines(reference: NDArray[Any], got: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine similarity of features row by row.

    Args:
        reference: (K, C).
        got: (K, C).

    Returns:
        (K,); 1 where both rows are 0, NaN where a number is not finite.
    """
    a, b = reference.astype(np.float64), got.astype(np.float64)
    bad = ~(np.isfinite(a).all(1) & np.isfinite(b).all(1))
    a[bad], b[bad] = 0, 0
    products, lengths = (a * b).sum(1), np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    similar = np.zeros(len(a))
    np.divide(products, lengths, out=similar, where=lengths > 0)
    similar[(a == b).all(1)] = 1
    similar[bad] = np.nan
    return similar


def divergence(reference: NDArray[Any], got: NDArray[Any]) -> float:
    """KL(reference || got) of the softmax of logits (V,), in nats; infinite if not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(got).all()):
        return math.inf
    log_p, log_q = (
        torch.from_numpy(logits.astype(np.float64)).log_softmax(-1).numpy()
        for logits in (reference, got)
    )
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))
