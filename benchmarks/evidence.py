"""The paper's claims in miniature: trains, examines and times what `docs/results.md` shows.

    python benchmarks/evidence.py --base examples/demo_base --seeds 2,3,4 -o results.json
    python docs/update_results.py

The first command takes hours, and goes on where it stopped when it is given again. Each run uses
one thread. See README.md.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.evidence_extend import Held
from benchmarks.harness.evidence_jobs import Processes
from benchmarks.harness.evidence_plan import ExamSize, chosen_variants
from benchmarks.harness.evidence_run import BASE_CONFIGS, Settings, run
from stts_export.errors import InputError, SttsError
from stts_export.files import write_json
from stts_export.training.config import TrainConfig

_CONFIG = Path("configs/evidence.yaml")
_SEEDS = range(1, 50)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train, examine and time what docs/results.md shows.",
        epilog="Give the same command again to go on where it stopped.",
    )
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument(
        "--base", metavar="CHECKPOINT", help="all start here, with a scorer of their own"
    )
    base.add_argument(
        "--from-scratch", action="store_true", help="train a base for each seed: an hour each"
    )
    parser.add_argument("--config", type=Path, default=_CONFIG, help=f"of main ({_CONFIG})")
    parser.add_argument(
        "--base-config", type=Path, nargs="+", default=BASE_CONFIGS,
        help="of the bases with --from-scratch, one after the other "
        f"({' '.join(map(str, BASE_CONFIGS))})",
    )  # fmt: skip
    parser.add_argument("--seeds", default="1,2,3", help="comma separated (1,2,3)")
    parser.add_argument(
        "--variants",
        help="comma separated, main among them unless --extend has it; all but two if absent",
    )
    parser.add_argument(
        "--extend", type=Path, metavar="RESULTS",
        help="JSON of an earlier command: what it holds is kept, these variants are added; "
        "main and speed are not repeated. -o may name the same file",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=Path("runs/evidence"),
        help="folder of runs and clips; what is finished in it is not done again (runs/evidence)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a thread each (1)")
    sizes = ExamSize()
    parser.add_argument(
        "--questions", type=int, default=sizes.questions, help=f"of each seed ({sizes.questions})"
    )
    parser.add_argument(
        "--clips", type=int, default=sizes.clips, help=f"of each seed ({sizes.clips})"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(arguments)
    for name in ("jobs", "questions", "clips"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: 1 or more")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    names = None if args.variants is None else args.variants.split(",")
    extends = None if args.extend is None else Held.read(args.extend)
    return Settings(
        config=TrainConfig.from_file(args.config),
        config_name=str(args.config),
        work=args.work,
        seeds=_seeds(args.seeds),
        variants=tuple(chosen_variants(names, with_main=extends is None)),
        base=args.base,
        base_configs=tuple(map(TrainConfig.from_file, args.base_config))
        if args.from_scratch
        else (),
        exam=ExamSize(args.questions, args.clips),
        jobs=args.jobs,
        extends=extends,
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or not all(seed in _SEEDS for seed in seeds):
        raise InputError(
            f"seeds {text!r}",
            where="--seeds",
            allowed=f"different numbers of {_SEEDS[0]} to {_SEEDS[-1]}, such as 1,2,3",
        )
    return tuple(seeds)


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C: what runs is told, and saves."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse(given)

    def say(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    command = shlex.join(["python", "benchmarks/evidence.py", *given])
    try:
        with _terminable():
            results = run(_settings(args), Processes(), command, say)
        write_json(args.output, results)
    except KeyboardInterrupt:
        say("stopped; give the same command again to go on")
        return 130
    except SttsError as error:
        say(f"error: {error}")
        return error.exit_code
    say(f"wrote {args.output}; python docs/update_results.py shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
