"""Which windows the selectors keep: how many, which ones, and what they merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.runtime import planner
from stts_export.training.selectors import (
    SELECTORS,
    Selection,
    after_tower,
    check_selectors,
    merge,
    merged_windows,
    needs_hidden,
    random_windows,
    select_features,
    select_windows,
    uniform_frames,
)

WIDTH = 12


@st.composite
def clips(draw: st.DrawFn) -> tuple[tuple[int, int], int, int]:
    """((T, W), windows to remove, seed)."""
    shape = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    count = draw(st.integers(0, shape[0] * shape[1] - 1))
    return shape, count, draw(st.integers(0, 1000))


def _chosen(name: str, shape: tuple[int, int], count: int, seed: int) -> Selection:
    rng = np.random.default_rng(seed)
    scores = rng.random(shape).astype(np.float32)
    vectors = rng.standard_normal((shape[0] * shape[1], WIDTH)).astype(np.float32)
    if after_tower(name):
        return select_features(vectors, shape, count)
    return select_windows(
        name,
        shape,
        count,
        scores=scores,
        hidden=vectors if needs_hidden(name) else None,
        rng=np.random.default_rng(seed + 1),
    )


@pytest.mark.parametrize("name", SELECTORS)
@given(clip=clips())
def test_every_selector_keeps_equally_many_and_the_same_again(name: str, clip):
    shape, count, seed = clip
    selection = _chosen(name, shape, count, seed)
    assert selection.keep.shape == shape
    assert selection.keep.dtype == np.bool_
    assert selection.keep.sum() == shape[0] * shape[1] - count
    assert np.array_equal(_chosen(name, shape, count, seed).keep, selection.keep)
    assert (selection.merged_into is not None) == needs_hidden(name)


@given(clip=clips())
def test_stts_keeps_what_the_planner_keeps(clip):
    shape, count, seed = clip
    scores = np.random.default_rng(seed).random(shape).astype(np.float32)
    expected = planner.select(scores, count)
    assert np.array_equal(select_windows("stts", shape, count, scores=scores).keep, expected)


@given(clip=clips())
def test_random_windows_spare_the_first_frame_and_are_nested(clip):
    shape, count, seed = clip
    keep = random_windows(shape, count, np.random.default_rng(seed))
    assert keep[0].sum() == min(shape[1], keep.sum())
    fewer = random_windows(shape, count // 2, np.random.default_rng(seed))
    assert not (keep & ~fewer).any()


def test_random_windows_are_uniform_over_the_later_frames():
    rng = np.random.default_rng(0)
    share = np.mean([random_windows((5, 16), 40, rng)[1:] for _ in range(500)], axis=0)
    assert abs(share.mean() - 0.375) < 0.01
    assert np.abs(share - share.mean()).max() < 0.1


def test_random_windows_are_uniform_within_the_first_frame():
    rng = np.random.default_rng(0)
    share = np.mean([random_windows((3, 8), 20, rng)[0] for _ in range(500)], axis=0)
    assert np.abs(share - 0.5).max() < 0.1


@given(clip=clips())
def test_uniform_frames_are_whole_but_for_one_and_evenly_apart(clip):
    (frames, windows), count, _ = clip
    per_frame = uniform_frames((frames, windows), count).sum(axis=1)
    whole = np.flatnonzero(per_frame == windows)
    partial = np.flatnonzero((per_frame > 0) & (per_frame < windows))
    kept = frames * windows - count
    assert len(whole) == kept // windows
    assert len(partial) == bool(kept % windows)
    if len(whole):
        assert whole[0] == 0
    if len(whole) > 1:
        assert whole[-1] == frames - 1
        assert np.ptp(np.diff(whole)) <= 1
    if len(whole) and len(partial):
        distance = np.abs(np.arange(frames)[:, None] - whole).min(axis=1)
        assert distance[partial[0]] == distance.max()


def test_uniform_frames_by_hand():
    keep = uniform_frames((7, 4), 28 - 11)
    assert np.flatnonzero(keep.all(axis=1)).tolist() == [0, 6]
    assert keep[3].tolist() == [True, False, True, True]
    assert uniform_frames((5, 4), 18).tolist() == [[True, False, False, True]] + [[False] * 4] * 4


@given(clip=clips())
def test_merged_windows_go_to_one_that_stays_and_lose_nothing(clip):
    shape, count, seed = clip
    rows = np.random.default_rng(seed).standard_normal((shape[0] * shape[1], 3, 4))
    rows = rows.astype(np.float32)
    selection = merged_windows(rows.mean(axis=1), shape, count)
    into, stays = selection.merged_into, selection.keep.ravel()
    assert into is not None
    assert np.array_equal(into[stays], np.flatnonzero(stays))
    assert stays[into].all()
    assert (into <= np.arange(len(into))).all()  # the earliest of a group
    merged = merge(rows, selection)
    size = np.bincount(into, minlength=len(into))[stays]
    total = (merged[stays] * size[:, None, None]).sum(axis=0)
    assert np.allclose(total, rows.sum(axis=0), atol=1e-4)
    assert np.array_equal(merged[~stays], rows[~stays])
    alone = np.flatnonzero(stays)[size == 1]
    assert np.array_equal(merged[alone], rows[alone])


@given(clip=clips(), scale=st.floats(0.01, 100))
def test_merging_asks_for_directions_only(clip, scale: float):
    shape, count, seed = clip
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((shape[0] * shape[1], WIDTH))
    once = merged_windows(hidden, shape, count).merged_into
    assert once is not None
    channels = rng.permutation(WIDTH)
    again = merged_windows(hidden[:, channels] * scale, shape, count).merged_into
    assert again is not None
    assert np.array_equal(once, again)


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 1000),
    st.data(),
)
def test_merging_finds_exactly_what_repeats_the_frame_before(
    pairs: int, windows: int, seed: int, data: st.DataObject
):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((2 * pairs, windows, 32)).astype(np.float32)
    repeats = data.draw(st.sets(st.tuples(st.integers(0, pairs - 1), st.integers(0, windows - 1))))
    expected = np.arange(2 * pairs * windows)
    for pair, window in repeats:
        hidden[2 * pair + 1, window] = hidden[2 * pair, window]
        expected[(2 * pair + 1) * windows + window] = 2 * pair * windows + window
    flat = hidden.reshape(-1, 32)
    selection = merged_windows(flat, (2 * pairs, windows), len(repeats))
    assert selection.merged_into is not None
    assert np.array_equal(selection.merged_into, expected)
    assert np.array_equal(merge(flat[:, None], selection), flat[:, None])


def test_equal_windows_merge_into_the_first_frame():
    hidden = np.tile(np.eye(6, dtype=np.float32), (5, 1))
    selection = merged_windows(hidden, (5, 6), 24)
    assert selection.merged_into is not None
    assert np.array_equal(selection.merged_into, np.tile(np.arange(6), 5))


def test_averages_weigh_by_size_and_keep_the_type():
    rows = np.array([1, 2, 6, 40], dtype=np.float16).reshape(4, 1, 1)
    into = np.array([0, 0, 0, 3])
    merged = merge(rows, Selection(np.array([[True, False, False, True]]), into))
    assert merged.dtype == np.float16
    assert merged.ravel().tolist() == [3, 2, 6, 40]
    assert rows.ravel().tolist() == [1, 2, 6, 40]


def test_without_merging_rows_stay_the_same_object():
    rows = np.zeros((4, 1, 1), np.float32)
    assert merge(rows, Selection(np.ones((2, 2), np.bool_))) is rows


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_evs_drops_exactly_what_repeats_the_frame_before(
    frames: int, windows: int, seed: int, data: st.DataObject
):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((frames, windows, 32)).astype(np.float32)
    repeats = np.zeros((frames, windows), np.bool_)
    for frame in range(1, frames):
        for window in data.draw(st.sets(st.integers(0, windows - 1))):
            # Louder or not, it is the same direction.
            features[frame, window] = features[frame - 1, window] * rng.uniform(0.5, 2)
            repeats[frame, window] = True
    selection = select_features(features.reshape(-1, 32), (frames, windows), int(repeats.sum()))
    assert np.array_equal(selection.keep, ~repeats)


@given(clip=clips())
def test_evs_does_not_ask_where_a_window_is(clip):
    shape, count, seed = clip
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((*shape, WIDTH)).astype(np.float32)
    order = rng.permutation(shape[1])
    count = min(count, (shape[0] - 1) * shape[1])  # the first frame's order is by index
    keep = select_features(features.reshape(-1, WIDTH), shape, count).keep
    moved = select_features(features[:, order].reshape(-1, WIDTH), shape, count).keep
    assert np.array_equal(moved, keep[:, order])


def test_evs_drops_lower_indices_first_and_the_first_frame_last():
    still = np.ones((12, 5), np.float32)
    assert select_features(still, (3, 4), 5).keep.ravel().tolist() == [True] * 4 + [
        False, False, False, False, False, True, True, True,
    ]  # fmt: skip
    assert select_features(still, (3, 4), 10).keep[0].tolist() == [False, False, True, True]
    nothing = np.zeros((12, 5), np.float32)
    assert select_features(nothing, (3, 4), 8).keep[0].all()


def test_a_selector_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="unknown selector 'tomee' \\(did you mean 'tome'"):
        select_windows("tomee", (2, 2), 1)
    with pytest.raises(InputError, match="unknown selector ''"):
        check_selectors([""])
    with pytest.raises(InputError, match="no selector"):
        check_selectors([])
    assert check_selectors(["evs", "stts", "evs"]) == ("evs", "stts")


@pytest.mark.parametrize(("name", "text"), [("stts", "has no scorer"), ("evs", "after the tower")])
def test_what_a_selector_cannot_do_is_refused(name: str, text: str):
    arguments: dict[str, Any] = {"hidden": np.zeros((4, 3), np.float32)}
    with pytest.raises(InputError, match=text):
        select_windows(name, (2, 2), 1, **arguments)
