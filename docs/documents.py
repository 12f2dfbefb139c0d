"""Documents that are made of recorded results: written, or checked for being up to date."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

ROOT = Path(__file__).parents[1]
T = TypeVar("T")


@dataclass(frozen=True)
class Document(Generic[T]):
    """A text in Markdown and its pictures."""

    name: str
    """File in `docs`."""
    results: Path
    """JSON that it is made of."""
    benchmark: str
    """What writes that; a path from the repository's root."""
    script: str
    """What writes the document, likewise."""
    read: Callable[[Any], T]
    report: Callable[[T], str]
    draw_all: Callable[[T, Path, str], object]
    """Draws into a folder; each picture carries the text that it is given."""
    pictures_of: Callable[[T, Path], Sequence[Path]]

    def outdated(self, results: Path, folder: Path) -> list[str]:
        """Name the files of a folder that are not what the results make them."""
        found, source = self._read(results)
        document = folder / self.name
        names = []
        if not document.exists() or document.read_text(encoding="utf-8") != self.report(found):
            names.append(self.name)
        # Pixels differ between versions of matplotlib; what they were drawn from does not.
        names += [
            file.name
            for file in self.pictures_of(found, folder)
            if not file.exists() or source.encode() not in file.read_bytes()
        ]
        return names

    def write(self, results: Path, folder: Path) -> None:
        """Write the document and its pictures into a folder."""
        found, source = self._read(results)
        text = self.report(found)
        self.draw_all(found, folder, source)
        (folder / self.name).write_text(text, encoding="utf-8")

    def _read(self, results: Path) -> tuple[T, str]:
        content = results.read_bytes()
        return self.read(json.loads(content)), f"sha256 {hashlib.sha256(content).hexdigest()}"

    def main(self, arguments: Sequence[str] | None, description: str | None) -> None:
        """Write everything, or exit with 1 when something is out of date."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--check", action="store_true", help="write nothing, fail if outdated")
        parser.add_argument("--results", type=Path, default=self.results, help="JSON of results")
        parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="to write to")
        args = parser.parse_args(arguments)
        if not args.results.exists():
            sys.exit(f"{args.results}: run python {self.benchmark} first")
        if args.check:
            old = self.outdated(args.results, args.folder)
            sys.exit(f"{', '.join(old)}: run python {self.script}" if old else 0)
        self.write(args.results, args.folder)
