"""The command line: a table of verbs. It adds nothing that the library cannot do."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stts_export._version import __version__
from stts_export.errors import InputError, MissingDependencyError, SttsError
from stts_export.files import readable_size, write_json
from stts_export.machine import machine
from stts_export.progress import Progress

if TYPE_CHECKING:
    from stts_export.runtime.session import EncodedClip, Session
    from stts_export.runtime.video import VideoClip

EXIT_VERIFICATION_FAILED = 3

Arguments = argparse.Namespace
Handler = Callable[[Arguments], int]
Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_PIP_NAME = {
    "torch": "'stts-export[train]'",
    "safetensors": "'stts-export[train]'",
    "yaml": "'stts-export[train]'",
    "onnx": "'stts-export[export]'",
    "onnxscript": "'stts-export[export]'",
    "onnx_ir": "'stts-export[export]'",
    "onnxruntime": "'stts-export[cpu]'",
    "tensorrt_rtx": "'stts-export[trt-rtx]'",
    "tensorrt": "'stts-export[trt]'",
    "cuda": "'stts-export[trt]'",
    "transformers": "transformers",
}
"""What to install for packages that only some verbs need."""
_UNITS = {
    "read": "frames",
    "vision_lower": "frames",
    "vision_upper": "windows",
    "decode": "tokens",
    "overlay": "frames",
}
"""What is counted in the stages of `run`; percent in the engines of `build`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 done, 1 bad input, 3 verification failed, 4 something is not installed, 130 interrupted;
        2 (usage) is argparse's own exit.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    handler: Handler = arguments.handler
    try:
        with _known_packages(arguments.verb):
            return handler(arguments)
    except SttsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def _known_packages(verb: str) -> Iterator[None]:
    """Say how to install one of our optional packages when it is missing."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PIP_NAME:
            raise
        raise MissingDependencyError(
            f"needs the package {package}: {error}",
            where=verb,
            fix=f"pip install {_PIP_NAME[package]}",
        ) from None


@contextmanager
def _stages() -> Iterator[Report]:
    """Yield what draws one progress bar per stage, each ended before the next begins."""
    with ExitStack() as shown:
        bars: dict[str, Progress] = {}
        began = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            nonlocal began
            if stage not in bars:
                if done == 0:  # it says when it begins
                    began = time.monotonic()
                shown.close()
                bars[stage] = Progress(stage, total, _UNITS.get(stage, "%"), started=began)
                shown.enter_context(bars[stage])
            bars[stage].update(done)
            if done == total:
                began = time.monotonic()

        yield report


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
    verb.add_argument(
        "source", type=Path, metavar="CHECKPOINT|BUNDLE",
        help="Molmo2 or STTS checkpoint folder; or a bundle, to build engines from its graphs",
    )  # fmt: skip
    verb.add_argument("-o", "--output", type=Path, required=True, help="bundle folder to write")
    verb.add_argument(
        "--precision", help="fp32 (default) or fp16; a bundle's own when built from a bundle"
    )
    verb.add_argument(
        "--backend", action="append",
        help="back end to build for (repeatable, the first is the default of the bundle): "
        "onnxruntime (default), tensorrt on the GPU it is for, tensorrt-rtx anywhere",
    )  # fmt: skip
    verb.add_argument(
        "--target", action="append",
        help="GPUs to build engines for, such as sm89,sm120; this machine's if absent",
    )  # fmt: skip
    verb.add_argument(
        "--max-frames", type=int, help="longest clip; the checkpoint's num_frames, or 64, if absent"
    )
    verb.add_argument(
        "--max-tokens", type=int,
        help="longest sequence; if absent the model's longest, and with engines no more than the "
        "longest clip needs",
    )  # fmt: skip
    verb.add_argument("--min-prune-ratio", type=float, help="lowest ratio the bundle accepts (0)")
    verb.add_argument(
        "--memory-limit", metavar="SIZE",
        help="device memory for temporary results of a layer, in GiB or as 512M; all if absent",
    )  # fmt: skip
    verb.add_argument(
        "--plugin", type=Path, metavar="FILE",
        help="libstts_plugins.so, for tensorrt; looked for in STTS_PLUGIN_PATH, the bundle and "
        "the build tree if absent",
    )  # fmt: skip
    verb.add_argument("--force", action="store_true", help="replace an existing bundle")


def _build(arguments: Arguments) -> int:
    from stts_export.build import BuildSpec, bundle_from_bundle, bundle_from_checkpoint
    from stts_export.bundle import Bundle, is_bundle

    spec = BuildSpec(
        precision=arguments.precision,
        max_frames=arguments.max_frames,
        max_tokens=arguments.max_tokens,
        min_prune_ratio=arguments.min_prune_ratio,
        backends=tuple(arguments.backend or ("onnxruntime",)),
        targets=_targets(arguments.target or ()),
        memory_limit=_memory(arguments.memory_limit) if arguments.memory_limit else None,
        plugin=arguments.plugin,
    )

    def on_stage(stage: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {stage}", file=sys.stderr, flush=True)

    build = bundle_from_bundle if is_bundle(arguments.source) else bundle_from_checkpoint
    started = time.perf_counter()
    with _stages() as report:
        bundle = build(
            arguments.source,
            arguments.output,
            spec,
            force=arguments.force,
            on_stage=on_stage,
            on_progress=report,
        )
    seconds = time.perf_counter() - started
    opened = Bundle.open(bundle)
    for engines in opened.engine_sets():
        for engine in filter(None, (engine.command for engine in engines.engines.values())):
            print(f"in {bundle}: {engine}", file=sys.stderr)
    limits = opened.manifest.limits
    print(f"{bundle}: {readable_size(_bytes_below(bundle))}, built in {seconds:.0f} s")
    print(f"takes up to {limits.max_frames} frames and {limits.max_tokens} tokens")
    return 0


def _targets(lists: Sequence[str]) -> tuple[str, ...]:
    """Split comma-separated lists; every target once."""
    names = (name.strip().lower() for text in lists for name in text.split(","))
    return tuple(dict.fromkeys(names))


def _memory(text: str) -> int:
    """Bytes of a size in GiB, or with a suffix K, M or G."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, suffix = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "G")
    try:
        size = int(float(number) * scale[suffix])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(
            f"size {text!r}", where="--memory-limit", allowed="GiB, or with a suffix, as 4G or 512M"
        )
    return size


