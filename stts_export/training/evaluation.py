"""How often a bundle answers right, with the windows it chooses and with random ones.

Clips of the test split, which training never draws from, are written as H.264 files and go through
the same decoding, sampling and session as any user's video.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.progress import Progress
from stts_export.runtime.planner import n_prune
from stts_export.runtime.video import VideoClip
from stts_export.training.clips import (
    ANSWERS,
    KINDS,
    TYPES,
    Clip,
    Question,
    make_clip,
    split_seed,
    write_mp4,
)

if TYPE_CHECKING:
    from stts_export import Session

SELECTORS = ("stts", "random")
# Kinds in the proportion in which their questions are needed: order is asked of events alone,
# direction of motion alone.
_KIND_CYCLE = ("events", "motion", "stills", "events", "motion")
assert set(_KIND_CYCLE) == set(KINDS)


@dataclass(frozen=True)
class TestClip:
    """A clip of the test split and the questions that count."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    clip: Clip
    questions: tuple[Question, ...]


def choose_questions(questions: int, clips: int, seed: int = 0) -> list[TestClip]:
    """Choose held-out clips and questions, with each question type about equally often.

    Args:
        questions: how many in total.
        clips: how many different clips to ask them about.
        seed: first clip of the test split.

    Raises:
        InputError: more questions than the clips have.
    """
    asked: dict[str, int] = dict.fromkeys(TYPES, 0)
    chosen = []
    left = questions
    for index in range(clips):
        kind = _KIND_CYCLE[index % len(_KIND_CYCLE)]
        clip = make_clip(split_seed("test", seed + index), kind=kind)
        order = np.random.default_rng((clip.seed, 17)).permutation(len(clip.questions))
        pool = [clip.questions[int(number)] for number in order]
        share = -(-left // (clips - index))
        picked: list[Question] = []
        while pool and len(picked) < share:
            rarest = min(pool, key=lambda question: asked[question.type])
            pool.remove(rarest)
            picked.append(rarest)
            asked[rarest.type] += 1
        left -= len(picked)
        chosen.append(TestClip(clip, tuple(picked)))
    if left > 0:
        raise InputError(
            f"{clips} clips have {questions - left} questions, not {questions}",
            where="evaluate",
            fix="ask for more clips or fewer questions",
        )
    return chosen


def random_keep(
    frames: int, windows: int, prune_ratio: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Keep the first frame and random later windows, as many as the scores would keep.

    Returns:
        (T, W) bool.
    """
    kept = frames * windows - n_prune(windows, frames, prune_ratio)
    order = rng.permutation(frames * windows)
    # A stable sort by "later frame" keeps the random order within the first frame and the others.
    order = order[np.argsort(order >= windows, kind="stable")]
    keep = np.zeros(frames * windows, dtype=np.bool_)
    keep[order[:kept]] = True
    return keep.reshape(frames, windows)


def evaluate(
    bundle: Path,
    *,
    questions: int = 500,
    clips: int = 250,
    ratios: Sequence[float] = (0.0, 0.5, 0.8),
    selectors: Sequence[str] = SELECTORS,
    seed: int = 0,
    threads: int | None = None,
    backend: str | None = None,
    plugin: Path | None = None,
) -> dict[str, Any]:
    """Measure a bundle's accuracy on held-out clips.

    Args:
        bundle: a built bundle of a model that was trained here.
        questions: number of questions, about equally many of each type.
        clips: number of different clips.
        ratios: prune ratios; random windows are skipped at ratio 0.
        selectors: "stts" for the model's own choice, "random" for the first frame and random
            windows after it.
        seed: first clip of the test split, and the seed of random windows.
        threads: threads within an operator; all cores when None.
        backend: as for `Session.open`.
        plugin: as for `Session.open`.

    Returns:
        Plain values for JSON: `rows` with ratio, selector, accuracy by type and `all`, right
        answers by type; `questions` by type and `all`; `chance` by type; `clips`; `seed`;
        `backend`.

    Raises:
        InputError: an unknown selector, more questions than the clips have, or as `Session.open`.
        MissingDependencyError: as `Session.open`.
    """
    from stts_export import Session

    for selector in selectors:
        if selector not in SELECTORS:
            raise InputError(
                f"unknown selector {selector!r}", where="evaluate", allowed=" or ".join(SELECTORS)
            )
    chosen = choose_questions(questions, clips, seed)
    right: dict[tuple[float, str], dict[str, int]] = {
        setting: dict.fromkeys(TYPES, 0) for setting in _settings(ratios, selectors)
    }
    with (
        Session.open(bundle, backend, threads=threads, plugin=plugin) as session,
        tempfile.TemporaryDirectory() as folder,
        Progress("evaluate", len(chosen), "clips") as progress,
    ):
        for done, test in enumerate(chosen, start=1):
            path = Path(folder) / "clip.mp4"
            write_mp4(test.clip, path)
            video = session.read_video(path)
            for (ratio, selector), counts in right.items():
                rng = np.random.default_rng((seed, test.clip.seed, 19))
                for question in _answered(session, video, test, ratio, selector, rng):
                    counts[question.type] += 1
            progress.update(done)
        used = session.backend
    return {**_summary(chosen, right, seed), "backend": used}


def _settings(ratios: Sequence[float], selectors: Sequence[str]) -> list[tuple[float, str]]:
    return [
        (ratio, selector)
        for ratio in ratios
        for selector in selectors
        if ratio > 0 or selector == "stts"
    ]


def _answered(
    session: Session,
    video: VideoClip,
    test: TestClip,
    ratio: float,
    selector: str,
    rng: np.random.Generator,
) -> Iterator[Question]:
    """Yield the questions that the session answers right."""
    if selector == "random":
        keep = random_keep(len(video.frames), session.config.vision.windows, ratio, rng)
        encoded = session.encode(video, keep=keep)
    else:
        encoded = session.encode(video, prune_ratio=ratio)
    for question in test.questions:
        answer = session.generate(encoded, question.text, max_new_tokens=4)
        if answer.text is not None and answer.text.strip() == question.answer:
            yield question


def _summary(
    chosen: Sequence[TestClip], right: dict[tuple[float, str], dict[str, int]], seed: int
) -> dict[str, Any]:
    asked: dict[str, int] = defaultdict(int)
    for test in chosen:
        for question in test.questions:
            asked[question.type] += 1
            asked["all"] += 1
    rows = []
    for (ratio, selector), counts in right.items():
        totals = {**counts, "all": sum(counts.values())}
        accuracy = {kind: totals[kind] / asked[kind] for kind in totals if asked[kind]}
        rows.append(
            {"prune_ratio": ratio, "selector": selector, "accuracy": accuracy, "right": totals}
        )
    chance = {kind: 1 / (2 if kind == "order" else len(ANSWERS[kind])) for kind in TYPES}
    return {
        "clips": len(chosen),
        "seed": seed,
        "questions": dict(asked),
        "chance": chance,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Lay out the result of `evaluate` as text."""
    lines = [f"{'ratio':>5}  {'windows':<8}" + "".join(f"{kind:>11}" for kind in (*TYPES, "all"))]
    for row in results["rows"]:
        cells = "".join(
            f"{row['accuracy'][kind]:>11.3f}" if kind in row["accuracy"] else f"{'-':>11}"
            for kind in (*TYPES, "all")
        )
        lines.append(f"{row['prune_ratio']:>5.2f}  {row['selector']:<8}{cells}")
    counts = "".join(f"{results['questions'].get(kind, 0):>11}" for kind in (*TYPES, "all"))
    chances = "".join(f"{results['chance'][kind]:>11.3f}" for kind in TYPES)
    return "\n".join([*lines, f"{'chance':<15}{chances}", f"{'questions':<15}{counts}"])
