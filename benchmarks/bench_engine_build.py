"""Time and memory of building engines of a full-size vision tower, without a GPU.

    python benchmarks/bench_engine_build.py --json benchmarks/results/engine_build_cpu.json
    python benchmarks/bench_engine_build.py --quick        # a tiny tower; its numbers mean nothing

The graphs (random weights, fp16) are exported and compared with PyTorch once, in a process of
their own, and kept in `.cache/bench`; only building is measured. See README.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which is not installed

from benchmarks.harness.model import full_size_config, graphs, model_config
from benchmarks.harness.timing import machine
from stts_export.config import ModelConfig
from stts_export.engines.library import MODULES, TENSORRT_RTX
from stts_export.engines.network import EngineJob
from stts_export.engines.worker import run_job
from stts_export.files import write_json
from stts_export.tensors import (
    VISION_LOWER,
    VISION_UPPER,
    Precision,
    graph_file,
    graph_specs,
    profiles,
)

GRAPHS = (VISION_LOWER, VISION_UPPER)
LIMITS = {"seconds": 60.0, "peak_gb": 4.0}
"""Of one engine; on two cores."""
PRECISION: Precision = "fp16"
_MAX_FRAMES = 64


def measure(folder: Path, config: ModelConfig, graph: str, target: str) -> dict[str, Any]:
    """Build one engine and remove it; the first child of a process without torch.

    Returns:
        Wall and CPU seconds, peak resident memory of the building process, bytes of weights and
        engine.
    """
    spec = graph_specs(config, PRECISION)[graph]
    onnx = folder / graph_file(graph)
    longest = config.text.max_position_embeddings
    with tempfile.TemporaryDirectory() as temporary:
        job = EngineJob(
            MODULES[TENSORRT_RTX],
            spec,
            onnx,
            Path(temporary) / f"{graph}.engine",
            profiles(spec, config, max_frames=_MAX_FRAMES, max_tokens=longest),
            (target.upper(),),
        )
        started = time.perf_counter()
        run_job(job)
        seconds = time.perf_counter() - started
        size = job.engine.stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "graph": graph,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
        "weights_bytes": onnx.with_name("model.onnx.data").stat().st_size,
        "engine_bytes": size,
    }


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Export if need be, build, and return what `--json` writes."""
    # The peak of children counts every child, and what the parent held when it started one: a
    # process for the export with torch, and one for each engine.
    folder = _step(args, "--export")
    rows = [json.loads(_step(args, "--measure", folder, graph)) for graph in GRAPHS]
    return {
        "benchmark": "bench_engine_build",
        "command": command,
        "quick": args.quick,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {**machine(), "tensorrt_rtx": version(MODULES[TENSORRT_RTX])},
        "settings": {"precision": PRECISION, "target": args.target, "max_frames": _MAX_FRAMES},
        "limits": LIMITS,
        "rows": rows,
    }


def _step(args: argparse.Namespace, *words: str) -> str:
    """Run this file in a process of its own; return what it prints."""
    command = [sys.executable, __file__, "--cache", str(args.cache), "--target", args.target]
    command += ["--quick"] if args.quick else []
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def render(results: dict[str, Any]) -> str:
    """Format results as a table."""
    host = results["machine"]
    lines = [
        f"{host['cpu']}, {host['cores']} cores, load {host['load_average'][0]}; "
        f"TensorRT for RTX {host['tensorrt_rtx']}, {results['settings']['target']}, "
        f"{results['settings']['precision']}, {results['date']}",
        f"{'graph':>14}  {'seconds':>7}  {'cpu_s':>6}  {'peak_gb':>7}  {'weights_mb':>10}  "
        f"{'engine_mb':>9}",
    ]
    lines += [
        f"{row['graph']:>14}  {row['seconds']:7.1f}  {row['cpu_seconds']:6.1f}  "
        f"{row['peak_gb']:7.2f}  {row['weights_bytes'] / 1e6:10.0f}  "
        f"{row['engine_bytes'] / 1e6:9.0f}"
        for row in results["rows"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code, 1 when a limit is not held."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="Time and memory of building engines.")
    parser.add_argument("--quick", action="store_true", help="a tiny tower")
    parser.add_argument("--target", default="sm89", help="GPU to build for (sm89)")
    parser.add_argument("--cache", type=Path, default=Path(".cache") / "bench")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--export", action="store_true", help="a step of a run: print the folder")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "GRAPH"), help="a step of a run")
    args = parser.parse_args(given)
    config = model_config(quick=True) if args.quick else full_size_config()
    if args.export:
        print(graphs(config, args.cache, PRECISION, GRAPHS))
        return 0
    if args.measure:
        folder, graph = args.measure
        print(json.dumps(measure(Path(folder), config, graph, args.target)))
        return 0
    results = run(args, shlex.join(["python", "benchmarks/bench_engine_build.py", *given]))
    print(render(results))
    if args.json:
        write_json(args.json, results)
    held = all(row[name] <= limit for row in results["rows"] for name, limit in LIMITS.items())
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
