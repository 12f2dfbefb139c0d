"""The prune ratio that lets an answer come in time.

What an answer costs is measured, not assumed: seconds per kept window in the upper part of the
tower and in the prefill, and all that does not depend on the ratio. The ratio goes up as soon as an
answer would be late, and comes down one step at a time when there has been room for a while, so
that it does not swing.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP = 0.05
"""Between ratios that are tried."""
AIM = 0.9
"""Part of the budget that a prediction may take: measured times scatter."""
ROOM = 0.75
"""Part of the budget that a lower ratio must stay under before it is taken."""
PATIENCE = 3
"""Questions in a row that must have had that room."""
_MEMORY = 0.3
"""Weight of the newest measurement."""
_LATE_MEMORY = 0.6
"""The same when it is above what was expected: load is noticed sooner than its end."""


@dataclass(frozen=True)
class Choice:
    """A ratio and why."""

    ratio: float
    reason: str
    predicted: float | None = None
    """Seconds from the question to the answer; None when nothing was measured yet or there is no
    budget."""


class FixedRatio:
    """The ratio that was asked for.

    Args:
        ratio: in force for every question.
        reason: where it comes from.
    """

    def __init__(self, ratio: float, reason: str) -> None:
        self._choice = Choice(ratio, reason)

    @property
    def current(self) -> Choice:
        """The ratio."""
        return self._choice

    def choose(self, windows: int) -> Choice:
        """Return the ratio, whatever the number of windows is."""
        return self._choice

    def measured(self, kept: int, per_window: float, rest: float) -> None:
        """Nothing is learnt."""


class ElasticRatio:
    """Keeps answers within a budget.

    Args:
        budget: seconds.
        lowest: never below this ratio.
        highest: never above.
        start: before anything was measured.
    """

    def __init__(self, budget: float, lowest: float, highest: float, start: float) -> None:
        self._budget = budget
        self._lowest, self._highest = lowest, highest
        self._ratio = min(max(start, lowest), highest)
        self._per_window: float | None = None
        self._rest = 0.0
        self._calm = 0

    @property
    def current(self) -> Choice:
        """The ratio of the newest question, for what no question waits for."""
        return Choice(self._ratio, "that of the newest question")

    def choose(self, windows: int) -> Choice:
        """Return the ratio for a question.

        Args:
            windows: of all frames that are still to be selected from.
        """
        if self._per_window is None:
            return Choice(self._ratio, "nothing measured yet")
        now = self._predicted(self._ratio, windows)
        if now > AIM * self._budget:
            return self._raise(windows, now)
        lower = max(self._lowest, _on_grid(self._ratio - STEP))
        if lower < self._ratio and self._predicted(lower, windows) <= ROOM * self._budget:
            self._calm += 1
        else:
            self._calm = 0
        if self._calm >= PATIENCE:
            self._calm = 0
            self._ratio = lower
            after = self._predicted(lower, windows)
            return Choice(lower, f"lowered: {after:.2f} s expected, {self._text}", after)
        return Choice(self._ratio, f"kept: {now:.2f} s expected, {self._text}", now)

    def measured(self, kept: int, per_window: float, rest: float) -> None:
        """Learn from an answer.

        Args:
            kept: windows that were kept.
            per_window: seconds that grow with them, all together.
            rest: seconds of the answer that do not.
        """
        if kept > 0:
            unit = per_window / kept
            self._per_window = unit if self._per_window is None else _mixed(self._per_window, unit)
        self._rest = _mixed(self._rest, rest) if self._rest else rest

    def _raise(self, windows: int, now: float) -> Choice:
        self._calm = 0
        before = self._ratio
        while self._ratio < self._highest and (
            self._predicted(self._ratio, windows) > AIM * self._budget
        ):
            self._ratio = min(self._highest, _on_grid(self._ratio + STEP))
        after = self._predicted(self._ratio, windows)
        if self._ratio == before:
            reason = f"at its upper limit: {after:.2f} s expected, {self._text}"
        else:
            reason = f"raised: {now:.2f} s expected at {before:.2f}, {self._text}"
        return Choice(self._ratio, reason, after)

    def _predicted(self, ratio: float, windows: int) -> float:
        assert self._per_window is not None
        return self._rest + self._per_window * windows * (1 - ratio)

    @property
    def _text(self) -> str:
        return f"budget {self._budget:.2f} s"


def _on_grid(ratio: float) -> float:
    return round(round(ratio / STEP) * STEP, 6)


def _mixed(old: float, new: float) -> float:
    weight = _LATE_MEMORY if new > old else _MEMORY
    return old + weight * (new - old)


Controller = FixedRatio | ElasticRatio
