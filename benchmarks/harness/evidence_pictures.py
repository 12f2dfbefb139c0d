"""The pictures of `docs/results.md`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.evidence_claims import LABELS, scaling_groups, scaling_setting
from benchmarks.harness.evidence_plan import MAIN
from benchmarks.harness.evidence_report import PICTURES
from benchmarks.harness.evidence_stats import Evidence, Mean, Setting
from stts_export.training.exam import ALL
from stts_export.training.selectors import EVS, RANDOM, SELECTORS, STTS, TOME, UNIFORM_FRAMES

Drawer = Callable[[Any, Evidence], None]

_COLOURS = {
    STTS: "tab:blue",
    RANDOM: "tab:gray",
    UNIFORM_FRAMES: "tab:orange",
    TOME: "tab:green",
    EVS: "tab:purple",
}
_MARKERS = {STTS: "o", RANDOM: "s", UNIFORM_FRAMES: "^", TOME: "D", EVS: "v"}
_SHIFT = 0.006
"""Between the points of two selectors at one ratio, so that their error bars can be told apart."""


def draw_all(evidence: Evidence, folder: Path, source: str) -> None:
    """Draw what the evidence has into PNG files.

    Args:
        evidence: the results.
        folder: to write to.
        source: written into the files' metadata: what they were drawn from.
    """
    for file, drawer in _drawers(evidence, folder).items():
        _draw(evidence, file, source, drawer)


def pictures_of(evidence: Evidence, folder: Path) -> list[Path]:
    """Return the files that `draw_all` writes."""
    return list(_drawers(evidence, folder))


def _drawers(evidence: Evidence, folder: Path) -> dict[Path, Drawer]:
    drawers: dict[str, Drawer] = {"ratio": _ratio, "types": _types}
    if scaling_groups(evidence):
        drawers["frames"] = _frames
    return {folder / PICTURES[name]: drawer for name, drawer in drawers.items()}


def _draw(evidence: Evidence, file: Path, source: str, drawer: Drawer) -> None:
    from matplotlib.figure import Figure  # without pyplot it draws by Agg

    figure = Figure(layout="constrained")
    drawer(figure, evidence)
    computer = evidence.results["machine"]
    figure.supxlabel(
        f"{len(evidence.seeds)} seeds, {evidence.questions} test questions; bars: 95 % t interval "
        f"over seeds; {computer['cpu']}",
        fontsize=7,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=110, metadata={"Source": source})


def _ratio(figure: Any, evidence: Evidence) -> None:
    figure.set_size_inches(7, 4.6)
    axes = figure.subplots()
    _lines(axes, evidence, ALL)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("prune ratio: fraction of windows removed")
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3)


def _types(figure: Any, evidence: Evidence) -> None:
    names = evidence.type_names
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure.set_size_inches(3.2 * columns, 2.5 * rows + 0.6)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    chance = evidence.chance()
    for axes, name in zip(panels, names, strict=False):
        _lines(axes, evidence, name)
        if name in chance:
            axes.axhline(100 * chance[name], color="black", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=7, ncols=len(labels), loc="outside upper center")
    figure.supylabel("accuracy, %; dotted: chance", fontsize=9)


def _lines(axes: Any, evidence: Evidence, kind: str) -> None:
    """A line for each selector over the ratios of `main`."""
    for number, name in enumerate(SELECTORS):
        ratios = [
            ratio
            for ratio in evidence.results["settings"]["ratios"]
            if evidence.has(Setting(MAIN, ratio, name))
        ]
        means = [evidence.accuracy(Setting(MAIN, ratio, name), kind) for ratio in ratios]
        shift = (number - (len(SELECTORS) - 1) / 2) * _SHIFT
        _errorbar(axes, [ratio + shift for ratio in ratios], means, name, LABELS[name])


def _errorbar(axes: Any, places: list[float], means: list[Mean], name: str, label: str) -> None:
    axes.errorbar(
        places,
        [100 * mean.value for mean in means],
        [100 * (mean.reach or 0.0) for mean in means],
        color=_COLOURS[name],
        marker=_MARKERS[name],
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=label,
    )


def _frames(figure: Any, evidence: Evidence) -> None:
    figure.set_size_inches(7, 4.2)
    axes = figure.subplots()
    groups = scaling_groups(evidence)
    ratios = sorted({ratio for group in groups for _, ratio in group})
    colours = ["black", "tab:blue", "tab:green", "tab:red"]
    for colour, ratio in zip(colours, ratios, strict=False):
        found = sorted(
            (evidence.windows(scaling_setting(frames, own))[0], frames)
            for group in groups
            for frames, own in group
            if own == ratio
        )
        means = [evidence.accuracy(scaling_setting(frames, ratio)) for _, frames in found]
        axes.errorbar(
            [windows for windows, _ in found],
            [100 * mean.value for mean in means],
            [100 * (mean.reach or 0.0) for mean in means],
            color=colour, marker="o", markersize=4, linewidth=1.2, capsize=2,
            label=f"prune ratio {ratio:g}" if ratio else "unpruned",
        )  # fmt: skip
        for (windows, frames), mean in zip(found, means, strict=True):
            axes.annotate(
                f"{frames}", (windows, 100 * mean.value), xytext=(4, 5),
                textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip
    axes.set_xlabel("windows of a clip that are kept; numbers at the points: frames at most")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
