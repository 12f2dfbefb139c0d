"""`stts-export run`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from stts_export.cli.common import (
    Arguments,
    backend_options,
    generation_options,
    overlay_files,
    sampling_of,
    stages,
)
from stts_export.errors import InputError

if TYPE_CHECKING:
    from stts_export.runtime.logits import Sampling
    from stts_export.runtime.prompt import Subtitle
    from stts_export.runtime.session import Answer, Session
    from stts_export.runtime.video import VideoClip
    from stts_export.runtime.vision import Refill
    from stts_export.runtime.visuals import Encoded


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="video or image; images come first"
    )
    prompt = verb.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="the question")
    prompt.add_argument(
        "--prompt-ids", type=Path, metavar="FILE",
        help="JSON array of token ids: the complete sequence as before pruning",
    )  # fmt: skip
    verb.add_argument(
        "--subtitles", type=Path, metavar="FILE",
        help="SubRip (.srt) or WebVTT (.vtt) of the video, for prompts about a single one",
    )  # fmt: skip
    verb.add_argument(
        "--prune-ratio", type=float,
        help="fraction of windows to remove from each video; as trained if absent",
    )  # fmt: skip
    verb.add_argument("--max-frames", type=int, help="most frames to sample from each video")
    verb.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (64)")
    generation_options(verb)
    verb.add_argument(
        "--logprobs", type=int, default=0, metavar="N",
        help="report log-probabilities: of each token, and of the N most likely there",
    )  # fmt: skip
    verb.add_argument(
        "--stream", action="store_true",
        help="print the answer as it comes; to stderr with --json",
    )  # fmt: skip
    verb.add_argument(
        "--refill", choices=("reference", "off"), default="reference",
        help="a frame alone in its bin gets its removed windows back as context (reference) or not",
    )  # fmt: skip
    verb.add_argument(
        "--overlay", type=Path, metavar="OUT",
        help="draw kept and removed windows: OUT.mp4 (and a contact sheet OUT.png beside it), "
        "or OUT.png for the sheet alone; of several files OUT-1, OUT-2 and so on",
    )  # fmt: skip
    backend_options(verb)
    verb.add_argument("--device", help="cpu (default) or cuda; for engines cuda or cuda:N")
    verb.add_argument("--threads", type=int, help="threads within an operator; all cores if absent")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    from stts_export.runtime.session import Session

    sampling, subtitles = sampling_of(arguments), _subtitles(arguments.subtitles)
    overlays = overlay_files(arguments.overlay, arguments.files)
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
        clips, encoded, values = _answer(session, prompt, sampling, subtitles, arguments)
    if not arguments.json:
        if not arguments.stream:
            text, ids = values["text"], values["token_ids"]
            print(text if text is not None else " ".join(map(str, ids)))
        _print_summary(values)
    written: list[str] = []
    try:
        grid = session.config.vision.window_grid
        for output, video, clip in zip(overlays, clips, encoded, strict=False):
            for path in _write_overlay(output, grid, video, clip):
                written.append(str(path))
                if not arguments.json:
                    print(f"wrote {path}")
    finally:  # a picture that fails does not cost the answer
        if arguments.json:
            print(json.dumps({**values, "overlay": written}))
    return 0


def _answer(
    session: Session,
    prompt: str | list[int],
    sampling: Sampling,
    subtitles: tuple[Subtitle, ...],
    arguments: Arguments,
) -> tuple[list[VideoClip], list[Encoded], dict[str, Any]]:
    """Read, check, encode, answer.

    Returns:
        The clips if they are to be drawn; what became of each file; what `--json` prints.
    """
    ratio, limit = arguments.prune_ratio, arguments.max_new_tokens
    stop, logprobs = arguments.stop, arguments.logprobs
    check = partial(
        session.check_prompt,
        prompt=prompt,
        max_new_tokens=limit,
        prune_ratio=ratio,
        subtitles=subtitles,
        stop=stop,
        logprobs=logprobs,
    )
    check(arguments.files)
    started = time.perf_counter()
    clips: list[VideoClip] = []
    for file in arguments.files:
        with stages() as report:
            clips.append(session.read_video(file, arguments.max_frames, partial(report, "read")))
    read_seconds = time.perf_counter() - started
    if arguments.overlay and all(clip.is_image for clip in clips):
        raise InputError(
            "nothing is removed from images, so there is nothing to draw",
            where=f"--overlay {arguments.overlay}",
            allowed="videos",
        )
    check(clips)
    drawn = list(clips) if arguments.overlay else []
    encoded: list[Encoded] = []
    while clips:  # pixels that are not drawn are not held
        encoded.append(_encode(session, clips.pop(0), ratio, arguments.refill))
    ask = partial(
        session.generate,
        encoded,
        prompt,
        limit,
        subtitles=subtitles,
        sampling=sampling,
        stop=stop,
        logprobs=logprobs,
    )
    if arguments.stream:
        answer = _stream(ask, session.has_tokenizer, sys.stderr if arguments.json else sys.stdout)
    else:
        tokens = count(1)
        with stages() as report:
            answer = ask(on_token=lambda _: report("decode", next(tokens), limit))
    values = {**asdict(answer), "timings": {"read": read_seconds, **answer.timings}}
    summaries = zip(arguments.files, values.pop("visuals"), strict=True)
    values["inputs"] = [{"file": str(file), **summary} for file, summary in summaries]
    return drawn, encoded, values


def _encode(session: Session, clip: VideoClip, ratio: float | None, refill: Refill) -> Encoded:
    with stages() as report:
        if clip.is_image:
            return session.encode_image(clip, on_progress=report)
        return session.encode(clip, ratio, refill=refill, on_progress=report)


def _subtitles(path: Path | None) -> tuple[Subtitle, ...]:
    if path is None:
        return ()
    from stts_export.runtime.subtitles import read_subtitles

    return read_subtitles(path)


def _stream(ask: Callable[..., Answer], has_tokenizer: bool, file: TextIO) -> Answer:
    """Print an answer, or its ids, as it comes."""

    def show(piece: str) -> None:
        file.write(piece)
        file.flush()

    try:
        if has_tokenizer:
            return ask(on_text=show)
        return ask(on_token=lambda token: show(f"{token} "))
    finally:
        show("\n")


def _print_summary(values: Mapping[str, Any]) -> None:
    for entry in values["logprobs"] or ():
        top = ", ".join(f"{_token(other)} {other['logprob']:.3f}" for other in entry["top"])
        print(f"{entry['logprob']:8.3f} {_token(entry)}; most likely {top}")
    inputs = values["inputs"]
    for entry in inputs:
        name = f"{entry['file']}: " if len(inputs) > 1 else ""
        if entry["kind"] == "image":
            seen = f"{entry['kept_windows']} tokens from {entry['frames']} crops ({entry['note']})"
            print(f"{name}{seen}")
        else:
            print(f"{name}{_kept(entry)}")
    if sum(entry["kind"] == "video" for entry in inputs) > 1:
        print(f"all videos: {_kept(values)}")
    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in values["timings"].items())
    print(f"seconds: {stages}", flush=True)


def _token(entry: Mapping[str, Any]) -> str:
    return str(entry["token_id"]) if entry["text"] is None else repr(entry["text"])


def _kept(values: Mapping[str, Any]) -> str:
    removed = values["note"] or f"prune ratio {values['prune_ratio']:g}"
    return (
        f"kept {values['kept_windows']} of {values['total_windows']} windows "
        f"in {values['frames']} frames ({removed})"
    )


def _write_overlay(
    output: Path, grid: tuple[int, int], video: VideoClip, clip: Encoded
) -> Iterator[Path]:
    """Draw a video, and yield the name of every file that is finished."""
    from stts_export.runtime.overlay import write_contact_sheet, write_overlay
    from stts_export.runtime.visuals import EncodedImage

    if isinstance(clip, EncodedImage):
        return
    if output.suffix.lower() == ".mp4":
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
