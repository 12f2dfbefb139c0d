from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.runtime.sampling import sample_times
from stts_export.training.clips import (
    ANSWERS,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    FPS,
    KINDS,
    TOP_LEVEL,
    TYPES,
    Clip,
    Shot,
    Thing,
    make_clip,
    split_seed,
)
from stts_export.training.rendering import frame_times

LEVELS = range(TOP_LEVEL + 1)
ANY_CLIP = st.builds(
    make_clip,
    st.integers(0, 3 * 10**9),
    kind=st.sampled_from(KINDS),
    level=st.sampled_from(LEVELS),
)


@cache
def clips(kind: str, level: int = TOP_LEVEL, count: int = 600) -> tuple[Clip, ...]:
    return tuple(make_clip(seed, kind=kind, level=level) for seed in range(count))


def samples(clip: Clip) -> list[float]:
    """The moments of the file that are on screen where a model with enough frames samples it."""
    return frame_times(clip, sample_times(clip.duration, 64).tolist())


def seen(thing: Thing, times: list[float]) -> list[float]:
    return [time for time in times if thing.start <= time < thing.end]


def named(text: str) -> list[str]:
    return [word for word in text.rstrip("?").replace(",", "").split() if word in COLOURS]


def mover(clip: Clip) -> Thing:
    return clip.things[0]


def test_a_seed_decides_the_clip():
    assert make_clip(7) == make_clip(7) != make_clip(8)
    assert {make_clip(seed).kind for seed in range(30)} == set(KINDS)


def test_splits_never_share_a_seed():
    ranges = [
        range(split_seed(split, 0), split_seed(split, 10**9 - 1) + 1)
        for split in ("train", "dev", "test")
    ]
    for left, right in pairwise(ranges):
        assert left[-1] < right[0]


@pytest.mark.parametrize("index", [-1, 10**9])
def test_an_index_of_another_split_is_refused(index: int):
    with pytest.raises(InputError, match="outside the split"):
        split_seed("train", index)


def test_unknown_names_and_levels_are_refused():
    with pytest.raises(InputError, match=r"'validation'(.|\n)*train or dev or test"):
        split_seed("validation", 0)
    with pytest.raises(InputError, match=r"'still'(.|\n)*stills or events or motion"):
        make_clip(0, kind="still")
    for level in (-1, TOP_LEVEL + 1):
        with pytest.raises(InputError, match=f"level is {level}"):
            make_clip(0, level=level)


@given(ANY_CLIP)
@settings(max_examples=150, deadline=None)
def test_every_question_has_a_known_answer_and_means_one_object(clip: Clip):
    assert clip.questions
    for question in clip.questions:
        assert question.type in TYPES
        assert question.answer in ANSWERS[question.type]
        assert "{" not in question.text
        if question.type in ("colour", "shape"):
            (meant,) = [thing for thing in clip.things if _is_meant(thing, clip, question.text)]
            assert question.answer == (meant.colour if question.type == "colour" else meant.shape)


def _is_meant(thing: Thing, clip: Clip, text: str) -> bool:
    words = text.rstrip("?").split()
    if "moving" in words:
        return thing is mover(clip)
    return thing.colour in words or thing.shape in words


@given(ANY_CLIP)
@settings(max_examples=150, deadline=None)
def test_objects_are_in_view_and_of_different_colours(clip: Clip):
    assert len({thing.colour for thing in clip.things}) == len(clip.things)
    for thing in clip.things:
        assert seen(thing, samples(clip))
        for time in (thing.start, min(thing.end, clip.duration)):
            since = time - thing.start
            place = np.array([thing.x + since * thing.vx, thing.y + since * thing.vy])
            assert (np.abs(place - 0.5) <= 0.5 - thing.radius + 1e-9).all()


