"""`python -m stts_export.training CONFIG`: train without the command line's other verbs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stts_export.errors import SttsError
from stts_export.training.loop import train


def main() -> int:
    """Parse the arguments and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stts_export.training", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    try:
        train(options.config, options.output, options.resume, options.dry_run)
    except SttsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
