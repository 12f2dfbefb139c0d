"""How often a model answers right, with the windows it chooses and with those of other selectors.

Synthetic clips are written as H.264 files and go through the same decoding and sampling as any
user's video. A question with choices is asked in the form of Molmo2's evaluations, and its letter
or the text of the right choice counts; an open answer counts when it is the expected text. Case,
space around an answer and full stops at its end do not count.

Every selector and ratio answers the same questions about the same clips, so rows can be compared
question by question (`marks`). Intervals are for one row alone, and take questions about one clip
as independent.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from stts_export.errors import InputError
from stts_export.progress import Progress
from stts_export.runtime.arguments import as_integer
from stts_export.runtime.demux import UnreliableTimesError
from stts_export.runtime.planner import n_prune
from stts_export.runtime.video import VideoClip
from stts_export.runtime.visuals import Encoded
from stts_export.training.answerers import Answerer, encode
from stts_export.training.exam import ALL, Asked, Exam, is_right, prompt_of, right_answers
from stts_export.training.examples import Question
from stts_export.training.selectors import SELECTORS, STTS, check_selectors

RATIOS = (0.0, 0.3, 0.5, 0.7, 0.8)
ALL_WINDOWS = "all windows"
"""Name of what keeps everything, in place of a selector's."""
BROKEN_SHARE = 0.01
"""Of the clips that may be broken unless told otherwise."""

_NORMAL_95 = 1.959964
_ENDING_TOKENS = 3
"""Room for space, a full stop and the end behind an answer: what goes on longer is wrong."""
_NAMED = 5

Setting = tuple[float, str]
"""Prune ratio and selector."""


def evaluate(
    answerer: Answerer,
    exam: Exam,
    *,
    ratios: Sequence[float] = RATIOS,
    selectors: Sequence[str] = SELECTORS,
    max_broken: int | None = None,
) -> dict[str, Any]:
    """Measure accuracy.

    Args:
        answerer: from `open_answerer`.
        exam: from `synthetic_exam` or `file_exam`.
        ratios: fractions of windows to remove; at 0 nothing is to be selected, so there is one
            row.
        selectors: of `SELECTORS`.
        max_broken: clips that may be unreadable; they and their questions are left out. One in a
            hundred of a file when None, so none of fewer.

    Returns:
        Plain values for JSON: `data`, `split`, `level` (of synthetic clips), `seed`, `clips` and
        `questions` by type and `all`, without broken ones; `chance` by type; `max_broken`, and
        `broken` with name and reason; `max_frames`; what the answerer says of itself; and `rows`:
        `prune_ratio`, `selector`, `kept_windows` and `total_windows` of all videos, `right`,
        `accuracy` and `interval` (95 %, Wilson) by type and `all`, and `marks`, a character per
        question in the exam's order: 1 right, 0 wrong.

    Raises:
        InputError: an unknown selector, or one that the model cannot do; a ratio outside the
            limits; too many clips are broken; or a prompt does not fit the model.
    """
    settings = _settings(answerer, ratios, selectors)
    if max_broken is None:
        max_broken = 0 if exam.split else int(BROKEN_SHARE * len(exam.items))
    broken = _Broken(as_integer(max_broken, "max_broken", least=0), exam)
    rows = {setting: _Row() for setting in settings}
    asked: list[Question] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress("evaluate", len(exam.items), "clips") as progress,
    ):
        for done, item in enumerate(exam.items, start=1):
            try:
                clip = _read(answerer, item, Path(folder))
            except (InputError, av.FFmpegError, OSError, UnreliableTimesError) as error:
                broken.add(item.name, error)
            else:
                _ask(answerer, exam.seed, item, clip, rows)
                asked += item.questions
            progress.update(done)
    if not asked:
        raise broken.error()
    types = Counter(question.type for question in asked)
    return {
        "data": exam.data,
        "split": exam.split,
        "level": exam.level,
        "seed": exam.seed,
        "clips": len(exam.items) - len(broken.found),
        "questions": {kind: types[kind] for kind in exam.types} | {ALL: len(asked)},
        "chance": exam.chance,
        "max_broken": broken.most,
        "broken": broken.found,
        "max_frames": answerer.max_frames,
        **answerer.description,
        "rows": [row.values(setting, asked, exam.types) for setting, row in rows.items()],
    }


def _settings(
    answerer: Answerer, ratios: Sequence[float], selectors: Sequence[str]
) -> list[Setting]:
    """Check what is asked for, and return all rows in order."""
    selectors = check_selectors(selectors)
    if not ratios:
        raise InputError("no prune ratio", where="prune_ratio", allowed="0,0.5,0.8")
    settings: list[Setting] = []
    for ratio in dict.fromkeys(ratios):
        n_prune(answerer.config.vision.windows, 1, ratio)
        answerer.check_ratio(ratio)
        settings += [(ratio, name) for name in (selectors if ratio > 0 else (ALL_WINDOWS,))]
    if (STTS in {name for _, name in settings}) and answerer.config.vision.pruning is None:
        raise InputError(
            "the model has no scorer, so it cannot choose windows",
            where=f"selector {STTS}",
            allowed=" or ".join(name for name in SELECTORS if name != STTS),
        )
    return settings


