"""Time the plugin's kernels on a GPU: beside a plain device copy, PyTorch and the vision tower.

    cmake --preset gpu && cmake --build --preset gpu
    python benchmarks/bench_plugin.py --bundle BUNDLE --json out.json

See README.md. Needs a GPU; without --bundle, neither TensorRT nor a model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.clips import moving_clip
from benchmarks.harness.timing import machine
from stts_export.bundle import Bundle
from stts_export.engines import cuda
from stts_export.errors import SttsError
from stts_export.files import write_json
from stts_export.runtime import planner
from stts_export.tensors import ACTIVATION

WINDOWS, WINDOW_BYTES = 81, 9 * 1152 * 2
"""A frame of the so400m tower in fp16."""
PRUNE_RATIO = 0.5
TARGET_BANDWIDTH = 0.8
"""Of a plain copy of as many bytes, at 128 frames."""
TARGET_SHARE = 0.01
"""Selection and packing of the vision tower's time, at 128 frames."""


def kernel_times(program: Path, frames: int, repeats: int) -> dict[str, Any]:
    """Medians of one clip length from `trt_plugins/device`, in milliseconds.

    Raises:
        SttsError: the program failed; its own message.
    """
    kept = WINDOWS * frames - planner.n_prune(WINDOWS, frames, PRUNE_RATIO)
    sizes = [frames, WINDOWS, WINDOW_BYTES, kept, repeats]
    done = subprocess.run(
        [str(program), "time", *map(str, sizes)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SttsError(done.stderr.strip(), where=str(program))
    values: dict[str, Any] = json.loads(done.stdout)
    values["bandwidth_of_copy"] = values["copy_ms"] / values["gather_ms"]
    values["gather_gb_per_s"] = 2 * values["bytes"] / values["gather_ms"] / 1e6
    return values


def pytorch_ms(frames: int, repeats: int) -> float | None:
    """Median wall milliseconds of the reference's steps in PyTorch on the GPU.

    Sort, mask, first-fit descending on the host, gather: `model.pruning`, as the training code
    runs it. None without a PyTorch that sees the GPU.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    from stts_export.model.pruning import pack, select

    device = torch.device("cuda")
    count = planner.n_prune(WINDOWS, frames, PRUNE_RATIO)
    hidden = torch.randint(
        -(1 << 15), 1 << 15, (frames * WINDOWS, WINDOW_BYTES // 2), dtype=torch.int16, device=device
    )
    samples = []
    for repeat in range(repeats + 2):
        scores = torch.rand(frames, WINDOWS, device=device)
        torch.cuda.synchronize()
        started = time.perf_counter()
        plan = pack(select(scores, count))
        bins = hidden[plan.gather_window]
        bins[plan.segment < 0] = 0
        torch.cuda.synchronize()
        if repeat >= 2:
            samples.append(1e3 * (time.perf_counter() - started))
    return statistics.median(samples)


def tower_ms(
    bundle: Path, backend: str | None, frame_counts: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Vision tower at ratio 0 and `PRUNE_RATIO`, interleaved; medians in milliseconds."""
    from stts_export import Session

    rows = []
    with Session.open(bundle, backend=backend) as session:
        for frames in frame_counts:
            clip = moving_clip(frames, session.config.vision.image_size)
            samples: dict[float, list[float]] = {0.0: [], PRUNE_RATIO: []}
            speedups = []
            for repeat in range(repeats + 1):
                for ratio, values in samples.items():
                    timings = session.encode(clip, ratio).timings
                    values.append(1e3 * sum(timings[name] for name in timings if name != "resize"))
                if repeat:  # the first warms up
                    speedups.append(samples[0.0][-1] / samples[PRUNE_RATIO][-1])
            rows.append(
                {
                    "frames": frames,
                    "whole_ms": statistics.median(samples[0.0][1:]),
                    "pruned_ms": statistics.median(samples[PRUNE_RATIO][1:]),
                    "speedup": statistics.median(speedups),
                    "samples_ms": {str(ratio): values[1:] for ratio, values in samples.items()},
                }
            )
    return rows


def _window_bytes(bundle: Path) -> int:
    """Bytes of one window's hidden tokens in a bundle."""
    opened = Bundle.open(bundle)
    vision = opened.config.vision
    dtype = np.dtype(ACTIVATION[opened.manifest.precision])
    return vision.patches_per_window * vision.hidden_size * dtype.itemsize


def _gpu_name() -> str:
    name = cuda.call("cudaGetDeviceProperties", 0).name
    return name.decode() if isinstance(name, bytes) else str(name)


def run(args: argparse.Namespace, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    results: dict[str, Any] = {
        "benchmark": "bench_plugin",
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {**machine(), "gpu": _gpu_name(), "driver": cuda.driver_version()},
        "settings": {
            "windows": WINDOWS,
            "window_bytes": WINDOW_BYTES,
            "prune_ratio": PRUNE_RATIO,
            "tower_window_bytes": None,
        },
        "kernels": [],
        "tower": [],
    }
    for frames in args.frames:
        say(f"kernels, {frames} frames")
        row = kernel_times(args.program, frames, args.repeats)
        results["kernels"].append({**row, "pytorch_ms": pytorch_ms(frames, args.repeats)})
    if args.bundle:
        say("vision tower")
        results["tower"] = tower_ms(args.bundle, args.backend, args.frames, args.tower_repeats)
        results["settings"]["tower_window_bytes"] = _window_bytes(args.bundle)
    results["outcomes"] = outcomes(results)
    return results


def outcomes(results: dict[str, Any]) -> dict[str, Any]:
    """Targets beside what was reached; None where the run has no such case.

    The kernels are timed on rows of the so400m tower, so only such a tower's time compares.
    """
    kernels = {row["frames"]: row for row in results["kernels"]}
    tower = {row["frames"]: row for row in results["tower"]}
    at_128 = kernels.get(128)
    same_rows = results["settings"]["tower_window_bytes"] == WINDOW_BYTES
    share = None
    if at_128 and 128 in tower and same_rows:
        share = at_128["plan_ms"] / tower[128]["pruned_ms"]
    return {
        "bandwidth_of_copy_at_128_frames": {
            "target": TARGET_BANDWIDTH,
            "got": at_128 and at_128["bandwidth_of_copy"],
        },
        "share_of_tower_at_128_frames": {"target": TARGET_SHARE, "got": share},
    }


def render(results: dict[str, Any]) -> str:
    """Tables of a run, as plain text."""
    lines = [
        f"{results['machine']['gpu']}, {results['date']}; milliseconds, medians",
        "frames  bins   plan  gather   both   copy  of_copy  pytorch",
    ]
    for row in results["kernels"]:
        pytorch = "-" if row["pytorch_ms"] is None else f"{row['pytorch_ms']:.2f}"
        lines.append(
            f"{row['frames']:6} {row['bins']:5} {row['plan_ms']:6.3f} {row['gather_ms']:7.3f} "
            f"{row['select_pack_ms']:6.3f} {row['copy_ms']:6.3f} {row['bandwidth_of_copy']:8.2f} "
            f"{pytorch:>8}"
        )
    if results["tower"]:
        lines += ["", f"frames  tower at 0  tower at {PRUNE_RATIO:g}  speed-up"]
    for row in results["tower"]:
        lines.append(
            f"{row['frames']:6} {row['whole_ms']:11.2f} {row['pruned_ms']:13.2f} "
            f"{row['speedup']:9.2f}"
        )
    return "\n".join(lines)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    build = Path(__file__).parents[1] / "build" / "gpu"
    parser.add_argument(
        "--program", type=Path, default=build / "select_pack_device",
        help="built by: cmake --preset gpu && cmake --build --preset gpu",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256], metavar="N")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="of the kernels (50)")
    parser.add_argument("--bundle", type=Path, help="also time this bundle's vision tower")
    parser.add_argument("--backend", help="of the bundle")
    parser.add_argument("--tower-repeats", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print an earlier run instead")
    args = parser.parse_args(arguments)
    if min(*args.frames, args.repeats, args.tower_repeats) < 1:
        parser.error("--frames and repeats: 1 or more")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse(given)
    if args.show:
        print(render(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    if not args.program.is_file():
        print(
            f"error: {args.program}: is missing; fix: cmake --preset gpu && "
            "cmake --build --preset gpu",
            file=sys.stderr,
        )
        return 1
    command = shlex.join(["python", "benchmarks/bench_plugin.py", *given])
    try:
        results = run(args, command, lambda step: print(step, file=sys.stderr, flush=True))
    except SttsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(render(results))
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
