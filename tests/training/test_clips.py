from __future__ import annotations

from collections import Counter
from itertools import pairwise

import av
import numpy as np
import pytest

from stts_export.training.clips import (
    ANSWERS,
    COLOURS,
    DIRECTIONS,
    FPS,
    KINDS,
    SHAPES,
    TOP_LEVEL,
    Clip,
    Thing,
    frame_times,
    make_clip,
    render,
    split_seed,
    window_contents,
    write_mp4,
)

CLIPS = [make_clip(seed) for seed in range(600)]


def _named(clip: Clip, text: str, pool: tuple[str, ...]) -> list[str]:
    return [word for word in text.rstrip("?").replace(",", "").split() if word in pool]


def test_a_seed_decides_clip_and_pixels():
    first, again, other = make_clip(7), make_clip(7), make_clip(8)
    assert first == again != other
    np.testing.assert_array_equal(render(first, [0.0, 1.0], 60), render(again, [0.0, 1.0], 60))
    assert not np.array_equal(render(first, [0.0], 60), render(other, [0.0], 60))


def test_splits_never_share_a_seed():
    ranges = [
        range(split_seed(split, 0), split_seed(split, 10**9 - 1) + 1)
        for split in ("train", "dev", "test")
    ]
    for left, right in pairwise(ranges):
        assert left[-1] < right[0]
    with pytest.raises(ValueError, match="outside"):
        split_seed("train", 10**9)


@pytest.mark.parametrize("level", range(TOP_LEVEL + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_every_clip_has_questions_with_known_answers(kind: str, level: int):
    for seed in range(40):
        clip = make_clip(seed, kind=kind, level=level)
        assert clip.kind == kind
        assert clip.questions
        for question in clip.questions:
            assert question.answer in ANSWERS[question.type]
            assert "{" not in question.text


def test_count_is_the_number_of_objects_that_are_ever_seen():
    for clip in CLIPS:
        seen = [
            thing
            for thing in clip.things
            if any(thing.start <= t < thing.end for t in np.arange(0, clip.duration, 1 / FPS))
        ]
        for question in clip.questions:
            if question.type == "count":
                assert int(question.answer) == len(seen) == len(clip.things)


def test_order_names_the_earlier_of_the_two():
    for clip in CLIPS:
        starts = {thing.colour: thing.start for thing in clip.things}
        for question in clip.questions:
            if question.type == "order":
                pair = _named(clip, question.text, tuple(COLOURS))
                assert len(pair) == 2
                assert question.answer == min(pair, key=starts.__getitem__)
                assert abs(starts[pair[0]] - starts[pair[1]]) > 0.5


def test_events_are_seen_in_a_sampled_frame():
    for clip in CLIPS:
        times = frame_times(clip, [*np.arange(0, clip.duration, 0.5), clip.duration])
        for thing in clip.things:
            assert any(thing.start <= time < thing.end for time in times)


def test_direction_is_where_the_mover_goes_and_it_stays_in_view():
    for clip in CLIPS:
        for question in clip.questions:
            if question.type == "direction":
                mover = clip.things[0]
                move = np.array([mover.vx, mover.vy]) * clip.duration
                assert tuple(np.sign(move).astype(int)) == DIRECTIONS[question.answer]
                for end in (np.zeros(2), move):
                    place = np.array([mover.x, mover.y]) + end
                    assert (place >= mover.radius - 1e-9).all()
                    assert (place <= 1 - mover.radius + 1e-9).all()


def test_colour_and_shape_questions_have_one_possible_object():
    for clip in CLIPS:
        for question in clip.questions:
            if question.type in ("colour", "shape"):
                text = question.text
                matches = [thing for thing in clip.things if _is_meant(thing, clip, text)]
                assert len(matches) == 1
                expected = matches[0].colour if question.type == "colour" else matches[0].shape
                assert question.answer == expected


def _is_meant(thing: Thing, clip: Clip, text: str) -> bool:
    words = text.rstrip("?").split()
    if "moving" in words:
        return thing is clip.things[0]
    return thing.colour in words or thing.shape in words


def test_objects_of_a_clip_never_share_a_colour():
    for clip in CLIPS:
        colours = [thing.colour for thing in clip.things]
        assert len(set(colours)) == len(colours)


@pytest.mark.parametrize("kind", ["count", "direction", "order", "colour", "shape"])
def test_answers_are_balanced(kind: str):
    counts = Counter(
        question.answer
        for clip in (make_clip(seed) for seed in range(3000))
        for question in clip.questions
        if question.type == kind
    )
    expected = sum(counts.values()) / len(ANSWERS[kind])
    assert set(counts) == set(ANSWERS[kind])
    assert max(abs(count / expected - 1) for count in counts.values()) < 0.2


def test_neither_the_place_of_mention_nor_the_start_gives_the_answer_away():
    mentioned_first = []
    guessed = []
    for seed in range(3000):
        clip = make_clip(seed)
        for question in clip.questions:
            if question.type == "order":
                mentioned_first.append(
                    _named(clip, question.text, tuple(COLOURS))[0] == question.answer
                )
            if question.type == "direction":
                guessed.append(_towards_middle(clip.things[0]) == question.answer)
    assert 0.45 < np.mean(mentioned_first) < 0.55
    assert np.mean(guessed) < 0.65


def _towards_middle(thing: Thing) -> str:
    """The best guess from the first frame alone: there is most room on the far side."""
    room = {"left": thing.x, "right": 1 - thing.x, "up": thing.y, "down": 1 - thing.y}
    return max(room, key=room.__getitem__)


def test_drawn_object_has_its_colour_at_its_place():
    clip = make_clip(1, kind="stills", level=0)
    time = clip.duration - 0.1
    frame = render(clip, [time], 120)[0]
    for thing in clip.things:
        np.testing.assert_array_equal(frame[int(thing.y * 120), int(thing.x * 120)], thing.rgb)


def test_window_contents_name_the_object_under_a_window():
    clip = make_clip(1, kind="stills", level=0)
    colours, shapes, motions = window_contents(clip, [clip.duration - 0.1], (4, 4))
    assert colours.shape == shapes.shape == (1, 16)
    assert not motions.any()
    for thing in clip.things:
        window = int(thing.y * 4) * 4 + int(thing.x * 4)
        assert colours[0, window] == list(COLOURS).index(thing.colour) + 1
        assert shapes[0, window] == SHAPES.index(thing.shape) + 1


def test_window_contents_name_the_motion_of_the_mover_only():
    clip = make_clip(2, kind="motion")
    question = next(question for question in clip.questions if question.type == "direction")
    colours, _, motions = window_contents(clip, [0.5], (4, 4))
    is_mover = colours == list(COLOURS).index(clip.things[0].colour) + 1
    expected = list(DIRECTIONS).index(question.answer) + 1
    np.testing.assert_array_equal(motions, np.where(is_mover, expected, 0))


def test_h264_file_shows_what_was_drawn(tmp_path):
    clip = make_clip(5, kind="events")
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
