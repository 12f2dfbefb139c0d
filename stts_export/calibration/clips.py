"""Clips that scales come from, and held-out clips that gates are measured on.

A set is described by a YAML file, or is a folder of videos. The file lists clips, or says how many
synthetic ones to draw:

    schema: 1
    name: cameras
    calibration:
      - {video: yard/001.mp4, prompt: How many people are there?}
    held_out:
      - {video: yard/002.mp4, prompt: How many people are there?}

    schema: 1
    name: synthetic
    generate: {seed: 0, calibration: 24, held_out: 12, level: 2}

No video is in a set twice: gates on clips that the scales were fitted to would say too little, and
a clip that counts twice tells nothing new.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stts_export._version import __version__
from stts_export.bundle import sha256
from stts_export.calibration.plain_values import read_section, read_yaml
from stts_export.errors import InputError
from stts_export.files import json_object, write_json
from stts_export.training.clips import TOP_LEVEL, Clip, make_clip, split_seed
from stts_export.training.exam import prompt_of
from stts_export.training.examples import Question
from stts_export.training.rendering import write_mp4

SCHEMA = 1
DEFAULT_SET = Path(__file__).parent / "clip_sets" / "default.yaml"
DEFAULT_PROMPT = "What happens in the video?"
"""About the videos of a folder."""
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""Other files of a folder are passed over."""

OnProgress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""

_ALLOWED = "a folder of videos, or a YAML file that describes clips"
_SPLITS = {"calibration": "train", "held_out": "dev"}
"""Of the synthetic clips; those of "test" are for final results alone."""
_MOST_SEEDS = 10**4
_MOST_CLIPS = 10**4
_EVERY = 3
"""One of so many videos of a folder is held out."""
_LEAST_SIDE = 240
"""Pixels of a synthetic clip; larger models get larger files, so that nothing is scaled up."""


@dataclass(frozen=True)
class CalibrationClip:
    """A video and what is asked about it."""

    video: Path
    prompt: str
    name: str
    """For messages and reports."""
    sha256: str
    """Of the file; of a synthetic clip, of all that decides what is drawn."""


