"""Choosing tokens: transformers' own processors as the reference, and properties."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stts_export.errors import InputError
from stts_export.runtime.logits import (
    Candidate,
    Sampling,
    TokenChooser,
    draw,
    log_probabilities,
    narrow,
    penalise,
)

LARGEST = float(np.finfo(np.float32).max)

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=0.2, top_k=20, top_p=0.5, repetition_penalty=1.2),
    Sampling(temperature=2.0, top_p=0.01, repetition_penalty=0.8),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=10**6, top_p=1e-9),
    Sampling(temperature=0.01, top_k=3, repetition_penalty=5.0),
]


def _cases() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    random = rng.standard_normal(500) * 4
    cases = {
        "random": random,
        "peaked": random * 20,
        "flat": random * 1e-3,
        "ties": np.round(random),
        "many ties": rng.integers(0, 3, 500),
        "all equal": np.zeros(500),
        "two tokens": random[:2],
        "one token": random[:1],
        "extreme": np.r_[random, 3e4, -3e4, 1e30, -1e30],
    }
    return {name: values.astype(np.float32) for name, values in cases.items()}


CASES = _cases()


def _theirs(
    sampling: Sampling, ids: list[int], logits: NDArray[Any], dtype: torch.dtype = torch.float64
) -> NDArray[Any]:
    """Scores after transformers' processors, in the order in which `generate` has them."""
    processors: list[Any] = []
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    scores = torch.from_numpy(logits).to(dtype)[None]
    scores = LogitsProcessorList(processors)(torch.tensor([ids], dtype=torch.long), scores)
    return scores[0].numpy()


def _ours(sampling: Sampling, ids: list[int], logits: NDArray[Any]) -> NDArray[np.float64]:
    return narrow(
        penalise(logits.astype(np.float64), sorted(set(ids)), sampling.repetition_penalty), sampling
    )


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_transformers(sampling: Sampling, name: str):
    logits = CASES[name]
    ids = [0, 1, 1, 7, 7, 7, 250, 499, 10**6, *range(30, 60)]
    ours, theirs = _ours(sampling, ids, logits), _theirs(sampling, ids, logits)
    theirs = theirs - theirs.max()
    assert np.isfinite(ours).any()
    if "ties" in name or name == "all equal":  # theirs keeps any of those that are equal
        ours, theirs = np.sort(ours), np.sort(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
@pytest.mark.parametrize("name", ["random", "peaked", "ties"])
def test_single_precision_of_transformers_keeps_the_same_tokens(sampling: Sampling, name: str):
    logits, ids = CASES[name], [3, 4, 4]
    ours, theirs = _ours(sampling, ids, logits), _theirs(sampling, ids, logits, torch.float32)
    assert np.isfinite(ours).sum() == np.isfinite(theirs).sum()
    assert name == "ties" or (np.isfinite(ours) == np.isfinite(theirs)).all()


def test_of_equal_tokens_the_first_stay():
    logits = np.array([1.0, 2.0, 1.0, 2.0, 1.0])
    kept = np.isfinite(narrow(logits, Sampling(1.0, top_p=0.7)))
    assert kept.tolist() == [True, True, False, True, False]
    assert (
        np.isfinite(narrow(logits, Sampling(1.0, top_p=1e-9))).tolist()
        == [False, True] + [False] * 3
    )


def test_transformers_applies_its_processors_in_this_order():
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=5, top_p=0.9, repetition_penalty=1.1
    )

    class Model(GenerationMixin):  # type: ignore[misc]
        def __init__(self) -> None:
            self.config = type("Config", (), {"is_encoder_decoder": False})()

    found = Model()._get_logits_processor(config, input_ids_seq_length=3)
    assert [type(processor) for processor in found] == [
        RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper,
        TopPLogitsWarper,
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("penalty", [1.0, 0.5, 1.1, 30.0])
def test_without_a_temperature_the_most_likely_token_is_taken(name: str, penalty: float):
    prompt = np.array([0, 3, 3, 499, 10**6])
    sampling = Sampling(repetition_penalty=penalty, top_k=3, top_p=0.2, seed=1)
    choose = TokenChooser(sampling, prompt)
    ids = prompt.tolist()
    for _ in range(4):
        token = choose(CASES[name])
        assert token == _theirs(Sampling(repetition_penalty=penalty), ids, CASES[name]).argmax()
        ids.append(token)


def test_what_is_said_is_penalised_too():
    choose = TokenChooser(Sampling(repetition_penalty=1.5), np.array([2]))
    logits = np.array([1.0, 1.2, 1.4, -1.0], np.float32)
    assert [choose(logits) for _ in range(4)] == [1, 0, 2, 2]


finite = hnp.arrays(
    np.float32, st.integers(1, 40),
    elements=st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([0.0, 1.0, 1.5, 2.0]),
)  # fmt: skip
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 1e6) | st.floats(0, 3),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(0.1, 10) | st.sampled_from([1e-300, 1e300]),
    seed=st.integers(0, 2**70),
)


