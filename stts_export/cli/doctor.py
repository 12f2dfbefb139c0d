"""`stts-export doctor`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stts_export.cli.common import Arguments
from stts_export.errors import MissingDependencyError


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help="say whether this bundle runs here"
    )
    verb.add_argument(
        "--plugin", type=Path, metavar="FILE",
        help="libstts_plugins.so to try, for tensorrt; found as by build if absent",
    )  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.epilog = "exit code: 0 when something (or BUNDLE) runs here, 4 when nothing does"


def run(arguments: Arguments) -> int:
    from stts_export.doctor import diagnose, diagnosis_text

    diagnosis = diagnose(arguments.bundle, plugin=arguments.plugin)
    if arguments.json:
        print(json.dumps(diagnosis.to_json()))
    else:
        print(diagnosis_text(diagnosis))
    return 0 if diagnosis.can_run else MissingDependencyError.exit_code
