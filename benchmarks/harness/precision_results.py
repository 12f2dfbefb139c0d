"""What `bench_precision.py` found, and differences from fp32 with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness.evidence_stats import Difference, Evidence, Setting
from benchmarks.harness.precision_plan import REFERENCE
from stts_export.calibration.quant_report import QuantReport
from stts_export.engines.library import ONNXRUNTIME
from stts_export.errors import InputError
from stts_export.training.evaluation import ALL_WINDOWS
from stts_export.training.selectors import STTS

Entry = Mapping[str, Any]
"""What was found about a recipe."""


class Results:
    """The JSON of `bench_precision.py`.

    Args:
        values: its content.

    Raises:
        InputError: it was written by something else, or its parts contradict each other.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        if values.get("benchmark") != "precision":
            raise InputError("is not of benchmarks/bench_precision.py", where="precision")
        self.values = values
        self.settings: Mapping[str, Any] = values["settings"]
        self.ratio: float = self.settings["prune_ratio"]
        self.recipes: dict[str, Entry] = {one["name"]: one for one in values["recipes"]}
        self._evidence = Evidence(
            {
                "benchmark": "evidence",
                "settings": {"seeds": [self.settings["seed"]]},
                "runs": [{"variant": name} for name in self.recipes],
                "exams": {str(self.settings["seed"]): values["exam"]},
                "evaluations": [self._evaluation(one) for one in values["recipes"]],
            }
        )

    def _evaluation(self, entry: Entry) -> dict[str, Any]:
        """Put rows into the form of the evidence, whose intervals are those wanted here."""
        rows = [
            {**row, "selector": STTS if row["prune_ratio"] else ALL_WINDOWS}
            for row in entry["rows"]
        ]
        seed = self.settings["seed"]
        return {"variant": entry["name"], "seed": seed, "max_frames": None, "rows": rows}

    @property
    def questions(self) -> int:
        """Of the exam."""
        return self._evidence.questions

    @property
    def clips(self) -> int:
        """Of the exam."""
        return self._evidence.clips

    def others(self) -> list[Entry]:
        """Recipes but the reference."""
        return [one for name, one in self.recipes.items() if name != REFERENCE]

    def row(self, name: str, ratio: float) -> Mapping[str, Any]:
        """What a recipe answered at a ratio, 0 or the one that is compared."""
        rows: list[Mapping[str, Any]] = self.recipes[name]["rows"]
        return next(row for row in rows if row["prune_ratio"] == ratio)

    def difference(self, name: str, ratio: float) -> Difference:
        """How much more often a recipe is right than fp32, question by question."""
        one, other = (Setting(which, ratio, STTS) for which in (name, REFERENCE))
        return self._evidence.difference(one, other)

    def moved(self, name: str, ratio: float) -> tuple[int, int]:
        """Questions that fp32 answers right and a recipe does not, and the other way round."""
        seed = self.settings["seed"]
        own, fp32 = (
            self._evidence.marks(seed, Setting(which, ratio, STTS)) for which in (name, REFERENCE)
        )
        return int(np.sum(fp32 & ~own)), int(np.sum(own & ~fp32))

    def changed(self, name: str, ratio: float) -> int:
        """Answers that are other texts than fp32's."""
        count: int = self.recipes[name]["agreement"]["changed"][f"{ratio:g}"]
        return count

    def weight_bytes(self, name: str) -> int:
        """Bytes of all weights of a recipe's graphs."""
        return sum(self.recipes[name]["weights"].values())

    def report(self, name: str) -> QuantReport | None:
        """A recipe's own gates; None without."""
        gates = self.recipes[name]["gates"]
        return None if gates is None else QuantReport.from_dict(gates, f"precision: {name}")

    def is_bundle(self, name: str) -> bool:
        """Whether a bundle was built and run, as opposed to PyTorch that rounds as it would."""
        return bool(self.recipes[name]["measured_in"] == ONNXRUNTIME)
