"""`stts-export run`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stts_export.cli.common import Arguments, backend_options, stages
from stts_export.errors import InputError

if TYPE_CHECKING:
    from stts_export.runtime.session import EncodedClip, Session
    from stts_export.runtime.video import VideoClip


def options(verb: argparse.ArgumentParser) -> None:
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
    backend_options(verb)
    verb.add_argument("--device", help="cpu (default) or cuda; for engines cuda or cuda:N")
    verb.add_argument("--threads", type=int, help="threads within an operator; all cores if absent")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
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
    with stages() as report:
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
        with stages() as report:
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