def _backend_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--backend",
        help="onnxruntime, tensorrt or tensorrt-rtx; the first the bundle was built for if absent",
    )
    verb.add_argument(
        "--plugin", type=Path, metavar="FILE",
        help="libstts_plugins.so, for tensorrt; found as by build if absent",
    )  # fmt: skip


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
    _backend_options(verb)
    verb.add_argument("--device", help="cpu (default) or cuda; for engines cuda or cuda:N")
    verb.add_argument("--threads", type=int, help="threads within an operator; all cores if absent")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: Arguments) -> int:
    from stts_export.runtime.session import Session

    if arguments.overlay:
        _check_overlay(arguments.overlay, arguments.video)
    prompt = arguments.prompt
    if arguments.prompt_ids:
        prompt = _read_ids(arguments.prompt_ids)
    with Session.open(
        arguments.bundle,
        arguments.backend,
        arguments.device,
        arguments.threads,
        arguments.plugin,
    ) as session:
        video, clip, values = _answer(session, prompt, arguments)
    if not arguments.json:
        _print_answer(values)
    written: list[str] = []
    try:
        if arguments.overlay:
            grid = session.config.vision.window_grid
            for path in _write_overlay(arguments.overlay, grid, video, clip):
                written.append(str(path))
                if not arguments.json:
                    print(f"wrote {path}")
    finally:  # a picture that fails does not cost the answer
        if arguments.json:
            print(json.dumps({**values, "overlay": written}))
    return 0


def _answer(
    session: Session, prompt: str | list[int], arguments: Arguments
) -> tuple[VideoClip, EncodedClip, dict[str, Any]]:
    """Read, check, encode, answer; the last value is what `--json` prints."""
    ratio, limit = arguments.prune_ratio, arguments.max_new_tokens
    with _stages() as report:
        started = time.perf_counter()
        video = session.read_video(arguments.video, arguments.max_frames, partial(report, "read"))
        read_seconds = time.perf_counter() - started
        session.check_prompt(video, prompt, limit, prune_ratio=ratio)
        clip = session.encode(video, ratio, refill=arguments.refill, on_progress=report)
        tokens: list[int] = []

        def on_token(token: int) -> None:
            tokens.append(token)
            report("decode", len(tokens), limit)

        answer = session.generate(clip, prompt, limit, on_token=on_token)
    return video, clip, {**asdict(answer), "timings": {"read": read_seconds, **answer.timings}}


