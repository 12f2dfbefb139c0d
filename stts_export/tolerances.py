"""How far a stage may differ from the fp32 PyTorch model: one row per tensor and precision.

Measures: `max` is the largest absolute difference; `max_rel` the same over the largest reference
value; `l2` the relative L2 norm of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Measure = Literal["max", "max_rel", "l2"]


@dataclass(frozen=True)
class Tolerance:
    """An allowed difference and why it is allowed."""

    measure: Measure
    limit: float
    reason: str


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("scores", "fp32"): Tolerance(
        "max", 3e-5, "other summation order in blocks 0..prune_at; the sigmoid's slope is <= 1/4"
    ),
    ("hidden", "fp32"): Tolerance(
        "max_rel", 1e-4, "other summation order over prune_at + 2 blocks"
    ),
    ("last_pooled", "fp32"): Tolerance("max_rel", 1e-4, "as hidden, one attention later"),
    ("packed_features", "fp32"): Tolerance(
        "max_rel", 1e-4, "other summation order over the upper blocks and the connector"
    ),
    ("tapped", "fp32"): Tolerance("max_rel", 1e-4, "other summation order over the upper blocks"),
    ("features", "fp32"): Tolerance("max_rel", 1e-4, "other summation order over the connector"),
    ("logits", "fp32"): Tolerance("max_rel", 1e-4, "other summation order over the decoder"),
    ("scores", "fp16"): Tolerance(
        "max", 4e-3, "the scorer is fp32, its input comes from fp16 blocks (11-bit mantissa)"
    ),
    ("hidden", "fp16"): Tolerance("l2", 1e-2, "fp16 rounding in every matmul of the lower blocks"),
    ("last_pooled", "fp16"): Tolerance("l2", 1e-2, "as hidden, pooled in fp32"),
    ("packed_features", "fp16"): Tolerance(
        "l2", 1e-2, "fp16 rounding in every matmul of the upper blocks and the connector"
    ),
    ("tapped", "fp16"): Tolerance("l2", 1e-2, "fp16 rounding in every matmul of the upper blocks"),
    ("features", "fp16"): Tolerance("l2", 1e-2, "fp16 rounding in the connector"),
    ("logits", "fp16"): Tolerance("l2", 2e-2, "fp16 rounding through the decoder and its head"),
    ("scores", "bf16"): Tolerance("max", 3e-2, "as fp16, with 8 bits of mantissa instead of 11"),
    ("hidden", "bf16"): Tolerance("l2", 4e-2, "bf16 rounding in every matmul of the lower blocks"),
    ("last_pooled", "bf16"): Tolerance("l2", 4e-2, "as hidden, pooled in fp32"),
    ("packed_features", "bf16"): Tolerance(
        "l2", 4e-2, "bf16 rounding in every matmul of the upper blocks and the connector"
    ),
    ("tapped", "bf16"): Tolerance("l2", 4e-2, "bf16 rounding in every matmul of the upper blocks"),
    ("features", "bf16"): Tolerance("l2", 4e-2, "bf16 rounding in the connector"),
    ("logits", "bf16"): Tolerance("l2", 8e-2, "bf16 rounding through the decoder and its head"),
}


TIMES_NOISE = 2.0
"""A quantised graph may be off by this many times what rounding does to a result, where that is
more than its row allows: coarse formats."""


def quantised_row(precision: str) -> str:
    """Name of the rows of graphs with layers in int8, fp8, int4 or nvfp4.

    They are compared with PyTorch that rounds the same way, not with fp32: gates do that.

    Args:
        precision: of the rest of the graph.
    """
    return f"quantised, {precision}"


_QUANTISED: dict[str, tuple[float, float, str]] = {
    "fp32": (
        1e-2, 2e-2, "few inputs lie so close between two steps that summation order decides",
    ),
    "fp16": (
        2e-2, 2e-1, "fp16 decides for inputs between two steps; layer by layer errors of the two "
        "become unrelated",
    ),
    "bf16": (6e-2, 4e-1, "as fp16, with 8 bits of mantissa instead of 11"),
}  # fmt: skip
"""Limits of scores, and of everything else in l2, by the precision of the rest."""
for _precision, (_scores, _rest, _reason) in _QUANTISED.items():
    TOLERANCES["scores", quantised_row(_precision)] = Tolerance("max", _scores, _reason)
    for _name in ("hidden", "last_pooled", "packed_features", "tapped", "features", "logits"):
        TOLERANCES[_name, quantised_row(_precision)] = Tolerance("l2", _rest, _reason)


def difference(got: ArrayLike, reference: ArrayLike, measure: Measure) -> float:
    """Distance of `got` from `reference`; infinite when either has NaN or infinity."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    if a.size == 0:
        return 0.0
    if measure == "l2":
        return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    largest = float(np.abs(a - b).max())
    return largest if measure == "max" else largest / max(float(np.abs(b).max()), 1e-12)
