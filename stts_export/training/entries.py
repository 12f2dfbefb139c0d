"""Files of entries for training data: JSON, CSV and datasets, each entry with its place."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from stts_export.errors import InputError, MissingDependencyError, did_you_mean

Entry = tuple[str, dict[str, Any]]
"""The file and the place in it, for messages; and the values by key."""

_DATASET_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
_STRINGS = ("string", "large_string", "null")
"""Types of a dataset's columns that may hold paths."""


def json_entries(path: Path) -> Iterator[Entry]:
    """Yield the objects of a JSON Lines file, or of a JSON list.

    Raises:
        InputError: a line or an entry of the list is no JSON object, or not UTF-8.
    """
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        is_list = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        for where, entry in _listed(path, file) if is_list else _lines(path, file):
            if not isinstance(entry, dict):
                raise InputError(f"is {entry!r:.80}", where=where, allowed="a JSON object")
            yield where, entry


def csv_entries(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    """Yield the rows of a CSV file; all values are strings.

    Args:
        path: the file, with a header.
        columns: what the header must have.

    Raises:
        InputError: a column is missing, or the file is no CSV or not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            lacking = [column for column in columns if column not in header]
            if lacking:
                raise InputError(
                    f"the header has no {', '.join(lacking)}",
                    where=str(path),
                    allowed=f"a header with {', '.join(columns)}",
                )
            for row in filter(None, reader):
                where = f"{path}:line {reader.line_num}"
                if len(row) != len(header):
                    raise InputError(
                        f"has {len(row)} fields",
                        where=where,
                        allowed=f"{len(header)}, as many as the header",
                    )
                yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            where = f"{path}:line {reader.line_num}"
            raise InputError(f"cannot be read as CSV: {error}", where=where) from None
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8: {error.reason}", where=str(path)) from None


def is_dataset(folder: Path) -> bool:
    """Whether the `datasets` library has saved a dataset in that folder."""
    return any((folder / name).is_file() for name in _DATASET_FILES)


def dataset_entries(name: str, split: str | None, paths: Sequence[str]) -> Iterator[Entry]:
    """Yield the rows of a dataset of the `datasets` library.

    Args:
        name: a folder, or the name of a dataset on the Hugging Face hub.
        split: which part; None when there is only one.
        paths: columns that must hold strings, if they are there.

    Raises:
        InputError: there is no such dataset or split, or a column holds something else.
        MissingDependencyError: the library is not installed.
    """
    data = _dataset(name, split)
    for key in paths:
        if key in data.features and getattr(data.features[key], "dtype", None) not in _STRINGS:
            raise InputError(
                f"the column {key} has the type {data.features[key]}",
                where=name,
                allowed="strings: paths of files",
            )
    for number, row in enumerate(data, start=1):
        yield f"{name}:row {number}", row


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:line {number}"
        text = _decoded(line, where).strip()
        if text:
            try:
                yield where, _JSON.decode(text)
            except (ValueError, RecursionError) as error:
                raise _not_json(error, where) from None


def _listed(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """Yield the elements one by one, as the place of each is wanted."""
    text = _decoded(file.read(), str(path))
    end, line, number = text.index("[") + 1, 1, 0
    counted = 0  # lines are counted up to here
    while True:
        start = _after_space(text, end)
        if text[start : start + 1] == "]":
            break
        if number:
            if text[start : start + 1] != ",":
                raise InputError(
                    f"is not valid JSON: neither ',' nor ']' after entry {number}", where=str(path)
                )
            start = _after_space(text, start + 1)
        number += 1
        line += text.count("\n", counted, start)
        counted = start
        where = f"{path}:line {line}, entry {number}"
        try:
            entry, end = _JSON.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, where) from None
        yield where, entry
    if text[start + 1 :].strip():
        raise InputError("is not valid JSON: something stands after the list", where=str(path))


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8: {error.reason}", where=where) from None


def _not_json(error: Exception, where: str) -> InputError:
    return InputError(f"is not valid JSON: {getattr(error, 'msg', error)}", where=where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\r\n]*")


def _dataset(name: str, split: str | None) -> Any:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            f"the datasets library cannot be imported: {error}",
            where=name,
            fix="pip install datasets",
        ) from None
    saved = is_dataset(Path(name))
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot be read as a dataset: {error}", where=name) from None
    if isinstance(data, dict):  # of splits
        return _split_of(data, split, name)
    if saved and split is not None:
        raise InputError(f"split is {split!r}", where=name, allowed="none: it has no splits")
    return data


def _split_of(data: dict[str, Any], split: str | None, where: str) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None:
        raise InputError("the split is not named", where=where, allowed=", ".join(data))
    if split not in data:
        near = did_you_mean(split, data)
        raise InputError(f"split is {split!r}{near}", where=where, allowed=", ".join(data))
    return data[split]
