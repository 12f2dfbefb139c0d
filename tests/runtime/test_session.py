"""Sessions: the golden cases from the bundle alone, and what users get wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stts_export
from stts_export import Session
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from stts_export.runtime import planner, vision
from stts_export.runtime import session as session_module
from stts_export.runtime.prompt import PromptBuilder, Subtitle, VideoTokens
from stts_export.tensors import VISION_LOWER, VISION_UPPER
from stts_export.tolerances import TOLERANCES, difference
from tests.helpers import (
    GOLDEN_CASES,
    golden_case,
    prompt_ids,
    random_frames,
    random_model,
    write_video,
)


@pytest.fixture(scope="module")
def golden(golden_bundle: Path) -> Iterator[Session]:
    with Session.open(golden_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model()


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_cases(golden: Session, name: str):
    case = golden_case(name)
    precision = golden.bundle.manifest.precision
    expected_keep = case.expected["keep"].astype(bool)
    clip = golden.encode(case.frames, prune_ratio=case.prune_ratio)
    assert clip.scores is not None
    error = difference(clip.scores, case.expected["scores"], "max")
    assert error <= TOLERANCES["scores", precision].limit
    if precision == "fp32":
        np.testing.assert_array_equal(clip.keep, expected_keep)
    else:
        _check_flips(clip.keep, expected_keep, case.expected["scores"], error)
        clip = golden.encode(case.frames, keep=expected_keep)
    features = TOLERANCES["packed_features", precision]
    assert difference(clip.features, case.expected["features"], features.measure) < features.limit
    answer = golden.generate(clip, case.expected["input_ids_full"], 8)
    assert answer.finish_reason == "length"
    assert answer.text is None
    if precision == "fp32":
        assert answer.token_ids == case.expected["greedy"].tolist()
    logits = golden.next_token_logits(clip, case.expected["input_ids_full"])
    assert logits.argmax() == answer.token_ids[0]
    limit = TOLERANCES["logits", precision]
    assert difference(logits, case.expected["last_logits"][-1], limit.measure) <= limit.limit


def _check_flips(got: Any, expected: Any, scores: Any, error: float) -> None:
    """DESIGN: at most 0.5 % of windows, all within twice the score error of the threshold."""
    flipped = got != expected
    assert flipped.mean() <= 0.005
    raised = scores.copy()
    raised[0] = planner.FIRST_FRAME_SCORE
    threshold = raised[expected].min()
    assert (np.abs(raised[flipped] - threshold) <= 2 * error).all()


def test_chunks_equal_one_run(session: Session, monkeypatch: pytest.MonkeyPatch):
    frames = random_frames(11)
    prompt = prompt_ids(session.config, 11)
    monkeypatch.setattr(vision, "LOWER_CHUNK", 100)
    monkeypatch.setattr(vision, "UPPER_CHUNK", 100)
    whole = session.encode(frames, 0.5)
    monkeypatch.setattr(vision, "LOWER_CHUNK", 2)
    monkeypatch.setattr(vision, "UPPER_CHUNK", 1)
    parts = session.encode(frames, 0.5)
    assert whole.scores is not None
    assert parts.scores is not None
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-6)
    np.testing.assert_array_equal(parts.keep, whole.keep)
    assert difference(parts.features, whole.features, "max_rel") < 1e-5
    assert (
        session.generate(parts, prompt, 4).token_ids == session.generate(whole, prompt, 4).token_ids
    )


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("refill", ["reference", "off"])
def test_features_and_answers_equal_pytorch(
    session: Session, model: SttsModel, ratio: float, refill: vision.Refill
):
    frames = random_frames(6, seed=2)
    clip = session.encode(frames, ratio, refill=refill)
    prompt = np.array(prompt_ids(session.config, 6))
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(frames), ratio, refill=refill == "reference")
        windows = prompt == session.config.tokens.im_patch
        stays = np.ones(len(prompt), bool)
        stays[windows] = clip.keep.ravel()
        greedy = model.greedy(torch.from_numpy(prompt[stays]), expected.features, 5)
    np.testing.assert_array_equal(clip.keep, expected.keep.numpy())
    assert difference(clip.features, expected.features.numpy(), "max_rel") < 1e-4
    assert session.generate(clip, prompt, 5).token_ids == greedy


def test_masked_bins_give_the_features_of_frame_groups(session: Session):
    """The form that every back end takes, against the one that this back end uses."""
    from stts_export.engines.onnxruntime import open_graph

    frames = random_frames(7, seed=4)
    clip = session.encode(frames, 0.5)
    config = session.config.vision
    lower = open_graph(session.bundle.graph(VISION_LOWER), threads=1)
    upper = open_graph(session.bundle.graph(VISION_UPPER), threads=1)
    hidden, _ = vision.run_lower(lower, config, "fp32", frames, plain=False)
    plan = planner.pack(clip.keep)
    windows = hidden.reshape(7 * config.windows, -1)
    bins = windows[plan.gather_window].reshape(len(plan.gather_window), -1, config.hidden_size)
    packed = upper({"bins": bins, "segment": plan.segment})["packed_features"]
    features = packed.reshape(-1, packed.shape[-1])[plan.kept_slot]
    assert difference(clip.features, features, "max_rel") < 1e-5


def test_encode_once_ask_many(session: Session):
    clip = session.encode(random_frames(4), 0.5)
    before = clip.features.copy()
    first = session.generate(clip, prompt_ids(session.config, 4, seed=1), 3)
    session.generate(clip, prompt_ids(session.config, 4, seed=2), 3)
    again = session.generate(clip, prompt_ids(session.config, 4, seed=1), 3)
    assert again.token_ids == first.token_ids
    np.testing.assert_array_equal(clip.features, before)


def test_answer_says_what_was_pruned(session: Session):
    answer = session.generate(random_frames(4), prompt_ids(session.config, 4), 2, prune_ratio=0.5)
    assert (answer.frames, answer.kept_windows, answer.total_windows) == (4, 12, 24)
    assert answer.prune_ratio == 0.5
    assert answer.note is None
    assert set(answer.timings) == {
        "resize", "vision_lower", "select", "vision_upper", "prefill", "decode"
    }  # fmt: skip


def test_frames_of_any_size_are_resized(session: Session):
    from stts_export.runtime.resize import resize_frames

    frames = random_frames(3, (61, 200))
    clip = session.encode(frames, 0.5)
    same = session.encode(resize_frames(frames, (84, 126)), 0.5)
    np.testing.assert_array_equal(clip.features, same.features)


def test_the_trained_ratio_is_the_default(session: Session):
    assert session.encode(random_frames(4)).prune_ratio == 0.5


@pytest.mark.parametrize(
    ("frames", "ratio", "reason"), [(3, 0.0, "ratio is 0"), (1, 0.1, "less than")]
)
def test_when_nothing_is_removed_the_result_says_why(
    session: Session, frames: int, ratio: float, reason: str
):
    clip = session.encode(random_frames(frames), ratio)
    assert clip.keep.all()
    assert clip.note is not None
    assert reason in clip.note


def test_a_token_that_ends_the_answer_stops_it(session: Session):
    clip = session.encode(random_frames(3), 0.5)
    prompt = prompt_ids(session.config, 3)
    full = session.generate(clip, prompt, 6)
    session._eos_ids = frozenset({full.token_ids[2]})
    try:
        seen: list[int] = []
        answer = session.generate(clip, prompt, 6, on_token=seen.append)
    finally:
        session._eos_ids = frozenset()
    first = full.token_ids.index(full.token_ids[2])
    assert answer.token_ids == full.token_ids[:first] == seen
    assert answer.finish_reason == "stop"


QUESTION = "What colour is the square?"


def test_a_question_is_the_sequence_that_the_tokenizer_builds(speaking: Session):
    frames, times = random_frames(4, (48, 48)), [0.0, 0.5, 1.0, 1.3]
    clip = speaking.encode(frames, 0.5, times)
    prompts = PromptBuilder.from_folder(speaking.bundle.folder / "config", speaking.config)
    ids = prompts.build(QUESTION, [VideoTokens(times, 16)])
    answer = speaking.generate(clip, QUESTION, 5)
    assert answer.token_ids == speaking.generate(clip, ids, 5).token_ids
    assert answer.text == prompts.decode(answer.token_ids)
    assert speaking.eos_token_ids == {prompts.tokenizer.token_to_id("<|im_end|>")}
    assert (answer.kept_windows, answer.total_windows) == (32, 64)


def test_turns_of_a_conversation(speaking: Session):
    clip = speaking.encode(random_frames(2, (48, 48)), 0.5)
    turns = [("user", QUESTION), ("assistant", "red"), ("user", "How many squares are there?")]
    assert speaking.generate(clip, turns, 3).text is not None
    same = speaking.next_token_logits(clip, [("user", QUESTION)])
    np.testing.assert_array_equal(same, speaking.next_token_logits(clip, QUESTION))
    assert not np.array_equal(same, speaking.next_token_logits(clip, turns))
    with pytest.raises(InputError, match="roles"):
        speaking.generate(clip, turns[:2], 3)


@pytest.mark.parametrize("kind", [list, dict, tuple], ids=["lists", "dicts", "pairs"])
def test_ways_to_write_turns(speaking: Session, kind: type):
    turns = [("user", QUESTION), ("assistant", "red"), ("user", "How many squares are there?")]
    written: Any = [
        {"role": role, "content": text} if kind is dict else kind((role, text))
        for role, text in turns
    ]
    expected = speaking.next_token_logits([], turns)
    np.testing.assert_array_equal(speaking.next_token_logits([], written), expected)
    np.testing.assert_array_equal(speaking.next_token_logits([], tuple(written)), expected)


@pytest.mark.parametrize(
    "prompt",
    [
        ("user", QUESTION),
        ["user", QUESTION],
        {"role": "user", "content": QUESTION},
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        [{"role": "user", "content": QUESTION, "images": 1}],
        [{"role": "user"}],
        [["user", QUESTION, "more"]],
        [("user", None)],
        [5, ("user", QUESTION)],
    ],
    ids=str,
)
def test_turns_of_a_wrong_kind(speaking: Session, prompt: Any):
    with pytest.raises(InputError, match=r"the conversation has the turn .*\n.*\(role, text\)"):
        speaking.generate([], prompt, 2)


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        (QUESTION + " <im_patch>", 4, "special token"),
        (QUESTION * 500, 4, r"\d+ prompt tokens \(32 of them windows\)"),
        (QUESTION, 10**6, "and 1000000 new ones"),
        (QUESTION, 0, "max_new_tokens is 0"),
    ],
)
def test_a_prompt_is_refused_before_the_clip_is_encoded(
    speaking: Session, monkeypatch: pytest.MonkeyPatch, prompt: str, new: int, text: str
):
    monkeypatch.setattr(vision, "encode", None)
    with pytest.raises(InputError, match=text):
        speaking.generate(random_frames(4, (48, 48)), prompt, new, prune_ratio=0.5)


def test_ids_are_refused_before_the_clip_is_encoded(
    session: Session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vision, "encode", None)
    for prompt, text in ((prompt_ids(session.config, 3), "18 window tokens"), ("x", "tokenizer")):
        with pytest.raises(InputError, match=text):
            session.check_prompt(random_frames(4), prompt)


def test_settings_that_come_too_late_are_refused(session: Session):
    clip, ids = session.encode(random_frames(2), 0.5), prompt_ids(session.config, 2)
    with pytest.raises(InputError, match=r"prune_ratio 0\.3 for a clip that is encoded"):
        session.generate(clip, ids, 2, prune_ratio=0.3)
    with pytest.raises(InputError, match="max_frames 4 for a clip that is sampled"):
        session.generate(clip, ids, 2, max_frames=4)
    with pytest.raises(InputError, match="max_frames 4 for a clip that is sampled"):
        session.generate(random_frames(2), ids, 2, max_frames=4)


def test_settings_that_contradict_each_other_or_are_unknown(session: Session):
    frames = random_frames(2)
    with pytest.raises(InputError, match="together with a keep mask"):
        session.encode(frames, 0.5, keep=np.ones((2, 6), bool))
    with pytest.raises(InputError, match="refill is 'of'") as error:
        session.encode(frames, 0.5, refill="of")  # type: ignore[arg-type]
    assert "reference or off" in str(error.value)


def test_lists_are_taken_as_arrays(session: Session):
    frames, keep = random_frames(3), np.arange(18).reshape(3, 6) % 3 > 0
    clip = session.encode(list(frames), keep=keep.tolist())
    np.testing.assert_array_equal(clip.features, session.encode(frames, keep=keep).features)
    assert clip.kept_windows == 12


def test_the_rate_of_the_bundle_is_sampled_at(session: Session, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(session_module, "read_video", lambda _, **values: asked.update(values))
    _limit(session, monkeypatch, max_fps=0.5)
    session.read_video("clip.mp4", np.int64(9))
    assert (asked["max_fps"], asked["max_frames"]) == (0.5, 9)


@pytest.mark.parametrize("count", [1.5, "8", True, 0])
def test_counts_are_integers(session: Session, count: Any):
    with pytest.raises(InputError, match="max_frames is"):
        session.read_video("clip.mp4", count)
    with pytest.raises(InputError, match="max_new_tokens is"):
        session.generate(random_frames(2), prompt_ids(session.config, 2), count)


def test_what_answers_are_made_of_is_exported(session: Session):
    """Types that users meet in results, to annotate and to tell them apart."""
    clip = session.encode(random_frames(2), 0.5)
    answer = session.generate(clip, prompt_ids(session.config, 2), 1, logprobs=1)
    assert answer.logprobs is not None
    for value in (clip, answer, *answer.visuals, *answer.logprobs):
        assert type(value).__name__ in stts_export.__all__
    assert {"EncodedImage", "Sampling", "Subtitle"} <= set(stts_export.__all__)


def test_a_closed_session_says_so(small_bundle: Path):
    with Session.open(small_bundle, threads=1) as session:
        clip, ids = session.encode(random_frames(2), 0.5), prompt_ids(session.config, 2)
    for use in (
        lambda: session.read_video("clip.mp4"),
        lambda: session.encode(random_frames(2)),
        lambda: session.generate(clip, ids),
        lambda: session.check_prompt(random_frames(2), ids),
        lambda: session.next_token_logits(clip, ids),
    ):
        with pytest.raises(InputError, match="the session is closed"):
            use()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0, float("nan"), "0.5", [0.5]])
def test_ratios_outside_the_range(session: Session, ratio: Any):
    with pytest.raises(InputError, match="prune ratio"):
        session.encode(random_frames(2), ratio)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 84, 126, 3), np.uint8),
        np.zeros((84, 126, 3), np.uint8),
        np.zeros((2, 84, 126, 4), np.uint8),
        np.zeros((2, 84, 126, 3), np.float32),
        np.zeros((2, 0, 126, 3), np.uint8),
        [],
        [np.zeros((84, 126, 3), np.uint8), np.zeros((84, 120, 3), np.uint8)],
        None,
        7,
        torch.zeros((2, 84, 126, 3)),
    ],
    ids=[
        "none", "no time axis", "rgba", "float", "empty side", "empty list", "ragged", "None",
        "number", "float tensor",
    ],
)  # fmt: skip
def test_frames_of_a_wrong_kind(session: Session, frames: Any):
    with pytest.raises(InputError, match=r"uint8|differ in shape"):
        session.encode(frames, 0.5)


def test_tensors_are_taken_through_dlpack(session: Session):
    frames = random_frames(3)
    clip = session.encode(torch.from_numpy(frames), 0.5)
    np.testing.assert_array_equal(clip.features, session.encode(frames, 0.5).features)
    flipped = torch.from_numpy(frames).transpose(1, 2)  # not contiguous
    clip = session.encode(flipped, 0.5)
    expected = session.encode(frames.swapaxes(1, 2).copy(), 0.5)
    np.testing.assert_array_equal(clip.features, expected.features)


class _OnDevice:
    """Says what an array in the memory of a GPU says."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    "frames",
    [
        _OnDevice(__dlpack_device__=lambda: (2, 0), __dlpack__=None),
        _OnDevice(__cuda_array_interface__={"shape": (2, 84, 126, 3)}),
    ],
    ids=["dlpack", "array interface"],
)
def test_frames_on_a_gpu_need_engines(session: Session, frames: Any):
    with pytest.raises(InputError, match="memory of a GPU") as error:
        session.encode(frames, 0.5)
    assert "onnxruntime" in str(error.value)


