from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stts_export.config import ModelConfig
from stts_export.errors import InputError, MissingDependencyError
from stts_export.training.decoding import BrokenClip, Decoder
from stts_export.training.examples import Example, ImageInput, Question, VideoInput
from stts_export.training.feed import (
    BrokenLimit,
    ExampleMaker,
    Feed,
    Made,
    RecordSource,
    Source,
)
from stts_export.training.mixture import RatioLaw, step_positions
from stts_export.training.records import Record, read_records
from tests.helpers import picture, small_config, write_video
from tests.training.sources import Failing, Numbers

# torch warns where there are fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

CONFIG = ModelConfig.from_dict(
    small_config(
        **{"vit_config.image_default_input_size": [126, 126], "vit_config.image_num_pos": 81}
    ),
    has_scorer=True,
)
LAW = RatioLaw(full_share=0.3, min_ratio=0.2, max_ratio=0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of which one is empty and one cut off, an image, and a text."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(6):
        write_video(folder / f"{number}.mp4", frames=16, seed=number)
    (folder / "2.mp4").write_bytes(b"")
    (folder / "4.mp4").write_bytes((folder / "4.mp4").read_bytes()[:1000])
    Image.fromarray(picture((140, 200))).save(folder / "p.png")
    lines = [
        f'{{"video": "{number}.mp4", "question": "q", "answer": "{number}"}}' for number in range(6)
    ]
    lines.append('{"image": "p.png", "question": "What?", "answer": "b", "choices": ["a", "b"]}')
    lines.append('{"question": "2 + 2?", "answer": "4"}')
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def maker(folder: Path) -> ExampleMaker:
    records = read_records(folder / "data.jsonl")
    source = RecordSource(records, Decoder(CONFIG, max_frames=4), seed=5)
    sources: list[Source] = [source, Numbers()]
    return ExampleMaker(sources, [2, 1], LAW, seed=5)


def described(made: Sequence[Made]) -> list[Any]:
    """All that there is in examples, in a form that can be compared."""
    values: list[Any] = []
    for one in made:
        if isinstance(one, BrokenClip):
            values.append(str(one))
            continue
        parts: tuple[Any, ...] = ()
        if isinstance(one.visual, VideoInput):
            parts = ("video", one.visual.frames.tobytes(), one.visual.timestamps)
        elif isinstance(one.visual, ImageInput):
            pooled = one.visual.pooled_patches.tobytes()
            parts = ("image", one.visual.crops.tobytes(), pooled, one.visual.tokens)
        values.append((one.name, one.questions, one.prune_ratio, *parts))
    return values


def steps_of(feed: Feed) -> list[list[Any]]:
    with feed:
        return [described(made) for made in feed]


def test_workers_resuming_and_processes_change_nothing(maker: ExampleMaker):
    positions = partial(step_positions, batch_size=5)
    whole = steps_of(Feed(maker, positions, range(6)))
    assert [len(step) for step in whole] == [5] * 6
    kinds = {type(value) if isinstance(value, str) else value[3:4] for s in whole for value in s}
    assert kinds == {str, (), ("video",), ("image",)}
    assert steps_of(Feed(maker, positions, range(6), workers=2, prefetch=3)) == whole
    assert steps_of(Feed(maker, positions, range(4, 6))) == whole[4:]
    parts = [
        steps_of(Feed(maker, partial(positions, rank=rank, world=3), range(6))) for rank in range(3)
    ]
    for step, values in enumerate(whole):
        shared = [parts[place % 3][step][place // 3] for place in range(5)]
        assert shared == values


def test_an_epoch_has_every_record_once(folder: Path):
    records = read_records(folder / "data.jsonl")
    source = RecordSource(records, Decoder(CONFIG, max_frames=4), seed=5)
    assert source.length == 8
    maker = ExampleMaker([source], [1], LAW, seed=5)
    made = [one for step in Feed(maker, lambda step: range(8), range(1)) for one in step]
    assert sorted(one.name for one in made) == sorted(record.name for record in records)
    broken = [one for one in made if isinstance(one, BrokenClip)]
    assert sorted(one.name for one in broken) == [records[2].name, records[4].name]


def test_ratios_are_for_videos_only(maker: ExampleMaker):
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for step in Feed(maker, lambda step: range(60), range(1)):
        for one in step:
            if isinstance(one, Example):
                ratios[one.clip is not None].append(one.prune_ratio)
    assert set(ratios[False]) == {0.0}
    assert len(set(ratios[True])) > 10
    assert 0.1 < np.mean(np.array(ratios[True]) == 0) < 0.5
    assert all(ratio == 0 or 0.2 <= ratio <= 0.8 for ratio in ratios[True])


def test_another_epoch_asks_other_questions():
    questions = tuple(Question("", str(number), "x") for number in range(12))
    records = [Record(None, None, questions, "n")]
    source = RecordSource(records, Decoder(CONFIG, 4, max_questions=3), seed=1)
    asked = [source.example(0, position).questions for position in range(5)]
    assert len(set(asked)) > 2
    assert asked == [source.example(0, position).questions for position in range(5)]
    other = RecordSource(records, Decoder(CONFIG, 4, max_questions=3), seed=2)
    assert asked != [other.example(0, position).questions for position in range(5)]
    with pytest.raises(InputError, match="there are no records"):
        RecordSource([], Decoder(CONFIG, 4), seed=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_they_were_raised(workers: int):
    maker = ExampleMaker([Failing()], [1], LAW, seed=0)
    state = torch.get_rng_state()
    with Feed(maker, lambda step: [2 * step, 2 * step + 1], range(9), workers=workers) as feed:
        assert len(next(feed)) == 2
        with pytest.raises(MissingDependencyError) as caught:
            next(feed)
    assert str(caught.value) == "here: no such thing\n  fix: get one"
    assert caught.value.exit_code == 4
    assert torch.equal(torch.get_rng_state(), state)
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(feed)


def test_steps_may_be_empty_or_without_end():
    maker = ExampleMaker([Numbers()], [1], LAW, seed=0)

    def forever():
        step = 0
        while True:
            yield step
            step += 1

    feed = Feed(maker, lambda step: range(step) if step < 2 else [4], forever())
    first, second, third = (described(next(feed)) for _ in range(3))
    assert first == []
    assert [value[0] for value in second] == ["0"]
    assert [value[0] for value in third] == ["4"]


@pytest.mark.parametrize("numbers", [{"workers": -1}, {"prefetch": 0}])
def test_numbers_out_of_range(numbers: dict[str, int]):
    with pytest.raises(InputError, match="0 or more workers, prefetch 1 or more"):
        Feed(Numbers().example, range, range(1), **numbers)  # type: ignore[arg-type]


def test_the_number_of_broken_clips_has_a_limit(caplog: pytest.LogCaptureFixture):
    limit = BrokenLimit(2)
    with caplog.at_level(logging.INFO):
        for number in (1, 2, 1, 1, 2):
            limit.add(BrokenClip(f"n{number}", f"reason {number}"))
            limit.check()
    assert limit.count == 2
    assert limit.names == ("n1", "n2")
    assert caplog.text.count("skipped n1: reason 1") == 1
    with pytest.raises(InputError, match="3 videos or images cannot be used"):
        limit.check(total=3)
    for number in range(3, 9):
        limit.add(BrokenClip(f"n{number}", f"reason {number}"))
    with pytest.raises(InputError) as caught:
        limit.check()
    text = str(caught.value)
    assert "8 videos or images cannot be used, such as" in text
    assert "allowed: 2" in text
    assert [f"n{number}: reason {number}" in text for number in range(1, 9)] == [True] * 5 + [
        False
    ] * 3
    with pytest.raises(InputError, match="1 video or image cannot be used\n  allowed: none"):
        BrokenLimit(0).check(total=1)


def test_many_records_reach_a_worker_as_one_block():
    records = [
        Record(Path(f"videos/{number}.mp4"), None, (Question("", "q", "a"),), f"n{number}")
        for number in range(2000)
    ]
    source = RecordSource(records, Decoder(CONFIG, 4), seed=0)
    sent = pickle.loads(pickle.dumps(source))
    for index in (0, 1, 777, 1999):
        with pytest.raises(BrokenClip, match=f"n{index}: videos/{index}.mp4: there is no such"):
            sent.example(index, 0)


def _ended(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a program; once more if it hangs, which it did once, on a machine with twice its load."""
    for timeout in (30, 60):
        try:
            return subprocess.run(
                [sys.executable, "-W", "ignore", str(script)],
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                start_new_session=True,  # a process group, as of a terminal
            )
        except subprocess.TimeoutExpired as error:
            hung = error
    raise hung


def test_ctrl_c_reaches_the_main_process_only(tmp_path: Path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing
        import os
        import signal
        import threading
        import time

        from stts_export.training.feed import ExampleMaker, Feed
        from stts_export.training.mixture import RatioLaw
        from tests.training.sources import Numbers

        calls = []

        def positions(step):
            calls.append(step)
            if len(calls) == 2:  # the worker has just been started
                time.sleep(0.3)  # and imports
                os.killpg(0, signal.SIGINT)
                time.sleep(0.3)
                print("started")
            return [2 * step, 2 * step + 1]

        if __name__ == "__main__":
            maker = ExampleMaker([Numbers()], [1], RatioLaw(0, 0.5, 0.5), seed=0)
            # Signals may reach the process through another thread than the main one.
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            try:
                with Feed(maker, positions, range(10**9), workers=1) as feed:
                    for made in feed:
                        pass
            except KeyboardInterrupt:
                print("interrupted", multiprocessing.active_children())
        """),
        encoding="utf-8",
    )
    done = _ended(script)
    assert done.stdout == "started\ninterrupted []\n"
    assert done.stderr == ""
    assert done.returncode == 0