@dataclass(frozen=True)
class ClipSet:
    """Clips in order; no video is there twice."""

    name: str
    calibration: tuple[CalibrationClip, ...]
    held_out: tuple[CalibrationClip, ...]
    """Nothing may be fitted to these."""

    def digest(self) -> str:
        """Return a SHA-256 of videos and prompts, whatever the files are called."""
        content = [
            [[clip.sha256, clip.prompt] for clip in clips]
            for clips in (self.calibration, self.held_out)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class _ListedClip:
    """A clip of a description."""

    video: str
    prompt: str

    def __post_init__(self) -> None:
        for key in ("video", "prompt"):
            if not getattr(self, key).strip():
                raise InputError("is empty", where=key)


@dataclass(frozen=True)
class _Generate:
    """Synthetic clips of a description."""

    seed: int
    calibration: int
    held_out: int
    level: int

    def __post_init__(self) -> None:
        most = {"seed": _MOST_SEEDS - 1, "level": TOP_LEVEL} | dict.fromkeys(_SPLITS, _MOST_CLIPS)
        for key, limit in most.items():
            if not 0 <= getattr(self, key) <= limit:
                raise InputError(
                    f"is {getattr(self, key)}", where=key, allowed=f"an integer, 0 to {limit}"
                )


@dataclass(frozen=True)
class _SetFile:
    """A description as it is written."""

    schema: int
    name: str
    calibration: tuple[_ListedClip, ...] | None = None
    held_out: tuple[_ListedClip, ...] | None = None
    generate: _Generate | None = None

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise InputError(f"is {self.schema}", where="schema", allowed=f"{SCHEMA}, the only one")
        listed = [key for key in _SPLITS if getattr(self, key) is not None]
        if (self.generate is not None) == bool(listed):
            raise InputError(
                f"has generate and {listed[0]}" if listed else "names no clips",
                allowed="either generate, or calibration and held_out",
            )


@dataclass(frozen=True)
class _Entry:
    """A clip whose file has not been looked at."""

    video: Path
    prompt: str
    name: str
    where: str
    """Where it is named."""
    drawn: Clip | None = None
    """What the file is to show; None for a file that is not ours to write."""


@dataclass(frozen=True)
class _Description:
    """What a set is to have."""

    where: str
    """For messages."""
    name: str
    calibration: tuple[_Entry, ...]
    held_out: tuple[_Entry, ...]


def open_clip_set(
    clips: Path | None,
    cache: Path,
    *,
    needs_calibration: int,
    needs_held_out: int,
    image_size: int,
    on_progress: OnProgress | None = None,
) -> ClipSet:
    """Find the clips of a set, and draw those that are synthetic.

    Args:
        clips: a description in YAML, a folder of videos, of which every third in the order of
            their names is held out, or None for synthetic clips (`DEFAULT_SET`).
        cache: folder where synthetic clips are kept from one call to the next.
        needs_calibration: clips that the recipe asks for at least.
        needs_held_out: the same, held out.
        image_size: longer side of the model's frames in pixels, for synthetic clips.
        on_progress: called after every clip that is written or read.

    Raises:
        InputError: there are too few clips, a file is missing or there twice, or the description
            is not valid. Whether a video can be decoded shows when it is read.
    """
    side = max(_LEAST_SIDE, image_size + image_size % 2)
    described = _checked(clips, cache, side, needs_calibration, needs_held_out)
    entries = (*described.calibration, *described.held_out)
    found = []
    for done, entry in enumerate(entries, start=1):
        if entry.drawn is None:
            digest = _hashed(entry.video)
        else:
            _write(entry, cache, side)
            # Not of the file: what an encoder makes of the same frames differs from run to run.
            digest = hashlib.sha256(entry.video.name.encode()).hexdigest()
        found.append(CalibrationClip(entry.video, entry.prompt, entry.name, digest))
        if on_progress is not None:
            on_progress(done, len(entries))
    fitted = len(described.calibration)
    chosen = ClipSet(described.name, tuple(found[:fitted]), tuple(found[fitted:]))
    _check_distinct(chosen, described.where)
    return chosen


def check_clip_set(clips: Path | None, *, needs_calibration: int, needs_held_out: int) -> None:
    """Find out whether a set is there, and large enough, without reading a video.

    Args and errors as `open_clip_set`.
    """
    _checked(clips, Path(), _LEAST_SIDE, needs_calibration, needs_held_out)


def _checked(
    clips: Path | None, cache: Path, side: int, needs_calibration: int, needs_held_out: int
) -> _Description:
    """What is said of a set, all of whose files are there."""
    path = DEFAULT_SET if clips is None else clips
    if path.is_dir():
        described = _folder(path)
    elif path.is_file():
        described = _described(path, cache, side)
    else:
        raise InputError("there is no such file or folder", where=str(path), allowed=_ALLOWED)
    _check_enough(described, needs_calibration, needs_held_out, is_default=clips is None)
    _check_present((*described.calibration, *described.held_out))
    return described


def _folder(folder: Path) -> _Description:
    """Describe the videos of a folder."""
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in VIDEO_SUFFIXES and file.name[0] != "." and not file.is_dir()
    )
    if not files:
        raise InputError(
            "there is no video in the folder",
            where=str(folder),
            allowed=f"files that end in {', '.join(VIDEO_SUFFIXES)}",
        )
    entries = [_Entry(file, DEFAULT_PROMPT, file.name, str(folder)) for file in files]
    held_out = entries[_EVERY - 1 :: _EVERY]
    fitted = tuple(entry for entry in entries if entry not in held_out)
    return _Description(str(folder), folder.resolve().name, fitted, tuple(held_out))


