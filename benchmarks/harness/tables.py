"""Results in columns."""

from __future__ import annotations


def table(header: str, rows: list[list[str]]) -> list[str]:
    """Return lines of right-aligned columns.

    Args:
        header: names of the columns, separated by spaces.
        rows: a cell per column.
    """
    cells = [header.split(), *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
