"""What a bundle holds, for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stts_export.bundle import CONFIG_FOLDER, Bundle
from stts_export.tensors import DATA_FILE, TensorSpec, graph_specs


def describe(bundle: Path) -> dict[str, Any]:
    """Describe a bundle in plain values.

    Raises:
        InputError: no bundle, or a damaged one.
    """
    opened = Bundle.open(bundle)
    manifest, vision, text = opened.manifest, opened.config.vision, opened.config.text
    specs = graph_specs(opened.config, manifest.precision)
    return {
        "bundle": str(bundle),
        "schema_version": manifest.schema_version,
        "stts_export": manifest.stts_export,
        "source": manifest.source,
        "precision": manifest.precision,
        "targets": list(manifest.targets),
        "limits": asdict(manifest.limits),
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
                "inputs": [_tensor(tensor) for tensor in specs[name].inputs],
                "outputs": [_tensor(tensor) for tensor in specs[name].outputs],
                "bytes": _bytes(opened.graph(name)),
            }
            for name in manifest.graphs
        },
        "tool_versions": manifest.tool_versions,
        "licences": manifest.licences,
    }


def _bytes(graph: Path) -> int:
    """Size of a graph with its weights, which variants share."""
    return graph.stat().st_size + graph.with_name(DATA_FILE).stat().st_size


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


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
        f"  prompts  {description['prompts']}, up to {limits['max_tokens']} tokens",
    ]
    for name, graph in description["graphs"].items():
        lines.append(f"  {name} ({graph['bytes'] / 1e6:.1f} MB)")
        for side in ("inputs", "outputs"):
            shown = [_tensor_text(tensor) for tensor in graph[side][:_SHOWN]]
            hidden = len(graph[side]) - len(shown)
            rest = f", and {hidden} cache tensors" if hidden else ""
            lines.append(f"    {side:7} {', '.join(shown)}{rest}")
    return "\n".join(lines)


_SHOWN = 4  # the decoder has two cache tensors per layer; more than this says nothing new


def _tensor_text(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']}({', '.join(map(str, tensor['shape']))})"
