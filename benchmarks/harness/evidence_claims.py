"""What the evidence says about each claim: a line with the numbers and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.harness.evidence_plan import MAIN, SCALING, UNPRUNED, VARIANTS
from benchmarks.harness.evidence_stats import Difference, Evidence, Setting
from stts_export.training.selectors import EVS, RANDOM, STTS, TOME, UNIFORM_FRAMES

TRAINED = ("random", "tome", "uniform-frames", "evs")
"""Variants that are trained with another selector."""
LABELS = {
    STTS: "learned scores",
    RANDOM: "random windows",
    UNIFORM_FRAMES: "fewer frames",
    TOME: "token merging",
    EVS: "repeats dropped",
}
CLEAR = 0.05
_MOST_LOST = 0.01


def claims(evidence: Evidence) -> Iterator[str]:
    """Yield a line for each claim that the evidence can decide on, with the verdict."""
    for ratio, clear in ((0.5, 0.0), (0.8, CLEAR)):
        ours = Setting(MAIN, ratio, STTS)
        for rival in (RANDOM, UNIFORM_FRAMES, TOME, EVS):
            other = Setting(MAIN, ratio, rival)
            least = clear if rival in (RANDOM, UNIFORM_FRAMES) else 0.0
            word = "clearly beat" if least else "beat"
            claim = f"learned scores {word} {LABELS[rival]} (`{rival}`) at {ratio:g}"
            yield from _claim(evidence, claim, ours, other, partial(beats, least=least))
        for name in TRAINED:
            other = Setting(name, ratio, VARIANTS[name].selectors[0])
            claim = f"they beat, at {ratio:g}, a model trained with {LABELS[other.selector]}"
            yield from _claim(evidence, claim, ours, other, beats)
    ours = Setting(MAIN, 0.5, STTS)
    for name, words in ((MAIN, "the same model unpruned"), (UNPRUNED, "a model never pruned")):
        claim = f"at 0.5 they lose at most one point against {words}"
        yield from _claim(evidence, claim, ours, Setting(name, 0.0, STTS), keeps)
    for (few, _), *others in scaling_groups(evidence):
        for frames, ratio in others:
            claim = f"{frames} frames at {ratio:g} beat {few} frames unpruned, at equal tokens"
            yield from _claim(
                evidence, claim, scaling_setting(frames, ratio), scaling_setting(few, 0.0),
                beats,
            )  # fmt: skip


def _claim(
    evidence: Evidence,
    claim: str,
    one: Setting,
    other: Setting,
    verdict: Callable[[Difference], tuple[str, str]],
) -> Iterator[str]:
    if evidence.has(one, other):
        difference = evidence.difference(one, other)
        word, reason = verdict(difference)
        yield f"* **{word}**: {claim}. {_difference_text(difference)}{reason}."


def beats(difference: Difference, least: float = 0.0) -> tuple[str, str]:
    """Verdict on being better by a mean of `least`, and by more than chance."""
    if difference.high < 0:
        return "Fails", ": the other one is better"
    if difference.low <= 0:
        return "Not shown", ": the interval contains 0"
    if min(difference.by_seed) <= 0:
        return "Not shown", ": not for every seed"
    if difference.value < least:
        return "Fails in part", f": better, but by less than {100 * least:g} points"
    return "Holds", ""


def keeps(difference: Difference) -> tuple[str, str]:
    """Verdict on losing at most a point."""
    if difference.low >= -_MOST_LOST:
        return "Holds", ""
    if difference.value >= -_MOST_LOST:
        return "Holds on these questions", ": the interval reaches further"
    if difference.high < -_MOST_LOST:
        return "Fails", ": it loses more"
    return "Not shown", ": it loses more here, and the interval contains one point"


def _difference_text(difference: Difference) -> str:
    by_seed = ", ".join(map(points, difference.by_seed))
    low, high = points(difference.low), points(difference.high)
    return f"{points(difference.value)} points (95 % {low} to {high}; by seed {by_seed})"


def points(share: float) -> str:
    """Format a difference of shares in points, with its sign; no minus before a zero."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def scaling_groups(evidence: Evidence) -> list[list[tuple[int, float]]]:
    """(frames, prune ratio) that were run, grouped by tokens; the first of a group at ratio 0."""
    groups: dict[float, list[tuple[int, float]]] = {}
    for frames, ratio in SCALING:
        groups.setdefault(round(frames * (1 - ratio), 6), []).append((frames, ratio))
    return [
        group
        for group in groups.values()
        if evidence.has(*(scaling_setting(frames, ratio) for frames, ratio in group))
    ]


def scaling_setting(frames: int, ratio: float) -> Setting:
    """Return the setting of a line of `SCALING`."""
    return Setting(MAIN, ratio, STTS, frames)
