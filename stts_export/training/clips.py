"""Synthetic clips with questions whose answers are known by construction.

A clip is a value, made from its seed alone: objects with a colour, a shape, a path and a time on
screen, before a cluttered grey background that a camera may pan over and that a cut may replace.
`rendering` draws it at any size and at any times.

Three kinds of clips exist. `events` shows small objects that each flash up for one or two of the
frames that are sampled every half second. `motion` shows one small object that crosses part of the
frame, perhaps beside one that rests. `stills` shows large objects that stay. So what answers a
question about `events` or `motion` is brief and small, and lost where frames or windows are dropped
blindly, while any choice of windows serves for `stills`.

Objects live in image coordinates: the camera moves what is behind them, never them. Otherwise the
direction in which one moves would depend on what the question means, and an object could leave the
frame. For the same reason a cut replaces the background only.

Answers are balanced within each kind; no answer follows from the question alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.training.examples import Question

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (45, 170, 60),
    "blue": (45, 80, 220),
    "yellow": (230, 210, 45),
    "purple": (165, 60, 190),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
MAX_OBJECTS = 4
COUNTS = tuple(str(count) for count in range(1, MAX_OBJECTS + 1))

KINDS = ("stills", "events", "motion")
TYPES = ("colour", "count", "direction", "last", "order", "shape")
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "count": COUNTS,
    "direction": tuple(DIRECTIONS),
    "last": tuple(COLOURS),
    "order": tuple(COLOURS),
    "shape": SHAPES,
}
PHRASES: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is the {}?", "Which colour does the {} have?"),
    "count": ("How many objects are there?", "How many objects appear?"),
    "direction": ("Which direction does the {} move?", "Where does the {} move?"),
    "last": ("Which colour came last?", "What colour is the last object?"),
    "order": ("Which came first, {} or {}?", "Which appeared first, {} or {}?"),
    "shape": ("What shape is the {} object?", "Which shape does the {} object have?"),
}

FPS = 12
TOP_LEVEL = 2
# What follows has one entry per level. Durations are multiples of the 0.5 s between samples.
_DURATIONS: tuple[tuple[float, ...], ...] = (
    (2.0, 2.5, 3.0),
    (3.5, 4.0, 4.5),
    (5.0, 5.5, 6.0, 6.5),
)
_MOST_OBJECTS = (2, 3, MAX_OBJECTS)
_CLUTTER = ((2, 4), (4, 7), (7, 12))
_PANNED_SHARE = (0.0, 0.4, 0.6)
_PAN = (0.0, 0.05, 0.12)
_SHAKE = (0.0, 0.004, 0.008)
_CUT_SHARE = (0.0, 0.25, 0.5)
_TWO_CUTS_SHARE = 0.4
# At least the 0.5 s between samples, so that every event is in a sampled frame.
_EVENT_SECONDS = (0.5, 0.7)
_MOTION_SECONDS = ((1.5, 2.0), (2.0, 2.5), (2.0, 3.0))
_TRAVEL = ((0.48, 0.6), (0.4, 0.52), (0.32, 0.44))
_SAMPLE_FRAMES = FPS // 2
_SPLIT_STARTS = {"train": 0, "dev": 10**9, "test": 2 * 10**9}
_SPLIT_SIZE = 10**9


@dataclass(frozen=True)
class Thing:
    """One object; lengths in fractions of the frame's side, times in seconds."""

    colour: str
    shape: str
    rgb: tuple[int, int, int]
    """The colour as drawn, near the named one."""
    radius: float
    x: float
    y: float
    """Centre at `start`."""
    vx: float = 0.0
    vy: float = 0.0
    """Velocity per second; y points down."""
    start: float = 0.0
    end: float = float("inf")
    """On screen for start <= time < end."""


@dataclass(frozen=True)
class Shot:
    """What the camera sees behind the objects from one cut to the next."""

    start: float = 0.0
    """Seconds."""
    pan: tuple[float, float] = (0.0, 0.0)
    """Velocity of the camera, x and y in sides per second; the background goes the other way."""
    clutter: int = 0
    """Dull shapes per area of a frame."""


@dataclass(frozen=True)
class Clip:
    """A clip and every question that can be asked about it."""

    seed: int
    kind: str
    duration: float
    """Seconds, a multiple of one frame."""
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]
    shots: tuple[Shot, ...] = (Shot(),)
    """At least one; ascending from time 0."""
    shake: float = 0.0
    """Amplitude of the camera's shaking, in fractions of the side."""

    @property
    def frame_count(self) -> int:
        """Frames of the file at `FPS`."""
        return round(self.duration * FPS)

    @property
    def cuts(self) -> tuple[float, ...]:
        """Times in seconds from which another background is shown."""
        return tuple(shot.start for shot in self.shots[1:])

    def shot_at(self, time: float) -> int:
        """Return the index of the shot that is shown at a time in seconds."""
        return bisect_right(self.cuts, time)


