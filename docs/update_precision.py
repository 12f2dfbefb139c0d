"""Write `precision.md` and its pictures from recorded results, or check that they are up to date.

    python docs/update_precision.py [--check]

Numbers and verdicts are never typed: all come from `benchmarks/bench_precision.py`, and what runs
where from `stts_export/calibration`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.precision_pictures import draw_all, pictures_of
from benchmarks.harness.precision_report import report
from benchmarks.harness.precision_results import Results
from docs.documents import ROOT, Document

DOCUMENT = Document(
    name="precision.md",
    results=ROOT / "benchmarks" / "results" / "precision.json",
    benchmark="benchmarks/bench_precision.py",
    script="docs/update_precision.py",
    read=Results,
    report=report,
    draw_all=draw_all,
    pictures_of=pictures_of,
)

if __name__ == "__main__":
    DOCUMENT.main(None, __doc__)
