"""Synthetic clips with questions whose answers are known by construction.

A clip is a value: objects with a colour, a shape, a path and a time on screen, before a cluttered
grey background. It is drawn at any size and at any times, so training draws only the sampled frames
at model size, while tests and the demo write every frame of it into a real H.264 file.

Three kinds of clips exist. `stills` shows objects that rest, `events` shows objects that each
appear for about a second, and `motion` shows one object that moves beside one that may rest.
Answers are balanced within each kind; no answer follows from the question or the start alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

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
TYPES = ("colour", "count", "direction", "order", "shape")
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "count": COUNTS,
    "direction": tuple(DIRECTIONS),
    "order": tuple(COLOURS),
    "shape": SHAPES,
}
PHRASES: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is the {}?", "Which colour does the {} have?"),
    "count": ("How many objects are there?", "How many objects appear?"),
    "direction": ("Which direction does the {} move?", "Where does the {} move?"),
    "order": ("Which came first, {} or {}?", "Which appeared first, {} or {}?"),
    "shape": ("What shape is the {} object?", "Which shape does the {} object have?"),
}

FPS = 12
TOP_LEVEL = 2
_DURATIONS: tuple[tuple[float, ...], ...] = ((1.5, 2.0), (2.0, 2.5, 3.0), (3.5, 4.0, 4.5))
_MOST_OBJECTS = (2, 3, MAX_OBJECTS)
# At the top level about half of the way that is free, so that most starts allow two directions.
_TRAVEL = ((0.45, 0.6), (0.38, 0.5), (0.3, 0.4))
# Seconds between two appearances: more than the 0.5 s between samples, so that order can be seen.
_APART = 0.75
# One thread, so that a seed gives the same file on every machine.
_H264 = {"crf": "20", "preset": "veryfast", "threads": "1"}
_SPLIT_STARTS = {"train": 0, "dev": 10**9, "test": 2 * 10**9}
_SPLIT_SIZE = 10**9

Frames = NDArray[np.uint8]
"""RGB frames, (T, height, width, 3)."""


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
    """Centre at time 0."""
    vx: float = 0.0
    vy: float = 0.0
    """Velocity per second; y points down."""
    start: float = 0.0
    end: float = float("inf")
    """On screen for start <= time < end."""


@dataclass(frozen=True)
class Question:
    """A question about a clip, with its one-word answer."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Clip:
    """A clip and every question that can be asked about it."""

    seed: int
    kind: str
    duration: float
    """Seconds, a multiple of one frame."""
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]

    @property
    def frame_count(self) -> int:
        """Frames of the file at `FPS`."""
        return round(self.duration * FPS)


def split_seed(split: str, index: int) -> int:
    """Return the seed of clip `index` of a split; splits never share a seed.

    Args:
        split: "train", "dev" or "test".
        index: 0 <= index < 10**9.
    """
    if not 0 <= index < _SPLIT_SIZE:
        raise ValueError(f"clip index {index} is outside [0, {_SPLIT_SIZE})")
    return _SPLIT_STARTS[split] + index


