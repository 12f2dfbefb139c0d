from __future__ import annotations

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.runtime.video import read_video
from stts_export.training.clips import (
    COLOURS,
    DIRECTIONS,
    FPS,
    KINDS,
    SHAPES,
    TOP_LEVEL,
    Clip,
    Shot,
    Thing,
    make_clip,
)
from stts_export.training.rendering import (
    degrade,
    frame_times,
    render,
    window_contents,
    write_mp4,
)

CLIPS = [
    make_clip(seed, kind=kind, level=level)
    for seed in range(8)
    for kind in KINDS
    for level in range(TOP_LEVEL + 1)
]


def background_of(clip: Clip, times: list[float], size: int = 120) -> NDArray[np.float64]:
    bare = dataclasses.replace(clip, things=())
    return render(bare, times, size).astype(float)


def visible(clip: Clip, time: float) -> list[Thing]:
    return [thing for thing in clip.things if thing.start <= time < thing.end]


def test_a_seed_decides_the_pixels():
    first, other = make_clip(7), make_clip(8)
    np.testing.assert_array_equal(render(first, [0.0, 1.0], 60), render(make_clip(7), [0, 1], 60))
    assert not np.array_equal(render(first, [0.0], 60), render(other, [0.0], 60))


def test_a_frame_does_not_depend_on_the_frames_drawn_with_it():
    clip = next(clip for clip in CLIPS if clip.cuts)
    times = [index / FPS for index in range(clip.frame_count)]
    some = times[::7][::-1]
    np.testing.assert_array_equal(render(clip, some, 60), render(clip, times, 60)[::7][::-1])


@pytest.mark.parametrize("time", [-0.1, 1.1])
def test_a_time_outside_the_clip_is_refused(time: float):
    clip = Clip(0, "stills", 1.0, (), (), (Shot(pan=(0.3, 0.0)),))
    assert len(render(clip, [0.0, 1.0], 30)) == 2
    with pytest.raises(InputError, match=f"{time} s is no time"):
        render(clip, [0.5, time], 30)


def test_every_size_shows_the_same():
    for clip in CLIPS[-6:]:
        times = [0.5, clip.duration - 0.25]
        large = render(clip, times, 240).astype(float)
        halved = large.reshape(2, 120, 2, 120, 2, 3).mean((2, 4))
        assert np.abs(halved - render(clip, times, 120)).mean() < 2


def test_frame_times_are_what_a_file_shows():
    clip = Clip(0, "stills", 1.0, (), ())
    assert frame_times(clip, [0.0, 0.5, 0.58, 1.0]) == [0.0, 0.5, 0.5, 11 / 12]


def test_an_object_has_its_colour_at_its_place():
    for clip in CLIPS:
        for thing in clip.things:
            time = min(thing.start + 0.3, clip.duration - 0.1)
            x, y = (
                thing.x + thing.vx * (time - thing.start),
                thing.y + thing.vy * (time - thing.start),
            )
            frame = render(clip, [time], 120)[0]
            np.testing.assert_array_equal(frame[int(y * 120), int(x * 120)], thing.rgb)


def test_an_object_is_drawn_from_its_start_until_its_end():
    thing = Thing("red", "square", (200, 40, 40), 0.2, 0.5, 0.5, start=0.5, end=1.0)
    clip = Clip(3, "stills", 2.0, (thing,), (), (Shot(clutter=5),))
    times = [0.49, 0.5, 0.99, 1.0]
    is_red = [tuple(frame[30, 30]) == thing.rgb for frame in render(clip, times, 60)]
    assert is_red == [False, True, True, False]


def test_backgrounds_are_never_taken_for_objects():
    for clip in CLIPS:
        pixels = background_of(clip, [shot.start for shot in clip.shots])
        assert pixels.max() < 165
        assert (pixels.max(-1) - pixels.min(-1)).max() < 35
    for rgb in COLOURS.values():
        assert min(rgb) > 200 or max(rgb) - min(rgb) > 100


def test_clutter_has_edges_and_grows_with_the_level():
    edges = []
    for level in range(TOP_LEVEL + 1):
        frames = [background_of(make_clip(seed, level=level), [0.0])[0] for seed in range(30)]
        steps = [np.abs(np.diff(frame.mean(-1), axis=1)).max(1) for frame in frames]
        edges.append(float(np.mean([(step > 10).mean() for step in steps])))
    assert edges == sorted(edges)
    assert edges[-1] > 1.3 * edges[0] > 0.3


def test_a_still_camera_sees_the_same_background():
    clip = next(c for c in CLIPS if not c.cuts and c.shots[0].pan == (0.0, 0.0))
    first, second = background_of(clip, [0.0, 1.3])
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("pan", [(0.25, 0.0), (-0.25, 0.0), (0.0, 0.25), (0.1, -0.2)])
def test_a_panned_background_goes_the_other_way(pan: tuple[float, float]):
    clip = Clip(4, "stills", 1.5, (), (), (Shot(pan=pan, clutter=8),))
    before, after = render(clip, [0.0, 1.0], 80).astype(float)
    dx, dy = (round(80 * speed) for speed in pan)
    moved = after[max(0, -dy) : 80 - max(0, dy), max(0, -dx) : 80 - max(0, dx)]
    kept = before[max(0, dy) : 80 - max(0, -dy), max(0, dx) : 80 - max(0, -dx)]
    assert np.abs(moved - kept).max() <= 1
    assert np.abs(after - before).mean() > 2


