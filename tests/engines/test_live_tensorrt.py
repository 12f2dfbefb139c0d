"""Streams on engines: the same answers as on ONNX Runtime; stand-ins run the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.engines.cuda import Memory, Stream
from stts_export.errors import InputError
from stts_export.live.events import LiveAnswer
from tests.engines.test_cuda import Foreign
from tests.helpers import random_frames

QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def source(text_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "bundle"
    checkpoint = text_bundle.parent / "text_checkpoint"
    return bundle_from_checkpoint(checkpoint, folder, BuildSpec(max_frames=8, max_tokens=400))


def _answers(session: Session, frames: Any, **settings: Any) -> list[LiveAnswer]:
    if settings.get("mode") == "incremental":
        settings["segment"] = "1s"
    with session.stream(
        prompt=QUESTION, every="1s", window="3s", policy="wait", max_new_tokens=3, **settings
    ) as live:
        for number, frame in enumerate(frames):
            assert live.push(frame, number / 2, timeout=60)
        live.finish()
        return [event for event in live if isinstance(event, LiveAnswer)]


@pytest.mark.parametrize("mode", ["exact", "incremental"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_answers_equal_those_of_onnx_runtime(
    session: Session, reference: Session, mode: str, ratio: float
):
    frames = random_frames(15, (48, 48), seed=4)
    got = _answers(session, frames, mode=mode, prune_ratio=ratio)
    expected = _answers(reference, frames, mode=mode, prune_ratio=ratio)
    assert len(got) == len(expected) == 7
    for here, there in zip(got, expected, strict=True):
        np.testing.assert_array_equal(here.keep, there.keep)
        assert (here.token_ids, here.start, here.end) == (there.token_ids, there.start, there.end)


def test_frames_in_the_memory_of_the_gpu(session: Session, reference: Session):
    frames = random_frames(9, (48, 48), seed=5)
    theirs = Memory(Stream())
    arrays = theirs.empty(frames.shape, np.uint8)
    arrays.copy_from_host(frames)
    given = [Foreign(arrays[n : n + 1].reshape(48, 48, 3)) for n in range(len(frames))]
    got = _answers(session, given)
    expected = _answers(reference, frames)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    with session.stream(prompt=QUESTION) as live:
        wrong = Foreign(theirs.zeros((50, 48, 3), np.uint8))
        with pytest.raises(InputError, match="frames of 50 x 48 pixels in the memory of the GPU"):
            live.push(wrong, 0.0)
        live.finish()
    with reference.stream(prompt=QUESTION) as live:
        with pytest.raises(InputError, match="the frames lie in the memory of a GPU"):
            live.push(given[0], 0.0)
        live.finish()
    theirs.close()


def test_two_streams_share_the_engines(session: Session):
    settings: dict[str, Any] = {"prompt": QUESTION, "every": "1s", "window": "3s", "policy": "wait"}
    frames = random_frames(9, (48, 48), seed=6)
    alone = {mode: _answers(session, frames, mode=mode) for mode in ("exact", "incremental")}
    settings |= {"max_new_tokens": 3}
    with (
        session.stream(mode="exact", **settings) as one,
        session.stream(mode="incremental", segment="1s", **settings) as two,
    ):
        assert (one.name, two.name) == ("pushed", "pushed (2)")
        for number, frame in enumerate(frames):
            assert one.push(frame, number / 2, timeout=60)
            assert two.push(frame, number / 2, timeout=60)
        one.finish()
        two.finish()
        for live in (one, two):
            answers = [event for event in live if isinstance(event, LiveAnswer)]
            expected = alone[live.settings.mode]
            assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