def make_clip(seed: int, *, kind: str | None = None, level: int = TOP_LEVEL) -> Clip:
    """Make the clip that belongs to a seed.

    Args:
        seed: decides everything that is not fixed by the other arguments.
        kind: one of `KINDS`; drawn from the seed when None.
        level: difficulty 0..`TOP_LEVEL`: longer clips, more objects.
    """
    rng = np.random.default_rng((seed, level))
    drawn = str(rng.choice(KINDS, p=(0.25, 0.35, 0.4)))
    kind = kind or drawn
    duration = float(rng.choice(_DURATIONS[level]))
    make = {"stills": _stills, "events": _events, "motion": _motion}[kind]
    things, questions = make(rng, level, duration)
    return Clip(seed, kind, duration, tuple(things), tuple(questions))


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
    """Objects that appear one after the other, each for about a second."""
    count = int(rng.integers(1, _MOST_OBJECTS[level] + 1))
    while 0.25 + _APART * (count - 1) + 0.6 > duration:
        count -= 1
    room = duration - 0.6 - _APART * (count - 1)
    starts = np.sort(rng.uniform(0.0, room, count)) + _APART * np.arange(count)
    things = []
    for colour, at, start in zip(
        _colours(rng, count), _cells(rng, count, 0.17), starts, strict=True
    ):
        end = float(start + rng.uniform(0.6, 1.1))
        radius = float(rng.uniform(0.14, 0.2))
        shape = str(rng.choice(SHAPES))
        things.append(_thing(rng, colour, shape, radius, at, shown=(float(start), end)))
    questions = [_ask(rng, "count", str(count))]
    for first in range(count):
        for second in range(first + 1, count):
            pair = [things[first].colour, things[second].colour]
            mention = [pair[int(index)] for index in rng.permutation(2)]
            questions.append(_ask(rng, "order", pair[0], *mention))
    return things, questions


def _motion(
    rng: np.random.Generator, level: int, duration: float
) -> tuple[list[Thing], list[Question]]:
    """One object that moves, and at the higher levels perhaps one that rests."""
    direction = str(rng.choice(list(DIRECTIONS)))
    sign = np.array(DIRECTIONS[direction])
    radius = float(rng.uniform(0.13, 0.17))
    travel = sign * rng.uniform(*_TRAVEL[level])
    low = np.maximum(radius, radius - travel)
    high = np.minimum(1 - radius, 1 - radius - travel)
    start = rng.uniform(low, high)
    colours = _colours(rng, 2)
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    speed = travel / duration
    mover = _thing(rng, colours[0], shapes[0], radius, (start[0], start[1]), (speed[0], speed[1]))
    things = [mover]
    if level > 0 and rng.random() < 0.5:
        rest = _resting_place(rng, start, start + travel, radius)
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


