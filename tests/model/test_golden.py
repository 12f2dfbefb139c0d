"""The PyTorch model against numbers that the reference implementation computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.model.vlm import EncodedClip, SttsModel
from tests.helpers import GOLDEN, GOLDEN_CASES, GoldenCase, golden_case


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return model_from_checkpoint(open_checkpoint(GOLDEN))


@pytest.fixture(params=GOLDEN_CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return golden_case(request.param)


@pytest.fixture
def encoded(model: SttsModel, case: GoldenCase) -> EncodedClip:
    with torch.no_grad():
        return model.encode(torch.from_numpy(case.frames), case.prune_ratio)


def test_there_are_cases_with_ties_and_single_frames():
    assert len(GOLDEN_CASES) == 8
    assert "video1_still_prune50" in GOLDEN_CASES


def test_selection(case: GoldenCase, encoded: EncodedClip):
    assert encoded.scores is not None
    np.testing.assert_allclose(encoded.scores.numpy(), case.expected["scores"], atol=1e-5)
    np.testing.assert_array_equal(encoded.keep.numpy(), case.expected["keep"].astype(bool))


def test_packing(case: GoldenCase, encoded: EncodedClip):
    assert encoded.plan is not None
    empty = int((case.expected["keep"].sum(axis=1) == 0).sum())
    # The reference refills a single dead frame into an extra bin, for nothing.
    dead_bin = 1 if empty == 1 else 0
    assert len(encoded.plan.gather_window) == case.expected["bins"][0] - dead_bin
    alive = case.expected["keep"].any(axis=1)
    np.testing.assert_array_equal(
        encoded.plan.refilled.numpy(), case.expected["refilled"].astype(bool) & alive
    )


def test_features(case: GoldenCase, encoded: EncodedClip):
    expected = case.expected["features"]
    off = np.abs(encoded.features.numpy() - expected).max() / np.abs(expected).max()
    assert off < 1e-4


def test_block_after_bias(model: SttsModel, case: GoldenCase, encoded: EncodedClip):
    if "block_after_bias" not in case.expected:
        assert len(case.frames) > 8
        return
    order = model.vision.embedding.window_major.numpy()
    expected = case.expected["block_after_bias"].astype(np.float32)[:, order]
    np.testing.assert_allclose(encoded.hidden.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_answers(model: SttsModel, case: GoldenCase, encoded: EncodedClip):
    ids = torch.from_numpy(case.expected["input_ids_compact"]).long()
    with torch.no_grad():
        logits = model.language(ids[None], encoded.features, model.visual_groups(ids[None]))
        greedy = model.greedy(ids, encoded.features, 8)
    np.testing.assert_allclose(logits[0, -12:].numpy(), case.expected["last_logits"], atol=1e-3)
    assert greedy == case.expected["greedy"].tolist()


def test_ratio_zero_is_the_plain_model(model: SttsModel):
    frames = torch.from_numpy(np.load(GOLDEN / "unpruned_video2.frames.npz")["frames"])
    expected = load_file(GOLDEN / "unpruned_video2.outputs.safetensors")
    ids = expected["input_ids"].long().reshape(1, -1)
    with torch.no_grad():
        features = model.encode(frames, 0.0).features
        logits = model.language(ids, features, model.visual_groups(ids))[0, -3:]
    torch.testing.assert_close(logits, expected["logits_last"], atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_ratio_zero_equals_transformers(model: SttsModel):
    from transformers import Molmo2ForConditionalGeneration

    theirs = Molmo2ForConditionalGeneration.from_pretrained(GOLDEN, dtype=torch.float32).eval()
    frames = np.load(GOLDEN / "unpruned_video2.frames.npz")["frames"]
    count = len(frames)
    ids = load_file(GOLDEN / "unpruned_video2.outputs.safetensors")["input_ids"].long()
    ids = ids.reshape(1, -1)
    groups = model.visual_groups(ids)
    pixels = frames.astype(np.float32) / 255 * 2 - 1
    patches = pixels.reshape(count, 27, 14, 27, 14, 3).swapaxes(2, 3).reshape(count, 729, 588)
    windows = np.arange(729).reshape(9, 3, 9, 3).swapaxes(1, 2).reshape(81, 9)
    pooling = np.concatenate([windows + 729 * frame for frame in range(count)])
    with torch.no_grad():
        expected = theirs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(groups == 0).long(),
            pixel_values_videos=torch.from_numpy(patches),
            video_token_pooling=torch.from_numpy(pooling),
            video_grids=torch.tensor([[count, 9, 9]]),
        ).logits
        features = model.encode(torch.from_numpy(frames), 0.0).features
        logits = model.language(ids, features, groups)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
