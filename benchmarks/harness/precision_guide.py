"""The part of `docs/precision.md` that needs no measurement: recipes, targets, calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stts_export.calibration.formats import KV_CACHE_INT8, SUPPORT, Support
from stts_export.calibration.layers import FORMATS
from stts_export.calibration.quant_report import QuantReport
from stts_export.calibration.recipe import Recipe, recipe_names
from stts_export.devices import DEVICES, Device
from stts_export.engines.library import BACKENDS, ONNXRUNTIME

_LAYERS_SHOWN = 4
_CALIBRATE = """\
    stts-export calibrate CHECKPOINT --clips VIDEOS --recipe int8 -o CALIBRATION
    stts-export build CHECKPOINT -o BUNDLE --precision int8 --calibration CALIBRATION --clips VIDEOS
    stts-export quant-report BUNDLE -o BUNDLE.png"""
_CLIPS = """\
    schema: 1
    name: cameras
    calibration:
      - {video: yard/001.mp4, prompt: How many people are there?}
    held_out:
      - {video: yard/002.mp4, prompt: How many people are there?}"""


def where_it_runs() -> str:
    """Say what each recipe does and which targets run it."""
    recipes = [Recipe.load(name) for name in recipe_names()]
    rows = [
        [f"`{one.name}`", one.description, "yes" if one.gates else "no: nothing is fitted"]
        for one in recipes
    ]
    formats = [
        [f"`{name}`", *(_support(name, backend) for backend in BACKENDS)] for name in FORMATS
    ]
    devices = [
        [labels, place, ", ".join(f"`{one.name}`" for one in recipes if runs(one, *where))]
        for labels, place, where in _devices()
    ]
    return "\n\n".join(
        [
            "## What the recipes do, and where they run",
            _table(["recipe", "what it does", "gates"], rows),
            "The oldest GPU, and library where that matters, that runs a format:",
            _table(["format", *(f"`{backend}`" for backend in BACKENDS)], formats),
            "So, of the devices that `stts-export estimate` knows:",
            _table(["device", "runs on", "recipes"], devices),
            "A recipe of your own is a YAML file, `--precision my.yaml`: copy one of "
            "`stts_export/calibration/recipes`, and name layers by group (`scoring`, `vision`, "
            "`connector`, `decoder`, `head`), by name or by pattern. The first rule that matches a "
            "layer decides; one in fp32 beside fp16 takes the rest of its attention or "
            "feed-forward along, and the build says so. Or let `--auto DEVICE` search for the "
            "smallest model that passes the gates on a device: it moves layers to fp16, or on a "
            "CPU to fp32, until one does; the clips that judge it are not those that the search "
            "saw.",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _support(name: str, backend: str) -> str:
    rows = [row for row in SUPPORT if (row.format, row.backend) == (name, backend)]
    return _oldest(rows[0]) if rows else "no"


def _oldest(row: Support) -> str:
    if not row.sm:
        return "CPU"
    return f"sm{row.sm}" + (f", {row.version[0]}.{row.version[1]}" if any(row.version) else "")


_Place = tuple[str, int | None, tuple[int, int] | None]
"""Back end, streaming multiprocessor of the GPU, and version of the library; None for any."""


def _devices() -> Iterator[tuple[str, str, _Place]]:
    """Devices that run the same, in words and for `runs`."""
    yield "any CPU", f"`{ONNXRUNTIME}`", (ONNXRUNTIME, None, None)
    groups: dict[_Place, list[Device]] = {}
    for device in DEVICES.values():
        sm = None if device.sm is None else int(device.sm.removeprefix("sm"))
        groups.setdefault((device.backend, sm, device.tensorrt), []).append(device)
    for (backend, sm, version), members in groups.items():
        number = "" if version is None else f" {version[0]}.{version[1]}"
        labels = ", ".join(device.label for device in members)
        yield labels, f"`{backend}`{number}, sm{sm}", (backend, sm, version)


def runs(recipe: Recipe, backend: str, sm: int | None, version: tuple[int, int] | None) -> bool:
    """Whether a back end runs all formats of a recipe; as `formats.check_formats`, which is slow.

    Args:
        recipe: whose formats.
        backend: what runs it.
        sm: of the GPU; any when None.
        version: of the library; any when None.
    """
    able = {
        row.format
        for row in SUPPORT
        if row.backend == backend
        and (sm is None or sm >= row.sm)
        and (version is None or version >= row.version)
    }
    holds_cache = recipe.kv_cache == "base" or backend in KV_CACHE_INT8
    return holds_cache and able.issuperset(recipe.formats())


def guide(example: QuantReport | None) -> str:
    """Say how to calibrate on one's own clips, and how to read what comes out.

    Args:
        example: a report to show.
    """
    parts = [
        "## Calibrating on your own clips",
        "`pip install 'stts-export[cpu,quantize]'`. Scales that fit the cameras a model will see "
        "are better than those of the synthetic clips that are taken if none are given:",
        _CALIBRATE,
        "`VIDEOS` is a folder of videos (every third is held out for the gates) or a YAML file:",
        _CLIPS,
        "No video may be in both lists: gates on clips that scales were fitted to would say too "
        "little. Statistics of each clip stay in `CALIBRATION`, so an interrupted run goes on "
        "where it was, and another recipe over the same clips costs no second pass. Without "
        "`--calibration` the build does all of it itself.",
        "A bundle that misses a gate is not written, unless `--force` is given; the manifest then "
        "says so. Before that, move the layers with the lowest SQNR to a wider format by a rule of "
        "your own recipe, or calibrate on more clips. Loosening a limit is a decision about the "
        "product, so limits are in the recipe.",
        "## Reading `quant-report`",
        "\n".join(
            [
                "* **sqnr**: signal to quantisation noise at the output of each quantised layer, "
                "with the errors of all layers before it; the worst layer counts. The first layer "
                "that is too low is named too, because errors go on from there.",
                "* **jaccard**: windows that both models keep over windows that either keeps, mean "
                "over clips.",
                "* **windows near the threshold**: how far the fp32 score of a window that is "
                "decided otherwise lies from the threshold. The limit is twice what the format of "
                "the scoring blocks may move a score by; beyond it more than rounding is wrong.",
                "* **cosine**: of the features of kept windows, both models given fp32's windows.",
                "* **kl**: between next-token distributions, again given fp32's windows, in nats.",
                "* **answers changed**: share of greedy answers that are other texts, each model "
                "with the windows that it chose itself. With `-v` they are listed.",
            ]
        ),
        "Exit code 3 says that a gate is missed. The picture has the same in bars: red is beyond "
        "its limit.",
    ]
    if example is not None:
        shown = "\n".join(f"    {line}".rstrip() for line in _excerpt(example))
        parts += [f"Of the bundle `{example.recipe}` above:", shown]
    return "\n\n".join(parts)


def _excerpt(example: QuantReport) -> list[str]:
    """Lines of a report without most of its layers."""
    ranked = sorted(example.layers, key=lambda layer: layer.sqnr)  # as in a report that is written
    lines = replace(example, layers=tuple(ranked)).lines()
    first, ends = lines.index("") + 1, len(lines) - 1 - lines[::-1].index("")
    layers = lines[first:ends]
    shown = layers[: 1 + _LAYERS_SHOWN]
    left = len(example.layers) - _LAYERS_SHOWN
    return [*lines[:first], *shown, f"... {left} better ones", *lines[ends:]]
