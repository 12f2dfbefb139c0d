"""What stands below the tables of `docs/results.md`: questions, machines, and every command."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.harness.evidence_plan import MAIN
from benchmarks.harness.evidence_stats import Evidence


def caption(evidence: Evidence, words: str, variants: Collection[str] = (MAIN,)) -> str:
    """Return how the numbers of some variants came about.

    Args:
        evidence: the results.
        words: what the numbers are; comes first.
        variants: that are shown.
    """
    results = evidence.results
    return (
        f"{words} {evidence.questions} questions about {evidence.clips} clips in all, "
        f"{len(evidence.seeds)} seeds; {_made(results, results['settings']['dtype'])}."
        f"{additions(evidence, variants)}{_elsewhere(evidence, variants)}"
    )


def additions(evidence: Evidence, variants: Collection[str]) -> str:
    """Return a sentence for each later command that some of these variants come from."""
    sentences = []
    for extension in evidence.results.get("extensions", ()):
        own = [name for name in extension["variants"] if name in variants]
        if own:
            sentences.append(f" Added on {extension['date']}: {_listed(own)}; {_made(extension)}.")
    return "".join(sentences)


def _made(made: Mapping[str, Any], *words: str) -> str:
    computer = made["machine"]
    software = ", ".join([f"PyTorch {made['torch']}", *words])
    return f"{software}, {computer['cpu']}, {computer['cores']} cores; `{made['command']}`"


def _elsewhere(evidence: Evidence, variants: Collection[str]) -> str:
    """Say which variants were trained on other machines than `main`, if any."""
    machines: dict[str, set[str]] = {}
    for run in evidence.results["runs"]:
        machines.setdefault(run["variant"], set()).add(run["machine"])
    others = [name for name in machines if name in variants and machines[name] != machines[MAIN]]
    if not others:
        return ""
    return (
        f" Trained on another machine than `{MAIN}`: {_listed(others)}. Its arithmetic rounds "
        f"differently, so that `{MAIN}` trained again there is another model, too; the interval "
        "does not contain what that changes."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
