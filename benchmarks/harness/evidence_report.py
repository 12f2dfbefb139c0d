"""The text of `docs/results.md`: every number and every verdict is computed from the evidence."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from benchmarks.harness.evidence_captions import additions, caption
from benchmarks.harness.evidence_claims import (
    CLEAR,
    TRAINED,
    claims,
    points,
    scaling_groups,
    scaling_setting,
)
from benchmarks.harness.evidence_plan import MAIN, UNPRUNED, VARIANTS
from benchmarks.harness.evidence_stats import Difference, Evidence, Mean, Setting, same_tokens
from stts_export.training.exam import ALL
from stts_export.training.selectors import SELECTORS, STTS

PICTURES = {
    "ratio": "results_ratio.png",
    "types": "results_types.png",
    "frames": "results_frames.png",
}
RATIOS_SHOWN = (0.5, 0.8)
_ABLATIONS = ("aux-0", "aux-reference", "prune-at-0", "prune-at-2", "refill-off")
_GPU_SIZED = (
    "Molmo2-4B fine-tuned on real videos as in the paper, and its benchmarks",
    "the block of the removal in the full tower of 25 blocks",
    "the coefficient of the similarity loss, and refill, at full size",
)


def report(evidence: Evidence) -> str:
    """Return the whole document, in Markdown."""
    sections = [
        _introduction(evidence),
        _claims_section(evidence),
        _by_ratio(evidence),
        _by_type(evidence),
        _differences(evidence),
        _scaling(evidence),
        _trained(evidence),
        _ablations(evidence),
        _speed(evidence),
        _runs(evidence),
        _not_run(evidence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def missing_parts(evidence: Evidence) -> list[str]:
    """Name what the evidence could hold and does not."""
    same = evidence.results["same_as_main"]
    missing = [
        f"`{name}`: {variant.shows}" + (f"; this is `{MAIN}` itself" if name in same else "")
        for name, variant in VARIANTS.items()
        if name not in evidence.variants
    ]
    if not scaling_groups(evidence):
        missing.append("more frames at equally many tokens")
    if not evidence.results["speed"]:
        missing.append("speed")
    return missing


def _introduction(evidence: Evidence) -> str:
    results, settings = evidence.results, evidence.results["settings"]
    base = results["base"]
    config = results["config"]
    shared = "each seed has a base of its own" if base["from_scratch"] else "all share one base"
    made = ""
    if base["training"]["steps"]:
        length = base["training"]["training_seconds"] / 60
        made = f" Its last {base['training']['steps']} steps took {length:.0f} minutes."
    minutes = [run["training_seconds"] / 60 for run in results["runs"]]
    paragraphs = (
        "Written by `python docs/update_results.py` from what `benchmarks/evidence.py` measured "
        "(`benchmarks/results/evidence.json`). No number and no verdict here is typed; "
        "`benchmarks/README.md` says how to measure it all again.",
        "The paper's protocol in miniature. A base sees and answers, and no score was ever trained "
        "for it: the shipped `examples/demo_base` was trained without pruning and then while "
        "random windows were missing (`configs/demo-pretrained.yaml`, `configs/demo-base.yaml`)."
        f"{made} From it every variant is fine-tuned for {config['optim']['steps']} steps with a "
        f"fresh scorer, in {min(minutes):.1f} to {max(minutes):.1f} minutes of one thread (wall "
        f"time, whatever else the machine did), once for each of {len(evidence.seeds)} seeds "
        f"({_listed(evidence.seeds)}); {shared}. Then it answers "
        f"{settings['questions']} questions about {settings['clips']} clips of the test "
        "split: H.264 files, read by the runtime's own reader, other ones for each seed. Training "
        "and tuning see the train and dev splits only; nothing was chosen by results on the test "
        "split.",
        "All selectors keep equally many windows, on the same code path: `stts` the learned "
        "scores, `random` windows, `uniform-frames` whole frames at even distances, `tome` merges "
        "similar windows, `evs` drops what repeats the frame before, after the tower. Ratios are "
        "the fraction removed.",
    )
    return "\n\n".join(["# Results", *(textwrap.fill(one, 100) for one in paragraphs)])


def _claims_section(evidence: Evidence) -> str:
    lines = list(claims(evidence))
    if not lines:
        return ""
    words = (
        "Differences are taken question by question on the same clips (how, says the section on "
        "differences). A claim to be better holds where the interval is above 0 and every seed "
        f"agrees; clearly better is by {100 * CLEAR:g} points or more."
    )
    return "\n\n".join(["## Claims", textwrap.fill(words, 100), "\n".join(lines)])


def percent(mean: Mean) -> str:
    """Format an accuracy in per cent, with half of its interval."""
    reach = "" if mean.reach is None else f" ± {100 * mean.reach:.1f}"
    return f"{100 * mean.value:.1f}{reach}"


def _by_ratio(evidence: Evidence) -> str:
    ratios = [
        ratio
        for ratio in evidence.results["settings"]["ratios"]
        if evidence.has(*(Setting(MAIN, ratio, name) for name in SELECTORS))
    ]
    rows = []
    for ratio in ratios:
        settings = [Setting(MAIN, ratio, name) for name in SELECTORS]
        same_tokens(evidence, settings)
        kept, total = evidence.windows(settings[0])
        cells = [percent(evidence.accuracy(setting)) for setting in settings]
        rows.append([f"{ratio:g}", f"{kept:.1f} of {total:.1f}", *cells])
    return _section(
        "Accuracy against prune ratio",
        "The models trained with learned scores, asked with each selector; accuracy in per cent.",
        _picture(evidence, "ratio", "Accuracy against prune ratio, a line for each selector"),
        _table(["prune ratio", "windows of a clip", *_quoted(SELECTORS)], rows),
        caption(evidence, "± is half of the 95 % t interval over seeds."),
    )


def _by_type(evidence: Evidence) -> str:
    kinds = [*evidence.type_names, ALL]
    parts = []
    for ratio in RATIOS_SHOWN:
        rows = [("all windows", Setting(MAIN, 0.0, STTS))]
        rows += [(f"`{name}` at {ratio:g}", Setting(MAIN, ratio, name)) for name in SELECTORS]
        if not evidence.has(*(setting for _, setting in rows)):
            continue
        cells = [
            [label, *(percent(evidence.accuracy(setting, kind)) for kind in kinds)]
            for label, setting in rows
        ]
        chance = evidence.chance()
        guesses = [f"{100 * chance[kind]:.1f}" if kind in chance else "" for kind in kinds]
        parts.append(_table(["windows", *kinds], [*cells, ["chance", *guesses]]))
    if not parts:
        return ""
    return _section(
        "By type of question",
        _picture(evidence, "types", "Accuracy against prune ratio for each type of question"),
        *parts,
        caption(evidence, "Per cent; ± is half of the 95 % t interval over seeds."),
    )


def _differences(evidence: Evidence) -> str:
    rows, shown = [], {MAIN}
    for ratio in RATIOS_SHOWN:
        ours = Setting(MAIN, ratio, STTS)
        for words, other in _rivals(ratio):
            if evidence.has(ours, other):
                shown.add(other.variant)
                found = evidence.difference(ours, other)
                rows.append([f"{ratio:g}", words, *_difference_cells(found)])
    return _section(
        "Differences, question by question",
        f"How much more often `{MAIN}` with its learned scores is right, in points.",
        _table(["prune ratio", "against", "difference", "95 %", "by seed"], rows),
        caption(
            evidence,
            "Both sides answer the same questions. 95 % by a bootstrap over the clips of each "
            "seed; it does not contain what other seeds would change, which `by seed` hints at.",
            shown,
        ),
    )


def _rivals(ratio: float) -> Iterator[tuple[str, Setting]]:
    for name in SELECTORS[1:]:
        yield f"the same model, `{name}`", Setting(MAIN, ratio, name)
    yield "the same model, all windows", Setting(MAIN, 0.0, STTS)
    yield f"`{UNPRUNED}`, all windows", Setting(UNPRUNED, 0.0, STTS)
    for name in SELECTORS[1:]:
        yield f"`{UNPRUNED}`, then `{name}`", Setting(UNPRUNED, ratio, name)
    for name in TRAINED:
        own = VARIANTS[name].selectors[0]
        yield f"trained with `{own}`", Setting(name, ratio, own)


def _scaling(evidence: Evidence) -> str:
    rows = []
    for group in scaling_groups(evidence):
        first = scaling_setting(*group[0])
        for frames, ratio in group:
            setting = scaling_setting(frames, ratio)
            gained = ["", ""]
            if setting != first:
                gained = _difference_cells(evidence.difference(setting, first))[:2]
            rows.append(
                [
                    f"{frames}", f"{ratio:g}", f"{evidence.windows(setting)[0]:.1f}",
                    percent(evidence.accuracy(setting)), *gained,
                ]
            )  # fmt: skip
    if not rows:
        return ""
    return _section(
        "More frames at equally many tokens",
        f"`{MAIN}` with learned scores; fewer frames are sampled further apart. The models were "
        "trained with a frame every half second, so that the sparser samples are also the less "
        "familiar ones.",
        _picture(evidence, "frames", "Accuracy against tokens, unpruned and pruned"),
        _table(
            ["frames at most", "prune ratio", "windows of a clip", "accuracy, %", "gain", "95 %"],
            rows,
        ),
        caption(
            evidence, "± as above; the gain is over the unpruned row above it, in points, paired."
        ),
    )


def _trained(evidence: Evidence) -> str:
    rows = [(f"`{MAIN}`: {VARIANTS[MAIN].shows}", MAIN, STTS)]
    rows += [(f"`{name}`: {VARIANTS[name].shows}", name, VARIANTS[name].selectors[0])
             for name in TRAINED]  # fmt: skip
    rows += [(f"`{UNPRUNED}`, then `{name}`", UNPRUNED, name) for name in SELECTORS[1:]]
    return _variants_section(
        evidence,
        "Each method with its own training",
        f"`{UNPRUNED}` is fine-tuned as long with nothing removed, and pruned afterwards only.",
        rows,
    )


def _ablations(evidence: Evidence) -> str:
    main = evidence.results["config"]
    prune_at = next(run["prune_at"] for run in evidence.results["runs"] if run["variant"] == MAIN)
    coefficient = main["pruning"]["similarity_coefficient"]
    rows = [
        (f"`{MAIN}`: removal after block {prune_at + 1}, coefficient {coefficient:g}", MAIN, STTS)
    ]
    for name in _ABLATIONS:
        variant = VARIANTS[name]
        values = ", ".join(f"{key} {_yaml(value)}" for key, value in variant.overrides.items())
        rows.append((f"`{name}`: {variant.shows} ({values})", name, STTS))
    return _variants_section(
        evidence, "Ablations", "One setting changed, trained and examined alike.", rows
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _variants_section(
    evidence: Evidence, title: str, words: str, rows: Sequence[tuple[str, str, str]]
) -> str:
    cells, shown = [], {MAIN}
    for label, variant, selector in rows:
        settings = [Setting(variant, ratio, selector) for ratio in (0.0, *RATIOS_SHOWN)]
        if not evidence.has(*settings):
            continue
        shown.add(variant)
        shares = [percent(evidence.accuracy(setting)) for setting in settings]
        against = ["", ""]
        if variant != MAIN:
            against = [
                " (".join(_difference_cells(evidence.difference(setting, ours))[:2]) + ")"
                for setting in settings[1:]
                for ours in [Setting(MAIN, setting.ratio, STTS)]
            ]
        cells.append([label, *shares, *against])
    if len(cells) < 2:
        return ""
    ratios = [f"{ratio:g}" for ratio in (0.0, *RATIOS_SHOWN)]
    against = [f"{ratio:g} against `{MAIN}`" for ratio in RATIOS_SHOWN]
    return _section(
        title,
        words,
        _table(["", *(f"at {ratio}" for ratio in ratios), *against], cells),
        caption(
            evidence,
            "Accuracy in per cent, ± as above; differences in points with the 95 % interval of "
            "the paired bootstrap.",
            shown,
        ),
    )


def _difference_cells(found: Difference) -> list[str]:
    """Difference, interval, and differences by seed."""
    return [
        points(found.value),
        f"{points(found.low)} to {points(found.high)}",
        ", ".join(map(points, found.by_seed)),
    ]


def _speed(evidence: Evidence) -> str:
    speed = evidence.results["speed"]
    if not speed:
        return ""
    rows = []
    for row in speed["rows"]:
        milliseconds = [f"{1e3 * row[part]['median']:.1f}" for part in ("encode", "prefill")]
        gain = row["speedup"]
        spread = f"{gain['low']:.2f} to {gain['high']:.2f}"
        quotient = [f"{gain['median']:.2f}x", spread] if row["prune_ratio"] else ["", ""]
        label = f"`{row['selector']}`" if row["prune_ratio"] else row["selector"]
        rows.append([f"{row['prune_ratio']:g}", label, *milliseconds, *quotient])
    computer = speed["machine"]
    return _section(
        "Speed beside it",
        "CPU time until the first token, of a clip that is decoded already. `uniform-frames` "
        "leaves the dropped frames out before the tower; `evs` runs the whole tower on all of "
        "them. This tower is so small that what surrounds its products counts too: "
        "`benchmarks/README.md` has a larger one.",
        _table(
            ["prune ratio", "windows", "encode, ms", "prefill, ms", "faster than ratio 0",
             "middle half"],
            rows,
        ),
        f"Medians of {speed['repeats']} clips of {min(speed['frames'])} to {max(speed['frames'])} "
        f"frames, all settings in turn for each clip; the quotient is taken within a clip. "
        f"`{MAIN}`, seed {speed['seed']}; PyTorch {speed['torch']}, "
        f"{evidence.results['settings']['dtype']}, one thread of "
        f"{computer['cpu']}, {computer['cores']} cores at load {computer['load_average'][0]:g}; "
        f"`{evidence.results['command']}`.",
    )  # fmt: skip


def _runs(evidence: Evidence) -> str:
    rows = []
    for name in evidence.variants:
        runs = [run for run in evidence.results["runs"] if run["variant"] == name]
        minutes = [run["training_seconds"] / 60 for run in runs]
        dev = runs[0]["dev_accuracy"]
        accuracies = ", ".join(f"{100 * run['dev_accuracy']['accuracy']:.1f}" for run in runs)
        rows.append(
            [
                f"`{name}`", f"{runs[0]['steps']}",
                f"{sum(minutes) / len(minutes):.1f}", f"{dev['prune_ratio']:g}", accuracies,
            ]
        )  # fmt: skip
    machines = sorted({run["machine"] for run in evidence.results["runs"]})
    return _section(
        "Training runs",
        _table(["variant", "steps", "minutes", "dev prune ratio", "dev accuracy by seed, %"], rows),
        f"{len(evidence.results['runs'])} runs, mean minutes of wall time; dev accuracy by teacher "
        f"forcing with the run's own selector. One thread each of {'; '.join(machines)}; "
        f"`{evidence.results['command']}`.{additions(evidence, evidence.variants)}",
    )


def _not_run(evidence: Evidence) -> str:
    missing = missing_parts(evidence)
    lines = ["## Not run", ""]
    if missing:
        lines += ["In this size:", "", *(f"* {one}" for one in missing), ""]
    lines += ["What needs a GPU:", "", *(f"* {one}" for one in _GPU_SIZED)]
    return "\n".join(lines)


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def _picture(evidence: Evidence, name: str, words: str) -> str:
    if name == "frames" and not scaling_groups(evidence):
        return ""
    return f"![{words}]({PICTURES[name]})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _quoted(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
