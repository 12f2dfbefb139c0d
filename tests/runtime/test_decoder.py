"""The decoding loop on a decoder that says what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from stts_export.model.vlm import SttsModel
from stts_export.runtime.answer_text import AnswerText
from stts_export.runtime.decoder import Continuation, KVCache, NotFiniteError, generate
from stts_export.runtime.logits import Sampling
from tests.helpers import random_model

VOCABULARY = 6


class _Scripted:
    """A decoder whose most likely tokens are given; keeps what it was asked."""

    updates_in_place = True
    cache_capacity: int | None = None

    def __init__(self, tokens: Sequence[int]) -> None:
        self.logits = [np.eye(VOCABULARY, dtype=np.float32)[token] for token in tokens]
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, inputs: dict[str, Any], in_place: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        self.calls.append(inputs)
        return {"logits": self.logits[len(self.calls) - 1][None]}

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    @staticmethod
    def to_host(array: Any) -> Any:
        return array

    @staticmethod
    def copy(target: Any, source: Any) -> None:
        target[...] = source

    def fed(self, name: str) -> list[Any]:
        return [call[name].tolist() for call in self.calls]


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model()


def _generate(model: SttsModel, runner: _Scripted, **changes: Any) -> Continuation:
    settings = {"max_new_tokens": 4, "eos_ids": {5}, **changes}
    ids = np.array([9, 8, 7])
    groups = np.full(3, -1, np.int32)
    features = np.zeros((1, model.config.text.hidden_size), np.float32)
    cache = KVCache(runner, model.config, "fp32", len(ids) + settings["max_new_tokens"])
    return generate(runner, cache, ids, groups, features, **settings)


def test_each_token_is_fed_at_the_next_position(model: SttsModel):
    runner = _Scripted([1, 2, 3, 4])
    seen: list[int] = []
    out = _generate(model, runner, on_token=seen.append)
    assert (out.token_ids, out.finish_reason, out.logprobs) == ([1, 2, 3, 4], "length", None)
    assert seen == out.token_ids
    assert runner.fed("input_ids") == [[[9, 8, 7]], [[1]], [[2]], [[3]]]
    assert runner.fed("position_ids") == [[[0, 1, 2]], [[3]], [[4]], [[5]]]
    assert runner.fed("cache_position") == [[0], [3], [4], [5]]


def test_gapped_positions_go_on_after_the_last(model: SttsModel):
    runner = _Scripted([1, 2, 5])
    out = _generate(model, runner, positions=np.array([0, 4, 11]))
    assert out.finish_reason == "stop"
    assert runner.fed("position_ids") == [[[0, 4, 11]], [[12]], [[13]]]
    assert runner.fed("cache_position") == [[0], [3], [4]]
    assert all(call["position_ids"].dtype == np.int64 for call in runner.calls)


@pytest.mark.parametrize("tokens", [[5], [1, 2, 5]])
def test_the_end_is_no_part_of_the_answer(model: SttsModel, tokens: list[int]):
    out = _generate(model, _Scripted(tokens), logprobs=1)
    assert out.token_ids == tokens[:-1]
    assert out.finish_reason == "stop"
    assert out.logprobs is not None
    assert [entry.token_id for entry in out.logprobs] == out.token_ids


def _letters(ids: Sequence[int]) -> str:
    return "".join("abcdef"[token] for token in ids)


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(model: SttsModel):
    runner, pieces = _Scripted([0, 1, 2, 3]), list[str]()
    text = AnswerText(_letters, ["bc"], pieces.append)
    out = _generate(model, runner, text=text, logprobs=2)
    assert (out.token_ids, out.finish_reason) == ([0, 1, 2], "stop")
    assert (text.text, pieces) == ("a", ["a"])
    assert len(runner.calls) == 3
    assert out.logprobs is not None
    assert len(out.logprobs) == 3


def test_a_stop_string_at_the_limit_is_a_stop(model: SttsModel):
    text = AnswerText(_letters, ["bc"])
    out = _generate(model, _Scripted([0, 1, 2]), text=text, max_new_tokens=3)
    assert (out.finish_reason, text.text) == ("stop", "a")
    text = AnswerText(_letters, ["bcd"])
    out = _generate(model, _Scripted([0, 1, 2]), text=text, max_new_tokens=3)
    assert (out.finish_reason, text.text) == ("length", "abc")


def test_the_text_is_whole_when_the_model_ends_the_answer(model: SttsModel):
    pieces: list[str] = []
    text = AnswerText(_letters, ["bd"], pieces.append)
    out = _generate(model, _Scripted([0, 1, 5]), text=text)
    assert (out.finish_reason, text.text, pieces) == ("stop", "ab", ["a", "b"])


def test_logprobs_are_of_the_raw_logits(model: SttsModel):
    runner = _Scripted([1, 2, 3, 4])
    sampling = Sampling(2.0, 2, 0.9, 1.3, seed=1)
    out = _generate(model, runner, logprobs=3, sampling=sampling, eos_ids=())
    assert out.logprobs is not None
    for logits, token, entry in zip(runner.logits, out.token_ids, out.logprobs, strict=True):
        expected = torch.from_numpy(logits).log_softmax(0)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-6)
        assert entry.top[0].token_id == int(expected.argmax())
        assert len(entry.top) == 3


def test_logits_that_are_not_finite_are_an_error_whatever_the_sampling(model: SttsModel):
    runner = _Scripted([1, 2])
    runner.logits[1][0] = np.nan
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        _generate(model, runner, sampling=Sampling(1.0, seed=0))
