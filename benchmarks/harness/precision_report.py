"""The text of `docs/precision.md`: every number and every verdict is computed from the results."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks.harness.evidence_claims import points
from benchmarks.harness.precision_claims import HALF, claims
from benchmarks.harness.precision_guide import guide, where_it_runs
from benchmarks.harness.precision_plan import ABLATED, REFERENCE
from benchmarks.harness.precision_results import Results
from stts_export.calibration.quant_report import (
    ANSWERS_CHANGED,
    COSINE,
    JACCARD,
    KL,
    NEAR_THRESHOLD,
    SQNR,
    QuantReport,
)
from stts_export.calibration.recipe import Recipe, recipe_names

PICTURES = {"accuracy": "precision_accuracy.png", "layers": "precision_layers.png"}
_GATES = {
    SQNR: "SQNR, dB",
    JACCARD: "Jaccard",
    NEAR_THRESHOLD: "flips near the threshold",
    COSINE: "cosine",
    KL: "KL, nats",
    ANSWERS_CHANGED: "answers changed",
}
_GPU_SIZED = (
    "engines of any recipe on a GPU or a Jetson: their answers, and their speed",
    "kernels for bf16 and nvfp4: here PyTorch rounds as they would",
    "a model of full size and real videos: the gates of a build on your own clips say how that is",
    "`kv_cache: int8`, which no shipped recipe asks for",
)


def report(results: Results) -> str:
    """Return the whole document, in Markdown."""
    sections = [
        _introduction(results),
        section("Claims", "\n".join(claims(results))),
        _accuracy(results),
        _agreement(results),
        _sizes(results),
        _gates(results),
        _speed(results),
        _ablation(results),
        where_it_runs(),
        guide(results.report(ABLATED) if ABLATED in results.recipes else None),
        _not_run(results),
    ]
    return "\n\n".join(sections) + "\n"


def section(title: str, *parts: str) -> str:
    """Put a title above parts; those that are empty are left out."""
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _introduction(results: Results) -> str:
    settings = results.settings
    paragraphs = [
        "Written by `python docs/update_precision.py` from what `benchmarks/bench_precision.py` "
        "measured (`benchmarks/results/precision.json`). No number and no verdict here is typed; "
        "`benchmarks/README.md` says how to measure it all again.",
        "A recipe says which number format each group of layers has. `stts-export build CHECKPOINT "
        "-o BUNDLE --precision int8` finds scales on clips, writes graphs with them, compares the "
        "bundle with fp32 on other clips, and refuses to write one that misses a gate of its "
        "recipe. Statistics are of the model as it is deployed: layers above the removal see only "
        "the windows that survive.",
        f"Below, every recipe answers the same {results.questions} questions about "
        f"{results.clips} clips of the {settings['split']} split, those of a plain `stts-export "
        f"eval` with seed {settings['seed']}; nothing was calibrated or chosen on them. The "
        f"checkpoint is `{settings['checkpoint']}`, "
        f"{results.weight_bytes(REFERENCE) / 1e6:.1f} MB in fp32. So small a model says whether "
        "the machinery is right; what a large one loses, its own gates say.",
    ]
    return "\n\n".join(["# Precision", *(textwrap.fill(one, 100) for one in paragraphs)])


def _accuracy(results: Results) -> str:
    rows = []
    for name in results.recipes:
        row = results.row(name, results.ratio)
        low, high = (100 * share for share in row["interval"])
        cells = [f"{100 * row['accuracy']:.1f}", f"{low:.1f} to {high:.1f}"]
        for ratio in (results.ratio, 0.0):
            found = results.difference(name, ratio)
            text = f"{points(found.value)} ({points(found.low)} to {points(found.high)})"
            cells.append("" if name == REFERENCE else text)
        rows.append(
            [f"`{name}`", _megabytes(results.weight_bytes(name)), *cells, _runs_in(results, name)]
        )
    header = [
        "recipe", "weights, MB", f"right at {results.ratio:g}, %", "95 %",
        f"against fp32 at {results.ratio:g}, points", "at 0, points", "measured in",
    ]  # fmt: skip
    return section(
        "Accuracy",
        f"![Difference from fp32 against size]({PICTURES['accuracy']})",
        table(header, rows),
        "Ratios are the fraction of windows removed. The interval of an accuracy is Wilson's; that "
        "of a difference is a bootstrap over clips, both sides on the same questions. "
        f"{_made(results)}",
    )  # fmt: skip


def _runs_in(results: Results, name: str) -> str:
    return str(results.recipes[name]["measured_in"])


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _made(results: Results) -> str:
    values = results.values
    computer, versions = values["machine"], values["versions"]
    return (
        f"ONNX Runtime {computer['onnxruntime']}, PyTorch {versions['torch']}, Model Optimizer "
        f"{versions['nvidia-modelopt']}, {computer['cpu']}, {computer['cores']} cores, "
        f"{values['date']}; `{values['command']}`."
    )


def _agreement(results: Results) -> str:
    rows = []
    for entry in results.others():
        name, found = entry["name"], entry["agreement"]
        lost, won = results.moved(name, results.ratio)
        rows.append(
            [
                f"`{name}`",
                f"{found['flipped']} ({100 * found['flipped'] / found['windows']:.2f} %)",
                f"{found['jaccard']:.4f}", f"{found['score_error']:.1e}",
                f"{found['distance']:.1e}", f"{results.changed(name, results.ratio)}",
                f"{lost}", f"{won}", f"{results.changed(name, 0.0)}",
            ]
        )  # fmt: skip
    windows = results.others()[0]["agreement"]["windows"] if results.others() else 0
    header = [
        "recipe", "windows decided otherwise", "Jaccard", "largest score error",
        "farthest from the threshold", f"answers changed at {results.ratio:g}", "right ones lost",
        "won", "answers changed at 0",
    ]  # fmt: skip
    return section(
        "Agreement with fp32",
        table(header, rows),
        f"On the {results.clips} test clips, of {windows} windows; scores lie between 0 and 1. "
        "Jaccard is the mean over clips of windows kept by both over windows kept by either. How "
        "far a window that is decided otherwise lies from the threshold is told by its fp32 score. "
        "An answer is changed when its text is another one.",
    )


def _sizes(results: Results) -> str:
    whole = results.weight_bytes(REFERENCE)
    graphs = list(results.recipes[REFERENCE]["weights"])
    rows = []
    for name, entry in results.recipes.items():
        own = entry["weights"]
        cells = [_megabytes(own[graph]) for graph in graphs]
        total = sum(own.values())
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(entry["formats"].items()))
        rows.append([f"`{name}`", *cells, _megabytes(total), f"{total / whole:.2f}", layers])
    return section(
        "Size",
        "MB of weights with their scales in each graph below `onnx/`, variants of a graph counted "
        "once. What stays in fp32 or half precision is norms, embeddings, the head, the scorer and "
        f"the blocks that it reads: a large part of a model as small as this one. It has "
        f"{results.recipes[REFERENCE]['layers']} linear layers that may have a format of their "
        "own; the last column counts those that are not at the recipe's base.",
        table(["recipe", *(f"`{graph}`" for graph in graphs), "all", "of fp32", "layers"], rows),
    )


def _gates(results: Results) -> str:
    found = {name: one for name in results.recipes if (one := results.report(name)) is not None}
    if not found:
        return section("Gates", "No recipe that was measured has any.")
    rows = [[f"`{name}`", *_gate_cells(one), _verdict(one)] for name, one in found.items()]
    first = next(iter(found.values()))
    picture = ""
    if ABLATED in found:
        picture = f"![SQNR of each layer of {ABLATED}]({PICTURES['layers']})"
    return section(
        "Gates",
        f"What the builds themselves measured, on {first.clips} held-out clips of the dev split at "
        f"ratio {first.prune_ratio:g}: value / limit. SQNR is that of the worst layer.",
        table(["recipe", *_GATES.values(), "result"], rows),
        picture,
    )


def _gate_cells(found: QuantReport) -> list[str]:
    checks = {check.name: check for check in found.checks}
    return [
        f"{checks[name].got:.3g} / {checks[name].limit:.3g}" if name in checks else ""
        for name in _GATES
    ]


def _verdict(found: QuantReport) -> str:
    missed = ", ".join(check.name for check in found.missed())
    return f"misses {missed}" if missed else "passes"


def _speed(results: Results) -> str:
    speed, settings = results.values["speed"], results.settings
    rows = []
    for row in speed["rows"]:
        cells = []
        for part in ("encode", "prefill", "token"):
            own = row["relative"][part]
            spread = f"{own['low']:.2f} to {own['high']:.2f}"
            value = f"{1e3 * row['seconds'][part]['median']:.1f} ms"
            if row["recipe"] != REFERENCE:
                value += f", {own['median']:.2f}x ({spread})"
            cells.append(value)
        rows.append([f"`{row['recipe']}`", *cells])
    computer = speed["machine"]
    faster = [f"`{row['recipe']}`" for row in speed["rows"] if _is_faster(row)]
    said = (
        f"Faster than fp32 in every part, by medians: {', '.join(faster)}."
        if faster
        else f"No recipe is faster than fp32 in every part of a model as small as this one, so "
        f"`{REFERENCE}` is the one for it on a CPU like this. The README has times of layers as "
        "wide as a real model's."
    )
    return section(
        "Time on a CPU",
        "CPU time on one thread of ONNX Runtime; the number behind it is the time over fp32's for "
        "the same clip: above 1 is slower. All recipes but `cpu` are meant for GPUs, whose "
        "compilers fuse Q/DQ nodes with any base. ONNX Runtime multiplies int8 with int8 beside "
        "fp32, and int4 beside fp32 and fp16; other weights it converts on every call. "
        f"{said}",
        table(["recipe", "encode", "prefill", "each token"], rows),
        f"Medians, and quartiles in brackets, of {len(speed['frames'])} clips of "
        f"{min(speed['frames'])} to {max(speed['frames'])} frames at ratio {results.ratio:g}, "
        f"{settings['tokens']} tokens each; all bundles in turn for each clip. {computer['cpu']}, "
        f"{computer['cores']} cores at load {computer['load_average'][0]:g}.",
    )


def _is_faster(row: dict[str, dict[str, dict[str, float]]]) -> bool:
    return all(part["median"] < 1 for part in row["relative"].values())


def _ablation(results: Results) -> str:
    ablation = results.values["ablation"]
    rows = [
        [
            row["part"], f"{row['layers']}",
            f"{row['flipped']} ({100 * row['flipped'] / ablation['windows']:.2f} %)",
            f"{row['jaccard']:.4f}", f"{row['score_error']:.1e}",
        ]
        for row in ablation["rows"]
    ]  # fmt: skip
    for name in (HALF, ABLATED):
        if name in results.recipes:
            found = results.recipes[name]["agreement"]
            rows.append(
                [
                    f"for comparison: recipe `{name}` as shipped", "",
                    f"{found['flipped']} ({100 * found['flipped'] / found['windows']:.2f} %)",
                    f"{found['jaccard']:.4f}", f"{found['score_error']:.1e}",
                ]
            )  # fmt: skip
    return section(
        "Why the scorer and what it reads stay in high precision",
        "A score decides which windows stay, and no later layer brings back a window that a "
        "rounded score has removed. So no recipe may touch the scorer or the patch embedding, and "
        "the shipped ones leave the blocks before the scores (group `scoring`) at their base. "
        "What int8 would do there, part by part, with all the rest in fp32:",
        table(
            ["in int8", "layers", "windows decided otherwise", "Jaccard", "largest score error"],
            rows,
        ),
        f"The {ablation['clips']} test clips, {ablation['windows']} windows, ratio "
        f"{results.ratio:g}. Scales by largest magnitude: of inputs one per tensor, on the "
        "calibration clips; of weights one per output. PyTorch rounds as the graphs do.",
    )


def _not_run(results: Results) -> str:
    left = [name for name in recipe_names() if name not in results.recipes]
    changed = [
        name
        for name, entry in results.recipes.items()
        if name in recipe_names() and Recipe.load(name).digest() != entry["digest"]
    ]
    lines = [f"* recipe `{name}`" for name in left]
    lines += [f"* recipe `{name}` as it is now: it was changed since" for name in changed]
    lines += [f"* {one}" for one in _GPU_SIZED]
    return section("Not run", "\n".join(lines))
