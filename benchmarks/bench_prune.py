"""What pruning saves: time per stage beside the bound from operation counts.

    python benchmarks/bench_prune.py                       # about 7 minutes of one core
    python benchmarks/bench_prune.py --quick               # a smoke run; its numbers mean nothing
    python benchmarks/bench_prune.py --show benchmarks/results/bench_prune_cpu.json

A tower with random weights runs on one thread; all that is compared is interleaved in one run and
measured in CPU time, so that other load on the machine cancels. See README.md for how to read it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness import cost
from benchmarks.harness.clips import moving_clip
from benchmarks.harness.model import graphs, model_config
from benchmarks.harness.tables import table
from benchmarks.harness.timing import cpu_time, machine, summary
from stts_export.config import ModelConfig
from stts_export.engines import onnxruntime
from stts_export.files import write_json
from stts_export.runtime import decoder, planner, vision
from stts_export.runtime.prompt import visual_groups
from stts_export.tensors import (
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    graph_file,
)

FRAMES, BINS = "frames", "bins"
"""Layouts of the upper part: frames of equal window count without a mask; bins with a mask."""

LAYOUT_RATIO = 0.5
"""Prune ratio at which the layouts are compared."""
TARGET_OF_BOUND = 0.9
"""At ratio 0.5 and 32 frames or more, in the vision tower."""
TARGET_PLAN_MS = (1.0, 3.0)
"""256 frames: about the first, never above the second."""

_PLAN_RATIOS = (0.3, 0.5, 0.7)
_PLAN_TRIES = 3
# Spread between frames over spread within a frame: static camera, normal, cuts and stills.
_PLAN_SCENES = {"even": 0.0, "varying": 1.0, "uneven": 3.0}


@dataclass(frozen=True)
class Settings:
    """What to run."""

    quick: bool
    frame_counts: tuple[int, ...]
    ratios: tuple[float, ...]
    """Ascending, from 0."""
    repeats: int
    chunks: tuple[int, ...]
    """Frames per call to compare."""
    plan_frames: tuple[int, ...]
    plan_clips: int
    """Random clips per scene and ratio."""
    refill: vision.Refill

    def repeats_of(self, frames: int) -> int:
        """Long clips are repeated less: each repeat averages over more calls."""
        return self.repeats if frames <= 32 else max(2, self.repeats // 2)


@dataclass(frozen=True)
class Graphs:
    """The opened graphs, one thread each."""

    config: ModelConfig
    lower: decoder.Runner
    upper_frames: decoder.Runner
    upper_bins: decoder.Runner
    decoder: decoder.Runner

    @staticmethod
    def open(config: ModelConfig, folder: Path) -> Graphs:
        """Open the graphs that `harness.model` exported."""
        runners = (
            onnxruntime.open_graph(folder / graph_file(name), threads=1)
            for name in (VISION_LOWER, VISION_UPPER_FRAMES, VISION_UPPER, DECODER)
        )
        return Graphs(config, *runners)


@dataclass
class Case:
    """One clip length, ratio and layout: what it computes, and its times."""

    frames: int
    ratio: float
    layout: str
    kept: int = 0
    total: int = 0
    computed: int = 0
    """Window slots that the upper part runs on: kept, context, and free slots of bins."""
    bins: int = 0
    prompt: int = 0
    """Tokens of the prompt."""
    costs: dict[str, cost.Cost] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Stage to CPU seconds, one per repeat; `tower` is lower + select + upper."""

    def add(self, stage: str, seconds: float) -> None:
        """Note a measurement."""
        self.seconds.setdefault(stage, []).append(seconds)

    def cost_of(self, stage: str) -> cost.Cost:
        """Operations of a stage; `tower` has both parts."""
        if stage == "tower":
            return self.costs["vision_lower"] + self.costs["vision_upper"]
        return self.costs[stage]


