"""The picture of a run of bench_stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"exact": "tab:blue", "incremental": "tab:orange"}


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw the three measurements side by side.

    Args:
        results: what `bench_stream.run` returned.
        file: PNG to write.
    """
    from matplotlib.figure import Figure  # without pyplot it draws by Agg

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    windows, streams, trace = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    _windows(windows, results)
    _streams(streams, results)
    _trace(trace, results["controller"])
    machine = results["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores at load {machine['load_average'][0]:g}; "
        f"ONNX Runtime {machine['onnxruntime']}, {results['settings']['threads'] or 'all'} threads;"
        f" random weights; {results['date']}",
        fontsize=9,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=110)


def _windows(axes: Any, results: dict[str, Any]) -> None:
    for mode, colour in _COLOURS.items():
        rows = [row for row in results["windows"] if row["mode"] == mode]
        middle = [1e3 * row["first_token"]["median"] for row in rows]
        spread = [
            [1e3 * row["first_token"]["median"] - 1e3 * row["first_token"]["low"] for row in rows],
            [1e3 * row["first_token"]["high"] - 1e3 * row["first_token"]["median"] for row in rows],
        ]
        frames = [row["frames"] for row in rows]
        axes.errorbar(frames, middle, spread, color=colour, marker="o", capsize=3, label=mode)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["frames"] for row in rows], [str(row["frames"]) for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("frames of the window")
    axes.set_ylabel("question to first token, ms")
    axes.set_title("median and range of repeats")
    axes.legend()


def _streams(axes: Any, results: dict[str, Any]) -> None:
    for mode, colour in _COLOURS.items():
        rows = [row for row in results["streams"] if row["mode"] == mode]
        counts = [row["streams"] for row in rows]
        encoded = [row["encoded_per_second"]["median"] for row in rows]
        axes.plot(counts, encoded, color=colour, marker="o", label=mode)
        for row, height in zip(rows, encoded, strict=True):
            if row["streams"] > 1:
                axes.annotate(
                    f"{row['fairness']['low']:.2f}",
                    (row["streams"], height),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    highest = max(row["encoded_per_second"]["median"] for row in results["streams"])
    axes.set_ylim(0, 1.15 * highest)
    axes.set_xlabel(f"streams at {results['settings']['rate']:g} frames a second each")
    axes.set_ylabel("frames a second through the model")
    axes.set_title("all streams; least served / most served")
    axes.legend()


def _trace(axes: Any, trace: dict[str, Any]) -> None:
    answers = trace["answers"]
    times = [answer["time"] for answer in answers]
    axes.axvspan(*trace["load_between"], color="0.9", label="competing load")
    axes.axhline(trace["budget"], color="tab:red", linestyle="--", label="budget")
    axes.plot(times, [a["latency"] for a in answers], "o-", ms=3, color="tab:blue", label="latency")
    known = [answer for answer in answers if answer["predicted"] is not None]
    axes.plot(
        [answer["time"] for answer in known],
        [answer["predicted"] for answer in known],
        ":",
        color="tab:blue",
        label="predicted",
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("seconds to the answer")
    axes.set_title("latency budget under a step of load")
    ratios = axes.twinx()
    ratios.step(
        times,
        [answer["prune_ratio"] for answer in answers],
        where="post",
        color="tab:green",
        label="prune ratio",
    )
    ratios.set_ylim(0, 1)
    ratios.set_ylabel("prune ratio", color="tab:green")
    lines, labels = axes.get_legend_handles_labels()
    more, names = ratios.get_legend_handles_labels()
    axes.legend(
        lines + more,
        labels + names,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=5,
    )
