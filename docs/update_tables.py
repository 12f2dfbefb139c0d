"""Write the README's tables from recorded results, or check that they are up to date.

    python docs/update_tables.py [--check]

Numbers are never typed: the accuracy table comes from `stts-export eval`, the others from the
benchmarks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TRAINING = ROOT / "examples" / "demo_checkpoint" / "training.json"
ACCURACY = ROOT / "benchmarks" / "results" / "demo_accuracy.json"
SPEED = ROOT / "benchmarks" / "results" / "bench_prune_cpu.json"
ENGINES = ROOT / "benchmarks" / "results" / "engine_build_cpu.json"
FULL_SIZE = ROOT / "benchmarks" / "results" / "full_size_4b.json"
STREAM = ROOT / "benchmarks" / "results" / "bench_stream_cpu.json"
CPU_RECIPES = ROOT / "benchmarks" / "results" / "cpu_recipes.json"
TYPES = ("colour", "count", "direction", "last", "order", "shape", "all")
SELECTORS = {"stts": "scored", "all windows": "all"}


def accuracy_table() -> str:
    """Accuracy of the demo checkpoint by question type, ratio and selector."""
    results = json.loads(ACCURACY.read_text(encoding="utf-8"))
    made = json.loads(TRAINING.read_text(encoding="utf-8"))
    lines = [f"| prune ratio | windows | {' | '.join(TYPES)} |", "|---|---|" + "---|" * len(TYPES)]
    for row in results["rows"]:
        ratio, chosen = row["prune_ratio"], row["selector"]
        name = SELECTORS.get(chosen, chosen)
        cells = " | ".join(f"{row['accuracy'][kind]:.2f}" for kind in TYPES)
        lines.append(f"| {ratio:g} | {name} | {cells} |")
    chance = " | ".join(f"{results['chance'][kind]:.2f}" for kind in TYPES[:-1])
    lines.append(f"| | chance | {chance} | |")
    asked = ", ".join(f"{results['questions'][kind]} {kind}" for kind in TYPES[:-1])
    lines.append("")
    lines.append(
        f"{results['questions']['all']} held-out questions ({asked}) about {results['clips']} "
        f"H.264 clips, {results['precision']} bundle; `{results['command']}` on "
        f"{results['machine']}."
    )
    config = made["config"]
    lines.append(
        f"{made['parameters'] / 1e6:.1f} M parameters; {made['steps']} steps from "
        f"`{config['start']['checkpoint']}` in {made['training_seconds'] / 60:.0f} minutes, seed "
        f"{made['seed']}, {made['threads']} thread of {made['machine']}."
    )
    return "\n".join(lines)


def speed_table() -> str:
    """Speed-up of the vision tower and of the decoder's prefill by ratio and frames."""
    results = json.loads(SPEED.read_text(encoding="utf-8"))
    ratios = sorted({row["prune_ratio"] for row in results["tower"]} - {0.0})
    header = " | ".join(f"ratio {ratio:g}" for ratio in ratios)
    lines = [f"| frames | {header} |", "|---|" + "---|" * len(ratios)]
    for frames in sorted({row["frames"] for row in results["tower"]}):
        cells = []
        for ratio in ratios:
            row = _row(results["tower"], frames, ratio)["against_ratio_0"]["tower"]
            cells.append(f"{row['speedup']['median']:.2f}x (bound {row['bound']:.2f}x)")
        lines.append(f"| {frames} | {' | '.join(cells)} |")
    machine, vision = results["machine"], results["model"]["vision"]
    blocks = vision["blocks_lower"] + vision["blocks_upper"]
    lines.append("")
    lines.append(
        f"Vision tower of {blocks} blocks, {vision['width']} wide, {vision['windows']} windows a "
        f"frame, random weights, ONNX Runtime {machine['onnxruntime']} on one thread of "
        f"{machine['cpu']}; CPU time, median of interleaved runs. `{results['command']}`."
    )
    return "\n".join(lines)


def engines_table() -> str:
    """Time, memory and size of building engines."""
    results = json.loads(ENGINES.read_text(encoding="utf-8"))
    lines = ["| engine | seconds | CPU seconds | peak memory | file |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['graph']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | "
        f"{row['peak_gb']:.1f} GB | {row['engine_bytes'] / 1e6:.0f} MB |"
        for row in results["rows"]
    ]
    machine, settings = results["machine"], results["settings"]
    lines.append("")
    lines.append(
        f"{settings['precision']}, {settings['target']}, clips of up to {settings['max_frames']} "
        f"frames; TensorRT for RTX {machine['tensorrt_rtx']} on {machine['cpu']}, "
        f"{machine['cores']} cores at load {machine['load_average'][0]:g}. `{results['command']}`."
    )
    return "\n".join(lines)


