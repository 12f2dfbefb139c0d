"""Files written all or nothing; JSON read with a clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stts_export.errors import InputError


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty when there is no such file.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(values, dict):
        raise InputError("is not a JSON object", where=str(path))
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON beside its final name and move it there when complete."""
    text = json.dumps(values, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield another name to write to; the file gets its own when the block succeeds."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_utf8(path: Path) -> None:
    """Refuse a path that ONNX Runtime cannot open.

    Raises:
        InputError: the path is not UTF-8.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "the name is not UTF-8, so ONNX Runtime cannot open files below it",
            where=str(path),
            fix="rename the folder",
        ) from None


def readable_size(count: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
