"""`stts-export build`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stts_export.cli.common import (
    Arguments,
    bytes_below,
    checkpoint_options,
    path_or_name,
    size_in_bytes,
    stages,
)
from stts_export.errors import InputError
from stts_export.files import readable_size


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "source", type=path_or_name, metavar="CHECKPOINT|BUNDLE",
        help="checkpoint: Hugging Face folder, olmo training folder, or a name on the hub "
        "(OWNER/NAME); or a bundle, to build engines from its graphs",
    )  # fmt: skip
    verb.add_argument("-o", "--output", type=Path, required=True, help="bundle folder to write")
    verb.add_argument(
        "--precision", metavar="RECIPE",
        help="number formats: fp32 (default), fp16, bf16, fp8, int8, int4, nvfp4, one for a class "
        "of devices (cpu, orin, thor, h200, rtx), or a YAML file; a bundle's own when built from "
        "one",
    )  # fmt: skip
    verb.add_argument(
        "--auto", metavar="DEVICE",
        help="find the recipe of the smallest bundle that passes its gates on a device: cpu, orin, "
        "thor, h200, rtx, or one that `estimate` knows",
    )  # fmt: skip
    verb.add_argument(
        "--calibration", type=Path, metavar="FOLDER",
        help="scales that `calibrate` found; found during the build if absent",
    )  # fmt: skip
    verb.add_argument(
        "--clips", type=Path,
        help="what to calibrate and judge on: a YAML file, or a folder of videos; synthetic clips "
        "if absent",
    )  # fmt: skip
    verb.add_argument(
        "--backend", action="append",
        help="back end to build for (repeatable, the first is the default of the bundle): "
        "onnxruntime (default), tensorrt on the GPU it is for, tensorrt-rtx anywhere",
    )  # fmt: skip
    verb.add_argument(
        "--target", action="append",
        help="GPUs to build engines for, such as sm89,sm120; this machine's if absent",
    )  # fmt: skip
    verb.add_argument(
        "--max-frames", type=int, help="longest clip; the checkpoint's num_frames, or 64, if absent"
    )
    verb.add_argument(
        "--max-tokens", type=int,
        help="longest sequence; if absent the model's longest, and with engines no more than the "
        "longest clip needs",
    )  # fmt: skip
    verb.add_argument("--min-prune-ratio", type=float, help="lowest ratio the bundle accepts (0)")
    verb.add_argument(
        "--positions", choices=("compact", "gapped"),
        help="of tokens after pruning: counted anew (compact, the default) or as before (gapped)",
    )  # fmt: skip
    verb.add_argument(
        "--memory-limit", metavar="SIZE",
        help="device memory for temporary results of a layer, in GiB or as 512M; all if absent",
    )  # fmt: skip
    verb.add_argument(
        "--plugin", type=Path, metavar="FILE",
        help="libstts_plugins.so, for tensorrt; looked for in STTS_PLUGIN_PATH, the bundle and "
        "the build tree if absent",
    )  # fmt: skip
    checkpoint_options(verb)
    verb.add_argument(
        "--force", action="store_true",
        help="replace an existing bundle; where none is yet, write one that misses its gates",
    )  # fmt: skip


def run(arguments: Arguments) -> int:
    from stts_export.build import BuildSpec, bundle_from_bundle, bundle_from_checkpoint
    from stts_export.bundle import Bundle, is_bundle

    spec = BuildSpec(
        precision=arguments.precision,
        max_frames=arguments.max_frames,
        max_tokens=arguments.max_tokens,
        min_prune_ratio=arguments.min_prune_ratio,
        backends=tuple(arguments.backend) if arguments.backend else None,
        targets=_targets(arguments.target or ()),
        memory_limit=size_in_bytes(arguments.memory_limit, "--memory-limit")
        if arguments.memory_limit
        else None,
        plugin=arguments.plugin,
        positions=arguments.positions,
        calibration=arguments.calibration,
        clips=arguments.clips,
        auto=arguments.auto,
    )

    def on_stage(stage: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {stage}", file=sys.stderr, flush=True)

    if not is_bundle(Path(arguments.source)):
        build = partial(
            bundle_from_checkpoint,
            arguments.source,
            revision=arguments.revision,
            tokenizer=arguments.tokenizer,
        )
    elif arguments.revision or arguments.tokenizer:
        raise InputError(
            "is a bundle, which has its own tokenizer",
            where=str(arguments.source),
            fix="leave --revision and --tokenizer out",
        )
    else:
        build = partial(bundle_from_bundle, Path(arguments.source))
    started = time.perf_counter()
    with stages() as report:
        bundle = build(
            arguments.output,
            spec,
            force=arguments.force,
            on_plan=lambda line: print(line, file=sys.stderr, flush=True),
            on_stage=on_stage,
            on_progress=report,
        )
    seconds = time.perf_counter() - started
    opened = Bundle.open(bundle)
    for engines in opened.engine_sets():
        for engine in filter(None, (engine.command for engine in engines.engines.values())):
            print(f"in {bundle}: {engine}", file=sys.stderr)
    limits = opened.manifest.limits
    print(f"{bundle}: {readable_size(bytes_below(bundle))}, built in {seconds:.0f} s")
    print(f"takes up to {limits.max_frames} frames and {limits.max_tokens} tokens")
    return 0


def _targets(lists: Sequence[str]) -> tuple[str, ...]:
    """Split comma-separated lists; every target once."""
    names = (name.strip().lower() for text in lists for name in text.split(","))
    return tuple(dict.fromkeys(names))
