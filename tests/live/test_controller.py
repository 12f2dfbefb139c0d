"""The ratio follows measured costs, in time and without swinging."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts_export.live.controller import PATIENCE, STEP, Choice, ElasticRatio, FixedRatio

WINDOWS = 1000


class _Machine:
    """Answers that cost so much a kept window and so much else, with noise."""

    def __init__(self, controller: ElasticRatio, noise: float = 0.0, seed: int = 0) -> None:
        self.controller = controller
        self.rng = np.random.default_rng(seed)
        self.noise = noise

    def ask(self, per_window: float, rest: float) -> tuple[Choice, float]:
        choice = self.controller.choose(WINDOWS)
        kept = round(WINDOWS * (1 - choice.ratio))
        factor = 1 + self.noise * float(self.rng.uniform(-1, 1))
        growing, rest = kept * per_window * factor, rest * factor
        self.controller.measured(kept, growing, rest)
        return choice, growing + rest


def _elastic(budget: float = 1.0, **limits: float) -> ElasticRatio:
    return ElasticRatio(budget, limits.get("lowest", 0.1), limits.get("highest", 0.9), 0.5)


def test_a_fixed_ratio_stays():
    fixed = FixedRatio(0.3, "as asked")
    fixed.measured(10, 100.0, 100.0)
    assert fixed.choose(WINDOWS) == Choice(0.3, "as asked", None)


def test_nothing_measured_keeps_the_ratio_the_model_was_trained_with():
    choice = _elastic().choose(WINDOWS)
    assert (choice.ratio, choice.predicted) == (0.5, None)
    assert "nothing measured" in choice.reason
    assert ElasticRatio(1.0, 0.6, 0.9, 0.5).choose(WINDOWS).ratio == 0.6


def test_load_raises_the_ratio_with_the_next_question_and_answers_are_in_time():
    machine = _Machine(_elastic())
    for _ in range(5):
        assert machine.ask(0.001, 0.2)[1] <= 1.0
    seen = [machine.ask(0.003, 0.2) for _ in range(6)]
    raised = [choice for choice, _ in seen if choice.reason.startswith("raised")]
    assert raised
    assert seen[1][0].ratio > seen[0][0].ratio
    assert seen[-1][1] <= 1.0
    assert "budget 1.00 s" in raised[0].reason
    assert raised[0].predicted is not None


def test_room_lowers_it_one_step_at_a_time_and_not_at_once():
    machine = _Machine(_elastic())
    ratios = [machine.ask(0.0005, 0.05)[0].ratio for _ in range(40)]
    assert ratios[:PATIENCE] == [0.5] * PATIENCE
    steps = -np.diff(ratios)
    assert set(np.round(steps, 6)) == {0.0, STEP}
    assert ratios[-1] == 0.1  # down to its lowest, where everything still fits


def test_at_the_upper_limit_it_says_that_the_answer_will_be_late():
    machine = _Machine(_elastic(highest=0.7))
    for _ in range(3):
        choice, seconds = machine.ask(0.01, 0.5)
    assert choice.ratio == 0.7
    assert choice.reason.startswith("at its upper limit")
    assert choice.predicted == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("per_window", "rest"), [(0.001, 0.3), (0.0016, 0.1), (0.0008, 0.45)])
def test_steady_load_with_noise_does_not_make_it_swing(seed: int, per_window: float, rest: float):
    machine = _Machine(_elastic(), noise=0.08, seed=seed)
    ratios = [machine.ask(per_window, rest)[0].ratio for _ in range(200)][50:]
    changes = np.count_nonzero(np.diff(ratios))
    assert changes <= 2, ratios


@given(
    costs=st.lists(st.tuples(st.floats(1e-6, 1e-1), st.floats(0, 10)), min_size=1, max_size=60),
    lowest=st.sampled_from([0.05, 0.1, 0.33]),
    highest=st.sampled_from([0.33, 0.7, 0.97]),
)
def test_it_stays_within_its_limits_whatever_is_measured(
    costs: list[tuple[float, float]], lowest: float, highest: float
):
    machine = _Machine(ElasticRatio(0.5, lowest, highest, 0.5))
    for per_window, rest in costs:
        choice, _ = machine.ask(per_window, rest)
        assert lowest <= choice.ratio <= highest
        assert choice.reason
