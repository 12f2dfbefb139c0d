"""A bundle and its checkpoint see and answer alike, and as the model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stts_export import Session
from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.errors import InputError, MissingDependencyError
from stts_export.model.pruning import pack
from stts_export.model.vlm import SttsModel
from stts_export.runtime.planner import n_prune
from stts_export.runtime.prompt import VideoTokens, kept_positions
from stts_export.runtime.video import VideoClip
from stts_export.training.answerers import Answerer, BundleAnswerer, encode, open_answerer
from stts_export.training.checkpoint_answerer import (
    CheckpointAnswerer,
    CheckpointTower,
    open_checkpoint_answerer,
)
from stts_export.training.selectors import SELECTORS, Selection, select_windows
from tests.helpers import picture, random_model, write_video

QUESTIONS = ("Which came first, red or blue?", "What colour is the circle?", "How many?")
RATIO = 0.6


@pytest.fixture(scope="module")
def checkpoint(text_bundle: Path) -> Path:
    return text_bundle.with_name("text_checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SttsModel:
    return model_from_checkpoint(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def torch_one(checkpoint: Path) -> Iterator[Answerer]:
    with open_answerer(checkpoint, threads=1) as answerer:
        yield answerer


@pytest.fixture(scope="module")
def onnx_one(text_bundle: Path) -> Iterator[Answerer]:
    with open_answerer(text_bundle, threads=1) as answerer:
        yield answerer


@pytest.fixture(scope="module")
def clip(torch_one: Answerer, tmp_path_factory: pytest.TempPathFactory) -> VideoClip:
    """Noise, but for its last frames, which repeat each other."""
    file = write_video(tmp_path_factory.mktemp("video") / "x.mp4", 20)
    clip = torch_one.read(file)
    frames = clip.frames.copy()
    frames[-2:] = frames[-3]
    return replace(clip, frames=frames)


def _close(got: NDArray, expected: NDArray) -> bool:
    """Whether two arrays differ by rounding of fp32."""
    difference = np.linalg.norm(np.asarray(got) - np.asarray(expected))
    return got.shape == expected.shape and difference < 1e-5 * np.linalg.norm(expected)


def test_both_read_the_same_frames(torch_one: Answerer, onnx_one: Answerer, tmp_path: Path):
    file = write_video(tmp_path / "x.mp4")
    read = [answerer.read(file) for answerer in (torch_one, onnx_one)]
    assert np.array_equal(read[0].frames, read[1].frames)
    assert np.array_equal(read[0].timestamps, read[1].timestamps)
    assert torch_one.max_frames == onnx_one.max_frames == 8
    assert torch_one.description == {"dtype": "float32", "device": "cpu"}
    assert onnx_one.description == {"precision": "fp32", "backend": "onnxruntime"}


@pytest.mark.parametrize("selector", SELECTORS)
def test_both_keep_and_see_the_same(
    torch_one: Answerer, onnx_one: Answerer, clip: VideoClip, selector: str
):
    ours, theirs = (
        encode(answerer.tower(clip), clip.timestamps, RATIO, selector, np.random.default_rng(0))
        for answerer in (torch_one, onnx_one)
    )
    assert np.array_equal(ours.keep, theirs.keep)
    assert ours.kept_windows == clip.frames.shape[0] * 16 - n_prune(16, len(clip.frames), RATIO)
    assert ours.features.shape == (ours.keep.sum(), 32)
    assert _close(ours.features, theirs.features)


def test_the_tower_gives_what_the_model_gives(
    model: SttsModel, torch_one: Answerer, clip: VideoClip
):
    tower = torch_one.tower(clip)
    assert isinstance(tower, CheckpointTower)
    frames = torch.from_numpy(clip.frames)
    shape, count = tower.shape, n_prune(16, len(clip.frames), RATIO)
    chosen = [
        Selection(np.ones(shape, np.bool_)),
        select_windows("stts", shape, count, scores=tower.scores()),
        select_windows("random", shape, count, rng=np.random.default_rng(2)),
    ]
    with torch.no_grad():
        expected = [
            model.encode(frames, 0.0),
            model.encode(frames, RATIO),
            model.encode(frames, RATIO, keep=torch.from_numpy(chosen[2].keep)),
        ]
    scores = tower.scores()
    assert scores is not None
    assert expected[1].scores is not None
    assert np.allclose(scores, expected[1].scores, atol=1e-6)
    assert np.array_equal(chosen[1].keep, expected[1].keep)
    got = [tower.whole(), tower.survivors(chosen[1]), tower.survivors(chosen[2])]
    for ours, theirs in zip(got, expected, strict=True):
        assert _close(ours, theirs.features.numpy())


def test_without_refill_the_tower_gives_what_the_model_gives_without(
    model: SttsModel, checkpoint: Path, clip: VideoClip
):
    with open_checkpoint_answerer(checkpoint, threads=1, refill=False) as answerer:
        tower = answerer.tower(clip)
    selection = select_windows("stts", tower.shape, 40, scores=tower.scores())
    with torch.no_grad():
        keep = torch.from_numpy(selection.keep)
        frames = torch.from_numpy(clip.frames)
        expected = [model.encode(frames, 0.5, keep=keep, refill=on) for on in (False, True)]
    features = tower.survivors(selection)
    assert _close(features, expected[0].features.numpy())
    assert not _close(features, expected[1].features.numpy())


def test_merging_reaches_the_features(torch_one: Answerer, clip: VideoClip):
    tower = torch_one.tower(clip)
    merged = select_windows("tome", tower.shape, 40, hidden=tower.hidden())
    dropped = Selection(merged.keep)
    assert not _close(tower.survivors(merged), tower.survivors(dropped))


def test_evs_drops_features_of_the_whole_tower(torch_one: Answerer, clip: VideoClip):
    tower = torch_one.tower(clip)
    encoded = encode(tower, clip.timestamps, 0.34, "evs", np.random.default_rng(0))
    assert np.array_equal(encoded.keep.all(axis=1), [True] * 4 + [False] * 2)
    assert not encoded.keep[-2:].any()
    assert np.array_equal(encoded.features, tower.whole()[encoded.keep.ravel()])


@pytest.mark.parametrize("ratio", [0.0, RATIO])
def test_answers_are_the_model_s_most_likely_tokens(
    model: SttsModel, torch_one: Answerer, clip: VideoClip, ratio: float
):
    encoded = encode(torch_one.tower(clip), clip.timestamps, ratio, "stts", np.random.default_rng())
    limits = [6, 5, 4]
    answers = torch_one.answers(encoded, QUESTIONS, limits)
    for question, limit, answer in zip(QUESTIONS, limits, answers, strict=True):
        ids = torch_one.prompts.build(question, [VideoTokens(clip.timestamps, 16)])
        ids = ids[kept_positions(ids, encoded.keep, model.config.tokens.im_patch)]
        features = torch.from_numpy(encoded.features)
        with torch.no_grad():
            expected = model.greedy(torch.from_numpy(ids), features, limit)
        assert not torch_one.prompts.eos_token_ids & set(expected)
        assert answer == torch_one.prompts.decode(expected)


@pytest.mark.parametrize("selector", SELECTORS)
def test_both_answer_alike(torch_one: Answerer, onnx_one: Answerer, clip: VideoClip, selector: str):
    answers = []
    for answerer in (torch_one, onnx_one):
        rng = np.random.default_rng(0)
        encoded = encode(answerer.tower(clip), clip.timestamps, RATIO, selector, rng)
        answers.append(answerer.answers(encoded, QUESTIONS, [6, 6, 6]))
    assert answers[0] == answers[1]


def test_both_see_images_and_answer_without_any(
    torch_one: Answerer, onnx_one: Answerer, clip: VideoClip
):
    photo = replace(clip, frames=picture((70, 50))[None], is_image=True)
    images = [answerer.image(photo) for answerer in (torch_one, onnx_one)]
    assert _close(images[0].features, images[1].features)
    assert images[0].grid == images[1].grid
    for encoded in ([*images], [None, None]):
        ours = torch_one.answers(encoded[0], QUESTIONS, [5, 5, 5])
        assert ours == onnx_one.answers(encoded[1], QUESTIONS, [5, 5, 5])


def test_an_answer_ends_at_the_first_token_that_says_so(
    model: SttsModel, torch_one: Answerer, monkeypatch: pytest.MonkeyPatch
):
    ids = torch.from_numpy(torch_one.prompts.build(QUESTIONS[1]))
    with torch.no_grad():
        expected = model.greedy(ids, torch.zeros(1, 32), 6)
    place = next(n for n in range(1, 6) if expected[n] not in expected[:n])
    whole = torch_one.answers(None, QUESTIONS[:2], [6, 6])
    monkeypatch.setattr(torch_one.prompts, "eos_token_ids", frozenset([expected[place]]))
    cut = torch_one.answers(None, QUESTIONS[:2], [6, 6])
    assert whole[1] == torch_one.prompts.decode(expected)
    assert cut == [whole[0], torch_one.prompts.decode(expected[:place])]


def test_a_prompt_longer_than_the_model_s_positions_is_refused(
    model: SttsModel, torch_one: Answerer
):
    text = replace(model.config.text, max_position_embeddings=20)
    short = SttsModel(replace(model.config, text=text))
    answerer = CheckpointAnswerer(short, torch_one.prompts, 8)
    with pytest.raises(InputError, match="tokens of prompt and answer"):
        answerer.answers(None, ["What colour is the circle? " * 3], [4])


def test_logits_that_are_no_numbers_end_it(model: SttsModel, torch_one: Answerer):
    damaged = SttsModel(model.config)
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.language.lm_head.weight[3, 5] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        CheckpointAnswerer(damaged, torch_one.prompts, 8).answers(None, ["Which?"], [2])


@pytest.mark.parametrize("selector", SELECTORS)
def test_without_scorer_all_but_one_choose(
    checkpoint: Path, torch_one: Answerer, clip: VideoClip, selector: str
):
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    plain = random_model(values, scorer=False)
    tower = CheckpointAnswerer(plain, torch_one.prompts, 8).tower(clip)
    rng = np.random.default_rng(0)
    if selector == "stts":
        with pytest.raises(InputError, match="has no scorer"):
            encode(tower, clip.timestamps, RATIO, selector, rng)
        return
    encoded = encode(tower, clip.timestamps, RATIO, selector, rng)
    assert encoded.kept_windows == encoded.total_windows - n_prune(16, len(clip.frames), RATIO)
    if selector in ("random", "uniform-frames"):
        frames, keep = torch.from_numpy(clip.frames), torch.from_numpy(encoded.keep)
        windows = plain.vision.lower_plain(frames).reshape(-1, 9, 32)
        plan = pack(keep)
        bins = windows[plan.gather_window].flatten(1, 2)
        with torch.no_grad():
            features = plain.vision.upper(bins, plan.segment).flatten(0, 1)[plan.kept_slot]
        assert _close(encoded.features, features.numpy())


def test_a_bundle_without_tokenizer_is_refused(small_bundle: Path):
    with pytest.raises(InputError, match="has no tokenizer"), open_answerer(small_bundle):
        pass


@pytest.mark.parametrize("frames", [0, 9])
def test_frames_beyond_the_bundle_s_limit_are_refused(text_bundle: Path, frames: int):
    with Session.open(text_bundle, threads=1) as session:
        assert BundleAnswerer(session, 3).max_frames == 3
        with pytest.raises(InputError, match=f"max_frames is {frames}"):
            BundleAnswerer(session, frames)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backend": "onnxruntime"}, "backend onnxruntime is for a bundle"),
        ({"plugin": Path("x.so")}, "plugin x.so is for a bundle"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"revision": "main"}, "revision main"),
    ],
)
def test_bad_arguments_of_a_checkpoint(checkpoint: Path, arguments: dict, text: str):
    with pytest.raises(InputError, match=text), open_answerer(checkpoint, **arguments):
        pass


@pytest.mark.parametrize("arguments", [{"revision": "x"}, {"tokenizer": "x"}])
def test_arguments_of_checkpoints_are_refused_for_bundles(text_bundle: Path, arguments: dict):
    with (
        pytest.raises(InputError, match="x is for a checkpoint"),
        open_answerer(text_bundle, **arguments),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(checkpoint: Path):
    with (
        pytest.raises(MissingDependencyError, match="finds no GPU"),
        open_answerer(checkpoint, device="cuda"),
    ):
        pass


def test_threads_are_given_back(checkpoint: Path):
    before = torch.get_num_threads()
    with open_answerer(checkpoint, threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_ratio_below_the_bundle_s_lowest_is_refused(
    text_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    with Session.open(text_bundle, threads=1) as session:
        manifest = session.bundle.manifest
        narrow = replace(manifest, limits=replace(manifest.limits, min_prune_ratio=0.5))
        monkeypatch.setattr(session, "bundle", replace(session.bundle, manifest=narrow))
        answerer = BundleAnswerer(session)
        answerer.check_ratio(0.5)
        with pytest.raises(InputError, match=r"prune ratio 0\.3"):
            answerer.check_ratio(0.3)