def test_dlpack_that_cannot_be_read(session: Session):
    def refuse(**_: Any) -> None:
        raise BufferError("not today")

    frames = _OnDevice(__dlpack_device__=lambda: (1, 0), __dlpack__=refuse)
    with pytest.raises(InputError, match="cannot be read through DLPack"):
        session.encode(frames, 0.5)


def test_a_plugin_is_for_tensorrt(small_bundle: Path):
    with pytest.raises(InputError, match="plugins of tensorrt only"):
        Session.open(small_bundle, plugin="libstts_plugins.so")


def test_more_frames_than_the_bundle_allows(session: Session):
    with pytest.raises(InputError, match="65 frames") as error:
        session.encode(random_frames(65), 0.5)
    assert "up to 64" in str(error.value)
    assert "--max-frames 65" in str(error.value)


@pytest.mark.parametrize(
    "times",
    [
        [0.0, 0.5],
        ["0", "1", "2"],
        [0.0, None, 1.0],
        [[0.0], [1.0, 2.0], [3.0]],
        [-0.5, 0.0, 0.5],
        [0.0, 1.0, 0.5],
        [0.0, 1.0, float("inf")],
        "abc",
    ],
)
def test_timestamps_must_fit(session: Session, times: Any):
    with pytest.raises(InputError, match=r"^timestamps: "):
        session.encode(random_frames(3), 0.5, times)


