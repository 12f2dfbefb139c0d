"""The batch that broke a run, kept so that it can be looked at and run again."""

from __future__ import annotations

import dataclasses
import math
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export._version import __version__
from stts_export.errors import InputError, TrainingError
from stts_export.files import json_object, write_json
from stts_export.runtime.prompt import ImageTokens
from stts_export.training.examples import (
    Example,
    ImageInput,
    Question,
    VideoInput,
    WindowContents,
)

FAILURE_FOLDER = "failures"
_DESCRIPTION = "failure.json"
# What reading files of another shape, or damaged ones, raises.
_UNREADABLE = (
    OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def save_failure(
    run: Path,
    step: int,
    examples: Sequence[Example],
    losses: Mapping[str, float],
    *,
    process: int = 0,
) -> Path:
    """Keep a batch, so that it can be looked at and run again.

    Of each example `exampleN.npz` has the arrays, `failure.json` the questions; nothing is pickled.
    The folder appears when it is complete, in place of one of the same name.

    Args:
        run: folder of the run.
        step: optimizer steps done before the batch.
        examples: the batch.
        losses: what came out of it, by name.
        process: rank of the process whose batch it is.

    Returns:
        The folder, RUN/failures/stepN, with -processR at its end when `process` is not 0.

    Raises:
        OSError: it cannot be written.
    """
    name = f"step{step}" + (f"-process{process}" if process else "")
    folder = run / FAILURE_FOLDER / name
    partial = folder.with_name(name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for number, example in enumerate(examples):
            # NumPy's stubs take the names of arrays for its own arguments.
            arrays: dict[str, Any] = _arrays(example)
            np.savez_compressed(_example_file(partial, number), **arrays)
        described = [_description(example) for example in examples]
        values = {
            "stts_export": __version__,
            "step": step,
            "losses": {key: _json_number(value) for key, value in losses.items()},
            "examples": described,
        }
        write_json(partial / _DESCRIPTION, values)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def load_failure(folder: Path) -> list[Example]:
    """Read a batch that `save_failure` wrote.

    Raises:
        InputError: the folder holds none, or it cannot be read.
    """
    values = json_object(folder / _DESCRIPTION)
    if not values:
        raise InputError(
            "holds no saved batch", where=str(folder), allowed=f"RUN/{FAILURE_FOLDER}/stepN"
        )
    try:
        return [
            _loaded(_example_file(folder, number), entry)
            for number, entry in enumerate(values["examples"])
        ]
    except _UNREADABLE as error:
        raise InputError(f"cannot be read: {error}", where=str(folder)) from None


def non_finite(
    run: Path,
    step: int,
    examples: Sequence[Example],
    losses: Mapping[str, float],
    *,
    process: int = 0,
) -> TrainingError:
    """Save the batch and return the error that ends the run.

    Args:
        run: folder of the run.
        step: optimizer steps done before the batch.
        examples: the batch; nothing is saved when it is empty.
        losses: values by name, of which some are not finite; none if it happened elsewhere.
        process: rank of this process.
    """
    broken = [f"{key} is {value:g}" for key, value in losses.items() if not math.isfinite(value)]
    message = f"{', '.join(broken) or 'a loss of another process is not finite'} after step {step}"
    fix = "lower the learning rates, or leave out what is at fault, and pass --resume"
    if examples:
        try:
            folder = save_failure(run, step, examples, losses, process=process)
            message += f"; the batch is in {folder}"
            fix = f"look at the batch with {load_failure.__module__}.load_failure; {fix}"
        except OSError as error:
            message += f"; the batch could not be saved: {error}"
    return TrainingError(message, where=str(run), fix=fix)


def _json_number(value: float) -> float | str:
    """JSON has no word for NaN and infinity."""
    return float(value) if math.isfinite(value) else str(float(value))


def _example_file(folder: Path, number: int) -> Path:
    return folder / f"example{number}.npz"


def _arrays(example: Example) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"prune_ratio": np.float64(example.prune_ratio)}
    visual = example.visual
    if isinstance(visual, VideoInput):
        arrays |= {"frames": visual.frames, "timestamps": np.array(visual.timestamps, np.float64)}
    elif visual is not None:
        arrays |= {"crops": visual.crops, "pooled_patches": visual.pooled_patches}
    if example.contents is not None:
        arrays |= example.contents._asdict()
    return arrays


def _description(example: Example) -> dict[str, Any]:
    visual = example.visual
    return {
        "name": example.name,
        "visual": {VideoInput: "video", ImageInput: "image"}.get(type(visual)),
        "image_grid": visual.tokens.grid if isinstance(visual, ImageInput) else None,
        "has_contents": example.contents is not None,
        "questions": [dataclasses.asdict(question) for question in example.questions],
    }


def _loaded(file: Path, entry: Mapping[str, Any]) -> Example:
    # Opened here: np.load leaves a damaged file open.
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        visual: VideoInput | ImageInput | None = None
        if entry["visual"] == "video":
            visual = VideoInput(arrays["frames"], tuple(arrays["timestamps"].tolist()))
        elif entry["visual"] == "image":
            rows, columns, crop_rows, crop_columns = entry["image_grid"]
            tokens = ImageTokens((rows, columns, crop_rows, crop_columns))
            visual = ImageInput(arrays["crops"], arrays["pooled_patches"], tokens)
        contents = None
        if entry["has_contents"]:
            contents = WindowContents(*(arrays[name] for name in WindowContents._fields))
        ratio = float(arrays["prune_ratio"])
    questions = tuple(
        Question(**{**question, "choices": tuple(question["choices"])})
        for question in entry["questions"]
    )
    return Example(visual, questions, ratio, contents, entry["name"])