class _Broken:
    """Counts clips that cannot be read.

    Args:
        most: how many there may be.
        exam: that they are of.
    """

    def __init__(self, most: int, exam: Exam) -> None:
        self.most = most
        self._exam = exam
        self.found: list[dict[str, str]] = []
        """Name and reason of each."""

    def add(self, name: str, error: Exception) -> None:
        """Count one.

        Raises:
            InputError: it is one too many.
        """
        reason = str(error)
        if isinstance(error, InputError):
            reason = f"{error.where}: {error.message}" if error.where else error.message
        self.found.append({"name": name, "reason": reason})
        if len(self.found) > self.most:
            raise self.error()

    def error(self) -> InputError:
        """Return what ends it all."""
        named = "; ".join(f"{one['name']}: {one['reason']}" for one in self.found[:_NAMED])
        return InputError(
            f"{len(self.found)} of {len(self._exam.items)} clips cannot be read: {named}",
            where=self._exam.data,
            allowed=f"{self.most} broken clips, and one that is not",
            fix="repair the files, or allow more with --max-broken",
        )


def _read(answerer: Answerer, item: Asked, folder: Path) -> VideoClip | None:
    """Read what an item is about; None for text alone."""
    file = item.file(folder)
    if file is None:
        return None
    clip = answerer.read(file)
    if item.is_image and not clip.is_image:
        raise InputError("is a video", where=str(file), allowed="an image")
    return clip


@dataclass
class _Row:
    """What one setting has answered so far."""

    kept: int = 0
    total: int = 0
    marks: list[bool] = field(default_factory=list)

    def values(
        self, setting: Setting, asked: Sequence[Question], types: Sequence[str]
    ) -> dict[str, Any]:
        """Sum up for JSON."""
        right = Counter(q.type for q, mark in zip(asked, self.marks, strict=True) if mark)
        counts = Counter(question.type for question in asked)
        right[ALL], counts[ALL] = sum(self.marks), len(asked)
        known = [kind for kind in (*types, ALL) if counts[kind]]
        return {
            "prune_ratio": setting[0],
            "selector": setting[1],
            "kept_windows": self.kept,
            "total_windows": self.total,
            "accuracy": {kind: right[kind] / counts[kind] for kind in known},
            "interval": {kind: list(wilson(right[kind], counts[kind])) for kind in known},
            "right": {kind: right[kind] for kind in (*types, ALL)},
            "marks": "".join("01"[mark] for mark in self.marks),
        }


def _ask(
    answerer: Answerer,
    seed: int,
    item: Asked,
    clip: VideoClip | None,
    rows: dict[Setting, _Row],
) -> None:
    """Ask all questions about one clip in every setting."""
    if clip is None or clip.is_image:  # nothing can be removed: one answer for all
        marks = _marks(answerer, None if clip is None else answerer.image(clip), item.questions)
        for row in rows.values():
            row.marks += marks
        return
    tower = answerer.tower(clip)
    known: dict[Setting, list[bool]] = {}
    for (ratio, selector), row in rows.items():
        # Afresh for each, so that what is kept at a high ratio is kept at a lower one too.
        rng = np.random.default_rng((seed, item.seed, 19))
        encoded = encode(tower, clip.timestamps, ratio, selector, rng)
        # A clip so short that nothing is removed has one answer.
        same = (0.0, ALL_WINDOWS) if encoded.keep.all() else (ratio, selector)
        if same not in known:
            known[same] = _marks(answerer, encoded, item.questions)
        row.marks += known[same]
        row.kept += encoded.kept_windows
        row.total += encoded.total_windows


def _marks(
    answerer: Answerer, encoded: Encoded | None, questions: Sequence[Question]
) -> list[bool]:
    """Whether each question is answered right."""
    prompts = [prompt_of(question) for question in questions]
    limits = [_tokens_of_answer(answerer, question) for question in questions]
    answers = answerer.answers(encoded, prompts, limits)
    return [is_right(*pair) for pair in zip(questions, answers, strict=True)]


def _tokens_of_answer(answerer: Answerer, question: Question) -> int:
    encoded = (
        answerer.prompts.tokenizer.encode(text, add_special_tokens=False)
        for text in right_answers(question)
    )
    return max(len(text.ids) for text in encoded) + _ENDING_TOKENS


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927.

    Args:
        right: how many of them, 0 <= right <= total.
        total: 1 or more.
    """
    share, square = right / total, _NORMAL_95**2 / total
    centre = share + square / 2
    reach = math.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (centre - reach) / (1 + square), (centre + reach) / (1 + square)
    return max(0.0, low), min(1.0, high)


def table(results: dict[str, Any]) -> str:
    """Lay out the result of `evaluate` as text: accuracies, and 95 % intervals of all together."""
    types = [kind for kind in results["questions"] if kind != ALL]
    rows = results["rows"]
    kept = [f"{row['kept_windows']}/{row['total_windows']}" for row in rows]
    name_width = max(map(len, [*(row["selector"] for row in rows), "questions"]))
    kept_width = max(map(len, [*kept, "kept"]))

    def line(ratio: str, name: str, count: str, cells: Iterable[str], last: str = "") -> str:
        start = f"{ratio:>5}  {name:<{name_width}}  {count:>{kept_width}}"
        return start + "".join(f"{cell:>11}" for cell in cells) + last

    lines = [line("ratio", "windows", "kept", [*types, ALL], "  95 % of all")]
    for row, count in zip(rows, kept, strict=True):
        accuracy = row["accuracy"]
        cells = [f"{accuracy[kind]:.3f}" if kind in accuracy else "-" for kind in [*types, ALL]]
        low, high = row["interval"][ALL]
        interval = f"  {low:.3f} .. {high:.3f}"
        lines.append(line(f"{row['prune_ratio']:.2f}", row["selector"], count, cells, interval))
    chance, asked = results["chance"], results["questions"]
    guesses = [f"{chance[kind]:.3f}" if kind in chance else "-" for kind in types]
    lines.append(line("", "chance", "", guesses))
    lines.append(line("", "questions", "", [str(asked[kind]) for kind in [*types, ALL]]))
    lines += [f"broken: {one['name']}: {one['reason']}" for one in results["broken"]]
    return "\n".join(line.rstrip() for line in lines)