def _print_answer(values: Mapping[str, Any]) -> None:
    text, ids = values["text"], values["token_ids"]
    print(text if text is not None else " ".join(map(str, ids)))
    removed = values["note"] or f"prune ratio {values['prune_ratio']:g}"
    print(
        f"kept {values['kept_windows']} of {values['total_windows']} windows "
        f"in {values['frames']} frames ({removed})"
    )
    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in values["timings"].items())
    print(f"seconds: {stages}", flush=True)


def _check_overlay(output: Path, video: Path) -> None:
    """Refuse, before any work, names that cannot be written or that are the input."""
    from stts_export.runtime.writing import check_not_source, check_writable

    check_writable(output, (".mp4", ".png"))
    for path in (output, output.with_suffix(".png")):
        check_writable(path, (path.suffix.lower(),))
        check_not_source(path, video)


def _write_overlay(
    output: Path, grid: tuple[int, int], video: VideoClip, clip: EncodedClip
) -> Iterator[Path]:
    """Draw, and yield the name of every file that is finished."""
    from stts_export.runtime.overlay import write_contact_sheet, write_overlay

    if output.suffix.lower() == ".mp4" and not video.is_image:
        with _stages() as report:
            write_overlay(
                output, video.source, clip.keep, grid, clip.timestamps,
                scores=clip.scores, on_progress=partial(report, "overlay"),
            )  # fmt: skip
        yield output
    sheet = output.with_suffix(".png")
    write_contact_sheet(
        sheet, video.frames, clip.keep, grid, clip.timestamps,
        frame_size=video.source_size, scores=clip.scores,
    )  # fmt: skip
    yield sheet


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    _backend_options(verb)
    verb.add_argument(
        "--keep-repro", type=Path, metavar="DIR",
        help="new folder for files with which `polygraphy run` reproduces what differs",
    )  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(arguments: Arguments) -> int:
    from stts_export.bundle import REPORT_FOLDER
    from stts_export.verify import verify

    report = verify(
        arguments.bundle,
        arguments.against,
        arguments.video,
        backend=arguments.backend,
        plugin=arguments.plugin,
        keep_repro=arguments.keep_repro,
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
    _backend_options(verb)
    verb.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _eval(arguments: Arguments) -> int:
    from stts_export.bundle import Bundle
    from stts_export.training.evaluation import evaluate, table

    try:
        ratios = [float(ratio) for ratio in arguments.prune_ratio.split(",")]
    except ValueError:
        raise InputError(
            f"prune ratios {arguments.prune_ratio!r}", where="--prune-ratio", allowed="0,0.5,0.8"
        ) from None
    if arguments.output:
        _check_report(arguments.output)
    results = evaluate(
        arguments.bundle,
        questions=arguments.questions,
        clips=arguments.clips,
        ratios=ratios,
        selectors=arguments.selector.split(","),
        backend=arguments.backend,
        plugin=arguments.plugin,
    )
    results["precision"] = Bundle.open(arguments.bundle).manifest.precision
    results["machine"] = machine()
    results["command"] = _command(arguments)
    print(json.dumps(results) if arguments.json else table(results), flush=True)
    if arguments.output:
        with _writing(arguments.output):
            write_json(arguments.output, results)
    return 0


def _check_report(path: Path) -> None:
    """Refuse, before any work, a name that cannot be written; make its folder."""
    with _writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="name a file in a folder that you may write to, with space on the disk",
        ) from None


def _command(arguments: Arguments) -> str:
    """Return the command line that gives the same results."""
    words = ["stts-export", "eval", str(arguments.bundle)]
    for name in ("questions", "clips", "prune_ratio", "selector", "backend", "plugin"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


_VERBS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None], Handler], ...] = (
    ("build", "Build a bundle from a checkpoint or a bundle.", _build_options, _build),
    ("run", "Answer a question about a video.", _run_options, _run),
    ("inspect", "Show what a bundle holds.", _inspect_options, _inspect),
    ("verify", "Compare a bundle with its checkpoint.", _verify_options, _verify),
    ("train", "Train a model on synthetic clips.", _train_options, _train),
    ("eval", "Measure a bundle's accuracy on held-out clips.", _eval_options, _eval),
)


if __name__ == "__main__":
    sys.exit(main())
