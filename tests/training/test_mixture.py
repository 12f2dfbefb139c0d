from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.training.mixture import CYCLE, Mixture, RatioLaw, step_positions

Lengths = st.lists(st.none() | st.integers(1, 700), min_size=1, max_size=4)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[int | None], list[float], int]:
    lengths = draw(Lengths)
    weights = [draw(st.floats(0.05, 20)) for _ in lengths]
    return lengths, weights, draw(st.integers(0, 2**40))


@given(mixtures())
def test_every_example_comes_exactly_once_in_an_epoch(
    given: tuple[list[int | None], list[float], int],
):
    lengths, weights, seed = given
    mixture = Mixture(lengths, weights, seed)
    seen: list[list[int]] = [[] for _ in lengths]
    for position in range(2 * CYCLE):
        source, index = mixture.at(position)
        seen[source].append(index)
    for length, indices in zip(lengths, seen, strict=True):
        if length is None:
            assert indices == list(range(len(indices)))
            continue
        for start in range(0, len(indices), length):
            epoch = indices[start : start + length]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(length))


@given(mixtures())
def test_every_cycle_has_the_shares_of_the_weights(
    given: tuple[list[int | None], list[float], int],
):
    lengths, weights, seed = given
    mixture = Mixture(lengths, weights, seed)
    for cycle in (0, 3):
        drawn = Counter(mixture.at(cycle * CYCLE + slot)[0] for slot in range(CYCLE))
        for source, weight in enumerate(weights):
            assert abs(drawn[source] - CYCLE * weight / sum(weights)) < 1


@given(mixtures(), st.lists(st.integers(0, 10**7), min_size=1, max_size=20))
def test_a_position_depends_on_nothing_that_was_asked_before(
    given: tuple[list[int | None], list[float], int], positions: list[int]
):
    mixture = Mixture(*given)
    got = [mixture.at(position) for position in positions]
    assert got == [Mixture(*given).at(position) for position in positions]
    assert got == [pickle.loads(pickle.dumps(mixture)).at(position) for position in positions]


def test_epochs_and_seeds_differ():
    mixture = Mixture([50], [1.0], seed=4)
    first, second = (
        [mixture.at(position)[1] for position in range(start, start + 50)] for start in (0, 50)
    )
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [Mixture([50], [1.0], seed=5).at(position)[1] for position in range(50)]


def test_two_sources_of_equal_length_are_ordered_differently():
    mixture = Mixture([200, 200], [1, 1], seed=0)
    indices: list[list[int]] = [[], []]
    for position in range(CYCLE):
        source, index = mixture.at(position)
        indices[source].append(index)
    assert indices[0][:200] != indices[1][:200]


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([], [], "0 sources with 0 weights"),
        ([3, 4], [1.0], "2 sources with 1 weights"),
        ([0], [1.0], "a source has 0 examples"),
        ([3, 4], [1.0, 0.0], r"the weights are \[1.0, 0.0\]"),
        ([3, 4], [1.0, -1.0], "the weights are"),
        ([3, 4], [1.0, float("nan")], "the weights are"),
        ([3, 4], [float("inf"), 1.0], "the weights are"),
        ([3, 4], [1.0, 1e-4], "weight 0.0001 of a sum of 1.0001"),
    ],
)
def test_what_is_no_mixture(lengths: list[int | None], weights: list[float], message: str):
    with pytest.raises(InputError, match=message):
        Mixture(lengths, weights, 0)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 8))
def test_processes_share_a_step_whatever_their_number(step: int, batch_size: int, world: int):
    if batch_size < world:
        with pytest.raises(InputError, match=f"{batch_size} examples a step for {world}"):
            step_positions(step, batch_size, 0, world)
        return
    parts = [step_positions(step, batch_size, rank, world) for rank in range(world)]
    assert sorted(position for part in parts for position in part) == list(
        range(step * batch_size, (step + 1) * batch_size)
    )
    assert min(map(len, parts)) >= max(map(len, parts)) - 1 >= 0


def test_ratios_follow_their_law():
    law = RatioLaw(full_share=0.25, min_ratio=0.2, max_ratio=0.8)
    rng = np.random.default_rng(0)
    drawn = np.array([law.draw(rng) for _ in range(4000)])
    assert np.mean(drawn == 0) == pytest.approx(0.25, abs=0.03)
    rest = drawn[drawn > 0]
    assert rest.min() >= 0.2
    assert rest.max() <= 0.8
    assert rest.mean() == pytest.approx(0.5, abs=0.01)
    assert rest.std() == pytest.approx(0.6 / 24**0.5, abs=0.01)


def test_a_single_ratio():
    rng = np.random.default_rng(0)
    assert {RatioLaw(0, 0.5, 0.5).draw(rng) for _ in range(20)} == {0.5}
    assert {RatioLaw(1, 0.5, 0.5).draw(rng) for _ in range(20)} == {0.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 0.1, 0.5), "full_share is -0.1"),
        ((1.1, 0.1, 0.5), "full_share is 1.1"),
        ((0, 0.5, 0.4), "min_ratio is 0.5, max_ratio is 0.4"),
        ((0, -0.1, 0.4), "min_ratio is -0.1"),
        ((0, 0.5, 1.0), "max_ratio is 1.0"),
        ((0, float("nan"), 0.5), "min_ratio is nan"),
    ],
)
def test_what_is_no_law(values: tuple[float, float, float], message: str):
    with pytest.raises(InputError, match=message):
        RatioLaw(*values)
