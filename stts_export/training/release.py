"""`python -m stts_export.training.release RUN/stepN FOLDER`: a small copy of a checkpoint to ship.

The weights are stored as float16; everything else is copied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint, save_checkpoint
from stts_export.errors import InputError, SttsError


def release_checkpoint(step: Path, folder: Path) -> None:
    """Write a float16 copy of a checkpoint.

    Args:
        step: a step folder of a run, or the run for its newest step.
        folder: created; files in it are replaced.

    Raises:
        InputError: no readable checkpoint, or a weight is too large for float16.
    """
    checkpoint = open_checkpoint(step)
    model = model_from_checkpoint(checkpoint)
    limit = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters():
        if not bool(parameter.abs().max() <= limit):
            raise InputError(f"{name} does not fit into float16", where=str(checkpoint.folder))
    save_checkpoint(model, folder, torch.float16)
    for file in sorted(checkpoint.folder.glob("*.json")):
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def main() -> int:
    """Parse the arguments and write the copy; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stts_export.training.release", description=__doc__
    )
    parser.add_argument("step", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        release_checkpoint(options.step, options.folder)
    except SttsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
