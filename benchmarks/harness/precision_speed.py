"""CPU time of bundles, side by side: encode, prefill, and each decoded token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.timing import cpu_time
from stts_export import Session
from stts_export.engines.library import ONNXRUNTIME
from stts_export.progress import Progress
from stts_export.runtime import decoder
from stts_export.runtime.prompt import kept_positions, visual_groups
from stts_export.runtime.video import VideoClip
from stts_export.tensors import DECODER

PARTS = ("encode", "prefill", "token")


def measure_speed(
    bundles: Mapping[str, Path],
    reference: str,
    clips: Sequence[tuple[Path, str]],
    *,
    ratio: float,
    tokens: int,
) -> dict[str, Any]:
    """Time bundles on ONNX Runtime on one thread; for each clip they take turns.

    Args:
        bundles: by recipe.
        reference: recipe that the others are compared with, within each clip.
        clips: file and prompt of each.
        ratio: fraction of windows to remove.
        tokens: decoded after the prefill, whether the answer ends or not.

    Returns:
        `frames` of each clip, and `rows`: `recipe`; `seconds` of CPU time and `relative`, what
        part of the reference's for the same clip that is, each by part (`PARTS`) with median,
        low and high (quartiles).
    """
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in bundles}
    names, frames = list(bundles), []
    with ExitStack() as stack, Progress("speed", len(clips), "clips") as progress:
        sessions = {
            name: stack.enter_context(Session.open(folder, ONNXRUNTIME, threads=1))
            for name, folder in bundles.items()
        }
        for number, (file, prompt) in enumerate(clips):
            clip = sessions[reference].read_video(file)
            frames.append(len(clip.frames))
            turn = number % len(names)
            order = [*names[turn:], *names[:turn]]
            if number == 0:  # the first of anything is slow
                for name in order:
                    _timed(sessions[name], clip, prompt, ratio, tokens)
            for name in order:
                samples[name].append(_timed(sessions[name], clip, prompt, ratio, tokens))
            progress.update(number + 1)
    rows = [_row(name, samples[name], samples[reference]) for name in names]
    return {"frames": frames, "rows": rows}


def _timed(
    session: Session, clip: VideoClip, prompt: str, ratio: float, tokens: int
) -> tuple[float, ...]:
    """CPU seconds of encoding, of the prompt up to the first token, and of each token after it."""
    assert session.prompts is not None
    encoded, encoding = cpu_time(lambda: session.encode(clip, ratio))
    ids = session.prompts.build(prompt, [encoded.tokens])
    ids = ids[kept_positions(ids, encoded.keep.ravel(), session.config.tokens.im_patch)]
    groups = visual_groups(ids, session.config.tokens.visual)
    runner, precision = session.runners[DECODER], session.bundle.manifest.precision
    cache = decoder.KVCache(runner, session.config, precision, len(ids) + tokens)
    positions = np.arange(len(ids))
    logits, prefill = cpu_time(
        lambda: decoder.step(runner, cache, ids, groups, encoded.features, positions)
    )

    def decode() -> None:
        nonlocal logits
        none = np.zeros((1, encoded.features.shape[1]), encoded.features.dtype)
        text = np.array([-1], np.int32)
        for _ in range(tokens):
            new = np.array([int(logits.argmax())])
            logits = decoder.step(runner, cache, new, text, none, np.array([cache.length]))

    _, decoding = cpu_time(decode)
    return encoding, prefill, decoding / tokens


def _row(
    name: str, samples: Sequence[tuple[float, ...]], reference: Sequence[tuple[float, ...]]
) -> dict[str, Any]:
    seconds, of_reference = np.array(samples), np.array(reference)
    return {
        "recipe": name,
        "seconds": {part: _quartiles(seconds[:, i]) for i, part in enumerate(PARTS)},
        "relative": {
            part: _quartiles(seconds[:, i] / of_reference[:, i]) for i, part in enumerate(PARTS)
        },
    }


def _quartiles(samples: Any) -> dict[str, float]:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}
