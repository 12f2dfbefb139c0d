"""The pieces of work that `evidence_jobs` gives to processes.

python -m benchmarks.harness.evidence_work TASK.json RESULT.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.timing import cpu_time
from stts_export.errors import SttsError
from stts_export.files import json_object, write_json
from stts_export.progress import Progress
from stts_export.runtime.planner import n_prune
from stts_export.runtime.video import VideoClip
from stts_export.runtime.visuals import EncodedClip
from stts_export.training.answerers import encode
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, open_checkpoint_answerer
from stts_export.training.clips import Clip
from stts_export.training.evaluation import ALL_WINDOWS, evaluate
from stts_export.training.exam import Exam, prompt_of, synthetic_exam
from stts_export.training.rendering import write_mp4
from stts_export.training.selectors import EVS, STTS, UNIFORM_FRAMES, Selection, uniform_frames

SPEED_SELECTORS = (STTS, EVS, UNIFORM_FRAMES)

Task = Mapping[str, Any]


def exam_of(task: Task) -> Exam:
    """Return the questions of a task's seed, about clips of the test split."""
    size = task["exam"]
    return synthetic_exam(
        size["questions"], size["clips"], seed=task["seed"], split="test", level=size["level"]
    )


def write_clips(task: Task) -> dict[str, Any]:
    """Write a seed's test clips as H.264, those that are not there yet.

    Args:
        task: `clips` (the folder), `seed` and `exam`.

    Returns:
        `clips`: how many there are.
    """
    folder = Path(task["clips"])
    folder.mkdir(parents=True, exist_ok=True)
    items = exam_of(task).items
    with Progress("test clips", len(items), "clips") as progress:
        for done, item in enumerate(items, start=1):
            file = clip_file(folder, item.seed)
            if not file.exists():
                assert isinstance(item.source, Clip)
                partial = file.with_suffix(".partial.mp4")
                write_mp4(item.source, partial)
                os.replace(partial, file)
            progress.update(done)
    return {"clips": len(items)}


def clip_file(folder: Path, seed: int) -> Path:
    """Return the name of the file of a test clip."""
    return folder / f"{seed}.mp4"


def examine(task: Task) -> dict[str, Any]:
    """Ask a checkpoint, in PyTorch on one thread.

    Args:
        task: `checkpoint`, `clips`, `seed`, `exam`, `ratios`, `selectors`, `max_frames`, `refill`.

    Returns:
        What `evaluate` returns, and `asked`: the types of the questions about each clip, in order.
    """
    folder = Path(task["clips"])
    exam = exam_of(task)
    items = [replace(item, source=clip_file(folder, item.seed)) for item in exam.items]
    with open_checkpoint_answerer(
        task["checkpoint"], max_frames=task["max_frames"], threads=1, refill=task["refill"]
    ) as answerer:
        results = evaluate(
            answerer,
            replace(exam, items=tuple(items)),
            ratios=task["ratios"],
            selectors=task["selectors"],
            max_broken=0,
        )
    asked = [[question.type for question in item.questions] for item in exam.items]
    return {**results, "asked": asked}


def measure_speed(task: Task) -> dict[str, Any]:
    """Time encoding and prefill of clips on one thread, in PyTorch; all settings take turns.

    Args:
        task: `checkpoint`, `clips`, `seed`, `exam`, `ratios` (0 among them), and `repeats`, how
            many of the test clips are timed.

    Returns:
        `repeats`, `frames` (samples of each clip), and `rows`: `prune_ratio`, `selector`, and
        median, low and high (quartiles) of `encode`, `prefill` and `total` in CPU seconds of a
        clip, and of `speedup`, ratio 0's total over this one's for the same clip.
    """
    folder = Path(task["clips"])
    items = exam_of(task).items[: task["repeats"]]
    settings = [(0.0, ALL_WINDOWS)] + [
        (ratio, name) for ratio in task["ratios"] if ratio > 0 for name in SPEED_SELECTORS
    ]
    samples: dict[tuple[float, str], list[tuple[float, float]]] = {one: [] for one in settings}
    frames = []
    with open_checkpoint_answerer(task["checkpoint"], threads=1) as answerer:
        for number, item in enumerate(items):
            clip = answerer.read(clip_file(folder, item.seed))
            frames.append(len(clip.frames))
            prompt = prompt_of(item.questions[0])
            turn = number % len(settings)
            order = [*settings[turn:], *settings[:turn]]
            if number == 0:  # the first of anything is slow
                for setting in order:
                    _timed(answerer, clip, prompt, *setting)
            for setting in order:
                samples[setting].append(_timed(answerer, clip, prompt, *setting))
    whole = [sum(pair) for pair in samples[settings[0]]]
    rows = [_speed_row(setting, samples[setting], whole) for setting in settings]
    return {"repeats": len(items), "frames": frames, "rows": rows}


def _timed(
    answerer: CheckpointAnswerer, clip: VideoClip, prompt: str, ratio: float, selector: str
) -> tuple[float, float]:
    """CPU seconds of encoding a clip, and of reading it with a question up to the first token."""
    encoded, encoding = cpu_time(lambda: _encoded(answerer, clip, ratio, selector))
    _, prefill = cpu_time(lambda: answerer.answers(encoded, [prompt], [1]))
    return encoding, prefill


def _encoded(
    answerer: CheckpointAnswerer, clip: VideoClip, ratio: float, selector: str
) -> EncodedClip:
    if selector != UNIFORM_FRAMES:
        rng = np.random.default_rng(0)
        return encode(answerer.tower(clip), clip.timestamps, ratio, selector, rng)
    # Whoever wants fewer frames samples fewer: those that are dropped are not seen at all.
    shape = len(clip.frames), answerer.config.vision.windows
    keep = uniform_frames(shape, n_prune(shape[1], shape[0], ratio))
    seen = keep.any(axis=1)
    tower = answerer.tower(replace(clip, frames=clip.frames[seen]))
    features = tower.survivors(Selection(keep[seen]))
    return EncodedClip(None, keep[seen], features, clip.timestamps[seen], ratio, None, {})


def _speed_row(
    setting: tuple[float, str], samples: Sequence[tuple[float, float]], whole: Sequence[float]
) -> dict[str, Any]:
    totals = [sum(pair) for pair in samples]
    return {
        "prune_ratio": setting[0],
        "selector": setting[1],
        "encode": _quartiles([pair[0] for pair in samples]),
        "prefill": _quartiles([pair[1] for pair in samples]),
        "total": _quartiles(totals),
        "speedup": _quartiles([a / b for a, b in zip(whole, totals, strict=True)]),
    }


def _quartiles(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}


KINDS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "clips": write_clips,
    "examine": examine,
    "speed": measure_speed,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the task of a file; returns the exit code."""
    told, result = map(Path, sys.argv[1:] if arguments is None else arguments)
    task = json_object(told)
    try:
        write_json(result, KINDS[task["kind"]](task))
    except SttsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
