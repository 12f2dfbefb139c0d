"""`stts-export convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from stts_export.cli.common import (
    Arguments,
    bytes_below,
    checkpoint_options,
    path_or_name,
    size_in_bytes,
)
from stts_export.files import readable_size
from stts_export.progress import Progress


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "checkpoint", type=path_or_name, metavar="CHECKPOINT",
        help="Hugging Face folder, olmo training folder, or a name on the hub (OWNER/NAME)",
    )  # fmt: skip
    verb.add_argument(
        "-o", "--output", type=Path, required=True, help="Hugging Face folder to write"
    )
    verb.add_argument(
        "--dtype", help="float32, float16 or bfloat16: type of the weights; as they are if absent"
    )
    verb.add_argument(
        "--max-shard-size", default="4G", metavar="SIZE",
        help="largest file of weights, in GiB or as 512M (4G)",
    )  # fmt: skip
    checkpoint_options(verb)


def run(arguments: Arguments) -> int:
    from stts_export.convert import ConvertSpec, checkpoint_from_checkpoint

    spec = ConvertSpec(arguments.dtype, size_in_bytes(arguments.max_shard_size, "--max-shard-size"))
    bar: Progress | None = None

    def report(name: str, done: int, total: int) -> None:
        nonlocal bar
        bar = bar or Progress("convert", total, "tensors").__enter__()
        bar.update(done)

    try:
        folder = checkpoint_from_checkpoint(
            arguments.checkpoint,
            arguments.output,
            spec,
            revision=arguments.revision,
            tokenizer=arguments.tokenizer,
            on_tensor=report,
        )
    finally:
        if bar:
            bar.__exit__(None, None, None)
    print(f"{folder}: {readable_size(bytes_below(folder))}")
    return 0
