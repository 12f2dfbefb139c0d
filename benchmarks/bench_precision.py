"""What each precision costs and changes: sizes, gates, accuracy, windows, time on the CPU.

    python benchmarks/bench_precision.py examples/demo_checkpoint -o results.json
    python docs/update_precision.py

The first command takes about half an hour of one core, and goes on where it stopped when it is
given again. See README.md.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.evidence_plan import ExamSize
from benchmarks.harness.precision_plan import RECIPES, REFERENCE, Settings
from benchmarks.harness.precision_run import run
from stts_export.errors import SttsError
from stts_export.files import write_json


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what docs/precision.md shows.",
        epilog="Give the same command again to go on where it stopped.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="with a scorer, as for build")
    parser.add_argument(
        "--recipes", default=",".join(RECIPES),
        help=f"names or YAML files, comma separated, {REFERENCE} among them ({','.join(RECIPES)})",
    )  # fmt: skip
    sizes, defaults = ExamSize(), Settings("", (), Path())
    parser.add_argument(
        "--questions", type=int, default=sizes.questions, help=f"of the exam ({sizes.questions})"
    )
    parser.add_argument(
        "--clips", type=int, default=sizes.clips, help=f"of the test split ({sizes.clips})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the test clips, as for eval (0)")
    parser.add_argument(
        "--timed-clips", type=int, default=defaults.timed_clips,
        help=f"of the test clips, for time on the CPU ({defaults.timed_clips})",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=Path("runs/precision"),
        help="folder of bundles, scales and clips; what is finished in it is not done again "
        "(runs/precision)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(arguments)
    for name in ("questions", "clips", "timed_clips"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: 1 or more")
    return args


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse(given)

    def say(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    command = shlex.join(["python", "benchmarks/bench_precision.py", *given])
    settings = Settings(
        checkpoint=args.checkpoint,
        recipes=tuple(args.recipes.split(",")),
        work=args.work,
        exam=ExamSize(args.questions, args.clips),
        seed=args.seed,
        timed_clips=args.timed_clips,
    )
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        write_json(args.output, run(settings, command, say))
    except KeyboardInterrupt:
        say("stopped; give the same command again to go on")
        return 130
    except SttsError as error:
        say(f"error: {error}")
        return error.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"wrote {args.output}; python docs/update_precision.py shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
