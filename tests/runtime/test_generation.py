"""Answers by all settings, against PyTorch and transformers' processors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray
from transformers import RepetitionPenaltyLogitsProcessor

from stts_export import Session
from stts_export.build import BuildSpec
from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.cli import main
from stts_export.errors import InputError
from stts_export.inspect import describe, describe_text
from stts_export.model.vlm import SttsModel
from stts_export.runtime import session as session_module
from stts_export.runtime import vision
from stts_export.runtime.logits import Sampling
from stts_export.runtime.prompt import Subtitle
from stts_export.runtime.session import EncodedClip
from stts_export.tolerances import difference
from stts_export.verify import verify
from tests.helpers import GOLDEN, golden_case, prompt_ids, random_frames, random_model

QUESTION = "What colour is the square?"


@pytest.fixture(scope="module")
def asked(speaking: Session) -> EncodedClip:
    return speaking.encode(random_frames(4, (48, 48)), 0.5)


def with_positions(bundle: Path, folder: Path, positions: str) -> Path:
    """A copy whose manifest has other positions."""
    copied = Path(shutil.copytree(bundle, folder))
    manifest = copied / "manifest.json"
    values = {**json.loads(manifest.read_text()), "positions": positions}
    manifest.write_text(json.dumps(values))
    return copied


@pytest.fixture(scope="module")
def gapped_bundle(shared_folder: Path, small_checkpoint: Path) -> Path:
    bundle = shared_folder / "small-gapped"
    with FileLock(str(bundle) + ".lock"):
        if not bundle.exists():
            arguments = [str(small_checkpoint), "-o", str(bundle), "--positions", "gapped"]
            assert main(["build", *arguments]) == 0
    return bundle


@pytest.fixture(scope="module")
def gapped(gapped_bundle: Path) -> Iterator[Session]:
    with Session.open(gapped_bundle, threads=1) as session:
        yield session


def _oracle_logits(
    model: SttsModel, ids: NDArray[np.int64], features: NDArray[Any], positions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits (V,) after a whole sequence, recomputed."""
    sequence = torch.from_numpy(ids)[None]
    with torch.no_grad():
        groups = model.visual_groups(sequence)
        logits = model.language(
            sequence, torch.from_numpy(features), groups, torch.from_numpy(positions)[None]
        )
    last: NDArray[np.float32] = logits[0, -1].numpy()
    return last


def _kept(session: Session, prompt: NDArray[np.int64], clip: EncodedClip) -> NDArray[np.int64]:
    """Indices of the tokens that stay."""
    stays = prompt != session.config.tokens.im_patch
    stays[~stays] = clip.keep.ravel()
    return np.flatnonzero(stays)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_penalty_counts_the_compact_prompt_and_the_answer(session: Session, penalty: float):
    clip, prompt = session.encode(random_frames(4), 0.5), np.array(prompt_ids(session.config, 4))
    answer = session.generate(clip, prompt, 6, sampling=Sampling(repetition_penalty=penalty))
    ids = prompt[_kept(session, prompt, clip)]
    processor, model = RepetitionPenaltyLogitsProcessor(penalty), random_model()
    expected: list[int] = []
    for _ in range(6):
        logits = _oracle_logits(model, ids, clip.features, np.arange(len(ids)))
        scores = processor(torch.from_numpy(ids)[None], torch.from_numpy(logits)[None])
        expected.append(int(scores.argmax()))
        ids = np.append(ids, expected[-1])
    assert answer.token_ids == expected
    assert penalty == 0.5 or len(set(expected)) == len(expected)


def test_a_seed_repeats_an_answer(session: Session):
    clip, prompt = session.encode(random_frames(4), 0.5), prompt_ids(session.config, 4)

    def ids(seed: int | None, **changes: Any) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed, **changes)
        return session.generate(clip, prompt, 8, sampling=sampling).token_ids

    first = ids(7)
    others = {tuple(ids(seed)) for seed in range(5)}
    assert len(others) == 5
    assert ids(7) == first
    assert ids(7, top_p=0.99) != ids(8, top_p=0.99)
    greedy = session.generate(clip, prompt, 8).token_ids
    assert ids(3, top_k=1) == ids(None, top_p=1e-6) == greedy
    assert session.generate(clip, prompt, 8, sampling=Sampling(top_k=9, seed=2)).token_ids == greedy