@settings(deadline=None)
@given(finite, samplings, st.lists(st.integers(0, 60), max_size=20))
@example(np.full(3, LARGEST, np.float32), Sampling(5e-324, seed=0), [0])
@example(np.array([LARGEST, -LARGEST], np.float32), Sampling(1.0, 0, 1e-300), [])
def test_any_setting_chooses_a_token_that_stayed(
    logits: NDArray[np.float32], sampling: Sampling, prompt: list[int]
):
    ids = np.array(prompt, np.int64)
    token = TokenChooser(sampling, ids)(logits)
    assert token == TokenChooser(sampling, ids)(logits)
    scores = penalise(logits.astype(np.float64), prompt, sampling.repetition_penalty)
    if sampling.temperature == 0:
        assert scores[token] == scores.max()
        return
    narrowed = narrow(scores, sampling)
    assert np.isfinite(narrowed[token])
    assert narrowed.max() == 0
    kept = np.isfinite(narrowed)
    if sampling.top_k and sampling.top_p == 1:
        ties = (scores == scores[kept].min()).sum()
        assert kept.sum() <= min(sampling.top_k, len(logits)) + ties - 1


@settings(deadline=None)
@given(finite.filter(lambda logits: np.ptp(logits.astype(np.float64)) < 100), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_it(logits: NDArray[np.float32], top_p: float):
    scores = logits.astype(np.float64)
    kept = np.isfinite(narrow(scores, Sampling(1.0, top_p=top_p)))
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    assert probabilities[kept].sum() >= top_p - 1e-9
    assert kept.sum() == 1 or probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-9
    assert kept.all() or probabilities[~kept].max() <= probabilities[kept].min()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64))
def test_a_seed_gives_the_same_tokens_whatever_was_drawn_before(seed: int):
    sampling = Sampling(temperature=1.0, seed=seed)
    logits = CASES["flat"]
    first, second = (TokenChooser(sampling, np.array([1])) for _ in range(2))
    alone = [first(logits) for _ in range(5)]
    TokenChooser(Sampling(1.0), np.array([1]))(logits)
    assert [second(logits) for _ in range(5)] == alone


def test_seeds_stay_what_they_are():
    """numpy keeps the stream of PCG64; a new version of ours must not draw other tokens."""
    choose = TokenChooser(Sampling(temperature=1.0, seed=0), np.array([1]))
    assert [choose(np.zeros(1000, np.float32)) for _ in range(5)] == [636, 269, 40, 16, 813]


def test_draws_follow_the_probabilities():
    choose = TokenChooser(Sampling(temperature=1.0, seed=3), np.array([0]))
    expected = np.array([0.5, 0.3, 0.0, 0.2])
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(expected), -1e4).astype(np.float32)
    counts = np.bincount([choose(logits) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, expected, atol=0.02)
    assert counts[2] == 0


def test_a_draw_at_the_end_is_the_last_possible_token():
    scores = np.array([0.0, -1.0, -np.inf])
    assert draw(scores, 0.0) == 0
    assert draw(scores, np.nextafter(1.0, 0.0)) == 1
    assert draw(scores, 1.0) == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("top", [1, 4, 10**6])
def test_log_probabilities_are_of_the_model(name: str, top: int):
    logits = CASES[name]
    token = len(logits) // 3
    expected = torch.from_numpy(logits.astype(np.float64)).log_softmax(0).numpy()
    got = log_probabilities(logits, token, top)
    assert got.token_id == token
    assert got.logprob == pytest.approx(expected[token], abs=1e-9)
    assert len(got.top) == min(top, len(logits))
    order = np.argsort(-expected, kind="stable")[: len(got.top)]
    assert [other.token_id for other in got.top] == order.tolist()
    np.testing.assert_allclose([other.logprob for other in got.top], expected[order], atol=1e-9)
    assert all(math.isfinite(other.logprob) for other in got.top)
    assert got.top[0] == Candidate(int(order[0]), got.top[0].logprob)


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"temperature": -0.1}, "0 or more"),
        ({"temperature": float("nan")}, "0 or more"),
        ({"temperature": float("inf")}, "0 or more"),
        ({"temperature": "1"}, "0 or more"),
        ({"temperature": True}, "0 or more"),
        ({"temperature": None}, "0 or more"),
        ({"top_k": -1}, r"0 \(all tokens\) or more"),
        ({"top_k": 1.0}, r"0 \(all tokens\) or more"),
        ({"top_k": True}, r"0 \(all tokens\) or more"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"top_p": float("nan")}, "0 < top_p <= 1"),
        ({"repetition_penalty": 0}, "above 0"),
        ({"repetition_penalty": -1.0}, "above 0"),
        ({"repetition_penalty": float("inf")}, "above 0"),
        ({"seed": -1}, "0 or more"),
        ({"seed": 1.5}, "0 or more"),
        ({"seed": "x"}, "0 or more"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], allowed: str):
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"{name} is {value!r}") as error:
        Sampling(**change)
    assert error.match(allowed)


def test_numbers_of_numpy_are_numbers():
    sampling = Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.float16(1.5), np.uint8(7))
    assert TokenChooser(sampling, np.array([1]))(CASES["random"]) == TokenChooser(
        Sampling(0.5, 3, 0.5, 1.5, 7), np.array([1])
    )(CASES["random"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 3  # type: ignore[misc]
