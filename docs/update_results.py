"""Write `results.md` and its pictures from recorded evidence, or check that they are up to date.

    python docs/update_results.py [--check]

Numbers and verdicts are never typed: all come from `benchmarks/evidence.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.evidence_pictures import draw_all, pictures_of
from benchmarks.harness.evidence_report import report
from benchmarks.harness.evidence_stats import Evidence
from docs.documents import ROOT, Document

DOCUMENT = Document(
    name="results.md",
    results=ROOT / "benchmarks" / "results" / "evidence.json",
    benchmark="benchmarks/evidence.py",
    script="docs/update_results.py",
    read=Evidence,
    report=report,
    draw_all=draw_all,
    pictures_of=pictures_of,
)

if __name__ == "__main__":
    DOCUMENT.main(None, __doc__)
