"""What a model is asked when its accuracy is measured, and which answers are right.

An exam is a list of clips (or images, or nothing) with questions. It is drawn from the synthetic
clips, or read from a file of one's own.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stts_export.errors import InputError
from stts_export.runtime.arguments import as_integer
from stts_export.runtime.prompt import multiple_choice
from stts_export.training.clips import (
    KINDS,
    TOP_LEVEL,
    TYPES,
    Clip,
    make_clip,
    split_seed,
)
from stts_export.training.examples import Question
from stts_export.training.records import Record, read_records, share_visuals
from stts_export.training.rendering import write_mp4

SYNTHETIC = "synthetic"
SPLITS = ("test", "dev")
ALL = "all"
"""What stands beside the types of questions for all of them."""
QUESTIONS, CLIPS = 500, 250
"""How many questions a synthetic exam has, and of how many clips, unless asked otherwise."""

_SEEDS = 10**4
_MOST_CLIPS = 25_000
_CANDIDATES = 4
"""Clips of which one is taken: a clip of few objects can be asked little but how many there are."""
_PROBES = 32
"""Clips of each kind from which is learnt what can be asked of it."""


@dataclass(frozen=True)
class Asked:
    """A clip, an image or nothing, and the questions about it that count."""

    name: str
    """For messages."""
    seed: int
    """Of what chance decides about it; its own among all of the exam."""
    source: Clip | Path | None
    """A synthetic clip, a file of a video or an image, or None for text alone."""
    questions: tuple[Question, ...]
    is_image: bool = False
    """The file has to be an image, otherwise a video."""

    def file(self, folder: Path) -> Path | None:
        """Return the file to read, written into `folder` as H.264 if the clip is synthetic."""
        if not isinstance(self.source, Clip):
            return self.source
        path = folder / "clip.mp4"
        write_mp4(self.source, path)
        return path


@dataclass(frozen=True)
class Exam:
    """Questions about clips."""

    data: str
    """`SYNTHETIC`, or the file."""
    items: tuple[Asked, ...]
    seed: int
    chance: dict[str, float]
    """Share of right answers of who guesses among the possible ones, by type; without the types
    that have open answers."""
    split: str | None = None
    """Of the synthetic clips."""
    level: int | None = None
    """Difficulty of the synthetic clips."""

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the questions, in order."""
        return tuple(sorted({question.type for question in self.questions()} - {""}))

    def questions(self) -> Iterator[Question]:
        """All questions in order."""
        return (question for item in self.items for question in item.questions)


def prompt_of(question: Question) -> str:
    """Word a question: one with choices as the model's evaluations word those."""
    if question.choices:
        return multiple_choice(question.text, question.choices)
    return question.text


def right_answers(question: Question) -> tuple[str, ...]:
    """Return the texts that count as right.

    The answer; of a question with choices also its letter, and both together ("B. red").
    """
    if not question.choices:
        return (question.answer,)
    letter = string.ascii_uppercase[question.choices.index(question.answer)]
    return letter, question.answer, f"{letter}. {question.answer}"


def is_right(question: Question, text: str) -> bool:
    """Whether an answer is one of `right_answers`.

    Case, space around it and full stops at its end do not count.
    """
    return _plain(text) in map(_plain, right_answers(question))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").rstrip().casefold()


