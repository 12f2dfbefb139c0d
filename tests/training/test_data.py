from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export.errors import InputError
from stts_export.training.clips import split_seed
from stts_export.training.config import (
    DataSettings,
    DevSettings,
    PruningSettings,
    SourceSettings,
    StartSettings,
    TrainConfig,
)
from stts_export.training.data import DevSet, dev_set, example_maker, read_questions
from stts_export.training.decoding import BrokenClip
from stts_export.training.examples import Example, ImageInput
from stts_export.training.feed import ExampleMaker
from stts_export.training.start import Start, start_from
from tests.training.small_runs import small_folder, small_run


@pytest.fixture(scope="module")
def start() -> Start:
    return start_from(small_run())


def _data(*sources: SourceSettings, **settings: Any) -> DataSettings:
    return DataSettings(sources, batch_size=4, micro_batch=4, max_frames=4, **settings)


def _file(dataset: Path, **settings: Any) -> SourceSettings:
    return SourceSettings("file", path=str(dataset / "all.jsonl"), **settings)


def _maker(config: TrainConfig, start: Start) -> ExampleMaker:
    return example_maker(config, start, read_questions(config))


def _dev_set(config: TrainConfig, start: Start, rank: int = 0, world: int = 1) -> DevSet:
    return dev_set(config, start, read_questions(config).dev, rank, world)


def _kind(example: Example) -> str:
    if example.name.startswith("synthetic"):
        return "synthetic"
    if example.clip is not None:
        return "video"
    return "text" if example.visual is None else "image"


def test_sources_are_mixed_by_weight(start: Start, dataset: Path):
    sources = _data(SourceSettings(max_questions=1), _file(dataset, weight=3.0))
    make = _maker(small_run(data=sources), start)
    counts = Counter(_kind(make(position)) for position in range(120))
    assert set(counts) == {"synthetic", "video", "image", "text"}
    assert 15 <= counts["synthetic"] <= 45
    assert counts["video"] == pytest.approx(3 * counts["image"], abs=4)
    assert counts["image"] == pytest.approx(counts["text"], abs=2)


def test_only_clips_are_pruned_and_some_are_whole(start: Start, dataset: Path):
    law = PruningSettings(full_share=0.3, min_ratio=0.4, max_ratio=0.6)
    config = small_run(data=_data(_file(dataset)), pruning=law)
    examples = [_maker(config, start)(position) for position in range(60)]
    ratios = [example.prune_ratio for example in examples if example.clip is not None]
    assert {example.prune_ratio for example in examples if example.clip is None} == {0.0}
    assert 3 < ratios.count(0.0) < 25
    assert all(0.4 <= ratio <= 0.6 for ratio in ratios if ratio)
    assert len(set(ratios)) > 10


def test_examples_depend_on_seed_and_position(start: Start, dataset: Path):
    config = small_run(data=_data(_file(dataset)))
    one, same = (_maker(config, start) for _ in range(2))
    other = _maker(replace(config, seed=1), start)
    names = [[make(position).name for position in range(15)] for make in (one, same, other)]
    assert names[0] == names[1] != names[2]
    assert all(len(set(names[0][epoch : epoch + 5])) == 5 for epoch in (0, 5, 10))
    assert one(7).prune_ratio == same(7).prune_ratio


def test_files_are_asked_as_deployed_models_are(start: Start, dataset: Path):
    make = _maker(small_run(data=_data(_file(dataset))), start)
    examples = {_kind(example): example for example in map(make, range(5))}
    video = examples["video"]
    assert video.clip is not None
    assert video.clip.frames.shape == (4, 36, 36, 3)
    assert video.clip.timestamps == pytest.approx((0, 2 / 3, 4 / 3, 2))
    (question,) = video.questions
    assert question.answer in "ABC"
    assert "A. red" in question.text
    assert isinstance(examples["image"].visual, ImageInput)


def test_a_source_asks_at_most_so_many_questions_at_once(start: Start, tmp_path: Path, dataset):
    conversation = [
        {"from": who, "value": f"{who} {number}"} for number in range(5) for who in ("human", "gpt")
    ]
    entry = {"id": "0", "video": "0.mp4", "conversations": conversation}
    (tmp_path / "llava.json").write_text(json.dumps([entry]))
    source = SourceSettings(
        "file", path=str(tmp_path / "llava.json"), media=str(dataset), max_questions=2
    )
    make = _maker(small_run(data=_data(source)), start)
    asked = [make(position).questions for position in range(6)]
    assert {len(questions) for questions in asked} == {2}
    assert len(set(asked)) > 1


def test_sampling_is_that_of_the_checkpoint(tmp_path: Path, dataset: Path):
    folder = small_folder(tmp_path / "checkpoint")
    values = {"frame_sample_mode": "uniform_last_frame", "num_frames": 4, "max_fps": 1.0}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"max_crops": 1, "patch_size": 4, "size": {"height": 36, "width": 36}})
    )
    config = small_run(start=StartSettings(str(folder)), data=_data(_file(dataset)))
    make = _maker(config, start_from(config))
    examples = {_kind(example): example for example in map(make, range(5))}
    assert examples["video"].clip is not None
    assert examples["video"].clip.timestamps == pytest.approx((0, 1, 2))
    image = examples["image"].visual
    assert isinstance(image, ImageInput)
    assert len(image.crops) == 2

    (folder / "video_preprocessor_config.json").write_text('{"max_fps": "fast"}')
    with pytest.raises(InputError, match="max_fps") as raised:
        _maker(config, start_from(config))
    assert (raised.value.where or "").startswith("checkpoint/")


