"""`stts-export verify`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from stts_export.cli.common import Arguments, backend_options, path_or_name
from stts_export.errors import VerificationError
from stts_export.files import write_json


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument(
        "--against", type=path_or_name, required=True, metavar="CHECKPOINT",
        help="what it was built from",
    )  # fmt: skip
    verb.add_argument("--revision", help="of a checkpoint on the hub, as for build")
    verb.add_argument(
        "--video", type=Path, action="append", default=[],
        help="compare on this file (repeatable); built-in clips if absent",
    )  # fmt: skip
    backend_options(verb)
    verb.add_argument(
        "--keep-repro", type=Path, metavar="DIR",
        help="new folder for files with which `polygraphy run` reproduces what differs",
    )  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    from stts_export.bundle import REPORT_FOLDER
    from stts_export.verify import verify

    report = verify(
        arguments.bundle,
        arguments.against,
        arguments.video,
        backend=arguments.backend,
        plugin=arguments.plugin,
        keep_repro=arguments.keep_repro,
        revision=arguments.revision,
    )
    try:
        write_json(arguments.bundle / REPORT_FOLDER / "verify.json", report.to_dict())
    except OSError as error:
        print(f"warning: the report is not kept in the bundle: {error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        for name, passed, worst, limit, where in report.worst_by_name():
            print(
                f"{'ok  ' if passed else 'FAIL'} {name}: {worst:.2g}, limit {limit:.2g} ({where})"
            )
        outcome = "agrees with" if report.passed else "DIFFERS from"
        how = f"{report.precision}, {report.backend}"
        print(f"{arguments.bundle} ({how}) {outcome} {arguments.against}")
        for folder in report.repro:
            print(f"sh {folder}/reproduce.sh  # shows the difference with polygraphy")
        if arguments.keep_repro and report.passed:
            print(f"nothing differs, so {arguments.keep_repro} was not written")
    return 0 if report.passed else VerificationError.exit_code