def run_bins(
    runner: decoder.Runner, hidden: NDArray[Any], plan: planner.PackPlan, config: ModelConfig
) -> NDArray[Any]:
    """Run vision_upper on masked bins, as `vision.run_upper` does on frames; returns (K, C)."""
    windows = hidden.reshape(len(hidden) * config.vision.windows, -1)  # (T*W, G*D)
    packed = []
    for start in range(0, len(plan.segment), vision.UPPER_CHUNK):
        chunk = slice(start, start + vision.UPPER_CHUNK)
        rows = plan.gather_window[chunk]
        bins = windows[rows].reshape(len(rows), -1, config.vision.hidden_size)
        packed.append(runner({"bins": bins, "segment": plan.segment[chunk]})["packed_features"])
    features = np.concatenate(packed)
    return features.reshape(-1, features.shape[-1])[plan.kept_slot]


def measure_tower(
    opened: Graphs, settings: Settings, say: Callable[[str], None]
) -> tuple[list[Case], float]:
    """Time every clip length, ratio and layout, interleaved.

    Returns:
        The cases, and the largest relative difference between the features of the two layouts.
    """
    clip = moving_clip(max(settings.frame_counts), opened.config.vision.image_size)
    warm = clip[: min(settings.frame_counts)]
    cases = [
        Case(frames, ratio, layout)
        for frames in settings.frame_counts
        for ratio, layout in [*((ratio, FRAMES) for ratio in settings.ratios), (LAYOUT_RATIO, BINS)]
        if layout == FRAMES or frames == _layout_frames(settings)
    ]
    _measure_clip(opened, settings, warm, [Case(len(warm), 0.0, FRAMES)], 0)  # first calls allocate
    difference = 0.0
    for repeat in range(settings.repeats):
        for frames in settings.frame_counts:
            if repeat < settings.repeats_of(frames):
                say(f"repeat {repeat + 1} of {settings.repeats}: {frames} frames")
                mine = [case for case in cases if case.frames == frames]
                off = _measure_clip(opened, settings, clip[:frames], mine, repeat)
                difference = max(difference, off)
    return cases, difference


def _layout_frames(settings: Settings) -> int:
    """Clip length at which the layouts are compared: 32 frames, or the longest below."""
    return max(count for count in settings.frame_counts if count <= 32)


def _measure_clip(
    opened: Graphs, settings: Settings, clip: NDArray[np.uint8], cases: list[Case], repeat: int
) -> float:
    """Time all cases of one clip once; returns how far the layouts' features are apart."""
    config = opened.config
    # Ratio 0 runs without score bias; all other ratios share one `hidden` (see DESIGN.md).
    lowered = {
        plain: cpu_time(partial(vision.run_lower, opened.lower, config.vision, "fp32", clip, plain))
        for plain in {case.ratio == 0 for case in cases}
    }
    results = {}
    shift = repeat % len(cases)
    for case in cases[shift:] + cases[:shift]:
        (hidden, scores), lower_seconds = lowered[case.ratio == 0]
        assert scores is not None
        keep, features, select_seconds, upper_seconds = _encode(
            opened, settings, case, hidden, scores
        )
        results[case.ratio, case.layout] = features
        case.costs["vision_lower"] = cost.lower(config, len(clip))
        case.add("vision_lower", lower_seconds)
        case.add("select", select_seconds)
        case.add("vision_upper", upper_seconds)
        case.add("tower", lower_seconds + select_seconds + upper_seconds)
        _prefill(opened, case, keep, features)
    if (LAYOUT_RATIO, BINS) not in results or (LAYOUT_RATIO, FRAMES) not in results:
        return 0.0
    expected = results[LAYOUT_RATIO, FRAMES]
    off = np.abs(results[LAYOUT_RATIO, BINS] - expected).max() / np.abs(expected).max()
    return float(off)


