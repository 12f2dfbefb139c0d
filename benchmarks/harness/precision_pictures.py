"""The pictures of `docs/precision.md`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.precision_plan import ABLATED, REFERENCE
from benchmarks.harness.precision_report import PICTURES
from benchmarks.harness.precision_results import Results
from stts_export.calibration.quant_report import SQNR, QuantReport

Drawer = Callable[[Any], None]

_NEAR, _STEP = 0.03, 0.008
"""Parts of a size: within the first, recipes are drawn beside each other, a step apart."""
_GRAPHS = {
    "vision_lower": "tab:green",
    "vision_upper": "tab:blue",
    "decoder": "tab:orange",
}


def draw_all(results: Results, folder: Path, source: str) -> None:
    """Draw what the results have into PNG files.

    Args:
        results: what is drawn.
        folder: to write to.
        source: written into the files' metadata: what they were drawn from.
    """
    from matplotlib.figure import Figure  # without pyplot it draws by Agg

    folder.mkdir(parents=True, exist_ok=True)
    for file, drawer in _drawers(results, folder).items():
        figure = Figure(layout="constrained")
        drawer(figure)
        figure.savefig(file, format="png", dpi=110, metadata={"Source": source})


def pictures_of(results: Results, folder: Path) -> list[Path]:
    """Return the files that `draw_all` writes."""
    return list(_drawers(results, folder))


def _drawers(results: Results, folder: Path) -> dict[Path, Drawer]:
    drawers: dict[str, Drawer] = {"accuracy": partial(_accuracy, results=results)}
    report = results.report(ABLATED) if ABLATED in results.recipes else None
    if report is not None:
        drawers["layers"] = partial(_layers, report=report)
    return {folder / PICTURES[name]: drawer for name, drawer in drawers.items()}


def _accuracy(figure: Any, results: Results) -> None:
    figure.set_size_inches(7.5, 4.6)
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=1)
    axes.axhline(-1, color="tab:red", linestyle=":", linewidth=1, label="one point lost")
    drawn: list[float] = []
    for entry in results.others():
        name = entry["name"]
        size = results.weight_bytes(name) / 1e6
        place = sum(abs(size - other) < _NEAR * size for other in drawn)  # side by side
        drawn.append(size)
        x = size * (1 + _STEP * place)
        found = results.difference(name, results.ratio)
        value, low, high = (100 * part for part in (found.value, found.low, found.high))
        axes.errorbar(
            [x], [value], [[value - low], [high - value]],
            color="tab:blue" if results.is_bundle(name) else "tab:gray",
            marker="o", markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
        axes.annotate(
            name, (x, high), xytext=(0, 4 + 9 * place), textcoords="offset points", fontsize=8,
            ha="center",
        )  # fmt: skip
    axes.set_xlabel(
        f"weights, MB ({REFERENCE}: {results.weight_bytes(REFERENCE) / 1e6:.1f}); blue: bundle on "
        "ONNX Runtime, gray: PyTorch that rounds as the graphs do"
    )
    axes.xaxis.label.set_fontsize(8)
    axes.set_ylabel(f"accuracy against fp32 at ratio {results.ratio:g}, points")
    axes.legend(fontsize=8, loc="lower right")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    figure.supxlabel(
        f"{results.questions} questions about {results.clips} test clips; bars: 95 %, bootstrap "
        "over clips, the same questions on both sides",
        fontsize=7,
    )


def _layers(figure: Any, report: QuantReport) -> None:
    """SQNR of every layer in the order in which they run."""
    layers = report.layers
    figure.set_size_inches(9, 4.6)
    axes = figure.subplots()
    highest = max(layer.sqnr for layer in layers if math.isfinite(layer.sqnr))
    axes.bar(
        range(len(layers)),
        [max(0.0, min(layer.sqnr, highest)) for layer in layers],
        color=[_GRAPHS[layer.graph] for layer in layers],
    )
    limit = next(check.limit for check in report.checks if check.name == SQNR)
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    label = f"limit {limit:g} dB"
    axes.text(-0.3, limit, label, fontsize=8, va="bottom", backgroundcolor="white")
    names = [layer.layer.removeprefix("vision.").removeprefix("language.") for layer in layers]
    axes.set_xticks(range(len(layers)), names, fontsize=6, rotation=90)
    for graph, colour in _GRAPHS.items():
        axes.bar([0], [0], color=colour, label=graph)
    axes.set_ylabel("SQNR of the layer's output, dB")
    axes.set_title(
        f"recipe {report.recipe}: {len(layers)} layers in the order in which they run, "
        f"{report.clips} held-out clips",
        fontsize=9,
    )
    axes.legend(fontsize=8, loc="upper right", ncols=len(_GRAPHS))
    axes.margins(x=0.01, y=0.15)
