"""The NumPy planner against the oracle, and the rules both must follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.model import pruning as oracle
from stts_export.runtime import planner

WINDOWS = st.sampled_from([1, 2, 4, 6, 9, 16, 25, 81])
RATIOS = st.floats(0, 0.98)


@st.composite
def clips(draw: st.DrawFn) -> tuple[NDArray[np.float32], float]:
    """Scores with many ties, skewed frames, and now and then NaN, infinities and zeros."""
    shape = (draw(st.integers(1, 40)), draw(WINDOWS))
    level = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.5, 0.75, 1.0, 100.0])
    if draw(st.booleans()):
        level = level | st.sampled_from([np.nan, np.inf, -np.inf, 1e-40, -0.25])
    scores = draw(arrays(np.float32, shape, elements=level.map(np.float32)))
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 1000)))
        scores = (rng.random(shape) * rng.random((shape[0], 1))).astype(np.float32)
    return scores, draw(RATIOS)


@given(clips())
@settings(max_examples=300, deadline=None)
def test_selection_equals_the_oracle(clip: tuple[NDArray[np.float32], float]):
    scores, ratio = clip
    count = planner.n_prune(scores.shape[1], len(scores), ratio)
    assert count == oracle.n_prune(scores.shape[1], len(scores), ratio)
    keep = planner.select(scores, count)
    np.testing.assert_array_equal(keep, oracle.select(torch.from_numpy(scores), count).numpy())
    assert keep.sum() == scores.size - count


@given(clips(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_packing_equals_the_oracle(clip: tuple[NDArray[np.float32], float], refill: bool):
    scores, ratio = clip
    keep = planner.select(scores, planner.n_prune(scores.shape[1], len(scores), ratio))
    plan = planner.pack(keep, refill=refill)
    expected = oracle.pack(torch.from_numpy(keep), refill=refill)
    np.testing.assert_array_equal(plan.gather_window, expected.gather_window.numpy())
    np.testing.assert_array_equal(plan.segment, expected.segment.numpy())
    np.testing.assert_array_equal(plan.kept_slot, expected.kept_slot.numpy())
    assert {plan.gather_window.dtype, plan.segment.dtype, plan.kept_slot.dtype} == {
        np.dtype(np.int32)
    }


@given(clips(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_plans_keep_every_kept_window_once(clip: tuple[NDArray[np.float32], float], refill: bool):
    scores, ratio = clip
    windows = scores.shape[1]
    keep = planner.select(scores, planner.n_prune(windows, len(scores), ratio))
    plan = planner.pack(keep, refill=refill)
    kept_rows = plan.gather_window.ravel()[plan.kept_slot]
    np.testing.assert_array_equal(kept_rows, np.flatnonzero(keep))
    used = plan.segment != planner.FREE
    np.testing.assert_array_equal(plan.gather_window[used] // windows, plan.segment[used])
    assert used.any(axis=1).all()  # no bin is empty


@given(clips(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_groups_carry_the_same_windows_as_bins(
    clip: tuple[NDArray[np.float32], float], refill: bool
):
    scores, ratio = clip
    windows = scores.shape[1]
    keep = planner.select(scores, planner.n_prune(windows, len(scores), ratio))
    plan = planner.pack(keep, refill=refill)
    packed = {}
    for frame in np.unique(plan.segment[plan.segment != planner.FREE]):
        packed[int(frame)] = sorted(plan.gather_window[plan.segment == frame].tolist())
    grouped = {}
    rows = np.full(int(keep.sum()), -1)
    for group in planner.group_frames(keep, refill=refill):
        for gather, feature in zip(group.gather_window, group.feature_row, strict=True):
            grouped[int(gather[0] // windows)] = gather.tolist()
            rows[feature[feature >= 0]] = gather[feature >= 0]
    assert grouped == packed
    np.testing.assert_array_equal(rows, np.flatnonzero(keep))


def test_first_frame_survives_whole_when_it_can():
    scores = np.zeros((4, 9), np.float32)
    scores[1:] = 0.9
    keep = planner.select(scores, 18)
    assert keep[0].all()
    assert keep.sum() == 18


def test_of_equal_scores_the_lower_index_goes_first():
    keep = planner.select(np.full((1, 8), 0.5, np.float32), 3)
    assert keep.tolist() == [[False] * 3 + [True] * 5]


def test_a_nan_counts_as_largest_and_negative_zero_as_zero():
    scores = np.array([[0, 0], [np.nan, -0.0], [0.0, np.inf]], np.float32)
    assert planner.select(scores, 2).tolist() == [[True, True], [True, False], [False, True]]


def test_scores_are_not_changed():
    scores = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    before = scores.copy()
    planner.select(scores, 5)
    np.testing.assert_array_equal(scores, before)


def test_a_frame_alone_in_its_bin_is_refilled():
    keep = np.zeros((3, 4), np.bool_)
    keep[0] = True  # full: alone, nothing to refill
    keep[1, :3] = True  # alone, one window comes back
    keep[2, :2] = True  # 3 + 2 > 4, so alone too
    plan = planner.pack(keep)
    assert plan.segment.tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert planner.pack(keep, refill=False).segment.tolist() == [
        [0] * 4, [1, 1, 1, -1], [2, 2, -1, -1]
    ]  # fmt: skip


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), 0.99999999])
def test_ratios_outside_the_range_are_refused(ratio: float):
    with pytest.raises(InputError, match="prune ratio") as error:
        planner.n_prune(81, 4, ratio)
    assert "0 <= ratio < 1" in str(error.value)


def test_frames_that_stay_where_they_are():
    keep = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]], bool)
    segment, kept_slot = planner.unpacked(keep, refill=False)
    np.testing.assert_array_equal(segment, np.where(keep, np.arange(5)[:, None], planner.FREE))
    np.testing.assert_array_equal(kept_slot, np.flatnonzero(keep))
    refilled, _ = planner.unpacked(keep)
    # Frames 1 and 3 share a bin; frame 4 is alone in its own and gets its third window back.
    segment[4] = 4
    np.testing.assert_array_equal(refilled, segment)
    assert segment.dtype == kept_slot.dtype == np.int32