def _encode(
    opened: Graphs,
    settings: Settings,
    case: Case,
    hidden: NDArray[Any],
    scores: NDArray[np.float32],
) -> tuple[NDArray[np.bool_], NDArray[Any], float, float]:
    """Select and run the upper part; returns keep, features, and the seconds of both."""
    config, refill = opened.config, settings.refill == "reference"
    count = planner.n_prune(config.vision.windows, len(scores), case.ratio)
    case.total, case.kept = scores.size, scores.size - count
    if case.layout == BINS:

        def select_and_pack() -> tuple[NDArray[np.bool_], planner.PackPlan]:
            keep = planner.select(scores, count)
            return keep, planner.pack(keep, refill=refill)

        (keep, plan), select_seconds = cpu_time(select_and_pack)
        features, upper_seconds = cpu_time(
            lambda: run_bins(opened.upper_bins, hidden, plan, config)
        )
        slots = [config.vision.windows] * len(plan.segment)
    else:

        def select_and_group() -> tuple[NDArray[np.bool_], list[planner.FrameGroup]]:
            keep = planner.select(scores, count)
            return keep, planner.group_frames(keep, refill=refill)

        (keep, groups), select_seconds = cpu_time(select_and_group)
        features, upper_seconds = cpu_time(
            lambda: vision.run_upper(opened.upper_frames, hidden, groups, case.kept, config.vision)
        )
        slots = [n for m, n in (group.gather_window.shape for group in groups) for _ in range(m)]
    case.costs["vision_upper"] = cost.upper(config, slots)
    case.computed = sum(slots)
    case.bins = planner.place(keep.sum(axis=1), config.vision.windows).bins
    return keep, features, select_seconds, upper_seconds


def _prefill(opened: Graphs, case: Case, keep: NDArray[np.bool_], features: NDArray[Any]) -> None:
    """Feed a prompt with the kept windows to the decoder, until its first token."""
    ids = prompt_ids(opened.config, keep)
    groups = visual_groups(ids, opened.config.tokens.visual)

    def first_token() -> decoder.Continuation:
        cache = decoder.KVCache(opened.decoder, opened.config, "fp32", len(ids) + 1)
        return decoder.generate(
            opened.decoder, cache, ids, groups, features, max_new_tokens=1, eos_ids=()
        )

    _, seconds = cpu_time(first_token)
    case.prompt = len(ids)
    case.costs["prefill"] = cost.prefill(opened.config, len(ids), len(ids) + 1)
    case.add("prefill", seconds)