@given(ANY_CLIP)
@settings(max_examples=150, deadline=None)
def test_clip_is_whole_frames_and_cuts_fall_between_samples(clip: Clip):
    assert clip.duration * FPS == clip.frame_count
    assert clip.shots[0].start == 0
    for cut in clip.cuts:
        assert 0.5 < cut < clip.duration - 0.5
        assert min(abs(cut - time) for time in samples(clip)) >= 1 / FPS - 1e-9
    for first, second in pairwise(clip.cuts):
        assert second - first >= 1 - 1e-9
    for index, shot in enumerate(clip.shots):
        assert clip.shot_at(shot.start) == index
        assert clip.shot_at(max(0.0, shot.start - 1e-6)) == max(0, index - 1)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_set_length_objects_and_camera(level: int):
    drawn = [clip for kind in KINDS for clip in clips(kind, level, 200)]
    seconds = [(2.0, 3.0), (3.5, 4.5), (5.0, 6.5)][level]
    assert seconds == (min(c.duration for c in drawn), max(c.duration for c in drawn))
    assert max(len(clip.things) for clip in drawn) == (2, 3, 4)[level]
    shots = [shot for clip in drawn for shot in clip.shots]
    low, high = [(2, 4), (4, 7), (7, 12)][level]
    assert {shot.clutter for shot in shots} == set(range(low, high + 1))
    panned = np.mean([clip.shots[0].pan != (0.0, 0.0) for clip in drawn])
    assert panned == pytest.approx((0, 0.4, 0.6)[level], abs=0.06)
    cut = np.mean([bool(clip.cuts) for clip in drawn])
    assert cut == pytest.approx((0, 0.25, 0.5)[level], abs=0.06)
    assert max(len(clip.cuts) for clip in drawn) == (0 if level == 0 else 2)
    speed = max(float(np.hypot(*shot.pan)) for shot in shots)
    assert speed <= (0, 0.05, 0.12)[level]
    for clip in drawn:
        assert (clip.shake > 0) == (clip.shots[0].pan != (0.0, 0.0))


@pytest.mark.parametrize("level", LEVELS)
def test_an_event_is_small_and_in_one_or_two_samples(level: int):
    numbers = []
    for clip in clips("events", level, 200):
        for first, second in pairwise(clip.things):
            assert first.end <= second.start + 1e-9
        for thing in clip.things:
            assert 0.10 <= thing.radius <= 0.15
            numbers.append(len(seen(thing, samples(clip))))
    assert set(numbers) == {1, 2}
    assert np.mean(numbers) < 1.6


def test_every_second_frame_alone_loses_objects():
    lost = []
    for clip in clips("events"):
        if len(clip.things) > 1:
            times = samples(clip)[::2]
            lost.append(not all(seen(thing, times) for thing in clip.things))
    assert np.mean(lost) > 0.5


def test_a_mover_is_seen_in_a_few_samples_in_the_middle_of_its_clip():
    numbers = Counter(len(seen(mover(clip), samples(clip))) for clip in clips("motion"))
    assert set(numbers) <= {4, 5, 6, 7}
    for clip in clips("motion"):
        assert len(samples(clip)) - len(seen(mover(clip), samples(clip))) >= 4
        assert all(thing.end > clip.duration for thing in clip.things[1:])


def test_stills_are_large_and_stay():
    for clip in clips("stills"):
        for thing in clip.things:
            assert thing.radius >= 0.18
            assert thing.start <= clip.duration - 1
            assert thing.end > clip.duration


def test_count_is_the_number_of_objects():
    for kind in ("events", "stills"):
        for clip in clips(kind):
            (question,) = [q for q in clip.questions if q.type == "count"]
            assert int(question.answer) == len(clip.things)


def test_order_and_last_follow_what_the_samples_show():
    for clip in clips("events"):
        first = {thing.colour: seen(thing, samples(clip))[0] for thing in clip.things}
        assert len(set(first.values())) == len(first)
        for question in clip.questions:
            if question.type == "order":
                pair = named(question.text)
                assert len(pair) == 2
                assert question.answer == min(pair, key=first.__getitem__)
            if question.type == "last":
                assert question.answer == max(first, key=first.__getitem__)