def split_seed(split: str, index: int) -> int:
    """Return the seed of clip `index` of a split; splits never share a seed.

    Args:
        split: "train", "dev" or "test".
        index: 0 <= index < 10**9.

    Raises:
        InputError: an unknown split, or an index outside the range.
    """
    if split not in _SPLIT_STARTS:
        raise InputError(
            f"unknown split {split!r}", where="split_seed", allowed=" or ".join(_SPLIT_STARTS)
        )
    if not 0 <= index < _SPLIT_SIZE:
        raise InputError(
            f"clip index {index} is outside the split",
            where="split_seed",
            allowed=f"0 to {_SPLIT_SIZE - 1}",
        )
    return _SPLIT_STARTS[split] + index


def make_clip(seed: int, *, kind: str | None = None, level: int = TOP_LEVEL) -> Clip:
    """Make the clip that belongs to a seed.

    Args:
        seed: decides everything that is not fixed by the other arguments; 0 or more.
        kind: one of `KINDS`; drawn from the seed when None.
        level: difficulty 0..`TOP_LEVEL`: longer clips, more objects and clutter; from 1 on a share
            of the clips has a moving camera, and a share has cuts.

    Raises:
        InputError: an unknown kind or level.
    """
    makers = {"stills": _stills, "events": _events, "motion": _motion}
    if kind is not None and kind not in makers:
        raise InputError(f"unknown kind {kind!r}", where="make_clip", allowed=" or ".join(KINDS))
    if not 0 <= level <= TOP_LEVEL:
        raise InputError(f"level is {level}", where="make_clip", allowed=f"0 to {TOP_LEVEL}")
    rng = np.random.default_rng((seed, level))
    drawn = str(rng.choice(KINDS, p=(0.25, 0.35, 0.4)))
    kind = kind or drawn
    duration = float(rng.choice(_DURATIONS[level]))
    things, questions = makers[kind](rng, level, duration)
    shots, shake = _camera(rng, level, duration)
    return Clip(seed, kind, duration, tuple(things), tuple(questions), shots, shake)


def _camera(
    rng: np.random.Generator, level: int, duration: float
) -> tuple[tuple[Shot, ...], float]:
    """Draw the shots and the amplitude of the shaking."""
    panned = rng.random() < _PANNED_SHARE[level]
    low, high = _CLUTTER[level]
    shots = []
    for start in (0.0, *_cuts(rng, level, duration)):
        speed, angle = rng.uniform(0.4, 1.0) * _PAN[level], rng.uniform(0, 2 * np.pi)
        pan = (float(speed * np.cos(angle)), float(speed * np.sin(angle))) if panned else (0.0, 0.0)
        shots.append(Shot(start, pan, int(rng.integers(low, high + 1))))
    return tuple(shots), float(rng.uniform(0.5, 1.0) * _SHAKE[level]) if panned else 0.0


def _cuts(rng: np.random.Generator, level: int, duration: float) -> list[float]:
    """Draw cuts between samples, half a second from the ends and a second from each other."""
    if rng.random() >= _CUT_SHARE[level]:
        return []
    free = np.arange(_SAMPLE_FRAMES, round(duration * FPS) - _SAMPLE_FRAMES)
    free = free[free % _SAMPLE_FRAMES != 0]
    frames = [int(rng.choice(free))]
    free = free[np.abs(free - frames[0]) >= FPS]
    if rng.random() < _TWO_CUTS_SHARE and free.size:
        frames.append(int(rng.choice(free)))
    return sorted(frame / FPS for frame in frames)


def _colours(rng: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in rng.permutation(list(COLOURS))[:count]]


def _thing(
    rng: np.random.Generator,
    colour: str,
    shape: str,
    radius: float,
    at: tuple[float, float],
    move: tuple[float, float] = (0.0, 0.0),
    shown: tuple[float, float] = (0.0, float("inf")),
) -> Thing:
    shade = np.clip(np.array(COLOURS[colour]) + rng.integers(-14, 15, 3), 0, 255)
    rgb = (int(shade[0]), int(shade[1]), int(shade[2]))
    return Thing(colour, shape, rgb, radius, *at, *move, *shown)