def test_logprobs_are_those_of_pytorch(session: Session):
    clip, prompt = session.encode(random_frames(3), 0.5), np.array(prompt_ids(session.config, 3))
    sampling = Sampling(1.2, 20, 0.9, 1.1, seed=1)
    answer = session.generate(clip, prompt, 5, sampling=sampling, logprobs=4)
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    ids, model = prompt[_kept(session, prompt, clip)], random_model()
    for entry in answer.logprobs:
        logits = _oracle_logits(model, ids, clip.features, np.arange(len(ids)))
        expected = torch.from_numpy(logits).log_softmax(0).numpy()
        best = np.argsort(-expected)[:4]
        assert [other.token_id for other in entry.top] == best.tolist()
        got = [other.logprob for other in entry.top]
        np.testing.assert_allclose(got, expected[best], atol=1e-4)
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-4)
        assert entry.text is None
        ids = np.append(ids, entry.token_id)
    assert json.loads(json.dumps(asdict(answer), allow_nan=False))["logprobs"][0]["top"]
    assert session.generate(clip, prompt, 1).logprobs is None


def test_logprobs_say_what_the_tokens_are(speaking: Session, asked: EncodedClip):
    answer = speaking.generate(asked, QUESTION, 4, logprobs=2)
    assert answer.logprobs is not None
    assert answer.text == "".join(str(entry.text) for entry in answer.logprobs)
    assert all(entry.top[0].text == entry.text for entry in answer.logprobs)


@pytest.mark.parametrize("logprobs", [-1, 1.0, True, "2", None])
def test_a_wrong_number_of_logprobs(session: Session, logprobs: Any):
    with pytest.raises(InputError, match=r"logprobs is .*\n.*an integer, 0 \(none\) or more"):
        session.generate(random_frames(2), prompt_ids(session.config, 2), 2, logprobs=logprobs)


@pytest.mark.parametrize("sampling", [{"temperature": 1}, 1.0, "greedy", Sampling])
def test_sampling_is_a_type(session: Session, monkeypatch: pytest.MonkeyPatch, sampling: Any):
    monkeypatch.setattr(vision, "encode", None)
    with pytest.raises(InputError, match=r"sampling is .*\n.*stts_export\.Sampling") as error:
        session.generate(random_frames(2), prompt_ids(session.config, 2), 2, sampling=sampling)
    assert error.match("Sampling\\(temperature=")


def test_pieces_make_up_the_answer(speaking: Session, asked: EncodedClip):
    pieces: list[str] = []
    tokens: list[int] = []
    sampling = Sampling(temperature=3.0, seed=2)
    answer = speaking.generate(
        asked, QUESTION, 24, sampling=sampling, on_token=tokens.append, on_text=pieces.append
    )
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1
    assert tokens == answer.token_ids
    silent = speaking.generate(asked, QUESTION, 24, sampling=sampling)
    assert (silent.text, silent.token_ids) == (answer.text, answer.token_ids)


def test_a_stop_string_spread_over_tokens(speaking: Session, asked: EncodedClip):
    sampling = Sampling(temperature=3.0, seed=2)
    whole = speaking.generate(asked, QUESTION, 24, sampling=sampling)
    assert whole.text is not None
    assert whole.logprobs is None
    # Whole characters: a half one changes when its other half comes.
    stop = max(re.findall(r"[^\ufffd]+", whole.text[6:-6]), key=len)[-8:]
    pieces: list[str] = []
    answer = speaking.generate(
        asked, QUESTION, 24, sampling=sampling, stop=["never", stop], on_text=pieces.append
    )
    assert answer.finish_reason == "stop"
    assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    count = len(answer.token_ids)
    assert answer.token_ids == whole.token_ids[:count]
    assert count < 24
    same = speaking.generate(asked, QUESTION, 24, sampling=sampling, stop=stop)
    assert (same.text, same.token_ids) == (answer.text, answer.token_ids)
    prompts = speaking.prompts
    assert prompts is not None
    assert stop in prompts.decode(answer.token_ids)
    assert stop not in prompts.decode(answer.token_ids[:-1])


