"""Write `precision.md` and its pictures from recorded results, or check that they are up to date.

    python docs/update_precision.py [--check]

Numbers and verdicts are never typed: all come from `benchmarks/bench_precision.py`, and what runs
where from `stts_export/calibration`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.precision_pictures import draw_all, pictures_of
from benchmarks.harness.precision_report import report
from benchmarks.harness.precision_results import Results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "precision.json"
DOCUMENT = "precision.md"


def outdated(results: Path, folder: Path) -> list[str]:
    """Name the files of a folder that are not what the results make them."""
    found, source = _read(results)
    document = folder / DOCUMENT
    names = []
    if not document.exists() or document.read_text(encoding="utf-8") != report(found):
        names.append(DOCUMENT)
    # Pixels differ between versions of matplotlib; what they were drawn from does not.
    names += [
        file.name
        for file in pictures_of(found, folder)
        if not file.exists() or source.encode() not in file.read_bytes()
    ]
    return names


def write(results: Path, folder: Path) -> None:
    """Write the document and its pictures into a folder."""
    found, source = _read(results)
    text = report(found)
    draw_all(found, folder, source)
    (folder / DOCUMENT).write_text(text, encoding="utf-8")


def _read(results: Path) -> tuple[Results, str]:
    content = results.read_bytes()
    return Results(json.loads(content)), f"sha256 {hashlib.sha256(content).hexdigest()}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write everything, or exit with 1 when something is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when outdated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON of the benchmark")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="to write to")
    args = parser.parse_args(arguments)
    if not args.results.exists():
        sys.exit(f"{args.results}: run python benchmarks/bench_precision.py first")
    if args.check:
        old = outdated(args.results, args.folder)
        sys.exit(f"{', '.join(old)}: run python docs/update_precision.py" if old else 0)
    write(args.results, args.folder)


if __name__ == "__main__":
    main()
