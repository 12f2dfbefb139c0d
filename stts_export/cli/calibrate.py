"""`stts-export calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from stts_export.cli.common import Arguments, checkpoint_options, path_or_name, stages
from stts_export.errors import InputError


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "checkpoint", type=path_or_name, metavar="CHECKPOINT",
        help="as for build: a folder, or a name on the hub",
    )  # fmt: skip
    verb.add_argument(
        "--recipe", required=True,
        help="number formats: a name such as int8, or a YAML file (calibration/recipes)",
    )  # fmt: skip
    verb.add_argument(
        "--clips", type=Path,
        help="videos and questions: a YAML file (calibration/clips), or a folder of videos; "
        "synthetic clips if absent",
    )  # fmt: skip
    verb.add_argument(
        "-o", "--output", type=Path, required=True, metavar="CALIBRATION",
        help="folder to write; what it holds already for the same clips is used again",
    )  # fmt: skip
    verb.add_argument(
        "--max-frames", type=int, help="longest clip; the checkpoint's num_frames, or 64, if absent"
    )
    checkpoint_options(verb)


def run(arguments: Arguments) -> int:
    from stts_export.build_folder import readable_disk_errors
    from stts_export.bundle import is_bundle
    from stts_export.calibration.building import check_packages
    from stts_export.calibration.calibrate import calibration_from_checkpoint
    from stts_export.calibration.recipe import Recipe
    from stts_export.checkpoint import check_tensors, open_checkpoint

    if is_bundle(Path(arguments.checkpoint)):
        raise InputError(
            "is a bundle, whose graphs have their number formats already",
            where=str(arguments.checkpoint),
            fix="pass the checkpoint that it was built from",
        )
    recipe = Recipe.load(arguments.recipe)
    if any(rule.quantised for rule in recipe.layers):
        check_packages("calibrate", "modelopt")
    source = open_checkpoint(
        arguments.checkpoint, revision=arguments.revision, tokenizer=arguments.tokenizer
    )
    check_tensors(source)
    with readable_disk_errors(source.folder, arguments.output), stages() as report:
        made = calibration_from_checkpoint(
            source,
            recipe,
            arguments.output,
            clips=arguments.clips,
            max_frames=arguments.max_frames,
            on_progress=report,
        )
    share = made.kept_windows / made.total_windows
    print(
        f"{arguments.output}: scales of {len(made.layers)} layers for {recipe.name}, from "
        f"{made.kept_windows} of {made.total_windows} windows ({share:.0%}) that survive"
    )
    return 0
