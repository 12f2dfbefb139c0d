from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.runtime.sampling import sample_times


def test_short_clip_is_sampled_at_max_fps_and_at_its_end():
    assert sample_times(1.2, 64).tolist() == [0.0, 0.5, 1.0, 1.2]


def test_end_that_falls_on_the_grid_appears_once():
    assert sample_times(1.5, 64).tolist() == [0.0, 0.5, 1.0, 1.5]


def test_long_clip_is_spread_over_max_frames():
    assert sample_times(10.0, 5).tolist() == [0.0, 2.5, 5.0, 7.5, 10.0]


@pytest.mark.parametrize(
    ("duration", "max_frames", "expected"),
    [(1.5, 4, 4), (1.5001, 4, 4), (0.0, 8, 1), (0.0, 1, 1), (9.0, 1, 1), (0.04, 8, 2)],
)
def test_number_of_times(duration, max_frames, expected):
    assert len(sample_times(duration, max_frames)) == expected


def test_one_frame_is_the_first_moment():
    assert sample_times(9.0, 1).tolist() == [0.0]


@given(
    st.floats(0, 1e5, allow_nan=False),
    st.integers(1, 400),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 10.0]),
)
def test_times_respect_both_limits(duration, max_frames, max_fps):
    times = sample_times(duration, max_frames, max_fps)
    assert times.dtype == np.float64
    assert 1 <= len(times) <= max_frames
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    if max_frames > 1:
        assert times[-1] == duration
    # Only the appended end may come sooner than the rate allows.
    assert (np.diff(times[:-1]) >= 1 / max_fps - 1e-9 * max(1.0, duration)).all()


@pytest.mark.parametrize(
    "duration", [0.0, 1e-3, 0.04, 0.499999, 0.5, 0.500001, 63.5, 7200.0, 90061.3]
)
@pytest.mark.parametrize("max_frames", [1, 2, 64, 128, 384])
def test_rules_of_the_reference(duration, max_frames):
    """Every half second and the end, or evenly when that is too many (at Molmo2's 2 a second)."""
    halves = [0.5 * number for number in range(400) if 0.5 * number < duration]
    expected = [*halves, duration]
    if (max_frames - 1) / 2 < duration:
        expected = np.linspace(0.0, duration, max_frames).tolist()
    assert sample_times(duration, max_frames).tolist() == expected


@pytest.mark.parametrize("max_frames", [2, 64, 128, 384])
def test_the_boundary_between_the_two_rules(max_frames):
    boundary = (max_frames - 1) / 2
    grid = [0.5 * number for number in range(max_frames)]
    assert sample_times(boundary, max_frames).tolist() == grid
    below, above = np.nextafter(boundary, 0), np.nextafter(boundary, 1e9)
    assert sample_times(below, max_frames).tolist() == [*grid[:-1], below]
    assert sample_times(above, max_frames).tolist() == np.linspace(0, above, max_frames).tolist()


@given(st.integers(2, 400), st.sampled_from([3.0, 7.0, 10.0, 30.0]))
def test_a_duration_that_just_fits_never_exceeds_max_frames(max_frames, max_fps):
    assert len(sample_times((max_frames - 1) / max_fps, max_frames, max_fps)) <= max_frames


@pytest.mark.parametrize("duration", [-1.0, float("nan"), float("inf")])
def test_bad_duration(duration):
    with pytest.raises(InputError, match=f"duration is {duration}"):
        sample_times(duration, 8)


def test_bad_time_limits():
    with pytest.raises(InputError, match="max_frames is 0"):
        sample_times(1.0, 0)
    with pytest.raises(InputError, match="max_fps is -2"):
        sample_times(1.0, 4, -2)
