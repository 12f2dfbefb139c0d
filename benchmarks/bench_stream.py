"""Live streams: time to the first token, shared capacity, and the latency budget under load.

    python benchmarks/bench_stream.py              # about 6 minutes; --json and --picture keep it
    python benchmarks/bench_stream.py --quick      # a smoke run; its numbers mean nothing
    python benchmarks/bench_stream.py --show benchmarks/results/bench_stream_cpu.json

A model with random weights and real time: frames come when a camera would give them, and the clock
on the wall counts. Run it on an idle machine. See README.md for how to read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.clips import moving_clip
from benchmarks.harness.stream_bundle import (
    MAX_FPS,
    MAX_FRAMES,
    TRAINED_RATIO,
    stream_bundle,
    stream_shape,
)
from benchmarks.harness.stream_measure import (
    PHASES,
    QUESTION,
    RATIO,
    Say,
    Settings,
    growth,
    measure_streams,
    measure_windows,
    trace_controller,
)
from benchmarks.harness.stream_picture import draw
from benchmarks.harness.tables import table
from benchmarks.harness.timing import machine
from stts_export.files import write_json
from stts_export.runtime.session import Session

_FULL = Settings(
    quick=False,
    threads=None,
    windows=(4, 8, 16, 32, 64),
    repeats=5,
    fps=2.0,
    every=2,
    streams=(1, 2, 4, 8),
    rate=64.0,
    stream_window=16,
    stream_every=2.0,
    stream_rounds=2,
    warm_up=2.0,
    seconds=8.0,
    controller_window=16,
    phase_questions=25,
    budget_factor=1.5,
    competitors=3,
    max_new_tokens=8,
)
_QUICK = dataclasses.replace(
    _FULL,
    quick=True,
    windows=(2, 4),
    repeats=2,
    fps=16.0,
    streams=(1, 2),
    rate=32.0,
    stream_window=4,
    stream_every=0.5,
    warm_up=0.2,
    seconds=1.0,
    controller_window=4,
    phase_questions=6,
    max_new_tokens=2,
)


def run(settings: Settings, cache: Path, command: str, say: Say) -> dict[str, Any]:
    """Run the whole benchmark; returns what `--json` writes."""
    say("building the bundle, or finding it in the cache")
    bundle = stream_bundle(cache, quick=settings.quick)
    computer = machine()
    with Session.open(bundle, threads=settings.threads) as session:
        clip = moving_clip(MAX_FRAMES, session.config.vision.image_size)
        started, started_cpu = time.perf_counter(), time.process_time()
        windows = measure_windows(session, settings, clip, say)
        streams = measure_streams(session, settings, clip, say)
        controller = trace_controller(session, settings, clip, say)
        model = _describe_model(session, quick=settings.quick)
        backend = session.backend
    return {
        "benchmark": "bench_stream",
        "command": command,
        "quick": settings.quick,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {**computer, "load_average_after": machine()["load_average"]},
        "run_seconds": {
            "wall": time.perf_counter() - started,
            "cpu": time.process_time() - started_cpu,
        },
        "settings": {
            **dataclasses.asdict(settings),
            "backend": backend,
            "question": QUESTION,
            "prune_ratio": RATIO,
        },
        "model": model,
        "windows": windows,
        "growth": growth(windows),
        "streams": streams,
        "controller": controller,
    }


def _describe_model(session: Session, *, quick: bool) -> dict[str, Any]:
    tower = session.config.vision
    return {
        "weights": "random",
        "precision": session.bundle.manifest.precision,
        "grid": list(tower.grid),
        "windows": tower.windows,
        "blocks_lower": tower.split_at,
        "blocks_upper": tower.num_layers - tower.split_at,
        "trained_prune_ratio": TRAINED_RATIO,
        "shape": dataclasses.asdict(stream_shape(quick=quick)),
    }


def render(results: dict[str, Any]) -> str:
    """Tables of a run, as plain text."""
    computer, settings, model = results["machine"], results["settings"], results["model"]
    load = f"{computer['load_average'][0]:g} before, {computer['load_average_after'][0]:g} after"
    grown, trace = results["growth"], results["controller"]
    longest = ", ".join(
        f"{mode} {quotient['median']:.2f} ({quotient['low']:.2f}-{quotient['high']:.2f})"
        for mode, quotient in grown["longest_over_shortest"].items()
    )
    lines = [
        f"{computer['cpu']}, {computer['cores']} cores, {settings['threads'] or 'all'} threads, "
        f"load {load}; ONNX Runtime {computer['onnxruntime']}, {results['date']}",
        f"vision tower {model['shape']['vision_width']} wide, {model['blocks_lower']} + "
        f"{model['blocks_upper']} blocks, {model['grid'][0]}x{model['grid'][1]} patches; decoder "
        f"{model['shape']['text_width']} wide; {model['precision']}; wall time",
        "",
        f"question to first token and to the answer of {settings['max_new_tokens']} tokens, "
        f"prune ratio {RATIO:g}, {settings['fps']:g} frames a second, milliseconds",
        *table(
            "frames mode kept first_token low high answer vision_upper segment prefill",
            [_window_cells(row) for row in results["windows"]],
        ),
        f"first token, {grown['longest']} over {grown['shortest']} frames: {longest}",
        "",
        f"streams at {settings['rate']:g} frames a second each, a question every "
        f"{settings['stream_every']:g} s, windows of {settings['stream_window']} frames",
        *table(
            "streams mode encoded/s low high dropped fairness answers skipped answer_ms",
            [_stream_cells(row) for row in results["streams"]],
        ),
        "",
        f"budget {trace['budget']:.2f} s, {settings['controller_window']} frames; load: "
        f"{trace['load']['streams']} more streams; {trace['ratio_changes']} changes of the ratio",
        *table(
            "load answers skipped within share answer_ms low high ratio changes",
            [_phase_cells(phase, trace["phases"][phase]) for phase in PHASES],
        ),
    ]
    return "\n".join(lines)


def _window_cells(row: dict[str, Any]) -> list[str]:
    first, stages = row["first_token"], row["stages"]
    return [
        str(row["frames"]),
        row["mode"],
        f"{row['kept_windows']:g}",
        *_milliseconds(first),
        _ms(row["latency"]["median"]),
        _ms(stages["vision_upper"]["median"]),
        _ms(stages["segment"]["median"]) if "segment" in stages else "-",
        _ms(stages["prefill"]["median"]),
    ]


def _stream_cells(row: dict[str, Any]) -> list[str]:
    encoded = row["encoded_per_second"]
    return [
        str(row["streams"]),
        row["mode"],
        *(f"{encoded[key]:.1f}" for key in ("median", "low", "high")),
        f"{100 * row['dropped_share']['median']:.0f}%",
        f"{row['fairness']['low']:.2f}",
        str(row["answers"]),
        str(row["skipped_questions"]),
        _ms(row["latency"]["median"]) if row["latency"] else "-",
    ]


def _phase_cells(phase: str, row: dict[str, Any]) -> list[str]:
    return [
        phase,
        str(row["answers"]),
        str(row["skipped_questions"]),
        str(row["within_budget"]),
        f"{100 * row['share_within_budget']:.0f}%",
        *(_milliseconds(row["latency"]) if row["latency"] else "---"),
        f"{row['prune_ratio']['median']:.2f}" if row["prune_ratio"] else "-",
        str(row["ratio_changes"]),
    ]


def _milliseconds(values: dict[str, Any]) -> list[str]:
    return [_ms(values[key]) for key in ("median", "low", "high")]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time live streams: first tokens, shared capacity, latency budgets.",
        epilog="Plan for over 10 minutes of an idle machine; the first run also builds a bundle.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny model, seconds; a smoke run")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="within an operator; all cores by default"
    )
    parser.add_argument("--windows", type=int, nargs="+", metavar="N", help="frames of windows")
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help="numbers of streams")
    parser.add_argument("--rate", type=float, metavar="FPS", help="frames a second of each stream")
    parser.add_argument(
        "--load", type=int, metavar="N", help="streams that are the load of the controller's trace"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="questions to each window")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(__file__).parents[1] / ".cache" / "bench",
        help="folder that keeps the bundle",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw the run into this PNG")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print an earlier run instead")
    args = parser.parse_args(arguments)
    for name in ("threads", "repeats", "load"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: 1 or more")
    if args.streams and min(args.streams) < 1:
        parser.error("--streams: 1 or more")
    every = _FULL.every
    if args.windows and not all(every <= n <= MAX_FRAMES and n % every == 0 for n in args.windows):
        parser.error(f"--windows: multiples of {every} up to {MAX_FRAMES}")
    if args.rate is not None and not 1 <= args.rate <= MAX_FPS:
        parser.error(f"--rate: 1 to {MAX_FPS:g}")
    if args.rate is not None and args.rate % 1:
        parser.error("--rate: a whole number")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    base = _QUICK if args.quick else _FULL
    given = {
        "threads": args.threads,
        "windows": tuple(sorted(set(args.windows or ()))),
        "streams": tuple(sorted(set(args.streams or ()))),
        "rate": args.rate,
        "repeats": args.repeats,
        "competitors": args.load,
    }
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse(given)
    if args.show:
        results = json.loads(args.show.read_text(encoding="utf-8"))
    else:
        command = shlex.join(["python", "benchmarks/bench_stream.py", *given])

        def say(step: str) -> None:
            print(step, file=sys.stderr, flush=True)

        results = run(_settings(args), args.cache, command, say)
    print(render(results))
    if args.json and not args.show:
        write_json(args.json, results)
    if args.picture:
        draw(results, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