@pytest.mark.parametrize(
    "keep",
    [
        np.ones((2, 6), bool),
        np.zeros((3, 6), bool),
        np.ones((3, 6), np.uint8),
        [[True] * 6] * 2,
        [[True], [True] * 6, []],
        "yes",
    ],
)
def test_a_given_mask_must_fit(session: Session, keep: Any):
    with pytest.raises(InputError, match=r"^keep: "):
        session.encode(random_frames(3), keep=keep)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda ids: ids[1:-9], "window tokens"),
        (lambda ids: [*ids, 640], "640"),
        (lambda ids: [*ids, -1], "-1"),
        (lambda _: [], "not empty"),
        (lambda ids: [ids], "flat sequence"),
        (lambda ids: [ids, ids[:3]], "differ in shape"),
        (lambda ids: [*ids, 10**30], "flat sequence"),
        (lambda _: None, "flat sequence"),
        (lambda _: "What is this?", "without a tokenizer"),
    ],
)
def test_prompts_that_do_not_fit(session: Session, change: Any, text: str):
    clip = session.encode(random_frames(2), 0.5)
    with pytest.raises(InputError, match=text):
        session.generate(clip, change(prompt_ids(session.config, 2)), 2)


def test_a_prompt_too_long_is_counted_in_the_message(session: Session):
    clip = session.encode(random_frames(2), 0.5)
    prompt = [*prompt_ids(session.config, 2), *[1] * 8192]
    # 2 frames of 1 number, 2 marks and 6 windows, half of those removed; 6 words, and the rest.
    counted = r"8210 prompt tokens \(6 of them windows\) and 4 new ones are 8214"
    with pytest.raises(InputError, match=counted) as error:
        session.generate(clip, prompt, 4)
    assert "8192 tokens" in str(error.value)