def test_what_is_wrong_with_a_file_is_said_before_any_work(start: Start, dataset, tmp_path: Path):
    """No model is needed for it."""
    lines = (dataset / "all.jsonl").read_text()
    gone = tmp_path / "gone.jsonl"
    gone.write_text(lines.replace("1.mp4", "none.mp4"))
    source = SourceSettings("file", path=str(gone), media=str(dataset))
    with pytest.raises(InputError, match=r"none\.mp4"):
        read_questions(small_run(data=_data(source)))
    allowed = _maker(small_run(data=_data(replace(source, allow_missing=1))), start)
    assert len({allowed(position).name for position in range(8)}) == 4
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"question": "q"}\n')
    with pytest.raises(InputError, match="answer"):
        read_questions(small_run(data=_data(replace(source, path=str(silent)))))
    with pytest.raises(InputError, match="no such file"):
        read_questions(small_run(data=_data(replace(source, path="none.jsonl"))))
    with pytest.raises(InputError, match="no such file"):
        read_questions(small_run(dev=DevSettings(path="none.jsonl")))


def test_questions_about_one_file_are_asked_together(start: Start, tmp_path: Path, dataset: Path):
    lines = [f'{{"video": "0.mp4", "question": "{n}", "answer": "a"}}\n' for n in range(3)]
    (tmp_path / "many.jsonl").write_text("".join(lines))
    source = SourceSettings("file", path=str(tmp_path / "many.jsonl"), media=str(dataset))
    example = _maker(small_run(data=_data(source)), start)(0)
    assert [question.text for question in example.questions] == ["0", "1", "2"]


def test_a_broken_video_is_told_when_its_turn_comes(start: Start, dataset: Path, tmp_path: Path):
    lines = [line for line in (dataset / "all.jsonl").read_text().splitlines() if "0.mp4" in line]
    (tmp_path / "one.jsonl").write_text(lines[0])
    (tmp_path / "0.mp4").write_bytes((dataset / "0.mp4").read_bytes()[:900])
    source = SourceSettings("file", path=str(tmp_path / "one.jsonl"))
    make = _maker(small_run(data=_data(source)), start)
    with pytest.raises(BrokenClip, match=r"0\.mp4"):
        make(0)
    dev = DevSettings(path=str(tmp_path / "one.jsonl"))
    with pytest.raises(InputError, match=r"0\.mp4") as raised:
        _dev_set(small_run(dev=dev), start)
    assert raised.value.where == "dev"


def test_dev_clips_are_synthetic_unless_a_file_is_named(start: Start, dataset: Path):
    config = small_run(data=_data(SourceSettings()), dev=DevSettings(clips=3, prune_ratio=0.6))
    examples = _dev_set(config, start).examples
    first = split_seed("dev", 0)
    assert [one.name for one in examples] == [f"synthetic clip {first + i}" for i in range(3)]
    assert {example.prune_ratio for example in examples} == {0.6}
    assert all(example.clip and len(example.clip.frames) == 4 for example in examples)

    of_file = DevSettings(clips=4, prune_ratio=0.6, path=str(dataset / "all.jsonl"))
    examples = _dev_set(replace(config, dev=of_file), start).examples
    assert [_kind(example) for example in examples] == ["video"] * 3 + ["image"]
    assert [example.prune_ratio for example in examples] == [0.6] * 3 + [0.0]


@pytest.mark.parametrize("of_file", [True, False])
def test_processes_share_the_dev_clips(start: Start, dataset: Path, of_file: bool):
    path = str(dataset / "all.jsonl") if of_file else ""
    config = small_run(data=_data(SourceSettings()), dev=DevSettings(clips=5, path=path))
    whole = _dev_set(config, start)
    shares = [_dev_set(config, start, rank, 2) for rank in range(2)]
    for rank, share in enumerate(shares):
        assert [one.name for one in share.examples] == [one.name for one in whole.examples[rank::2]]
        assert (share.total, share.types) == (5, whole.types)
    first = shares[1].examples[0]
    assert first.clip is not None
    assert whole.examples[1].clip is not None
    np.testing.assert_array_equal(first.clip.frames, whole.examples[1].clip.frames)
    questions = [q.type for example in whole.examples for q in example.questions]
    assert whole.types == tuple(sorted(set(questions)))


def test_questions_about_one_video_are_one_example(start: Start, dataset: Path, tmp_path: Path):
    lines = [
        {"video": str(dataset / "0.mp4"), "question": f"Number {i}?", "answer": str(i)}
        for i in range(3)
    ]
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = small_run(data=_data(SourceSettings("file", path=str(file), max_questions=2)))
    questions = read_questions(config)
    make = example_maker(config, start, questions)
    asked = {tuple(q.answer for q in make(position).questions) for position in range(12)}
    assert asked == {("0", "1"), ("0", "2"), ("1", "2")}