def _cells(rng: np.random.Generator, count: int, radius: float) -> list[tuple[float, float]]:
    """Draw centres in different quadrants, so that objects never overlap."""
    slack = max(0.0, 0.24 - radius)
    centres = []
    for cell in rng.permutation(4)[:count]:
        dx, dy = rng.uniform(-slack, slack, 2)
        centres.append((0.25 + 0.5 * int(cell % 2) + dx, 0.25 + 0.5 * int(cell // 2) + dy))
    return centres


def _ask(rng: np.random.Generator, kind: str, answer: str, *words: str) -> Question:
    phrases = PHRASES[kind]
    return Question(kind, phrases[int(rng.integers(len(phrases)))].format(*words), answer)


def _identity_questions(rng: np.random.Generator, things: Sequence[Thing]) -> list[Question]:
    shapes = [thing.shape for thing in things]
    named = [thing for thing in things if shapes.count(thing.shape) == 1]
    return [
        *(_ask(rng, "colour", thing.colour, thing.shape) for thing in named),
        *(_ask(rng, "shape", thing.shape, thing.colour) for thing in things),
    ]


def _stills(
    rng: np.random.Generator, level: int, duration: float
) -> tuple[list[Thing], list[Question]]:
    """Large objects at rest; each is there throughout or comes and stays."""
    count = int(rng.integers(1, _MOST_OBJECTS[level] + 1))
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    if count > len(SHAPES):
        shapes.append(shapes[0])
    things = []
    for colour, shape, at in zip(
        _colours(rng, count), shapes, _cells(rng, count, 0.21), strict=False
    ):
        start = 0.0 if rng.random() < 0.5 else float(rng.uniform(0.0, duration - 1.0))
        radius = float(rng.uniform(0.18, 0.22))
        things.append(_thing(rng, colour, shape, radius, at, shown=(start, float("inf"))))
    questions = [_ask(rng, "count", str(count)), *_identity_questions(rng, things)]
    return things, questions


def _events(
    rng: np.random.Generator, level: int, duration: float
) -> tuple[list[Thing], list[Question]]:
    """Small objects that flash up one after the other."""
    count = int(rng.integers(1, _MOST_OBJECTS[level] + 1))
    lengths = rng.uniform(*_EVENT_SECONDS, count)
    # Cutting the free time at sorted random points makes all possible starts equally likely.
    starts = np.sort(rng.uniform(0.0, duration - lengths.sum(), count))
    starts += np.cumsum(lengths) - lengths
    things = []
    for colour, start, length in zip(_colours(rng, count), starts, lengths, strict=True):
        radius = float(rng.uniform(0.10, 0.15))
        x, y = (float(value) for value in rng.uniform(radius, 1 - radius, 2))
        shown = (float(start), float(start + length))
        things.append(_thing(rng, colour, str(rng.choice(SHAPES)), radius, (x, y), shown=shown))
    questions = [_ask(rng, "count", str(count)), _ask(rng, "last", things[-1].colour)]
    for first in range(count):
        for second in range(first + 1, count):
            pair = [things[first].colour, things[second].colour]
            mention = [pair[int(index)] for index in rng.permutation(2)]
            questions.append(_ask(rng, "order", pair[0], *mention))
    return things, questions


def _motion(
    rng: np.random.Generator, level: int, duration: float
) -> tuple[list[Thing], list[Question]]:
    """One small object that comes, moves and goes, and from level 1 on perhaps one that rests."""
    radius = float(rng.uniform(0.11, 0.14))
    travel = float(rng.uniform(*_TRAVEL[level]))
    possible: list[str] = []
    # From every start there is room for two directions or more, and one of them is drawn, so that a
    # start makes none of them likelier than one half.
    while len(possible) < 2:
        begin = rng.uniform(radius, 1 - radius, 2)
        possible = [
            name
            for name, sign in DIRECTIONS.items()
            if np.all(np.abs(begin + travel * np.array(sign) - 0.5) <= 0.5 - radius)
        ]
    direction = str(rng.choice(possible))
    way = travel * np.array(DIRECTIONS[direction])
    length = float(rng.uniform(*_MOTION_SECONDS[level]))
    start = float(rng.uniform(0.0, duration - length))
    colours = _colours(rng, 2)
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    at, move = (float(begin[0]), float(begin[1])), (float(way[0]), float(way[1]))
    speed = (move[0] / length, move[1] / length)
    mover = _thing(rng, colours[0], shapes[0], radius, at, speed, (start, start + length))
    things = [mover]
    if level > 0 and rng.random() < 0.5:
        rest = _resting_place(rng, begin, begin + way, radius)
        if rest is not None:
            things.append(_thing(rng, colours[1], shapes[1], rest[2], (rest[0], rest[1])))
    names = [mover.shape, f"{mover.colour} object", f"{mover.colour} {mover.shape}"]
    questions = [
        *(_ask(rng, "direction", direction, name) for name in (*names, "moving object")),
        _ask(rng, "colour", mover.colour, "moving object" if rng.random() < 0.5 else mover.shape),
        _ask(rng, "shape", mover.shape, "moving" if rng.random() < 0.5 else mover.colour),
    ]
    return things, questions


def _resting_place(
    rng: np.random.Generator, start: NDArray[np.float64], end: NDArray[np.float64], radius: float
) -> tuple[float, float, float] | None:
    """Find a place (x, y, radius) clear of a path, or None where a few tries find none."""
    for _ in range(20):
        own = float(rng.uniform(0.14, 0.18))
        x, y = rng.uniform(own, 1 - own, 2)
        nearest = np.clip((x, y), np.minimum(start, end), np.maximum(start, end))
        if np.abs(np.array((x, y)) - nearest).max() > 1.05 * (own + radius):
            return float(x), float(y), own
    return None
