"""What is measured about recipes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.evidence_plan import ExamSize
from stts_export.calibration.recipe import Recipe
from stts_export.errors import InputError

RATIO = 0.5
"""Prune ratio at which recipes are compared."""
REFERENCE = "fp32"
"""Recipe that the others are compared with."""
ABLATED = "int8"
"""Recipe whose layers the ablation rounds for comparison."""
RECIPES = (
    "fp32", "fp16", "bf16", "fp8", "int8", "int4", "nvfp4", "cpu", "orin", "thor", "h200", "rtx",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    checkpoint: str
    recipes: tuple[str, ...]
    """Names or YAML files; the reference is among them."""
    work: Path
    exam: ExamSize = field(default_factory=ExamSize)
    seed: int = 0
    """Of the test clips."""
    timed_clips: int = 24
    tokens: int = 16
    """Decoded in each timed turn."""

    def load(self) -> dict[str, Recipe]:
        """Return the recipes by what they were asked for with.

        Raises:
            InputError: one is not there or cannot be read, a name comes twice, or the reference is
                missing.
        """
        loaded = {name: Recipe.load(name) for name in self.recipes}
        names = [loaded[name].name for name in self.recipes]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or REFERENCE not in self.recipes:
            raise InputError(
                f"{twice[0]} is there twice" if twice else f"{REFERENCE} is missing",
                where="--recipes",
                allowed=f"different recipes, with {REFERENCE}, which all are compared with",
            )
        return loaded
