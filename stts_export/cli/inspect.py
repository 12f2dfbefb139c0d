"""`stts-export inspect`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stts_export.cli.common import Arguments


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    from stts_export.inspect import describe, describe_text

    description = describe(arguments.bundle)
    print(json.dumps(description) if arguments.json else describe_text(description))
    return 0