def test_direction_is_where_the_mover_goes():
    for clip in clips("motion"):
        thing = mover(clip)
        travel = np.array([thing.vx, thing.vy]) * (thing.end - thing.start)
        assert 0.32 <= np.abs(travel).max() <= 0.44
        for question in clip.questions:
            if question.type == "direction":
                assert DIRECTIONS[question.answer] == tuple(np.sign(travel).astype(int))


def _answers(kind: str, level: int) -> dict[str, Counter[str]]:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips(kind, level):
        for question in clip.questions:
            answers[question.type][question.answer] += 1
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_balanced_within_kind_and_type(kind: str):
    answers = _answers(kind, TOP_LEVEL)
    expected = {"events": "count last order", "motion": "colour direction shape"}
    assert sorted(answers) == expected.get(kind, "colour count shape").split()
    for question_type, counts in answers.items():
        assert set(counts) == set(ANSWERS[question_type])
        uniform = sum(counts.values()) / len(counts)
        assert max(abs(count / uniform - 1) for count in counts.values()) < 0.4


@pytest.mark.parametrize("level", LEVELS)
def test_counts_are_as_varied_as_the_level_allows(level: int):
    for kind in ("events", "stills"):
        counts = _answers(kind, level)["count"]
        assert set(counts) == set(COUNTS[: level + 2])
        assert min(counts.values()) > 0.75 * sum(counts.values()) / len(counts)


def _questions(question_type: str, kind: str) -> Iterator[tuple[str, str]]:
    for clip in clips(kind):
        for question in clip.questions:
            if question.type == question_type:
                yield question.text, question.answer


def test_mention_order_tells_nothing():
    first = [named(text)[0] == answer for text, answer in _questions("order", "events")]
    assert 0.45 < np.mean(first) < 0.55


@pytest.mark.parametrize(
    ("question_type", "kind"),
    [("shape", "motion"), ("shape", "stills"), ("colour", "stills"), ("direction", "motion")],
)
def test_no_word_of_a_question_gives_its_answer_away(question_type: str, kind: str):
    by_word: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in _questions(question_type, kind):
        for word in text.rstrip("?").split():
            by_word[word][answer] += 1
    chance = 1 / len(ANSWERS[question_type])
    for counts in by_word.values():
        if counts.total() >= 100:
            assert max(counts.values()) / counts.total() < 1.6 * chance


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("moment", ["start", "middle", "end"])
def test_a_place_of_the_mover_alone_does_not_tell_its_direction(moment: str, level: int):
    share = {"start": 0.0, "middle": 0.5, "end": 1.0}[moment]
    by_quadrant: dict[tuple[bool, bool], Counter[tuple[float, float]]] = defaultdict(Counter)
    for clip in clips("motion", level, 4000):
        thing = mover(clip)
        since = share * (thing.end - thing.start)
        x, y = thing.x + since * thing.vx, thing.y + since * thing.vy
        by_quadrant[x > 0.5, y > 0.5][np.sign(thing.vx), np.sign(thing.vy)] += 1
    assert len(by_quadrant) == 4
    for counts in by_quadrant.values():
        assert max(counts.values()) / counts.total() < 0.56  # one half and noise


def test_when_a_mover_comes_tells_nothing():
    late = {
        direction: np.mean([mover(c).start / c.duration for c in clips("motion") if _goes(c, sign)])
        for direction, sign in DIRECTIONS.items()
    }
    assert max(late.values()) - min(late.values()) < 0.08


def _goes(clip: Clip, sign: tuple[int, int]) -> bool:
    return tuple(np.sign([mover(clip).vx, mover(clip).vy]).astype(int)) == sign


def test_a_bare_clip_has_one_still_shot():
    clip = Clip(0, "stills", 1.0, (), ())
    assert clip.shots == (Shot(0.0, (0.0, 0.0), 0),)
    assert clip.cuts == ()
    assert clip.shot_at(0.9) == 0
