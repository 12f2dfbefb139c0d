"""Properties of the tower that golden vectors of one geometry cannot show."""

from __future__ import annotations

import pytest
import torch

from stts_export.config import ModelConfig
from stts_export.model.pruning import log_score_bias, n_prune, pack, select
from stts_export.model.vision import PatchEmbedding
from stts_export.model.vlm import SttsModel
from stts_export.tolerances import difference
from tests.helpers import random_frames, random_model, small_config


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model()


def test_windows_are_adjacent_and_row_major():
    config = ModelConfig.from_dict(small_config(), has_scorer=True).vision
    embedding = PatchEmbedding(config)
    order = embedding.window_major.reshape(config.windows, 9)
    # 6x9 patches in 2x3 windows: window 1 is the top middle, window 3 the bottom left.
    assert order[1].tolist() == [3, 4, 5, 12, 13, 14, 21, 22, 23]
    assert order[3].tolist() == [27, 28, 29, 36, 37, 38, 45, 46, 47]


def test_patch_embedding_reads_rows_columns_channels(model: SttsModel):
    frames = torch.from_numpy(random_frames(2))
    embedding = model.vision.embedding
    with torch.no_grad():
        got = embedding(frames)
        patch_row, patch_column = 4, 7  # window (1, 2), inside it row 1, column 1
        tile = frames[1, 14 * 4 : 14 * 5, 14 * 7 : 14 * 8].float() / 255 * 2 - 1
        expected = embedding.projection(tile.flatten())
        expected += embedding.positional[patch_row * 9 + patch_column]
    torch.testing.assert_close(got[1, (1 * 3 + 2) * 9 + 1 * 3 + 1], expected, atol=1e-5, rtol=1e-5)


def test_bias_is_rescaled_per_row_of_windows():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.9, 0.5]])
    bias = log_score_bias(scores, torch.tensor([False]), 3, 0.1353352832366127)
    torch.testing.assert_close(
        bias, torch.tensor([[-2.0, -0.5663, 0.0, 0.0, 0.0, -2.0]]), atol=1e-4, rtol=0
    )
    constant = log_score_bias(torch.full((1, 6), 0.4), torch.tensor([False]), 3, 0.1353352832366127)
    torch.testing.assert_close(constant, torch.full((1, 6), -2.0))
    assert not log_score_bias(scores, torch.tensor([True]), 3, 0.1).any()


def test_lower_is_causal_over_chunks(model: SttsModel):
    frames = torch.from_numpy(random_frames(7))
    fresh = torch.arange(7) == 0
    pooled = torch.zeros(1, 6, 24)
    with torch.no_grad():
        whole = model.vision.lower(frames, fresh, pooled)
        parts = []
        for chunk in (slice(0, 3), slice(3, 4), slice(4, 7)):
            part = model.vision.lower(frames[chunk], fresh[chunk], pooled)
            pooled = part.last_pooled
            parts.append(part)
    torch.testing.assert_close(torch.cat([part.scores for part in parts]), whole.scores)
    torch.testing.assert_close(torch.cat([part.hidden for part in parts]), whole.hidden)


@pytest.mark.parametrize("refill", [True, False])
def test_packing_equals_running_each_frame_alone(model: SttsModel, refill: bool):
    frames = torch.from_numpy(random_frames(9, seed=3))
    with torch.no_grad():
        clip = model.encode(frames, 0.5, refill=refill)
        assert clip.plan is not None
        windows = clip.hidden.unflatten(1, (6, 9))
        rows = []
        for frame in range(9):
            keep = clip.keep[frame]
            if not keep.any():
                continue
            context = keep | clip.plan.refilled[frame]
            alone = model.vision.upper(windows[frame][context].flatten(0, 1)[None])[0]
            rows.append(alone[keep[context]])
    assert difference(clip.features, torch.cat(rows), "max_rel") < 1e-5


def test_refill_changes_kept_features(model: SttsModel):
    frames = torch.from_numpy(random_frames(1))
    with torch.no_grad():
        with_context = model.encode(frames, 0.5).features
        without = model.encode(frames, 0.5, refill=False).features
    assert (with_context - without).abs().max() > 1e-2


def test_free_slots_do_not_reach_kept_windows(model: SttsModel):
    keep = select(torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), 15)
    plan = pack(keep)
    assert (plan.segment == -1).any()
    hidden = torch.randn(4 * 6, 9, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bins = hidden[plan.gather_window]
        clean = model.vision.upper(bins.flatten(1, 2), plan.segment).flatten(0, 1)
        bins[plan.segment == -1] = 1e3
        dirty = model.vision.upper(bins.flatten(1, 2), plan.segment).flatten(0, 1)
    assert torch.equal(clean[plan.kept_slot], dirty[plan.kept_slot])


@pytest.mark.parametrize(
    ("ratio", "frames", "expected"),
    [
        # floor(81 * ratio * frames), one less where the float32 product falls short (spec 2.3)
        (0.3, 5, 121), (0.3, 10, 243), (0.3, 165, 4009), (0.3, 330, 8018),
        (0.6, 5, 243), (0.6, 10, 486), (0.6, 165, 8018), (0.6, 330, 16037),
        (0.5, 1, 40), (0.5, 64, 2592), (0.5, 256, 10368), (0.8, 128, 8294), (0.0, 9, 0),
    ],
)  # fmt: skip
def test_removed_windows_follow_the_reference_rounding(ratio: float, frames: int, expected: int):
    assert n_prune(81, frames, ratio) == expected


def test_rounding_differs_from_exact_arithmetic_where_the_spec_says():
    short = [
        frames for frames in range(1, 1025) if n_prune(81, frames, 0.6) != 81 * 6 * frames // 10
    ]
    assert short == [165, 325, 330, 335, 645, 650, 655, 660, 665, 670]
    short = [f for f in range(1, 1025) if n_prune(81, f, 0.3) != 81 * 3 * f // 10]
    assert short == [330, 650, 660, 670]


def test_gradients_reach_the_scorer_through_the_bias(model: SttsModel):
    frames = torch.from_numpy(random_frames(4))
    assert model.vision.scorer is not None
    model.encode(frames, 0.5).features.square().sum().backward()
    gradient = model.vision.scorer.w3.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    model.zero_grad()
