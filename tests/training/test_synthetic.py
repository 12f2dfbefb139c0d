from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stts_export.runtime.sampling import sample_times
from stts_export.runtime.video import read_video
from stts_export.training.clips import TOP_LEVEL, make_clip, split_seed
from stts_export.training.config import SourceSettings
from stts_export.training.examples import Example
from stts_export.training.rendering import write_mp4
from stts_export.training.synthetic import (
    SyntheticSource,
    clip_example,
    labelled_frames,
)
from tests.training.conftest import Core

SETTINGS = SourceSettings(level_steps=(0, 10, 20), easier_share=0.5, max_questions=2)


@pytest.fixture(scope="module")
def source(core: Core) -> SyntheticSource:
    return SyntheticSource(SETTINGS, core.model.config.vision, seed=4, batch_size=8, max_frames=16)


def _seed(example: Example) -> int:
    return int(example.name.removeprefix("synthetic clip "))


def _assert_equal(one: Example, other: Example) -> None:
    assert one.clip is not None
    assert other.clip is not None
    np.testing.assert_array_equal(one.clip.frames, other.clip.frames)
    assert one.clip.timestamps == other.clip.timestamps
    assert one.questions == other.questions


def test_an_example_depends_on_its_place_alone(source: SyntheticSource):
    first = source.example(17, 33)
    source.example(3, 4)
    _assert_equal(source.example(17, 33), first)
    assert _seed(source.example(18, 33)) != _seed(first)
    assert _seed(replace(source, seed=5).example(17, 33)) != _seed(first)


def test_clips_come_from_the_train_split(source: SyntheticSource):
    seeds = [_seed(source.example(index, index)) for index in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < split_seed("dev", 0) for seed in seeds)
    far = _seed(replace(source, seed=10**6).example(10**6, 0))
    assert 0 <= far < split_seed("dev", 0)


def test_levels_begin_at_their_steps(source: SyntheticSource):
    assert [source.level(step) for step in (0, 9, 10, 19, 20, 999)] == [0, 0, 1, 1, 2, 2]
    hardest = replace(source, settings=replace(SETTINGS, level_steps=(0, 0, 0)))
    assert hardest.level(0) == TOP_LEVEL


def _level(source: SyntheticSource, index: int, position: int) -> int:
    """Told from the clip, which differs between levels."""
    example = source.example(index, position)
    for level in range(TOP_LEVEL + 1):
        clip = make_clip(_seed(example), level=level)
        assert example.clip is not None
        times = sample_times(clip.duration, 16)
        if example.clip.timestamps == tuple(times.tolist()) and {*example.questions} <= {
            *clip.questions
        }:
            return level
    raise AssertionError("of no level")


def test_a_share_of_the_clips_is_easier(source: SyntheticSource):
    levels = [_level(source, index, 8 * 25 + index) for index in range(40)]
    assert set(levels) == {0, 1, 2}
    assert 10 <= levels.count(2) <= 30
    assert {_level(source, index, index) for index in range(5)} == {0}
    strict = replace(source, settings=replace(SETTINGS, easier_share=0.0))
    assert {_level(strict, index, 8 * 25 + index) for index in range(8)} == {2}


def test_questions_are_drawn_up_to_the_limit(source: SyntheticSource):
    many = replace(source, settings=replace(SETTINGS, max_questions=100))
    seen = set()
    for position in range(8):
        example = source.example(5, position)
        every = many.example(5, position)
        assert len(example.questions) == 2
        assert set(example.questions) < set(every.questions)
        seen.add(frozenset(example.questions))
    assert len(seen) > 1


def test_a_clip_looks_as_its_file_does(core: Core, tmp_path: Path):
    """Drawn on the spot it is what is decoded and sampled from H.264, but for the coding."""
    clip = make_clip(split_seed("train", 3), level=1)
    drawn = clip_example(clip, clip.questions, core.model.config.vision, 5, 0.5)
    write_mp4(clip, tmp_path / "clip.mp4", size=120)
    read = read_video(tmp_path / "clip.mp4", max_frames=5, size=core.model.config.vision.image_size)
    assert drawn.clip is not None
    assert drawn.clip.frames.shape == read.frames.shape == (5, 36, 36, 3)
    np.testing.assert_allclose(drawn.clip.timestamps, read.timestamps, atol=1e-6)
    other = make_clip(split_seed("train", 4), level=1)
    different = clip_example(other, other.questions, core.model.config.vision, 5)
    assert different.clip is not None
    ours, wrong = (
        np.abs(one.frames.astype(float) - read.frames).mean()
        for one in (drawn.clip, different.clip)
    )
    assert ours < 6 < wrong
    assert drawn.prune_ratio == 0.5
    assert drawn.contents is not None
    assert drawn.contents.colour.shape == (5, 9)
    again = clip_example(clip, clip.questions, core.model.config.vision, 5)
    _assert_equal(replace(again, prune_ratio=0.5), drawn)


def test_processes_share_the_single_frames_of_a_step(core: Core):
    vision = core.model.config.vision
    whole = labelled_frames(vision, seed=2, step=7, count=5)
    assert whole.frames.shape == (5, 36, 36, 3)
    assert whole.colours.shape == whole.shapes.shape == (5, 9)
    for rank in range(2):
        share = labelled_frames(vision, seed=2, step=7, count=5, rank=rank, world=2)
        np.testing.assert_array_equal(share.frames, whole.frames[rank::2])
        np.testing.assert_array_equal(share.colours, whole.colours[rank::2])
        np.testing.assert_array_equal(share.shapes, whole.shapes[rank::2])
    following = labelled_frames(vision, seed=2, step=8, count=5)
    assert not (whole.frames == following.frames).all((1, 2, 3)).any()


def test_single_frames_show_something_and_can_be_kept(core: Core):
    frames = labelled_frames(core.model.config.vision, seed=2, step=0, count=40)
    assert ((frames.colours > 0) == (frames.shapes > 0)).all()
    assert (frames.shapes > 0).any(1).mean() > 0.5
    kept = frames.examples()
    assert len(kept) == 40
    assert kept[3].clip is not None
    np.testing.assert_array_equal(kept[3].clip.frames[0], frames.frames[3])
    assert kept[3].contents is not None
    np.testing.assert_array_equal(kept[3].contents.shape[0], frames.shapes[3])
