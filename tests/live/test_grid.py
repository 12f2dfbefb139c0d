"""Stream times and samples: what is on screen at each moment."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stts_export.live.grid import LONGEST_STILL, MAX_STILL, Grid, StreamClock
from stts_export.live.sources import FileSource, SourceOptions
from stts_export.runtime.sampling import sample_times
from stts_export.runtime.video import read_video
from tests.helpers import write_video
from tests.live.helpers import sampled


def _shown(starts: list[float], durations: list[float | None], step: float) -> list[tuple]:
    """All samples of frames named by their number."""
    grid: Grid[int] = Grid(step, MAX_STILL)
    moments = []
    for number, (start, duration) in enumerate(zip(starts, durations, strict=True)):
        moments += grid.add(start, duration, number)
    moments += grid.finish()
    return [(moment.time, moment.frame) for moment in moments]


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    known=st.booleans(),
    fps=st.sampled_from([2.0, 1.0, 0.5, 4.0]),
)
def test_samples_are_those_of_the_models_own_sampling(lengths: list[int], known: bool, fps: float):
    """A file read to its end: the times of `sample_times`, and the frame on screen at each."""
    ticks = np.cumsum([0, *lengths])
    starts, end = ticks[:-1] / 30, float(ticks[-1] / 30)
    durations: list[float | None] = [
        length / 30 if known or number == len(lengths) - 1 else None
        for number, length in enumerate(lengths)
    ]
    got = _shown(starts.tolist(), durations, 1 / fps)
    expected = sample_times(end, 10_000, fps)
    np.testing.assert_allclose([time for time, _ in got], expected, atol=1e-9)
    frames = np.minimum(
        np.searchsorted(ticks[1:] / 30, expected + 1e-9, side="right"), len(lengths) - 1
    )
    assert [frame for _, frame in got] == frames.tolist()


def test_a_sample_does_not_wait_for_the_next_frame_when_the_frame_says_how_long_it_stays():
    grid: Grid[str] = Grid(0.5)
    assert [m.frame for m in grid.add(0.0, 0.04, "a")] == ["a"]
    assert grid.add(0.44, 0.04, "b") == []
    (moment,) = grid.add(0.48, 0.04, "c")  # until 0.52
    assert (moment.time, moment.index, moment.frame) == (0.5, 1, "c")
    assert grid.add(0.52, 0.04, "d") == []


def test_without_a_duration_the_frame_before_is_sampled_late():
    grid: Grid[str] = Grid(0.5)
    grid.add(0.0, None, "a")
    assert grid.add(0.4, None, "b") == []
    assert [m.frame for m in grid.add(0.6, None, "c")] == ["b"]
    assert [m.frame for m in grid.add(1.0, None, "d")] == ["d"]


def test_nothing_is_sampled_in_a_gap():
    grid: Grid[str] = Grid(0.5)
    grid.add(0.0, 0.04, "a")
    moments = grid.add(10.1, 0.04, "b")
    assert [(m.time, m.frame) for m in moments] == [(0.5 * i, "a") for i in range(1, 4)]
    assert max(m.time for m in moments) < LONGEST_STILL
    assert [m.time for m in grid.add(10.5, 0.04, "c")] == [10.5]


class _Clock:
    """A clock, and what it complained about."""

    def __init__(self, is_live: bool) -> None:
        self.repairs: list[str] = []
        self.clock = StreamClock(is_live, self.repairs.append)
        self.wall = 100.0

    def times(self, pts: list[float | None], wall_step: float = 0.04) -> list[float]:
        times = []
        for value in pts:
            times.append(round(self.clock.time(value, self.wall, is_first=False), 6))
            self.wall += wall_step
        return times


def test_stream_time_begins_at_the_first_frame():
    clock = _Clock(is_live=False)
    assert clock.times([90.0, 90.5, 91.25]) == [0.0, 0.5, 1.25]
    assert clock.repairs == []


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_time_is_the_usual_step_of_a_file(missing: float | None):
    clock = _Clock(is_live=False)
    assert clock.times([3.0, 3.1, missing, 3.3]) == [0.0, 0.1, 0.2, 0.3]
    assert len(clock.repairs) == 1


def test_a_missing_time_of_a_camera_is_the_wall_clocks():
    clock = _Clock(is_live=True)
    assert clock.times([None, None, None], wall_step=0.25) == [0.0, 0.25, 0.5]
    assert len(clock.repairs) == 2


def test_times_that_come_late_are_anchored_where_the_stream_is():
    clock = _Clock(is_live=False)
    assert clock.times([None, 50.0, 50.5]) == [0.0, 0.04, 0.54]


def test_the_end_of_the_frame_before_is_a_better_guess():
    """The first frame of RTSP has no time, and the next ones come at once."""
    clock = _Clock(is_live=True)
    times = [
        clock.clock.time(pts, 100.0, is_first=pts is None, duration=0.04)
        for pts in (None, 0.04, 0.08, None, 0.04)
    ]
    assert times[:3] == pytest.approx([0.0, 0.04, 0.08])
    assert times[4] - times[3] == pytest.approx(0.04)
    assert clock.clock.time(None, 100.0, is_first=False, duration=0.04) == pytest.approx(
        times[4] + 0.04
    )


def test_a_small_step_back_waits_for_the_clock_to_catch_up():
    clock = _Clock(is_live=False)
    assert clock.times([0.0, 0.5, 0.5, 0.3, 1.0]) == [0.0, 0.5, 0.501, 0.502, 1.0]
    assert len(clock.repairs) == 2


def test_a_clock_that_is_set_back_or_ahead_goes_on():
    clock = _Clock(is_live=False)
    assert clock.times([0.0, 0.1, 5000.0, 5000.1, 0.0, 0.1]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert len(clock.repairs) == 2


def test_a_camera_may_pause_as_long_as_the_wall_clock_says():
    clock = _Clock(is_live=True)
    clock.times([0.0])
    clock.wall += 60
    assert clock.times([60.0]) == [60.0]
    assert clock.repairs == []


def test_a_new_connection_counts_the_time_that_went_by():
    live, file = _Clock(is_live=True), _Clock(is_live=False)
    for clock in (live, file):
        clock.times([7.0, 7.1])
        clock.wall += 5
    now = live.clock.time(0.0, live.wall, is_first=True)
    assert now == pytest.approx(0.1 + 5.04)
    assert file.clock.time(0.0, file.wall, is_first=True) == pytest.approx(0.2)
    assert live.clock.time(0.1, live.wall + 0.1, is_first=False) == pytest.approx(now + 0.1)
    assert live.repairs == file.repairs == []


@settings(max_examples=200)
@given(
    pts=st.lists(
        st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf])),
        min_size=1, max_size=40,
    ),
    is_live=st.booleans(),
)  # fmt: skip
def test_times_always_ascend(pts: list[float | None], is_live: bool):
    clock = StreamClock(is_live, lambda _: None)
    grid: Grid[int] = Grid(0.5)
    last, samples = -1.0, []
    for number, value in enumerate(pts):
        now = clock.time(value, number * 0.04, is_first=number % 7 == 5)
        assert math.isfinite(now)
        assert now > last
        samples += [moment.time for moment in grid.add(now, None, number)]
        last = now
    assert (np.diff(samples) > 0).all()


def test_a_real_file_is_sampled_as_read_video_does(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", frames=37)
    expected = read_video(path, max_frames=1000)
    times, frames = sampled(FileSource(path, SourceOptions()), 2.0)
    np.testing.assert_allclose(times, expected.timestamps, atol=1e-9)
    np.testing.assert_array_equal(frames, expected.frames)


def test_a_recording_may_pause_for_longer_than_a_camera(tmp_path: Path):
    """Frames at 0, 0.5, 1 and, after fifteen seconds, 16 to 17.5 s: sampled as `run` does."""
    path = tmp_path / "pause.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.options = {"bf": "0"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, seconds in enumerate([0, 0.5, 1, 16, 16.5, 17, 17.5]):
            picture = np.full((48, 48, 3), 30 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    expected = read_video(path, max_frames=1000)
    times, frames = sampled(FileSource(path, SourceOptions()), 2.0)
    np.testing.assert_allclose(times, expected.timestamps, atol=1e-9)
    np.testing.assert_array_equal(frames, expected.frames)
