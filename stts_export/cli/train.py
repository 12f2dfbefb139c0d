"""`stts-export train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stts_export.cli.common import Arguments


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, help="YAML file, for example configs/demo.yaml")
    verb.add_argument(
        "-o", "--output", type=Path, help="folder of the run; the configuration's if absent"
    )
    verb.add_argument("--resume", action="store_true", help="go on where the run folder stopped")
    verb.add_argument(
        "--dry-run", action="store_true", help="check everything and try one step, write nothing"
    )


def run(arguments: Arguments) -> int:
    from stts_export.training.loop import train

    run = train(
        arguments.config,
        output=arguments.output,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )
    if os.environ.get("RANK", "0") == "0":
        print(run)
    return 0