def prompt_ids(config: ModelConfig, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Token ids (L,) as of a video prompt: per frame a timestamp, marks and kept windows."""
    tokens = config.tokens
    ids: list[int] = [1]
    for count in keep.sum(axis=1).tolist():
        ids += [2, 3, 4, tokens.frame_start, *[tokens.im_patch] * count, tokens.frame_end]
    return np.array([*ids, *range(5, 25)], dtype=np.int64)  # a short question


def measure_chunks(opened: Graphs, settings: Settings) -> list[dict[str, Any]]:
    """Time full frames, so many in each call of the graphs."""
    config = opened.config.vision
    frames = max(settings.chunks)
    clip = moving_clip(frames, config.image_size)
    hidden, _ = vision.run_lower(opened.lower, config, "fp32", clip, plain=False)
    samples: dict[tuple[str, int], list[float]] = {}
    chosen = vision.LOWER_CHUNK, vision.UPPER_CHUNK
    groups = planner.group_frames(np.ones((frames, config.windows), np.bool_))
    total = frames * config.windows
    calls: dict[str, Callable[[], object]] = {
        "vision_lower": partial(vision.run_lower, opened.lower, config, "fp32", clip, False),
        "vision_upper": partial(
            vision.run_upper, opened.upper_frames, hidden, groups, total, config
        ),
    }
    try:
        for _ in range(min(2, settings.repeats)):
            for chunk in settings.chunks:
                vision.LOWER_CHUNK = vision.UPPER_CHUNK = chunk
                for stage, call in calls.items():
                    _, seconds = cpu_time(call)
                    samples.setdefault((stage, chunk), []).append(seconds / frames)
    finally:
        vision.LOWER_CHUNK, vision.UPPER_CHUNK = chosen
    return [
        {
            "frames_per_call": chunk,
            "seconds_per_frame": {stage: summary(samples[stage, chunk]) for stage in calls},
        }
        for chunk in settings.chunks
    ]


def random_scores(rng: np.random.Generator, frames: int, windows: int, between: float) -> Any:
    """Scores (T, W) f32 in (0, 1).

    Args:
        rng: source.
        frames: T.
        windows: W.
        between: spread between frames over the spread within one.
    """
    logits = rng.normal(0, 1, (frames, windows)) + rng.normal(0, between, (frames, 1))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def measure_planner(settings: Settings, windows: int = 81) -> list[dict[str, Any]]:
    """Time selection with either layout's plan on random scores, by scene and ratio.

    Each clip is planned `_PLAN_TRIES` times: the best of them tells a slow clip from a moment when
    another process held the processor.
    """
    plans: dict[str, Callable[[NDArray[np.bool_]], object]] = {
        FRAMES: planner.group_frames,
        BINS: planner.pack,
    }
    rows = []
    for frames in settings.plan_frames:
        times: dict[tuple[str, str, float], list[list[float]]] = {}
        rng = np.random.default_rng(frames)
        for _ in range(settings.plan_clips):
            for scene, between in _PLAN_SCENES.items():
                scores = random_scores(rng, frames, windows, between)
                for ratio in _PLAN_RATIOS:
                    count = planner.n_prune(windows, frames, ratio)
                    for layout, plan in plans.items():
                        tries = [_plan_ms(scores, count, plan) for _ in range(_PLAN_TRIES)]
                        times.setdefault((layout, scene, ratio), []).append(tries)
        for layout in plans:
            mine = {key: clips for key, clips in times.items() if key[0] == layout}
            medians = {
                key: statistics.median(ms for tries in clips for ms in tries)
                for key, clips in mine.items()
            }
            worst = max(medians, key=lambda key: medians[key])
            clips = [tries for all_tries in mine.values() for tries in all_tries]
            rows.append(
                {
                    "frames": frames,
                    "layout": layout,
                    "clips": len(clips),
                    "tries": _PLAN_TRIES,
                    "median_ms": statistics.median(ms for tries in clips for ms in tries),
                    "worst_scene": {"scene": worst[1], "prune_ratio": worst[2]},
                    "worst_scene_median_ms": medians[worst],
                    "slowest_clip_ms": max(min(tries) for tries in clips),
                    "slowest_try_ms": max(max(tries) for tries in clips),
                }
            )
    return rows


def _plan_ms(
    scores: NDArray[np.float32], count: int, plan: Callable[[NDArray[np.bool_]], object]
) -> float:
    """Milliseconds of wall time for one selection and plan."""
    started = time.perf_counter()
    plan(planner.select(scores, count))
    return 1e3 * (time.perf_counter() - started)


def describe_case(case: Case, baseline: Case) -> dict[str, Any]:
    """Put a case's times beside those of ratio 0 in the same repeats, and beside the bound."""
    gains = {}
    for stage in ("vision_upper", "tower", "prefill"):
        pairs = zip(baseline.seconds[stage], case.seconds[stage], strict=True)
        measured = summary([before / after for before, after in pairs])
        bound = baseline.cost_of(stage).total / case.cost_of(stage).total
        gains[stage] = {
            "speedup": measured,
            "bound": bound,
            "ratio_of_bound": measured["median"] / bound,
        }
    return {
        "frames": case.frames,
        "prune_ratio": case.ratio,
        "layout": case.layout,
        "kept_windows": case.kept,
        "total_windows": case.total,
        "computed_windows": case.computed,
        "bins": case.bins,
        "prompt_tokens": case.prompt,
        "gflop": {
            stage: {"linear": work.linear / 1e9, "attention": work.attention / 1e9}
            for stage, work in case.costs.items()
        },
        "cpu_seconds": {stage: summary(samples) for stage, samples in case.seconds.items()},
        "against_ratio_0": gains,
    }


def run(
    settings: Settings, cache: Path, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the whole benchmark; returns what `--json` writes."""
    config = model_config(quick=settings.quick)
    say("exporting the model, or finding it in the cache")
    opened = Graphs.open(config, graphs(config, cache))
    computer = machine()
    started, started_cpu = time.perf_counter(), time.process_time()
    cases, difference = measure_tower(opened, settings, say)
    say("frames per call")
    chunks = measure_chunks(opened, settings)
    say("planner")
    plans = measure_planner(settings)
    baselines = {case.frames: case for case in cases if case.ratio == 0}
    rows = [describe_case(case, baselines[case.frames]) for case in cases]
    return {
        "benchmark": "bench_prune",
        "command": command,
        "quick": settings.quick,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": computer,
        "run_seconds": {
            "wall": time.perf_counter() - started,
            "cpu": time.process_time() - started_cpu,
        },
        "settings": {
            "threads": 1,
            "precision": "fp32",
            "refill": settings.refill,
            "lower_chunk": vision.LOWER_CHUNK,
            "upper_chunk": vision.UPPER_CHUNK,
            "repeats": {str(n): settings.repeats_of(n) for n in settings.frame_counts},
        },
        "model": _describe_model(config),
        "tower": [row for row in rows if row["layout"] == FRAMES],
        "layouts": _layouts(rows, settings),
        "layouts_feature_difference": difference,
        "chunks": chunks,
        "planner": plans,
        "outcomes": _outcomes(rows, plans),
    }


def _layouts(rows: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    frames = _layout_frames(settings)
    return [row for row in rows if (row["frames"], row["prune_ratio"]) == (frames, LAYOUT_RATIO)]


def _describe_model(config: ModelConfig) -> dict[str, Any]:
    tower, text = config.vision, config.text
    return {
        "weights": "random",
        "vision": {
            "grid": list(tower.grid),
            "windows": tower.windows,
            "width": tower.hidden_size,
            "heads": tower.num_heads,
            "mlp": tower.intermediate_size,
            "blocks_lower": tower.split_at,
            "blocks_upper": tower.num_layers - tower.split_at,
        },
        "decoder": {
            "width": text.hidden_size,
            "layers": text.num_layers,
            "heads": text.num_heads,
            "mlp": text.intermediate_size,
        },
    }


def _outcomes(rows: list[dict[str, Any]], plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Targets beside what was reached; None where the run has no such case."""
    of_bound = [
        row["against_ratio_0"]["tower"]["ratio_of_bound"]
        for row in rows
        if row["layout"] == FRAMES and row["prune_ratio"] == LAYOUT_RATIO and row["frames"] >= 32
    ]
    longest = [row for row in plans if row["frames"] == 256]
    return {
        "tower_ratio_of_bound": {
            "target": TARGET_OF_BOUND,
            "lowest": min(of_bound, default=None),
        },
        "plan_256_frames_ms": {
            "target_about": TARGET_PLAN_MS[0],
            "target_never_above": TARGET_PLAN_MS[1],
            "median": max((row["median_ms"] for row in longest), default=None),
            "slowest_clip": max((row["slowest_clip_ms"] for row in longest), default=None),
        },
    }


def render(results: dict[str, Any]) -> str:
    """Tables of a run, as plain text."""
    computer, model = results["machine"], results["model"]["vision"]
    blocks = f"{model['blocks_lower']} + {model['blocks_upper']}"
    lines = [
        f"{computer['cpu']}, {computer['cores']} cores, 1 thread, CPU seconds; "
        f"ONNX Runtime {computer['onnxruntime']}, {results['date']}",
        f"vision tower {model['width']} wide, {blocks} blocks, "
        f"{model['grid'][0]}x{model['grid'][1]} patches, fp32, "
        f"refill {results['settings']['refill']}",
        "",
        *table(
            "frames ratio kept computed lower_s select_ms upper_s tower_s speed-up bound of_bound "
            "prefill_s speed-up bound",
            [_tower_cells(row) for row in results["tower"]],
        ),
        "",
        "layout of the upper part, same clip and run",
        *table(
            "layout frames ratio kept computed upper_s speed-up bound of_bound tower_speed-up",
            [_layout_cells(row) for row in results["layouts"]],
        ),
        "",
        "frames per call, seconds a frame",
        *table(
            "frames_per_call lower_s upper_s",
            [
                [
                    str(row["frames_per_call"]),
                    *(f"{stage['median']:.4f}" for stage in row["seconds_per_frame"].values()),
                ]
                for row in results["chunks"]
            ],
        ),
        "",
        "planner: selection and plan, milliseconds of wall time",
        *table(
            "frames layout median worst_scene slowest_clip slowest_try",
            [
                [
                    str(row["frames"]),
                    row["layout"],
                    *(
                        f"{row[key]:.2f}"
                        for key in (
                            "median_ms",
                            "worst_scene_median_ms",
                            "slowest_clip_ms",
                            "slowest_try_ms",
                        )
                    ),
                ]
                for row in results["planner"]
            ],
        ),
    ]
    return "\n".join(lines)


def _tower_cells(row: dict[str, Any]) -> list[str]:
    seconds, gains = row["cpu_seconds"], row["against_ratio_0"]
    tower, prefill = gains["tower"], gains["prefill"]
    return [
        str(row["frames"]),
        f"{row['prune_ratio']:g}",
        f"{row['kept_windows']}/{row['total_windows']}",
        str(row["computed_windows"]),
        f"{seconds['vision_lower']['median']:.2f}",
        f"{1e3 * seconds['select']['median']:.2f}",
        f"{seconds['vision_upper']['median']:.2f}",
        f"{seconds['tower']['median']:.2f}",
        f"{tower['speedup']['median']:.2f}",
        f"{tower['bound']:.2f}",
        f"{tower['ratio_of_bound']:.2f}",
        f"{seconds['prefill']['median']:.2f}",
        f"{prefill['speedup']['median']:.2f}",
        f"{prefill['bound']:.2f}",
    ]


def _layout_cells(row: dict[str, Any]) -> list[str]:
    upper, tower = row["against_ratio_0"]["vision_upper"], row["against_ratio_0"]["tower"]
    return [
        row["layout"],
        str(row["frames"]),
        f"{row['prune_ratio']:g}",
        str(row["kept_windows"]),
        str(row["computed_windows"]),
        f"{row['cpu_seconds']['vision_upper']['median']:.2f}",
        f"{upper['speedup']['median']:.2f}",
        f"{upper['bound']:.2f}",
        f"{upper['ratio_of_bound']:.2f}",
        f"{tower['speedup']['median']:.2f}",
    ]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the pruned model beside the bound from operation counts.",
        epilog="Plan for about 7 minutes of one core; the first run also exports the model.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny model and clips; a smoke run")
    parser.add_argument("--frames", type=int, nargs="+", metavar="N", help="clip lengths")
    parser.add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="prune ratios beside 0"
    )
    parser.add_argument("--repeats", type=int, default=None, metavar="N")
    parser.add_argument(
        "--refill", choices=("reference", "off"), default="reference", help="see DESIGN.md"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(__file__).parents[1] / ".cache" / "bench",
        help="folder that keeps the exported graphs",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print an earlier run instead")
    args = parser.parse_args(arguments)
    if args.frames and (min(args.frames) < 1 or min(args.frames) > 32):
        parser.error("--frames: 1 or more, at least one of them 32 or less")
    if args.ratios and not all(0 <= ratio < 1 for ratio in args.ratios):
        parser.error("--ratios: at least 0 and below 1")
    if args.repeats is not None and args.repeats < 1:
        parser.error("--repeats: 1 or more")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    quick = args.quick
    return Settings(
        quick=quick,
        frame_counts=tuple(sorted(args.frames or ((2, 4) if quick else (8, 16, 32, 64)))),
        ratios=tuple(sorted({0.0, *(args.ratios or (0.3, 0.5, 0.7))})),
        repeats=args.repeats or (2 if quick else 3),
        chunks=(1, 2) if quick else (1, 2, 4, 8),
        plan_frames=(8, 16) if quick else (64, 128, 256),
        plan_clips=2 if quick else 60,
        refill=args.refill,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse(given)
    if args.show:
        print(render(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    command = shlex.join(["python", "benchmarks/bench_prune.py", *given])

    def say(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    results = run(_settings(args), args.cache, command, say)
    print(render(results))
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