def test_what_helps_a_prompt_that_is_too_long(session: Session, monkeypatch: pytest.MonkeyPatch):
    frames = random_frames(2)
    prompt = prompt_ids(session.config, 2)  # 24 tokens, 18 after removal
    _limit(session, monkeypatch, max_tokens=20)
    for clip in (frames, session.encode(frames, 0.5)):
        with pytest.raises(InputError) as error:
            session.generate(clip, prompt, 4)
        assert error.value.fix == (
            "raise the prune ratio, sample fewer frames, shorten the prompt, ask for fewer new "
            "tokens, or build with --max-tokens 22"
        )
    with pytest.raises(InputError) as error:
        session.generate([], [1] * 20, 1)
    assert error.value.fix == "shorten the prompt, or build with --max-tokens 21"
    longest = session.config.text.max_position_embeddings
    with pytest.raises(InputError) as error:  # no bundle takes more
        session.generate([], [1] * longest, 1)
    assert error.value.fix == "shorten the prompt"


def test_logits_need_room_for_the_prompt_alone(session: Session, monkeypatch: pytest.MonkeyPatch):
    clip, prompt = session.encode(random_frames(2), 0.5), prompt_ids(session.config, 2)
    expected = session.next_token_logits(clip, prompt)
    _limit(session, monkeypatch, max_tokens=18)
    np.testing.assert_array_equal(session.next_token_logits(clip, prompt), expected)
    _limit(session, monkeypatch, max_tokens=17)
    with pytest.raises(InputError, match=r"18 prompt tokens \(6 of them windows\)\n"):
        session.next_token_logits(clip, prompt)


