"""A random-weight model to time, and its graphs, exported once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import stts_export
from stts_export.calibration.layers import Numerics
from stts_export.config import (
    ConnectorConfig,
    ModelConfig,
    PruningConfig,
    TextConfig,
    TokenIds,
    VisionConfig,
)
from stts_export.tensors import Precision, graph_specs

_SEED = 20260318
# Standard deviation of the random scorer's logits: scores then spread over (0, 1).
_LOGIT_SPREAD = 1.5
_CALIBRATION_FRAMES = 12


def model_config(*, quick: bool) -> ModelConfig:
    """Sizes of the model: a tower 384 wide on a 27x27 grid and a small decoder.

    Args:
        quick: a tower 32 wide on a 9x9 grid instead, for smoke tests.
    """
    width, heads, side, blocks = (32, 2, 126, 7) if quick else (384, 6, 378, 12)
    text_width = 64 if quick else 256
    vision = VisionConfig(
        image_size=(side, side),
        patch_size=14,
        hidden_size=width,
        intermediate_size=4 * width,
        num_heads=heads,
        head_dim=width // heads,
        num_layers=blocks,
        taps=(blocks - 1, blocks - 2 if quick else blocks - 5),
        pruning=PruningConfig(prune_at=3),
    )
    connector = ConnectorConfig(
        hidden_size=width,
        num_heads=heads,
        head_dim=width // heads,
        intermediate_size=2 * text_width,
    )
    text = TextConfig(
        hidden_size=text_width,
        intermediate_size=3 * text_width,
        num_layers=2 if quick else 3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=text_width // 4,
        vocab_size=256,
        additional_vocab_size=16,
        rope_theta=1e6,
        max_position_embeddings=16384,
    )
    tokens = TokenIds(*range(text.vocab_size, text.vocab_size + 8))
    return ModelConfig(vision, connector, text, tokens, use_frame_special_tokens=True)


def full_size_config() -> ModelConfig:
    """Sizes of the real vision tower (25 blocks, 1152 wide, 27x27 patches), with a tiny decoder."""
    small = model_config(quick=False)
    vision = dataclasses.replace(
        small.vision,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        head_dim=72,
        num_layers=25,
        taps=(24, 18),
    )
    connector = dataclasses.replace(
        small.connector, hidden_size=1152, num_heads=16, head_dim=72, intermediate_size=9728
    )
    text = dataclasses.replace(small.text, hidden_size=2560)
    return dataclasses.replace(small, vision=vision, connector=connector, text=text)


def graphs(
    config: ModelConfig,
    cache: Path,
    precision: Precision = "fp32",
    names: Collection[str] | None = None,
) -> Path:
    """Export the model's graphs, or find those of an earlier run.

    Args:
        config: sizes of the model.
        cache: a folder is made in it for each set of arguments and state of the exporting code.
        precision: type of weights and activations.
        names: which graphs; all when None.

    Returns:
        Folder that holds the graphs as `onnx/` of a bundle does, see `tensors.graph_file`.
    """
    known = graph_specs(config, precision)
    chosen = [name for name in known if names is None or name in names]
    folder = cache / _fingerprint(config, precision, chosen)
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _export(config, partial, precision, chosen)
        os.replace(partial, folder)
    return folder


def _fingerprint(config: ModelConfig, precision: Precision, names: Sequence[str]) -> str:
    package = Path(stts_export.__file__).parent
    sources = [package / "tensors.py", Path(__file__)]
    for part in ("model", "graphs"):
        sources += sorted((package / part).glob("*.py"))
    digest = hashlib.sha256(repr((config, precision, names)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _export(config: ModelConfig, folder: Path, precision: Precision, names: Sequence[str]) -> None:
    from stts_export.graphs.export import export_graph

    model = random_model(config)
    for name in names:
        export_graph(model, name, Numerics(precision), folder)


def random_model(config: ModelConfig) -> Any:
    """Return an `SttsModel` with default weights; its scores spread as a trained scorer's do."""
    import torch

    from benchmarks.harness.clips import moving_clip
    from stts_export.model.vlm import SttsModel

    torch.manual_seed(_SEED)
    model = SttsModel(config).eval()
    vision = model.vision
    clip = torch.from_numpy(moving_clip(_CALIBRATION_FRAMES, config.vision.image_size))
    assert vision.scorer is not None
    with torch.no_grad():
        vision.embedding.positional.normal_(std=0.1)
        # Default weights give nearly equal scores.
        fresh = torch.arange(len(clip)) == 0
        start = torch.zeros(1, config.vision.windows, config.vision.hidden_size)
        scores, _ = vision.score(vision.before_scoring(clip), fresh, start)
        logits = torch.logit(scores[1:].double())
        scale = _LOGIT_SPREAD / logits.std()
        vision.scorer.w3.weight *= scale
        vision.scorer.w3.bias.copy_((vision.scorer.w3.bias - logits.mean()) * scale)
    return model
