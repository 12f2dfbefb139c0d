"""The cache of a stream that goes on, compared with PyTorch on the same tokens.

The oracle keeps unlimited positions and never moves a key: what it says must not depend on that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stts_export import Session
from stts_export.bundle import Bundle
from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.live.segments import SegmentCache, longest_sequence, rotated
from stts_export.model.language import Decoder, attention_mask, rotate_half
from stts_export.runtime.decoder import Continuation
from stts_export.runtime.prompt import VideoTokens, kept_positions, visual_groups
from stts_export.tensors import DECODER

QUESTION = "Which direction does the circle move?"
NEW_TOKENS = 3


class Oracle:
    """Segments and questions through PyTorch's decoder; keys and values in plain lists."""

    def __init__(self, decoder: Decoder, bos_id: int) -> None:
        self.decoder = decoder
        self.bos_id = bos_id
        self.parts: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        """First position and (key, value) per layer of each segment."""
        self.next = 1

    def feed(self, ids: NDArray[np.int64], positions: NDArray[np.int64], features: Any) -> Tensor:
        """Run tokens after BOS and all parts; returns logits (V,), and adds nothing."""
        first = self.parts[0][0] if self.parts else int(positions[0])
        kept = [self._alone(first - 1), *(part for _, part in self.parts)]
        self.added: list[tuple[Tensor, Tensor]] = []

        def write(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            self.added.append((key, value))
            pairs = [*(part[layer] for part in kept), (key, value)]
            return torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)

        earlier = sum(part[0][0].shape[2] for part in kept)
        place = torch.arange(earlier + len(ids))[None]
        own = torch.from_numpy(visual_groups(ids, self.decoder.config.tokens.visual))
        group = torch.cat([torch.full((earlier,), -1), own])[None]
        mask = attention_mask(place[:, earlier:], own[None], place, group, True)
        x = self.decoder.embed(torch.from_numpy(ids)[None], torch.from_numpy(features))
        at = torch.from_numpy(positions)[None]
        out = self.decoder.transform(x, at, mask, write, rotate_half)
        return self.decoder.lm_head(out[:, -1])[0]

    def append(self, ids: NDArray[np.int64], places: NDArray[np.int64], features: Any) -> None:
        self.feed(ids, self.next + places, features)
        self.parts.append((self.next, self.added))

    def answer(self, ids: NDArray[np.int64], tokens: int) -> tuple[list[int], float]:
        """Token ids, and the log-probability of the last."""
        new: list[int] = []
        none = np.zeros((1, self.decoder.config.text.hidden_size), np.float32)
        for _ in range(tokens):
            sequence = np.array([*ids, *new])
            logits = self.feed(sequence, self.next + np.arange(len(sequence)), none)
            new.append(int(logits.argmax()))
        return new, float(logits.log_softmax(0).max())

    def _alone(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of BOS, which sees only itself, at any position."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def write(_: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            pairs.append((key, value))
            return key, value

        x = self.decoder.lookup(torch.tensor([[self.bos_id]]))
        ones = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self.decoder.transform(x, torch.tensor([[position]]), ones, write, rotate_half)
        return pairs


@pytest.fixture(scope="module")
def session(text_bundle: Path) -> Iterator[Session]:
    with Session.open(text_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def decoder(text_bundle: Path) -> Decoder:
    checkpoint = open_checkpoint(text_bundle.parent / "text_checkpoint")
    return model_from_checkpoint(checkpoint).language


def _changed(bundle: Bundle, positions: str, limit: int) -> Bundle:
    text = dataclasses.replace(bundle.config.text, max_position_embeddings=limit)
    config = dataclasses.replace(bundle.config, text=text)
    manifest = dataclasses.replace(bundle.manifest, positions=positions)  # type: ignore[arg-type]
    return dataclasses.replace(bundle, config=config, manifest=manifest)


def _segment(session: Session, number: int, frames: int) -> tuple[Any, Any, Any]:
    """Times, keep and features of a made-up segment; the first frame whole."""
    rng = np.random.default_rng(number)
    windows, width = session.config.vision.windows, session.config.text.hidden_size
    keep = rng.random((frames, windows)) < 0.5
    keep[0] = True
    features = rng.normal(size=(int(keep.sum()), width)).astype(np.float32)
    return 2.0 * number + np.arange(frames) / 2, keep, features


@pytest.mark.parametrize("positions", ["compact", "gapped"])
@pytest.mark.parametrize("limit", [100_000, 420])
@torch.no_grad()
def test_answers_equal_pytorchs_while_segments_come_and_go(
    session: Session, decoder: Decoder, positions: str, limit: int
):
    """With 420 positions, keys are rotated back several times; the oracle's never are."""
    prompts = session.prompts
    assert prompts is not None
    question = prompts.conversation_part(QUESTION)
    cache = SegmentCache(
        session.runners[DECODER],
        _changed(session.bundle, positions, limit),
        prompts,
        capacity=300,
        reserve=len(question) + NEW_TOKENS,
    )
    oracle = Oracle(decoder, prompts.bos_id)
    highest = 0
    for number in range(14):
        times, keep, features = _segment(session, number, 2 + number % 2)
        ids = prompts.video_part(VideoTokens(times, keep.shape[1]), follows=bool(oracle.parts))
        kept = kept_positions(ids, keep, session.config.tokens.im_patch)
        oracle.append(ids[kept], kept if positions == "gapped" else np.arange(len(kept)), features)
        oracle.next += len(ids) if positions == "gapped" else len(kept)
        cache.append(times, keep, features)
        if number >= 4:
            cache.drop_before(float(cache.segments[0].times[0]))
            oracle.parts.pop(0)
        assert len(cache.segments) == len(oracle.parts)
        highest = max(highest, cache.segments[-1].position)
        assert highest <= limit
        cache.append(*_segment(session, 100 + number, 3))  # comes and goes without a trace
        cache.take_back()
        got = _ask(cache, question)
        tokens, logprob = oracle.answer(question, NEW_TOKENS)
        assert got.token_ids == tokens
        assert got.logprobs is not None
        assert got.logprobs[-1].logprob == pytest.approx(logprob, abs=2e-4)
    assert oracle.next > 420


def _ask(cache: SegmentCache, question: NDArray[np.int64]) -> Continuation:
    before = cache.cache.length
    out = cache.ask(question, max_new_tokens=NEW_TOKENS, eos_ids=(), logprobs=1)
    assert cache.cache.length == before
    return out


def test_one_segment_is_what_generate_answers(session: Session):
    prompts = session.prompts
    assert prompts is not None
    times, keep, features = _segment(session, 0, 4)
    cache = SegmentCache(
        session.runners[DECODER], session.bundle, prompts, capacity=200, reserve=40
    )
    cache.append(times, keep, features)
    frames = np.zeros((4, 48, 48, 3), np.uint8)
    clip = dataclasses.replace(session.encode(frames, keep=keep), features=features)
    expected = session.generate(clip, QUESTION, NEW_TOKENS)
    out = _ask(cache, prompts.conversation_part(QUESTION))
    assert out.token_ids[: len(expected.token_ids)] == expected.token_ids


def test_pieces_make_up_the_prompt_of_the_whole(session: Session):
    prompts = session.prompts
    assert prompts is not None
    windows, times = session.config.vision.windows, np.arange(6) / 2
    whole = prompts.build(QUESTION, [VideoTokens(times, windows)])
    parts = [
        prompts.video_part(VideoTokens(times[:2], windows), follows=False),
        prompts.video_part(VideoTokens(times[2:3], windows), follows=True),
        prompts.video_part(VideoTokens(times[3:], windows), follows=True),
        prompts.conversation_part(QUESTION),
    ]
    np.testing.assert_array_equal(whole, np.concatenate([[prompts.bos_id], *parts]))


def test_rotation_is_the_models(decoder: Decoder):
    torch.manual_seed(0)
    text = decoder.config.text
    raw = torch.randn(1, 3, 5, text.head_dim)
    here = rotate_half(raw, *decoder.rotary(torch.arange(40, 45)[None]))
    there = rotate_half(raw, *decoder.rotary(torch.arange(2000, 2005)[None]))
    moved = rotated(here[0].numpy(), 1960, text.rope_theta)
    np.testing.assert_allclose(moved, there[0].numpy(), atol=2e-4)  # angles of 2000 in fp32
    back = rotated(moved, -1960, text.rope_theta)
    np.testing.assert_allclose(back, here[0].numpy(), atol=2e-6)


def test_the_longest_sequence_counts_what_is_fed(session: Session):
    prompts = session.prompts
    assert prompts is not None
    windows = session.config.vision.windows
    fed = 1
    for number in range(3):
        times, keep, _ = _segment(session, number, 3)
        ids = prompts.video_part(VideoTokens(times, windows), follows=number > 0)
        fed += len(kept_positions(ids, keep, session.config.tokens.im_patch))
        bound = longest_sequence(prompts, 3, windows, -(-int(keep.sum()) // 3))
        assert len(kept_positions(ids, keep, session.config.tokens.im_patch)) <= bound - 1
    assert fed <= longest_sequence(prompts, 9, windows, windows)
