"""The command line: a table of verbs. It adds nothing that the library cannot do."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stts_export._version import __version__
from stts_export.errors import InputError, SttsError
from stts_export.files import readable_size, write_json
from stts_export.machine import machine
from stts_export.progress import Progress

if TYPE_CHECKING:
    from stts_export.runtime.session import EncodedClip, Session
    from stts_export.runtime.video import VideoClip

EXIT_VERIFICATION_FAILED = 3

Arguments = argparse.Namespace
Handler = Callable[[Arguments], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 done, 1 bad input, 3 verification failed, 4 something is not installed; 2 (usage) is
        argparse's own exit.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    handler: Handler = arguments.handler
    try:
        return handler(arguments)
    except SttsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stts-export",
        description="Token-pruned video language models on real devices.",
    )
    parser.add_argument("--version", action="version", version=f"stts-export {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, summary, options, handler in _VERBS:
        verb = verbs.add_parser(name, help=summary, description=summary)
        options(verb)
        verb.add_argument("-v", "--verbose", action="store_true", help="log what happens")
        verb.set_defaults(handler=handler)
    return parser


def _build_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("checkpoint", type=Path, help="Molmo2 or STTS checkpoint folder")
    verb.add_argument("-o", "--output", type=Path, required=True, help="bundle folder to write")
    verb.add_argument("--precision", default="fp32", help="fp32 (default) or fp16")
    verb.add_argument(
        "--backend", action="append", help="back end to build for; onnxruntime (default)"
    )
    verb.add_argument(
        "--max-frames", type=int, help="longest clip; the checkpoint's num_frames, or 64, if absent"
    )
    verb.add_argument(
        "--min-prune-ratio", type=float, default=0.0, help="lowest ratio the bundle accepts (0)"
    )
    verb.add_argument("--force", action="store_true", help="replace an existing bundle")


def _build(arguments: Arguments) -> int:
    from stts_export.build import BuildSpec, bundle_from_checkpoint

    spec = BuildSpec(
        precision=arguments.precision,
        max_frames=arguments.max_frames,
        min_prune_ratio=arguments.min_prune_ratio,
        backends=tuple(arguments.backend or ("onnxruntime",)),
    )

    def on_stage(stage: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {stage}: export and compare with PyTorch", file=sys.stderr)

    started = time.perf_counter()
    bundle = bundle_from_checkpoint(
        arguments.checkpoint, arguments.output, spec, force=arguments.force, on_stage=on_stage
    )
    seconds = time.perf_counter() - started
    print(f"{bundle}: {readable_size(_bytes_below(bundle))}, built in {seconds:.0f} s")
    return 0


def _run_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument("video", type=Path, help="video or image file")
    prompt = verb.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="the question")
    prompt.add_argument(
        "--prompt-ids", type=Path, metavar="FILE",
        help="JSON array of token ids: the complete sequence as before pruning",
    )  # fmt: skip
    verb.add_argument(
        "--prune-ratio", type=float, help="fraction of windows to remove; as trained if absent"
    )
    verb.add_argument("--max-frames", type=int, help="most frames to sample")
    verb.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (64)")
    verb.add_argument(
        "--refill", choices=("reference", "off"), default="reference",
        help="a frame alone in its bin gets its removed windows back as context (reference) or not",
    )  # fmt: skip
    verb.add_argument(
        "--overlay", type=Path, metavar="OUT",
        help="draw kept and removed windows: OUT.mp4 (and a contact sheet OUT.png beside it), "
        "or OUT.png for the sheet alone",
    )  # fmt: skip
    verb.add_argument("--backend", help="onnxruntime")
    verb.add_argument("--device", help="cpu (default) or cuda")
    verb.add_argument("--threads", type=int, help="threads within an operator; all cores if absent")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: Arguments) -> int:
    from stts_export.runtime.session import Session
    from stts_export.runtime.writing import check_writable

    if arguments.overlay:
        check_writable(arguments.overlay, (".mp4", ".png"))
    prompt = arguments.prompt
    if arguments.prompt_ids:
        prompt = _read_ids(arguments.prompt_ids)
    with Session.open(
        arguments.bundle, arguments.backend, arguments.device, arguments.threads
    ) as session:
        started = time.perf_counter()
        video = session.read_video(arguments.video, arguments.max_frames)
        read_seconds = time.perf_counter() - started
        clip = _encode(session, video, arguments)
        answer = session.generate(clip, prompt, arguments.max_new_tokens)
    values = asdict(answer)
    values["timings"] = {"read": read_seconds, **answer.timings}
    written = _write_overlay(arguments.overlay, session, video, clip) if arguments.overlay else []
    if arguments.json:
        print(json.dumps({**values, "overlay": [str(path) for path in written]}))
        return 0
    print(answer.text if answer.text is not None else " ".join(map(str, answer.token_ids)))
    removed = answer.note or f"prune ratio {answer.prune_ratio:g}"
    print(
        f"kept {answer.kept_windows} of {answer.total_windows} windows "
        f"in {answer.frames} frames ({removed})"
    )
    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in values["timings"].items())
    print(f"seconds: {stages}")
    for path in written:
        print(f"wrote {path}")
    return 0


def _encode(session: Session, video: VideoClip, arguments: Arguments) -> EncodedClip:
    bars: dict[str, Progress] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        units = {"vision_lower": "frames", "vision_upper": "windows"}
        if stage not in bars:
            bars[stage] = Progress(stage, total, units[stage])
        bars[stage].update(done)

    return session.encode(
        video, arguments.prune_ratio, refill=arguments.refill, on_progress=on_progress
    )


def _write_overlay(
    output: Path, session: Session, video: VideoClip, clip: EncodedClip
) -> list[Path]:
    from stts_export.runtime.overlay import write_contact_sheet, write_overlay

    grid = session.config.vision.window_grid
    sheet = output.with_suffix(".png")
    written = [sheet]
    if output.suffix.lower() == ".mp4" and not video.is_image:
        write_overlay(output, video.source, clip.keep, grid, clip.timestamps, scores=clip.scores)
        written.insert(0, output)
    write_contact_sheet(
        sheet, video.frames, clip.keep, grid, clip.timestamps,
        frame_size=video.source_size, scores=clip.scores,
    )  # fmt: skip
    return written


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be read: {error}", where=str(path), allowed="a JSON array of token ids"
        ) from None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise InputError("is not a JSON array of integers", where=str(path))
    return ids


def _inspect_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(arguments: Arguments) -> int:
    from stts_export.inspect import describe, describe_text

    description = describe(arguments.bundle)
    print(json.dumps(description) if arguments.json else describe_text(description))
    return 0


def _verify_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument(
        "--against", type=Path, required=True, metavar="CHECKPOINT", help="what it was built from"
    )
    verb.add_argument(
        "--video", type=Path, action="append", default=[],
        help="compare on this file (repeatable); built-in clips if absent",
    )  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(arguments: Arguments) -> int:
    from stts_export.bundle import REPORT_FOLDER
    from stts_export.verify import verify

    report = verify(arguments.bundle, arguments.against, arguments.video)
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
        print(f"{arguments.bundle} ({report.precision}) {outcome} {arguments.against}")
    return 0 if report.passed else EXIT_VERIFICATION_FAILED


def _train_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, help="YAML file, for example configs/demo.yaml")
    verb.add_argument("-o", "--output", type=Path, help="run folder; runs/<config name> if absent")
    verb.add_argument("--resume", action="store_true", help="go on where the run folder stopped")
    verb.add_argument("--dry-run", action="store_true", help="check everything, train nothing")


def _train(arguments: Arguments) -> int:
    from stts_export.training.loop import train

    run = train(
        arguments.config,
        output=arguments.output,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )
    print(run)
    return 0


def _eval_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument("--questions", type=int, default=500, help="held-out questions (500)")
    verb.add_argument("--clips", type=int, default=250, help="different clips (250)")
    verb.add_argument("--prune-ratio", default="0,0.5,0.8", help="ratios, comma separated")
    verb.add_argument("--selector", default="stts,random", help="stts, random; comma separated")
    verb.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _eval(arguments: Arguments) -> int:
    from stts_export.training.evaluation import evaluate, table

    try:
        ratios = [float(ratio) for ratio in arguments.prune_ratio.split(",")]
    except ValueError:
        raise InputError(
            f"prune ratios {arguments.prune_ratio!r}", where="--prune-ratio", allowed="0,0.5,0.8"
        ) from None
    results = evaluate(
        arguments.bundle,
        questions=arguments.questions,
        clips=arguments.clips,
        ratios=ratios,
        selectors=arguments.selector.split(","),
    )
    results["machine"] = machine()
    results["command"] = _command(arguments)
    if arguments.output:
        write_json(arguments.output, results)
    print(json.dumps(results) if arguments.json else table(results))
    return 0


def _command(arguments: Arguments) -> str:
    """Return the command line that gives the same results."""
    words = ["stts-export", "eval", str(arguments.bundle)]
    for name in ("questions", "clips", "prune_ratio", "selector"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return shlex.join(words)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


_VERBS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None], Handler], ...] = (
    ("build", "Build a bundle from a checkpoint.", _build_options, _build),
    ("run", "Answer a question about a video.", _run_options, _run),
    ("inspect", "Show what a bundle holds.", _inspect_options, _inspect),
    ("verify", "Compare a bundle with its checkpoint.", _verify_options, _verify),
    ("train", "Train a model on synthetic clips.", _train_options, _train),
    ("eval", "Measure a bundle's accuracy on held-out clips.", _eval_options, _eval),
)


if __name__ == "__main__":
    sys.exit(main())
