"""Results that more variants are added to: read, held against what is asked for now, and extended.

Variants are compared question by question, so that all must have the same base, the same main
configuration and the same test clips. What the first command found is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.evidence_plan import (
    MAIN,
    VARIANTS,
    changed_keys,
    flat,
    plain,
    without_places,
)
from benchmarks.harness.evidence_stats import Evidence
from stts_export.errors import InputError
from stts_export.files import json_object

_PARTS: Mapping[str, type] = {
    "command": str, "date": str, "machine": dict, "torch": str, "settings": dict, "config": dict,
    "base": dict, "runs": list, "same_as_main": list, "exams": dict, "chance": dict,
    "evaluations": list, "speed": dict,
}  # fmt: skip

_DIGITS = 12
"""Of a hash, in messages."""

_Key = tuple[int, float]
_Counts = tuple[int, int]


@dataclass(frozen=True)
class Held:
    """Results of an earlier command."""

    file: Path
    results: Mapping[str, Any]
    """As the file has them; not changed here."""
    variants: tuple[str, ...]
    """That it holds, and those that it says to be `main` itself."""
    windows: Mapping[_Key, _Counts]
    """(seed, prune ratio) -> windows kept of all test clips, and windows there are."""

    @classmethod
    def read(cls, file: Path) -> Held:
        """Return the results in a file.

        Raises:
            InputError: there is no such file, or it is not what `benchmarks/evidence.py` writes.
        """
        if not file.is_file():
            raise InputError("no such file", where=f"--extend {file}")
        results = json_object(file)
        problem = ""
        try:
            run = Evidence(results).variants
            windows = dict(_windows(results["evaluations"]))
            without_places(results["config"])
            wrong = [key for key, kind in _PARTS.items() if not isinstance(results[key], kind)]
        except InputError as error:
            problem = error.message
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"is damaged, or of another version: {error!r}"
        else:
            if wrong or MAIN not in run:
                problem = f"is damaged: see {', '.join(wrong) or 'runs'}"
        if problem:
            raise InputError(
                problem,
                where=f"--extend {file}",
                allowed=f"a JSON file that benchmarks/evidence.py wrote, {MAIN} among its variants",
            )
        return cls(file, results, (*run, *results["same_as_main"]), windows)

    def check_variants(self, names: Sequence[str]) -> None:
        """Refuse variants that are there already.

        Raises:
            InputError: one is.
        """
        twice = [name for name in names if name in self.variants]
        if twice:
            lacking = ", ".join(name for name in VARIANTS if name not in self.variants)
            raise InputError(
                f"holds {', '.join(twice)} already",
                where=f"--extend {self.file}",
                allowed=f"variants that it lacks: {lacking or 'none, it has all'}",
                fix="name only those with --variants",
            )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse other seeds or another exam; keys are those of "settings" in the results.

        Raises:
            InputError: they differ.
        """
        held = self.results["settings"]
        self._check({key: held.get(key) for key in settings}, settings)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse another main configuration, wherever its files lie.

        Raises:
            InputError: it differs.
        """
        before, now = (flat(without_places(one)) for one in (self.results["config"], config))
        self._check(before, now)

    def check_bases(self, digests: Mapping[int, str]) -> None:
        """Refuse another base.

        Args:
            digests: seed -> sha256 of what is read of the checkpoint that its runs start with.

        Raises:
            InputError: it differs.
        """
        held = self.results["base"]["sha256"]
        names = {f"{seed}": f"sha256 of the base of seed {seed}" for seed in digests}
        before = {name: held.get(seed, "")[:_DIGITS] for seed, name in names.items()}
        now = {names[f"{seed}"]: sha256[:_DIGITS] for seed, sha256 in digests.items()}
        self._check(before, now)

    def check_clips(self, exams: Mapping[str, Sequence[str]], code: str) -> None:
        """Refuse other test clips.

        Args:
            exams: seed -> types of the questions about each clip, as in the results.
            code: stands for the code that draws them. Results of before it was written down lack
                it: their clips are told by the questions, and by `check_windows` in the end.

        Raises:
            InputError: they differ.
        """
        others = [seed for seed, asked in exams.items() if self.results["exams"].get(seed) != asked]
        parts = (self.results["settings"], *self.results.get("extensions", ()))
        codes = {part["clips_code"] for part in parts if "clips_code" in part}
        if others or codes - {code}:
            seeds = ", ".join(others or exams)
            raise InputError(
                f"the test clips of seed {seeds} are not those of the results",
                where=f"--extend {self.file}",
                allowed="clips drawn by the code that drew theirs",
                fix="measure all variants anew, without --extend",
            )

    def check_windows(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Refuse answers about clips of other lengths.

        Raises:
            InputError: at a ratio of the results, other numbers of windows were seen or kept.
        """
        for (seed, ratio), now in _windows(evaluations):
            before = self.windows.get((seed, ratio), now)
            if now != before:
                raise InputError(
                    f"{now[0]} of {now[1]} windows were kept for seed {seed} at ratio {ratio:g}",
                    where=f"--extend {self.file}",
                    allowed=f"{before[0]} of {before[1]}, as in the results",
                    fix="the test clips or the selection have changed: measure all variants anew",
                )

    def extended(
        self, added: Mapping[str, Sequence[Any]], extension: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return these results with more in them.

        Args:
            added: `runs`, `same_as_main` and `evaluations`, to follow what is there.
            extension: what the report tells about how they were made.
        """
        return {
            **self.results,
            **{key: [*self.results[key], *values] for key, values in added.items()},
            "extensions": [*self.results.get("extensions", ()), extension],
        }

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = changed_keys(before, plain(now))
        if changed:
            held = "; ".join(f"{key} {before.get(key)}" for key in changed)
            raise InputError(
                "; ".join(f"{key} is {now.get(key)}" for key in changed),
                where=f"--extend {self.file}",
                allowed=f"{held}, as in the results",
                fix="ask for the same, or measure all variants anew, without --extend",
            )


def _windows(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[_Key, _Counts]]:
    """Yield them for the frames that a checkpoint itself asks for; all selectors keep as many."""
    for one in evaluations:
        if one["max_frames"] is None:
            for row in one["rows"]:
                counts = row["kept_windows"], row["total_windows"]
                yield (one["seed"], row["prune_ratio"]), counts
