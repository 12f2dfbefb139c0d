"""`stts-export train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from stts_export.cli.common import Arguments


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, help="YAML file, for example configs/demo.yaml")
    verb.add_argument("-o", "--output", type=Path, help="run folder; runs/<config name> if absent")
    verb.add_argument("--resume", action="store_true", help="go on where the run folder stopped")
    verb.add_argument("--dry-run", action="store_true", help="check everything, train nothing")


def run(arguments: Arguments) -> int:
    from stts_export.training.loop import train

    run = train(
        arguments.config,
        output=arguments.output,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )
    print(run)
    return 0
