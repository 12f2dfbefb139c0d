"""`stts-export estimate`."""

from __future__ import annotations

import argparse
import json

from stts_export.cli.common import Arguments, path_or_name


def options(verb: argparse.ArgumentParser) -> None:
    from stts_export.devices import DEVICES

    verb.add_argument(
        "source", type=path_or_name, metavar="CHECKPOINT|BUNDLE",
        help="checkpoint, whose weights are not read, or of a name on the hub (OWNER/NAME) not "
        "downloaded; or a bundle",
    )  # fmt: skip
    verb.add_argument(
        "--target",
        help=f"where it is to run: this (default), {', '.join(DEVICES)}",
        default="this",
    )
    verb.add_argument("--revision", help="of a checkpoint on the hub, as for build")
    verb.add_argument("--precision", help="recipe, as for build (fp32); a bundle's own")
    verb.add_argument("--max-frames", type=int, help="longest clip; as build if absent")
    verb.add_argument(
        "--max-tokens", type=int, help="longest sequence; what the longest clip needs if absent"
    )
    verb.add_argument("--min-prune-ratio", type=float, help="lowest ratio (0, or the bundle's)")
    verb.add_argument(
        "--backend", help="onnxruntime, tensorrt or tensorrt-rtx; the target's own if absent"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.epilog = "exit code: 0 when a session fits the target, 1 when it does not"


def run(arguments: Arguments) -> int:
    from stts_export.estimate import refusal
    from stts_export.estimate_report import estimate_json, estimate_source, estimate_text

    planned = estimate_source(
        arguments.source,
        revision=arguments.revision,
        target=arguments.target,
        precision=arguments.precision,
        max_frames=arguments.max_frames,
        max_tokens=arguments.max_tokens,
        min_prune_ratio=arguments.min_prune_ratio,
        backend=arguments.backend,
    )
    if arguments.json:
        print(json.dumps(estimate_json(planned)))
    else:
        print(estimate_text(planned), flush=True)
    error = refusal(planned)
    if error is not None:
        raise error
    return 0