def full_size_table() -> str:
    """Time and memory of building and running a model of full size."""
    results = json.loads(FULL_SIZE.read_text(encoding="utf-8"))
    answers = {
        "answer, weights left in their file": results["answer"],
        "answer, fp32 copies of the weights": results["answer_with_room"],
    }
    lines = [
        "| step | seconds | memory of its own | file pages in memory |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {step['seconds']:.0f} | {step['peak_anonymous'] / 1e9:.2f} GB | "
        f"{step['peak_file'] / 1e9:.2f} GB |"
        for name, step in {"build": results["steps"]["build"], **answers}.items()
    ]
    machine, settings = results["machine"], results["settings"]
    checkpoint, bundle = (results[f"{what}_bytes"] / 1e9 for what in ("checkpoint", "bundle"))
    load, memory = machine["load_average"][0], machine["memory"] / 1e9
    lines.append("")
    lines.append(
        f"{results['shape'].upper()} shape with random weights, {settings['precision']}: "
        f"checkpoint {checkpoint:.1f} GB, bundle {bundle:.1f} GB; an answer is "
        f"{settings['tokens']} tokens about {settings['frames']} frames on ONNX Runtime, which "
        f"copies weights where there is room. {machine['cpu']}, {machine['cores']} cores at load "
        f"{load:g}, {memory:.0f} GB. `{results['command']}`."
    )
    return "\n".join(lines)


def stream_table() -> str:
    """Question to first token of live streams by window and mode, shared capacity, budget."""
    results = json.loads(STREAM.read_text(encoding="utf-8"))
    grown, settings, machine = results["growth"], results["settings"], results["machine"]
    first = {(row["frames"], row["mode"]): row["first_token"] for row in results["windows"]}
    lines = ["| window | exact | incremental | exact / incremental |", "|---|---|---|---|"]
    for frames in settings["windows"]:
        exact, incremental = (1e3 * first[frames, m]["median"] for m in ("exact", "incremental"))
        quotient = grown["exact_over_incremental"][str(frames)]["median"]
        lines.append(
            f"| {frames} frames, {frames / settings['fps']:g} s | {exact:.0f} ms | "
            f"{incremental:.0f} ms | {quotient:.1f}x |"
        )
    rows = {(row["streams"], row["mode"]): row for row in results["streams"]}
    counts = settings["streams"]
    shared = "; ".join(
        f"{count} {'stream' if count == 1 else 'streams'} "
        f"{rows[count, 'exact']['encoded_per_second']['median']:.0f}"
        for count in counts
    )
    fairness = min(row["fairness"]["low"] for row in rows.values())
    phases = results["controller"]["phases"]
    within = ", ".join(
        f"{100 * phases[phase]['share_within_budget']:.0f} % {phase}" for phase in phases
    )
    threads = f"{settings['threads'] or machine['cores']} threads"
    lines.append("")
    lines.append(
        f"Question to first token, median of {settings['repeats']} interleaved questions at prune "
        f"ratio {settings['prune_ratio']:g}. Frames a second when more are offered, exact mode: "
        f"{shared}; least served over most served stream never below {fairness:.2f}. Answers "
        f"within a latency budget of {results['controller']['budget']:.2f} s before, during and "
        f"after a step of load: {within}."
    )
    lines.append(
        f"Random weights, {results['model']['windows']} windows a frame, tower "
        f"{results['model']['shape']['vision_width']} wide; ONNX Runtime "
        f"{machine['onnxruntime']}, {threads} of {machine['cpu']}, {machine['cores']} cores at "
        f"load {machine['load_average'][0]:g}; wall time. `{results['command']}`."
    )
    return "\n".join(lines)


def cpu_recipes_table() -> str:
    """What recipes cost on a CPU at real widths."""
    results = json.loads(CPU_RECIPES.read_text(encoding="utf-8"))
    lines = ["| recipe | weights, MB | tower | prefill | each token |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        cells = []
        for part in ("tower", "prefill", "token"):
            milliseconds = 1e3 * row["seconds"][part]["median"]
            speedup = row["speedup"][part]["median"]
            digits = 0 if milliseconds >= 100 else 1
            cells.append(f"{milliseconds:.{digits}f} ms ({speedup:.2f}x)")
        lines.append(f"| `{row['recipe']}` | {row['weights'] / 1e6:.0f} | {' | '.join(cells)} |")
    settings, machine = results["settings"], results["machine"]
    shape = settings["shape"]
    lines.append("")
    lines.append(
        f"Time, and fp32's over it: two blocks of a tower {shape['vision_width']} wide on "
        f"{settings['bins']} bins of 729 patches, with the connector; {settings['prompt']} tokens, "
        f"then one, through {shape['text_layers']} layers {shape['text_width']} wide. Random "
        f"weights; medians of {settings['repeats']} interleaved turns in CPU time, one thread of "
        f"{machine['cpu']}, ONNX Runtime {machine['onnxruntime']}; `{results['command']}`."
    )
    return "\n".join(lines)


def _row(rows: list[dict[str, Any]], frames: int, ratio: float) -> dict[str, Any]:
    return next(r for r in rows if (r["frames"], r["prune_ratio"]) == (frames, ratio))


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_table,
    "speed": speed_table,
    "engines": engines_table,
    "full_size": full_size_table,
    "cpu_recipes": cpu_recipes_table,
}
if STREAM.exists():  # no run is stored yet
    TABLES["stream"] = stream_table


def updated(text: str) -> str:
    """Replace what stands between the markers of each table."""
    for name, table in TABLES.items():
        start, end = f"<!-- table:{name} -->", f"<!-- end:{name} -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        found = re.findall(pattern, text, flags=re.DOTALL)
        if len(found) != 1:
            sys.exit(f"{README.name}: {len(found)} tables named {name}, expected 1")
        text = text.replace(found[0], f"{start}\n{table()}\n{end}")
    return text


def main() -> None:
    """Write the tables, or exit with 1 when one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when outdated")
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if parser.parse_args().check:
        sys.exit(0 if new == text else "README.md: run python docs/update_tables.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