def _described(path: Path, cache: Path, side: int) -> _Description:
    """Check a description and take it apart."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError("is a file of another kind", where=str(path), allowed=_ALLOWED)
    values, source = read_yaml(path)
    description: _SetFile = read_section(_SetFile, values, source)
    groups = []
    for key, split in _SPLITS.items():
        if description.generate is not None:
            groups.append(_drawn(description.generate, key, split, cache, side))
            continue
        listed: tuple[_ListedClip, ...] | None = getattr(description, key)
        groups.append(
            tuple(
                _Entry(path.parent / one.video, one.prompt, one.video, source.place((key, number)))
                for number, one in enumerate(listed or ())
            )
        )
    return _Description(str(path), description.name, *groups)


def _drawn(settings: _Generate, key: str, split: str, cache: Path, side: int) -> tuple[_Entry, ...]:
    """Choose synthetic clips; sets of different seeds have none in common."""
    start = settings.seed * _MOST_CLIPS
    indices = range(start, start + getattr(settings, key))
    clips = (make_clip(split_seed(split, index), level=settings.level) for index in indices)
    entries = []
    for clip, question in _asked(clips):
        name = f"{split} clip {clip.seed}"
        entries.append(_Entry(cache / _file_name(clip, side), prompt_of(question), name, "", clip))
    return tuple(entries)


def _asked(clips: Iterable[Clip]) -> list[tuple[Clip, Question]]:
    """Choose a question about each clip, so that all types are asked about equally often."""
    asked: Counter[str] = Counter()
    chosen = []
    for clip in clips:
        question = min(clip.questions, key=lambda one: asked[one.type])
        asked[question.type] += 1
        chosen.append((clip, question))
    return chosen


def _file_name(clip: Clip, side: int) -> str:
    """Name a file after everything that decides what is in it."""
    made_from = hashlib.sha256(f"{clip!r} {side} {__version__}".encode()).hexdigest()
    return f"clip-{clip.seed}-{made_from[:12]}.mp4"


def _write(entry: _Entry, cache: Path, side: int) -> None:
    """Write a synthetic clip unless it is there as it was written."""
    assert entry.drawn is not None
    listing, known = cache / "clips.json", {}
    with suppress(InputError):  # a damaged listing costs some time, no more
        known = json_object(listing)
    name = entry.video.name
    if name in known and entry.video.is_file() and sha256(entry.video) == known[name]:
        return
    cache.mkdir(parents=True, exist_ok=True)
    # FFmpeg tells the container from the name, so the file cannot be written as `.partial`.
    with tempfile.TemporaryDirectory(dir=cache, prefix="writing-") as folder:
        file = Path(folder) / name
        write_mp4(entry.drawn, file, size=side)
        digest = sha256(file)
        os.replace(file, entry.video)
    write_json(listing, {**known, name: digest})


def _hashed(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror}", where=str(file)) from None


def _check_enough(
    described: _Description, needs_calibration: int, needs_held_out: int, *, is_default: bool
) -> None:
    """Refuse a set that is smaller than the recipe asks for."""
    if is_default:
        fix = "name more clips of your own with --clips, or a copy of this file with more of them"
    elif Path(described.where).is_dir():
        fix = f"add videos; every {_EVERY}rd one in the order of their names is held out"
    else:
        fix = "add clips to the description"
    for what, entries, least in (
        ("to calibrate on", described.calibration, needs_calibration),
        ("held out for the gates", described.held_out, needs_held_out),
    ):
        if len(entries) < least:
            raise InputError(
                f"too few clips {what}: {len(entries)}",
                where=described.where,
                allowed=f"{least} or more: the recipe asks for at least {least}",
                fix=fix,
            )


def _check_present(entries: Sequence[_Entry]) -> None:
    """Refuse a set with files that are not there, before any of them is read."""
    missing = [entry for entry in entries if entry.drawn is None and not entry.video.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(entries)} videos are missing; first {missing[0].video}",
            where=missing[0].where,
            fix="correct the paths; relative ones start at the folder of the description",
        )


def _check_distinct(clips: ClipSet, where: str) -> None:
    """Refuse a video that is there twice, whatever its name."""
    seen: dict[str, str] = {}
    for role, group in (("calibration", clips.calibration), ("held-out", clips.held_out)):
        for clip in group:
            own = f"{role} clip {clip.name}"
            if clip.sha256 in seen:
                raise InputError(
                    f"{own} is the same video as {seen[clip.sha256]}",
                    where=where,
                    allowed="every video once: held-out clips must be new, and one that counts "
                    "twice adds nothing",
                    fix="take one of them out",
                )
            seen[clip.sha256] = own
