"""What a bundle holds, for people and for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stts_export.bundle import CONFIG_FOLDER, WITHOUT_WEIGHTS, Bundle
from stts_export.engines.engine_set import EngineSet, engine_json, tensor_json
from stts_export.files import readable_size
from stts_export.tensors import DATA_FILE, cache_dtype, graph_specs


def describe(bundle: Path) -> dict[str, Any]:
    """Describe a bundle in plain values.

    Raises:
        InputError: no bundle, or a damaged one.
    """
    opened = Bundle.open(bundle)
    manifest, vision, text = opened.manifest, opened.config.vision, opened.config.text
    specs = graph_specs(opened.config, manifest.precision, manifest.kv_cache)
    return {
        "bundle": str(bundle),
        "schema_version": manifest.schema_version,
        "stts_export": manifest.stts_export,
        "source": manifest.source,
        "precision": manifest.precision,
        "recipe": manifest.precision_name,
        "formats": _counts(manifest.formats),
        "gates": None if manifest.judged is None else asdict(manifest.judged),
        "kv_cache": cache_dtype(manifest.precision, manifest.kv_cache),
        "targets": list(manifest.targets),
        "limits": asdict(manifest.limits),
        "positions": manifest.positions,
        "prompts": "text or token ids"
        if (opened.folder / CONFIG_FOLDER / "tokenizer.json").exists()
        else "token ids only",
        "model": {
            "image_size": list(vision.image_size),
            "patch_grid": list(vision.grid),
            "window_grid": list(vision.window_grid),
            "windows_per_frame": vision.windows,
            "vision_blocks": vision.num_layers,
            "removal_after_block": vision.split_at - 1 if vision.pruning else None,
            "trained_prune_ratio": vision.pruning.trained_prune_ratio if vision.pruning else None,
            "decoder_layers": text.num_layers,
        },
        "graphs": {
            name: {
                "inputs": [tensor_json(tensor) for tensor in specs[name].inputs],
                "outputs": [tensor_json(tensor) for tensor in specs[name].outputs],
                "bytes": _bytes(name, opened.graph(name)),
            }
            for name in manifest.graphs
        },
        "engines": {engines.folder.name: _engines(engines) for engines in opened.engine_sets()},
        "tool_versions": manifest.tool_versions,
        "licences": manifest.licences,
    }


def _counts(formats: Mapping[str, str]) -> dict[str, int]:
    """Layers of each format."""
    return dict(Counter(formats.values()))


def _formats_text(description: Mapping[str, Any]) -> str:
    """Say which layers are not at the precision of the rest, and what the gates said."""
    counts = [f"{count} layers {name}" for name, count in description["formats"].items()]
    gates = description["gates"]
    if gates is None:
        verdict = "not judged"
    elif gates["passed"]:
        verdict = "passed its gates"
    else:
        verdict = f"written by force, misses its gates for {', '.join(gates['missed'])}"
    return f"recipe {description['recipe']}: {', '.join([*counts, verdict])}"


def _bytes(name: str, graph: Path) -> int:
    """Size of a graph with its weights, which variants share."""
    weights = 0 if name in WITHOUT_WEIGHTS else graph.with_name(DATA_FILE).stat().st_size
    return graph.stat().st_size + weights


def _engines(engines: EngineSet) -> dict[str, Any]:
    return {
        "backend": engines.backend,
        "version": engines.version,
        "target": engines.target,
        "engines": {
            name: {**engine_json(engine), "bytes": engines.path(name).stat().st_size}
            for name, engine in engines.engines.items()
        },
    }


def describe_text(description: dict[str, Any]) -> str:
    """Format what `describe` returned for reading."""
    model, limits = description["model"], description["limits"]
    grid = "x".join(str(side) for side in model["window_grid"])
    size = "x".join(str(side) for side in model["image_size"])
    pruning = (
        f"after block {model['removal_after_block']}, trained at {model['trained_prune_ratio']:g}"
        if model["trained_prune_ratio"] is not None
        else "off: the checkpoint has no scorer"
    )
    lines = [
        f"{description['bundle']}: {description['source']}, {description['precision']}, "
        f"for {', '.join(description['targets'])}",
        f"  frames   {size} pixels, {grid} windows each, up to {limits['max_frames']}",
        f"  pruning  {pruning}; ratio {limits['min_prune_ratio']:g} or more",
        f"  prompts  {description['prompts']}, up to {limits['max_tokens']} tokens; "
        f"{description['positions']} positions after pruning; {description['kv_cache']} KV cache",
    ]
    if description["formats"] or description["gates"]:
        lines.append(f"  formats  {_formats_text(description)}")
    for name, graph in description["graphs"].items():
        lines.append(f"  {name} ({readable_size(graph['bytes'])})")
        lines += _sides(graph)
    for engines in description["engines"].values():
        head = f"{engines['backend']} {engines['version']} for {engines['target']}"
        for name, engine in engines["engines"].items():
            size = readable_size(engine["bytes"])
            lines.append(f"  {name} engine, {head} ({size}, from {engine['graph']})")
            if not engine["read_back"]:
                lines.append("    as the network was, not read back from the engine")
            lines += _sides(engine)
            lines += [f"    profile {_profile_text(profile)}" for profile in engine["profiles"]]
    return "\n".join(lines)


_SHOWN = 4  # the decoder has two cache tensors per layer; more than this says nothing new


def _sides(graph: dict[str, Any]) -> list[str]:
    """Inputs and outputs in a line each."""
    lines = []
    for side in ("inputs", "outputs"):
        shown = [_tensor_text(tensor) for tensor in graph[side][:_SHOWN]]
        hidden = len(graph[side]) - len(shown)
        rest = f", and {hidden} more" if hidden else ""
        lines.append(f"    {side:7} {', '.join(shown)}{rest}")
    return lines


def _tensor_text(tensor: dict[str, Any]) -> str:
    values = " values" if tensor.get("is_shape") else ""
    return f"{tensor['name']} {tensor['dtype']}({', '.join(map(str, tensor['shape']))}){values}"


def _profile_text(profile: dict[str, Any]) -> str:
    """Say what a profile leaves free, as 1x6..8x6."""
    shown = []
    for name, value in list(profile.items())[:_SHOWN]:
        low, high = ("x".join(map(str, value[side])) for side in ("min", "max"))
        shown.append(f"{name} {low}" if low == high else f"{name} {low}..{high}")
    rest = len(profile) - len(shown)
    return ", ".join(shown) + (f", and {rest} more" if rest else "")