def synthetic_exam(
    questions: int = QUESTIONS,
    clips: int = CLIPS,
    *,
    seed: int = 0,
    split: str = "test",
    level: int = TOP_LEVEL,
) -> Exam:
    """Choose synthetic clips and questions, about equally many of each type and answer.

    Which kind of clip a type is asked of is learnt from the clips themselves; a type that several
    kinds are asked is asked of each in turn. Of a few clips of that kind the one is taken whose
    questions and answers are rarest so far, so that no answer is a good guess.

    Args:
        questions: how many in total.
        clips: how many different clips; fewer where there are fewer questions.
        seed: of 0..9999; exams of different seeds have no clip in common.
        split: "test", which nothing may be tuned on, or "dev".
        level: difficulty of the clips.

    Raises:
        InputError: an argument is out of range, or the clips have not as many questions.
    """
    questions, clips = as_integer(questions, "questions"), as_integer(clips, "clips")
    for name, value, most in (("seed", seed, _SEEDS - 1), ("level", level, TOP_LEVEL)):
        if as_integer(value, name, least=0) > most:
            raise InputError(f"{name} is {value}", where=name, allowed=f"0..{most}")
    if clips > _MOST_CLIPS:
        raise InputError(f"clips is {clips}", where="clips", allowed=f"up to {_MOST_CLIPS}")
    if split not in SPLITS:
        raise InputError(f"split {split!r}", where="data", allowed=" or ".join(SPLITS))
    clips = min(clips, questions)
    balance = _Balance()
    led: Counter[tuple[str, str]] = Counter()
    chosen: list[Clip] = []
    for index in range(clips):
        kind = _next_kind(balance.asked, led, level)
        start = (seed * _MOST_CLIPS + index) * _CANDIDATES
        candidates = [
            make_clip(split_seed(split, number), kind=kind, level=level)
            for number in range(start, start + _CANDIDATES)
        ]
        share = -(-(questions - balance.total) // (clips - index))
        clip = min(candidates, key=lambda one: balance.cost(one.questions, share))
        balance.add(clip.questions, clip.seed, share)
        chosen.append(clip)
    picked = balance.filled(questions)
    items = (
        Asked(f"{split} clip {clip.seed}", clip.seed, clip, own)
        for clip, own in zip(chosen, picked, strict=True)
    )
    return Exam(SYNTHETIC, tuple(items), seed, _synthetic_chance(level), split, level)


def file_exam(
    path: str | Path,
    *,
    layout: str | None = None,
    media: Path | None = None,
    split: str | None = None,
    allow_missing: int = 0,
    questions: int | None = None,
    clips: int | None = None,
    seed: int = 0,
) -> Exam:
    """Read an exam from a file of questions.

    Args:
        path: as for `records.read_records`, and so are the next four.
        layout: of the file; told from it when None.
        media: folder of the videos and images; the file's own when None.
        split: of a Hugging Face dataset.
        allow_missing: how many videos and images may be missing; they are left out.
        questions: how many to ask, about equally many of each type and answer; all when None.
        clips: how many videos, images and questions without any to draw; all when None.
        seed: decides which.

    Raises:
        InputError: as `read_records`, or the file has not as many.
        MissingDependencyError: as `read_records`.
    """
    seed = as_integer(seed, "seed", least=0)
    records = share_visuals(
        read_records(path, layout, media=media, split=split, allow_missing=allow_missing)
    )
    order: list[int] = np.random.default_rng((seed, 23)).permutation(len(records)).tolist()
    if clips is not None:
        if as_integer(clips, "clips") > len(records):
            raise InputError(f"has {len(records)} clips, not {clips}", where=str(path))
        order = order[:clips]
    picked = [records[number].questions for number in order]
    if questions is not None:
        balance = _Balance()
        for number, pool in zip(order, picked, strict=True):
            balance.add(pool, number, 0)
        picked = balance.filled(as_integer(questions, "questions"))
    drawn = sorted(zip(order, picked, strict=True), key=lambda pair: pair[0])
    items = tuple(_item(records[number], number, own) for number, own in drawn if own)
    if any(question.type == ALL for item in items for question in item.questions):
        raise InputError(f"a question has the type {ALL!r}", where=str(path), fix="rename it")
    return Exam(str(path), items, seed, _chance_of_choices(items))


def _item(record: Record, number: int, questions: tuple[Question, ...]) -> Asked:
    return Asked(record.name, number, record.visual, questions, record.image is not None)


class _Balance:
    """Takes questions so that every type, and every answer of it, comes about equally often."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._left: list[list[Question]] = []
        self._taken: list[list[Question]] = []

    @property
    def total(self) -> int:
        """Questions that were taken."""
        return sum(self.asked.values())

    def cost(self, questions: Sequence[Question], share: int) -> float:
        """How common the rarest `share` of some questions are; infinite where there are less."""
        if len(questions) < share:
            return float("inf")
        return sum(sorted(sum(self._rarity(question)) for question in questions)[:share])

    def _rarity(self, question: Question) -> tuple[int, int]:
        """How often its type was asked, and its answer times the number of known answers."""
        answers = self._answers[question.type]
        return self.asked[question.type], answers[question.answer] * len(answers)

    def add(self, questions: Sequence[Question], seed: int, share: int) -> None:
        """Add a clip, and take up to `share` of its questions."""
        order = np.random.default_rng((seed, 17)).permutation(len(questions))
        self._left.append([questions[int(number)] for number in order])
        self._taken.append([])
        self._take(len(self._left) - 1, share)

    def _take(self, clip: int, share: int) -> None:
        left = self._left[clip]
        for _ in range(min(share, len(left))):
            rarest = min(left, key=self._rarity)
            left.remove(rarest)
            self._taken[clip].append(rarest)
            self.asked[rarest.type] += 1
            self._answers[rarest.type][rarest.answer] += 1

    def filled(self, total: int) -> list[tuple[Question, ...]]:
        """Take what is missing to `total`; returns the questions of each clip.

        Raises:
            InputError: there are not as many.
        """
        while self.total < total:
            clips = [clip for clip, left in enumerate(self._left) if left]
            if not clips:
                raise InputError(
                    f"{len(self._left)} clips have {self.total} questions, not {total}",
                    where="evaluate",
                    fix="ask for more clips or fewer questions",
                )
            for number, clip in enumerate(clips):
                self._take(clip, -(-(total - self.total) // (len(clips) - number)))
        return [tuple(taken) for taken in self._taken]


def _next_kind(asked: Counter[str], led: Counter[tuple[str, str]], level: int) -> str:
    """Return the kind to ask the rarest type of: the one that was chosen for it least often."""
    offered = _offered(level)
    possible = [kind for kind in TYPES if any(kind in answers for answers in offered.values())]
    rarest = min(possible, key=lambda name: asked[name])
    kinds = [kind for kind in KINDS if rarest in offered[kind]]
    kind = min(kinds, key=lambda name: led[rarest, name])
    led[rarest, kind] += 1
    return kind


@cache
def _offered(level: int) -> dict[str, dict[str, frozenset[str]]]:
    """Kind of clip -> type of question -> answers that were seen."""
    offered: dict[str, dict[str, frozenset[str]]] = {kind: {} for kind in KINDS}
    for kind, types in offered.items():
        for index in range(_PROBES):
            for question in make_clip(split_seed("train", index), kind=kind, level=level).questions:
                answers = types.get(question.type, frozenset())
                types[question.type] = answers | {question.answer}
    return offered


def _synthetic_chance(level: int) -> dict[str, float]:
    answers: dict[str, frozenset[str]] = {}
    for types in _offered(level).values():
        for name, seen in types.items():
            answers[name] = answers.get(name, frozenset()) | seen
    # Order names the two colours that it is between.
    return {name: 1 / (2 if name == "order" else len(seen)) for name, seen in answers.items()}


def _chance_of_choices(items: Sequence[Asked]) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for item in items:
        for question in item.questions:
            share = 1 / len(question.choices) if question.choices else np.nan
            shares.setdefault(question.type, []).append(share)
    means = {name: float(np.mean(values)) for name, values in shares.items() if name}
    return {name: mean for name, mean in means.items() if np.isfinite(mean)}
