"""What rounding to int8 does to the choice of windows, part by part: why some parts stay high."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stts_export.calibration.distances import flips
from stts_export.calibration.layers import (
    LARGEST,
    SCORING,
    LayerQuantization,
    layers_by_group,
    protected_layers,
)
from stts_export.calibration.overflow import ranges_of
from stts_export.calibration.recipe import Recipe
from stts_export.calibration.rounding import rounded_model
from stts_export.model.vlm import SttsModel
from stts_export.progress import Progress
from stts_export.runtime import planner
from stts_export.runtime.video import VideoClip
from stts_export.training.checkpoint_answerer import CheckpointTower

_EMBEDDING = "vision.embedding.projection"
_SCORER = "vision.scorer."


def parts_of(model: SttsModel, shipped: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the layers of the tower that are rounded together, by a name for the table.

    Args:
        model: with a scorer.
        shipped: whose layers are rounded for comparison.
    """
    config = model.config
    linear = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    scorer = tuple(name for name in linear if name.startswith(_SCORER))
    assert scorer
    assert _EMBEDDING in protected_layers(config)
    scoring = layers_by_group(config)[SCORING]
    plan = shipped.plan(config)
    return {
        "the scorer": scorer,
        "the blocks that it reads": scoring,
        "both": (*scoring, *scorer),
        "the patch embedding": (_EMBEDDING,),
        f"what recipe `{shipped.name}` quantises of the tower": tuple(
            name for name in plan if name.startswith("vision.")
        ),
    }


def int8_layers(
    model: SttsModel, names: Sequence[str], ranges: Mapping[str, float]
) -> dict[str, LayerQuantization]:
    """Quantise layers plainly: an input scale per tensor, a weight scale per output, by maximum.

    Args:
        model: in fp32.
        names: of linear layers.
        ranges: largest magnitudes, see `overflow.ranges_of`.
    """
    layers = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        largest = weight.detach().abs().amax(1).numpy()
        layers[name] = LayerQuantization(
            "int8",
            np.float32(1 / LARGEST["int8"]) * largest,
            ranges[f"{name}:in"] / LARGEST["int8"],
        )
    return layers


def ablate(
    model: SttsModel,
    read: Callable[[Path], VideoClip],
    calibration: Sequence[Path],
    clips: Sequence[Path],
    shipped: Recipe,
    ratio: float,
) -> dict[str, Any]:
    """Round one part of the tower after the other to int8, everything else fp32.

    Args:
        model: in fp32, with a scorer; all weights in memory.
        read: reads a video at the model's size.
        calibration: videos that ranges of inputs are found on.
        clips: videos that windows are chosen of.
        shipped: whose layers are rounded for comparison.
        ratio: fraction of windows to remove.

    Returns:
        `clips`, `windows` of all, and `rows`: `part`, `layers`, `flipped` (windows decided
        otherwise), `score_error` (largest) and `jaccard` (mean over clips).
    """
    ranges = ranges_of(model, [read(file).frames for file in calibration], ratio)
    parts = parts_of(model, shipped)
    models = {
        part: rounded_model(model, int8_layers(model, names, ranges), "fp32")
        for part, names in parts.items()
    }
    found: dict[str, list[tuple[int, float, float]]] = {part: [] for part in parts}
    windows = 0
    with Progress("ablation", len(clips), "clips") as progress:
        for done, file in enumerate(clips, start=1):
            frames = read(file).frames
            expected = _chosen(model, frames, ratio)
            windows += expected[1].size
            for part, rounded in models.items():
                found[part].append(_compared(expected, _chosen(rounded, frames, ratio)))
            progress.update(done)
    rows = [
        {
            "part": part,
            "layers": len(parts[part]),
            "flipped": sum(flipped for flipped, _, _ in compared),
            "score_error": max(error for _, error, _ in compared),
            "jaccard": float(np.mean([shared for _, _, shared in compared])),
        }
        for part, compared in found.items()
    ]
    return {"clips": len(clips), "windows": windows, "rows": rows}


_Chosen = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Scores and kept windows, (T, W)."""


def _chosen(model: SttsModel, frames: NDArray[np.uint8], ratio: float) -> _Chosen:
    scores = CheckpointTower(model, frames).scores()
    assert scores is not None
    count = planner.n_prune(scores.shape[1], len(scores), ratio)
    return scores, planner.select(scores, count)


def _compared(expected: _Chosen, got: _Chosen) -> tuple[int, float, float]:
    """Windows that differ, the largest score error, and Jaccard's index."""
    keep, other = expected[1], got[1]
    error, _ = flips(*expected, *got)
    return int((keep != other).sum()), error, float((keep & other).sum() / (keep | other).sum())
