"""Claims about precision, each with its numbers and whether it holds; all computed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.evidence_claims import keeps, points
from benchmarks.harness.evidence_stats import Difference
from benchmarks.harness.precision_plan import REFERENCE
from benchmarks.harness.precision_results import Results

HALF = "fp16"
"""Recipe that nothing is quantised in, and that most others stand on."""


def claims(results: Results) -> Iterator[str]:
    """Yield a line for each claim that the results can decide on."""
    if HALF in results.recipes:
        yield _loses_nothing(results)
    for entry in results.others():
        if entry["gates"] is not None:
            yield _within_a_point(results, entry["name"])
    judged = [one["name"] for one in results.others() if one["gates"] is not None]
    if judged:
        yield _passes_gates(results, judged)
    if HALF in results.recipes and judged:
        yield _moves_no_windows(results, judged)
    yield from _scorer_matters(results)


def _line(holds: bool, claim: str, numbers: str) -> str:
    return f"* **{'Holds' if holds else 'Fails'}**: {claim}. {numbers}."


def _loses_nothing(results: Results) -> str:
    ratios = (results.ratio, 0.0)
    moved = {ratio: results.moved(HALF, ratio) for ratio in ratios}
    numbers = " and ".join(
        f"{results.changed(HALF, ratio)} at ratio {ratio:g} ({moved[ratio][0]} right ones lost, "
        f"{moved[ratio][1]} won)"
        for ratio in ratios
    )
    holds = all(lost == 0 for lost, _ in moved.values())
    return _line(
        holds,
        f"`{HALF}` loses no right answer",
        f"Of {results.questions} answers other texts are {numbers}",
    )


def _within_a_point(results: Results, name: str) -> str:
    difference = results.difference(name, results.ratio)
    word, reason = keeps(difference)
    return (
        f"* **{word}**: `{name}` loses at most one point at {results.ratio:g}. "
        f"{difference_text(difference)}{reason}."
    )


def difference_text(difference: Difference) -> str:
    """Format a difference with its interval."""
    low, high = points(difference.low), points(difference.high)
    return f"{points(difference.value)} points (95 % {low} to {high})"


def _passes_gates(results: Results, judged: list[str]) -> str:
    missed = {name: report.missed() for name in judged if (report := results.report(name))}
    listed = "; ".join(
        f"`{name}` misses {', '.join(check.line().removeprefix('FAIL ') for check in checks)}"
        for name, checks in missed.items()
        if checks
    )
    names = ", ".join(f"`{name}`" for name in judged)
    return _line(not listed, "every recipe passes its own gates on held-out clips", listed or names)


def _moves_no_windows(results: Results, judged: list[str]) -> str:
    """The scoring blocks are at the base in all of them, so their windows are fp16's."""
    names = [HALF, *(name for name in judged if results.is_bundle(name))]
    flipped = {name: results.recipes[name]["agreement"]["flipped"] for name in names}
    windows = results.recipes[HALF]["agreement"]["windows"]
    listed = ", ".join(f"`{name}` {count}" for name, count in flipped.items())
    return _line(
        max(flipped.values()) == flipped[HALF],
        f"what recipes quantise decides no window otherwise that `{HALF}` does not",
        f"Of {windows} windows {listed} are decided otherwise than in `{REFERENCE}`",
    )


def _scorer_matters(results: Results) -> Iterator[str]:
    ablation = results.values["ablation"]
    rows = {row["part"]: row for row in ablation["rows"]}
    if HALF not in results.recipes:
        return
    half = results.recipes[HALF]["agreement"]
    shares = {
        part: rows[part]["flipped"] / ablation["windows"]
        for part in ("the scorer", "the blocks that it reads")
    }
    least = half["flipped"] / half["windows"]
    listed = ", ".join(f"{part} {100 * share:.2f} %" for part, share in shares.items())
    yield _line(
        min(shares.values()) > least,
        f"int8 in the scorer, or in the blocks that it reads, flips more windows than `{HALF}`",
        f"Windows decided otherwise: {listed}, `{HALF}` {100 * least:.2f} %",
    )