def test_bad_options_are_refused_before_files_are_read(
    session: Session, speaking: Session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(session_module, "read_video", None)
    file = Path("clip.mp4")
    lines = [Subtitle(0.0, 1.0, "red")]
    for ask in (speaking.generate, speaking.check_prompt):
        with pytest.raises(InputError, match="contains the special token"):
            ask(file, "<im_patch>", 2)
        with pytest.raises(InputError, match="subtitles beside token ids"):
            ask(file, [1, 2], 2, subtitles=lines)
        with pytest.raises(InputError, match="subtitles in a prompt about 2 images and videos"):
            ask([file, file], QUESTION, 2, subtitles=lines)
        with pytest.raises(InputError, match="prune ratio 2"):
            ask(file, QUESTION, 2, prune_ratio=2)
    with pytest.raises(InputError, match="the checkpoint came without a tokenizer"):
        session.generate(file, QUESTION)
    with pytest.raises(InputError, match="65 frames"):
        session.generate(file, [1], max_frames=65)
    speaking.check_prompt([file, random_frames(2, (48, 48))], QUESTION)


def test_text_options_need_a_tokenizer(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision, "encode", None)
    frames, ids = random_frames(2), prompt_ids(session.config, 2)
    assert not session.has_tokenizer
    with pytest.raises(InputError, match="stop needs text, but the checkpoint came without"):
        session.generate(frames, ids, 2, stop="x")
    with pytest.raises(InputError, match="on_text needs text") as error:
        session.generate(frames, ids, 2, on_text=lambda _: None)
    assert error.match("on_token, which gets token ids")
    with pytest.raises(InputError, match="stop needs text"):
        session.check_prompt(frames, ids, 2, stop=["x"])


def test_bad_options_are_refused_before_the_clip_is_encoded(
    speaking: Session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vision, "encode", None)
    assert speaking.has_tokenizer
    frames = random_frames(2, (48, 48))
    for ask in (speaking.generate, speaking.check_prompt):
        with pytest.raises(InputError, match="stop is"):
            ask(frames, QUESTION, 2, stop=["a", ""])
        with pytest.raises(InputError, match="logprobs is -2"):
            ask(frames, QUESTION, 2, logprobs=-2)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_gapped_positions_equal_pytorch(session: Session, gapped: Session, ratio: float):
    prompt, model = np.array(prompt_ids(gapped.config, 6)), random_model()
    clip = gapped.encode(random_frames(6, seed=2), ratio)
    kept = _kept(gapped, prompt, clip)
    _check_steps(gapped, model, clip, prompt, kept)
    got, compact = (each.next_token_logits(clip, prompt) for each in (gapped, session))
    assert (difference(got, compact, "max_rel") > 1e-3) == (ratio > 0)
    with torch.no_grad():
        features = torch.from_numpy(clip.features)
        ids = torch.from_numpy(prompt[kept])
        greedy = model.greedy(ids, features, 5, torch.from_numpy(kept))
    assert gapped.generate(clip, prompt, 5).token_ids == greedy


def _check_steps(
    session: Session,
    model: SttsModel,
    clip: EncodedClip,
    prompt: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> None:
    """Logits of the prefill, and log-probabilities of every step after it."""
    ids = prompt[_kept(session, prompt, clip)]
    logits = _oracle_logits(model, ids, clip.features, positions)
    assert difference(session.next_token_logits(clip, prompt), logits, "max_rel") < 1e-4
    sampling = Sampling(temperature=1.0, seed=4)
    answer = session.generate(clip, prompt, 6, sampling=sampling, logprobs=3)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 6
    for entry in answer.logprobs:
        expected = torch.from_numpy(logits).log_softmax(0)
        for token in (entry, *entry.top):
            assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=2e-4)
        ids, positions = np.append(ids, entry.token_id), np.append(positions, positions[-1] + 1)
        logits = _oracle_logits(model, ids, clip.features, positions)


@pytest.fixture(scope="module")
def golden_model() -> SttsModel:
    return model_from_checkpoint(open_checkpoint(GOLDEN))


@pytest.mark.parametrize("golden_bundle", ["fp32"], indirect=True)
@pytest.mark.parametrize("name", ["video8_cut_prune50", "video16_cut_prune70"])
@pytest.mark.parametrize("positions", ["compact", "gapped"])
def test_golden_clips_with_both_kinds_of_positions(
    golden_bundle: Path, golden_model: SttsModel, tmp_path: Path, name: str, positions: str
):
    case = golden_case(name)
    prompt = case.expected["input_ids_full"].astype(np.int64)
    bundle = with_positions(golden_bundle, tmp_path / "b", positions)
    with Session.open(bundle, threads=1) as session:
        clip = session.encode(case.frames, case.prune_ratio)
        kept = _kept(session, prompt, clip)
        np.testing.assert_array_equal(prompt[kept], case.expected["input_ids_compact"])
        numbered = kept if positions == "gapped" else np.arange(len(kept))
        _check_steps(session, golden_model, clip, prompt, numbered)
        tokens = session.generate(clip, prompt, 8).token_ids
    with torch.no_grad():
        ids, features = torch.from_numpy(prompt[kept]), torch.from_numpy(clip.features)
        greedy = golden_model.greedy(ids, features, 8, torch.from_numpy(numbered))
    assert tokens == greedy
    assert positions == "gapped" or greedy == case.expected["greedy"].tolist()


def test_removed_tokens_count_where_positions_are_gapped(session: Session, gapped: Session):
    prompt = prompt_ids(gapped.config, 4)
    longest = gapped.config.text.max_position_embeddings
    filler = [1] * (longest - len(prompt) - 3)
    frames = random_frames(4)
    for ask in (gapped.check_prompt, gapped.generate):
        with pytest.raises(InputError, match=f"are {longest + 1} positions") as error:
            ask(frames, filler + prompt, 4)
        assert error.match(f"{longest}, the checkpoint's max_position_embeddings")
    gapped.check_prompt(frames, filler + prompt, 3)
    session.check_prompt(frames, filler + prompt, 4)


def test_verify_compares_gapped_bundles_with_gapped_positions(
    gapped_bundle: Path, small_checkpoint: Path
):
    assert verify(gapped_bundle, small_checkpoint).passed


def test_verify_finds_positions_that_are_ignored(
    gapped_bundle: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    from stts_export.runtime import decoder

    real: Callable[..., Any] = decoder.step

    def compact(*arguments: Any) -> Any:
        *others, positions = arguments
        return real(*others, np.arange(len(positions)) + arguments[1].length)

    monkeypatch.setattr(decoder, "step", compact)
    report = verify(gapped_bundle, small_checkpoint)
    failed = {check.name for check in report.checks if not check.passed}
    assert "logits" in failed
    assert failed <= {"logits", "greedy tokens differ"}


def test_positions_that_do_not_exist():
    with pytest.raises(InputError, match="positions 'sparse'") as error:
        BuildSpec(positions="sparse")  # type: ignore[arg-type]
    assert error.match("compact or gapped")


def test_inspect_says_which_positions(small_bundle: Path, gapped_bundle: Path):
    for bundle, positions in ((small_bundle, "compact"), (gapped_bundle, "gapped")):
        description = describe(bundle)
        assert description["positions"] == positions
        assert f"tokens; {positions} positions after pruning" in describe_text(description)
