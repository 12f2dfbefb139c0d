"""A bundle with random weights and a tokenizer, for streams; built once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import stts_export
from benchmarks.harness.model import random_model
from stts_export.config import ModelConfig
from stts_export.training.config import ModelShape, model_json

MAX_FRAMES = 64
"""Longest window of a bundle."""
MAX_FPS = 64.0
"""Far above what a model is trained with: a stream alone must be able to overload the machine."""
TRAINED_RATIO = 0.3
"""Where a stream with a latency budget begins."""
_MAX_TOKENS = 16384
_SMALL = ModelShape(
    image_size=378, patch_size=14, vision_width=128, vision_heads=2, vision_mlp=512,
    vision_blocks=7, prune_at=1, taps=(6, 4), connector_mlp=512, text_width=256,
    text_heads=4, text_kv_heads=2, text_mlp=768, text_layers=3,
)  # fmt: skip
_TINY = ModelShape(
    image_size=48, patch_size=4, vision_width=32, vision_heads=2, vision_mlp=48,
    vision_blocks=4, prune_at=0, taps=(3, 2), connector_mlp=48, text_width=32,
    text_heads=2, text_kv_heads=1, text_mlp=48, text_layers=2,
)  # fmt: skip


def stream_shape(*, quick: bool) -> ModelShape:
    """Sizes of the model: a tower 128 wide on a 27x27 grid and a decoder 256 wide.

    Args:
        quick: 32 wide on a 12x12 grid instead, for smoke tests.
    """
    return _TINY if quick else _SMALL


def stream_bundle(cache: Path, *, quick: bool) -> Path:
    """Build the bundle, or find that of an earlier run.

    Args:
        cache: a folder is made in it for each shape and state of the building code.
        quick: see `stream_shape`.
    """
    shape = stream_shape(quick=quick)
    folder = cache / f"stream-{_fingerprint(shape)}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _build(shape, partial)
        os.replace(partial / "bundle", folder)
        shutil.rmtree(partial)
    return folder


def _fingerprint(shape: ModelShape) -> str:
    package = Path(stts_export.__file__).parent
    sources = [
        Path(__file__),
        Path(__file__).with_name("model.py"),
        *(package / f"{name}.py" for name in ("build", "bundle", "tensors")),
    ]
    for part in ("model", "graphs", "checkpoint"):
        sources += sorted((package / part).glob("*.py"))
    sources += [package / "training" / name for name in ("config.py", "tokenizer.py")]
    digest = hashlib.sha256(repr((shape, MAX_FRAMES, MAX_FPS, TRAINED_RATIO)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(shape: ModelShape, folder: Path) -> None:
    from stts_export.build import bundle_from_checkpoint
    from stts_export.checkpoint import save_checkpoint
    from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files

    tokenizer, vocab_size = build_tokenizer()
    values = model_json(shape, vocab_size, MAX_FRAMES, TRAINED_RATIO)
    values["text_config"]["max_position_embeddings"] = _MAX_TOKENS
    checkpoint = folder / "checkpoint"
    config = ModelConfig.from_dict(values, has_scorer=True)
    save_checkpoint(random_model(config), checkpoint)
    save_tokenizer_files(tokenizer, checkpoint, MAX_FRAMES)
    video = checkpoint / "video_preprocessor_config.json"
    sampling = json.loads(video.read_text(encoding="utf-8"))
    video.write_text(json.dumps({**sampling, "max_fps": MAX_FPS}) + "\n", encoding="utf-8")
    bundle_from_checkpoint(checkpoint, folder / "bundle")
