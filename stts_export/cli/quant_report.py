"""`stts-export quant-report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stts_export.cli.common import Arguments
from stts_export.errors import VerificationError


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build with a recipe")
    verb.add_argument(
        "-o", "--output", type=Path, metavar="FILE.png", help="draw layers and checks as well"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    from stts_export.bundle import Bundle
    from stts_export.calibration.quant_report import QuantReport
    from stts_export.runtime.writing import check_writable

    if arguments.output:
        check_writable(arguments.output, (".png",))
    bundle = Bundle.open(arguments.bundle)
    report = QuantReport.load(bundle.folder, bundle.manifest.precision_name)
    if arguments.output:
        report.write_picture(arguments.output)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        print("\n".join(report.lines(verbose=arguments.verbose)))
    return 0 if report.passed else VerificationError.exit_code
