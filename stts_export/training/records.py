"""Datasets of questions about videos and images, as records that are checked before any work.

Layouts:

* "jsonl": JSON Lines, or a JSON list of the same objects, with the keys `video` or `image` (a
  path; neither for text alone), `question`, `answer`, `choices` (optional: the list of answers to
  choose from, `answer` among them) and `type` (optional text, for accuracy by type). `id` and
  `meta` may hold anything and are not read. Other keys are refused; null is the same as no key.
* "llava": LLaVA-Video style JSON: objects with `video` or `image` and `conversations`, a list of
  {"from": "human", "value": ...} and {"from": "gpt", "value": ...} in turn. The placeholders
  `<image>` and `<video>` are cut from the questions. Every pair of turns becomes a question of its
  own on the shared visual: a later one does not see the earlier ones. Other keys are not read.
* "nextqa": the CSV files of NExT-QA's multiple-choice questions. `video` names a file of any
  usual suffix, or what `map_vid_vidorID.json` calls it, if that lies beside the CSV file or in the
  folder of the media. Questions whose right answer stands twice among the choices are left out.
* "hf": a dataset for the `datasets` library, from a folder or from the Hugging Face hub by name,
  with columns as in "jsonl".

Paths are relative to the file's folder, or to another that is given.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stts_export.errors import InputError, did_you_mean
from stts_export.files import json_object
from stts_export.training.entries import csv_entries, dataset_entries, is_dataset, json_entries
from stts_export.training.examples import Question

_log = logging.getLogger(__name__)

_KEYS = ("video", "image", "question", "answer", "choices", "type", "id", "meta")
_MOST_CHOICES = 26
"""Letters that choices are listed under."""
_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
_NEXTQA_CHOICES = tuple(f"a{number}" for number in range(5))
_NEXTQA_COLUMNS = ("video", "question", "answer", "type", *_NEXTQA_CHOICES)
_NEXTQA_MAP = "map_vid_vidorID.json"
_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


@dataclass(frozen=True)
class Record:
    """A video, an image or nothing, and the questions about it."""

    video: Path | None
    image: Path | None
    """At most one of the two."""
    questions: tuple[Question, ...]
    """At least one."""
    name: str
    """Where it came from: file and line."""

    @property
    def visual(self) -> Path | None:
        """The file of the video or image."""
        return self.video or self.image


def read_records(
    path: str | Path,
    layout: str | None = None,
    *,
    media: str | Path | None = None,
    split: str | None = None,
    allow_missing: int = 0,
) -> list[Record]:
    """Read a dataset and check all of it, except what is inside its videos and images.

    Args:
        path: the file; for "hf" a folder, or the name of a dataset on the hub.
        layout: one of `LAYOUTS`; told from the suffix and the content when None.
        media: folder that paths are relative to; when None the one that the file lies in, for "hf"
            the dataset's own folder, or the current one for a dataset on the hub.
        split: which part of a dataset for "hf"; may be left out when it has only one.
        allow_missing: how many videos and images may be missing. Records about them are left out,
            and a warning is logged.

    Returns:
        Records in the order of the file, at least one.

    Raises:
        InputError: the file is not of this layout, an entry has no question or answer, choices
            do not have the answer among them or repeat themselves, or too many files are missing.
        MissingDependencyError: the `datasets` library is not installed.
    """
    where = str(path)
    layout = layout or _layout_of(Path(path))
    if layout not in LAYOUTS:
        raise InputError(
            f"layout is {layout!r}{did_you_mean(layout, LAYOUTS)}",
            where=where,
            allowed=", ".join(LAYOUTS),
        )
    if split is not None and layout != "hf":
        raise InputError(f"split is {split!r}", where=where, allowed="none for this layout")
    if media is not None and not Path(media).is_dir():
        raise InputError("there is no such folder of media", where=str(media))
    if layout == "hf":
        folder = Path(media or (path if Path(path).is_dir() else ""))
        rows = dataset_entries(where, split, ("video", "image"))
        records = [_plain_record(row, folder, place) for place, row in rows]
    else:
        file = _file(Path(path))
        records = list(_READERS[layout](file, Path(media or file.parent)))
    if not records:
        raise InputError("holds no questions", where=where)
    return _without_missing(records, allow_missing, where)


def share_visuals(records: Sequence[Record]) -> list[Record]:
    """Put the questions about the same file into one record, which is decoded and encoded once.

    Args:
        records: any; those without a file stay as they are.

    Returns:
        Records in the order in which their files first occur, named after their first.
    """
    groups: dict[object, list[Record]] = {}
    for number, record in enumerate(records):
        key = number if record.visual is None else (record.video, record.image)
        groups.setdefault(key, []).append(record)
    return [
        replace(group[0], questions=tuple(q for record in group for q in record.questions))
        for group in groups.values()
    ]


def _file(path: Path) -> Path:
    if path.is_dir():
        raise InputError("is a folder", where=str(path), allowed="a file, unless layout is hf")
    if not path.is_file():
        raise InputError(
            "there is no such file",
            where=str(path),
            fix="a dataset of the Hugging Face hub is read with layout hf",
        )
    return path


def _layout_of(path: Path) -> str:
    """Tell the layout of a dataset from its suffix and its first entry."""
    if is_dataset(path):
        return "hf"
    suffix = _file(path).suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        _, first = next(json_entries(path), ("", {}))
        return "llava" if "conversations" in first else "jsonl"
    if suffix == ".csv":
        return "nextqa"
    raise InputError(
        f"the layout cannot be told from the suffix {suffix!r}",
        where=str(path),
        allowed=".jsonl, .json or .csv",
        fix="name the layout",
    )


def _without_missing(records: list[Record], allow_missing: int, where: str) -> list[Record]:
    files = dict.fromkeys(record.visual for record in records if record.visual)
    missing = {file for file in files if not os.path.isfile(file)}
    if not missing:
        return records
    first = next(file for file in files if file in missing)
    many = f"{len(missing)} of {len(files)} files {'is' if len(missing) == 1 else 'are'} missing"
    message = f"{many}, {'the first' if len(missing) > 1 else 'it'} is {first}"
    if len(missing) > allow_missing:
        raise InputError(
            message,
            where=where,
            allowed=f"{allow_missing or 'no'} missing files",
            fix="name the folder of the media, or allow some to be missing",
        )
    left = [record for record in records if record.visual not in missing]
    if not left:
        raise InputError(f"{message}; nothing is left", where=where)
    _log.warning("%s: %s; %d records left out", where, message, len(records) - len(left))
    return left


def _plain_records(path: Path, media: Path) -> Iterator[Record]:
    for where, entry in json_entries(path):
        yield _plain_record(entry, media, where)


def _plain_record(entry: Mapping[str, Any], media: Path, where: str) -> Record:
    for key in entry:
        if key not in _KEYS:
            raise InputError(
                f"unknown key {key!r}{did_you_mean(key, _KEYS)}",
                where=where,
                allowed=", ".join(_KEYS),
            )
    video, image = _visual(entry, media, where)
    question = Question(
        type="" if entry.get("type") in (None, "") else _text(entry, "type", where),
        text=_text(entry, "question", where),
        answer=_text(entry, "answer", where),
        choices=_choices(entry, where),
    )
    if question.choices:
        _check_choices(question, where)
    return Record(video, image, (question,), where)


def _visual(entry: Mapping[str, Any], media: Path, where: str) -> tuple[Path | None, Path | None]:
    video, image = (
        None if entry.get(key) is None else media / _text(entry, key, where)
        for key in ("video", "image")
    )
    if video and image:
        raise InputError(
            "has both a video and an image", where=where, allowed="one of them, or neither"
        )
    return video, image


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text that an entry must have."""
    text = entry.get(key)
    if text is None:
        raise InputError(f"there is no {key}", where=where)
    if not isinstance(text, str):
        raise InputError(f"{key} is {text!r:.80}", where=where, allowed="a string")
    if not text.strip():
        raise InputError(f"the {key} is empty", where=where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{key} is {text!r:.80}", where=where, allowed="valid Unicode") from None
    return text


def _choices(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = entry.get("choices")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise InputError(f"choices is {given!r:.80}", where=where, allowed="a list of strings")
    names = [f"choice {number}" for number in range(1, len(given) + 1)]
    listed = dict(zip(names, given, strict=True))
    return tuple(_text(listed, name, where) for name in names)


def _check_choices(question: Question, where: str) -> None:
    choices = question.choices
    if not 2 <= len(choices) <= _MOST_CHOICES:
        raise InputError(
            f"the number of choices is {len(choices)}", where=where, allowed=f"2 to {_MOST_CHOICES}"
        )
    for choice in choices:
        if choices.count(choice) > 1:
            raise InputError(f"{choice!r} stands twice among the choices", where=where)
    if question.answer not in choices:
        near = did_you_mean(question.answer, choices)
        raise InputError(
            f"the answer {question.answer!r} is not among the choices{near}",
            where=where,
            allowed=", ".join(map(repr, choices)),
            fix="give the text of a choice, not its letter or number",
        )


def _llava_records(path: Path, media: Path) -> Iterator[Record]:
    for where, entry in json_entries(path):
        video, image = _visual(entry, media, where)
        turns = entry.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise InputError(
                f"conversations is {turns!r:.80}", where=where, allowed="a list of turns"
            )
        texts = [_turn(turn, number, where) for number, turn in enumerate(turns)]
        if len(texts) % 2:
            raise InputError("the last turn has no answer", where=where)
        if not (video or image) and any(_PLACEHOLDER.search(text) for text in texts[::2]):
            raise InputError(
                "the text is about a video or an image, the entry names none", where=where
            )
        asked = [_PLACEHOLDER.sub(" ", text).strip() for text in texts[::2]]
        if not all(asked):
            raise InputError("a question is empty", where=where)
        questions = [
            Question("", text, answer) for text, answer in zip(asked, texts[1::2], strict=True)
        ]
        yield Record(video, image, tuple(questions), where)


def _turn(turn: object, number: int, where: str) -> str:
    expected = ("human", "gpt")[number % 2]
    if not isinstance(turn, dict) or turn.get("from") != expected:
        raise InputError(
            f"turn {number + 1} is {turn!r:.80}",
            where=where,
            allowed='{"from": "human", "value": ...} and {"from": "gpt", "value": ...} in turn',
        )
    return _text(turn, "value", f"{where}, turn {number + 1}")


def _nextqa_records(path: Path, media: Path) -> Iterator[Record]:
    names = json_object(path.parent / _NEXTQA_MAP) or json_object(media / _NEXTQA_MAP)
    files: dict[str, Path] = {}
    doubtful: list[str] = []
    for where, row in csv_entries(path, _NEXTQA_COLUMNS):
        name = _text(row, "video", where)
        if name not in files:
            files[name] = _video_file([media / str(names.get(name, name)), media / name])
        choices = tuple(_text(row, key, where) for key in _NEXTQA_CHOICES)
        number = _text(row, "answer", where)
        if number not in map(str, range(len(choices))):
            raise InputError(
                f"answer is {number!r}", where=where, allowed="0 to 4, the number of a choice"
            )
        answer = choices[int(number)]
        if choices.count(answer) > 1:
            doubtful.append(where)
            continue
        # Wrong choices do repeat themselves in the published files, which does no harm.
        question = Question(row["type"], _text(row, "question", where), answer, choices)
        yield Record(files[name], None, (question,), where)
    if doubtful:
        _log.warning(
            "%d questions left out, as the right answer stands twice among their choices: %s",
            len(doubtful),
            ", ".join(doubtful[:5]) + (", ..." if len(doubtful) > 5 else ""),
        )


def _video_file(stems: Sequence[Path]) -> Path:
    """Return the first file that is there, under any suffix of videos."""
    files = [stem.with_name(stem.name + suffix) for stem in stems for suffix in _VIDEO_SUFFIXES]
    return next((file for file in files if os.path.isfile(file)), files[0])


_READERS: dict[str, Callable[[Path, Path], Iterator[Record]]] = {
    "jsonl": _plain_records,
    "llava": _llava_records,
    "nextqa": _nextqa_records,
}
LAYOUTS = (*_READERS, "hf")
