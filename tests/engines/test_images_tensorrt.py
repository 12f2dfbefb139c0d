"""Images on engines: the same features and answers as ONNX Runtime's; stand-ins run the engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.errors import InputError
from stts_export.repro import Call, Recorder
from stts_export.runtime import vision
from stts_export.tolerances import difference
from tests.engines.machines import Machine
from tests.helpers import image_ids, picture, random_checkpoint, random_frames
from tests.model.test_images import square_config

MAX_FRAMES = 3
"""Fewer than an image has crops: engines take no more at once."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("square")
    checkpoint = random_checkpoint(folder / "checkpoint", square_config(15))
    spec = BuildSpec(max_frames=MAX_FRAMES, max_tokens=800)
    return bundle_from_checkpoint(checkpoint, folder / "bundle", spec)


@pytest.mark.parametrize("size", [(400, 700), (37, 300), (1, 1)])
def test_images_equal_those_of_onnx_runtime(
    session: Session, reference: Session, size: tuple[int, int]
):
    image = picture(size)
    got, expected = session.encode_image(image), reference.encode_image(image)
    assert (got.grid, got.crops) == (expected.grid, expected.crops)
    assert got.features.dtype == expected.features.dtype
    assert difference(got.features, expected.features, "max_rel") < 1e-5


def test_answers_about_an_image_and_a_video(session: Session, reference: Session):
    image, frames = picture((130, 100)), random_frames(2, (210, 210))
    seen = [(s.encode_image(image), s.encode(frames, 0.5)) for s in (session, reference)]
    tokens = session.config.tokens
    windows = [tokens.im_patch] * session.config.vision.windows
    ids = image_ids(session.config, [seen[0][0].grid]).tolist() + 2 * [
        9, tokens.frame_start, *windows, tokens.frame_end
    ]  # fmt: skip
    got, expected = (
        s.next_token_logits(list(visuals), ids)
        for s, visuals in zip((session, reference), seen, strict=True)
    )
    assert difference(got, expected, "max_rel") < 1e-5
    answers = [
        s.generate(list(visuals), ids, 4).token_ids
        for s, visuals in zip((session, reference), seen, strict=True)
    ]
    assert answers[0] == answers[1]


def test_patches_stay_on_the_device(session: Session, machine: Machine):
    image = picture((400, 700))
    crops = session.encode_image(image).crops
    before = len(machine.cuda.called("cudaMemcpyAsync"))
    features = session.encode_image(image).features
    copies = machine.cuda.called("cudaMemcpyAsync")[before:]
    to_host = sum(copy["count"] for copy in copies if int(copy["kind"]) == 2)
    assert crops > 1
    assert to_host == features.nbytes


def test_nothing_is_allocated_for_the_second_image(session: Session, machine: Machine):
    for _ in range(3):
        session.encode_image(picture((300, 200)))
    counts = [len(machine.cuda.called(name)) for name in ("cudaMalloc", "cudaMallocHost")]
    session.encode_image(picture((300, 200)))
    assert counts == [len(machine.cuda.called(name)) for name in ("cudaMalloc", "cudaMallocHost")]


def test_calls_hold_no_more_than_engines_take(session: Session, monkeypatch: pytest.MonkeyPatch):
    calls: list[Call] = []
    session.runners = {n: Recorder(n, r, calls) for n, r in session.runners.items()}
    monkeypatch.setattr(vision, "CONNECTOR_CHUNK", 50)
    whole = session.encode_image(picture((400, 700)))
    frames = [len(call.inputs["frames"]) for call in calls if call.graph == "vision_lower"]
    assert max(frames) == MAX_FRAMES
    assert sum(frames) == whole.crops
    tokens = [len(c.inputs["pooled_patches"]) for c in calls if c.graph == "connector"]
    assert sum(tokens) == len(whole.features)
    assert max(tokens) == 50


def test_more_crops_than_the_engine_takes(session: Session):
    connector = session.runners["connector"]
    patches, width = 225, 2 * session.config.vision.hidden_size
    with pytest.raises(InputError, match="patches has shape"):
        connector(
            {
                "patches": np.zeros((65 * patches, width), np.float32),
                "pooled_patches": np.zeros((1, 4), np.int32),
            }
        )