def test_logits_take_what_answers_take(session: Session, speaking: Session, tmp_path: Path):
    frames, prompt = random_frames(3), prompt_ids(session.config, 3)
    expected = session.next_token_logits(session.encode(frames, 0.25), prompt)
    got = session.next_token_logits(frames, prompt, prune_ratio=0.25)
    np.testing.assert_array_equal(got, expected)
    video = write_video(tmp_path / "clip.mp4")
    lines = [Subtitle(0.0, 1.0, "red")]
    seen = speaking.encode(speaking.read_video(video, 2))
    got = speaking.next_token_logits(video, QUESTION, max_frames=2, subtitles=lines)
    expected = speaking.next_token_logits(seen, QUESTION, subtitles=lines)
    np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(got, speaking.next_token_logits(seen, QUESTION))
    with pytest.raises(InputError, match="got NoneType"):
        session.next_token_logits(None, prompt)


def _limit(session: Session, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
    changed = dataclasses.replace(session.bundle.manifest.limits, **limits)
    manifest = dataclasses.replace(session.bundle.manifest, limits=changed)
    monkeypatch.setattr(session, "bundle", dataclasses.replace(session.bundle, manifest=manifest))


def test_max_new_tokens_must_be_positive(session: Session):
    clip = session.encode(random_frames(2), 0.5)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        session.generate(clip, prompt_ids(session.config, 2), 0)


def test_a_back_end_the_bundle_was_not_built_for(small_bundle: Path):
    with pytest.raises(InputError, match="tensorrt"):
        Session.open(small_bundle, backend="tensorrt")


def test_the_lowest_ratio_of_a_bundle_is_enforced(
    session: Session, monkeypatch: pytest.MonkeyPatch
):
    _limit(session, monkeypatch, min_prune_ratio=0.4)
    with pytest.raises(InputError, match="min_prune_ratio"):
        session.encode(random_frames(4), 0.3)
    assert session.encode(random_frames(4), 0.4).kept_windows < 24