def test_a_slow_pan_moves_by_parts_of_a_pixel():
    clip = Clip(4, "stills", 1.5, (), (), (Shot(pan=(0.01, 0.0), clutter=8),))
    first, half, whole = render(clip, [0.0, 0.5, 1.0], 100).astype(float)
    np.testing.assert_allclose(half, (first + whole) / 2, atol=1)
    assert not np.array_equal(half, whole)


def test_objects_stay_where_they_are_while_the_camera_pans():
    thing = Thing("red", "circle", (200, 40, 40), 0.2, 0.5, 0.5)
    clip = Clip(4, "stills", 3.0, (thing,), (), (Shot(pan=(0.12, 0.05), clutter=8),), 0.008)
    for frame in render(clip, [0.0, 1.0, 2.9], 60):
        assert tuple(frame[30, 30]) == thing.rgb


def test_shaking_stays_within_its_amplitude():
    clip = Clip(5, "stills", 2.0, (), (), (Shot(clutter=8),), 0.02)
    frames = render(clip, [index / FPS for index in range(24)], 100).astype(float)
    assert np.abs(np.diff(frames, axis=0)).max() > 5
    reference = frames[0]
    for frame in frames:
        shifts = [
            np.abs(frame[5:-5, 5:-5] - np.roll(reference, (dy, dx), (0, 1))[5:-5, 5:-5]).mean()
            for dy in range(-4, 5)
            for dx in range(-4, 5)
        ]
        assert min(shifts) < 2


def test_a_cut_replaces_the_background_at_its_time():
    thing = Thing("red", "circle", (200, 40, 40), 0.2, 0.5, 0.5)
    shots = (Shot(0.0, clutter=6), Shot(15 / FPS, clutter=6))
    clip = Clip(9, "stills", 2.0, (thing,), (), shots)
    first, last_before, after, end = render(clip, [0.0, 14 / FPS, 15 / FPS, 1.9], 60).astype(int)
    np.testing.assert_array_equal(first, last_before)
    np.testing.assert_array_equal(after, end)
    assert np.abs(after - last_before).mean() > 5
    assert tuple(last_before[30, 30]) == tuple(after[30, 30]) == thing.rgb


def test_degraded_frames_keep_colours_apart():
    clip = make_clip(1, kind="stills", level=0)
    frames = render(clip, [clip.duration - 0.1], 60)
    worn = degrade(frames, np.random.default_rng(0))
    assert worn.dtype == np.uint8
    assert not np.array_equal(worn, frames)
    assert np.abs(worn.astype(int) - frames).max() < 50


def test_windows_name_the_object_under_them():
    clip = make_clip(1, kind="stills", level=0)
    colours, shapes, motions = window_contents(clip, [clip.duration - 0.1], (4, 4))
    assert colours.shape == shapes.shape == (1, 16)
    assert not motions.any()
    for thing in clip.things:
        window = int(thing.y * 4) * 4 + int(thing.x * 4)
        assert colours[0, window] == list(COLOURS).index(thing.colour) + 1
        assert shapes[0, window] == SHAPES.index(thing.shape) + 1


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (9, 9)])
def test_every_visible_object_has_a_window(grid: tuple[int, int]):
    for clip in CLIPS:
        times = frame_times(clip, np.arange(0.0, clip.duration, 0.5).tolist())
        contents = window_contents(clip, times, grid)
        assert contents.colour.shape == (len(times), grid[0] * grid[1])
        for time, row in zip(times, contents.colour, strict=True):
            expected = {list(COLOURS).index(thing.colour) + 1 for thing in visible(clip, time)}
            assert set(row) - {0} == expected


def test_an_object_on_a_corner_of_windows_is_not_lost():
    thing = Thing("blue", "triangle", (45, 80, 220), 0.1, 0.5, 0.5)
    clip = Clip(0, "stills", 1.0, (thing,), ())
    assert 1 <= np.count_nonzero(window_contents(clip, [0.0], (4, 4)).colour) <= 4


def test_windows_name_the_motion_of_the_mover_only():
    clip = make_clip(2, kind="motion")
    question = next(question for question in clip.questions if question.type == "direction")
    time = clip.things[0].start + 0.5
    colours, _, motions = window_contents(clip, [time], (4, 4))
    is_mover = colours == list(COLOURS).index(clip.things[0].colour) + 1
    expected = list(DIRECTIONS).index(question.answer) + 1
    assert is_mover.any()
    np.testing.assert_array_equal(motions, np.where(is_mover, expected, 0))


def test_h264_file_shows_what_was_drawn(tmp_path: Path):
    clip = next(c for c in CLIPS if c.kind == "events" and c.cuts and c.shots[0].pan != (0.0, 0.0))
    path = tmp_path / "clip.mp4"
    write_mp4(clip, path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert container.duration is not None
        assert container.duration / 1e6 == pytest.approx(clip.duration, abs=1e-3)
    assert len(frames) == clip.frame_count
    drawn = render(clip, [index / FPS for index in range(clip.frame_count)], 240)
    error = np.abs(np.stack(frames).astype(float) - drawn).mean((1, 2, 3))
    assert error.max() < 6


def test_reading_a_file_gives_the_frames_that_training_draws(tmp_path: Path):
    clip = make_clip(12, kind="motion")
    path = tmp_path / "clip.mp4"
    write_mp4(clip, path)
    video = read_video(path, max_frames=16, size=(120, 120))
    drawn = render(clip, frame_times(clip, video.timestamps.tolist()), 120)
    assert video.frames.shape == drawn.shape
    assert np.abs(video.frames.astype(float) - drawn).mean() < 5