def _distance(shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Signed distance (negative inside) in units of the radius; dx, dy likewise."""
    if shape == "circle":
        return np.hypot(dx, dy) - np.float32(1.0)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.9)
    # Upright triangle: base at +0.85, apex at -1.0, half the base 1.05.
    slope = np.float32(1.05 / 1.85)
    side = (np.abs(dx) - slope * (dy + np.float32(1.0))) / np.hypot(np.float32(1.0), slope)
    return np.maximum(side, dy - np.float32(0.85))


def _coverage(
    thing: Thing, time: float, size: int
) -> tuple[slice, slice, NDArray[np.float32]] | None:
    """Return (rows, columns, coverage 0..1) of a thing on a square image, or None if unseen."""
    if not thing.start <= time < thing.end:
        return None
    x = (thing.x + thing.vx * time) * size
    y = (thing.y + thing.vy * time) * size
    radius = thing.radius * size
    reach = 1.15 * radius + 1
    top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 1)
    left, right = max(0, int(x - reach)), min(size, int(x + reach) + 1)
    if top >= bottom or left >= right:
        return None
    dy = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / radius)[:, None]
    dx = ((np.arange(left, right, dtype=np.float32) + 0.5 - x) / radius)[None, :]
    cover = np.clip(0.5 - _distance(thing.shape, dx, dy) * radius, 0.0, 1.0)
    return slice(top, bottom), slice(left, right), cover.astype(np.float32)


def _background(seed: int, size: int) -> NDArray[np.float32]:
    """Draw the still background, (size, size, 3): a grey gradient and a few dim rectangles."""
    rng = np.random.default_rng((seed, 7))
    tint = rng.uniform(-6, 6, 3).astype(np.float32)
    slope = rng.uniform(-25, 25, 2).astype(np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    grey = np.float32(rng.uniform(60, 105)) + slope[0] * axis[:, None] + slope[1] * axis[None, :]
    for _ in range(int(rng.integers(3, 8))):
        corner, extent = rng.uniform(-0.1, 0.9, 2), rng.uniform(0.08, 0.4, 2)
        top, left = np.maximum(0, np.round(corner * size)).astype(int)
        bottom, right = np.round((corner + extent) * size).astype(int)
        grey[top : max(top, bottom), left : max(left, right)] += np.float32(rng.uniform(-22, 22))
    return grey[..., None] + tint


def frame_times(clip: Clip, times: Sequence[float]) -> list[float]:
    """Return the start of the file frame that is on screen at each sampled time, in seconds."""
    last = clip.frame_count - 1
    return [min(last, int(time * FPS + 1e-6)) / FPS for time in times]


def render(clip: Clip, times: Sequence[float], size: int) -> Frames:
    """Draw the clip at the given times (seconds) as (T, size, size, 3) RGB."""
    background = _background(clip.seed, size)
    frames = np.empty((len(times), size, size, 3), dtype=np.uint8)
    for index, time in enumerate(times):
        canvas = background.copy()
        for thing in clip.things:
            drawn = _coverage(thing, time, size)
            if drawn is not None:
                rows, columns, cover = drawn
                patch = canvas[rows, columns]
                patch += cover[..., None] * (np.array(thing.rgb, np.float32) - patch)
        frames[index] = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return frames


def degrade(frames: Frames, rng: np.random.Generator) -> Frames:
    """Add what a camera and an encoder leave in frames: a change of exposure, and noise."""
    gain = np.float32(rng.uniform(0.93, 1.07))
    offset = np.float32(rng.uniform(-6, 6))
    noise = rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 4))
    return np.clip(np.round(frames * gain + offset + noise), 0, 255).astype(np.uint8)


class WindowContents(NamedTuple):
    """What each window of each frame shows, (T, W) each; 0 is background.

    A window shows the object that covers most of it, if that is at least a fifth of its area.
    """

    colour: NDArray[np.int64]
    """1 + index into `COLOURS`."""
    shape: NDArray[np.int64]
    """1 + index into `SHAPES`."""
    motion: NDArray[np.int64]
    """1 + index into `DIRECTIONS`; 0 for what rests."""


def window_contents(
    clip: Clip, times: Sequence[float], window_grid: tuple[int, int]
) -> WindowContents:
    """Say what the windows of the clip's frames at `times` (seconds) show."""
    rows, columns = window_grid
    fine = 6 * max(rows, columns)
    areas = np.zeros((len(times), len(clip.things) + 1, rows * columns), np.float32)
    areas[:, 0] = 0.2
    for frame, time in enumerate(times):
        for index, thing in enumerate(clip.things, start=1):
            drawn = _coverage(thing, time, fine)
            if drawn is not None:
                plane = np.zeros((fine, fine), np.float32)
                plane[drawn[0], drawn[1]] = drawn[2]
                tiles = plane.reshape(rows, fine // rows, columns, fine // columns)
                areas[frame, index] = tiles.mean((1, 3)).reshape(-1)
    winner = areas.argmax(1)
    names, moves = list(COLOURS), list(DIRECTIONS.values())
    colour = np.array([0, *(names.index(thing.colour) + 1 for thing in clip.things)])
    shape = np.array([0, *(SHAPES.index(thing.shape) + 1 for thing in clip.things)])
    signs = [(int(np.sign(thing.vx)), int(np.sign(thing.vy))) for thing in clip.things]
    motion = np.array([0, *(moves.index(sign) + 1 if sign in moves else 0 for sign in signs)])
    return WindowContents(colour[winner], shape[winner], motion[winner])


def write_mp4(clip: Clip, path: Path, *, size: int = 240) -> None:
    """Write the clip as an H.264 file of size x size pixels (even) at `FPS` frames a second."""
    frames = render(clip, [index / FPS for index in range(clip.frame_count)], size)
    rng = np.random.default_rng((clip.seed, 11))
    grain = rng.normal(0, 2, (*frames.shape[:3], 1)).round().astype(np.int16)
    frames = np.clip(frames + grain, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=_H264)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
